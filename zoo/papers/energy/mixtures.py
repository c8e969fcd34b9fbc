"""Gaussian mixtures in the plane as exact energies, and what summed scores and weighted particles make of them.

N points [N, 2], m modes; x = x0 + sigma n. All energies are -log p_sigma, with their normaliser. The mixtures are our choice,
the paper's are not known here. Order of this file: tasks, truths by grid, the comparison.
"""

from __future__ import annotations

import functools
import io
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from msgspec import Meta

from zoo import files
from zoo.diffusion.compare import folder
from zoo.diffusion.energies import Scored, denoised, scored
from zoo.diffusion.levels import Levels
from zoo.diffusion.sampling import Conditions, draw, guided
from zoo.diffusion.smc import Coordinate, EnergySampling, Form, HalfSpace, Islands, Particles, Potential, Product, Temper, feynman_kac
from zoo.errors import UserError
from zoo.fields import AtLeast2, NotEmpty, Positive, Side, Some, check_fields
from zoo.task import About, Batch, Params, sample_keys

_log = logging.getLogger("zoo")
_EXACT = "mixtures are exact and have nothing to train; compare what is drawn from them with zoo eval energy/mixtures"


@dataclass(frozen=True)
class Mode:
    """One Gaussian."""

    weight: Positive = 1.0  # relative to the others
    mean: tuple[Coordinate, Coordinate] = (0.0, 0.0)
    std: tuple[Positive, Positive] = (1.0, 1.0)
    correlation: Annotated[float, Meta(gt=-1, lt=1)] = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "mode.")


def log_density(modes: Sequence[Mode], x: Any, sigma: Any, xp: Any = jnp) -> Any:
    """log p_sigma [N] of points [N, 2], of NumPy (`xp`) or JAX; sigma is a scalar or [N]."""
    weight, mean, std, correlation = (
        xp.asarray([getattr(mode, name) for mode in modes], x.dtype) for name in ("weight", "mean", "std", "correlation")
    )
    noise = xp.square(xp.asarray(sigma, x.dtype))[..., None]
    a, b, c = std[:, 0] ** 2 + noise, correlation * std[:, 0] * std[:, 1], std[:, 1] ** 2 + noise
    determinant = a * c - b * b
    left, up = x[:, :1] - mean[:, 0], x[:, 1:] - mean[:, 1]
    square = (c * left**2 - 2 * b * left * up + a * up**2) / determinant
    each = xp.log(weight / weight.sum()) - square / 2 - xp.log(determinant) / 2 - np.log(2 * np.pi)
    most = each.max(-1)
    return most + xp.log(xp.exp(each - most[:, None]).sum(-1))


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians in the plane, as a model with an energy: no parameters, no loss."""

    modes: Some[Mode] = (Mode(),)
    low: Positive = 0.01  # levels that it is sampled at
    high: Positive = 10.0

    about = About(unit="points")
    Sampling = EnergySampling

    def __post_init__(self) -> None:
        check_fields(self, "task.")
        if self.low >= self.high:
            raise UserError(f"task.low={self.low:g} must be below task.high={self.high:g}")

    @property
    def sigmas(self) -> tuple[float, float]:
        """Lowest and highest level."""
        return self.low, self.high

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`point` [B, 2]."""
        return {"point": jax.ShapeDtypeStruct((batch, 2), jnp.float32)}

    def init(self, rng: jax.Array) -> Params:
        """There are no parameters."""
        return {}

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """UserError: there is none."""
        raise UserError(_EXACT)

    def energy(self, params: Params, x: jax.Array, sigma: jax.Array, conditions: Batch | None = None) -> jax.Array:
        """-log p_sigma [B] of points [B, 2] in nats, float32."""
        return -log_density(self.modes, jnp.asarray(x, jnp.float32), sigma)

    def denoise(self, params: Params, x: jax.Array, sigma: jax.Array, conditions: Batch | None = None) -> jax.Array:
        """E[x0 | x] [B, 2]."""
        return denoised(functools.partial(self.energy, params), x, sigma)

    def sample(
        self, params: Params, rng: jax.Array, n: int, conditions: Batch | None = None, options: EnergySampling | None = None
    ) -> dict[str, jax.Array]:
        """`point` [n, 2]; point i depends on (rng, i) alone, but for those that an island keeps together.

        Args:
            rng: one key, or n keys.
            options: None: the defaults, a solver's points of the mixture as it is.
        """
        o = options or EnergySampling()
        if o.weighted:
            return {"point": o.draw(rng, n, self.sigmas, [self.scored], (2,))}

        def door(x: jax.Array, sigma: jax.Array, given: Conditions) -> jax.Array:
            return self.denoise(params, x, sigma, given)

        return {"point": draw(o.plan(self.sigmas), guided(door, None, o.guidance), sample_keys(rng, n), (2,))}

    @property
    def scored(self) -> Scored:
        """Energy and score, as particles take them."""
        return scored(functools.partial(self.energy, {}))


