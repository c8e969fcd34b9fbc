"""Solvers of diffusion's probability flow: tables of numbers, and the one loop that runs any table on any denoiser.

A denoiser is a function (x, sigma) -> x0 with x = x0 + sigma n. Every solver here reads its input from, and moves its state
by, linear combinations of what it has seen. So a solver is written as the formulas of its paper, on NumPy arrays in
float64; `probe` feeds them unit vectors, which gives the coefficients; and `run` is a scan over the rows of the table.
Tables of one shape share one compiled program. The last call is a row like any other, and its output is the sample: the
rows are the calls of the denoiser (NFE).

S arrays of state, P remembered outputs (the newest first), Z normal arrays at the start, R calls.
Order of this file: tables and the loop, solvers of one step, solvers with a memory, random ones.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zoo.errors import UserError
from zoo.fields import Named, NonNegative, Positive, Share, check_fields

Array = Any  # of NumPy or JAX: formulas work on both
Project = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (number of the call [], x [*x], sigma []) -> x [*x]


class Plan(NamedTuple):
    """A solver on a grid of levels: what each call of the denoiser reads, and how the state moves after it."""

    sigma: np.ndarray  # [R] noise level of each call
    start: np.ndarray  # [S, Z] the state, from normal arrays
    read_x: np.ndarray  # [R, S] the input: of the state,
    read_h: np.ndarray  # [R, P] of remembered outputs,
    read_e: np.ndarray  # [R] and of the noise of this call
    move_x: np.ndarray  # [R, S, S] the next state: likewise, this output among those remembered
    move_h: np.ndarray  # [R, S, P]
    move_e: np.ndarray  # [R, S]

    @property
    def random(self) -> bool:
        """Whether calls have noise of their own."""
        return bool(np.any(self.read_e) or np.any(self.move_e))

    def padded(self, states: int, outputs: int, normals: int) -> Plan:
        """The same with more, unused arrays: plans of one shape share one compiled program."""
        s, p, z = states - self.start.shape[0], outputs - self.read_h.shape[1], normals - self.start.shape[1]
        more = {
            "start": (s, z),
            "read_x": (0, s),
            "read_h": (0, p),
            "move_x": (0, s, s),
            "move_h": (0, s, p),
            "move_e": (0, s),
        }
        return self._replace(**{key: np.pad(getattr(self, key), [(0, n) for n in by]) for key, by in more.items()})


class Call(NamedTuple):
    """One call of the denoiser, as formulas on states x[s], remembered outputs h[p], the newest first, and noise e."""

    sigma: float
    read: Callable[[Array, Array, Array], Array]  # the denoiser's input; h holds the outputs before this call
    move: Callable[[Array, Array, Array], Sequence[Array]]  # the next states; h begins with this call's output


def keep(x: Array, h: Array, e: Array) -> Sequence[Array]:
    """The state stays."""
    return list(x)


def probe(calls: Sequence[Call], start: np.ndarray, outputs: int) -> Plan:
    """The table of a solver from its formulas, by unit vectors; `start` [S, Z], `outputs` P."""
    states = start.shape[0]
    unit = np.eye(states + outputs + 1)
    x, h, e = unit[:states], unit[states:-1], unit[-1]
    reads = np.stack([call.read(x, h, e) for call in calls])
    moves = np.stack([np.stack(list(call.move(x, h, e))) for call in calls])
    cuts = [states, states + outputs]
    read_x, read_h, read_e = np.split(reads, cuts, -1)
    move_x, move_h, move_e = np.split(moves, cuts, -1)
    sigma = np.asarray([call.sigma for call in calls], np.float64)
    return Plan(sigma, start, read_x, read_h, read_e[..., 0], move_x, move_h, move_e[..., 0])


def run(
    plan: Plan,
    denoise: Callable[[jax.Array, jax.Array], jax.Array],
    noise: jax.Array,
    fresh: Callable[[jax.Array], jax.Array] | None = None,
    project: Project | None = None,
) -> jax.Array:
    """A sample [*x], the output of the last call, in the dtype of `noise`.

    Args:
        plan: may be an input of the program.
        denoise: (x [*x], sigma []) -> x0 [*x].
        noise: [Z, *x] standard normal.
        fresh: i -> standard normal [*x], the noise of call i; None: calls have none.
        project: what is put in the place of the first state before calls that read it as it is, such as all of `Euler`.
    """
    dtype = noise.dtype
    table: Any = jax.tree.map(lambda a: jnp.asarray(a, dtype), plan)

    def mix(weights: jax.Array, arrays: jax.Array) -> jax.Array:
        return jnp.tensordot(weights, arrays, 1, precision=jax.lax.Precision.HIGHEST)

    def call(carry: tuple[jax.Array, jax.Array], row: tuple[jax.Array, Any]) -> tuple[Any, None]:
        (x, h), (i, now) = carry, row
        e = None if fresh is None else fresh(i).astype(dtype)
        if project is not None:
            plain = (now.read_x[0] == 1) & ~now.read_x[1:].any() & ~now.read_h.any() & (now.read_e == 0)
            x = x.at[0].set(jax.lax.cond(plain, project, lambda i, x, sigma: x, i, x[0], now.sigma).astype(dtype))
        y = mix(now.read_x, x) + mix(now.read_h, h)
        x0 = denoise(y if e is None else y + now.read_e * e, now.sigma).astype(dtype)
        h = jnp.concatenate([x0[None], h[:-1]])
        x = mix(now.move_x, x) + mix(now.move_h, h)
        if e is not None:
            x = x + mix(now.move_e[:, None], e[None])
        return (x, h), None

    rows = table._replace(start=jnp.zeros(len(table.sigma), dtype))
    begin = mix(table.start, noise), jnp.zeros((table.read_h.shape[1], *noise.shape[1:]), dtype)
    (_, h), _ = jax.lax.scan(call, begin, (jnp.arange(len(table.sigma)), rows))
    return h[0]


class Solver(Named):
    """What solvers share. One of your own is a frozen dataclass with `plan`; `nodes` says how many levels so many calls take."""

    grid: ClassVar[Literal["edm", "log", "flow"]] = "edm"  # of levels, where none is asked for

    def __post_init__(self) -> None:
        check_fields(self, "solver.")

    def __str__(self) -> str:
        """Its name and the fields that are not its defaults."""
        fields: Any = vars(type(self))["__dataclass_fields__"]
        own = {name: getattr(self, name) for name, field in fields.items() if getattr(self, name) != field.default}
        return " ".join(
            [getattr(self, "name", type(self).__name__), *(f"{name}={value}" for name, value in own.items())]
        )

    def nodes(self, calls: int) -> int:
        """Levels of a grid on which it takes so many calls. UserError where it cannot."""
        least = max(2, getattr(self, "order", 1))
        if calls < least:
            raise UserError(f"nfe={calls} is too few for {self.name}; give {least} or more")
        return calls

    @abc.abstractmethod
    def plan(self, levels: np.ndarray) -> Plan:
        """The table on a strictly decreasing grid."""


def _from_highest(levels: np.ndarray, states: int = 1) -> np.ndarray:
    """Noise of the highest level, and nothing in the other states."""
    return levels[0] * np.eye(states, 1)


def _first(x: Array, h: Array, e: Array) -> Array:
    return x[0]


# --- one step at a time ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Euler(Solver):
    """Euler steps in sigma, which are those of DDIM (arXiv:2010.02502)."""

    name = "euler"

    def plan(self, levels: np.ndarray) -> Plan:
        return Ancestral(eta=0.0).plan(levels)


@dataclass(frozen=True)
class Heun(Solver):
    """Heun's second-order steps (arXiv:2206.00364, algorithm 1): two calls a step, one at the last level."""

    name = "heun"

    def nodes(self, calls: int) -> int:
        if calls < 3 or calls % 2 == 0:
            near = (3,) if calls < 3 else (calls - 1, calls + 1)
            raise UserError(
                f"nfe={calls}: {self.name} takes an odd number of calls; give {' or '.join(map(str, near))}"
            )
        return (calls + 1) // 2

    def plan(self, levels: np.ndarray) -> Plan:
        return Churn(churn=0.0).plan(levels)


