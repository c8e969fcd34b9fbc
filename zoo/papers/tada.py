"""TADA: Improved Diffusion Sampling with Training-free Augmented Dynamics (arXiv:2506.21757).

The sample is the first of N variables, each the derivative of the one before; a force on the last carries the first to the
data. Given all of them, the posterior of the data is that given one mixture r . X of them, which is the data plus noise of
one level: so any denoiser serves as it is. The last variable's noise reaches the denoiser slowly, much as fresh noise would.

Time t runs from 0 (noise) to 1 (data), s = 1 - t; N variables, X [N, *x]. Order of this file: coefficients in closed form,
the solver, the comparison of solvers on exact denoisers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from zoo.diffusion.compare import chart, folder, table, write
from zoo.diffusion.levels import Levels
from zoo.diffusion.solvers import (
    DEIS,
    IPNDM,
    Array,
    Call,
    DPMSolver,
    Euler,
    Heun,
    Plan,
    Solver,
    UniPC,
    integrals,
    keep,
    probe,
)
from zoo.errors import UserError
from zoo.fields import AtLeast2, NotEmpty, Positive, Side, Some, check_fields

_log = logging.getLogger("zoo")


@dataclass(frozen=True)
class Dynamics:
    """Coefficients of N variables whose prior is standard normal but for the last, of standard deviation k. All float64.

    From the closed forms: covariances near t = 1 cannot be inverted.
    """

    variables: int
    detail: float

    @property
    def prior(self) -> np.ndarray:
        """[N] standard deviations at t = 0."""
        return np.append(np.ones(self.variables - 1), self.detail)

    def _ends(self, t: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """u [N, ...] and U [...], of which level and mixture are made."""
        u = np.stack([(-1) ** (self.variables - j - 1) * part for j, part in enumerate(self.mean(t))])
        return u, np.tensordot(self.prior**-2, u**2, 1)

    def sigma(self, t: float | np.ndarray) -> np.ndarray:
        """The noise level that the mixture has at time t: s^N / sqrt(U), decreasing."""
        return (1 - np.asarray(t)) ** self.variables / np.sqrt(self._ends(t)[1])

    def time(self, sigma: np.ndarray) -> np.ndarray:
        """When the mixture has these levels, by bisection."""
        low, high = np.zeros(np.shape(sigma)), np.ones(np.shape(sigma))
        for _ in range(80):
            middle = (low + high) / 2
            later = self.sigma(middle) > sigma
            low, high = np.where(later, middle, low), np.where(later, high, middle)
        return (low + high) / 2

    def mixture(self, t: float) -> np.ndarray:
        """r [N]: r . X is the data plus noise of level sigma(t), and holds all that X knows of the data."""
        u, total = self._ends(t)
        return self.ahead(1 - t) + (1 - t) ** self.variables / total * (u / self.prior**2) @ self.free(-t)

    def ahead(self, s: float) -> np.ndarray:
        """[N] Taylor's weights: where the first variable would be after a time s without force."""
        return np.asarray([s**k / math.factorial(k) for k in range(self.variables)])

    def strength(self, s: float) -> float:
        """The force on what is missing, N! / s^N: constant over the time s that is left, it ends at the data."""
        return math.factorial(self.variables) / s**self.variables

    def free(self, h: float) -> np.ndarray:
        """[N, N] the transition over a time h without force."""
        n = self.variables
        return np.asarray(
            [[h ** (k - j) / math.factorial(k - j) if k >= j else 0.0 for k in range(n)] for j in range(n)]
        )

    def mean(self, t: float | np.ndarray) -> np.ndarray:
        """[N, ...] the part of the data point."""
        n = self.variables
        return np.asarray([math.factorial(n) / math.factorial(n - j) * t ** (n - j) for j in range(n)])

    def transition(self, t: float) -> np.ndarray:
        """[N, N] the transition from 0 to t with the force to a known data point: the part of the prior."""
        return self.free(t) - np.outer(self.mean(t), self.ahead(1.0))


@dataclass(frozen=True)
class Tada(Solver):
    """Adams-Bashforth steps of the augmented dynamics, whose linear part is exact; orders 2 and 3 are the paper's.

    `detail` is the standard deviation of the last variable's noise: more of it leaves more of a sample open after the first
    call. With one variable and order 1 the steps are Euler's.
    """

    name = "tada"
    grid = "flow"  # forces are polynomials in t: the orders need it

    variables: Annotated[int, Meta(ge=1, le=4)] = 2
    detail: Annotated[float, Meta(ge=1e-3, le=1e3)] = 1.0
    order: Literal[1, 2, 3] = 2

    def plan(self, levels: np.ndarray) -> Plan:
        n, dynamics = self.variables, Dynamics(self.variables, self.detail)
        times = dynamics.time(levels)

        def step(i: int) -> Call:
            t, s, mixture = times[i], 1 - times[i], dynamics.mixture(times[i])

            def read(x: Array, h: Array, e: Array) -> Array:
                return sum(r * part for r, part in zip(mixture, x))

            if i + 1 == len(times):
                return Call(levels[i], read, keep)
            to, nodes = times[i + 1], times[i - np.arange(min(self.order, i + 1))]

            def push(j: int) -> np.ndarray:
                """What forces at the nodes add to variable j."""
                return integrals(nodes, t, to, lambda at: (to - at) ** (n - 1 - j) / math.factorial(n - 1 - j))

            pushes = [push(j) for j in range(n)]

            def move(x: Array, h: Array, e: Array) -> Sequence[Array]:
                missing = h[0] - sum(a * part for a, part in zip(dynamics.ahead(s), x))
                forces = [dynamics.strength(s) * missing, *x[n:]]
                drift = np.tensordot(dynamics.free(to - t), x[:n], 1)
                return [
                    *(drift[j] + sum(w * force for w, force in zip(pushes[j], forces)) for j in range(n)),
                    *forces[: self.order - 1],
                ]

            return Call(levels[i], read, move)

        start = np.zeros((n + self.order - 1, n))
        start[:n] = dynamics.transition(times[0]) * dynamics.prior
        return probe([step(i) for i in range(len(times))], start, 1)


