"""The network of a STARFlow block, the flow, its inverse and guidance, and score-based denoising (arXiv:2506.06276).

B examples, T = rows x columns tokens of a latent grid, D = C P P numbers per token, S condition tokens in front of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from zoo.dist import constrain, whole
from zoo.errors import UserError
from zoo.fields import Positive, Size, check_fields
from zoo.flows.inverse import Before, Chain, Guidance, Jacobi, Stepper, invert
from zoo.flows.transforms import LOG_2PI, affine, shift_right
from zoo.nn.embed import grid_positions, patchify, rope_angles, unpatchify
from zoo.nn.layers import Dense, RMSNorm, Table, normal, zeros
from zoo.nn.transformer import Block, Trunk, attend_layer, cast_trunk, init_trunk_cache
from zoo.task import Params

if TYPE_CHECKING:
    from zoo.papers.starflow.task import StarFlow

UNIT = math.log(math.e - 1)  # softplus of it is 1: a network that says nothing leaves the scale at 1
TIME_PAIRS = 8  # pairs of each head that the third axis, the place of a condition token, turns

Grid = tuple[int, int]  # rows and columns of tokens


@dataclass(frozen=True)
class LanguageModel:
    """Sizes of a deep block built like a decoder-only language model: grouped heads, gated MLP, norms on both sides."""

    width: Size = 2304
    heads: Size = 8
    kv_heads: Size = 4  # each serves heads / kv_heads consecutive query heads
    head_dim: Size = 256
    mlp: Size = 9216
    qk_norm: bool = True
    post_norm: bool = True
    base: Positive = 10_000.0  # of the rotary positions, which count [condition; image] in one row

    def __post_init__(self) -> None:
        check_fields(self, "task.lm.")
        if self.heads % self.kv_heads:
            raise UserError(f"task.lm.kv_heads={self.kv_heads} does not divide task.lm.heads={self.heads}")
        if self.head_dim % 2:
            raise UserError(f"task.lm.head_dim={self.head_dim} is odd; rotary positions turn pairs of numbers")


class LanguageModelBlock(nn.Module):
    """A decoder layer of a language model: no biases, RMS norms (1 + w) before and after each branch, GELU-gated MLP."""

    sizes: LanguageModel
    dtype: str
    backend: str

    @nn.compact
    def __call__(
        self,
        h: jax.Array,
        cache: Any = None,
        index: Any = None,
        layer: Any = None,
        temperature: Any = None,
        rope: Any = None,
    ) -> Any:
        """h [B, T, W] -> h, cache."""
        m, width = self.sizes, h.shape[-1]

        def norm(x: jax.Array, name: str, axis: str | None = "embed") -> jax.Array:
            return RMSNorm(centred=True, axis=axis, name=name)(x)

        def dense(x: jax.Array, features: int, axes: tuple[str | None, ...], name: str) -> jax.Array:
            return Dense(features, axes, dtype=self.dtype, bias=False, name=name)(x)

        # One kernel as it is published; its columns are query and key/value heads, so no mesh axis cuts them.
        qkv = dense(norm(h, "attention_norm"), (m.heads + 2 * m.kv_heads) * m.head_dim, ("embed", None), "qkv")
        qkv = qkv.reshape(*h.shape[:2], -1, m.head_dim)
        q, k, v = jnp.split(qkv, [m.heads, m.heads + m.kv_heads], axis=2)
        if m.qk_norm:
            q, k = norm(q, "query_norm", None), norm(k, "key_norm", None)
        y, cache = attend_layer(q, k, v, cache, index, layer, temperature, rope, causal=True, backend=self.backend)
        y = dense(y.reshape(*h.shape[:2], -1), width, ("heads", "embed"), "out")
        h = h + (norm(y, "attention_post_norm") if m.post_norm else y)
        x = norm(h, "mlp_norm")
        gate = jax.nn.gelu(dense(x, m.mlp, ("embed", "mlp"), "gate"), approximate=True)
        y = dense(gate * dense(x, m.mlp, ("embed", "mlp"), "up"), width, ("mlp", "embed"), "down")
        return h + (norm(y, "mlp_post_norm") if m.post_norm else y), cache


class FlowNet(nn.Module):
    """The network of one flow block: the condition and the tokens before t -> log-scale and shift of token t."""

    dims: int
    width: int
    depth: int
    head_dim: int
    prefix: int  # S, condition tokens in front; 0: this block sees no condition
    start: bool  # a learned token in front of the first; else the first passes unchanged
    places: int  # rows of a table of learned positions; 0: none
    flip: bool
    softplus: bool
    clip: float
    norm: bool
    lm: LanguageModel | None
    dtype: str
    scan: bool
    remat: str
    attention: str

    @nn.compact
    def __call__(
        self,
        x: jax.Array | None,
        condition: jax.Array | None = None,
        rope: jax.Array | None = None,
        cache: Any = None,
        index: Any = 0,
        temperature: jax.Array | None = None,
    ) -> tuple[Any, Any, Any]:
        """x [B, T, D] in the block's own order -> log-scale a and shift b [B, T, D], float32, and the cache.

        Without a cache a and b belong to the tokens of x. With one, x are the tokens whose slots begin at `index` (that of
        the start token is S) and a and b belong to the tokens behind them; `x=None` puts the condition into the cache.

        Args:
            condition: [B, S, E].
            rope: angles [S + T, K/2] of all slots.
        """
        parts = []
        if condition is not None:
            # The condition of a language model is its own embeddings.
            known = (
                condition
                if self.lm
                else Dense(self.width, (None, "embed"), dtype=self.dtype, name="condition")(condition)
            )
            parts.append(known.astype(self.dtype))
        if x is not None:
            if self.start and cache is None:
                first: Any = self.param("start", normal(1.0), (self.dims,), jnp.float32)
                x = jnp.concatenate([jnp.broadcast_to(first, x[:, :1].shape).astype(x.dtype), x[:, :-1]], axis=1)
            h = Dense(self.width, (None, "embed"), dtype=self.dtype, name="in")(x)
            if self.places:
                table = Table(self.places, self.width, name="positions")()
                table = table[::-1] if self.flip else table  # a row belongs to a place, whatever the direction
                if cache is not None:
                    table = jax.lax.dynamic_slice_in_dim(table, index - self.prefix, x.shape[1])
                h = h + table.astype(self.dtype)
            parts.append(h)
        h = jnp.concatenate(parts, axis=1)
        if rope is not None and cache is not None:
            rope = jax.lax.dynamic_slice_in_dim(rope, index, h.shape[1])
        if self.lm:
            block: nn.Module = LanguageModelBlock(self.lm, self.dtype, self.attention, parent=None)
        else:
            block = Block(self.head_dim, causal=True, dtype=self.dtype, backend=self.attention, parent=None)
        trunk = Trunk(self.depth, block, self.scan, self.remat, name="trunk")
        h, cache = trunk(h, cache, index, rope=rope, temperature=temperature)
        if x is None:
            return None, None, cache
        h = h[:, -x.shape[1] :]
        if self.norm:
            h = RMSNorm(centred=True, name="norm")(h)
        out = Dense(2 * self.dims, ("embed", None), kernel_init=zeros, name="out")(h)
        if self.clip:
            out = self.clip * jnp.tanh(out / self.clip)
        if not self.start and cache is None:
            out = shift_right(out)
        a, b = jnp.split(out, 2, axis=-1)
        return jnp.log(jax.nn.softplus(a + UNIT)) if self.softplus else a, b, cache


def init_net(task: StarFlow, i: int, rng: jax.Array) -> Params:
    """Fresh parameters of block i."""
    x = jnp.zeros((1, task.tokens, task.dims))
    seen = jnp.zeros((1, task.prefix, task.condition_width)) if conditioned(task, i) else None
    fresh: Any = net(task, i).init(rng, x, seen, angles(task, i, (task.rows, task.columns)))
    return fresh["params"]


def conditioned(task: StarFlow, i: int) -> bool:
    """Whether block i sees the condition."""
    return task.prefix > 0 and (task.condition == "all" or i == task.blocks - 1)


def net(task: StarFlow, i: int) -> FlowNet:
    """The network of block i; the last one is the deep one, nearest the noise."""
    lm = task.lm if i == task.blocks - 1 else None
    return FlowNet(
        dims=task.dims,
        width=lm.width if lm else task.width,
        depth=task.depths[i],
        head_dim=task.head_dim,
        prefix=task.prefix if conditioned(task, i) else 0,
        start=task.start,
        places=task.tokens if task.positions == "learned" else 0,
        flip=flips(task, i),
        softplus=task.scale == "softplus",
        clip=task.clip,
        norm=task.final_norm,
        lm=lm,
        dtype=task.dtype,
        scan=task.scan,
        remat=task.remat,
        attention=task.attention,
    )


def flips(task: StarFlow, i: int) -> bool:
    """Whether block i runs through the grid backwards; the order of a task is that of its odd blocks."""
    return i % 2 == (0 if task.order == "L2R" else 1)


def reorder(task: StarFlow, x: jax.Array, i: int) -> jax.Array:
    """[B, T, D] from raster order to that of block i, or back: its own inverse."""
    return x[:, ::-1] if flips(task, i) else x


def positions(task: StarFlow, grid: Grid, prefix: int) -> np.ndarray:
    """Places [S + T, 3] of all slots: row, column, and the place of a condition token, j / S of the reach."""
    cells = grid_positions(*grid, task.reach)
    place = np.zeros((prefix + len(cells), 3))
    place[prefix:, :2] = cells
    place[:prefix, 2] = np.arange(prefix) / max(prefix, 1) * task.reach
    return place


def angles(task: StarFlow, i: int, grid: Grid) -> np.ndarray | None:
    """Rotary angles [S + T, K/2] of all slots of block i; None where positions are learned.

    Not reordered with the tokens: slot k always has the place of the k-th cell, in backward blocks too (as the official
    code has it). A model with a condition keeps the third axis in all blocks.
    """
    if task.positions == "learned":
        return None
    prefix = task.prefix if conditioned(task, i) else 0
    if task.lm and i == task.blocks - 1:
        slots = prefix + grid[0] * grid[1]
        return rope_angles(np.arange(slots)[:, None], (task.lm.head_dim // 2,), task.lm.base)
    place, half = positions(task, grid, prefix), task.head_dim // 2
    if task.prefix:
        plane = (half - TIME_PAIRS) // 2
        return rope_angles(place, (plane, plane, TIME_PAIRS))
    return rope_angles(place[:, :2], (half // 2, half // 2))


def tokens(task: StarFlow, x: jax.Array) -> tuple[jax.Array, Grid]:
    """Latents [B, H, W, C] -> tokens [B, T, D] and their grid."""
    rows, columns = x.shape[1] // task.patch, x.shape[2] // task.patch
    if (rows * task.patch, columns * task.patch) != x.shape[1:3]:
        raise UserError(
            f"task.patch={task.patch} does not divide latents of {x.shape[1]} x {x.shape[2]}; set task.patch=1, or encode "
            f"the images again with `zoo prepare --multiple {task.factor * task.patch if task.vae else 'N'}`"
        )
    if task.positions == "learned" and (rows, columns) != (task.rows, task.columns):
        raise UserError(
            f"task.positions='learned' has places for {task.rows} x {task.columns} tokens, but there are {rows} x {columns}; "
            "use task.positions=rope for other grids"
        )
    return patchify(x, task.patch, channel_first=False), (rows, columns)


def untokens(task: StarFlow, x: jax.Array, grid: Grid) -> jax.Array:
    """Tokens [B, T, D] of a grid -> latents [B, H, W, C]."""
    return unpatchify(x, task.patch, task.channels, rows=grid[0], channel_first=False)


def apply(task: StarFlow, i: int, params: Params, *inputs: Any) -> tuple[jax.Array, jax.Array, Any]:
    """The network of block i, with its own parameters."""
    outputs: Any = net(task, i).apply({"params": params}, *inputs)
    return outputs


def flow(
    task: StarFlow, params: Params, x: jax.Array, grid: Grid, condition: jax.Array | None = None
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Data to noise in tokens: [B, T, D] -> the output of every block (the last is z) and its log-det [B] per dimension."""
    states, logdets = [], []
    for i in range(task.blocks):
        u = reorder(task, x, i)
        seen = condition if conditioned(task, i) else None
        a, b, _ = apply(task, i, params[f"block{i}"], u, seen, angles(task, i, grid))
        v, logdet = affine(u, a, b)
        x = constrain(reorder(task, v, i), "batch", "tokens", None)
        states.append(x)
        logdets.append(logdet)
    return states, logdets


