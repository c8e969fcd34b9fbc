"""Weighted particles on exact mixtures: laws of the weights, truths by grid, bars of what naive scores miss, and bad input."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import multivariate_normal, norm

from zoo import dist
from zoo.diffusion import smc
from zoo.diffusion.energies import scored
from zoo.diffusion.levels import Levels
from zoo.diffusion.potentials import Box, Classifier, HalfSpace, Powers, Product, Temper, Tilt
from zoo.diffusion.smc import Course, EnergySampling, Islands, Particles, course, drawn, feynman_kac
from zoo.errors import UserError
from zoo.papers.energy import Mixture, MixtureProduct, Mixtures, Mode, mixtures
from zoo.papers.energy.mixtures import (
    BOTH,
    CORNERS,
    CROSS,
    EDGE,
    ROW,
    TARGETS,
    distance,
    log_density,
    projected,
    share,
    truth,
)
from zoo.task import Denoises, Energetic

FIVE = Mixture(
    (
        Mode(0.1, (-4.0, 0.0), (0.4, 0.8), 0.8),
        Mode(0.15, (4.0, 1.0), (0.9, 1.1), -0.5),
        Mode(0.2, (0.0, 4.0), (0.5, 0.6), 0.6),
        Mode(0.25, (1.0, -4.0), (1.2, 0.5), 0.3),
        Mode(0.3, (0.0, 0.0), (0.9, 0.9), -0.6),
    )
)
GAUSSIAN = Mixture((Mode(std=(0.7, 0.7)),))
GRID = Levels().grid(101, "edm", 0.01, 10.0)


def how(form: Any, beta: float = 1.0, levels: np.ndarray = GRID, **other: Any) -> Course:
    return course(levels, 1, [Temper(beta)], form, numbers=2, **other)


@functools.cache
def program(models: int, particles: Particles, bounded: bool) -> Any:
    """(keys, course, modes of each model, shift, (offset, slope)) -> islands; what tests differ in are inputs of few programs."""

    def run(keys: jax.Array, how: Course, modes: Any, shift: Any, bound: Any) -> Islands:
        def of(one: Any) -> Any:
            return scored(lambda x, sigma: shift * jnp.sin(sigma) - log_density(one, x, sigma))

        factors = HalfSpace(EDGE.normal, bound[0]), Tilt(lambda x0, sigma: x0 @ jnp.asarray(bound[1]))
        factors = factors if bounded else ()
        return feynman_kac(keys, how, [of(one) for one in modes], (2,), factors, particles)

    # what the suite leaves out for the sake of compiling is six times the time of these loops
    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 1})


def drawn_from(
    mixtures: Mixture | Sequence[Mixture],
    how: Course,
    particles: Particles = Particles(2000),
    seeds: int = 5,
    shift: float = 0.0,
    bound: Any = (1e9, (0.0, 0.0)),  # of one mixture alone
) -> Islands:
    mixtures = (mixtures,) if isinstance(mixtures, Mixture) else mixtures
    modes = [
        [
            np.pad(a, [(0, 5 - len(a)), *[(0, 0)] * (np.ndim(a) - 1)], constant_values=v)
            for a, v in zip(m.arrays, (0, 0, 1, 0))
        ]
        for m in mixtures
    ]
    found: Islands = program(len(modes), particles, len(modes) == 1 and particles != FREE)(
        keys(seeds), how, jax.tree.map(np.float32, modes), np.float32(shift), jax.tree.map(np.float32, bound)
    )
    return found


@functools.cache
def exact(mixtures: Mixture | tuple[Mixture, ...], *powers: float) -> tuple[np.ndarray, float]:
    return truth((mixtures,) if isinstance(mixtures, Mixture) else mixtures, powers, step=0.04)


def keys(n: int = 5, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), n)


def errors(found: Islands, first: Mixture, exact: tuple[np.ndarray, float]) -> tuple[float, float]:
    """Mean total variation of the modes' weights, and mean error of the log-normaliser."""
    modes = share(first.modes, np.asarray(found.x), softmax(np.asarray(found.log_weights), -1))
    return float(distance(modes, exact[0]).mean()), float(np.mean(found.trace.log_normaliser)) - exact[1]


# --- energies -------------------------------------------------------------------------------------


