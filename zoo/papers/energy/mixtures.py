"""Gaussian mixtures in the plane as exact energies, and what summed scores and weighted particles make of them.

N points [N, 2], m modes; x = x0 + sigma n. All energies are -log p_sigma, with their normaliser. The mixtures are our choice,
the paper's are not known here. Order of this file: tasks, truths by grid, the comparison.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from msgspec import Meta

from zoo.diffusion.compare import folder, image_of, markdown, write
from zoo.diffusion.energies import Scored, denoised, scored
from zoo.diffusion.levels import Levels
from zoo.diffusion.potentials import Coordinate, HalfSpace, Potential, Powers, Product, Temper
from zoo.diffusion.sampling import sampled
from zoo.diffusion.smc import EnergySampling, Form, Islands, Particles, ParticleSampling, course, drawn, feynman_kac
from zoo.diffusion.tasks import Assembled, Levelled
from zoo.diffusion.traces import chart
from zoo.errors import UserError
from zoo.fields import AtLeast2, NotEmpty, Positive, Side, Some, check_fields
from zoo.task import About, Batch, Params, sample_keys

_log = logging.getLogger("zoo")
_EXACT = "it is exact; compare what is drawn from them with zoo eval energy/mixtures"


@dataclass(frozen=True)
class Mode:
    """One Gaussian."""

    weight: Positive = 1.0  # relative to the others
    mean: tuple[Coordinate, Coordinate] = (0.0, 0.0)
    std: tuple[Positive, Positive] = (1.0, 1.0)
    correlation: Annotated[float, Meta(gt=-1, lt=1)] = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "mode.")


Arrays = tuple[Any, Any, Any, Any]  # weight [m], mean [m, 2], std [m, 2], correlation [m]


def log_density(modes: Arrays, x: Any, sigma: Any, xp: Any = jnp) -> Any:
    """log p_sigma [N] of points [N, 2], of NumPy (`xp`) or JAX; sigma is a scalar or [N]."""
    weight, mean, std, correlation = (xp.asarray(values, x.dtype) for values in modes)
    noise = xp.square(xp.asarray(sigma, x.dtype))[..., None]
    a, b, c = std[:, 0] ** 2 + noise, correlation * std[:, 0] * std[:, 1], std[:, 1] ** 2 + noise
    determinant = a * c - b * b
    left, up = x[:, :1] - mean[:, 0], x[:, 1:] - mean[:, 1]
    square = (c * left**2 - 2 * b * left * up + a * up**2) / determinant
    each = xp.log(weight / weight.sum()) - square / 2 - xp.log(determinant) / 2 - np.log(2 * np.pi)
    # the gradient of a maximum looks for it among terms that the compiler may round otherwise, and is NaN where none is it
    most = each.max(-1) if xp is np else jax.lax.stop_gradient(each.max(-1))
    return most + xp.log(xp.exp(each - most[:, None]).sum(-1))


@dataclass(frozen=True)
class Mixture(Levelled, Assembled):
    """A mixture of Gaussians in the plane, as a model with an energy: no parameters, no loss."""

    modes: Some[Mode] = (Mode(),)
    low: Positive = 0.01  # levels that it is sampled at
    high: Positive = 10.0

    about = About(unit="points")
    Sampling = EnergySampling
    untrained = _EXACT

    @property
    def arrays(self) -> Arrays:
        """Weights, means, standard deviations and correlations of the modes."""
        weight, mean, std, correlation = zip(*((m.weight, m.mean, m.std, m.correlation) for m in self.modes))
        return weight, mean, std, correlation

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`point` [B, 2]."""
        return {"point": jax.ShapeDtypeStruct((batch, 2), jnp.float32)}

    def init(self, rng: jax.Array) -> Params:
        """There are no parameters."""
        return {}

    def energy(self, params: Params, x: jax.Array, sigma: jax.Array, conditions: Batch | None = None) -> jax.Array:
        """-log p_sigma [B] of points [B, 2] in nats, float32."""
        return -log_density(self.arrays, jnp.asarray(x, jnp.float32), sigma)

    def denoise(self, params: Params, x: jax.Array, sigma: jax.Array, conditions: Batch | None = None) -> jax.Array:
        """E[x0 | x] [B, 2]."""
        return denoised(functools.partial(self.energy, params), x, sigma)

    def sample(
        self, params: Params, rng: jax.Array, n: int, conditions: Batch | None = None, options: Any = None
    ) -> dict[str, Any]:
        """`point` [n, 2], and of particles their `trace`; by default a solver's points of the mixture as it is."""
        o = options or EnergySampling()
        if o.weighted:
            point, trace = o.draw(rng, n, self.sigmas, lambda _: ([self.scored], []), (2,))
            return {"point": point, "trace": trace}
        denoise = functools.partial(self.denoise, params)
        return {"point": sampled(denoise, self.sigmas, (2,), sample_keys(rng, n), None, o)}

    @property
    def scored(self) -> Scored:
        """Energy and score, as particles take them."""
        return scored(functools.partial(self.energy, {}))

    def points(self, rng: jax.Array, n: int) -> jax.Array:
        """Points [n, 2] of the mixture, drawn directly."""
        weight, mean, std, correlation = (jnp.asarray(values, jnp.float32) for values in self.arrays)
        mode_rng, rng = jax.random.split(rng)
        mode, e = jax.random.categorical(mode_rng, jnp.log(weight), shape=(n,)), jax.random.normal(rng, (n, 2))
        r = correlation[mode]
        e = jnp.stack([e[:, 0], r * e[:, 0] + jnp.sqrt(1 - r**2) * e[:, 1]], 1)
        return mean[mode] + std[mode] * e