# --- solvers side by side -------------------------------------------------------------------------


def spectrum(side: int, power: float, mean: float) -> np.ndarray:
    """[side^2] variances of the directions of an image: frequency^-power, of mean `mean`."""
    frequency = np.fft.fftfreq(side) * side
    variance = np.maximum(np.hypot(*np.meshgrid(frequency, frequency)), 1.0).ravel() ** -power
    return variance * mean / variance.mean()


def distance(plan: Plan, variance: np.ndarray) -> float:
    """Frechet's distance between samples and N(0, variance), exactly: the exact denoiser is linear, and so is the solver.

    The squared differences of standard deviations, added up. UserError for a solver with noise of its own.
    """
    if plan.random:
        raise UserError("solvers with noise of their own are not compared here; leave ancestral and churn out")
    x, h = (
        np.repeat(plan.start[:, None], len(variance), 1),
        np.zeros((plan.read_h.shape[1], len(variance), plan.start.shape[1])),
    )
    for i, sigma in enumerate(plan.sigma):
        x0 = (np.tensordot(plan.read_x[i], x, 1) + np.tensordot(plan.read_h[i], h, 1)) * (
            variance / (variance + sigma**2)
        )[:, None]
        h = np.concatenate([x0[None], h[:-1]])
        x = np.tensordot(plan.move_x[i], x, 1) + np.tensordot(plan.move_h[i], h, 1)
    return float(np.square(np.sqrt(np.square(h[0]).sum(-1)) - np.sqrt(variance)).sum())


_BASELINES = (
    Euler(), Heun(), DPMSolver(2), DPMSolver(2, lower_last=True), DPMSolver(3), UniPC(2), UniPC(2, lower_last=False),
    UniPC(3), UniPC(3, lower_last=False), DEIS(3), IPNDM(3),
)  # fmt: skip


@dataclass(frozen=True)
class Solvers:
    """Solvers side by side on a Gaussian with the spectrum of images, whose denoiser is exact; each on its best grid."""

    solvers: Some[Solver] = (*_BASELINES, Tada(1, 1.0, 3), Tada(), Tada(detail=2.0), Tada(3))
    calls: Some[AtLeast2] = (5, 6, 8, 10, 15, 20)
    grids: Some[Literal["edm", "log", "flow"]] = ("edm", "log", "flow")
    side: Side = 16
    power: Positive = 2.0  # of the frequency, by which variances fall
    variance: Positive = 0.25  # mean over the pixels
    out: NotEmpty = "solvers"  # folder of the results

    def __post_init__(self) -> None:
        check_fields(self)

    def run(self) -> dict[str, Any]:
        """Writes solvers.json, solvers.md and solvers.png into `out`; returns the first.

        UserError where `out` is no folder of such results.
        """
        out = folder(self.out, "solvers.json", "compared solvers")
        variance = spectrum(self.side, self.power, self.variance)
        rows: list[dict[str, Any]] = [
            {"solver": str(solver), **self._best(solver, variance)} for solver in self.solvers
        ]
        figures = {"variance": float(variance.sum()), "calls": list(self.calls), "solvers": rows}
        values = {row["solver"]: row["distance"] for row in rows}
        written = table(self.calls, values, {row["solver"]: row["grid"] for row in rows})
        _log.info("Frechet distance by calls of the denoiser, on the best grid of each:\n%s", written)
        picture = chart(self.calls, values, "Frechet distance to the data")
        return write(out, "solvers", figures, written, solvers=picture)

    def _best(self, solver: Solver, variance: np.ndarray) -> dict[str, list[Any]]:
        """For each number of calls the least distance and its grid; None where the solver cannot."""
        found: list[tuple[float | None, str]] = []
        for calls in self.calls:
            try:
                nodes = solver.nodes(calls)
            except UserError:
                found.append((None, ""))
                continue
            found.append(min((distance(solver.plan(Levels(kind).grid(nodes)), variance), kind) for kind in self.grids))
        return {"distance": [one for one, _ in found], "grid": [kind for _, kind in found]}
