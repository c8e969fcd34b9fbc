"""The vision transformer that all tasks of this paper share, the heads on it, and what an input is.

B examples, N patches of P pixels or samples a side, C channels, D width, R numbers of a relation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from msgspec import Meta

from zoo.dist import constrain
from zoo.errors import UserError, check_divisor
from zoo.fields import Below1, Dtype, Layers, Size, SizeOr0, check_fields
from zoo.nn.attention import Backend, check_backend
from zoo.nn.embed import grid_positions, sincos
from zoo.nn.layers import Dense, LayerNorm, Table, lecun_normal, linear_names, norm_names, truncated_normal
from zoo.nn.transformer import Block, Remat, Transformer
from zoo.papers.part.sampling import crop, grid_patches, pad_crop, random_resized_crop, sample_boxes
from zoo.task import About, Batch, Name, Params

EPSILON = 1e-6  # of every LayerNorm


class Encoder(Transformer):
    """A plain vision transformer. It knows of positions only what it is given."""

    @nn.compact
    def __call__(
        self,
        patches: jax.Array,
        positions: jax.Array | None = None,
        seen: jax.Array | None = None,
        keep: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Patches [B, N, P P C] -> tokens [B, N, D] and class token [B, D], float32.

        Args:
            positions: added to the tokens, [1 + N, D] or [B, 1 + N, D], that of the class token first; None: none at all.
            seen: bool [B, N], the patches that serve as keys and values (the class token always does).
            keep: [depth, 2, B], factors on the branches (stochastic depth).
        """
        h = Dense(self.width, (None, "embed"), dtype=self.dtype, name="patch")(patches)
        first = Table(1, self.width, start=truncated_normal(0.02), name="class")()
        if positions is not None:
            h = h + positions[..., 1:, :].astype(h.dtype)
            first = first + positions[..., :1, :]
        first = jnp.broadcast_to(first.astype(h.dtype), (len(h), 1, self.width))
        h = constrain(jnp.concatenate([h, first], 1), "batch")
        if seen is not None:
            seen = jnp.concatenate([seen, jnp.ones((len(h), 1), bool)], 1)
        block = Block(self.head_dim, dtype=self.dtype, backend=self.attention, epsilon=EPSILON, parent=None)
        h, _ = self.trunk(block)(h, each=None if keep is None else {"keep": keep}, seen=seen)
        h = LayerNorm(EPSILON, name="norm")(h).astype(jnp.float32)
        return h[:, :-1], h[:, -1]


def _dense(features: int, axes: tuple[str | None, ...], **fields: Any) -> Dense:
    """A linear map of a head. It keeps the size of a signal: with smaller kernels the head does not find the sizes for long."""
    return Dense(features, axes, kernel_init=lecun_normal(), **fields)


