"""Learned energies of a mixture in the plane beside the exact one: how far their scores are off, and what particles make of them.

Both networks begin alike and see the same points, levels and noise: one follows the exact denoiser (distilled), the other the points
themselves (denoising score matching). N points [N, 2]; x = x0 + sigma n. Sizes and recipe are our choice.
"""

from __future__ import annotations

import functools
import logging
import operator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo.diffusion.compare import folder, markdown, write
from zoo.diffusion.energies import Scored, scored
from zoo.diffusion.levels import Levels
from zoo.diffusion.potentials import Temper
from zoo.diffusion.precondition import Precondition
from zoo.diffusion.smc import Form, Islands, Particles, course, drawn, feynman_kac
from zoo.dist import unbox
from zoo.errors import UserError
from zoo.fields import AtLeast2, Count, NotEmpty, Positive, Seed, Side, Some, check_fields
from zoo.papers.energy.mixtures import CORNERS, Mixture, figures_of, log_density, truth
from zoo.papers.energy.task import EnergyDistill
from zoo.task import Params

_log = logging.getLogger("zoo")
_KINDS = ("distilled", "from points")
_TESTED = 8_192  # points that errors of scores are means over


@dataclass(frozen=True)
class Learned:
    """Two energies of a mixture, trained at once from scratch; their scores, and the mixture tempered by particles with each."""

    task: EnergyDistill  # of images of one pixel with two channels, the coordinates
    mixture: Mixture = CORNERS
    steps: Count = 1000
    batch: Count = 256
    lr: Positive = 3e-3  # falls to nothing along a cosine
    seed: Seed = 0
    sigmas: Some[Positive] = (0.05, 0.2, 0.5, 1.0, 3.0)  # levels at which scores are compared
    temper: Positive = 2.0
    stops: Some[Positive] = (1.0, 0.3)  # of the hybrid form
    islands: Side = 3
    count: AtLeast2 = 1000  # particles of each
    levels: AtLeast2 = 201
    out: NotEmpty = "learned"  # folder of the results

    def __post_init__(self) -> None:
        check_fields(self)
        if (shape := self.task.spec(1)["image"].shape[1:]) != (1, 1, 2):
            raise UserError(f"task takes images {list(shape)}, and points are [1, 1, 2]; set image=1 and channels=2")

    def run(self) -> dict[str, Any]:
        """Writes learned.json and learned.md into `out`; returns the first. UserError where `out` is no folder of such results."""
        out = folder(self.out, "learned.json", "learned mixtures")
        params = self.train()
        each = {kind: jax.tree.map(operator.itemgetter(i), params) for i, kind in enumerate(_KINDS)}
        errors = {kind: self.score_errors(one) for kind, one in each.items()}
        points = tempered(self.mixture, self.temper, self.count * self.islands)
        wanted = truth((self.mixture,), (self.temper,))[0], points
        rows = [row for kind, one in {"exact": None, **each}.items() for row in self._rows(kind, one, *wanted)]
        names = ("steps", "batch", "lr", "seed", "temper", "islands", "count", "levels", "sigmas")
        figures = {**{name: getattr(self, name) for name in names}, "score_error": errors, "rows": rows}
        written = _tables(self.sigmas, errors, rows)
        _log.info(
            "relative square error of scores by level; modes and points tempered by %g:\n%s", self.temper, written
        )
        return write(out, "learned", figures, written)

    def train(self) -> Params:
        """Parameters [2, ...]: distilled, and from points."""
        import optax

        tx = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(self.lr, self.steps), b2=0.99)
        )
        weight = Precondition("edm", self.task.network.data).weight

        def loss(params: Params, from_points: jax.Array, rng: jax.Array) -> jax.Array:
            level_rng, noise_rng, point_rng = jax.random.split(rng, 3)
            sigma = self.task.noise.draw(level_rng, self.batch, self.task.sigmas)
            x0 = self.mixture.points(point_rng, self.batch)
            x = x0 + sigma[:, None] * jax.random.normal(noise_rng, x0.shape)
            target = jnp.where(from_points, x0, self.mixture.denoise({}, x, sigma))
            found = self.task.denoise(params, x[:, None, None], sigma)[:, 0, 0]
            return (weight(sigma) * jnp.square(found - target).mean(-1)).mean()

        def one(from_points: jax.Array) -> Params:
            key = jax.random.key(self.seed)
            params = {"net": unbox(self.task.init(key))["net"]}

            def step(carry: Any, i: jax.Array) -> Any:
                params, state = carry
                gradient = jax.grad(loss)(params, from_points, jax.random.fold_in(key, i))
                updates, state = tx.update(gradient, state, params)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(self.steps))[0][0]

        return jax.jit(jax.vmap(one))(jnp.asarray([False, True]))

    def score_errors(self, params: Params) -> list[float]:
        """Mean |s - s_exact|^2 over mean |s_exact|^2, of points at each of `sigmas`."""
        return np.asarray(self._errors(params), float).tolist()

    @functools.partial(jax.jit, static_argnums=0)
    def _errors(self, params: Params) -> jax.Array:
        def at(sigma: jax.Array) -> jax.Array:
            point_rng, noise_rng = jax.random.split(jax.random.key(self.seed + 1))
            x0 = self.mixture.points(point_rng, _TESTED)
            x = x0 + sigma * jax.random.normal(noise_rng, x0.shape)
            exact = self.mixture.scored(x, sigma)[1]
            return jnp.square(self._scored(params)(x, sigma)[1] - exact).sum() / jnp.square(exact).sum()

        return jax.lax.map(at, jnp.asarray(self.sigmas))

    def _scored(self, params: Params | None) -> Scored:
        """Energy and score of points [N, 2]; without parameters the exact ones."""
        if params is None:
            return self.mixture.scored
        return scored(lambda x, sigma: self.task.energy(params, x[:, None, None], sigma))

    @functools.partial(jax.jit, static_argnums=0)
    def _islands(self, params: Params | None, keys: jax.Array, how: Any) -> tuple[Islands, jax.Array]:
        """Islands, and as many points without weights."""
        found = feynman_kac(keys, how, [self._scored(params)], (2,), (), Particles(self.count))
        return found, drawn(keys, found, keep=self.count)

    def _rows(self, kind: str, params: Params | None, weights: np.ndarray, wanted: np.ndarray) -> list[dict[str, Any]]:
        """A row for each form of weights, beside the true weights of the modes and points of the target."""
        low, high = (f(a, b) for f, a, b in zip((max, min), self.mixture.sigmas, self.task.sigmas))
        grid = Levels().grid(self.levels, "edm", low, high)
        forms: list[tuple[str, Form, float, float]] = [("naive", "score", 0.0, 0.0), ("score", "score", 0.0, 1.0)]
        forms += [(f"hybrid, stop {s:g}", "hybrid", s, 1.0) for s in self.stops]
        rows = []
        for name, form, stop, rho in forms:
            how = course(grid, 1, [Temper(self.temper)], form, stop, rho, 2)
            islands, x = self._islands(params, jax.random.split(jax.random.key(self.seed), self.islands), how)
            points = np.asarray(x).reshape(self.islands, self.count, 2)
            apart = [mmd2(a, b) for a, b in zip(points, wanted.reshape(points.shape))]
            mmd = float(np.mean(apart))
            rows.append({"energy": kind, "method": name, "mmd2": mmd, **figures_of(self.mixture, islands, weights)})
        return rows


