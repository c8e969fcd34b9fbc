"""The network of a STARFlow block (arXiv:2506.06276); the flow that such blocks make is `zoo/flows/stack.py`'s.

B examples, T = rows x columns tokens of a latent grid, D = C P P numbers per token, S condition tokens in front of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from zoo.errors import UserError
from zoo.fields import Positive, Size, check_fields
from zoo.flows.transforms import shift_right
from zoo.nn.embed import grid_positions, rope_angles
from zoo.nn.layers import Dense, RMSNorm, Table, normal, zeros
from zoo.nn.transformer import Block, GatedMLP, Transformer, attend_layer, init_trunk_cache
from zoo.task import Params

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
        self, h: jax.Array, cache: Any = None, index: Any = None, layer: Any = None, **how: Any
    ) -> tuple[jax.Array, Any]:
        """h [B, T, W] -> h, cache; `how` as of `attend_layer`."""
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
        y, cache = attend_layer(q, k, v, cache, index, layer, causal=True, backend=self.backend, **how)
        y = dense(y.reshape(*h.shape[:2], -1), width, ("heads", "embed"), "out")
        h = h + (norm(y, "attention_post_norm") if m.post_norm else y)
        mlp = GatedMLP(m.mlp, jax.nn.gelu, self.dtype)  # by tanh
        nn.share_scope(self, mlp)  # its kernels lie beside the others
        y = mlp(norm(h, "mlp_norm"))
        return h + (norm(y, "mlp_post_norm") if m.post_norm else y), cache


class FlowNet(Transformer):
    """The network of one flow block: the condition and the tokens before t -> log-scale and shift of token t."""

    grid: Grid
    dims: int
    prefix: int  # S, condition tokens in front; 0: this block sees no condition
    condition_width: int  # E; 0: no block does
    start: bool  # a learned token in front of the first; else the first passes unchanged
    learned: bool  # a table of positions; else rotary ones
    reach: float  # of rotary positions
    reverse: bool  # runs through the grid backwards
    softplus: bool
    clip: float
    norm: bool
    lm: LanguageModel | None

    @nn.compact
    def __call__(
        self,
        x: jax.Array | None,
        condition: jax.Array | None = None,
        cache: Any = None,
        index: Any = 0,
        temperature: jax.Array | None = None,
    ) -> tuple[Any, Any, Any]:
        """x [B, T, D] in the block's own order -> log-scale a and shift b [B, T, D], float32, and the cache.

        Without a cache a and b belong to the tokens of x. With one, x are the tokens whose slots begin at `index` (that of
        the start token is S) and a and b belong to the tokens behind them; `x=None` puts the condition into the cache.

        Args:
            condition: [B, S, E].
        """
        parts = []
        if condition is not None and self.prefix:
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
            if self.learned:
                table = Table(self.tokens, self.width, name="positions")()
                table = table[::-1] if self.reverse else table  # a row belongs to a place, whatever the direction
                if cache is not None:
                    table = jax.lax.dynamic_slice_in_dim(table, index - self.prefix, x.shape[1])
                h = h + table.astype(self.dtype)
            parts.append(h)
        h = jnp.concatenate(parts, axis=1)
        rope: Any = self.angles()
        if rope is not None and cache is not None:
            rope = jax.lax.dynamic_slice_in_dim(jnp.asarray(rope), index, h.shape[1])
        if self.lm:
            block: nn.Module = LanguageModelBlock(self.lm, self.dtype, self.attention, parent=None)
        else:
            block = Block(self.head_dim, causal=True, dtype=self.dtype, backend=self.attention, parent=None)
        h, cache = self.trunk(block)(h, cache, index, rope=rope, temperature=temperature)
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

    @property
    def tokens(self) -> int:
        """T."""
        return self.grid[0] * self.grid[1]

    @property
    def guided(self) -> bool:
        """Whether guidance bends this block: where it sees the condition."""
        return self.prefix > 0

    @nn.nowrap
    def angles(self) -> np.ndarray | None:
        """Rotary angles [S + T, K/2] of all slots; None where positions are learned.

        Not reordered with the tokens: slot k always has the place of the k-th cell, in backward blocks too (as the official
        code has it). A model with a condition keeps the third axis in all blocks.
        """
        if self.learned:
            return None
        if self.lm:
            return rope_angles(np.arange(self.prefix + self.tokens)[:, None], (self.lm.head_dim // 2,), self.lm.base)
        place, half = positions(self.grid, self.prefix, self.reach), self.head_dim // 2
        if self.condition_width:
            plane = (half - TIME_PAIRS) // 2
            return rope_angles(place, (plane, plane, TIME_PAIRS))
        return rope_angles(place[:, :2], (half // 2, half // 2))

    @nn.nowrap
    def fresh(self, rng: jax.Array) -> Params:
        """Fresh parameters."""
        condition = jnp.zeros((1, self.prefix, self.condition_width)) if self.prefix else None
        made: Any = self.init(rng, jnp.zeros((1, self.tokens, self.dims)), condition)
        return made["params"]

    @nn.nowrap
    def memory(self, rows: int) -> Any:
        """Empty caches for so many examples."""
        slots = self.prefix + self.tokens
        if not self.lm:
            return self.caches(rows, slots)
        return init_trunk_cache(self.depth, self.scan, rows, slots, self.lm.kv_heads, self.lm.head_dim, self.dtype)


def positions(grid: Grid, prefix: int, reach: float) -> np.ndarray:
    """Places [S + T, 3] of all slots: row, column, and the place of a condition token, j / S of the reach."""
    cells = grid_positions(*grid, reach)
    place = np.zeros((prefix + len(cells), 3))
    place[prefix:, :2] = cells
    place[:prefix, 2] = np.arange(prefix) / max(prefix, 1) * reach
    return place