class CrossAttentionHead(nn.Module):
    """The relation of patches i and j, asked of all patches by one attention layer: no residual, no norm, no MLP.

    What follows the softmax is affine, and so is what makes the query of a pair from its two patches. Both are therefore
    computed per patch, N times and not once for each of many pairs, and the values are R numbers each.
    """

    outputs: int
    heads: int
    query: str
    residual: bool
    dtype: str

    @nn.compact
    def __call__(self, z: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        """Tokens z [B, N, D], references i [n], targets j [n] -> relations [B, n, R] in float32."""
        width, patches = z.shape[-1], z.shape[1]
        each = width // self.heads
        zero = jnp.zeros((1, width))
        into = _dense(width, ("embed", "heads"), dtype=self.dtype, name="query")
        last = _dense(self.outputs, ("embed", None), name="relation")

        def pairs(f: Callable[[jax.Array], jax.Array], a: jax.Array, b: jax.Array) -> jax.Array:
            """f(a_i + b_j) of an affine f."""
            return f(a)[:, i] + f(b)[:, j] - f(zero)

        if self.query == "patch_cat":  # one linear map of [z_i; z_j], in two halves
            a = _dense(width, ("embed", None), dtype=self.dtype, name="reference")(z)
            b = _dense(width, ("embed", None), dtype=self.dtype, bias=False, name="target")(z)
            keys = z
        else:  # numbers of the slots: labels, by which attention may look the two up
            slots = np.arange(patches, dtype=np.float64)[:, None]
            halves = jnp.asarray(sincos(slots, width // 2))
            b = jnp.concatenate([halves, jnp.zeros_like(halves)], -1)[None]
            a = jnp.concatenate([jnp.zeros_like(halves), halves], -1)[None]
            keys = z + jnp.asarray(sincos(slots, width))
        q = pairs(into, a, b).reshape(-1, len(i), self.heads, each)
        # A bias would add the same to the logits of all keys.
        k = _dense(width, ("embed", "heads"), dtype=self.dtype, bias=False, name="key")(keys)
        k = k.reshape(*k.shape[:-1], self.heads, each)
        v = _dense(width, ("embed", "heads"), name="value")(keys)
        out = _dense(width, ("heads", "embed"), name="out")
        apart = jnp.repeat(jnp.eye(self.heads), each, 1)  # the numbers of each head alone [heads, D]
        u = last(out(v[:, :, None] * apart)) - last(out(zero))

        q = jnp.broadcast_to(q, (len(z), *q.shape[1:])) * each**-0.5
        logits = jnp.einsum("bnhk,bshk->bhns", q, k, preferred_element_type=jnp.float32)
        found = jnp.einsum("bhns,bshr->bnr", jax.nn.softmax(logits, axis=-1), u) + last(out(zero))
        return (
            found + pairs(last, a.astype(jnp.float32), b.astype(jnp.float32)) - last(zero) if self.residual else found
        )


class PairwiseHead(nn.Module):
    """One linear map of [z_i; z_j], made per patch in two halves."""

    outputs: int

    @nn.compact
    def __call__(self, z: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        """Tokens z [B, N, D], references i [n], targets j [n] -> relations [B, n, R] in float32."""
        a = _dense(self.outputs, ("embed", None), name="reference")(z)
        b = _dense(self.outputs, ("embed", None), bias=False, name="target")(z)
        return a[:, i] + b[:, j]


@dataclass(frozen=True)
class Vit:
    """What all tasks of this paper share: an input, an encoder without positions, and features of it."""

    image: Annotated[int, Meta(ge=0, le=2**14)] = 28  # pixels a side of images; 0 for series
    length: SizeOr0 = 0  # samples of a series; 0 for images
    channels: Size = 1
    patch: Size = 7  # pixels or samples a side of what the encoder reads
    width: Size = 64
    depth: Layers = 3
    head_dim: Size = 16
    drop_path: Below1 = 0.0  # share of branches dropped in the last layer; rises linearly from 0 in the first
    augment: Literal["none", "pad", "resized"] = "none"  # of training images: shift by up to an eighth, random crop
    least_area: Annotated[float, Meta(gt=0, le=1)] = 0.2  # share of an image that augment=resized keeps at least
    dtype: Dtype = "float32"
    scan: bool = False
    remat: Remat = "none"
    attention: Backend = "auto"

    def __post_init__(self) -> None:
        check_fields(self, "task.")
        if (self.image > 0) == (self.length > 0):
            raise UserError(
                f"task.image={self.image} and task.length={self.length}: give one of them, the pixels a side of images or the "
                "samples of a series, and set the other to 0"
            )
        name, side = self.side
        check_divisor("patch", self.patch, name, side)
        check_divisor("head_dim", self.head_dim, "width", self.width)
        if self.length and self.augment != "none":
            raise UserError(f"task.augment={self.augment!r} is for images; set task.augment=none for a series")
        check_backend(self.attention, self.dtype)

    @property
    def about(self) -> About:
        """Images or series."""
        return About(unit="series" if self.length else "images", tokens=self.tokens)

    @property
    def side(self) -> tuple[str, int]:
        """The field that says how long an axis of the input is, and its value."""
        return ("length", self.length) if self.length else ("image", self.image)

    @property
    def key(self) -> str:
        """What a batch calls the input."""
        return "series" if self.length else "image"

    @property
    def extent(self) -> tuple[int, ...]:
        """Pixels along (x, y), or (samples,)."""
        return (self.length,) if self.length else (self.image, self.image)

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches of the regular grid along each axis, rows first."""
        return tuple(side // self.patch for side in reversed(self.extent))

    @property
    def tokens(self) -> int:
        """Patches of the regular grid."""
        return int(np.prod(self.grid))

    @property
    def dims(self) -> int:
        """Numbers in a patch."""
        return int(self.patch ** len(self.extent) * self.channels)

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`image` [B, S, S, C] in [-1, 1], or `series` [B, L, C]."""
        return {self.key: jax.ShapeDtypeStruct((batch, *reversed(self.extent), self.channels), jnp.float32)}

    def signal(self, batch: Batch) -> jax.Array:
        """The input of a batch. Traces fail here, and not somewhere below, on one of another shape than the task's."""
        found = batch[self.key]
        chex.assert_shape(found, (None, *reversed(self.extent), self.channels))
        return found

    def encoder(self) -> Encoder:
        """The network under the key `encoder` of the parameters."""
        return Encoder.of(self)

    def init_encoder(self, rng: jax.Array) -> Params:
        """Fresh parameters of the encoder."""
        params: Params = self.encoder().init(rng, jnp.zeros((1, self.tokens, self.dims)))["params"]
        return params

    def encode(
        self,
        params: Params,
        patches: jax.Array,
        positions: jax.Array | None = None,
        *,
        seen: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Patches [B, N, P, P, C] -> tokens [B, N, D] and class token [B, D].

        `positions` and `seen` as of `Encoder`; branches are dropped where there is a key `rng`.
        """
        patches = patches.reshape(*patches.shape[:2], self.dims)
        keep = None
        if rng is not None and self.drop_path:
            rates = jnp.linspace(0, self.drop_path, self.depth)[:, None, None]
            kept = jax.random.bernoulli(rng, 1 - rates, (self.depth, 2, len(patches)))
            keep = kept / (1 - rates)
        found: Any = self.encoder().apply({"params": params["encoder"]}, patches, positions, seen, keep)
        return found

    def augmented(self, rng: jax.Array, signal: jax.Array) -> jax.Array:
        """Training images [B, S, S, C] after `augment`; a mirror image is the data's affair (`data.flip`)."""
        if self.augment == "none":
            return signal
        return pad_crop(rng, signal) if self.augment == "pad" else random_resized_crop(rng, signal, self.least_area)

    def positions(self, params: Params) -> jax.Array | None:
        """What is added to the tokens of the regular grid [1 + N, D], the class token's first; None: nothing."""
        return None

    def fixed_positions(self, field: str = "width") -> np.ndarray:
        """Sine and cosine codes [1 + N, width] of the regular grid, zeros for the class token; `field` says which width."""
        rows, columns = self.grid if len(self.grid) == 2 else (1, *self.grid)
        places = grid_positions(rows, columns, (rows * columns) ** 0.5)
        width, axes = getattr(self, field), len(self.grid)
        if width % (2 * axes):
            raise UserError(
                f"task.{field}={width} is not divisible by {2 * axes}, as sine and cosine codes of positions need; choose "
                f"{-(-width // (2 * axes)) * 2 * axes}"
            )
        codes = sincos(places[:, -axes:], width)
        return np.concatenate([np.zeros_like(codes[:1]), codes])

    def feature_map(self, params: Params, batch: Batch) -> jax.Array:
        """Tokens of the regular grid as a map [B, S/P, S/P, D], of series [B, L/P, D]."""
        z, _ = self.encode(params, grid_patches(self.signal(batch), self.patch), self.positions(params))
        return z.reshape(len(z), *self.grid, self.width)

    def features(self, params: Params, batch: Batch) -> jax.Array:
        """The mean of the tokens of the regular grid [B, D]."""
        return self.feature_map(params, batch).mean(tuple(range(1, 1 + len(self.grid))))

    def off_grid(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As many patches as the grid has, with sides from half a patch to two: tokens [B, N, D] and boxes [B, N, 2, A].

        No task is told where they are, whatever it learned to expect.
        """
        signal = self.signal(batch)
        count = (len(signal), self.tokens)
        boxes = sample_boxes(rng, count, self.extent, self.patch / 2, min(2 * self.patch, *self.extent))
        return self.encode(params, crop(signal, boxes, self.patch))[0], boxes

    def import_names(self) -> list[Name]:
        """The layout of a plain vision transformer as timm has it (`VisionTransformer` with a class token and GELU).

        UserError for series, which that layout cannot hold.
        """
        if self.length:
            raise UserError(
                f"task.length={self.length}: the plain vision transformer's layout is for images; use `zoo export` without "
                "--format official"
            )
        ours, sizes = "encoder", {"p": self.patch, "q": self.patch}
        names = [
            Name("cls_token", f"{ours}/class/table", "1 1 d -> 1 d"),
            Name("pos_embed", None, value=self._published_positions),
            *linear_names("patch_embed.proj", f"{ours}/patch", "d c p q -> (p q c) d", sizes),
            *norm_names("norm", f"{ours}/norm"),
        ]
        for l in range(self.depth):
            layer, block = f"blocks.{l}", f"{ours}/trunk/block"
            names += [
                *norm_names(f"{layer}.norm1", f"{block}/attention_norm", l),
                *norm_names(f"{layer}.norm2", f"{block}/mlp_norm", l),
                Name(f"{layer}.attn.qkv.weight", f"{block}/attention/qkv/kernel", "(s h) w -> w s h", {"s": 3}, l),
                Name(f"{layer}.attn.qkv.bias", f"{block}/attention/qkv/bias", "(s h) -> s h", {"s": 3}, l),
                *linear_names(f"{layer}.attn.proj", f"{block}/attention/out", layer=l),
                *linear_names(f"{layer}.mlp.fc1", f"{block}/mlp/up", layer=l),
                *linear_names(f"{layer}.mlp.fc2", f"{block}/mlp/down", layer=l),
            ]
        return names

    def import_note(self) -> str:
        """How timm reads that layout, and what there is the same as `features` here."""
        return (
            f"{self._published_model(num_classes=0)}; features here are the mean of its patch tokens, "
            "forward_features(x)[:, 1:].mean(1), of images x [B, C, H, W] in [-1, 1]"
        )

    def _published_model(self, **more: Any) -> str:
        arguments = {
            "img_size": self.image,
            "patch_size": self.patch,
            "in_chans": self.channels,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.width // self.head_dim,
            **more,
        }
        return f"timm: VisionTransformer({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"

    def _published_positions(self) -> np.ndarray:
        """That layout always has positions: zeros are none."""
        return np.zeros((1, 1 + self.tokens, self.width), np.float32)
