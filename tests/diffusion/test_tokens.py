"""Diffusion of tokens: schedules, kernels against Bayes' rule, and the exact law of what the sampler draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular
from scipy.stats import chisquare
from tabular import L, V

from zoo.diffusion.tokens import EPS, Masked, Times, Uniform, antithetic, reveal, sharpened

KERNELS = {"masked": Masked(V), "uniform": Uniform(V)}
LEVELS = [(1.0, 0.4), (0.7, 0.2), (0.3, 0.0), (1e-3, 1e-4)]


@pytest.mark.parametrize("schedule", ["loglinear", "cosine", "geometric"])
def test_a_schedule_has_the_noise_rate_and_weight_of_its_formula(schedule):
    t = np.linspace(EPS, 1, 50)
    h = 1e-6
    alpha = {
        "loglinear": lambda t: 1 - (1 - EPS) * t,
        "cosine": lambda t: EPS + (1 - EPS) * np.cos(np.pi * t / 2),
        "geometric": lambda t: np.exp(-(1e-4 ** (1 - t)) * 20**t),
    }[schedule]
    slope = (alpha(t + h) - alpha(t - h)) / (2 * h)
    times = Times(schedule)
    noise, weight, rate = jax.jit(lambda t: (times.noise(t), times.weight(t), times.rate(t)))(t)
    np.testing.assert_allclose(noise, 1 - alpha(t), rtol=1e-4)
    np.testing.assert_allclose(weight, -slope / (1 - alpha(t)), rtol=2e-4)
    np.testing.assert_allclose(rate, -slope / alpha(t), rtol=2e-4)
    grid = np.asarray(times.grid(7))
    assert (grid[0], grid[-1], len(grid)) == (1, 0, 8)
    assert (np.diff(grid) < 0).all()


def test_times_of_a_batch_have_one_in_each_part():
    t = np.asarray(antithetic(jax.random.key(0), 16))
    assert sorted(((t - EPS) / (1 - EPS) * 16).astype(int)) == list(range(16))


def brute(name, now, then):
    """q(x_t | y) [y, t], and p(x_s | x_t, y) [y, t, s] by Bayes' rule."""
    masked = name == "masked"
    between = (now - then) / (1 - then)
    step = tabular.kernel(between, masked)  # of a clean token
    if masked:
        step = np.concatenate([step, np.eye(V + 1)[V:]])
    joint = tabular.kernel(then, masked)[:, None, :] * step.T[None]
    seen = joint.sum(-1)
    return seen, joint / np.maximum(seen, 1e-300)[..., None]


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_that_of_bayes_rule(name):
    kernel, states = KERNELS[name], V + (name == "masked")
    p = np.random.default_rng(0).dirichlet(np.ones(V), states)
    for now, then in LEVELS:
        seen, back = brute(name, now, then)
        here = seen.sum(0) > 0  # of a text that is all noise no token is left
        own = np.where(seen.T > 0, p, 0)[here]  # no mass where x_t cannot come from
        own, xt, seen, back = own / own.sum(1, keepdims=True), np.arange(states)[here], seen[:, here], back[:, here]
        found = np.exp(kernel.back(jnp.log(own), xt, now, then))
        np.testing.assert_allclose(found, np.einsum("ty,yts->ts", own, back), rtol=2e-5, atol=1e-7)
        factor = np.exp(np.asarray(kernel.factor(xt, np.arange(V), now), np.float64))
        np.testing.assert_allclose(factor / factor.sum(1, keepdims=True), (seen / seen.sum(0)).T, rtol=2e-5, atol=1e-7)
        if name == "uniform":  # ratios of noisy laws
            ratio = np.einsum("tx,xy,xt->ty", own, seen, 1 / seen)
            np.testing.assert_allclose(kernel.forward(np.log(own), xt, now, now), ratio, rtol=1e-4)
            away = seen * (np.log(seen) + np.log(V))
            np.testing.assert_allclose(kernel.prior(jnp.float32(now)), away.sum(1).mean(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", KERNELS)
def test_tokens_are_corrupted_as_often_as_the_kernel_says(name):
    tokens = jnp.broadcast_to(jnp.arange(V), (30_000, V))
    found = np.asarray(KERNELS[name].corrupt(jax.random.key(0), tokens, jnp.full((30_000, 1), 0.3)))
    q = tabular.kernel(0.3, name == "masked")
    for token, column in enumerate(found.T):
        counts, expected = np.bincount(column, minlength=len(q[0])), 30_000 * q[token]
        assert chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-3
        assert counts[expected == 0].sum() == 0


# --- samples --------------------------------------------------------------------------------------

P = tabular.law()
N = 50_000


@functools.lru_cache
def sampled(name, grid):
    """50,000 texts of the exact denoiser, as counts of all states; the denoiser may depend on the noise."""
    masked = name == "masked"
    tables = {noise: tabular.marginals(tabular.posterior(P, noise, masked)[1]) for noise in grid[:-1]}
    found = jnp.log(jnp.asarray(np.maximum(list(tables.values()), 1e-30), jnp.float32))
    kernel, states = KERNELS[name], V + masked

    @jax.jit
    def draw(rng):
        keys = jax.random.split(rng, N)
        start = jnp.full((N, L), V) if masked else jax.random.randint(jax.random.key(1), (N, L), 0, V)

        def denoise(x, noise, keys):
            return found[jnp.argmin(jnp.abs(jnp.asarray(grid[:-1]) - noise))][tabular.index(x, states)]

        return reveal(keys, denoise, kernel, jnp.asarray(grid), start)

    texts = np.asarray(draw(jax.random.key(0)))
    return np.bincount(tabular.index(texts, states), minlength=states**L), tables.__getitem__


@pytest.mark.parametrize(
    ("name", "grid"),
    [("masked", (1.0, 0.7, 0.4)), ("uniform", (1.0, 0.6, 0.2, 0.0))],
)
def test_samples_have_the_law_of_all_states(name, grid):
    """Half way through too, where 64 texts with MASK are possible."""
    counts, table = sampled(name, grid)
    law = tabular.drawn(table, np.asarray(grid), name == "masked")
    other = tabular.drawn(table, np.asarray((*grid[:2], grid[-1])), name == "masked")
    likely = law * N > 5
    assert counts[law == 0].sum() == 0
    merged = [np.append(x[likely], x[~likely].sum()) for x in (counts, law * N, other * N)]
    merged = [x[merged[1] > 0] for x in merged]
    assert chisquare(merged[0], merged[1] * N / merged[1].sum()).pvalue > 1e-3
    if len(grid) > 3:  # a step less is seen
        assert chisquare(merged[0], merged[2] * N / merged[2].sum()).pvalue < 1e-6


@pytest.mark.parametrize("name", KERNELS)
def test_the_law_of_samples_nears_the_data_with_every_doubling_of_the_steps(name):
    masked = name == "masked"

    def table(noise):
        return tabular.marginals(tabular.posterior(P, min(noise, 1 - 1e-9), masked)[1])

    found = []
    for steps in (1, 2, 4, 8, 16, 64):
        law = tabular.drawn(table, np.asarray(Times().grid(steps), np.float64), masked)
        found.append(tabular.kl(P, tabular.pruned(law) if masked else law))
    assert (np.diff(found) < 0).all()
    assert found[4] < 0.5 * found[3]
    assert found[-1] < 5e-3 < 0.1 < found[0]


def test_noise_that_rounds_to_one_twice_leaves_texts_as_they_are():
    grid, xt = Times("geometric").grid(128)[:2], jnp.arange(5)
    assert (grid == 1).all()
    found = Uniform(5).back(jnp.full((5, 5), -np.log(5.0)), xt, *grid)
    np.testing.assert_allclose(np.exp(found), np.eye(5), atol=1e-6)


def test_known_tokens_stay_and_a_text_follows_from_its_key_alone():
    rng = np.random.default_rng(0)
    log_p = np.log(rng.dirichlet(np.ones(5), 8).astype(np.float32))
    keys, grid = jax.random.split(jax.random.key(0), 4), Times("cosine").grid(3)
    given, known, none = rng.integers(0, 5, (4, 8)), rng.random((4, 8)) < 0.5, np.zeros((4, 1, 1), np.float32)

    @jax.jit
    def run(keys, start, known, nan):
        def law(x, noise, keys):
            return jnp.broadcast_to(log_p, (*x.shape, 5)) + nan

        return reveal(keys, law, Masked(5), grid, start, known)

    def draw(*given):
        return np.asarray(run(*given))

    start = np.where(known, given, 5)
    whole = draw(keys, start, known, none)
    assert (whole[known] == given[known]).all()
    assert whole.max() < 5
    assert (draw(keys[::-1], start[::-1], known[::-1], none)[::-1] == whole).all()
    nan = np.where(np.arange(4)[:, None, None] == 1, np.nan, none)
    lost = draw(keys, np.full((4, 8), 5), np.zeros((4, 8), bool), nan)
    assert (lost < 0).all(1).tolist() == [False, True, False, False]
    assert lost.max() < 5


def test_temperature_and_top_p_are_those_of_their_definition():
    p = np.array([[0.1, 0.4, 0.3, 0.2], [0.97, 0.01, 0.01, 0.01]])
    squared = p**2 / (p**2).sum(1, keepdims=True)
    np.testing.assert_allclose(np.exp(sharpened(jnp.log(p), 0.5)), squared, rtol=1e-5)
    np.testing.assert_allclose(
        np.exp(sharpened(jnp.log(p), 1.0, 0.65)), [[0, 4 / 7, 3 / 7, 0], [1, 0, 0, 0]], rtol=1e-5
    )
    assert sharpened(p) is p