def test_energies_are_those_of_scipy_and_their_gradient_denoises() -> None:
    @jax.jit
    def run(x: jax.Array, sigma: jax.Array) -> Any:
        return FIVE.energy({}, x, sigma), FIVE.denoise({}, x, sigma), FIVE.denoise({}, x, jnp.full(64, sigma))

    for sigma in (0.01, 0.5, 3.0, 80.0):
        x, far = np.random.default_rng(0).normal(size=(64, 2)) * np.hypot(3, sigma), np.hypot(3, sigma)
        x0, total = np.zeros_like(x), np.zeros(len(x))
        for mode in FIVE.modes:
            off = mode.correlation * mode.std[0] * mode.std[1]
            covariance = np.asarray([[mode.std[0] ** 2, off], [off, mode.std[1] ** 2]])
            noisy = covariance + sigma**2 * np.eye(2)
            density = mode.weight * multivariate_normal(mode.mean, noisy).pdf(x)
            x0 += density[:, None] * (mode.mean + (x - mode.mean) @ np.linalg.solve(noisy, covariance))
            total += density
        known = total > 1e-30
        energy, denoised, each = map(np.asarray, run(x, sigma))
        np.testing.assert_allclose(energy[known], -np.log(total[known]), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(denoised[known], (x0 / total[:, None])[known], atol=2e-6 * far * (1 + sigma))
        np.testing.assert_allclose(each, denoised, atol=1e-6 * far)


# --- resampling -----------------------------------------------------------------------------------


def weighted(log_weights: Any) -> Islands:
    """Islands whose particles are their numbers."""
    log_weights = jnp.asarray(log_weights, jnp.float32)
    x = jnp.broadcast_to(jnp.arange(log_weights.shape[1], dtype=jnp.float32), log_weights.shape)
    return Islands(x, log_weights, None)  # type: ignore[arg-type]


def test_particles_are_drawn_by_weight() -> None:
    count = 200
    log = np.random.default_rng(0).normal(size=(1, count)) * 2
    expected = count * np.exp(log[0]) / np.exp(log).sum()
    draw = jax.jit(lambda keys, log: drawn(keys, weighted(log), keep=count))
    for i in range(5):
        counts = np.bincount(draw(keys(1, i), log).astype(int), minlength=count)
        assert np.abs(counts - expected).max() < 1
    one = np.full((1, count), -np.inf)
    one[0, 7] = -3.0
    assert set(np.asarray(draw(keys(1), one))) == {7.0}


def test_nothing_without_weight_is_drawn_whatever_is_rounded() -> None:
    log = np.zeros((256, 1000))
    log[:, ::2] = log[:, -300:] = -np.inf
    found = np.asarray(jax.jit(lambda keys, log: drawn(keys, weighted(log), keep=1000))(keys(256), log)).astype(int)
    assert np.isfinite(log[0][found]).all()


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["ratio", "score", "hybrid"])
def test_without_anything_to_correct_weights_are_exactly_equal_and_nothing_is_drawn_anew(form: Any) -> None:
    found = drawn_from(FIVE, how(form, 1.0))
    assert not np.asarray(found.log_weights).any()
    assert not np.asarray(found.trace.log_normaliser).any()
    assert (found.trace.roots == 2000).all()


FREE = Particles(400, threshold=0.0)  # never drawn anew


def padded(form: Any, beta: float, steps: int, rows: int = 2001) -> Course:
    """With moves of nothing at the end, so that courses of several lengths share a program."""
    levels = Levels().grid(steps + 1, "edm", 0.01, 10.0)
    made, more = how(form, beta, levels), rows - len(levels)
    return Course(*(np.pad(a, (0, more), mode="edge") if a.shape == levels.shape else a for a in made))


def test_the_kernel_form_gives_a_gaussian_its_tempered_variance() -> None:
    found = drawn_from(GAUSSIAN, how("kernel", 2.0))
    weights, x = softmax(np.asarray(found.log_weights), -1)[..., None], np.asarray(found.x)
    mean = (weights * x).sum(1, keepdims=True)
    variance = (weights * np.square(x - mean)).sum(1).mean(-1)
    np.testing.assert_allclose(variance, 0.245, rtol=0.2)
    assert variance.mean() == pytest.approx(0.245, rel=0.1)


def test_the_score_form_is_the_limit_of_the_kernel_form_on_one_path() -> None:
    alike = []
    for steps in (200, 2000):
        kernel, score = padded("kernel", 2.0, steps), padded("score", 2.0, steps)
        pair = [
            drawn_from(CORNERS, one, FREE, 2)
            for one in (kernel, score._replace(noise=kernel.noise, start=kernel.start))
        ]
        np.testing.assert_allclose(pair[0].x, pair[1].x, atol=1e-4)
        alike.append(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(*(one.log_weights for one in pair))]))
    assert alike[1] > 0.93 > alike[0]