def tempered(mixture: Mixture, temper: float, count: int, step: float = 0.02) -> np.ndarray:
    """`count` points [count, 2] of the mixture to a power, from a grid, for comparison."""
    rng, reach = np.random.default_rng(0), 6 * max(max(mode.std) for mode in mixture.modes)
    mean = np.asarray([mode.mean for mode in mixture.modes])
    axes = (np.arange(a - reach, b + reach, step) for a, b in zip(mean.min(0), mean.max(0)))
    x = np.stack(np.meshgrid(*axes), -1).reshape(-1, 2)
    density = np.exp(temper * log_density(mixture.arrays, x, mixture.low, np))
    chosen = rng.choice(len(x), count, p=density / density.sum())
    return np.asarray(x[chosen] + rng.uniform(-step / 2, step / 2, (count, 2)))


def mmd2(x: np.ndarray, y: np.ndarray, widths: tuple[float, ...] = (0.2, 0.5, 1.0, 2.0)) -> float:
    """The squared maximum mean discrepancy of points [N, 2] and [N, 2], unbiased, a mean over Gaussian kernels."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        square = np.square(a[:, None] - b).sum(-1)
        return np.mean([np.exp(-square / (2 * width**2)) for width in widths], 0)

    n = len(x)
    own = sum((kernel(a, a).sum() - n) / (n * (n - 1)) for a in (x, y))
    return float(own - 2 * kernel(x, y).mean())


def _tables(sigmas: tuple[float, ...], errors: dict[str, list[float]], rows: list[dict[str, Any]]) -> str:
    scores = [[kind, *(f"{error:.2g}" for error in found)] for kind, found in errors.items()]
    cells = []
    for r in rows:
        tv = f"{r['tv']:.3f} ({r['tv_std']:.3f})"
        cells.append([r["energy"], r["method"], tv, f"{r['mmd2']:.4f}", f"{r['ess']:.2f}", f"{r['roots']:.0f}"])
    head = ["energy", "method", "TV of modes", "MMD^2", "least ESS", "roots"]
    return markdown(["scores", *sigmas], scores) + "\n" + markdown(head, cells)