def forward(
    task: StarFlow, params: Params, x: jax.Array, condition: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Data to noise.

    Args:
        x: [B, H, W, C] latents (or pixels), noise already added; H and W may differ from those of the task.
        condition: [B, S, E]; None only where the task has none.

    Returns:
        z [B, T, D], logdet [B] (the mean over all T D dimensions), and the sum over the inputs of all blocks of their mean
        square [B], which the loss keeps small (STARFlow, appendix on training).
    """
    chex.assert_shape(x, (None, None, None, task.channels))
    x, grid = tokens(task, x)
    states, logdets = flow(task, params, x, grid, condition)
    squares = [jnp.square(s).mean((1, 2)) for s in (x, *states[:-1])]
    return states[-1], sum(logdets[1:], logdets[0]), sum(squares[1:], squares[0])


def stepper(
    task: StarFlow,
    params: Params,
    i: int,
    batch: int,
    grid: Grid,
    condition: jax.Array | None,
    null: jax.Array | None,
    guidance: Guidance,
    temperature: float = 1.0,
    before: Before | None = None,
) -> Stepper:
    """What inverts block i: its network on new tokens, caches that hold the condition, and the start token [D].

    Guided, both passes run as one batch of 2 B and see the same tokens (STARFlow section 3.3).
    """
    count, prefix = grid[0] * grid[1], task.prefix if conditioned(task, i) else 0
    deep = i == task.blocks - 1
    guided = guidance.active and prefix > 0 and (deep or guidance.blocks == "all")
    rows = 2 * batch if guided else batch
    heads, head_dim = task.width // task.head_dim, task.head_dim
    if deep and task.lm:
        heads, head_dim = task.lm.kv_heads, task.lm.head_dim
    divide = None
    if not isinstance(temperature, (int, float)) or temperature != 1 or (guided and guidance.tempered):
        divide = jnp.full((rows,), temperature, jnp.float32)
        divide = divide.at[batch:].multiply(guidance.attention_temperature)
    table = angles(task, i, grid)
    rope = None if table is None else jnp.asarray(table)
    cache = Before.memory(
        before,
        lambda: init_trunk_cache(task.depths[i], task.scan, rows, prefix + count, heads, head_dim, task.dtype),
    )
    mine = Before.then(before, params[f"block{i}"])
    block = whole(cast_trunk(mine, task.dtype), lambda: init_net(task, i, jax.random.key(0)))
    if prefix:
        chex.assert_shape([condition, null] if guided else condition, (batch, prefix, None))
        seen = jnp.concatenate([jnp.asarray(condition), jnp.asarray(null)]) if guided else condition
        *_, cache = apply(task, i, block, None, seen, rope, cache, 0, divide)

    def step(u: jax.Array, cache: Any, index: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        u = jnp.concatenate([u, u]) if guided else u
        a, b, cache = apply(task, i, block, u, None, rope, cache, prefix + index, divide)
        if guided:
            place = index + jnp.arange(u.shape[1]) + (0 if task.start else 1)
            ramp = ((place + 1) / count)[:, None]
            return *guidance.apply((a[:batch], b[:batch]), (a[batch:], b[batch:]), ramp), cache
        return jnp.exp(a), b, cache

    return Stepper(step, cache, block["start"] if task.start else None, prefix)


def chain(
    task: StarFlow,
    params: Params,
    batch: int,
    grid: Grid,
    condition: jax.Array | None = None,
    null: jax.Array | None = None,
    guidance: float | Guidance = 0.0,
    attention_temperature: float = 1.0,
) -> Chain:
    """The blocks of the flow as their inverse sees them, for `batch` examples on a grid; arguments as of `inverse`."""
    guidance = Guidance.of(guidance, "gaussian", annealed=False)
    if guidance.active and not task.prefix:
        raise UserError(f"guidance={guidance.weight}: this model has no condition to be guided to; leave guidance out")

    def block(i: int, before: Before | None = None) -> Stepper:
        return stepper(task, params, i, batch, grid, condition, null, guidance, attention_temperature, before)

    return Chain(
        task.blocks,
        block,
        lambda x, i: reorder(task, x, i),
        lambda i: params[f"block{i}"]["out"]["kernel"],
    )


def inverse(
    task: StarFlow,
    params: Params,
    z: jax.Array,
    condition: jax.Array | None = None,
    null: jax.Array | None = None,
    guidance: float | Guidance = 0.0,
    *,
    attention_temperature: float = 1.0,
    method: str | Jacobi = "sequential",
    sequence: bool = False,
) -> jax.Array:
    """Noise to data, deep block first, token by token or by sweeps; jit it with `task` and a `Guidance` static.

    Args:
        z: [B, H, W, C] from N(0, I), on the grid of the result.
        condition, null: [B, S, E], what to draw and its absence; `null` is needed with guidance only.
        guidance: a weight w of the Gaussian rule (0 is off; the usual scale is 1 + w), or a `Guidance`.
        attention_temperature: divides all attention logits.
        method: how blocks are inverted, see `zoo.flows.inverse.Jacobi.of`.
        sequence: also return the states on the way.

    Returns:
        x [B, H, W, C], the noise of training still in it; with `sequence` [blocks + 1, B, H, W, C], z first, x last.
    """
    x, grid = tokens(task, z)
    blocks = chain(task, params, len(x), grid, condition, null, guidance, attention_temperature)
    states = invert(blocks, x, method).states
    found = [untokens(task, s, grid) for s in (states if sequence else states[-1:])]
    return jnp.stack(found) if sequence else found[0]


def log_prob(task: StarFlow, params: Params, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
    """log p(x) in nats [B], of noisy latents [B, H, W, C] as they are."""
    z, logdet, _ = forward(task, params, x, condition)
    return z[0].size * (logdet - 0.5 * jnp.square(z).mean((1, 2)) - 0.5 * LOG_2PI)


def score(task: StarFlow, params: Params, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
    """Gradient of log p (nats, whole example) with respect to each x, [B, H, W, C]."""
    return jax.grad(lambda x: log_prob(task, params, x, condition).sum())(x)


def denoise(
    task: StarFlow, params: Params, x: jax.Array, condition: jax.Array | None = None, strength: float = 1.0
) -> jax.Array:
    """One step of Tweedie's formula, x + strength sigma^2 score(x), with the condition that x was drawn with."""
    return x + strength * task.noise**2 * score(task, params, x, condition)
