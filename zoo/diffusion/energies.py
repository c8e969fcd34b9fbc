"""Energies: p_sigma(x) is proportional to exp(-E(x, sigma)), so that a gradient is a score and a score a denoiser.

Energies of different levels, classes or models differ by constants that nothing tells: compare them at one level only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from zoo.diffusion.precondition import over

# (x [N, *x], sigma [] or [N]) -> [N] nats, a row from that row alone
Energy = Callable[[jax.Array, jax.Array], jax.Array]
Scored = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]  # likewise -> energy [N], score [N, *x]


@runtime_checkable
class Begins(Protocol):
    """An energy that is whole (-log p), whose law at any level can be drawn from: particles begin there, and not as noise."""

    def begin(self, params: Any, keys: jax.Array, level: float, conditions: Any = None) -> jax.Array:
        """x [N, *x] of N keys."""
        ...


def scored(energy: Energy) -> Scored:
    """The energy with its score -grad E, in one pass forward and one back."""

    def both(x: jax.Array, sigma: jax.Array) -> tuple[jax.Array, jax.Array]:
        def total(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            each = energy(x, sigma)
            return each.sum(), each  # rows do not see each other: the gradient of the sum is that of each

        (_, each), gradient = jax.value_and_grad(total, has_aux=True)(x)
        return each, -gradient

    return both


def denoised(energy: Energy, x: jax.Array, sigma: jax.Array) -> jax.Array:
    """E[x0 | x] = x - sigma^2 grad E (Tweedie), of the shape of x, in float32; sigma is a scalar or [N]."""
    x = jnp.asarray(x, jnp.float32)
    square = jnp.square(jnp.asarray(sigma, jnp.float32))
    return x + over(square, x) * scored(energy)(x, sigma)[1]
