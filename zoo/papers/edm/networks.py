"""Networks of denoisers: the U-Nets that EDM trains (arXiv:2206.00364), DDPM++, NCSN++ and ADM, and a transformer.

B images, R pixels a side, C channels, N the width of the finest level. Levels halve the side one after the other. The noise is
a number for each image, as `zoo.diffusion.precondition` makes it.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from zoo.nn.attention import attend
from zoo.nn.embed import fourier, patchify, unpatchify, waves
from zoo.nn.layers import Conv, Dense, GroupNorm, Init, Table, normal, xavier_uniform, zeros
from zoo.nn.modulated import ModulatedBlock, modulated
from zoo.nn.transformer import REMAT, Trunk
from zoo.nn.unet import Resize, down_and_up, resized

Kind = Literal["ddpm++", "ncsn++"]
TAPS = {"ddpm++": (1, 1), "ncsn++": (1, 3, 3, 1), "adm": (1, 1)}  # filters by which sides are halved and doubled
_NEARLY_0 = 1e-5  # gain of the kernels that end a branch


class UNetBlock(nn.Module):
    """Two convolutions with the noise's embedding in between, added to the input; with attention of all pixels after it.

    The embedding is added before the second norm, and sums are divided by the root of two, so that variances stay; in ADM
    (arXiv:2105.05233) it scales and shifts what the norm gives, and sums are plain.
    """

    width: int
    resize: Resize = "same"
    heads: int = 0  # of the attention; 0: none
    taps: tuple[int, ...] = (1, 1)  # of the filter that resizes
    adm: bool = False
    dropout: float = 0.0
    dtype: str = "float32"
    backend: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
        """x [B, H, W, D], embedding [B, E] -> [B, H', W', width]. Dropout acts where a key `dropout` is given."""
        norm = functools.partial(_norm, adm=self.adm)
        conv = functools.partial(_conv, dtype=self.dtype, adm=self.adm)
        dense = functools.partial(_dense, dtype=self.dtype, adm=self.adm)
        keep = 1.0 if self.adm else 0.5**0.5
        h = resized(nn.silu(norm(x, name="norm0")), self.resize, self.taps)
        h = conv(self.width, name="conv0")(h)
        told = dense((1 + self.adm) * self.width, name="affine")(embedding)[:, None, None]
        if self.adm:
            scale, shift = jnp.split(told, 2, -1)
            h = norm(h, name="norm1") * (1 + scale) + shift
        else:
            h = norm(h + told, name="norm1")
        h = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(nn.silu(h))
        h = conv(self.width, gain=_NEARLY_0, name="conv1")(h)
        mapped = x.shape[-1] != self.width or (self.resize != "same" and not self.adm)
        x = resized(x, self.resize, self.taps)
        if mapped:
            x = conv(self.width, size=1, name="skip")(x)
        x = (h + x) * keep
        if not self.heads:
            return x
        batch, height, wide, width = x.shape
        tokens = norm(x, name="norm2").reshape(batch, height * wide, width)
        qkv = dense(3 * width, gain=0.2**0.5, name="qkv")(tokens)
        qkv = qkv.reshape(batch, height * wide, self.heads, width // self.heads, 3)
        h = attend(*(qkv[..., i] for i in range(3)), causal=False, backend=self.backend).reshape(tokens.shape)
        h = dense(width, gain=_NEARLY_0, name="proj")(h)
        return (h.reshape(x.shape) + x) * keep


def _norm(x: jax.Array, *, adm: bool = False, name: str) -> jax.Array:
    return GroupNorm(min(32, x.shape[-1] // 4), 1e-5 if adm else 1e-6, name=name)(x)


def _start(gain: float, adm: bool) -> tuple[Init | None, Init | None]:
    """How kernel and bias begin: Xavier's kernels; in ADM uniform in +-1/sqrt(fan_in), zeros at the end of a branch."""
    if not adm:
        return xavier_uniform(gain), zeros
    return (zeros, zeros) if gain == _NEARLY_0 else (None, None)