@dataclass(frozen=True)
class MixtureProduct(Assembled):
    """The product of mixtures: scores add up at the lowest level alone, so it is drawn by weighted particles."""

    parts: Annotated[tuple[Mixture, ...], Meta(min_length=2)] = (Mixture(), Mixture())

    about = About(unit="points")
    Sampling = ParticleSampling
    untrained = _EXACT

    def __post_init__(self) -> None:
        check_fields(self, "task.")
        if self.sigmas[0] >= self.sigmas[1]:
            raise UserError("task.parts have no level in common; let low and high of each meet those of the others")

    @property
    def sigmas(self) -> tuple[float, float]:
        """Levels that all parts have."""
        return max(part.low for part in self.parts), min(part.high for part in self.parts)

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`point` [B, 2]."""
        return self.parts[0].spec(batch)

    def init(self, rng: jax.Array) -> Params:
        """There are no parameters."""
        return {}

    def sample(
        self, params: Params, rng: jax.Array, n: int, conditions: Batch | None = None, options: Any = None
    ) -> dict[str, Any]:
        """`point` [n, 2] and its `trace`, as of a mixture."""
        o = options or ParticleSampling()
        target = [part.scored for part in self.parts], [Product()]
        point, trace = o.draw(rng, n, self.sigmas, lambda _: target, (2,))
        return {"point": point, "trace": trace}


def _isotropic(*modes: tuple[float, tuple[float, float], float]) -> Mixture:
    return Mixture(tuple(Mode(weight, mean, (std, std)) for weight, mean, std in modes))


CORNERS = _isotropic((0.1, (-3.0, -3.0), 0.3), (0.2, (3.0, -3.0), 0.9), (0.3, (-3.0, 3.0), 0.5), (0.4, (3.0, 3.0), 0.7))
ROW = _isotropic((1.0, (-3.0, 0.0), 0.6), (1.0, (0.0, 0.0), 0.6), (1.0, (3.0, 0.0), 0.6), (1.0, (0.0, 3.0), 0.6))
CROSS = _isotropic((0.5, (-2.5, 0.5), 0.6), (0.2, (3.0, 0.0), 0.5), (0.2, (0.0, 3.0), 0.6), (0.1, (0.0, -3.0), 0.8))
BOTH = MixtureProduct((ROW, CROSS))
EDGE = HalfSpace((1.0, 0.5), 1.0)  # cuts one of the corners off, and half of two


# --- truths by grid -------------------------------------------------------------------------------


def share(modes: Sequence[Mode], x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[..., m] weight of the points [..., N, 2] nearest to each mode's mean, adding to 1."""
    nearest = np.square(x[..., None, :] - np.asarray([mode.mean for mode in modes])).sum(-1).argmin(-1)
    found = np.stack([(weights * (nearest == i)).sum(-1) for i in range(len(modes))], -1)
    return found / found.sum(-1, keepdims=True)


