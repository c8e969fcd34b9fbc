"""How the raw output F of a network becomes a denoiser: x0 = skip x + out F(into x, noise), with x = x0 + sigma n.

The same table reads functions of other parametrisations as denoisers: `Precondition("flow").denoise(velocity, x, sigma)`
for a model of rectified flows, "v" and "eps" for models of variance-preserving diffusion, whatever their network is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from zoo.fields import Positive, check_fields

Network = Callable[[jax.Array, jax.Array], jax.Array]  # (input [*x], noise [] or [B]) -> output [*x]


@dataclass(frozen=True)
class Precondition:
    """Coefficients at a level sigma, all in float32.

    `edm` (arXiv:2206.00364, table 1) has inputs and targets of variance 1 where the data's standard deviation is `data`.
    `vp` and `ve` are its forms of the older models, with the times that their networks know. `flow`: the network gives
    the velocity n - x0 at (1 - s) x0 + s n and is told s. `v`, `eps`: it gives v or n at a x0 + b n, a^2 + b^2 = 1, and is
    told sigma. `x0`: it gives x0 itself, with the input and the noise of `edm`.
    """

    kind: Literal["edm", "vp", "ve", "flow", "v", "eps", "x0"] = "edm"
    data: Positive = 0.5

    def __post_init__(self) -> None:
        check_fields(self, "precondition.")

    def coefficients(self, sigma: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """(skip, out, into, noise), each of sigma's shape."""
        sigma = jnp.asarray(sigma, jnp.float32)
        one, root = jnp.ones_like(sigma), jax.lax.rsqrt(1 + sigma**2)
        scaled = jax.lax.rsqrt(self.data**2 + sigma**2)
        match self.kind:
            case "edm":
                return self.data**2 * scaled**2, sigma * self.data * scaled, scaled, jnp.log(sigma) / 4
            case "vp":
                return one, -sigma, root, 999 * _vp_time(sigma)
            case "ve":
                return one, sigma, one, jnp.log(sigma / 2)
            case "flow":
                return 1 / (1 + sigma), -sigma / (1 + sigma), 1 / (1 + sigma), sigma / (1 + sigma)
            case "v":
                return root**2, -sigma * root, root, sigma
            case "eps":
                return one, -sigma, root, sigma
        return jnp.zeros_like(sigma), one, scaled, jnp.log(sigma) / 4

    def denoise(self, network: Network, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """x0 [*x] in float32; sigma is [] or [B]. The network computes in the dtype it likes."""
        skip, out, into, noise = self.coefficients(sigma)

        def over(weight: jax.Array) -> jax.Array:
            return weight.reshape(weight.shape + (1,) * (x.ndim - weight.ndim)) if weight.ndim else weight

        return over(skip) * x + over(out) * network(over(into) * x, noise).astype(jnp.float32)

    def weight(self, sigma: jax.Array) -> jax.Array:
        """Of the squared error of x0, so that the network's targets have one scale at all levels."""
        return self.coefficients(sigma)[1] ** -2


def _vp_time(sigma: jax.Array) -> jax.Array:
    """t of sigma(t)^2 + 1 = exp(19.9 t^2 / 2 + 0.1 t)."""
    return (jnp.sqrt(0.1**2 + 2 * 19.9 * jnp.log1p(sigma**2)) - 0.1) / 19.9