def test_a_constant_of_a_level_changes_no_weight() -> None:
    plain, other = (drawn_from(CORNERS, padded("kernel", 2.0, 100), FREE, 2, shift) for shift in (0.0, 30.0))
    one, two = (softmax(np.asarray(found.log_weights), -1) for found in (plain, other))
    np.testing.assert_allclose(one, two, atol=1e-5)
    np.testing.assert_allclose(plain.x, other.x, atol=1e-5)


# --- bars -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixture", [CORNERS, FIVE], ids=["corners", "five"])
def test_tempered_mixtures_have_the_right_weights_where_naive_scores_have_not(mixture: Mixture) -> None:
    for beta, naive, ratio, nats in ((2.0, 0.18, 0.05, 0.1), (3.0, 0.33, 0.10, 0.25)):
        true = exact(mixture, beta)
        assert errors(drawn_from(mixture, how("score", beta, rho=0.0)), mixture, true)[0] >= naive
        found, nat = errors(drawn_from(mixture, how("ratio", beta)), mixture, true)
        assert found <= ratio
        assert abs(nat) <= nats
        if beta == 2:
            assert errors(drawn_from(mixture, how("score", beta)), mixture, true)[0] <= 0.15
            assert errors(drawn_from(mixture, how("hybrid", beta, stop=1.0)), mixture, true)[0] <= 0.06


def test_without_the_first_weight_all_of_it_is_wrong() -> None:
    broken = how("ratio", 2.0)
    broken = broken._replace(energy=np.append(False, broken.energy[1:]))
    found, nat = errors(drawn_from(CORNERS, broken), CORNERS, exact(CORNERS, 2.0))
    assert found > 0.1
    assert abs(nat) > 2


def test_a_product_has_the_right_weights_where_summed_scores_have_not() -> None:
    of, true = functools.partial(course, GRID, 2, [Product()], numbers=2), exact(BOTH.parts, 1.0, 1.0)
    assert errors(drawn_from(BOTH.parts, of("score", rho=0.0)), ROW, true)[0] >= 0.11
    assert errors(drawn_from(BOTH.parts, of("ratio")), ROW, true)[0] <= 0.06
    assert errors(drawn_from(BOTH.parts, of("score")), ROW, true)[0] <= 0.10
    # a mixture and itself, to powers that add to 1: guidance by what does not differ
    twice = drawn_from((ROW, ROW), course(GRID, 2, [Product((-1.0, 2.0))], "score", numbers=2))
    np.testing.assert_allclose(twice.log_weights, 0, atol=1e-2)


def test_weights_give_what_guided_scores_do_not() -> None:
    """p_c^(1 + w) p^(-w) of a class c that is some of the modes: of modes apart, weights are as c_i^(1 + w) p_i^(-w)."""
    some = Mixture(tuple(dataclasses.replace(CORNERS.modes[i], weight=w) for i, w in ((0, 0.4), (1, 0.3), (3, 0.3))))
    each = np.asarray([0.4, 0.3, 0.3]) ** 3 / np.asarray([0.1, 0.2, 0.4]) ** 2
    true = each / each.sum(), float(np.log(each.sum()))
    of = functools.partial(course, GRID, 2, [Product((3.0, -2.0))], numbers=2)
    assert errors(drawn_from((some, CORNERS), of("score", rho=0.0)), some, true)[0] >= 0.13  # measured: .18
    for form, bar in (("ratio", 0.03), ("score", 0.06)):  # .007, .02
        tv, nats = errors(drawn_from((some, CORNERS), of(form)), some, true)
        assert tv <= bar
        assert abs(nats) <= 0.25


def test_a_classifier_that_is_right_gives_its_class_and_the_share_of_it() -> None:
    _, mean, std, _ = CORNERS.arrays
    weight = jnp.asarray([0.1, 0.2, 0.3, 0.4])

    def logits(x0: jax.Array) -> jax.Array:
        square = jnp.square(x0[:, None] - jnp.asarray(mean)).sum(-1) / jnp.asarray(std)[:, 0] ** 2
        return jnp.log(weight) - square / 2 - 2 * jnp.log(jnp.asarray(std)[:, 0])

    def run(label: jax.Array) -> Islands:
        tilt = Classifier(logits, jnp.repeat(label, 1000), 0.2)
        return feynman_kac(keys(5), how("ratio", 1.0), [CORNERS.scored], (2,), [tilt], Particles(1000))

    found = jax.jit(run)(jnp.asarray([0, 1, 2, 3, -1]))
    modes = share(CORNERS.modes, np.asarray(found.x), softmax(np.asarray(found.log_weights), -1))
    assert (modes[range(4), range(4)] > 0.98).all()
    np.testing.assert_allclose(found.trace.log_normaliser, [*np.log(weight), 0], atol=0.2)
    assert not np.asarray(found.log_weights[4]).any()  # any class weighs nothing


