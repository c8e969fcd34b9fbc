"""Dense layers, norms and embeddings: logical axes, dtype policy and initialisers live here and only here.

Parameters are float32; `dtype` is what a layer computes in. Norms compute in float32 whatever it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from zoo.dist import batch_ways, gathered
from zoo.task import Name

Axes = tuple[str | None, ...]
Init = Callable[..., jax.Array]

zeros: Init = nn.initializers.zeros
normal = nn.initializers.normal  # of a standard deviation
truncated_normal = nn.initializers.truncated_normal  # cut at two of its deviations, as vision transformers start
lecun_normal = (
    nn.initializers.lecun_normal
)  # variance 1 / fan-in of a kernel [inputs, features]: a unit signal stays one

ROOM = 1 << 28  # numbers in arrays of [rows, K] that a device works on at a time


def xavier_uniform(gain: float = 1.0) -> Init:
    """`gain` times U(-a, a), a = sqrt(6 / (fan_in + fan_out)); the fans of a convolution count its pixels."""
    return nn.initializers.variance_scaling(gain**2, "fan_avg", "uniform")


def uniform_fan_in(fan_in: int) -> Init:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), for kernels and biases alike."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


@jax.checkpoint
def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x), the exact GELU, in the dtype of x.

    Through erf: `jax.nn.gelu` takes erfc, which is twice as dear on a CPU. The float32 inside is not kept for the backward
    pass, only x is.
    """
    h = x.astype(jnp.float32)
    return (0.5 * h * (1 + jax.lax.erf(h * 0.5**0.5))).astype(x.dtype)


