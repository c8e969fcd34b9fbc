"""DART: its process in closed form, who sees whom, caches, its samplers against ancestral sampling by hand, and what the task promises."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import figures
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dart_by_hand import CAPTIONED, MASKS, NESTED, TASK, WRITES, conditions, normal, randomised
from fresh import drawn, fresh
from mistakes import told

from zoo import config, dist
from zoo.data.synthetic import Synthetic
from zoo.errors import UserError
from zoo.papers.dart import Dart
from zoo.papers.dart.metrics import Context
from zoo.papers.dart.process import Nomad
from zoo.papers.dart.task import DartSampling, Reader
from zoo.task import Denoises, sample_keys
from zoo.train.loop import train

SCHEDULES = ("copies", "chain")


def posterior(logits: np.ndarray, points: np.ndarray) -> np.ndarray:
    """E[x0 | .] [N, D] of points [M, D] under log-likelihoods [N, M]."""
    weight = np.exp(logits - logits.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True) @ points


def gaussian(x: np.ndarray, points: np.ndarray, signal: float, variance: float) -> np.ndarray:
    """log N(x; signal point, variance) [N, M], up to a constant."""
    return (signal * x @ points.T - signal**2 * np.square(points).sum(-1) / 2) / variance


# --- the process ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "schedule"), [(4, "copies"), (16, "chain")])
def test_copies_are_a_markov_chain_and_back(steps: int, schedule: Any) -> None:
    p = Nomad.cosine(steps, schedule)
    np.testing.assert_allclose(Nomad.of_chain(p.abar).gamma, p.gamma, rtol=1e-10)
    np.testing.assert_allclose(Nomad.of_copies(p.gamma).abar, p.abar, rtol=1e-10)
    # mean and covariance of y given x0
    np.testing.assert_allclose(p.to_chain @ np.sqrt(p.gamma), np.sqrt(p.abar), atol=1e-10)
    noisier, cleaner = np.minimum.outer(p.abar, p.abar), np.maximum.outer(p.abar, p.abar)
    covariance = p.to_chain * (1 - p.gamma) @ p.to_chain.T
    np.testing.assert_allclose(covariance, np.sqrt(noisier / cleaner) * (1 - cleaner), atol=1e-10)
    # a step of DART is one of DDPM: its coefficients and its variance
    beta, now, then = 1 - p.abar[:-1] / p.abar[1:], p.abar[:-1], p.abar[1:]
    signal, noise = (row[:-1] for row in p.following)
    found = p.scales[1:] / p.scales[:-1], p.scales[1:] * p.sums[1:] * signal, (p.scales[1:] * p.sums[1:] * noise) ** 2
    wanted = np.sqrt(1 - beta) * (1 - then) / (1 - now), np.sqrt(then) * beta / (1 - now), beta * (1 - then) / (1 - now)
    np.testing.assert_allclose(found, wanted, atol=1e-10)
    # what is left of the copies' noise when y is known makes them independent again
    for i in range(steps):
        g = p.gamma[: i + 1]
        left = p.residuals[i, : i + 1, : i + 1]
        np.testing.assert_allclose(left @ left.T + np.sqrt(np.outer(g, g)) / p.snr[i], np.diag(1 - g), atol=1e-10)
        np.testing.assert_allclose((p.sums[: i + 1] @ left), 0, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_all_copies_tell_of_any_prior_what_the_chain_does(schedule: Any) -> None:
    rng, p = np.random.default_rng(0), Nomad.cosine(8, schedule)
    points, which = rng.normal(size=(4, 3)), rng.integers(4, size=200)
    x = np.sqrt(p.gamma)[:, None, None] * points[which] + np.sqrt(1 - p.gamma)[:, None, None] * rng.normal(
        size=(8, 200, 3)
    )
    y = np.einsum("ts,snd->tnd", p.to_chain, x)
    for i in range(8):
        joint = sum(gaussian(x[j], points, np.sqrt(p.gamma[j]), 1 - p.gamma[j]) for j in range(i + 1))
        chain = gaussian(y[i], points, np.sqrt(p.abar[i]), 1 - p.abar[i])
        np.testing.assert_allclose(posterior(joint, points), posterior(chain, points), atol=1e-10)


def test_schedules_have_the_numbers_that_were_worked_out() -> None:
    chain, copies = (Nomad.cosine(16, schedule) for schedule in ("chain", "copies"))
    for t, abar, snr, gamma in (
        (1, 0.98813, 83.26, 0.98376),
        (4, 0.84701, 5.537, 0.685),
        (13, 0.08298, 0.0905, 0.04903),
    ):
        np.testing.assert_allclose([chain.abar[-t], chain.snr[-t], chain.gamma[-t]], [abar, snr, gamma], rtol=1e-3)
    np.testing.assert_allclose([copies.snr[-t] for t in (1, 2, 4, 8)], [155, 52, 15.8, 2.72], rtol=5e-3)
    np.testing.assert_allclose(copies.gamma[1:], np.cos(np.pi * np.arange(15, 0, -1) / 32) ** 2, rtol=1e-9)


# --- who sees whom, and caches --------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
def test_a_block_changes_no_noisier_one_by_one_bit(mask: str) -> None:
    task, params = MASKS[mask], randomised(MASKS[mask])
    copies, clean, given = normal(2, 3, 4, 4, seed=1), normal(2, 4, 4, seed=2), conditions(task, 2)

    @jax.jit
    def run(copies: jax.Array, clean: jax.Array) -> jax.Array:
        return task.estimates(params, [copies], clean, task.conditions(params, given))[0][0]

    before = np.asarray(run(copies, clean))
    for b, k in itertools.product(range(3), range(4)):
        moved = copies.copy()
        moved[:, b, k] += 1
        changed = (np.asarray(run(moved, clean)) != before).all((0, 3))
        wanted = np.zeros((3, 4), bool)
        wanted[b:] = True
        if mask == "same":
            wanted[b + 1 :] = False
        if mask == "tokens":  # the estimates of block b + 1; and those in block b of the tokens that follow
            wanted[b - 1, k + 1 :] |= b > 0
        np.testing.assert_array_equal(changed, wanted)
    clean[:, 1] += 1
    changed = (np.asarray(run(copies, clean)) != before).all((0, 3))
    np.testing.assert_array_equal(changed, np.arange(12).reshape(3, 4) >= (10 if mask == "tokens" else 12))


@pytest.mark.parametrize(
    "task",
    [
        dataclasses.replace(MASKS["same"], scan=False, fed="chain", depth=1),
        dataclasses.replace(MASKS["tokens"], target="v", scan=False, depth=1),
        dataclasses.replace(CAPTIONED, depth=1),
        dataclasses.replace(NESTED, target="v"),
        WRITES,
    ],
    ids=["same", "tokens", "text", "nested", "letters"],
)
def test_a_cache_gives_what_the_whole_sequence_does(task: Dart) -> None:
    params, given = randomised(task), conditions(task, 3)

    @jax.jit
    def draw(params: Any) -> list[jax.Array]:
        return [
            task.sample(params, jax.random.key(0), 3, given, DartSampling(guidance=0.5, cache=cache))["latent"]
            for cache in (True, False)
        ]

    cached, whole = draw(params)
    np.testing.assert_allclose(cached, whole, atol=1e-4)
    assert np.abs(cached).max() > 0.3


# --- samplers with exact denoisers ----------------------------------------------------------------

POINTS = np.random.default_rng(7).normal(size=(6, 16))  # as tokens [4, 4]


def exact(y: Any, snr: Any) -> Any:
    """E[x0 | y] of the points, y [n, 16] of the chain with this ratio of signal and noise."""
    total = jnp.sqrt(snr * (1 + snr)) * y  # sqrt(abar) y / (1 - abar)
    logits = total @ POINTS.T - snr * np.square(POINTS).sum(-1) / 2
    return jax.nn.softmax(logits) @ POINTS


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_with_the_exact_denoiser_samples_are_those_of_ddpm_step_by_step(schedule: Any) -> None:
    """And of `mask="tokens"` too, for estimates that do not look at the block itself. Noise for noise."""
    task, n = dataclasses.replace(TASK, steps=5, schedule=schedule), 64
    p = task.process
    eps = np.random.default_rng(1).normal(size=(6, n, 16)).astype(np.float32)
    sums, snr = jnp.asarray(p.sums, jnp.float32), jnp.asarray(p.snr, jnp.float32)

    def normal(i: Any) -> jax.Array:
        return jnp.asarray(eps)[i].reshape(n, 4, 4)

    def by_block(x: jax.Array, total: jax.Array, slot: Any) -> Any:
        i = slot // 4
        total = total + sums[i] * x.reshape(n, 16)
        out = exact(jnp.asarray(p.scales, jnp.float32)[i] * total, snr[i])
        return out.reshape(n, 4, 4), None, total

    def by_token(u: jax.Array, seen: jax.Array, slot: Any) -> Any:
        seen = jax.lax.dynamic_update_slice_in_dim(seen, u, slot, 1)
        last = slot + u.shape[1] - 1
        i, k = (last + 1) // 4 - 1, (last + 1) % 4
        blocks = jnp.arange(5)[:, None, None]
        total = jnp.where(blocks <= i, sums[:, None, None] * seen.reshape(n, 6, 16)[:, :5].swapaxes(0, 1), 0).sum(0)
        out = exact(jnp.asarray(p.scales, jnp.float32)[i] * total, snr[i]).reshape(n, 4, 4)
        return jnp.broadcast_to(jax.lax.dynamic_slice_in_dim(out, k, 1, 1), u.shape), None, seen

    found = jax.jit(lambda: task._by_blocks(Reader(by_block, jnp.zeros((n, 16))), normal))()[0]
    tokens = dataclasses.replace(task, mask="tokens")
    other = jax.jit(lambda: tokens._by_tokens(Reader(by_token, jnp.zeros((n, 24, 4))), normal))()
    y = eps[0].astype(np.float64)
    for i in range(5):
        x0 = posterior(gaussian(y, POINTS, np.sqrt(p.abar[i]), 1 - p.abar[i]), POINTS)
        if i < 4:
            now, then = p.abar[i], p.abar[i + 1]
            beta = 1 - now / then
            mean = np.sqrt(1 - beta) * (1 - then) / (1 - now) * y + np.sqrt(then) * beta / (1 - now) * x0
            y = mean + np.sqrt(beta * (1 - then) / (1 - now)) * eps[i + 1]
    np.testing.assert_allclose(found.reshape(n, 16), x0, atol=1e-3)
    np.testing.assert_allclose(other, found, atol=1e-3)
    assert np.abs(x0.std(0) - POINTS.std(0)).max() < 0.5


# --- the task -------------------------------------------------------------------------------------


def test_the_loss_is_the_weighted_error_and_that_of_v() -> None:
    rng, x = jax.random.key(3), normal(4, 4, 4, 1)
    batch = {"latent": x, "latent_std": np.zeros_like(x), **conditions(TASK, 4)}
    x0 = np.asarray(TASK.tokens(x), np.float64)
    np.testing.assert_allclose(TASK.image(TASK.tokens(x)), x, atol=1e-6)
    capped = dataclasses.replace(TASK, cap=2.0)._weights
    assert (capped.mean(), capped[-1] / capped[0]) == pytest.approx((1, 2 / (1 + TASK.process.snr[0])))
    task = dataclasses.replace(TASK, target="v", cap=None, drop=0.0)
    params, seen = randomised(task), TASK.conditions({}, batch)
    p, eps = task.process, jax.random.normal(jax.random.split(rng, 3)[1], (4, 3, 4, 4))
    abar = p.abar[:, None, None]
    copies = task.copies(task.tokens(batch["latent"]), eps)
    y = np.einsum("ts,bskd->btkd", p.to_chain, np.asarray(copies, np.float64))
    v = np.sqrt(abar) * (y - np.sqrt(abar) * x0[:, None]) / np.sqrt(1 - abar) - np.sqrt(1 - abar) * x0[:, None]
    output = jax.jit(dataclasses.replace(task, target="x0").estimates)(params, [copies], None, seen)[0][0]
    wanted = np.square(np.asarray(output, np.float64) - v).mean()
    loss, metrics = jax.jit(task.loss)(params, batch, rng)
    assert float(loss) == pytest.approx(wanted, rel=1e-3)
    assert float(metrics["x0_error_last"]) > 0


def test_as_a_denoiser_it_reads_the_statistic_at_all_levels() -> None:
    assert isinstance(TASK, Denoises)
    task = dataclasses.replace(MASKS["same"], fed="chain")
    params, x = randomised(task), normal(3, 4, 4, 1)
    given, p = conditions(task, 3), task.process
    denoise = jax.jit(task.denoise)
    sigma = jnp.asarray(task.spread * np.asarray(p.snr) ** -0.5, jnp.float32)
    np.testing.assert_allclose(task.sigmas, (sigma[-1], sigma[0]), rtol=1e-6)
    y = np.sqrt(p.abar)[:, None, None] * np.asarray(task.tokens(x))[:, None]  # of each image at all levels
    copies = jnp.asarray(np.einsum("ts,bskd->btkd", np.linalg.inv(p.to_chain), y), jnp.float32)
    wanted = jax.jit(task.estimates)(params, [copies], None, task.conditions(params, given))[0][0]
    for turn in range(3):
        at = (jnp.arange(3) + turn) % 3
        found = denoise(params, x, sigma[at], given)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, task.image(wanted[jnp.arange(3), at]), atol=2e-3)
    between, other = (
        denoise(params, x, jnp.full(3, sigma[1:].mean()), {"label": y}) for y in (given["label"], jnp.arange(3))
    )
    assert np.isfinite(between).all()
    assert np.abs(other - between).max() > 1e-3


def test_sample_i_depends_on_its_key_alone() -> None:
    params, keys, label = randomised(TASK), jax.random.split(jax.random.key(0), 3), jnp.asarray([0, 1, -1])
    draw = jax.jit(lambda k, y: TASK.sample(params, k, len(y), {"label": y}, DartSampling(1.0))["latent"])
    whole = draw(keys, label)
    np.testing.assert_allclose(draw(keys[::-1], label[::-1])[::-1], whole, atol=1e-5)
    assert np.abs(whole[0] - whole[1]).max() > 1e-2


@pytest.mark.devices8
def test_samples_of_a_mesh_are_those_of_one_device() -> None:
    task = dataclasses.replace(TASK, width=32, depth=1, steps=2)
    params, label = randomised(task), {"label": jnp.arange(8) % 3}
    found = []
    for mesh in (dist.Mesh(data=1).build(jax.devices()[:1]), dist.Mesh(data=2, fsdp=2, tensor=2).build(jax.devices())):
        with dist.use(mesh):
            draw = jax.jit(lambda p: task.sample(p, jax.random.key(0), 8, label, DartSampling(1.0))["latent"])
            found.append(np.asarray(draw(params)))
    np.testing.assert_allclose(*found, atol=1e-4)


def test_context_is_told_by_the_copies_of_others() -> None:
    for mask, wanted in (("blocks", False), ("same", True)):
        task = dataclasses.replace(MASKS[mask], inputs="pixels")
        found = Context(draws=2, batch=8, limit=16)(task, randomised(task), Synthetic(), jax.random.key(0))
        assert [found[f"rise_{i}"] == 0 for i in (1, 2, 3)] == [True, wanted, wanted]
        assert found["examples"] == 16


def test_caches_are_as_large_as_is_said() -> None:
    for task, slots in zip(MASKS.values(), (12, 4, 16)):
        assert task.cache_bytes(5) == {"all": 2 * 2 * 10 * slots * 16 * 4}
    assert CAPTIONED.cache_bytes(5, guided=False) == {"all": 2 * 2 * 5 * 15 * 16 * 4}


def test_what_does_not_fit_is_told() -> None:
    smoke = config.load("dart/digits:smoke")
    for field, words in (
        ("patch=3", ("task.patch=3", "divides")),
        ("head_dim=8", ("task.head_dim=8", "in steps of 16")),
        ("attention=cudnn task.dtype=bfloat16", ("task.attention='cudnn'", "task.attention=auto")),
        ("head=flow task.mask=tokens", ("task.head='flow'", "task.mask=blocks")),
        ("coarse=2 task.patch=4", ("task.coarse=2", "task.patch=4")),
        ("writes=true", ("task.writes=True", "task.captions=letters")),
        ("coarse=2 task.head=flow", ("task.coarse=2", "task.head=gauss")),
        ("fed=chain", ("task.fed='chain'", "task.mask=same")),
    ):
        with told(*words):
            config.override(smoke, f"task.{field}".split())
    for given in ({"width": "48", "head_dim": "32"}, {"latent": "5,7", "patch": "1", "coarse": "2"}):
        with pytest.raises(UserError) as error:
            config.override(smoke, [f"task.{name}={value}" for name, value in given.items()])
        given |= dict([re.findall(r"task\.(\w+)=([\d,]+)", str(error.value))[-1]])  # the way out is one
        config.override(smoke, [f"task.{name}={value}" for name, value in given.items()])
    with told("task.mask='same'", "caption"):
        dataclasses.replace(CAPTIONED, mask="same")
    for task, given in ((TASK, None), (dataclasses.replace(TASK, drop=0.0), {"label": jnp.zeros(2, jnp.int32)})):
        with told("guidance=1", "leave guidance out"):
            task.sample(randomised(task), jax.random.key(0), 2, given, DartSampling(1.0))


def test_a_fresh_flow_head_leaves_proposals_as_they_are_and_is_told_where_they_should_go() -> None:
    task = dataclasses.replace(TASK, head="flow", head_steps=3, head_noise=0.4)
    head = drawn(lambda key: dist.unbox(task.init(key))["head"], jax.random.key(0))
    params, key, snr = {**randomised(task), "head": head}, jax.random.key(0), task.process.snr

    @jax.jit
    def run() -> Any:
        plain, moved = (one.sample(params, key, 3)["latent"] for one in (dataclasses.replace(task, head="gauss"), task))
        last = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 3), (4, 4)))(sample_keys(key, 3))

        def loss(head: Any) -> jax.Array:
            copies, hidden = jnp.ones((2, 3, 4, 4)), jnp.ones((2, 3, 4, 16))
            return task._flow_loss({"head": head}, copies, jnp.zeros((2, 4, 4)), jnp.zeros_like(copies), hidden, key)

        grads = jax.grad(loss)(randomised(task)["head"])
        return moved, task.image(task.tokens(plain) + 0.4 * last), loss(head), grads

    moved, wanted, loss, grads = run()
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(grads)) > 1e-7
    np.testing.assert_allclose(moved, wanted, atol=1e-4)
    assert task._proposals[1][-1] == 0.4
    assert dataclasses.replace(task, head_noise=None)._proposals[1][-1] == pytest.approx((1 + snr[-1]) ** -0.5)
    wanted = np.asarray([1, 1, 0]) + task._proposals[1] ** 2
    assert float(loss) == pytest.approx(wanted.mean(), rel=0.3)


# --- what is learned ------------------------------------------------------------------------------


def ring(rng: jax.Array, n: int) -> jax.Array:
    """Eight modes in two dimensions, of variance 1: tokens that no Gaussian is like."""
    angle, noise = jax.random.randint(rng, (n,), 0, 8) * np.pi / 4, jax.random.normal(rng, (n, 2))
    return 1.4 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1) + 0.1 * noise


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    from scipy.spatial.distance import cdist

    return float(2 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_flow_head_draws_tokens_that_no_gaussian_step_does(seed: int) -> None:
    task = Dart(
        latent=(1, 1), channels=2, patch=1, steps=3, schedule="chain", width=32, depth=2, head_dim=16, head="flow"
    )
    optimiser = optax.adam(optax.cosine_decay_schedule(4e-3, 1_000))

    def step(carry: Any, rng: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        batch = {"latent": ring(rng, 128).reshape(-1, 1, 1, 2), "latent_std": jnp.zeros((128, 1, 1, 2))}
        (loss, _), grads = jax.value_and_grad(task.loss, has_aux=True)(params, batch, jax.random.fold_in(rng, 1))
        update, state = optimiser.update(grads, state, params)
        return (optax.apply_updates(params, update), state), loss

    @jax.jit
    def run(params: Any) -> Any:
        carry = params, optimiser.init(params)
        (params, _), losses = jax.lax.scan(step, carry, jax.random.split(jax.random.key(seed), 1_000))
        tasks = task, dataclasses.replace(task, head="gauss")
        return [one.sample(params, jax.random.key(5), 3_000)["latent"] for one in tasks], losses

    (moved, plain), _ = run(fresh(task, seed))
    real = np.asarray(ring(jax.random.key(99), 3_000))
    with_head, without = (energy_distance(np.asarray(x).reshape(-1, 2), real) for x in (moved, plain))
    print(f"seed {seed}: energy distance {with_head:.4f} with the flow head, {without:.4f} without")
    assert with_head < 0.3 * without, (with_head, without)


@pytest.mark.slow
def test_digits_use_their_history(tmp_path: Path) -> None:
    """Two seeds beside the blind control: a quarter of an hour on two free cores."""
    found: dict[str, list[dict[str, Any]]] = {"config": [], "blind": []}
    for seed, (entry, rows) in itertools.product((0, 1), found.items()):
        run = dataclasses.replace(
            config.load(f"dart/digits:{entry}"), seed=seed, workdir=str(tmp_path / f"{entry}{seed}")
        )
        train(run, quiet=True)
        rows.append(figures.of_run(tmp_path / f"{entry}{seed}"))

    def mean(entry: str, key: str) -> np.ndarray:
        return np.mean([[row[f"{key}_{i}"] for i in range(1, 7)] for row in found[entry]], 0)

    own, blind = mean("config", "mse"), mean("blind", "mse")
    gain = 1 - own / blind
    print(own, blind, gain, mean("config", "rise"), [row["frechet"] for rows in found.values() for row in rows])
    assert (np.diff(own) < 0).all()
    assert gain[3:].min() >= 0.04
    assert gain[3:].mean() >= 0.07
    assert min(row[f"rise_{i}"] for row in found["config"] for i in (4, 5, 6)) >= 0.15
    assert not mean("blind", "rise").any()
    assert max(row["frechet"] for row in found["config"]) < min(row["frechet"] for row in found["blind"])
