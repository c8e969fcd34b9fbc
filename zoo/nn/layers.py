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

from zoo.dist import gathered

Axes = tuple[str | None, ...]
Init = Callable[..., jax.Array]

zeros: Init = nn.initializers.zeros


def normal(std: float) -> Init:
    """Gaussian of standard deviation `std`."""
    return nn.initializers.normal(std)


def uniform_fan_in(fan_in: int) -> Init:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), for kernels and biases alike."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
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
        bias: Any = self.param(
            "bias",
            nn.with_logical_partitioning(self.bias_init or init, self.axes[self.inputs :]),
            features,
            jnp.float32,
        )
        x, bias = x.astype(self.dtype), bias.astype(self.dtype)
        kernel = gathered(
            kernel.astype(self.dtype), self.axes
        )  # in the dtype of the product: half the bytes in bfloat16
        # One plain matrix product: backends are at their best there, and the reshapes are free.
        y = x.reshape(*x.shape[: -self.inputs], fan_in) @ kernel.reshape(fan_in, fan_out) + bias.reshape(fan_out)
        return y.reshape(*y.shape[:-1], *features)


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


class Table(nn.Module):
    """A learned table of `rows` vectors: positions or class embeddings."""

    rows: int
    width: int
    std: float = 0.01

    @nn.compact
    def __call__(self) -> jax.Array:
        """The whole table [rows, width] in float32."""
        init = nn.with_logical_partitioning(normal(self.std), (None, "embed"))
        table: Any = self.param("table", init, (self.rows, self.width), jnp.float32)
        return table
