"""Energies made of a denoiser's network: gradients, limits, targets, and what particles draw from them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fresh import randomised
from mistakes import told

from zoo import config, models, weights
from zoo.data.images import Digits
from zoo.diffusion.precondition import Precondition
from zoo.diffusion.smc import EnergySampling, Particles
from zoo.diffusion.solvers import Euler
from zoo.metrics.agreement import Classes
from zoo.papers import edm, energy
from zoo.papers.energy import learned, mixtures
from zoo.task import Denoises, Energetic, Samples
from zoo.train.loop import train

NETWORK = edm.Edm(image=4, channels=1, classes=3, network=edm.Transformer(width=8, depth=2, head_dim=4, patch=2))
TASK = energy.EnergyDistill(NETWORK)
PRODUCT = energy.EnergyProduct((dataclasses.replace(TASK, target="data"),) * 2)
X = jax.random.normal(jax.random.key(1), (6, 4, 4, 1))
SIGMA = jnp.asarray([0.01, 0.1, 0.5, 1.0, 5.0, 50.0])
LABEL = {"label": jnp.arange(6) % 3}


@pytest.fixture(scope="module")
def params() -> Any:
    return randomised(TASK, out=0.3)


def heads() -> list[energy.EnergyDistill]:
    return [dataclasses.replace(TASK, head=head) for head in ("inner", "norm", "dae")]


@pytest.mark.parametrize("task", heads(), ids=["inner", "norm", "dae"])
def test_the_gradient_of_the_energy_denoises(task: energy.EnergyDistill, params: Any) -> None:
    """x - sigma^2 grad E; of the first two heads EDM's preconditioning of the network grad f."""
    assert isinstance(task, Denoises)
    assert isinstance(task, Energetic)
    assert isinstance(task, Samples)
    found = jax.jit(task.denoise)(params, X, SIGMA, LABEL)
    assert found.dtype == jnp.float32
    gradient = jax.grad(lambda x: task.energy(params, x, SIGMA, LABEL).sum())(X)
    np.testing.assert_allclose(found, X - SIGMA[:, None, None, None] ** 2 * gradient, atol=2e-5)
    if task.head == "dae":
        return

    def grad_f(z: jax.Array, noise: jax.Array) -> jax.Array:
        def f(z: jax.Array) -> jax.Array:
            h = NETWORK.raw(params, z, noise, LABEL)
            return (h * z / 2 if task.head == "inner" else jnp.square(h) / 2).sum()

        return jax.grad(f)(z)

    wanted = Precondition("edm", NETWORK.data).denoise(grad_f, X, SIGMA)
    np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_energies_are_those_of_noise_far_out_and_know_their_class(params: Any) -> None:
    far = 1e3 * X
    square = jnp.square(far).sum((1, 2, 3))
    np.testing.assert_allclose(1e6 * TASK.energy(params, far, 1e3, LABEL) / square, 0.5, atol=2e-3)
    none = TASK.energy(params, X, 0.5)
    np.testing.assert_allclose(TASK.energy(params, X, 0.5, {"label": -jnp.ones(6, jnp.int32)}), none, rtol=1e-6)
    assert float(jnp.abs(TASK.energy(params, X, 0.5, LABEL) - none).min()) > 1e-3


def test_the_denoiser_has_a_symmetric_jacobian_and_the_teacher_has_not(params: Any) -> None:
    def off(denoise: Any) -> float:
        jacobian = jax.jacobian(lambda x: denoise(x[None])[0].ravel())(X[0]).reshape(16, 16)
        return float(jnp.abs(jacobian - jacobian.T).max())

    assert off(lambda x: TASK.denoise(params, x, 0.5)) < 1e-5
    assert off(lambda x: NETWORK.denoise(params["teacher"], x, 0.5)) > 1e-2


