"""Flows over patches of images: the network of a block, its stack, and its published layout.

What TarFlow (arXiv:2412.06329) and iTARFlow (arXiv:2604.20041) have in common. B images, T tokens, D numbers per token.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from zoo.errors import UserError
from zoo.flows.inverse import Guidance
from zoo.flows.stack import Stack
from zoo.flows.transforms import shift_right
from zoo.nn.embed import patchify, unpatchify, waves
from zoo.nn.layers import Dense, Table, gelu, zeros
from zoo.nn.transformer import Block, Trunk, init_trunk_cache
from zoo.task import Name, Params


class Level(nn.Module):
    """What a block is told of the noise: a vector of log sigma (iTARFlow's code), in float32 whatever the network computes in."""

    width: int

    @nn.compact
    def __call__(self, log_sigma: jax.Array) -> jax.Array:
        """[B] -> [B, width]."""
        h = gelu(Dense(4 * self.width, ("embed", "mlp"), name="up")(waves(log_sigma, self.width, last=False)))
        return Dense(self.width, ("mlp", "embed"), name="down")(h)


class FlowNet(nn.Module):
    """The network of one flow block: tokens up to t -> log-scale and shift of token t + 1."""

    tokens: int
    dims: int
    width: int
    depth: int
    head_dim: int
    classes: int
    flip: bool
    scale: bool
    dtype: str
    scan: bool
    remat: str
    attention: str
    level: bool = False  # whether it is told of the noise

    prefix = 0
    guided = True

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        condition: Any = None,
        cache: Any = None,
        index: Any = None,
        temperature: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, Any, jax.Array]:
        """x [B, T, D] in the block's own order -> log-scale and shift [B, T, D] float32, cache, hidden [B, T, width].

        Log-scales are zeros where the flow preserves volume. See `zoo.flows.stack.Net`.

        Args:
            condition: label [B], class numbers, negative for "no label"; None for no label at all. Where it is told of the noise a
                pair of that and a vector [B, width] (`Level`).
        """
        label, level = condition if self.level and condition is not None else (condition, None)
        positions = Table(self.tokens, self.width, name="positions")()
        if self.flip:  # a row of the table belongs to a place in the image, whatever the direction
            positions = positions[::-1]
        if cache is not None:
            positions = jax.lax.dynamic_slice_in_dim(positions, index, x.shape[1])
        h = Dense(self.width, (None, "embed"), dtype=self.dtype, name="in")(x) + positions.astype(self.dtype)
        if self.classes:
            table = Table(self.classes, self.width, name="labels")()
            mean = table.mean(0)  # stands for "no label": there is no null embedding in this paper
            if label is None:
                embedding = mean[None]
            else:
                embedding = jnp.where((label >= 0)[:, None], table[jnp.maximum(label, 0)], mean)
            h = h + embedding[:, None].astype(self.dtype)
        if level is not None:
            h = h + level[:, None].astype(self.dtype)
        block = Block(self.head_dim, causal=True, dtype=self.dtype, backend=self.attention, parent=None)
        h, cache = Trunk(self.depth, block, self.scan, self.remat, name="trunk")(
            h, cache, index, temperature=temperature
        )
        outputs = self.dims * (2 if self.scale else 1)
        out = Dense(outputs, ("embed", None), kernel_init=zeros, name="out")(h)  # float32: exp() of it compounds
        out = shift_right(out) if cache is None else out
        a, b = jnp.split(out, 2, axis=-1) if self.scale else (jnp.zeros_like(out), out)
        return a, b, cache, h

    @nn.nowrap
    def fresh(self, rng: jax.Array) -> Params:
        """Fresh parameters; directions differ in the forward pass only."""
        made: Any = self.init(rng, jnp.zeros((1, self.tokens, self.dims)))
        if not self.level:
            return made["params"]
        level: Any = Level(self.width, parent=None).init(jax.random.fold_in(rng, 1), jnp.zeros(1))
        return {**made["params"], "level": level["params"]}

    @nn.nowrap
    def memory(self, rows: int) -> Any:
        """Empty caches for so many images."""
        heads = self.width // self.head_dim
        return init_trunk_cache(self.depth, self.scan, rows, self.tokens, heads, self.head_dim, self.dtype)


@dataclass(frozen=True)
class PatchStack(Stack):
    """A stack of `FlowNet`s that are told of the noise, each with patches of its own size; states have those of block 0.

    Its condition is a pair: labels [B], and log sigma [B].
    """

    patches: tuple[int, ...]  # a side of each block's, in pixels
    channels: int

    def order(self, x: jax.Array, i: int) -> jax.Array:
        """[B, T, D] in raster order, to the patches and the order of block i."""
        return super().order(self._cut(x, self.patches[0], self.patches[i]), i)

    def back(self, x: jax.Array, i: int) -> jax.Array:
        """The inverse of `order`."""
        return self._cut(super().back(x, i), self.patches[i], self.patches[0])

    def _cut(self, x: jax.Array, old: int, new: int) -> jax.Array:
        return x if old == new else patchify(unpatchify(x, old, self.channels), new)

    def length(self, i: int) -> int:
        """Tokens of block i."""
        return self.tokens * self.patches[0] ** 2 // self.patches[i] ** 2

    def told(self, i: int, block: Params, condition: Any) -> Any:
        """Labels and the vector of the noise [B, width]."""
        label, log_sigma = condition
        width = block["in"]["bias"].shape[0]
        vector: Any = Level(width, parent=None).apply({"params": block["level"]}, log_sigma)
        return label, vector


