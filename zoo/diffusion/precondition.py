"""How the raw output F of a network becomes a denoiser: x0 = skip x + out F(into x, noise), with x = x0 + sigma n.

The same table reads functions of other parametrisations as denoisers: `Precondition("flow").denoise(velocity, x, sigma)`
for a model of rectified flows, "v" and "eps" for models of variance-preserving diffusion, whatever their network is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from zoo.fields import Positive, check_fields

DENOISER = ("network", "precondition", "data")  # what makes a denoiser of parameters, and what no shape of these shows

Network = Callable[[jax.Array, jax.Array], jax.Array]  # (input [*x], noise [] or [B]) -> output [*x]


def over(each: jax.Array, x: jax.Array) -> jax.Array:
    """One number for all, or one for each of x [B, *x], so that it multiplies them."""
    return each.reshape(each.shape + (1,) * (x.ndim - each.ndim)) if each.ndim else each


@dataclass(frozen=True)
class Precondition:
    """Coefficients at a level sigma, all in float32.

    `edm` (arXiv:2206.00364, table 1) has inputs and targets of variance 1 where the data's standard deviation is `data`.
    `vp`, `ve` and `iddpm` are its forms of the older models, with the times that their networks know; a network of `iddpm`
    (arXiv:2102.09672) is told the nearest level of a table and gives its noise and then as many numbers again, which are left
    out. `flow`: the network gives
    the velocity n - x0 at (1 - s) x0 + s n and is told s. `v`, `eps`: it gives v or n at a x0 + b n, a^2 + b^2 = 1, and is
    told sigma. `x0`: it gives x0 itself, with the input and the noise of `edm`.
    """

    kind: Literal["edm", "vp", "ve", "iddpm", "flow", "v", "eps", "x0"] = "edm"
    data: Positive = 0.5

    def __post_init__(self) -> None:
        check_fields(self, "precondition.")

    @property
    def sigmas(self) -> tuple[float, float]:
        """The lowest and highest level that networks of this kind were made for; (0, inf) where there is no bound."""
        match self.kind:
            case "vp":
                low, high = (math.sqrt(math.expm1(19.9 * t**2 / 2 + 0.1 * t)) for t in (1e-5, 1.0))
                return low, high
            case "ve":
                return 0.02, 100.0
            case "iddpm":
                return float(iddpm_levels()[-2]), float(iddpm_levels()[0])
        return 0.0, math.inf

    @property
    def outputs(self) -> int:
        """How many numbers the network gives for each of x; the first of them count."""
        return 2 if self.kind == "iddpm" else 1

    def coefficients(
        self, sigma: jax.Array, table: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """(skip, out, into, noise), each of sigma's shape. `table`: the levels of `iddpm`; None: `iddpm_levels`."""
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
            case "iddpm":
                index = nearest(sigma, iddpm_levels() if table is None else table)
                return one, -sigma, root, 999 - index.astype(jnp.float32)
            case "flow":
                return 1 / (1 + sigma), -sigma / (1 + sigma), 1 / (1 + sigma), sigma / (1 + sigma)
            case "v":
                return root**2, -sigma * root, root, sigma
            case "eps":
                return one, -sigma, root, sigma
        return jnp.zeros_like(sigma), one, scaled, jnp.log(sigma) / 4

    def denoise(self, network: Network, x: jax.Array, sigma: jax.Array, table: jax.Array | None = None) -> jax.Array:
        """x0 [*x] in float32; sigma is [] or [B]. The network computes in the dtype it likes."""
        skip, out, into, noise = self.coefficients(sigma, table)
        found = network(over(into, x) * x, noise).astype(jnp.float32)
        return over(skip, x) * x + over(out, x) * (found if self.outputs == 1 else found[..., : x.shape[-1]])

    def weight(self, sigma: jax.Array) -> jax.Array:
        """Of the squared error of x0, so that the network's targets have one scale at all levels."""
        return self.coefficients(sigma)[1] ** -2


def _vp_time(sigma: jax.Array) -> jax.Array:
    """t of sigma(t)^2 + 1 = exp(19.9 t^2 / 2 + 0.1 t)."""
    return (jnp.sqrt(0.1**2 + 2 * 19.9 * jnp.log1p(sigma**2)) - 0.1) / 19.9


@functools.cache
def iddpm_levels() -> np.ndarray:
    """The 1,001 decreasing levels of iDDPM's cosine schedule, float32, the last one 0 (arXiv:2206.00364, appendix C.3)."""
    share = np.sin(0.5 * np.pi * np.arange(1001) / (1000 * 1.008)) ** 2
    levels = np.zeros(1001)
    for j in range(1000, 0, -1):
        levels[j - 1] = np.sqrt((levels[j] ** 2 + 1) / max(share[j - 1] / share[j], 0.001) - 1)
    return levels.astype(np.float32)


def nearest(sigma: jax.Array, table: jax.Array | np.ndarray) -> jax.Array:
    """The index, of sigma's shape, of the level in a table that is closest to it."""
    return jnp.argmin(jnp.abs(jnp.asarray(sigma)[..., None] - jnp.asarray(table)), -1)
