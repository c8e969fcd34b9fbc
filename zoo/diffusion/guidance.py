"""Guidance of denoisers: away from what a weaker one would say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax

from zoo.errors import UserError
from zoo.fields import NonNegative, Positive, check_fields

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]  # (x [*x], sigma []) -> x0 [*x]


@dataclass(frozen=True)
class Guidance:
    """x0 + weight (x0 - weak x0): a weight of 0 is none, the scale of the papers is 1 + weight.

    Only at levels above `low` and up to `high` (arXiv:2404.07724); elsewhere there is one pass. None: no bound.
    """

    weight: NonNegative = 0.0
    low: NonNegative = 0.0
    high: Positive | None = None

    def __post_init__(self) -> None:
        check_fields(self, "guidance.")
        if not self.weight and (self.low or self.high is not None):
            raise UserError(
                "guidance.low and guidance.high say where a weight acts; set guidance.weight, or leave them out"
            )
        if self.high is not None and self.low >= self.high:
            raise UserError(f"guidance.low={self.low:g} must be below guidance.high={self.high:g}")

    @classmethod
    def of(cls, given: float | Guidance) -> Guidance:
        """The guidance that an option holds, which may be a weight alone."""
        return given if isinstance(given, Guidance) else cls(given)

    def denoiser(
        self, alone: Denoiser, both: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    ) -> Denoiser:
        """The guided one, of the denoiser and of a function that gives its and the weaker one's x0 in one pass."""
        if not self.weight:
            return alone

        def guided(x: jax.Array, sigma: jax.Array) -> jax.Array:
            strong, weak = both(x, sigma)
            return strong + self.weight * (strong - weak)

        if self.low == 0 and self.high is None:
            return guided

        def within(x: jax.Array, sigma: jax.Array) -> jax.Array:
            inside = (sigma > self.low) & (sigma <= (jax.numpy.inf if self.high is None else self.high))
            return jax.lax.cond(inside, guided, alone, x, sigma)

        return within
