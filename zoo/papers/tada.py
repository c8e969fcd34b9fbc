"""TADA: Improved Diffusion Sampling with Training-free Augmented Dynamics (arXiv:2506.21757).

The sample is the first of N variables, each the derivative of the one before; a force on the last carries the first to the
data. Given all of them, the posterior of the data is that given one mixture r . X of them, which is the data plus noise of
one level: so any denoiser serves as it is. The last variable's noise reaches the denoiser slowly, much as fresh noise would.

Time t runs from 0 (noise) to 1 (data), s = 1 - t; N variables, X [N, *x]. Order of this file: coefficients in closed form,
the solver, the comparison of solvers on exact denoisers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta

from zoo.diffusion.solvers import Array, Call, Plan, Solver, integrals, keep, probe
from zoo.fields import Positive


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
        n, t = self.variables, np.asarray(t, np.float64)
        signs = [(-1) ** (n - j - 1) * math.factorial(n) / math.factorial(n - j) for j in range(n)]
        u = np.stack([sign * t ** (n - j) for j, sign in enumerate(signs)])
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
        n, s = self.variables, 1 - t
        u, total = self._ends(t)
        scaled = u / self.prior**2 * s**n / total
        return np.asarray(
            [
                s**q / math.factorial(q)
                + sum(scaled[j] * (-t) ** (q - j) / math.factorial(q - j) for j in range(q + 1))
                for q in range(n)
            ]
        )

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

    def transition(self, t: float) -> np.ndarray:
        """[N, N] the transition from 0 to t with the force to a known data point: the part of the prior."""
        n = self.variables
        fall = [math.factorial(n) / math.factorial(n - j) * t ** (n - j) for j in range(n)]
        return self.free(t) - np.outer(fall, [1 / math.factorial(k) for k in range(n)])

    def mean(self, t: float) -> np.ndarray:
        """[N] the part of the data point."""
        n = self.variables
        return np.asarray([math.factorial(n) / math.factorial(n - j) * t ** (n - j) for j in range(n)])


@dataclass(frozen=True)
class Tada(Solver):
    """Adams-Bashforth steps of the augmented dynamics, whose linear part is exact; orders 2 and 3 are the paper's.

    `detail` is the standard deviation of the last variable's noise: more of it leaves more of a sample open after the first
    call. With one variable and order 1 the steps are Euler's.
    """

    name = "tada"

    variables: Annotated[int, Meta(ge=1, le=4)] = 2
    detail: Positive = 1.0
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
