"""Samples of a denoiser: which solver, in how many calls, guided or not, over which levels; and the one function that draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo.diffusion.guidance import Denoiser, Guidance
from zoo.diffusion.levels import Levels
from zoo.diffusion.solvers import Heun, Plan, Project, Solver, run
from zoo.dist import constrain
from zoo.errors import UserError
from zoo.fields import AtLeast2, NonNegative, check_fields

Conditions = Mapping[str, jax.Array] | None
Door = Callable[[jax.Array, jax.Array, Conditions], jax.Array]  # (x [n, *x], sigma [], conditions) -> x0 [n, *x]


@dataclass(frozen=True)
class DenoiserSampling:
    """How a denoiser is sampled."""

    solver: Solver = Heun()
    nfe: AtLeast2 = 35  # calls of the denoiser; a guided one counts once
    guidance: NonNegative | Guidance = 0.0  # a weight, or with an interval of levels; 0: off (papers say 1 + weight)
    levels: Levels = Levels()  # the grid: where nothing is said the solver's kind, from the highest level to the lowest

    def __post_init__(self) -> None:
        check_fields(self)
        nodes, given = self.solver.nodes(self.nfe), self.levels.given
        if given and nodes != len(given):
            raise UserError(
                f"nfe={self.nfe} takes {nodes} levels and levels.given lists {len(given)}; change one of them"
            )

    def plan(self, sigmas: tuple[float, float]) -> Plan:
        """The solver's table for a denoiser of levels from `sigmas[0]` to `sigmas[1]`. UserError for a grid beyond those."""
        plan = self.solver.plan(self.grid(self.solver.nodes(self.nfe), self.solver.grid, sigmas))
        if plan.sigma.max() > sigmas[1] * (1 + 1e-6):
            raise UserError(
                f"{self.solver} asks at a level of {plan.sigma.max():.4g} and the model knows {sigmas[0]:g} to {sigmas[1]:g}; set "
                "solver.high or levels.high lower, so that its noise stays below"
            )
        return plan

    def grid(self, count: int, kind: str, sigmas: tuple[float, float]) -> np.ndarray:
        """`count` levels, of this kind where none is asked for. UserError for a grid beyond the levels `sigmas` of the model."""
        low, high = sigmas
        grid = self.levels.grid(count, kind, low, high)
        if grid[-1] < low * (1 - 1e-6) or grid[0] > high * (1 + 1e-6):
            raise UserError(
                f"levels from {grid[-1]:g} to {grid[0]:g} reach beyond those of the model, {low:g} to {high:g}; set levels.low "
                "and levels.high"
            )
        return grid


def guidance_of(by: float | Guidance, conditions: Conditions) -> Guidance:
    """The guidance that an option holds. UserError for some where there is no class."""
    guidance = Guidance.of(by)
    if guidance.weight and "label" not in (conditions or {}):
        raise UserError("guidance compares a class with none, and there is no class here; leave guidance out")
    return guidance


def classless(given: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Conditions, with no class in the place of each."""
    return {k: jnp.full_like(v, -1) if k == "label" else v for k, v in given.items()}


def guided(denoise: Door, conditions: Conditions, by: float | Guidance) -> Denoiser:
    """The denoiser under these conditions, away from that without a class. UserError for guidance where there is no class."""
    guidance, given = guidance_of(by, conditions), dict(conditions or {})

    def alone(x: jax.Array, sigma: jax.Array) -> jax.Array:
        return denoise(x, sigma, conditions)

    def both(x: jax.Array, sigma: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One pass of twice the batch: labelled rows, then the same without."""
        twice = {k: jnp.concatenate([given[k], v]) for k, v in classless(given).items()}
        strong, weak = jnp.split(denoise(jnp.concatenate([x, x]), sigma, twice), 2)
        return strong, weak

    return guidance.denoiser(alone, both)


def noises(keys: jax.Array, shape: tuple[int, ...]) -> Callable[[Any], jax.Array]:
    """i -> the i-th standard normal [n, *shape] of n samples, each from its own key."""

    def normal(i: Any) -> jax.Array:
        return constrain(jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape))(keys), "batch")

    return normal


def draw(
    plan: Plan,
    denoise: Denoiser,
    keys: jax.Array,
    shape: tuple[int, ...],
    random: bool | None = None,
    project: Project | None = None,
) -> jax.Array:
    """One sample [n, *shape] for each of n keys; `project` as of `zoo.diffusion.solvers.run`.

    `random` says whether the solver has noise of its own; None: as `plan` does, where it is no input of the program.
    """
    starts, normal = plan.start.shape[1], noises(keys, shape)
    start = jnp.stack([normal(i) for i in range(starts)])
    has_noise = plan.random if random is None else random
    return run(plan, denoise, start, (lambda i: normal(starts + i)) if has_noise else None, project)


def start_from(plan: Plan, x: jax.Array, normal: Callable[[Any], jax.Array]) -> jax.Array:
    """The normal arrays [Z, n, *x] that a solver begins with, given that its first call reads x [n, *x] of its highest level."""
    weights = jnp.asarray(plan.read_x[0] @ plan.start, x.dtype)
    start = jnp.stack([normal(i) for i in range(len(weights))])
    left = (x - jnp.tensordot(weights, start, 1)) / (weights @ weights)
    return start + weights.reshape(-1, *(1,) * x.ndim) * left


def onward(plan: Plan, denoise: Denoiser, x: jax.Array, keys: jax.Array) -> jax.Array:
    """What a solver makes of x [n, *x] at its highest level, with noise of its own from a key for each."""
    normal, starts = noises(keys, x.shape[1:]), plan.start.shape[1]
    return run(plan, denoise, start_from(plan, x, normal), (lambda i: normal(starts + i)) if plan.random else None)


def sampled(
    denoise: Door,
    sigmas: tuple[float, float],
    shape: tuple[int, ...],
    keys: jax.Array,
    conditions: Conditions,
    options: DenoiserSampling,
) -> jax.Array:
    """One sample [n, *shape] of a denoiser for each of n keys, as its options say.

    UserError for levels beyond `sigmas`, and for guidance where there is no class.
    """
    plan = options.plan(sigmas)
    return draw(plan, guided(denoise, conditions, options.guidance), keys, shape)


def clipped(image: jax.Array) -> jax.Array:
    """Images in [-1, 1], NaN where they overflowed."""
    return jnp.where(jnp.isfinite(image), jnp.clip(image, -1, 1), jnp.nan)
