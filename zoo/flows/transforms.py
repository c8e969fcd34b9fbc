"""Autoregressive affine couplings: forward, log-det and inverse, in float32 whatever the network computes in.

A network reads tokens 0..t and gives a log-scale a and a shift b for token t + 1; token 0 passes unchanged.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

LOG_2PI = math.log(2 * math.pi)


def shift_right(outputs: jax.Array) -> jax.Array:
    """Hand the output at token t to token t + 1; token 0 gets zeros. [B, T, D] -> [B, T, D]."""
    return jnp.pad(outputs[:, :-1], ((0, 0), (1, 0), (0, 0)))


def affine(u: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """v = (u - b) exp(-a) with its log-det as a mean over tokens and dimensions (TarFlow, arXiv:2412.06329).

    Args:
        u, a, b: [B, T, D]; a and b already belong to the token they act on.

    Returns:
        v [B, T, D] and log |dv/du| / (T D) [B], both float32.
    """
    u, a, b = (x.astype(jnp.float32) for x in (u, a, b))
    return (u - b) * jnp.exp(-a), -a.mean((1, 2))


def affine_inverse(v: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """u = v scale + shift in float32; all of the same shape. `scale` is exp(a), or what guidance makes of it."""
    return v.astype(jnp.float32) * scale.astype(jnp.float32) + shift.astype(jnp.float32)