def test_the_loss_is_the_weighted_difference_to_its_target_and_reaches_the_network_alone(params: Any) -> None:
    batch = {"image": X / 2, **LABEL}
    quiet = dataclasses.replace(TASK, drop=0.0)
    for target in ("teacher", "data"):
        task = dataclasses.replace(quiet, target=target)
        (loss, told), gradients = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(params, batch, jax.random.key(2))
        level_rng, noise_rng, _ = jax.random.split(jax.random.key(2), 3)
        sigma = task.noise.draw(level_rng, 6, task.sigmas)
        x = batch["image"] + sigma[:, None, None, None] * jax.random.normal(noise_rng, X.shape)
        wanted = NETWORK.denoise(params["teacher"], x, sigma, LABEL) if target == "teacher" else batch["image"]
        square = jnp.square(task.denoise(params, x, sigma, LABEL) - wanted).mean((1, 2, 3))
        np.testing.assert_allclose(loss, (Precondition("edm", 0.5).weight(sigma) * square).mean(), rtol=1e-4)
        np.testing.assert_allclose(told["x0_error"], jnp.sqrt(square.mean()), rtol=1e-4)
        assert {
            name for name, leaf in weights.flatten(gradients["net"]).items() if not jnp.abs(leaf).max() > 0
        } == set()
        assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients["teacher"])) == 0
    assert set(TASK.about.held) == {"teacher"}
    assert set(dataclasses.replace(TASK, target="data").about.held) == set()
    assert set(PRODUCT.about.held) == {"part0", "part1"}


def test_a_wide_share_of_levels_is_even_over_all_of_them() -> None:
    found = np.log(np.concatenate([TASK.noise.draw(jax.random.key(k), 64, (0.002, 80.0)) for k in range(40)]))
    bins = np.histogram(found, np.log(np.geomspace(0.002, 80.0, 6)))[0] / len(found)
    assert found.min() < np.log(0.004)
    assert found.max() > np.log(40)
    np.testing.assert_allclose(bins[[0, -1]], 0.05, atol=0.03)  # a fifth of a quarter, and a little of the normal ones


def test_particles_follow_their_key_and_class(params: Any) -> None:
    options = EnergySampling(nfe=6, temper=2.0, particles=Particles(8))
    draw = jax.jit(lambda keys, label: TASK.sample(params, keys, len(keys), {"label": label}, options))
    keys, label = jax.random.split(jax.random.key(0), 3), jnp.arange(3)
    whole = draw(keys, label)
    np.testing.assert_allclose(draw(keys[::-1], label[::-1])["image"][::-1], whole["image"], atol=1e-5)
    assert float(jnp.abs(draw(keys, label[::-1])["image"] - whole["image"])[::2].max()) > 1e-3
    own = PRODUCT.init(jax.random.key(0))
    image = PRODUCT.sample(own, jax.random.key(0), 3, None, PRODUCT.Sampling(nfe=5, particles=Particles(8)))["image"]
    assert image.shape == (3, 4, 4, 1)
    assert np.isfinite(image).all()


def test_energies_that_cannot_be_are_told(params: Any) -> None:
    with told("task.network.dtype=bfloat16", "float32"):
        energy.EnergyDistill(dataclasses.replace(NETWORK, dtype="bfloat16"))
    with told("task.network.attention=splash", "second derivative", "xla"):
        energy.EnergyDistill(dataclasses.replace(NETWORK, attention="splash"))
    with told("task.network", "Raw"):
        energy.EnergyDistill(energy.Mixture())
    with told("task.network", "preconditioning"):
        energy.EnergyDistill(dataclasses.replace(NETWORK, precondition="vp"))
    with told("particles, form, stop and rho", "temper"):
        EnergySampling(form="score")
    with told("solver=euler", "weights"):
        EnergySampling(Euler(), temper=2.0)
    with told("stop=0", "hybrid"):
        EnergySampling(temper=2.0, form="hybrid")
    with told("two or more"):
        energy.EnergyProduct(PRODUCT.parts[:1])
    other = dataclasses.replace(TASK, network=dataclasses.replace(NETWORK, image=8))
    with told("task.parts", "(4, 4, 1)", "(8, 8, 1)"):
        energy.EnergyProduct((TASK, other))
    with told("nothing to train"):
        PRODUCT.loss({}, {}, jax.random.key(0))
    with told("weights.part0=edm-digits", "Edm is not what 'part0' is", "energy/digits:low"):
        models.given_weights({"part0": "edm-digits"}, PRODUCT)
    with told("guidance"):
        TASK.sample(params, jax.random.key(0), 2, LABEL, EnergySampling(nfe=5, temper=2.0, guidance=1.0))


