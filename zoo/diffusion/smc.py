"""Particles that follow a diffusion's reverse path and carry weights, so that what is drawn is tempered, composed or bounded.

A base model with energy E_0 goes from noise to data; the target at each level is gamma = exp(-sum of a_i E_i) h, with powers
a_i of this and other models' energies and factors h of x. Scores that are merely added up draw something else; here each
particle's log-weight counts what a step leaves out, and particles are drawn anew by their weights where these are too
unequal (Feynman-Kac models with sequential Monte Carlo: arXiv:2502.12786, section 4; score-only weights: arXiv:2503.02819).
Which weights, thresholds and bounds the first paper takes was not to be had: those here are our choice.

An island is K particles that depend on each other, and follows from one key alone. I islands, T levels, M models, P
potentials, d numbers of an example; x = x0 + sigma n, dv the variance that a step takes away. Log-weights are float32.
Order of this file: the sampler, its options.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from msgspec import Meta

from zoo.diffusion.energies import Scored
from zoo.diffusion.guidance import Guidance
from zoo.diffusion.potentials import Potential, Temper
from zoo.diffusion.sampling import Conditions, DenoiserSampling, guidance_of
from zoo.diffusion.solvers import Heun
from zoo.diffusion.traces import Trace
from zoo.dist import batch_axes, batch_ways, constrain
from zoo.errors import UserError
from zoo.fields import AtLeast2, NonNegative, Positive, Share, check_fields
from zoo.task import sample_keys

Form: TypeAlias = Literal["ratio", "kernel", "score", "hybrid"]

# of particles under these conditions, a row for each: the energies, the base's first, and potentials besides the options'
Target: TypeAlias = Callable[[Conditions], tuple[Sequence[Scored], Sequence[Potential]]]

_LAST, _FIRST = 2**31 - 1, 2**31 - 2  # the uses of a key after all levels, and before them
_AT_ONCE = 2**18  # numbers of particles that a device holds at a time, where islands are smaller


# --- the sampler ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Particles:
    """Islands, and when their particles are drawn anew."""

    count: Annotated[int, Meta(ge=2, le=2**18)] = 512  # of an island: the weight of one particle would always be 1
    threshold: Share = 0.5  # drawn anew where the effective number of particles is below this share of `count`
    scheme: Literal["systematic", "stratified", "residual", "multinomial"] = "systematic"

    def __post_init__(self) -> None:
        check_fields(self, "particles.")


class Islands(NamedTuple):
    """Weighted particles."""

    x: jax.Array  # [I, K, *x], NaN where an island was lost
    log_weights: jax.Array  # [I, K]
    trace: Trace


class Course(NamedTuple):
    """A form of weights on a grid of levels, as numbers: inputs of the program, so that forms, powers and grids share one."""

    sigma: np.ndarray  # [T]
    dv: np.ndarray  # [T] variance that the move from each level takes away; 0 at the last
    noise: np.ndarray  # [T] standard deviation of a move's noise
    base: np.ndarray  # [T] whether it follows the base's score, not the target's
    energy: np.ndarray  # [T] whether the weights count by how much energies changed on the way here
    kernel: np.ndarray  # [] whether they count how much likelier the forward kernel is than the move
    powers: np.ndarray  # [M] of the target
    shares: np.ndarray  # [M] of each energy in the log-weights
    start: np.ndarray  # [] standard deviation of the first particles
    log_normaliser: np.ndarray  # [] of their law times its weights
    rho: np.ndarray  # [] power of the weights


def course(
    levels: np.ndarray,
    models: int,
    potentials: Sequence[Potential] = (),
    form: Form = "ratio",
    stop: float = 0.0,
    rho: float = 1.0,
    numbers: int = 1,
) -> Course:
    """How particles go down `levels` [T], strictly decreasing, with M = `models` energies (gamma = exp(-U) h, s_i = -grad E_i).

    Forms, with s = sum of a_i s_i:
        ratio: the base's reverse kernel, x + dv s_0 and noise of variance dv sigma'^2 / sigma^2; weights: the change of E_0 - U
            + log h. Exact up to the kernel's discretisation.
        kernel: x + dv s and noise of variance dv; weights: the change of -U + log h, and the ratio of the forward kernel to
            this one. Exact for any grid, but noisy.
        score: x + dv s and noise of variance dv (sigma' / sigma)^(2 / sum of a_i); weights: dv / 2 (|s|^2 - sum of a_i |s_i|^2), and
            the change of log h. Uses no energies.
        hybrid: ratio down to the level `stop`, score below: learned energies err between modes at low levels, their scores do not.

    Args:
        rho: power of the weights; below 1 the target is approximate, 0 is no weights at all (a heuristic for many dimensions).
        numbers: d, of an example; the normaliser of the forms that begin with scores needs it.

    UserError for a target that has no weight at the highest level.
    """
    base = powers = np.eye(1, models)[0]
    for potential in potentials:
        powers = potential.powers(powers)
    total = float(powers.sum())
    if total <= 0:
        raise UserError(
            f"powers {powers.tolist()} of the energies add to {total:g}; above 0 the target has a weight to begin with"
        )
    after = np.append(levels[1:], levels[-1])  # the last moves nothing
    energy = levels >= stop if form == "hybrid" else np.full(len(levels), form != "score")
    by_base = np.append(energy[1:], energy[-1]) & (form != "kernel")
    dv = levels**2 - after**2
    # what keeps the variance of a Gaussian to these powers, dv (1 - dv / (total sigma^2)) to second order; of one power exactly
    slow = 0.0 if form == "kernel" else np.where(by_base, 1.0, 1 / total)
    ratio_first = form != "kernel" and bool(energy[0])
    # the law at the highest level is taken for N(0, sigma^2) to the target's powers; of the base it has its own weight
    log_z = 0.0
    if not energy[0]:
        log_z = numbers / 2 * ((1 - total) * math.log(2 * math.pi * levels[0] ** 2) - math.log(total))
    found = Course(
        levels, dv, np.sqrt(dv) * (after / levels) ** slow, by_base, energy, np.asarray(form == "kernel"), powers,
        (0.0 if form == "kernel" else base) - powers, levels[0] / np.sqrt(1.0 if ratio_first else total), np.asarray(log_z),
        np.asarray(rho),
    )  # fmt: skip
    return Course(*(a if a.dtype == bool else np.asarray(a, np.float32) for a in found))


def feynman_kac(
    keys: jax.Array,
    course: Course,
    energies: Sequence[Scored],
    shape: tuple[int, ...],
    potentials: Sequence[Potential] = (),
    particles: Particles = Particles(),
    start: jax.Array | None = None,
) -> Islands:
    """Islands of weighted particles at the lowest level, one for each key; one scan, in which each network stands once.

    Args:
        keys: [I]; island i follows from keys[i] alone.
        course: of the same potentials; may be an input of the program.
        energies: the base's, then the others', each of all particles [I K, *x], island by island, and sigma [].
        shape: of an example.
        start: [I, K, *x], exact samples of the base at the highest level, whose energies are then normalised (-log p), and so is what
            `log_normaliser` is relative to; not for the form `kernel`. None: Gaussian noise, which the base is taken for there.

    Particles are drawn anew before a move, and not after the last. Islands lie over the mesh's batch axes, or where these do not
    divide them, the particles of each. UserError for energies of bfloat16.
    """
    from blackjax.smc import resampling
    from blackjax.smc.ess import log_ess

    resample: Any = getattr(resampling, particles.scheme)
    islands, count, size = len(keys), particles.count, math.prod(shape)
    flat, lie, ways = islands * count, ("batch",) if batch_axes(islands) else (None, "batch"), batch_ways()
    if lie[0] is None and count % ways:
        raise UserError(
            f"particles.count={count}: {ways} devices share the particles of each of {islands} islands; set a multiple of {ways}"
        )
    fixed: Any = jax.tree.map(jnp.asarray, course)

    def evaluate(x: jax.Array, sigma: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Energies [M, I, K] and scores [M, I, K, *x]."""
        found = [energy(x.reshape(flat, *shape), sigma) for energy in energies]
        for i, (energy, _) in enumerate(found):
            if energy.dtype not in (jnp.float32, jnp.float64):
                raise UserError(
                    f"energies {i} are {energy.dtype}, whose differences are lost in rounding; compute them in float32"
                )
        energy, score = (jnp.stack(parts).astype(jnp.float32) for parts in zip(*found))
        return energy.reshape(-1, islands, count), score.reshape(-1, islands, count, *shape)

    def laid(log: jax.Array) -> jax.Array:
        """[I, K] of what a potential gives."""
        return log.astype(jnp.float32).reshape(islands, count)

    def logs_of(x: jax.Array, x0: jax.Array, sigma: jax.Array) -> list[jax.Array]:
        """[I, K] for each potential."""
        x, x0 = x.reshape(flat, *shape), x0.reshape(flat, *shape)
        return [laid(potential.log(x, x0, sigma)) for potential in potentials]

    def normal(i: Any) -> jax.Array:
        def one(key: jax.Array) -> jax.Array:
            return jax.random.normal(jax.random.fold_in(key, 2 * i), (count, *shape))

        return constrain(jax.vmap(one)(keys), *lie)

    def wrong(log: jax.Array) -> jax.Array:
        return jnp.isnan(log) | (log == jnp.inf)

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return (a * b).reshape(*a.shape[: a.ndim - len(shape)], -1).sum(-1)

    def grown(weights: jax.Array, gain: jax.Array) -> jax.Array:
        """Log-weights after a gain; what has none stays so."""
        more = jnp.where(weights == -jnp.inf, -jnp.inf, weights + fixed.rho * gain)
        return jnp.where(fixed.rho == 0, weights, more)

    class Carry(NamedTuple):
        x: jax.Array
        weights: jax.Array
        ratio: jax.Array  # of the energies, at the level before
        logs: jax.Array  # of the potentials, likewise
        pending: jax.Array  # what the last move adds to the weights
        roots: jax.Array
        log_z: jax.Array

    def row(carry: Carry, now: Any) -> tuple[Carry, Any]:
        i, sigma, dv, noise, base, by_energy = now
        x = constrain(carry.x, *lie)
        energy, score = evaluate(x, sigma)
        ratio = jnp.tensordot(fixed.shares, energy, 1)
        logs = jnp.stack([*logs_of(x, x + sigma**2 * score[0], sigma), jnp.zeros((islands, count))])
        gain = jnp.where(by_energy, ratio - carry.ratio, 0.0) + carry.pending
        weights = grown(carry.weights, gain + (logs - carry.logs).sum(0))

        # the first weight that is no number, among those that count
        terms = jnp.stack([gain, *logs[:-1]], 1)
        bad = (wrong(terms) & (carry.weights != -jnp.inf)[:, None]).reshape(islands, -1)
        broken = jnp.where(bad.any(1), bad.argmax(1), jnp.where((weights == -jnp.inf).all(1), -2, -1))

        ess = jnp.nan_to_num(jnp.exp(jax.vmap(log_ess)(weights)) / count)
        anew = (ess < particles.threshold) & (dv > 0) & (broken == -1)
        drawn = jax.vmap(lambda key, w: resample(jax.random.fold_in(key, 2 * i + 1), w, count))(
            keys, jax.nn.softmax(weights)
        )
        # rounding may name a particle without weight
        none = jnp.take_along_axis(weights, drawn, 1) == -jnp.inf
        drawn = jnp.where(none, weights.argmax(1)[:, None], drawn)
        drawn = jnp.where(anew[:, None], drawn, jnp.arange(count))

        def chosen(a: jax.Array) -> jax.Array:
            return jax.vmap(lambda a, drawn: a[drawn])(a, drawn)

        roots, x, ratio = chosen(carry.roots), chosen(x), chosen(ratio)
        logs, score = jax.vmap(chosen)(logs), jax.vmap(chosen)(score)
        distinct = jax.vmap(lambda r: jnp.zeros(count, bool).at[r].set(True).sum())(roots)
        log_z = carry.log_z + jnp.where(anew, logsumexp(weights, 1) - math.log(count), 0.0)
        weights = jnp.where(anew[:, None], 0.0, weights)

        e, both = normal(i + 1), jnp.tensordot(fixed.powers, score, 1)
        square = dot(both, both)
        by_kernel = -dv / 2 * square - jnp.sqrt(dv) * dot(both, e)
        by_score = dv / 2 * (square - jnp.tensordot(fixed.powers, dot(score, score), 1))
        pending = jnp.where(fixed.kernel, by_kernel, jnp.where(base, 0.0, by_score))
        x = x + dv * jnp.where(base, score[0], both) + noise * e
        return Carry(x, weights, ratio, logs, pending, roots, log_z), (ess, anew, distinct, broken)

    if start is not None:  # the first weights are those of the target in the base
        fixed = fixed._replace(energy=fixed.energy.at[0].set(True), log_normaliser=jnp.zeros(()))
    x, zeros = fixed.start * normal(0) if start is None else start, jnp.zeros((islands, count))
    log_q = -(dot(x, x) / fixed.start**2 + size * jnp.log(2 * jnp.pi * fixed.start**2)) / 2
    begin = Carry(
        x, zeros, zeros, jnp.zeros((len(potentials) + 1, islands, count)), jnp.where(fixed.kernel, -log_q, 0.0),
        jnp.broadcast_to(jnp.arange(count), (islands, count)), jnp.full(islands, fixed.log_normaliser),
    )  # fmt: skip
    rows = (jnp.arange(len(fixed.sigma)), *fixed[:5])
    end, (ess, anew, distinct, broken) = jax.lax.scan(row, begin, rows)

    weights, last = end.weights, broken[-1]
    for i, potential in enumerate(potentials):
        log = potential.end(end.x.reshape(flat, *shape))
        if log is not None:
            bad = wrong(laid(log)) & (weights != -jnp.inf)
            last = jnp.where(bad.any(1) & (last == -1), (i + 1) * count + bad.argmax(1), last)
            weights = grown(weights, laid(log) - end.logs[i])
    broken = broken.T.at[:, -1].set(jnp.where((weights == -jnp.inf).all(1) & (last == -1), -2, last))
    lost = (broken != -1).any(1)
    x = jnp.where(lost.reshape(-1, *(1,) * (len(shape) + 1)), jnp.nan, end.x)
    log_normaliser = end.log_z + logsumexp(weights, 1) - math.log(count)
    sigma, names = jnp.broadcast_to(fixed.sigma, broken.shape), tuple(potential.name for potential in potentials)
    return Islands(x, weights, Trace(sigma, ess.T, anew.T, distinct.T, broken, log_normaliser, names, count))


def drawn(keys: jax.Array, found: Islands, scheme: str = "systematic", keep: int = 1) -> jax.Array:
    """[I keep, *x] samples without weights, `keep` of each island, drawn by weight; those of one depend on each other."""
    from blackjax.smc import resampling

    resample: Any = getattr(resampling, scheme)

    def one(key: jax.Array, x: jax.Array, weights: jax.Array) -> jax.Array:
        chosen = resample(jax.random.fold_in(key, _LAST), jax.nn.softmax(weights), keep)
        return x[jnp.where(weights[chosen] == -jnp.inf, weights.argmax(), chosen)]

    kept = jax.vmap(one)(keys, found.x, found.log_weights)
    return kept.reshape(-1, *kept.shape[2:])


# --- options --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnergySampling(DenoiserSampling):
    """How a model with an energy is sampled: by a solver, or by weighted particles where there is something to weigh."""

    nfe: AtLeast2 = 101  # calls; of particles the levels, which reach every level once
    temper: Positive = 1.0  # the target is the model to this power
    potentials: tuple[Potential, ...] = ()  # by name: box, halfspace, ...
    particles: Particles | None = None  # None: a solver, unless there is a temper or a potential
    form: Form = "ratio"
    stop: NonNegative = 0.0  # of `hybrid`: the level below which scores alone decide
    rho: Share = 1.0  # power of the weights; below 1 the target is approximate, 0: none

    def __post_init__(self) -> None:
        if not self.weighted:
            super().__post_init__()
            plain = {f.name: f.default for f in dataclasses.fields(self)}
            if any(getattr(self, k) != plain[k] for k in ("form", "stop", "rho")):
                raise UserError(
                    "form, stop and rho are of weighted particles, and a solver draws here; set temper, potentials or "
                    "particles.count, or leave them out"
                )
            return
        check_fields(self)  # `nfe` counts levels, whatever a solver takes
        if not self._weighs:
            raise UserError(
                "particles have nothing to weigh without temper, potentials or guidance; set one, or leave particles out"
            )
        if self.solver != Heun():
            raise UserError(
                f"solver={self.solver} draws without weights, and here are weighted particles; leave it out"
            )
        guidance = Guidance.of(self.guidance)
        if guidance != Guidance(guidance.weight):
            raise UserError(
                f"{guidance}: particles are guided at all levels; give a weight alone, guidance={guidance.weight:g}"
            )
        if (self.stop > 0) != (self.form == "hybrid"):
            raise UserError(
                f"stop={self.stop:g} and form={self.form}: hybrid takes a stop above 0, and no other form takes one"
            )

    @property
    def weighted(self) -> bool:
        """Whether particles are drawn, and no solver."""
        return self.particles is not None or self.temper != 1 or bool(self.potentials)

    @property
    def _weighs(self) -> bool:
        return self.temper != 1 or bool(self.potentials) or Guidance.of(self.guidance).weight > 0

    def islands(
        self,
        keys: jax.Array,
        sigmas: tuple[float, float],
        energies: Sequence[Scored],
        shape: tuple[int, ...],
        potentials: Sequence[Potential] = (),
        start: jax.Array | None = None,
    ) -> Islands:
        """An island for each key, of the model's potentials and these options.

        UserError for a `stop` that is not between the levels.
        """
        levels = self.grid(self.nfe, "edm", sigmas)
        if self.form == "hybrid" and not levels[-1] < self.stop <= levels[0]:
            raise UserError(
                f"stop={self.stop:g}: the levels go from {levels[0]:g} to {levels[-1]:g}, so hybrid would have one form alone; "
                "set a stop between them"
            )
        all_of_them = (*potentials, *([Temper(self.temper)] if self.temper != 1 else []), *self.potentials)
        numbers = math.prod(shape)
        how = course(levels, len(energies), all_of_them, self.form, self.stop, self.rho, numbers)
        return feynman_kac(keys, how, energies, shape, all_of_them, self.particles or Particles(), start)

    def draw(
        self,
        rng: jax.Array,
        n: int,
        sigmas: tuple[float, float],
        target: Target,
        shape: tuple[int, ...],
        conditions: Conditions = None,
        start: Callable[[jax.Array, Conditions], jax.Array] | None = None,
    ) -> tuple[jax.Array, Trace]:
        """n samples [n, *x], one of each of n islands, from one key or n keys; and how they came about.

        Islands follow each other where all of them would take much memory. `start` makes exact samples of the base [N, *x] of N keys,
        under the conditions of each; see `feynman_kac`. UserError for guidance where there is no class.
        """
        particles = self.particles or Particles()
        guidance_of(self.guidance, conditions)

        def some(part: tuple[jax.Array, Conditions]) -> tuple[jax.Array, Trace]:
            keys, given = part
            each = jax.tree.map(lambda a: jnp.repeat(a, particles.count, 0), given)
            (energies, potentials), begin = target(each), None
            if start is not None:
                own = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, _FIRST), particles.count))(keys)
                begin = start(own.reshape(-1), each).reshape(len(keys), particles.count, *shape)
            found = self.islands(keys, sigmas, energies, shape, potentials, begin)
            return drawn(keys, found, particles.scheme), found.trace

        size, whole = _together(n, particles.count * math.prod(shape)), (sample_keys(rng, n), conditions)
        if size == n:
            return some(whole)
        parts = jax.tree.map(lambda a: a.reshape(n // size, size, *a.shape[1:]), whole)
        return jax.tree.map(lambda a: a.reshape(n, *a.shape[2:]), jax.lax.map(some, parts))


def _together(n: int, numbers: int) -> int:
    """How many of n islands of so many numbers are drawn together: a divisor of n, as many on each device where that is possible."""
    ways = batch_ways()
    fair = [k for k in range(1, n + 1) if n % k == 0 and (k % ways == 0 or n % ways)]
    return max((k for k in fair if k * numbers <= ways * _AT_ONCE), default=fair[0])


@dataclass(frozen=True)
class ParticleSampling(EnergySampling):
    """How what only particles can draw is sampled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if Guidance.of(self.guidance).weight:
            raise UserError("guidance compares a class with none, and these energies know no class; leave guidance out")

    @property
    def weighted(self) -> bool:
        """Always."""
        return True

    @property
    def _weighs(self) -> bool:
        return True
