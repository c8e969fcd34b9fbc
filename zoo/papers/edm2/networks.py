"""The U-Net of EDM2 (arXiv:2312.02696, config G): activations and weights keep their magnitudes, and nothing has a bias.

B images, R pixels a side, C channels, N the width of the finest level. Every layer divides its weights by their root mean
square, whatever is stored: only their directions count. Sums and concatenations are scaled so that inputs of unit variance
give outputs of unit variance.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from zoo.dist import gathered
from zoo.nn.attention import attend
from zoo.nn.layers import normal, zeros
from zoo.nn.transformer import REMAT
from zoo.nn.unet import Resize, down_and_up, resized


def normalised(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """x over its root mean square along `axis` plus 1e-4; float32 inside, cast back."""
    h = x.astype(jnp.float32)
    # far below the 1e-4, and the root of zero has no derivative
    square = jnp.maximum(jnp.square(h).mean(axis, keepdims=True), 1e-30)
    return (h / (1e-4 + jnp.sqrt(square))).astype(x.dtype)


def unit(kernel: jax.Array) -> jax.Array:
    """Weights [..., outputs] with rows of unit root mean square, each of all that one output sums over."""
    return normalised(kernel, tuple(range(kernel.ndim - 1)))


def silu(x: jax.Array) -> jax.Array:
    """silu(x) / 0.596, of unit variance where x is (equation 81)."""
    return nn.silu(x) / 0.596


def mixed(a: jax.Array, b: jax.Array, share: float) -> jax.Array:
    """(1 - share) a + share b, over the norm of the two weights (equation 88)."""
    return ((1 - share) * a + share * b) / math.hypot(1 - share, share)


def joined(a: jax.Array, b: jax.Array, share: float) -> jax.Array:
    """Channels of a, then of b; `share` is b's of the whole magnitude, however many channels it has (equation 103)."""
    scale = math.sqrt((a.shape[-1] + b.shape[-1]) / ((1 - share) ** 2 + share**2))
    weights = scale * (1 - share) / math.sqrt(a.shape[-1]), scale * share / math.sqrt(b.shape[-1])
    return jnp.concatenate([weights[0] * a, weights[1] * b], -1)


def fourier(x: jax.Array, frequencies: jax.Array, phases: jax.Array) -> jax.Array:
    """sqrt(2) cos(x f + p) [..., F] of numbers [...], in float32 (equation 75); frequencies have their 2 pi."""
    return math.sqrt(2) * jnp.cos(x[..., None] * frequencies + phases)


class Linear(nn.Module):
    """A map of channels, or a convolution where `size` is above 1, by weights of unit magnitude (equation 47), times a gain.

    Kernel [inputs, features] or [size, size, inputs, features], normal at the start.
    """

    features: int
    size: int = 1
    dtype: str = "float32"
    whole: bool = False  # the kernel lies whole on every device: its features are too few to be shared out

    @nn.compact
    def __call__(self, x: jax.Array, gain: jax.Array | float = 1.0) -> jax.Array:
        """[B, ..., inputs] -> [B, ..., features]."""
        window = () if self.size == 1 else (self.size, self.size)
        shape = (*window, x.shape[-1], self.features)
        axes = (*(None for _ in shape[:-1]), None if self.whole else "embed")
        kernel: Any = self.param("kernel", nn.with_logical_partitioning(normal(1.0), axes), shape, jnp.float32)
        kernel = unit(kernel) * (gain / math.sqrt(math.prod(shape[:-1])))
        kernel = gathered(kernel.astype(self.dtype), axes)
        x = x.astype(self.dtype)
        if not window:
            return x @ kernel
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