def test_points_of_a_mixture_are_its() -> None:
    """Weights of modes, and within a mode mean and covariance; the kernel distance against its definition."""
    wide = energy.Mode(3.0, (20.0, 0.0), (2.0, 0.5), 0.8)
    points = np.asarray(energy.Mixture((energy.Mode(), wide)).points(jax.random.key(0), 40_000))
    own = points[points[:, 0] > 8]
    np.testing.assert_allclose(len(own) / len(points), 0.75, atol=0.01)
    np.testing.assert_allclose(own.mean(0), wide.mean, atol=0.05)
    np.testing.assert_allclose(np.cov(own.T), [[4.0, 0.8], [0.8, 0.25]], atol=0.06)

    corners = mixtures.CORNERS
    cold, weights = learned.tempered(corners, 2.0, 4_000), mixtures.truth((corners,), (2.0,))[0]
    assert mixtures.distance(mixtures.share(corners.modes, cold, np.ones(len(cold))), weights) < 0.02
    x, y = points[:5], points[5:10]
    values = [[np.exp(-np.square(a - b).sum() / (2 * 3.0**2)) for b in (*x, *y)] for a in (*x, *y)]
    kernel = np.asarray(values) - np.eye(10)
    wanted = (kernel[:5, :5].sum() + kernel[5:, 5:].sum()) / 20 - 2 * kernel[:5, 5:].mean()
    np.testing.assert_allclose(learned.mmd2(x, y, (3.0,)), wanted, rtol=1e-6)
    assert abs(learned.mmd2(cold[:1000], cold[1000:2000])) < 0.005 < learned.mmd2(cold[:1000], cold[:1000] + 1)


def test_energies_of_a_mixture_are_trained_and_compared(tmp_path: Path) -> None:
    with told("task takes images [4, 4, 1]", "image=1"):
        energy.Learned(TASK)
    point = dataclasses.replace(NETWORK, image=1, channels=2, classes=0, network=edm.Transformer(8, 1, 8, 1))
    few = {"steps": 30, "batch": 32, "islands": 2, "count": 16, "levels": 5, "stops": (1.0,)}
    made = energy.Learned(dataclasses.replace(TASK, network=point), out=str(tmp_path / "out"), **few)
    figures = made.run()
    assert {row["energy"] for row in figures["rows"]} == {"exact", "distilled", "from points"}
    fresh = made.score_errors(made.task.init(jax.random.key(0)))
    assert all(0 < e < start for errors in figures["score_error"].values() for e, start in zip(errors[2:], fresh[2:]))
    assert (tmp_path / "out" / "learned.md").read_text().count("hybrid, stop 1") == 3


@pytest.mark.slow
def test_distilled_energies_of_a_mixture_are_nearer_to_the_exact_one(tmp_path: Path) -> None:
    """And so low that stops of the hybrid matter: with an energy that is right near modes alone the weights go wrong."""
    made = dataclasses.replace(config.load("energy/mixtures:learned"), steps=500, out=str(tmp_path / "learned"))
    figures = made.run()
    distilled, points = (figures["score_error"][kind][made.sigmas.index(0.5)] for kind in ("distilled", "from points"))
    assert distilled < 0.35 * points
    tv = {(row["energy"], row["method"]): row["tv"] for row in figures["rows"]}
    assert tv["distilled", "hybrid, stop 1"] < 0.06
    assert {row["mmd2"] < 0.005 for row in figures["rows"] if row["method"] == "hybrid, stop 1"} == {True}
    assert min(value for (_, method), value in tv.items() if method == "naive") > 0.18
    assert tv["distilled", "hybrid, stop 0.3"] > 0.3
    assert tv["exact", "hybrid, stop 0.3"] < 0.06


@pytest.mark.slow
def test_the_product_of_learned_energies_has_the_digits_of_both(tmp_path: Path) -> None:
    """Five minutes on two cores. Summed scores, the control, do not."""
    given = {}
    for i, half in enumerate(("low", "high")):
        run = dataclasses.replace(config.load(f"energy/digits:{half}"), workdir=str(tmp_path / half))
        train(run, quiet=True)
        given[f"weights.part{i}"] = str(tmp_path / half)
    task, params = models.open_model("energy/digits_product", [f"{key}={value}" for key, value in given.items()])

    def wanted(samples: int, batch: int, **options: Any) -> float:
        metric = Classes(samples, options, batch=batch, wanted=(2, 3))
        return float(metric(task, params, Digits(), jax.random.key(0))["wanted"])

    assert wanted(256, 256, rho=0.0, particles=Particles(2)) < 0.93
    assert wanted(48, 4, form="score") > 0.97
    assert wanted(48, 4, form="ratio") > 0.97