def test_particles_that_begin_as_the_base_need_no_high_level() -> None:
    """At sigma = .7 the base is far from noise; its square is N(0, v / 2), and the integral of that is known."""

    def start(keys: jax.Array, given: Any) -> jax.Array:
        return jnp.sqrt(0.49 + 0.49) * jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys)

    options = EnergySampling(nfe=41, temper=2.0, particles=Particles(512), form="score")
    target = [scored(lambda x, sigma: -log_density(GAUSSIAN.arrays, x, sigma))], []
    draw = jax.jit(lambda key: options.draw(key, 64, (0.05, 0.7), lambda given: target, (2,), None, start))
    x, trace = draw(jax.random.key(0))
    np.testing.assert_allclose(np.mean(trace.log_normaliser), -np.log(4 * np.pi * 0.4925), atol=0.03)
    np.testing.assert_allclose(np.square(x).mean(), 0.4925 / 2, rtol=0.25)


def test_a_bound_is_kept_and_does_not_bend_the_weights() -> None:
    true = truth([CORNERS], [1.0], lambda x: x @ np.asarray(EDGE.normal) < EDGE.offset, 0.04)
    found = drawn_from(CORNERS, how("ratio"), bound=(EDGE.offset, (0.0, 0.0)))
    inside = np.asarray(found.x) @ np.asarray(EDGE.normal) < EDGE.offset
    assert inside.mean() >= 0.9
    assert (np.isfinite(found.log_weights) == inside).all()
    tv, nats = errors(found, CORNERS, true)
    assert tv <= 0.08
    assert abs(nats) <= 0.1
    plain = drawn_from(CORNERS, how("ratio", 1.0))
    assert errors(plain._replace(x=projected(EDGE, np.asarray(plain.x))), CORNERS, true)[0] >= 0.25


def test_a_tilted_gaussian_moves_by_what_it_is_tilted() -> None:
    found = drawn_from(GAUSSIAN, how("ratio"), bound=(1e3, (1.0, -2.0)))
    mean = (softmax(np.asarray(found.log_weights), -1)[..., None] * np.asarray(found.x)).sum(1).mean(0)
    np.testing.assert_allclose(mean, [0.49, -0.98], atol=0.07)
    assert np.mean(found.trace.log_normaliser) == pytest.approx(5 * 0.49 / 2, abs=0.1)


# --- potentials -----------------------------------------------------------------------------------


def test_boxes_and_half_spaces_are_those_of_the_normal_law() -> None:
    x0 = np.random.default_rng(0).normal(size=(50, 2)) * 3
    box, half = Box((-1.0, 0.0), (1.0, 3.0)), HalfSpace((3.0, -4.0), 2.0)
    run = jax.jit(lambda x, sigma: (box.log(x, x, sigma), half.log(x, x, sigma)))
    for sigma in (0.05, 1.0, 20.0):
        within, left = run(x0.astype(np.float32), sigma)
        low, high = (np.asarray([-1, 0]) - x0) / sigma, (np.asarray([1, 3]) - x0) / sigma
        flip = low + high < 0
        low, high = np.where(flip, low, -high), np.where(flip, high, -low)
        with np.errstate(divide="ignore"):
            log = norm.logcdf(high) + np.log1p(-np.exp(norm.logcdf(low) - norm.logcdf(high)))
        np.testing.assert_allclose(within, log.sum(-1), rtol=2e-3, atol=1e-5)
        np.testing.assert_allclose(left, norm.logcdf((2 - x0 @ [3, -4]) / 5 / sigma), rtol=1e-3, atol=1e-6)
    ends = box.end(jnp.asarray([[0.0, 1.0], [0.0, -1.0], [2.0, 1.0]]))
    np.testing.assert_array_equal(ends, [0, -np.inf, -np.inf])
    assert np.isfinite(Box().log(jnp.full((1, 2, 2), 99.0), jnp.full((1, 2, 2), 99.0), 0.002)).all()