def init_blocks(nets: tuple[FlowNet, ...], rng: jax.Array) -> Params:
    """Fresh parameters of each block: those that are alike at once, which makes one graph to compile of many."""
    keys = jax.random.split(rng, len(nets))
    alike: dict[FlowNet, list[int]] = {}
    for i, net in enumerate(nets):
        alike.setdefault(net.clone(flip=False), []).append(i)
    params: Params = {}
    for net, own in alike.items():
        many = jax.vmap(net.fresh)(keys[jnp.asarray(own)] if len(alike) > 1 else keys)
        params |= {f"block{i}": jax.tree.map(lambda p, row=row: p[row], many) for row, i in enumerate(own)}
    return {f"block{i}": params[f"block{i}"] for i in range(len(nets))}


def flops(nets: tuple[FlowNet, ...]) -> float:
    """Floating-point operations of one training example: 6 per weight and token, and attention's 6 T^2 width a layer.

    The causal half of the attention counts once (what is masked is no model FLOP); sampling needs a third of it.
    """
    total = 0.0
    for net in nets:
        outputs = net.dims * (2 if net.scale else 1)
        weights = net.dims * net.width + net.depth * 12 * net.width**2 + net.width * outputs
        attention = net.depth * net.tokens * net.width  # 2 products x T/2 keys x width multiply-adds per token
        total += 6.0 * net.tokens * (weights + attention)
    return total


def check_patch(image: int, patch: int) -> None:
    """UserError where a patch does not cut an image into tokens."""
    if image % patch:
        fits = [p for p in range(1, image + 1) if image % p == 0 and image // p > 1]
        best = min(fits or [1], key=lambda p: abs(p - patch))
        raise UserError(
            f"task.patch={patch} does not divide task.image={image}; choose a divisor, e.g. task.patch={best}"
        )
    if image // patch < 2:
        raise UserError(
            f"task.patch={patch} makes one token of a {image}-pixel image, and a flow needs two; choose a smaller patch"
        )


def warn_guidance(guidance: Guidance, label: jax.Array | None) -> None:
    """Say where guidance changes nothing."""
    if not guidance.active and guidance.tempered:
        warnings.warn(
            "guidance.weight is 0: the other fields of guidance do nothing; set a weight such as 2", stacklevel=4
        )
    if guidance.active and label is None and not guidance.tempered:
        warnings.warn(
            "guidance without labels and with attention_temperature=1 compares a pass with itself: it changes nothing "
            "and costs twice; give labels, or an attention temperature such as 0.5",
            stacklevel=4,
        )


def block_names(i: int, net: FlowNet, layers: range, theirs: str = "attn_blocks") -> list[Name]:
    """The official PyTorch layout of block i (linear weights stored [out, in]).

    Args:
        layers: those of its own, by their number in its trunk; `theirs` is what they are called.
    """
    old, new = f"blocks.{i}", f"block{i}"
    mask = np.tril(np.ones((net.tokens, net.tokens), np.float32))
    names = [
        Name(f"{old}.proj_in.weight", f"{new}/in/kernel", "o i -> i o"),
        Name(f"{old}.proj_in.bias", f"{new}/in/bias"),
        Name(f"{old}.pos_embed", f"{new}/positions/table"),
        Name(f"{old}.proj_out.weight", f"{new}/out/kernel", "o i -> i o"),
        Name(f"{old}.proj_out.bias", f"{new}/out/bias"),
        Name(f"{old}.attn_mask", None, value=lambda: mask),
    ]
    if net.classes:
        names.append(Name(f"{old}.class_embed", f"{new}/labels/table", "c 1 w -> c w"))
    if net.level:
        for layer, part in (("0", "up"), ("2", "down")):
            names += [
                Name(f"{old}.time_embed.mlp.{layer}.weight", f"{new}/level/{part}/kernel", "o i -> i o"),
                Name(f"{old}.time_embed.mlp.{layer}.bias", f"{new}/level/{part}/bias"),
            ]
    return names + [n for l in layers for n in layer_names(f"{old}.{theirs}.{l}", f"{new}/trunk", l)]


def layer_names(old: str, new: str, layer: int) -> list[Name]:
    """The official layout of one transformer layer, a slice of the trunk `new`."""
    block, split = f"{new}/block", {"s": 3}
    return [
        Name(f"{old}.attention.norm.weight", f"{block}/attention_norm/scale", layer=layer),
        Name(f"{old}.attention.norm.bias", f"{block}/attention_norm/bias", layer=layer),
        Name(f"{old}.attention.qkv.weight", f"{block}/attention/qkv/kernel", "(s h) w -> w s h", split, layer),
        Name(f"{old}.attention.qkv.bias", f"{block}/attention/qkv/bias", "(s h) -> s h", split, layer),
        Name(f"{old}.attention.proj.weight", f"{block}/attention/out/kernel", "o i -> i o", layer=layer),
        Name(f"{old}.attention.proj.bias", f"{block}/attention/out/bias", layer=layer),
        Name(f"{old}.mlp.norm.weight", f"{block}/mlp_norm/scale", layer=layer),
        Name(f"{old}.mlp.norm.bias", f"{block}/mlp_norm/bias", layer=layer),
        Name(f"{old}.mlp.main.0.weight", f"{block}/mlp/up/kernel", "o i -> i o", layer=layer),
        Name(f"{old}.mlp.main.0.bias", f"{block}/mlp/up/bias", layer=layer),
        Name(f"{old}.mlp.main.2.weight", f"{block}/mlp/down/kernel", "o i -> i o", layer=layer),
        Name(f"{old}.mlp.main.2.bias", f"{block}/mlp/down/bias", layer=layer),
    ]
