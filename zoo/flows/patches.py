"""Flows over patches of images: the network of a block, their stack, the base of tasks, and the published layout.

What TarFlow (arXiv:2412.06329) and iTARFlow (arXiv:2604.20041) have in common. B images, T tokens, D numbers per token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from zoo.errors import UserError, check_divisor
from zoo.fields import Below1, Dtype, Side, Size, SizeOr0, check_fields
from zoo.flows.inverse import Rule
from zoo.flows.stack import Stack
from zoo.flows.transforms import shift_right
from zoo.nn.attention import Backend, check_backend
from zoo.nn.embed import patchify, unpatchify, waves
from zoo.nn.layers import Dense, Table, gelu, linear_names, zeros
from zoo.nn.transformer import Block, Remat, Transformer, join_trunks, layer_names
from zoo.task import Batch, Name, Params, image_spec


class Level(nn.Module):
    """What a block is told of the noise: a vector of log sigma (iTARFlow's code), in float32 whatever the network computes in."""

    width: int

    @nn.compact
    def __call__(self, log_sigma: jax.Array) -> jax.Array:
        """[B] -> [B, width]."""
        h = gelu(Dense(4 * self.width, ("embed", "mlp"), name="up")(waves(log_sigma, self.width, last=False)))
        return Dense(self.width, ("mlp", "embed"), name="down")(h)


class FlowNet(Transformer):
    """The network of one flow block: tokens up to t -> log-scale and shift of token t + 1."""

    tokens: int
    dims: int
    classes: int
    reverse: bool  # runs through the image backwards
    scale: bool
    level: bool  # whether it is told of the noise

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
                pair of that and a vector [B, width], or [1, width] for all (`Level`).
        """
        label, level = condition if self.level and condition is not None else (condition, None)
        positions = Table(self.tokens, self.width, name="positions")()
        if self.reverse:  # a row of the table belongs to a place in the image, whatever the direction
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
        h, cache = self.trunk(block)(h, cache, index, temperature=temperature)
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
        return self.caches(rows, self.tokens)


@dataclass(frozen=True)
class PatchStack(Stack):
    """A stack of `FlowNet`s, each with patches of its own size; states have those of block 0.

    Its condition is labels [B]; where nets are told of the noise a pair of these and log sigma [B], or [1] for all. A parameter
    `shared` has the first transformer layers of all blocks.
    """

    nets: tuple[FlowNet, ...]
    patches: tuple[int, ...]  # a side of each block's, in pixels
    channels: int

    def order(self, x: jax.Array, i: int) -> jax.Array:
        """[B, T, D] in raster order, to the patches and the order of block i."""
        return super().order(self.cut(x, self.patches[0], self.patches[i]), i)

    def back(self, x: jax.Array, i: int) -> jax.Array:
        """The inverse of `order`."""
        return self.cut(super().back(x, i), self.patches[i], self.patches[0])

    def cut(self, x: jax.Array, old: int, new: int) -> jax.Array:
        """Tokens [B, T, D] of patches of `old` pixels a side, as those of `new`."""
        return x if old == new else patchify(unpatchify(x, old, self.channels), new)

    def length(self, i: int) -> int:
        """Tokens of block i."""
        return self.nets[i].tokens

    def block(self, params: Params, i: int) -> Params:
        """The parameters of block i, with the layers that it shares."""
        block = super().block(params, i)
        return {**block, "trunk": join_trunks(params["shared"], block["trunk"])} if "shared" in params else block

    def told(self, i: int, block: Params, condition: Any) -> Any:
        """Labels, and of the noise the vector [B, width]."""
        if not self.nets[i].level:
            return condition
        label, log_sigma = condition
        vector: Any = Level(self.nets[i].width, parent=None).apply({"params": block["level"]}, log_sigma)
        return label, vector

    def fresh(self, rng: jax.Array) -> Params:
        """Fresh parameters of each block: those that are alike at once, which makes one graph to compile of many."""
        keys = jax.random.split(rng, len(self.nets))
        alike: dict[FlowNet, list[int]] = {}
        for i, net in enumerate(self.nets):
            alike.setdefault(net.clone(reverse=False), []).append(i)
        params: Params = {}
        for net, own in alike.items():
            many = jax.vmap(net.fresh)(keys[jnp.asarray(own)] if len(alike) > 1 else keys)
            params |= {f"block{i}": jax.tree.map(lambda p, row=row: p[row], many) for row, i in enumerate(own)}
        return {f"block{i}": params[f"block{i}"] for i in range(len(self.nets))}


@dataclass(frozen=True)
class PatchFlow(ABC):
    """Base of tasks whose flow has a `PatchStack`: their images, classes, and how their networks compute."""

    image: Side = 64  # pixels a side
    channels: Size = 3
    head_dim: Size = 64
    classes: SizeOr0 = 0  # 0: unconditional
    drop: Below1 = 0.1  # probability that a label is dropped in training
    dtype: Dtype = "float32"  # of activations; levels, log-scales, log-dets and losses stay float32
    scan: bool = (
        True  # scan over the layers of a block (compiles fast); False unrolls (small models on CPU step faster)
    )
    remat: Remat = "none"  # none, dots or full: what the backward pass recomputes
    attention: Backend = "xla"  # xla; cudnn on NVIDIA GPUs in bfloat16; splash on TPUs; auto: whichever the device has

    def __post_init__(self) -> None:
        check_fields(self, "task.")
        for patch, width, _ in self.sizes:
            check_patch(self.image, patch)
            check_divisor("head_dim", self.head_dim, "width", width)
        check_backend(self.attention, self.dtype)

    @property
    @abstractmethod
    def sizes(self) -> list[tuple[int, int, int]]:
        """Patch, width and transformer layers of each block, the one nearest the data first."""

    @property
    @abstractmethod
    def stack(self) -> PatchStack:
        """The flow over patches."""

    def stacked(self, rule: Rule, *, scale: bool = True, level: bool = False) -> PatchStack:
        """A stack of blocks of these sizes: even ones run through the image in raster order, odd ones backwards."""
        nets = tuple(
            FlowNet.of(
                self,
                width=width,
                depth=depth,
                tokens=(self.image // patch) ** 2,
                dims=self.channels * patch**2,
                classes=self.classes,
                reverse=i % 2 == 1,
                scale=scale,
                level=level,
            )
            for i, (patch, width, depth) in enumerate(self.sizes)
        )
        patches = tuple(patch for patch, *_ in self.sizes)
        return PatchStack(nets, nets[0].tokens, nets[0].dims, rule, True, 0, patches, self.channels)

    @property
    def tokens(self) -> int:
        """T, patches of an image in block 0."""
        return (self.image // self.sizes[0][0]) ** 2

    @property
    def dims(self) -> int:
        """D, numbers per token in block 0."""
        return int(self.channels * self.sizes[0][0] ** 2)

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`image` [B, S, S, C] in [-1, 1], and `label` [B] for a class-conditional model."""
        return image_spec(batch, self.image, self.channels, self.classes)

    def flops(self) -> float:
        """Floating-point operations of one training example: 6 per weight and token, and attention's 6 T^2 width a layer.

        The causal half of the attention counts once (what is masked is no model FLOP); sampling needs a third of it.
        """
        total = 0.0
        for net in self.stack.nets:
            outputs = net.dims * (2 if net.scale else 1)
            weights = net.dims * net.width + net.depth * 12 * net.width**2 + net.width * outputs
            attention = net.depth * net.tokens * net.width  # 2 products x T/2 keys x width multiply-adds per token
            total += 6.0 * net.tokens * (weights + attention)
        return total

    def label(self, batch: Batch | None) -> jax.Array | None:
        """Labels [B] that a batch, or conditions, have for this model."""
        return (batch or {}).get("label") if self.classes else None

    def dropped(self, rng: jax.Array, batch: Batch) -> jax.Array | None:
        """Labels [B] in training, -1 where they are dropped."""
        label = self.label(batch)
        if label is None or not self.drop:
            return label
        return jnp.where(jax.random.bernoulli(rng, self.drop, label.shape), -1, label)

    def latent(self, keys: jax.Array) -> jax.Array:
        """z [n, T, D] from N(0, I), from a key for each."""
        return jax.vmap(lambda key: jax.random.normal(key, (self.tokens, self.dims)))(keys)

    def to_tokens(self, image: jax.Array) -> jax.Array:
        """Images [B, S, S, C] as the flow takes them, [B, T, D]."""
        return patchify(image, self.sizes[0][0])

    def to_image(self, tokens: jax.Array) -> jax.Array:
        """The inverse of `to_tokens`."""
        return unpatchify(tokens, self.sizes[0][0], self.channels)


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


def block_names(i: int, net: FlowNet, layers: range, theirs: str = "attn_blocks") -> list[Name]:
    """The official PyTorch layout of block i.

    Args:
        layers: those of its own, by their number in its trunk; `theirs` is what they are called.
    """
    old, new = f"blocks.{i}", f"block{i}"
    mask = np.tril(np.ones((net.tokens, net.tokens), np.float32))
    names = [
        *linear_names(f"{old}.proj_in", f"{new}/in"),
        *linear_names(f"{old}.proj_out", f"{new}/out"),
        Name(f"{old}.pos_embed", f"{new}/positions/table"),
        Name(f"{old}.attn_mask", None, value=lambda: mask),
    ]
    if net.classes:
        names.append(Name(f"{old}.class_embed", f"{new}/labels/table", "c 1 w -> c w"))
    if net.level:
        names += linear_names(f"{old}.time_embed.mlp.0", f"{new}/level/up")
        names += linear_names(f"{old}.time_embed.mlp.2", f"{new}/level/down")
    return names + [n for l in layers for n in layer_names(f"{old}.{theirs}.{l}", f"{new}/trunk/block", l)]
