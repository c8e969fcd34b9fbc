"""Noise levels: the grids that samplers go down, and what training steps draw. sigma is the standard deviation of x - x0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from msgspec import Meta

from zoo.errors import UserError
from zoo.fields import Positive, Share, check_fields


@dataclass(frozen=True)
class Levels:
    """A grid of noise levels, strictly decreasing, in float64 on the host.

    Kinds: `edm`, even in sigma^(1/rho) (arXiv:2206.00364, equation 5); `log`, even in log sigma; `flow`, even in the time
    1 / (1 + sigma) of a flow from noise to data (arXiv:2506.21757 with the time of rectified flows). None: what the solver
    and the model say. Levels that are `given` stand in the place of all that.
    """

    kind: Literal["edm", "log", "flow"] | None = None
    low: Positive | None = None
    high: Positive | None = None
    rho: Annotated[float, Meta(ge=1, le=100)] | None = None  # of `edm`, 7 where nothing is said
    given: tuple[Positive, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, "levels.")
        if any(a <= b for a, b in zip(self.given, self.given[1:])):
            raise UserError(f"levels.given={self.given} must decrease from each level to the next")

    def grid(self, count: int, kind: str = "edm", low: float = 0.002, high: float = 80.0) -> np.ndarray:
        """`count` levels from the highest to the lowest, both included; the arguments stand in for fields that are None.

        UserError for fewer than two, another number than is listed, or a lowest that is not below the highest.
        """
        if count < 2 or (self.given and count != len(self.given)):
            asked = f"the {len(self.given)} that levels.given lists" if self.given else "at least 2"
            raise UserError(f"a grid of {count} noise levels: choose {asked}")
        if self.given:
            return np.asarray(self.given)
        kind, low, high = self.kind or kind, self.low or low, self.high or high
        if self.rho is not None and kind != "edm":
            raise UserError(
                f"levels.rho={self.rho:g} is of the grid edm, and this one is {kind}; leave it out, or set levels.kind=edm"
            )
        if low >= high:
            raise UserError(f"levels.low={low:g} must be below levels.high={high:g}")
        share = np.linspace(0, 1, count)

        def even(to: float, end: float) -> np.ndarray:
            return to + share * (end - to)

        if kind == "edm":
            rho = self.rho or 7.0
            return even(high ** (1 / rho), low ** (1 / rho)) ** rho
        if kind == "log":
            return np.exp(even(np.log(high), np.log(low)))
        time = even(1 / (1 + high), 1 / (1 + low))
        return (1 - time) / time


@dataclass(frozen=True)
class LogNormal:
    """Levels of training steps: log sigma is normal (arXiv:2206.00364, section 5), or for a share of them even (our choice)."""

    mean: Annotated[float, Meta(ge=-20, le=20)] = -1.2
    std: Positive = 1.2
    wide: Share = 0.0  # log sigma is even over all levels of the model for this share

    def __post_init__(self) -> None:
        check_fields(self, "noise.")

    def draw(self, rng: jax.Array, count: int, sigmas: tuple[float, float] = (0.002, 80.0)) -> jax.Array:
        """[count] levels, one from each part of equal probability in random order: batches differ less than by free draws.

        Args:
            sigmas: lowest and highest level of the model.
        """
        shift, order = jax.random.split(rng)
        share = (jnp.arange(count) + jax.random.uniform(shift, (count,))) / count
        even = jnp.log(sigmas[0]) + share / max(self.wide, 1e-6) * jnp.log(sigmas[1] / sigmas[0])
        normal = jax.scipy.special.ndtri(jnp.clip((share - self.wide) / max(1 - self.wide, 1e-6), 1e-6, 1 - 1e-6))
        log = jnp.where(share < self.wide, even, self.mean + self.std * normal)
        return jnp.exp(jax.random.permutation(order, log))
