"""Solvers side by side on a trained denoiser: how far each is from where it converges, and from the data, by its calls.

n samples, *x the shape of one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from zoo import hosts
from zoo.data.pipeline import epoch
from zoo.diffusion.compare import chart, sheet, table
from zoo.diffusion.guidance import Guidance
from zoo.diffusion.levels import Levels
from zoo.diffusion.sampling import DenoiserSampling, draw, guided
from zoo.diffusion.solvers import Heun, Plan, Solver
from zoo.errors import UserError
from zoo.fields import AtLeast2, Count, NonNegative, Some, required
from zoo.metrics.denoising import check_denoiser, modelled
from zoo.metrics.frechet import Frechet, frechet_distance, moments
from zoo.task import Denoises, Metric, Params

_log = logging.getLogger("zoo")
_SHOWN = 8  # samples of a solver in the picture


@lru_cache(maxsize=8)
def _program(task: Any, guidance: float | Guidance, random: bool) -> Any:
    """A jitted (params, plan, rng, indices, label or None) -> [n, *x]: of all plans of one shape one program."""
    shape = task.spec(1)[modelled(task)].shape[1:]

    def program(params: Params, plan: Plan, rng: jax.Array, indices: jax.Array, label: Any) -> jax.Array:
        denoise = partial(task.denoise, params)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, indices)
        return draw(plan, guided(denoise, None if label is None else {"label": label}, guidance), keys, shape, random)

    return jax.jit(program)


def _ours(cls: type) -> bool:
    """Whether a solver comes with zoo and is one without being told anything."""
    return cls.__module__.startswith("zoo.") and not required(cls)


def branched(plan: Plan) -> Plan:
    """The same on twice as many normal arrays: the first input is that of the first half, all else of the second.

    So its samples and those of the first half alone begin with one input and differ in what stayed open.
    """
    seen = plan.read_x[0] @ plan.start
    kept = np.outer(seen, seen) / (seen @ seen)
    return plan._replace(start=np.concatenate([plan.start @ kept, plan.start @ (np.eye(len(seen)) - kept)], 1))


@dataclass(frozen=True)
class Solvers(Metric):
    """A table of solvers by calls of the denoiser, each on its own grid unless `levels.kind` says one for all.

    `error`: root mean square of the difference to the solution that the solver converges to, from the same noise, as a
    share of that of the data. Solvers that begin with one array of noise have one solution. `frechet`: the metric of this
    name. `open`: the share of the variance of samples that is left when the first input of the denoiser is fixed; 0 where
    it fixes all. Figures are means over sets of samples, with their standard deviation.
    """

    solvers: tuple[Solver, ...] = ()  # by name, e.g. heun,tada; (): each that zoo has, as it is
    nfe: Some[AtLeast2] = (5, 6, 8, 10, 18)
    levels: Levels = Levels()
    guidance: NonNegative | Guidance = 0.0
    features: str = "pixels"  # of the Frechet distance: or a run or export with features; "": no distance
    samples: AtLeast2 = 256  # of a set, labels in turn
    sets: Count = 2  # of samples, each from other noise
    converged: AtLeast2 = 251  # calls after which a solver has converged
    split: str = "train"  # of the data, what samples are compared with
    batch: Count = 128

    name = "solvers"
    needs = (Denoises,)

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, values in (("solvers", [*map(str, self.solvers)]), ("nfe", [*self.nfe])):
            if twice := [value for i, value in enumerate(values) if value in values[:i]]:
                raise UserError(
                    f"{field} of the metric solvers names {twice[0]} twice; keep one of them, or set its fields"
                )
        if self.converged <= max(self.nfe):
            raise UserError(f"converged={self.converged} of the metric solvers must be more than nfe={max(self.nfe)}")

    def opens(self) -> str | None:
        """The run or export whose features are wanted; None for none."""
        return Frechet(self.features).opens() if self.features else None

    def check(self, task: Any) -> None:
        """UserError: it makes a table, and no figure of a run while that trains."""
        raise UserError(
            "evals: the metric solvers makes a table; take it out, and run `zoo eval RUN solvers` after training"
        )

    def __call__(self, task: Any, params: Params, data: Any, rng: jax.Array, network: Any = None) -> dict[str, Any]:
        """`solvers`, a list of rows with one figure for each of `nfe`, None where a solver cannot; a chart and samples.

        UserError for levels outside those of the task, a denoiser that gives what is no x0, or calls no solver can make.
        """
        low, high = task.sigmas
        if low >= high:
            raise UserError(f"the metric solvers goes through noise levels, and this model knows one, {high:g}")
        key, seen = modelled(task), task.spec(self.batch)
        spec = {key: seen[key]}
        rows, count = next(epoch(data, self.samples, split=self.split, spec=spec, limit=self.samples, seed=0))
        check_denoiser(task, params, jnp.asarray(rows[key][:1]))
        scale = float(np.sqrt(np.square(rows[key][:count], dtype=np.float64).mean()))
        apart = self._frechet(data, spec, network)
        kinds = self.solvers or tuple(cls() for cls in Solver.named().values() if _ours(cls))
        plans = {(solver, calls): self._plan(solver, calls, task) for solver in kinds for calls in self.nfe}
        if not any(plans.values()):
            DenoiserSampling(kinds[0], self.nfe[0], self.guidance, self.levels).plan(task.sigmas)  # says why not

        able = [plan for plan in plans.values() if plan is not None]
        states, outputs = max(len(plan.start) for plan in able), max(2, *(plan.read_h.shape[1] for plan in able))
        normals = 2 * max(plan.start.shape[1] for plan in able)

        def draws(plan: Plan, k: int) -> np.ndarray:
            return self._drawn(task, params, jax.random.fold_in(rng, k), plan.padded(states, outputs, normals))

        given = self.levels.given
        fine = replace(self, levels=Levels(low=given[-1], high=given[0])) if given else self

        @cache
        def solution(solver: Solver, k: int) -> np.ndarray:
            for calls in (self.converged, self.converged + 1):
                if (plan := fine._plan(solver, calls, task)) is not None:
                    return draws(plan, k)
            raise UserError(f"{solver} takes neither {self.converged} calls nor one more; set converged to what it can")

        def cell(solver: Solver, plan: Plan, k: int) -> dict[str, float]:
            """Figures of set k of samples."""
            x, arrays = draws(plan, k), plan.start.shape[1]
            shown.setdefault((str(solver), len(plan.sigma)), x[:_SHOWN])
            found = {"open": 0.0}
            if arrays > 1:
                other = draws(branched(plan), k)
                shown.setdefault((f"{solver}, same first input", len(plan.sigma)), other[:_SHOWN])
                found["open"] = float(np.square(x - other).mean() / 2 / x.var(0).mean())
            if not plan.random:
                found["error"] = (
                    float(np.sqrt(np.square(x - solution(Heun() if arrays == 1 else solver, k)).mean())) / scale
                )
            if apart is not None:
                found["frechet"] = apart(x) if np.isfinite(x).all() else float("nan")
            return found

        cells: dict[str, list[list[dict[str, float]]]] = {str(solver): [] for solver in kinds}
        shown: dict[tuple[str, int], np.ndarray] = {}
        for calls in self.nfe:
            for solver in kinds:
                plan = plans[solver, calls]
                cells[str(solver)].append([] if plan is None else [cell(solver, plan, k) for k in range(self.sets)])
        return self._told(cells, shown if "image" in spec else {}) | {"data_rms": scale}

    def _plan(self, solver: Solver, calls: int, task: Any) -> Plan | None:
        """The table of a solver at so many calls; None where it cannot take so many."""
        try:
            solver.nodes(calls)
        except UserError:
            return None
        try:
            return DenoiserSampling(solver, calls, self.guidance, self.levels).plan(task.sigmas)
        except UserError:
            if self.solvers:
                raise
            return None  # one of all: its noise may reach beyond the levels of the model

    def _drawn(self, task: Any, params: Params, rng: jax.Array, plan: Plan) -> np.ndarray:
        """[samples, *x], labels in turn."""
        program, classes, parts = _program(task, self.guidance, plan.random), task.about.classes, []
        for first in range(0, self.samples, self.batch):
            indices = np.arange(first, first + self.batch)
            label = indices % classes if classes else None
            parts.append(hosts.fetch(program(params, plan, rng, indices, label)))
        return np.concatenate(parts)[: self.samples]

    def _frechet(self, data: Any, spec: Any, network: Any) -> Callable[[np.ndarray], float] | None:
        """Samples [n, H, W, C] -> their distance to the data; None where it is not asked for."""
        if not self.features:
            return None
        metric = Frechet(self.features, split=self.split, batch=self.batch)
        if "image" not in spec:
            raise UserError(
                "the metric solvers compares images by features, and this model denoises none; set features=''"
            )
        features, _ = metric.extractor(spec["image"].shape[1:], network)
        reference = metric.statistics(data, spec, network)
        return lambda x: frechet_distance(moments([features(x)]), reference)

    def _told(self, cells: Any, shown: Any) -> dict[str, Any]:
        """Means and standard deviations over sets, the tables that are printed, and pictures."""
        rows: dict[str, dict[str, Any]] = {name: {"solver": name} for name in cells}
        pictures: dict[str, Image.Image] = {}
        words = {
            "error": "difference to where it converges, of the data's rms",
            "frechet": "Frechet distance to the data",
        }
        for figure in ("error", "frechet", "open"):
            means = {}
            for name, columns in cells.items():
                values = [np.asarray([one[figure] for one in sets if figure in one]) for sets in columns]
                means[name] = [float(v.mean()) if v.size and np.isfinite(v).all() else None for v in values]
                rows[name][figure] = means[name]
                rows[name][f"{figure}_std"] = [
                    None if mean is None else float(v.std()) for mean, v in zip(means[name], values)
                ]
            if figure in words and any(value is not None for row in means.values() for value in row):
                _log.info("%s, by calls:\n%s", words[figure], table(self.nfe, means))
                pictures[f"solvers-{figure}"] = chart(self.nfe, means, words[figure])
        if shown:
            pictures["solvers-samples"] = sheet(self.nfe, shown)
        about = {"nfe": list(self.nfe), "samples": self.samples, "sets": self.sets, "split": self.split}
        return {"solvers": list(rows.values()), **about, "pictures": pictures}