class Dense(nn.Module):
    """A linear map of the last `inputs` axes to `features` axes, `axes` naming all axes of the kernel.

    Kernel and bias start uniform in +-1/sqrt(fan_in) unless other initialisers are given.
    """

    features: int | tuple[int, ...]
    axes: Axes
    inputs: int = 1
    dtype: str = "float32"
    kernel_init: Init | None = None
    bias_init: Init | None = None
    bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., *inputs] -> [..., *features]."""
        features = (self.features,) if isinstance(self.features, int) else self.features
        shape = x.shape[-self.inputs :]
        fan_in, fan_out = math.prod(shape), math.prod(features)
        init = uniform_fan_in(fan_in)
        kernel: Any = self.param(
            "kernel",
            nn.with_logical_partitioning(self.kernel_init or init, self.axes),
            (*shape, *features),
            jnp.float32,
        )
        # Gathered in the dtype of the product: half the bytes in bfloat16.
        kernel = gathered(kernel.astype(self.dtype), self.axes)
        # One plain matrix product: backends are at their best there, and the reshapes are free.
        y = x.astype(self.dtype).reshape(*x.shape[: -self.inputs], fan_in) @ kernel.reshape(fan_in, fan_out)
        if self.bias:
            bias: Any = self.param(
                "bias",
                nn.with_logical_partitioning(self.bias_init or init, self.axes[self.inputs :]),
                features,
                jnp.float32,
            )
            y = y + bias.astype(self.dtype).reshape(fan_out)
        return y.reshape(*y.shape[:-1], *features)


class Conv(nn.Module):
    """A two-dimensional convolution of channels-last images; kernel [size, size, inputs, features], whole on every device.

    Kernel and bias start uniform in +-1/sqrt(fan_in) unless other initialisers are given.
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: int | tuple[tuple[int, int], tuple[int, int]] | None = None  # None: keeps height and width at stride 1
    dtype: str = "float32"
    kernel_init: Init | None = None
    bias_init: Init | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, inputs] -> [B, H', W', features]."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        init = uniform_fan_in(math.prod(shape[:3]))
        kernel: Any = self.param("kernel", self.kernel_init or init, shape, jnp.float32)
        bias: Any = self.param("bias", self.bias_init or init, (self.features,), jnp.float32)
        edge = self.size // 2 if self.padding is None else self.padding
        around = ((edge, edge), (edge, edge)) if isinstance(edge, int) else edge
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            around,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + bias.astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis with scale and bias, computed in float32 and cast back."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        shape = (x.shape[-1],)
        scale: Any = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.ones, ("embed",)), shape, jnp.float32
        )
        bias: Any = self.param("bias", nn.with_logical_partitioning(zeros, ("embed",)), shape, jnp.float32)
        h = x.astype(jnp.float32)
        h = h - h.mean(-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + self.epsilon)
        return (h * scale + bias).astype(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2) over the last axis times a scale, computed in float32 and cast back.

    With `centred` the parameter is the scale minus one and starts at zero.
    """

    epsilon: float = 1e-6
    centred: bool = False
    axis: str | None = "embed"  # logical axis of the scale

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        init = zeros if self.centred else nn.initializers.ones
        scale: Any = self.param("scale", nn.with_logical_partitioning(init, (self.axis,)), (x.shape[-1],), jnp.float32)
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + self.epsilon)
        return (h * (1 + scale if self.centred else scale)).astype(x.dtype)


class GroupNorm(nn.Module):
    """Normalisation over the pixels and the channels of each group, with scale and bias; float32, cast back."""

    groups: int
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C]."""
        batch, height, width, channels = x.shape
        scale: Any = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias: Any = self.param("bias", zeros, (channels,), jnp.float32)
        h = x.astype(jnp.float32).reshape(batch, height * width, self.groups, channels // self.groups)
        h = h - h.mean((1, 3), keepdims=True)
        h = h * jax.lax.rsqrt(jnp.square(h).mean((1, 3), keepdims=True) + self.epsilon)
        return (h.reshape(x.shape) * scale + bias).astype(x.dtype)


class Table(nn.Module):
    """A learned table of `rows` vectors: positions or class embeddings."""

    rows: int
    width: int
    std: float = 0.01
    axis: str | None = "embed"  # logical axis of the width
    start: Init | None = None  # what it starts as; None: a Gaussian of `std`

    @nn.compact
    def __call__(self) -> jax.Array:
        """The whole table [rows, width] in float32."""
        init = nn.with_logical_partitioning(self.start or normal(self.std), (None, self.axis))
        table: Any = self.param("table", init, (self.rows, self.width), jnp.float32)
        return table


def over_tokens(call: Callable[..., Any], tokens: int, size: int, *arrays: jax.Array) -> Any:
    """call(*arrays) for arrays [B, S, ...] in parts of so many steps that [rows, size] arrays stay small.

    What a part computes inside is computed again in the backward pass.
    """
    rows = max(1, len(arrays[0]) // batch_ways()) * arrays[0].shape[1] * tokens
    steps = arrays[0].shape[1]
    want = -(-rows * size // ROOM)
    parts = next((n for n in range(want, steps) if steps % n == 0), steps)
    if want <= 1:
        return call(*arrays)
    cut = [jnp.moveaxis(x.reshape(len(x), parts, steps // parts, *x.shape[2:]), 1, 0) for x in arrays]
    done = jax.lax.map(lambda part: jax.checkpoint(call)(*part), tuple(cut))
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(len(arrays[0]), steps, *y.shape[3:]), done)


def linear_names(
    theirs: str, ours: str, layout: str = "o i -> i o", sizes: dict[str, int] | None = None, layer: int | None = None
) -> list[Name]:
    """PyTorch's `weight` and `bias` of a linear map as kernel and bias of a `Dense`; `layout` is that of the kernel."""
    return [
        Name(f"{theirs}.weight", f"{ours}/kernel", layout, sizes or {}, layer),
        Name(f"{theirs}.bias", f"{ours}/bias", layer=layer),
    ]


def norm_names(theirs: str, ours: str, layer: int | None = None) -> list[Name]:
    """PyTorch's `weight` and `bias` of a norm as scale and bias of a `LayerNorm`."""
    return [
        Name(f"{theirs}.weight", f"{ours}/scale", layer=layer),
        Name(f"{theirs}.bias", f"{ours}/bias", layer=layer),
    ]