class Block(nn.Module):
    """Two convolutions that the condition scales in between, mixed with the input; attention of all pixels may follow.

    On the way down (`encodes`) the input is first normalised pixel by pixel.
    """

    width: int
    encodes: bool
    resize: Resize = "same"
    attention: bool = False
    head_dim: int = 64
    dropout: float = 0.0
    residual_balance: float = 0.3
    attention_balance: float = 0.3
    clip: float = 256.0
    taps: tuple[float, ...] = (1.0, 1.0)
    dtype: str = "float32"
    backend: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """x [B, H, W, D], condition [B or 1, E] float32 -> [B, H', W', width]. Dropout acts where a key `dropout` is given."""
        linear = functools.partial(Linear, dtype=self.dtype)
        x = resized(x, self.resize, self.taps)
        skip = linear(self.width, name="skip") if x.shape[-1] != self.width else lambda x: x
        if self.encodes:
            x = normalised(skip(x), -1)
        h = linear(self.width, 3, name="conv0")(silu(x))
        gain: Any = self.param("gain", zeros, (), jnp.float32)
        scale = Linear(self.width, name="affine")(condition, gain) + 1
        h = silu(h * scale[:, None, None].astype(h.dtype))
        h = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(h)
        h = linear(self.width, 3, name="conv1")(h)
        x = mixed(x if self.encodes else skip(x), h, self.residual_balance)
        if self.attention:
            batch, height, wide, width = x.shape
            tokens = x.reshape(batch, height * wide, width)
            parts = linear(3 * width, name="qkv")(tokens).reshape(*tokens.shape[:2], 3, -1, self.head_dim)
            parts = normalised(parts, -1)  # values too
            h = attend(*(parts[:, :, i] for i in range(3)), causal=False, backend=self.backend)
            h = linear(width, name="proj")(h.reshape(tokens.shape))
            x = mixed(x, h.reshape(x.shape), self.attention_balance)
        return jnp.clip(x, -self.clip, self.clip)


class MagnitudeUNet(nn.Module):
    """Image, features of the noise and class -> image (section 2.3 of the paper, and its code's defaults)."""

    width: int
    multiples: tuple[int, ...]  # of the width, a level each
    blocks: int  # of a level on the way down; one more on the way up
    attention: tuple[int, ...]  # sides of the levels that attend
    classes: int
    embedding: int  # numbers of the condition
    head_dim: int = 64
    dropout: float = 0.0
    residual_balance: float = 0.3
    attention_balance: float = 0.3
    skip_balance: float = 0.5
    label_balance: float = 0.5
    clip: float = 256.0
    taps: tuple[float, ...] = (1.0, 1.0)
    dtype: str = "float32"
    remat: str = "none"
    backend: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, noise: jax.Array, label: jax.Array | None = None) -> jax.Array:
        """[B, R, R, C] -> [B, R, R, C] float32; zeros from fresh parameters.

        Args:
            noise: `fourier` features [B or 1, F].
            label: [B, classes], one-hot, all zeros for no class; None: no class.
        """
        condition = Linear(self.embedding, name="noise")(noise)
        if self.classes:
            label = jnp.zeros((1, self.classes)) if label is None else label
            told = Linear(self.embedding, name="label")(label * self.classes**0.5)
            condition = mixed(condition, told, self.label_balance)
        condition = silu(condition)
        kind: Any = Block if self.remat == "none" else nn.remat(Block, policy=REMAT[self.remat])

        names = ("head_dim", "dropout", "residual_balance", "attention_balance", "clip", "taps", "dtype", "backend")
        same = {name: getattr(self, name) for name in names}

        def block(name: str, width: int, resize: Resize = "same", attention: bool = False) -> Any:
            made = kind(width, name.startswith("enc"), resize, attention, **same, name=name)
            return functools.partial(made, condition=condition)

        side, channels = x.shape[1], x.shape[-1]
        widths = tuple(multiple * self.width for multiple in self.multiples)
        # a channel of ones stands for biases
        h = jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)
        h = Linear(widths[0], 3, self.dtype, name=f"enc_{side}_conv")(h)
        join = functools.partial(joined, share=self.skip_balance)
        h = down_and_up(h, block, widths, self.blocks, self.attention, join)
        gain: Any = self.param("gain", zeros, (), jnp.float32)
        # float32: x0 has more levels than bfloat16
        return Linear(channels, 3, whole=True, name="out")(h, gain)
