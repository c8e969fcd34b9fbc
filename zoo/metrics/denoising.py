"""How well a denoiser finds held-out examples again, by noise level."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo import dist, hosts
from zoo.data.pipeline import epoch
from zoo.errors import UserError
from zoo.fields import Count, Positive, Whole, check_fields
from zoo.task import Denoises, Metric, Params

_LEVELS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


def modelled(task: Any) -> str:
    """The key of what a task denoises among its examples."""
    return next(key for key in task.spec(1) if key != "label" and key not in task.about.conditions)


def given(task: Any, batch: Any) -> dict[str, Any]:
    """What a batch says besides: labels and other conditions."""
    return {key: rows for key, rows in batch.items() if key == "label" or key in task.about.conditions}


def check_denoiser(task: Any, params: Params, x: Any) -> None:
    """UserError for a denoiser that changes the shape of x, or is not finite at one of the levels that it was made for."""
    for sigma in task.sigmas:
        x0 = jax.jit(task.denoise)(params, sigma * jnp.ones_like(x), jnp.float32(sigma))
        if x0.shape != x.shape or not bool(jnp.isfinite(x0).all()):
            what = f"has the shape {list(x0.shape)}" if x0.shape != x.shape else "is not finite"
            raise UserError(
                f"{type(task).__name__}.denoise of an array of {list(x.shape)} {what} at sigma={sigma:g}; a denoiser gives an "
                "x0 of the shape of x, finite over all of its `sigmas`"
            )


@lru_cache(maxsize=8)
def _errors(task: Any, sigmas: tuple[float, ...]) -> Any:
    """A jitted (params, batch, indices, rng) -> mean squared error of x0 [levels, B]."""

    def errors(params: Params, batch: Any, indices: jax.Array, rng: jax.Array) -> jax.Array:
        batch, indices = jax.tree.map(lambda x: dist.constrain(x, "batch"), (batch, indices))
        x0 = batch[modelled(task)]

        def at(level: tuple[jax.Array, jax.Array]) -> jax.Array:
            i, sigma = level
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(rng, i), indices)
            noise = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(keys)
            found = task.denoise(params, x0 + sigma * noise, sigma, given(task, batch))
            return jnp.square(found - x0).mean(tuple(range(1, x0.ndim)))

        return jax.lax.map(at, (jnp.arange(len(sigmas)), jnp.asarray(sigmas)))

    return jax.jit(errors)


@dataclass(frozen=True)
class Denoising(Metric):
    """Mean squared error of x0 on held-out examples at some noise levels, under the conditions that they have.

    Each times (sigma^2 + data^2) / (sigma data)^2, the weight of arXiv:2206.00364, table 1: the best linear guess
    for independent numbers of standard deviation `data` has 1 at all levels.
    """

    sigmas: tuple[Positive, ...] = ()  # (): of .05, .1, .2, .5, 1, 2 and 5 those that the model was made for
    data: Positive = 0.5
    split: str = "test"
    limit: Count | None = None  # examples at most
    batch: Count = 256
    every: Whole = 0  # steps between measurements while training; 0: at the end only

    name = "denoising"
    needs = (Denoises,)

    def __post_init__(self) -> None:
        check_fields(self, f"metric {self.name}: ")

    def check(self, task: Any) -> None:
        """UserError for levels that the task was not made for; asked before a run's first step."""
        low, high = task.sigmas
        if wrong := [sigma for sigma in self.sigmas if not low <= sigma <= high]:
            raise UserError(
                f"sigmas={wrong[0]:g} of the metric denoising: {type(task).__name__} was made for {low:g} to {high:g}; choose "
                "levels of these"
            )

    def __call__(self, task: Any, params: Params, data: Any, rng: jax.Array) -> dict[str, Any]:
        """`denoising_SIGMA` of each level with its standard error over examples, and `denoising`, the mean over levels."""
        self.check(task)
        low, high = task.sigmas
        sigmas = self.sigmas or tuple(s for s in _LEVELS if low <= s <= high) or tuple({low, high})
        check_denoiser(task, params, jnp.zeros(task.spec(1)[modelled(task)].shape))
        errors, found, first = _errors(task, sigmas), [], 0
        for batch, count in epoch(data, self.batch, split=self.split, spec=task.spec(self.batch), limit=self.limit):
            found.append(hosts.fetch(errors(params, batch, first + jnp.arange(self.batch), rng))[:, :count])
            first += count
        weights = [(s**2 + self.data**2) / (s * self.data) ** 2 for s in sigmas]
        weighted = np.concatenate(found, 1).astype(np.float64) * np.asarray(weights)[:, None]
        means, spread = weighted.mean(1), weighted.std(1) / math.sqrt(first)
        return {
            "denoising": float(means.mean()),
            **{f"denoising_{s:g}": float(mean) for s, mean in zip(sigmas, means)},
            **{f"denoising_{s:g}_std_error": float(error) for s, error in zip(sigmas, spread)},
            "examples": first,
            "split": self.split,
        }