# --- tasks ----------------------------------------------------------------------------------------


def test_mixtures_are_tasks_whose_samples_follow_from_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(CORNERS, Energetic)
    assert isinstance(CORNERS, Denoises)
    own = EnergySampling(nfe=21, temper=2.0, particles=Particles(64))
    draw = jax.jit(lambda rng: BOTH.sample({}, rng, 8, None, own)["point"])
    found, turned = np.asarray(draw(keys(8))), np.asarray(draw(keys(8)[::-1]))
    np.testing.assert_allclose(found, turned[::-1], atol=1e-6)
    assert len({tuple(point) for point in found.tolist()}) == 8
    # islands that follow each other, since not all of them find room, are the same
    monkeypatch.setattr(smc, "_AT_ONCE", 2 * 64 * 2)
    parts = jax.jit(lambda rng: BOTH.sample({}, rng, 8, None, own))(keys(8))
    np.testing.assert_allclose(parts["point"], found, atol=1e-5)
    assert (parts["trace"].ess.shape, parts["trace"].log_normaliser.shape) == ((8, 21), (8,))
    plain = jax.jit(lambda rng: CORNERS.sample({}, rng, 2000, None, EnergySampling(nfe=35))["point"])(jax.random.key(0))
    modes = share(CORNERS.modes, np.asarray(plain), np.ones(2000))
    assert distance(modes, np.asarray([0.1, 0.2, 0.3, 0.4])) < 0.05


def test_the_comparison_writes_a_table_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixtures, "TARGETS", TARGETS[:1])
    found = Mixtures(seeds=2, count=50, levels=11, out=str(tmp_path / "out")).run()
    assert json.loads((tmp_path / "out" / "mixtures.json").read_text())["rows"] == found["rows"]
    assert (tmp_path / "out" / "mixtures.md").read_text().count("\n") == 2 + len(found["rows"]) == 7
    for name in ("mixtures.png", "traces.png"):
        assert (tmp_path / "out" / name).read_bytes()[1:4] == b"PNG"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("")
    with pytest.raises(UserError, match="no folder of compared mixtures"):
        Mixtures(out=str(tmp_path / "other")).run()


def test_the_naive_way_at_an_edge_is_to_project(monkeypatch: pytest.MonkeyPatch) -> None:
    free, factors = np.random.default_rng(0).normal(size=(2, 50, 2)) * 3, []

    def program(parts: Any, potentials: Any, count: int) -> Any:
        factors.append(potentials)
        return lambda keys, how: (Islands(free, np.zeros((2, 50)), None), free)  # type: ignore[arg-type]

    monkeypatch.setattr(mixtures, "_program", program)
    for method, inside in (("naive", True), ("ratio", False)):
        islands, x = Mixtures(seeds=2, count=50)._drawn(TARGETS[3], method)
        np.testing.assert_array_equal(islands.x, x)
        assert (x @ np.asarray(EDGE.normal) <= EDGE.offset + 1e-9).all() == inside
    assert factors == [(), (EDGE,)]


