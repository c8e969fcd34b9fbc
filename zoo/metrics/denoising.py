"""How well a denoiser finds held-out examples again, by noise level."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from zoo import dist, hosts
from zoo.data.pipeline import epoch
from zoo.errors import UserError
from zoo.fields import Count, Positive, Whole
from zoo.task import Denoises, Energetic, Metric, Params

_LEVELS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


def modelled(task: Any, draws: bool = False) -> str:
    """The key of what a task denoises among its examples. UserError where it denoises what it makes of them.

    Args:
        draws: who asks draws latents from the mean and spread that examples give.
    """
    spec, likelihood = task.spec(1), task.about.likelihood
    key = next(key for key in spec if key != "label" and key not in task.about.conditions)
    if (f"{key}_std" in spec and not draws) or (likelihood and likelihood.event != spec[key].shape[1:]):
        raise UserError(
            f"{type(task).__name__} denoises what it makes of {', '.join(spec)}, and metrics of denoisers measure examples as "
            "they are; `Model.denoise` takes its latents"
        )
    return key


def given(task: Any, batch: Any) -> dict[str, Any]:
    """What a batch says besides: labels and other conditions."""
    return {key: rows for key, rows in batch.items() if key == "label" or key in task.about.conditions}


def check_denoiser(task: Any, params: Params, x: Any, conditions: Any = None) -> None:
    """UserError for a denoiser that changes the shape of x, or is not finite at one of the levels that it was made for."""
    denoise = jax.jit(task.denoise)  # traced once for both levels
    for sigma in task.sigmas:
        x0 = denoise(params, x + sigma, jnp.float32(sigma), conditions or None)
        if x0.shape != x.shape or not bool(jnp.isfinite(x0).all()):
            what = f"has the shape {list(x0.shape)}" if x0.shape != x.shape else "is not finite"
            raise UserError(
                f"{type(task).__name__}.denoise of an array of {list(x.shape)} {what} at sigma={sigma:g}; a denoiser gives an "
                "x0 of the shape of x, finite over all of its `sigmas`"
            )


def _error(task: Any, params: Params, x0: jax.Array, x: jax.Array, sigma: jax.Array, told: Any) -> jax.Array:
    """Mean squared error of x0 [B]."""
    return jnp.square(task.denoise(params, x, sigma, told) - x0).mean(tuple(range(1, x0.ndim)))


def _energy(task: Any, params: Params, x0: jax.Array, x: jax.Array, sigma: jax.Array, told: Any) -> jax.Array:
    """Energy by number of x [B]."""
    found: jax.Array = task.energy(params, x, sigma, told) / math.prod(x.shape[1:])
    return found


@lru_cache(maxsize=8)
def _measured(task: Any, sigmas: tuple[float, ...], measure: Any) -> Any:
    """A jitted (params, batch, indices, rng) -> what is measured [levels, B] of examples with noise."""

    def errors(params: Params, batch: Any, indices: jax.Array, rng: jax.Array) -> jax.Array:
        batch, indices = jax.tree.map(lambda x: dist.constrain(x, "batch"), (batch, indices))
        name = modelled(task, draws=True)
        x0 = batch[name]

        def normal(i: Any) -> jax.Array:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(rng, i), indices)
            return jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(keys)

        if f"{name}_std" in batch:
            x0 = x0 + batch[f"{name}_std"] * normal(len(sigmas))

        def at(level: tuple[jax.Array, jax.Array]) -> jax.Array:
            i, sigma = level
            found: jax.Array = measure(task, params, x0, x0 + sigma * normal(i), sigma, given(task, batch))
            return found

        return jax.lax.map(at, (jnp.arange(len(sigmas)), jnp.asarray(sigmas)))

    return jax.jit(errors)


@dataclass(frozen=True)
class Denoising(Metric):
    """Mean squared error of x0 on held-out examples at some noise levels, under the conditions that they have.

    Latents are drawn, once for each example, from the mean and spread that it gives.

    Each times (sigma^2 + scale^2) / (sigma scale)^2, the weight of arXiv:2206.00364, table 1: the best linear guess
    for independent numbers of standard deviation `scale` has 1 at all levels.
    """

    sigmas: tuple[Positive, ...] = ()  # (): of .05, .1, .2, .5, 1, 2 and 5 those that the model was made for
    scale: Positive = 0.5
    split: str = "test"
    limit: Count | None = None  # examples at most, a fixed random choice
    batch: Count = 256
    every: Whole = 0  # steps between measurements while training; 0: at the end only

    name = "denoising"
    needs: ClassVar[tuple[type, ...]] = (Denoises,)

    def check(self, task: Any) -> None:
        """UserError for levels that the task was not made for, and examples that are not what it denoises."""
        modelled(task, draws=True)
        low, high = task.sigmas
        if wrong := [sigma for sigma in self.sigmas if not low <= sigma <= high]:
            raise UserError(
                f"sigmas={wrong[0]:g} of the metric {self.name}: {type(task).__name__} was made for {low:g} to {high:g}; choose "
                "levels of these"
            )

    def __call__(self, task: Any, params: Params, data: Any, rng: jax.Array) -> dict[str, Any]:
        """`denoising_SIGMA` of each level with its standard error over examples, and `denoising`, the mean over levels."""
        return self._told(task, params, data, rng, _error, lambda s: (s**2 + self.scale**2) / (s * self.scale) ** 2)

    def _told(
        self, task: Any, params: Params, data: Any, rng: jax.Array, measure: Any, weight: Callable[[float], float]
    ) -> dict[str, Any]:
        """Means over examples of what is measured at each level, times a weight."""
        self.check(task)
        low, high = task.sigmas
        sigmas = self.sigmas or tuple(s for s in _LEVELS if low <= s <= high) or tuple({low, high})
        measured, found, first, key = _measured(task, sigmas, measure), [], 0, modelled(task, draws=True)
        for batch, count in epoch(
            data, self.batch, split=self.split, spec=task.spec(self.batch), limit=self.limit, seed=0
        ):
            if not first:
                check_denoiser(task, params, batch[key][:1], {k: v[:1] for k, v in given(task, batch).items()})
            found.append(hosts.fetch(measured(params, batch, first + jnp.arange(self.batch), rng))[:, :count])
            first += count
        weighted = np.concatenate(found, 1).astype(np.float64) * np.asarray([weight(s) for s in sigmas])[:, None]
        means, spread = weighted.mean(1), weighted.std(1) / math.sqrt(first)
        return {
            self.name: float(means.mean()),
            **{f"{self.name}_{s:g}": float(mean) for s, mean in zip(sigmas, means)},
            **{f"{self.name}_{s:g}_std_error": float(error) for s, error in zip(sigmas, spread)},
            "examples": first,
            "split": self.split,
        }


@dataclass(frozen=True)
class EnergyByLevel(Denoising):
    """Energy of held-out examples with noise of some levels, in nats by number: of a flow -log p_t whole, else up to a constant."""

    name = "energy"
    needs: ClassVar[tuple[type, ...]] = (Energetic, Denoises)

    def __call__(self, task: Any, params: Params, data: Any, rng: jax.Array) -> dict[str, Any]:
        """`energy_SIGMA` of each level with its standard error over examples, and `energy`, the mean over levels."""
        return self._told(task, params, data, rng, _energy, lambda s: 1.0)