# --- a memory of outputs --------------------------------------------------------------------------


def _lagrange(nodes: np.ndarray, at: np.ndarray) -> np.ndarray:
    """[nodes, at] the polynomials that are 1 at one node and 0 at the others."""
    rows = []
    for i, node in enumerate(nodes):
        factors = [(at - other) / (node - other) for j, other in enumerate(nodes) if j != i]
        rows.append(np.prod(factors, 0) if factors else np.ones_like(at))
    return np.stack(rows)


_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(16)


def integrals(nodes: np.ndarray, begin: float, end: float, weight: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """[nodes] the integrals from `begin` to `end` of `weight` times each of `nodes`' Lagrange polynomials, by Gauss's rule."""
    at = (begin + end) / 2 + (end - begin) / 2 * _POINTS
    return _lagrange(nodes, at) @ (weight(at) * _WEIGHTS) * (end - begin) / 2


def _orders(order: int, steps: int, lower_last: bool) -> Iterator[int]:
    """The order of each step: as many outputs as there are, and fewer near the end where that is asked."""
    return (min(order, i + 1, steps - i if lower_last else order) for i in range(steps))


@dataclass(frozen=True)
class DPMSolver(Solver):
    """DPM-Solver++ (arXiv:2211.01095), multistep: the interpolated x0 is integrated exactly in log sigma.

    Order 2 is the paper's 2M, whose slope is that between the last two outputs; order 3 takes the parabola through three.
    """

    name = "dpm++"

    order: Literal[1, 2, 3] = 2
    lower_last: bool = False  # order 1 in the last step, 2 in the one before: steadier at few calls

    def plan(self, levels: np.ndarray) -> Plan:
        log = -np.log(levels)

        def step(i: int, order: int) -> Callable[[Array, Array, Array], Sequence[Array]]:
            to, ratio = levels[i + 1], levels[i + 1] / levels[i]
            if self.order == 2 and order == 2:
                slope = (log[i + 1] - log[i]) / (2 * (log[i] - log[i - 1]))
                weights = (1 - ratio) * np.asarray([1 + slope, -slope])
            else:
                nodes = log[i - np.arange(order)]
                weights = integrals(nodes, log[i], log[i + 1], lambda t: to * np.exp(t))
            return lambda x, h, e: [ratio * x[0] + sum(w * h[j] for j, w in enumerate(weights))]

        moves = [step(i, order) for i, order in enumerate(_orders(self.order, len(levels) - 1, self.lower_last))]
        calls = [Call(sigma, _first, move) for sigma, move in zip(levels, [*moves, keep])]
        return probe(calls, _from_highest(levels), self.order)


@dataclass(frozen=True)
class UniPC(Solver):
    """UniPC (arXiv:2302.04867) on x0: each call is made at a predicted point and then corrects the step that led there."""

    name = "unipc"

    order: Literal[1, 2, 3] = 2
    variant: Literal["bh1", "bh2"] = "bh2"
    lower_last: bool = True

    def plan(self, levels: np.ndarray) -> Plan:
        log = -np.log(levels)

        def step(i: int, order: int) -> Call:
            """To level i + 1, and its correction. Weights are those of differences to the newest output."""
            back = log[i] - log[i + 1]
            ratios = (log[i] - log[i - np.arange(1, order)]) / back
            scale = back if self.variant == "bh1" else math.expm1(back)
            phi, right = math.expm1(back) / back - 1, []
            for q in range(1, order + 1):
                right.append(phi * math.factorial(q) / scale)
                phi = phi / back - 1 / math.factorial(q + 1)

            def solved(ratios: np.ndarray) -> np.ndarray:
                if len(ratios) == 1:
                    return np.asarray([0.5])  # the paper's, whatever the ratio
                return np.linalg.solve(np.vander(ratios, increasing=True).T, right[: len(ratios)])

            ahead, behind = solved(ratios), solved(np.append(ratios, 1.0))

            def moved(x: Array, h: Array, weights: np.ndarray) -> Array:
                differences = sum(w * (h[j + 1] - h[0]) / r for j, (w, r) in enumerate(zip(weights, ratios)))
                return levels[i + 1] / levels[i] * x[0] - math.expm1(back) * h[0] - scale * differences

            def correct(x: Array, h: Array, e: Array) -> Sequence[Array]:
                return [moved(x, h[1:], behind) - scale * behind[-1] * (h[0] - h[1])]

            return Call(levels[i + 1], lambda x, h, e: moved(x, h, ahead), correct)

        orders = _orders(self.order, len(levels) - 1, self.lower_last)
        calls = [Call(levels[0], _first, keep), *(step(i, order) for i, order in enumerate(orders))]
        return probe(calls, _from_highest(levels), self.order + 1)


def _slopes(levels: np.ndarray, order: int, weights: Callable[[int, int], np.ndarray]) -> Plan:
    """Steps x + sum of weights times the last slopes (x - x0) / sigma; `weights` of (step, order). The slopes are states."""

    def step(i: int) -> Callable[[Array, Array, Array], Sequence[Array]]:
        w = weights(i, min(order, i + 1))

        def move(x: Array, h: Array, e: Array) -> Sequence[Array]:
            slopes = [(x[0] - h[0]) / levels[i], *x[1:]]
            return [x[0] + sum(a * slope for a, slope in zip(w, slopes)), *slopes[: order - 1]]

        return move

    moves = [*map(step, range(len(levels) - 1)), keep]
    return probe([Call(s, _first, m) for s, m in zip(levels, moves)], _from_highest(levels, order), 1)


@dataclass(frozen=True)
class DEIS(Solver):
    """DEIS (arXiv:2204.13902): the slope's interpolant through the last outputs is integrated exactly in sigma."""

    name = "deis"

    order: Literal[1, 2, 3, 4] = 3

    def plan(self, levels: np.ndarray) -> Plan:
        def weights(i: int, order: int) -> np.ndarray:
            return integrals(levels[i - np.arange(order)], levels[i], levels[i + 1], np.ones_like)

        return _slopes(levels, self.order, weights)


@dataclass(frozen=True)
class IPNDM(Solver):
    """Improved PNDM (arXiv:2204.13902, appendix): Adams-Bashforth's weights of even steps, whatever the grid."""

    name = "ipndm"

    order: Literal[1, 2, 3, 4] = 3

    def plan(self, levels: np.ndarray) -> Plan:
        def weights(i: int, order: int) -> np.ndarray:
            return (levels[i + 1] - levels[i]) * integrals(-np.arange(order), 0.0, 1.0, np.ones_like)

        return _slopes(levels, self.order, weights)


# --- random ones ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ancestral(Solver):
    """Euler steps to below the next level, and noise up to it; `eta` 1 is the ancestral sampler of DDPM, 0 Euler's."""

    name = "ancestral"

    eta: Share = 1.0

    def plan(self, levels: np.ndarray) -> Plan:
        def step(at: float, to: float) -> Callable[[Array, Array, Array], Sequence[Array]]:
            up = self.eta * to * math.sqrt(1 - (to / at) ** 2)
            down = math.sqrt(to**2 - up**2)
            return lambda x, h, e: [h[0] + down / at * (x[0] - h[0]) + up * e]

        moves = [*map(step, levels, levels[1:]), keep]
        return probe([Call(s, _first, m) for s, m in zip(levels, moves)], _from_highest(levels), 1)


@dataclass(frozen=True)
class Churn(Heun):
    """Heun's steps after a little more noise (arXiv:2206.00364, algorithm 2); `churn` is the paper's S_churn, over all steps."""

    name = "churn"

    churn: NonNegative = 40.0
    low: NonNegative = 0.05
    high: Positive = 50.0
    noise: Positive = 1.003

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low >= self.high:
            raise UserError(f"solver.low={self.low:g} must be below solver.high={self.high:g}")

    def plan(self, levels: np.ndarray) -> Plan:
        def step(i: int) -> list[Call]:
            at = levels[i]
            more = min(self.churn / len(levels), math.sqrt(2) - 1) if self.low <= at <= self.high else 0.0
            high = at * (1 + more)
            extra = self.noise * math.sqrt(high**2 - at**2)

            def noised(x: Array, h: Array, e: Array) -> Array:
                return x[0] + extra * e

            first = Call(high, noised, lambda x, h, e: [noised(x, h, e)])
            if i + 1 == len(levels):
                return [first]
            to = levels[i + 1]

            def euler(x: Array, h: Array, e: Array) -> Array:
                return h[0] + to / high * (x[0] - h[0])

            def heun(x: Array, h: Array, e: Array) -> Sequence[Array]:
                slopes = (x[0] - h[1]) / high, (euler(x, h[1:], e) - h[0]) / to
                return [x[0] + (to - high) / 2 * sum(slopes)]

            return [first, Call(to, euler, heun)]

        return probe([call for i in range(len(levels)) for call in step(i)], _from_highest(levels), 2)