def test_particles_on_one_and_two_devices_have_the_same_weights() -> None:
    found = []
    for count, islands in ((1, 2), (2, 1)):  # the other cuts the particles of one island
        with dist.use(dist.Mesh(data=count).build(jax.devices()[:count])):
            run = jax.jit(lambda keys, how: feynman_kac(keys, how, [CORNERS.scored], (2,), (), Particles(64)))
            found.append(jax.device_get(run(keys(2)[:islands], how("ratio", 3.0, GRID[::4]))))
    assert found[0].trace.resampled.any()
    whole, one = found
    shares = (softmax(np.asarray(each.log_weights), -1) for each in (one, whole))
    np.testing.assert_allclose(*(each[:1] for each in shares), atol=1e-5)
    np.testing.assert_allclose(one.x, whole.x[:1], atol=1e-4)
    with dist.use(dist.Mesh(data=2).build(jax.devices())), pytest.raises(UserError, match="count=63: 2 devices"):
        jax.eval_shape(
            lambda: feynman_kac(keys(1), how("ratio"), [CORNERS.scored], (2,), (), Particles(63)),
        )


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: EnergySampling(temper=2.0, stop=0.5), "stop=0.5 and form=ratio"),
        (lambda: Box((0.0,), (0.0,)), "potential.low=(0.0,) must be below potential.high"),
        (lambda: HalfSpace((0.0, 0.0)), "potential.normal=(0.0, 0.0) has no direction"),
        (lambda: course(GRID, 2, [Product((1.0, -1.0))]), "of the energies add to 0"),
        (lambda: course(GRID, 1, [Product()]), "there are 1 models, and it takes two or more"),
        (lambda: course(GRID, 3, [Product((1.0, 1.0))]), "there are 3 models, and given=(1.0, 1.0) names 2"),
        (lambda: course(GRID, 2, [Product((2.0, 1.0)), Temper(2.0), Product()]), "multiplied already; keep one product"),
        (lambda: MixtureProduct((ROW,)), "task.parts="),
        (lambda: MixtureProduct((ROW, dataclasses.replace(CROSS, low=20.0, high=30.0))), "task.parts have no level in common"),
        (lambda: Mixture(low=3.0, high=2.0), "task.low=3 must be below task.high=2"),
        (lambda: CORNERS.loss({}, {}, jax.random.key(0)), "Mixture has nothing to train"),
        (lambda: HalfSpace((1.0, 2.0, 3.0)).end(jnp.zeros((4, 2))), "potential.normal has 3 values for 2 numbers"),
        (
            lambda: jax.eval_shape(
                lambda: feynman_kac(keys(2), how("ratio"), [lambda x, sigma: (x[:, 0].astype(jnp.bfloat16), x)], (2,))
            ),
            "energies 0 are bfloat16",
        ),
        (lambda: CORNERS.sample({}, keys(2), 2, None, EnergySampling(levels=Levels(given=(9.0, 1.0)), temper=2.0)), "levels.given"),
        (lambda: CORNERS.sample({}, keys(2), 2, None, EnergySampling(temper=2.0, guidance=1.0)), "there is no class here"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_said_in_a_sentence(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        make()


@dataclasses.dataclass(frozen=True)
class Ends(Powers):
    """Says of samples alone what they weigh."""

    name = "ends"

    given: Any

    def powers(self, powers: np.ndarray) -> np.ndarray:
        return powers

    def end(self, x: jax.Array) -> jax.Array:
        return jnp.asarray(self.given)


@functools.cache
def breaking() -> Any:
    """(energies' addition [32], tilt's below sigma 1 [32], log of the samples [32], offset) -> two islands of 16."""

    def run(added: jax.Array, tilt: jax.Array, ends: jax.Array, offset: jax.Array) -> Islands:
        energy = scored(lambda x, sigma: CORNERS.energy({}, x, sigma) + added)
        factors = HalfSpace(EDGE.normal, offset), Tilt(lambda x0, sigma: jnp.where(sigma < 1, tilt, 0.0)), Ends(ends)
        return feynman_kac(keys(2), how("ratio", 2.0, GRID[::10]), [energy], (2,), factors, Particles(16))

    return jax.jit(run)


@pytest.mark.parametrize(
    ("energy", "tilt", "ends", "offset", "said"),
    [
        ({}, {19: np.nan}, {}, 1.0, "potential tilt: the weight of particle 3 is no finite number at level 5 (sigma 0.718) of island 1"),
        ({}, {19: np.inf}, {}, 1.0, "potential tilt: the weight of particle 3 is no finite number at level 5 (sigma 0.718) of island 1"),
        ({2: np.nan}, {}, {}, 1.0, "the energies: the weight of particle 2 is no finite number at level 0 (sigma 10) of island 0"),
        ({}, dict.fromkeys(range(32), -np.inf), {}, 1.0, "no particle has any weight left at level 5 (sigma 0.718) of island 0"),
        ({}, {}, {20: np.nan}, 100.0, "potential ends: the weight of particle 4 is no finite number at level 10 (sigma 0.01) of island 1"),
        ({}, {}, {}, -1000.0, "no particle has any weight left at level 10 (sigma 0.01) of island 0"),
    ],
)  # fmt: skip
def test_weights_that_are_none_name_the_potential_the_level_and_the_particle(
    energy: dict[int, float], tilt: dict[int, float], ends: dict[int, float], offset: float, said: str
) -> None:
    added = [np.asarray([values.get(i, 0.0) for i in range(32)], np.float32) for values in (energy, tilt, ends)]
    found = breaking()(*added, np.float32(offset))
    lost = int(said[-1])
    assert np.isnan(found.x[lost]).all()  # an island that is lost gives no sample
    with pytest.raises(UserError, match=re.escape(said)):
        found.trace.check(range(2))