def truth(
    parts: Sequence[Mixture],
    powers: Sequence[float],
    inside: Callable[[np.ndarray], np.ndarray] | None = None,
    step: float = 0.02,
) -> tuple[np.ndarray, float]:
    """[m] weights of the modes of `parts[0]` in the product of these powers, and the log of its normaliser, on a grid.

    Args:
        inside: points [N, 2] -> which of them the target has; None: all.
    """
    modes = [mode for part in parts for mode in part.modes]
    mean, reach = np.asarray([mode.mean for mode in modes]), 6 * np.asarray([mode.std for mode in modes])
    axes = (np.arange(low, high, step) for low, high in zip((mean - reach).min(0), (mean + reach).max(0)))
    x = np.stack(np.meshgrid(*axes), -1).reshape(-1, 2)
    log = sum(power * log_density(part.arrays, x, part.low, np) for part, power in zip(parts, powers))
    density = np.exp(log) * (1.0 if inside is None else inside(x))
    return share(parts[0].modes, x, density), float(np.log(density.sum() * step**2))


def distance(found: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[...] total variation between the weights of modes [..., m] that points have, and those that are true."""
    return np.abs(found - weights).sum(-1) / 2


def figures_of(mixture: Mixture, islands: Islands, weights: np.ndarray) -> dict[str, float]:
    """How far modes are off their true weights [m], mean and spread over islands, and means of what the particles' trace says."""
    found = share(mixture.modes, np.asarray(islands.x), np.asarray(jax.nn.softmax(islands.log_weights)))
    off, trace = distance(found, weights), islands.trace.figures()
    means = {name: float(trace[name].mean()) for name in ("ess", "resampled", "roots")}
    return {"tv": float(off.mean()), "tv_std": float(off.std()), **means}


# --- the comparison -------------------------------------------------------------------------------


class Target(NamedTuple):
    """What is drawn, and what of it is true."""

    name: str
    parts: tuple[Mixture, ...]
    potentials: tuple[Potential, ...]
    powers: tuple[float, ...]
    edge: HalfSpace | None = None

    @property
    def truth(self) -> tuple[np.ndarray, float]:
        """Weights of the modes, and the log-normaliser."""
        if (edge := self.edge) is None:
            return truth(self.parts, self.powers)
        return truth(self.parts, self.powers, lambda x: x @ np.asarray(edge.normal) < edge.offset)


TARGETS = (
    Target("temper 2", (CORNERS,), (Temper(2.0),), (2.0,)),
    Target("temper 3", (CORNERS,), (Temper(3.0),), (3.0,)),
    Target("product", BOTH.parts, (Product(),), (1.0, 1.0)),
    Target("bounded", (CORNERS,), (EDGE,), (1.0,), EDGE),
)


def projected(edge: HalfSpace, x: np.ndarray) -> np.ndarray:
    """Points [..., 2] moved into a half-space by the shortest way: what one may do without weights."""
    normal = np.asarray(edge.normal)
    return x - np.maximum((x @ normal - edge.offset) / (normal @ normal), 0)[..., None] * normal


_FORMS: tuple[Form, ...] = ("ratio", "kernel", "score", "hybrid")


@dataclass(frozen=True)
class Mixtures:
    """Naive scores beside weighted particles on exact mixtures: tempered, multiplied and bounded."""

    seeds: Side = 5
    count: AtLeast2 = 2000  # particles
    levels: AtLeast2 = 101
    stop: Positive = 1.0  # of the hybrid
    out: NotEmpty = "mixtures"  # folder of the results

    def __post_init__(self) -> None:
        check_fields(self)

    def run(self) -> dict[str, Any]:
        """Writes mixtures.json, mixtures.md, mixtures.png and traces.png into `out`; returns the first.

        UserError where `out` is no folder of such results.
        """
        out = folder(self.out, "mixtures.json", "compared mixtures")
        rows, panels, traces = [], [], {}
        for target in TARGETS:
            found = {method: self._drawn(target, method) for method in ("naive", *_FORMS)}
            weights, log_normaliser = target.truth
            traces[target.name] = {method: islands.trace for method, (islands, _) in found.items() if method != "naive"}
            for method, (islands, x) in found.items():
                error = float((np.asarray(islands.trace.log_normaliser) - log_normaliser).mean())
                row = {"target": target.name, "method": method, **figures_of(target.parts[0], islands, weights)}
                rows.append({**row, "log_normaliser": None if method == "naive" else error})
                if method in ("naive", "ratio"):
                    panels.append((f"{target.name}, {method}", islands, x))
        figures = {"seeds": self.seeds, "count": self.count, "levels": self.levels, "stop": self.stop, "rows": rows}
        written = _table(rows)
        _log.info("means over %d islands of %d particles, %d levels:\n%s", self.seeds, self.count, self.levels, written)
        return write(out, "mixtures", figures, written, mixtures=_sheet(panels), traces=chart(traces))

    def _drawn(self, target: Target, method: str) -> tuple[Islands, np.ndarray]:
        """Islands, and their points without weights; the naive way is to follow the target's scores, and to project at an edge."""
        naive = method == "naive"
        potentials = () if naive and target.edge else target.potentials
        form: Any = "score" if naive else method
        sigmas = target.parts[0].sigmas
        how = course(
            Levels().grid(self.levels, "edm", *sigmas), len(target.parts), potentials, form,
            self.stop if form == "hybrid" else 0.0, float(not naive), 2,
        )  # fmt: skip
        factors = tuple(one for one in potentials if not isinstance(one, Powers))  # powers are numbers of the course
        islands, x = _program(target.parts, factors, self.count)(jax.random.split(jax.random.key(0), self.seeds), how)
        points = np.asarray(x).reshape(self.seeds, self.count, 2)
        if naive and target.edge:
            points = projected(target.edge, np.asarray(islands.x))
            islands = islands._replace(x=points)
        return islands, points


@functools.cache
def _program(parts: tuple[Mixture, ...], potentials: tuple[Potential, ...], count: int) -> Any:
    """(keys, course) -> islands and as many points without weights, compiled once for all forms and powers."""
    particles = Particles(count)

    def both(keys: jax.Array, how: Any) -> tuple[Islands, jax.Array]:
        islands = feynman_kac(keys, how, [part.scored for part in parts], (2,), potentials, particles)
        return islands, drawn(keys, islands, keep=count)

    return jax.jit(both)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        z = "" if row["log_normaliser"] is None else f"{row['log_normaliser']:+.3f}"
        tv, trace = f"{row['tv']:.3f} ({row['tv_std']:.3f})", (f"{row['resampled']:.1f}", f"{row['roots']:.0f}")
        cells.append([row["target"], row["method"], tv, z, f"{row['ess']:.2f}", *trace])
    return markdown(["target", "method", "TV of modes", "log-normaliser", "least ESS", "resamplings", "roots"], cells)


def _sheet(panels: Sequence[tuple[str, Islands, np.ndarray]]) -> Any:
    """Points of one island each, naive above, weighted below."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(2.6 * len(panels) / 2, 5.4), dpi=110, layout="constrained")
    grid = page.subplots(2, len(panels) // 2, sharex=True, sharey=True)
    for axes, (name, _, x) in zip(grid.T.ravel(), panels):
        axes.scatter(*x[0].T, s=1, alpha=0.3, linewidths=0)
        axes.set_title(name, fontsize=8)
        axes.set(xlim=(-6, 6), ylim=(-6, 6), aspect="equal", xticks=[], yticks=[])
    return image_of(page)