@dataclass(frozen=True)
class MixtureProduct:
    """The product of mixtures: scores add up at the lowest level alone, so it is drawn by weighted particles."""

    parts: Some[Mixture] = (Mixture(), Mixture())

    about = About(unit="points")
    Sampling = EnergySampling

    def __post_init__(self) -> None:
        check_fields(self, "task.")
        if len(self.parts) < 2:
            raise UserError("task.parts holds one mixture; a product takes two or more")

    @property
    def sigmas(self) -> tuple[float, float]:
        """Levels that all parts have."""
        return max(part.low for part in self.parts), min(part.high for part in self.parts)

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`point` [B, 2]."""
        return self.parts[0].spec(batch)

    def init(self, rng: jax.Array) -> Params:
        """There are no parameters."""
        return {}

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """UserError: there is none."""
        raise UserError(_EXACT)

    def sample(
        self, params: Params, rng: jax.Array, n: int, conditions: Batch | None = None, options: EnergySampling | None = None
    ) -> dict[str, jax.Array]:
        """`point` [n, 2], as of a mixture."""
        o = options or EnergySampling()
        return {"point": o.draw(rng, n, self.sigmas, [part.scored for part in self.parts], (2,), [Product()])}


def _isotropic(*modes: tuple[float, tuple[float, float], float]) -> Mixture:
    return Mixture(tuple(Mode(weight, mean, (std, std)) for weight, mean, std in modes))


CORNERS = _isotropic((0.1, (-3.0, -3.0), 0.3), (0.2, (3.0, -3.0), 0.9), (0.3, (-3.0, 3.0), 0.5), (0.4, (3.0, 3.0), 0.7))
ROW = _isotropic((1.0, (-3.0, 0.0), 0.6), (1.0, (0.0, 0.0), 0.6), (1.0, (3.0, 0.0), 0.6), (1.0, (0.0, 3.0), 0.6))
CROSS = _isotropic((0.5, (-2.5, 0.5), 0.6), (0.2, (3.0, 0.0), 0.5), (0.2, (0.0, 3.0), 0.6), (0.1, (0.0, -3.0), 0.8))
BOTH = MixtureProduct((ROW, CROSS))
EDGE = HalfSpace((1.0, 0.5), 1.0)  # cuts one of the corners off, and half of two


# --- truths by grid -------------------------------------------------------------------------------


def share(modes: Sequence[Mode], x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[..., m] weight of the points [..., N, 2] nearest to each mode's mean, adding to 1."""
    nearest = np.square(x[..., None, :] - np.asarray([mode.mean for mode in modes])).sum(-1).argmin(-1)
    found = np.stack([(weights * (nearest == i)).sum(-1) for i in range(len(modes))], -1)
    return found / found.sum(-1, keepdims=True)


def truth(
    parts: Sequence[Mixture],
    powers: Sequence[float],
    inside: Callable[[np.ndarray], np.ndarray] | None = None,
    step: float = 0.02,
) -> tuple[np.ndarray, float]:
    """[m] weights of the modes of `parts[0]` in the product of these powers, and the log of its normaliser, on a grid.

    Args:
        inside: points [N, 2] -> which of them the target has; None: all.
    """
    modes = [mode for part in parts for mode in part.modes]
    mean, reach = np.asarray([mode.mean for mode in modes]), 6 * np.asarray([mode.std for mode in modes])
    axes = (np.arange(low, high, step) for low, high in zip((mean - reach).min(0), (mean + reach).max(0)))
    x = np.stack(np.meshgrid(*axes), -1).reshape(-1, 2)
    log = sum(power * log_density(part.modes, x, part.low, np) for part, power in zip(parts, powers))
    density = np.exp(log) * (1.0 if inside is None else inside(x))
    return share(parts[0].modes, x, density), float(np.log(density.sum() * step**2))


def distance(found: np.ndarray, modes: Sequence[Mode], weights: np.ndarray) -> np.ndarray:
    """[...] total variation between weights of modes and those [..., m] that points have."""
    return np.abs(found - weights).sum(-1) / 2


# --- the comparison -------------------------------------------------------------------------------
