"""What weighted particles are drawn towards besides their base: powers of energies, bounds, any function of the sample.

The target at each level is exp(-sum of a_i E_i) h: a potential says the powers a_i, the factor h, or both. Several go together:
powers one after the other, factors by their product. N particles, M models, x = x0 + sigma n.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr
from msgspec import Meta

from zoo.errors import UserError
from zoo.fields import Named, Positive, Some, check_fields

Coordinate: TypeAlias = Annotated[float, Meta(ge=-1e6, le=1e6)]


class Potential(Named):
    """What the target has that the base has not. One of your own is a frozen dataclass with a `name` and `log`."""

    name = "of your own"

    def __post_init__(self) -> None:
        check_fields(self, "potential.")

    def powers(self, powers: np.ndarray) -> np.ndarray:
        """[M] the powers of the models, from those that they have without it."""
        return powers

    @abc.abstractmethod
    def log(self, x: jax.Array, x0: jax.Array, sigma: jax.Array) -> jax.Array:
        """log h [N] of particles [N, *x], with what the base takes them for without noise; -inf: none of that."""

    def end(self, x: jax.Array) -> jax.Array | None:
        """log h [N] of the samples themselves; None: as at the lowest level."""
        return None


class Powers(Potential):
    """Potentials that are made of energies alone."""

    @abc.abstractmethod
    def powers(self, powers: np.ndarray) -> np.ndarray:
        """[M] the powers of the models."""

    def log(self, x: jax.Array, x0: jax.Array, sigma: jax.Array) -> jax.Array:
        """No factor besides."""
        return jnp.zeros(len(x))


@dataclass(frozen=True)
class Temper(Powers):
    """The target to the power `beta`: above 1 colder, below 1 warmer."""

    name = "temper"

    beta: Positive = 2.0

    def powers(self, powers: np.ndarray) -> np.ndarray:
        return self.beta * powers


@dataclass(frozen=True)
class Product(Powers):
    """The product of all models, each to a power; `given=(1 - w, w)` of one without and one with a class is guidance."""

    name = "product"

    given: tuple[Coordinate, ...] = ()  # (): 1 each

    def powers(self, powers: np.ndarray) -> np.ndarray:
        if len(powers) < 2 or len(self.given) not in (0, len(powers)):
            asked = f"given={self.given} names {len(self.given)}" if self.given else "it takes two or more"
            raise UserError(
                f"potential product: there are {len(powers)} models, and {asked}; give as many energies as powers"
            )
        if powers[1:].any():
            raise UserError("potential product: the models are multiplied already; keep one product")
        return powers[0] * np.asarray(self.given or (1.0,) * len(powers))


def _each(values: tuple[float, ...], x: jax.Array, field: str) -> jax.Array:
    """[d] values for the numbers of an example; one value stands for all."""
    size = math.prod(x.shape[1:])
    if len(values) not in (1, size):
        raise UserError(
            f"potential.{field} has {len(values)} values for {size} numbers of an example; give {size}, or 1 for all"
        )
    return jnp.broadcast_to(jnp.asarray(values, jnp.float32), size)


@dataclass(frozen=True)
class Box(Potential):
    """Samples between `low` and `high` in every number.

    On the way h is the product over the numbers of P(low < x0 + sigma n < high), at the end the indicator: our choice.
    """

    name = "box"

    low: Some[Coordinate] = (-1.0,)
    high: Some[Coordinate] = (1.0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(a >= b for a in self.low for b in self.high) and (
            1 in (len(self.low), len(self.high)) or any(a >= b for a, b in zip(self.low, self.high))
        ):
            raise UserError(f"potential.low={self.low} must be below potential.high={self.high}")

    def log(self, x: jax.Array, x0: jax.Array, sigma: jax.Array) -> jax.Array:
        flat, low, high = x0.reshape(len(x), -1), _each(self.low, x, "low"), _each(self.high, x, "high")
        above, below = (high - flat) / sigma, (low - flat) / sigma
        flip = below + above < 0  # the tail that is not near 1 tells differences
        top, bottom = jnp.where(flip, above, -below), jnp.where(flip, below, -above)
        # log(Phi(top) - Phi(bottom)), with top > bottom
        log_top, log_bottom = log_ndtr(top), log_ndtr(bottom)
        return (log_top + jnp.log1p(-jnp.exp(jnp.minimum(log_bottom - log_top, -1e-7)))).sum(-1)

    def end(self, x: jax.Array) -> jax.Array:
        flat = x.reshape(len(x), -1)
        inside = (flat >= _each(self.low, x, "low")) & (flat <= _each(self.high, x, "high"))
        return jnp.where(inside.all(-1), 0.0, -jnp.inf)


@dataclass(frozen=True)
class HalfSpace(Potential):
    """Samples with normal . x < offset.

    On the way h = Phi((offset - normal . x0) / (|normal| sigma)), at the end the indicator: our choice. At high levels x0 is
    better known than sigma says, which makes the first weights flatter than need be and no result wrong.
    """

    name = "halfspace"

    normal: Some[Coordinate] = (1.0,)  # one number: all the same
    offset: Coordinate = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(self.normal):
            raise UserError(f"potential.normal={self.normal} has no direction; give one number that is not 0")

    def _left(self, x: jax.Array) -> jax.Array:
        """[N] distance to the edge, above 0 inside."""
        normal = _each(self.normal, x, "normal")
        return (self.offset - x.reshape(len(x), -1) @ normal) / jnp.linalg.norm(normal)

    def log(self, x: jax.Array, x0: jax.Array, sigma: jax.Array) -> jax.Array:
        return log_ndtr(self._left(x0) / sigma)

    def end(self, x: jax.Array) -> jax.Array:
        return jnp.where(self._left(x) > 0, 0.0, -jnp.inf)


@dataclass(frozen=True)
class Tilt(Potential):
    """Any function (x0 [N, *x], sigma []) -> log h [N], as of a classifier or a reward; for Python, since no config holds it."""

    name = "tilt"

    function: Callable[[jax.Array, jax.Array], jax.Array]

    def log(self, x: jax.Array, x0: jax.Array, sigma: jax.Array) -> jax.Array:
        return self.function(x0, sigma)


@dataclass(frozen=True)
class Classifier(Potential):
    """Samples of a class, one for each particle, by a classifier that knows no noise; for tasks that hold one.

    log h = s^2 / (s^2 + sigma^2) log p(class | x0), s the standard deviation of the data: our choice. What is surely of another
    class at a low level may still become one of this at a high one; with log p alone all weight would be one particle's there.
    """

    name = "classifier"

    logits: Callable[[jax.Array], jax.Array]  # x0 [N, *x] -> [N, classes]
    label: jax.Array  # [N]; below 0: any class
    data: Positive = 0.5  # s

    def log(self, x: jax.Array, x0: jax.Array, sigma: jax.Array) -> jax.Array:
        each = jax.nn.log_softmax(self.logits(x0).astype(jnp.float32))
        own = jnp.take_along_axis(each, jnp.maximum(self.label, 0)[:, None], 1)[:, 0]
        return jnp.where(self.label < 0, 0.0, own) * self.data**2 / (self.data**2 + sigma**2)
