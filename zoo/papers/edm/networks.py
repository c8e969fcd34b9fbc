"""Networks of denoisers: the U-Net of DDPM++ as EDM trains it (arXiv:2206.00364, its code's `SongUNet`), and a transformer.

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
from zoo.nn.embed import patchify, unpatchify, waves
from zoo.nn.layers import Conv, Dense, GroupNorm, Init, Table, xavier_uniform, zeros
from zoo.nn.modulated import ModulatedBlock, modulated
from zoo.nn.transformer import REMAT, Trunk

Resize = Literal["same", "half", "twice"]


def resized(x: jax.Array, resize: Resize) -> jax.Array:
    """[B, H, W, C] at half the side by means of four pixels, or at twice by repeating each."""
    if resize == "half":
        b, h, w, c = x.shape
        return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2) if resize == "twice" else x


class UNetBlock(nn.Module):
    """Two convolutions with the noise's embedding in between, added to the input; with attention of all pixels after it.

    Sums are divided by the root of two, so that variances stay.
    """

    width: int
    resize: Resize = "same"
    attention: bool = False
    dropout: float = 0.0
    dtype: str = "float32"
    backend: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
        """x [B, H, W, D], embedding [B, E] -> [B, H', W', width]. Dropout acts where a key `dropout` is given."""
        conv = functools.partial(_conv, dtype=self.dtype)
        h = resized(nn.silu(_norm(x, "norm0")), self.resize)
        h = conv(self.width, name="conv0")(h)
        h = h + _dense(self.width, self.dtype, name="affine")(embedding)[:, None, None]
        h = nn.silu(_norm(h, "norm1"))
        h = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(h)
        h = conv(self.width, gain=1e-5, name="conv1")(h)
        if x.shape[-1] != self.width or self.resize != "same":
            x = conv(self.width, size=1, name="skip")(resized(x, self.resize))
        x = (h + x) * 0.5**0.5
        if not self.attention:
            return x
        batch, height, wide, width = x.shape
        tokens = _norm(x, "norm2").reshape(batch, height * wide, width)
        qkv = _dense(3 * width, self.dtype, gain=0.2**0.5, name="qkv")(tokens).reshape(*tokens.shape, 3)
        q, k, v = (qkv[..., i][:, :, None] for i in range(3))
        h = attend(q, k, v, causal=False, backend=self.backend)[:, :, 0]
        h = _dense(width, self.dtype, gain=1e-5, name="proj")(h)
        return (h.reshape(x.shape) + x) * 0.5**0.5


def _norm(x: jax.Array, name: str) -> jax.Array:
    return GroupNorm(min(32, x.shape[-1] // 4), name=name)(x)


def _conv(features: int, *, size: int = 3, gain: float = 1.0, dtype: str, name: str) -> Conv:
    return Conv(features, size, dtype=dtype, kernel_init=xavier_uniform(gain), bias_init=zeros, name=name)


def _dense(features: int, dtype: str = "float32", *, gain: float = 1.0, name: str, bias: bool = True) -> Dense:
    init: Init = xavier_uniform(gain)
    return Dense(features, (None, None), dtype=dtype, kernel_init=init, bias_init=zeros, bias=bias, name=name)


class DDPMpp(nn.Module):
    """The U-Net of DDPM++: image, noise and class -> image."""

    width: int
    multiples: tuple[int, ...]  # of the width, a level each
    blocks: int  # of a level on the way down; one more on the way up
    attention: tuple[int, ...]  # sides of the levels that attend
    classes: int
    augment: int = 0  # numbers that tell how an image was augmented
    dropout: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    backend: str = "xla"

    @nn.compact
    def __call__(
        self, x: jax.Array, noise: jax.Array, label: jax.Array | None = None, augment: jax.Array | None = None
    ) -> jax.Array:
        """[B, R, R, C] -> [B, R, R, C] float32.

        Args:
            noise: [B] or [].
            label: [B, classes], one-hot, all zeros for no class; None: no class.
            augment: [B, augment]; None: as it is.
        """
        noise = jnp.broadcast_to(noise, x.shape[:1])
        embedding = waves(noise, self.width)
        if self.classes:
            label = jnp.zeros((1, self.classes)) if label is None else label
            embedding = embedding + _dense(self.width, name="label")(label * self.classes**0.5)
        if self.augment:
            extra = _dense(self.width, bias=False, name="augment")
            augment = jnp.zeros((1, self.augment)) if augment is None else augment
            embedding = embedding + extra(augment)
        for i in range(2):
            embedding = nn.silu(_dense(4 * self.width, name=f"embed{i}")(embedding))

        kind: Any = UNetBlock if self.remat == "none" else nn.remat(UNetBlock, policy=REMAT[self.remat])

        def block(width: int, name: str, resize: Resize = "same", attention: bool = False) -> Any:
            made = kind(width, resize, attention, self.dropout, self.dtype, self.backend, name=name)
            return functools.partial(made, embedding=embedding)

        side, channels, skips = x.shape[1], x.shape[-1], []
        h = _conv(self.width, dtype=self.dtype, name=f"enc_{side}_conv")(x)
        for level, multiple in enumerate(self.multiples):
            if level:
                skips.append(h)
                side //= 2
                h = block(h.shape[-1], f"enc_{side}_down", "half")(h)
            for i in range(self.blocks):
                skips.append(h)
                h = block(multiple * self.width, f"enc_{side}_block{i}", attention=side in self.attention)(h)
        skips.append(h)
        for level, multiple in reversed(list(enumerate(self.multiples))):
            if level == len(self.multiples) - 1:
                h = block(h.shape[-1], f"dec_{side}_in0", attention=True)(h)
                h = block(h.shape[-1], f"dec_{side}_in1")(h)
            else:
                side *= 2
                h = block(h.shape[-1], f"dec_{side}_up", "twice")(h)
            for i in range(self.blocks + 1):
                attends = side in self.attention and i == self.blocks
                h = jnp.concatenate([h, skips.pop()], -1)
                h = block(multiple * self.width, f"dec_{side}_block{i}", attention=attends)(h)
        # float32: x0 has more levels than bfloat16
        return _conv(channels, gain=1e-5, dtype="float32", name="out")(nn.silu(_norm(h, "norm")))


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
    dtype: str = "float32"
    remat: str = "none"
    backend: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, noise: jax.Array, label: jax.Array | None = None) -> jax.Array:
        """[B, R, R, C] -> [B, R, R, C] float32; zeros from fresh parameters.

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
        out = fresh_zeros(tokens.shape[-1], "out")(modulated(h.astype(jnp.float32), shift, scale))
        return unpatchify(out, self.patch, x.shape[-1])