def _conv(
    features: int,
    *,
    size: int = 3,
    gain: float = 1.0,
    padding: int | None = None,
    adm: bool = False,
    dtype: str,
    name: str,
) -> Conv:
    kernel, bias = _start(gain, adm)
    return Conv(features, size, padding=padding, dtype=dtype, kernel_init=kernel, bias_init=bias, name=name)


def _dense(
    features: int, dtype: str = "float32", *, gain: float = 1.0, name: str, bias: bool = True, adm: bool = False
) -> Dense:
    kernel, begin = _start(gain, adm)
    return Dense(features, (None, None), dtype=dtype, kernel_init=kernel, bias_init=begin, bias=bias, name=name)


class Pyramid(nn.Module):
    """What the U-Nets share: down through the levels and up again."""

    width: int
    multiples: tuple[int, ...]  # of the width, a level each
    blocks: int  # of a level on the way down; one more on the way up
    attention: tuple[int, ...]  # sides of the levels that attend
    classes: int
    dropout: float = 0.0
    outputs: int = 1  # numbers that it gives for each of the image's
    dtype: str = "float32"
    remat: str = "none"
    backend: str = "xla"

    def levels(self, x: jax.Array, embedding: jax.Array, kind: str, head_dim: int | None = None) -> jax.Array:
        """Image [B, R, R, C] and embedding [B, E] -> [B, R, R, outputs C] float32. A `head_dim` of None: one head."""
        adm, taps = kind == "adm", TAPS[kind]
        made: Any = UNetBlock if self.remat == "none" else nn.remat(UNetBlock, policy=REMAT[self.remat])
        conv = functools.partial(_conv, dtype=self.dtype, adm=adm)

        def block(name: str, width: int, resize: Resize = "same", attention: bool = False) -> Any:
            heads = (width // head_dim if head_dim else 1) if attention else 0
            one = made(width, resize, heads, taps, adm, self.dropout, self.dtype, self.backend, name=name)
            return functools.partial(one, embedding=embedding)

        def joined(h: jax.Array, skip: jax.Array) -> jax.Array:
            return jnp.concatenate([h, skip], -1)

        images = [x]  # of NCSN++, brought to each level

        def halved(h: jax.Array, side: int) -> jax.Array:
            if kind == "ncsn++":
                # wide enough for the filter to find no border, and halved after it
                image = conv(h.shape[-1], padding=len(taps) // 2, name=f"enc_{side}_aux_residual")(images[-1])
                h = (h + resized(image, "half", taps, 0)) * 0.5**0.5
                images.append(h)
            return h

        channels, widths = x.shape[-1], tuple(multiple * self.width for multiple in self.multiples)
        h = conv(widths[0] if adm else self.width, name=f"enc_{x.shape[1]}_conv")(x)
        h = down_and_up(h, block, widths, self.blocks, self.attention, joined, halved, not adm)
        # float32: x0 has more levels than bfloat16
        out = _conv(self.outputs * channels, gain=_NEARLY_0, adm=adm, dtype="float32", name="out")
        return out(nn.silu(_norm(h, adm=adm, name="norm")))


class DDPMpp(Pyramid):
    """The U-Nets DDPM++ and NCSN++ (arXiv:2011.13456, as EDM's `SongUNet` has them): image, noise and class -> image."""

    augment: int = 0  # numbers that tell how an image was augmented
    kind: Kind = "ddpm++"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        noise: jax.Array,
        label: jax.Array | None = None,
        augment: jax.Array | None = None,
        frequencies: jax.Array | None = None,
    ) -> jax.Array:
        """[B, R, R, C] -> [B, R, R, outputs C] float32.

        Args:
            noise: [B] or [].
            label: [B, classes], one-hot, all zeros for no class; None: no class.
            augment: [B, augment]; None: as it is.
            frequencies: [N] of the noise's embedding in NCSN++; DDPM++ has fixed ones.
        """
        noise = jnp.broadcast_to(noise, x.shape[:1])
        embedding = waves(noise, self.width) if frequencies is None else fourier(noise, frequencies)
        wide = embedding.shape[-1]
        if self.classes:
            label = jnp.zeros((1, self.classes)) if label is None else label
            embedding = embedding + _dense(wide, name="label")(label * self.classes**0.5)
        if self.augment:
            extra = _dense(wide, bias=False, name="augment")
            augment = jnp.zeros((1, self.augment)) if augment is None else augment
            embedding = embedding + extra(augment)
        for i in range(2):
            embedding = nn.silu(_dense(4 * self.width, name=f"embed{i}")(embedding))
        return self.levels(x, embedding, self.kind)


class Ablated(Pyramid):
    """The U-Net of ADM (arXiv:2105.05233, as EDM's `DhariwalUNet` has it): image, noise and class -> image."""

    head_dim: int = 64  # a block of fewer channels does not attend

    @nn.compact
    def __call__(self, x: jax.Array, noise: jax.Array, label: jax.Array | None = None) -> jax.Array:
        """[B, R, R, C] -> [B, R, R, outputs C] float32.

        Args:
            noise: [B] or [].
            label: [B, classes], one-hot, all zeros for no class; None: no class.
        """
        dense = functools.partial(_dense, 4 * self.width, adm=True)
        codes = jnp.roll(waves(jnp.broadcast_to(noise, x.shape[:1]), self.width, last=False), self.width // 2, -1)
        embedding = dense(name="embed1")(nn.silu(dense(name="embed0")(codes)))  # cosines come first
        if self.classes:
            label = jnp.zeros((1, self.classes)) if label is None else label
            table = Dense(4 * self.width, (None, None), kernel_init=normal(1.0), bias=False, name="label")
            embedding = embedding + table(label)
        return self.levels(x, nn.silu(embedding), "adm", self.head_dim)


class DiT(nn.Module):
    """The transformer of arXiv:2212.09748 over patches, its modulation shared by all layers: image, noise and class -> image.

    One map of the condition modulates every layer, and a table of each layer's own is added (adaLN-single, arXiv:2310.00426,
    section 2.3): a map for each layer would hold half as many weights as the rest of it.
    """

    width: int
    depth: int
    head_dim: int
    patch: int
    classes: int
    outputs: int = 1  # numbers that it gives for each of the image's
    dtype: str = "float32"
    remat: str = "none"
    backend: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, noise: jax.Array, label: jax.Array | None = None) -> jax.Array:
        """[B, R, R, C] -> [B, R, R, outputs C] float32; zeros from fresh parameters.

        Args:
            noise: [B] or [].
            label: [B, classes], one-hot, all zeros for no class; None: no class.
        """
        condition = waves(jnp.broadcast_to(noise, x.shape[:1]), self.width)
        condition = _dense(self.width, name="embed1")(nn.silu(_dense(self.width, name="embed0")(condition)))
        if self.classes:
            label = jnp.zeros((1, self.classes)) if label is None else label
            condition = condition + _dense(self.width, bias=False, name="label")(label * self.classes**0.5)
        condition = nn.silu(condition)

        def fresh_zeros(features: int, name: str, *, bias: bool = True) -> Dense:
            return Dense(features, ("embed", None), kernel_init=zeros, bias_init=zeros, bias=bias, name=name)

        tokens = patchify(x, self.patch)
        h = Dense(self.width, (None, "embed"), dtype=self.dtype, name="in")(tokens)
        # as large as what pixels bring: smaller ones are heard late
        h = h + Table(h.shape[1], self.width, std=0.5, name="positions")().astype(self.dtype)
        block = ModulatedBlock(self.head_dim, dtype=self.dtype, backend=self.backend, parent=None)
        trunk = Trunk(self.depth, block, remat=self.remat, name="trunk")
        h, _ = trunk(h, modulation=fresh_zeros(6 * self.width, "modulation", bias=False)(condition))
        shift, scale = jnp.split(fresh_zeros(2 * self.width, "last")(condition)[:, None], 2, axis=-1)
        # float32: x0 has more levels than bfloat16
        out = fresh_zeros(self.outputs * tokens.shape[-1], "out")(modulated(h.astype(jnp.float32), shift, scale))
        return unpatchify(out, self.patch, self.outputs * x.shape[-1])
