"""Energies made of a denoiser's network: gradients, limits, targets, and what particles draw from them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fresh import randomised
from mistakes import told

from zoo import cli, models, weights
from zoo.diffusion.guidance import Guidance
from zoo.diffusion.precondition import Precondition
from zoo.diffusion.smc import EnergySampling, Particles
from zoo.diffusion.solvers import Euler
from zoo.papers import edm, energy, part
from zoo.task import Denoises, Energetic

NETWORK = edm.Edm(image=4, channels=1, classes=3, network=edm.Transformer(width=8, depth=2, head_dim=4, patch=2))
TASK = energy.EnergyDistill(NETWORK)
PRODUCT = energy.EnergyProduct((dataclasses.replace(TASK, target="data"),) * 2)
X = jax.random.normal(jax.random.key(1), (6, 4, 4, 1))
SIGMA = jnp.asarray([0.01, 0.1, 0.5, 1.0, 5.0, 50.0])
LABEL = {"label": jnp.arange(6) % 3}


@pytest.fixture(scope="module")
def params() -> Any:
    return randomised(TASK, out=0.3)


def about(task: Any) -> dict[str, Any]:
    """What the config of an export says of it."""
    return models.export_config(models.Model(task, {}, "raw", 5, None, (), Path()))


@pytest.mark.parametrize("head", ["inner", "norm", "dae"])
def test_the_gradient_of_the_energy_denoises(head: Any, params: Any) -> None:
    """x - sigma^2 grad E; of the first two heads EDM's preconditioning of the network grad f."""
    task = dataclasses.replace(TASK, head=head)
    assert isinstance(task, Denoises)
    assert isinstance(task, Energetic)

    def grad_f(z: jax.Array, noise: jax.Array) -> jax.Array:
        def f(z: jax.Array) -> jax.Array:
            h = NETWORK.raw(params, z, noise, LABEL)
            return (h * z / 2 if head == "inner" else jnp.square(h) / 2).sum()

        return jax.grad(f)(z)

    @jax.jit
    def run() -> Any:
        gradient = jax.grad(lambda x: task.energy(params, x, SIGMA, LABEL).sum())(X)
        wanted = None if head == "dae" else Precondition("edm", NETWORK.data).denoise(grad_f, X, SIGMA)
        return task.denoise(params, X, SIGMA, LABEL), gradient, wanted

    found, gradient, wanted = run()
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, X - SIGMA[:, None, None, None] ** 2 * gradient, atol=2e-5)
    if wanted is not None:
        np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_energies_are_those_of_noise_far_out_and_know_their_class(params: Any) -> None:
    energy_of = jax.jit(lambda x, sigma, label: TASK.energy(params, x, sigma, {"label": label}))
    far, label = 1e3 * X, LABEL["label"]
    np.testing.assert_allclose(1e6 * energy_of(far, 1e3, label) / jnp.square(far).sum((1, 2, 3)), 0.5, atol=2e-3)
    none = energy_of(X, 0.5, -jnp.ones(6, jnp.int32))
    np.testing.assert_allclose(jax.jit(lambda: TASK.energy(params, X, 0.5))(), none, rtol=1e-6)
    assert float(jnp.abs(energy_of(X, 0.5, label) - none).min()) > 1e-3


def test_the_loss_is_the_weighted_difference_to_its_target_and_reaches_the_network_alone(params: Any) -> None:
    task, batch = dataclasses.replace(TASK, drop=0.0), {"image": X / 2, **LABEL}
    data = dataclasses.replace(task, target="data")
    level_rng, noise_rng, _ = jax.random.split(jax.random.key(2), 3)

    @jax.jit
    def run(params: Any) -> Any:
        sigma = task.noise.draw(level_rng, 6, task.sigmas)
        x = batch["image"] + sigma[:, None, None, None] * jax.random.normal(noise_rng, X.shape)
        own = []
        for wanted in (NETWORK.denoise(params["teacher"], x, sigma, LABEL), batch["image"]):
            square = jnp.square(task.denoise(params, x, sigma, LABEL) - wanted).mean((1, 2, 3))
            own.append(((Precondition("edm", 0.5).weight(sigma) * square).mean(), jnp.sqrt(square.mean())))
        found, gradients = jax.value_and_grad(task.loss, has_aux=True)(params, batch, jax.random.key(2))
        return [found, data.loss(params, batch, jax.random.key(2))], own, gradients

    found, own, gradients = run(params)
    for (loss, metrics), wanted in zip(found, own):
        np.testing.assert_allclose((loss, metrics["x0_error"]), wanted, rtol=1e-4)
    largest = {key: [np.abs(leaf).max() for leaf in jax.tree.leaves(tree)] for key, tree in gradients.items()}
    assert min(largest["net"]) > 0
    assert max(largest["teacher"]) == 0
    assert (task.about.held, data.about.held) == (("teacher",), ())


def test_a_wide_share_of_levels_is_even_over_all_of_them() -> None:
    draw = jax.jit(jax.vmap(lambda key: TASK.noise.draw(key, 64, (0.002, 80.0))))
    found = np.log(np.ravel(draw(jax.random.split(jax.random.key(0), 40))))
    bins = np.histogram(found, np.log(np.geomspace(0.002, 80.0, 6)))[0] / len(found)
    assert found.min() < np.log(0.004)
    assert found.max() > np.log(40)
    np.testing.assert_allclose(bins[[0, -1]], 0.05, atol=0.03)  # a fifth of a quarter, and a little of the normal ones


def test_particles_follow_their_key_and_class(params: Any) -> None:
    options = EnergySampling(nfe=6, guidance=1.0, particles=Particles(8))
    draw = jax.jit(lambda keys, label: TASK.sample(params, keys, len(keys), {"label": label}, options))
    keys, label = jax.random.split(jax.random.key(0), 3), jnp.asarray([0, 1, -1])
    whole = draw(keys, label)
    np.testing.assert_allclose(draw(keys[::-1], label[::-1])["image"][::-1], whole["image"], atol=1e-5)
    assert float(jnp.abs(draw(keys, label[::-1])["image"] - whole["image"])[::2].max()) > 1e-3
    least = whole["trace"].figures()["ess"]
    assert least[2] == pytest.approx(1, abs=1e-5)  # a class and none: without one there is nothing to weigh
    assert (least[:2] < 0.999).all()
    given = PRODUCT.Sampling(nfe=5, particles=Particles(8))
    drawn = jax.eval_shape(
        lambda key: PRODUCT.sample(PRODUCT.init(key), key, 3, None, given), jax.eval_shape(jax.random.key, 0)
    )
    assert (drawn["image"].shape, drawn["trace"].ess.shape) == ((3, 4, 4, 1), (3, 5))
    energies, (product,) = PRODUCT.target({"part0": params, "part1": params})
    assert (len(energies), product.powers(np.eye(2)[0]).tolist()) == (2, [1, 1])


def test_how_samples_came_about_is_kept_and_printed_and_a_lost_island_is_told(
    params: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = {**params, "net": jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), params["net"])}
    for name, own in (("model", params), ("broken", broken)):
        weights.save(tmp_path / name, own, about(TASK), "a card")
    some, kept = ["nfe=5", "particles.count=8", "temper=2", "--batch", "2"], {}
    for n in (2, 3):  # which goes on from two
        assert cli.main(["sample", str(tmp_path / "model"), *some, f"n={n}", "--out", str(tmp_path / "out")]) == 0
        assert f"mean and spread of {n} samples: ess " in capsys.readouterr().out
        before, kept = kept, json.loads((tmp_path / "out" / "trace.json").read_text())
        assert kept.keys() == set("012"[:n])
        assert {**kept, **before} == kept
    assert set(kept["0"]) == {"ess", "resampled", "roots", "log_normaliser"}
    assert kept["1"] != kept["2"]

    assert cli.main(["sample", str(tmp_path / "broken"), *some, "n=2", "--out", str(tmp_path / "lost")]) == 2
    said = capsys.readouterr().err
    assert "the energies: the weight of particle 0 is no finite number at level 0" in said
    assert (said.count("\n"), "of island 0" in said) == (1, True)


def test_energies_that_cannot_be_are_told(params: Any, tmp_path: Path) -> None:
    judge = part.PartClassifier(image=4, channels=1, patch=2, width=8, depth=1, head_dim=8)
    larger = dataclasses.replace(TASK, network=dataclasses.replace(NETWORK, image=8))
    hybrid = EnergySampling(temper=2.0, form="hybrid", stop=90.0)

    def network(**fields: Any) -> Any:
        return energy.EnergyDistill(dataclasses.replace(NETWORK, **fields))

    norm = dataclasses.replace(PRODUCT.parts[0], head="norm")
    weights.save(tmp_path / "norm", {"net": params["net"]}, about(norm), "a card")
    numbers = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), weights.abstract(judge))
    weights.save(tmp_path / "judge", numbers, about(judge), "a card")
    tilted = energy.EnergyTilted(TASK, dataclasses.replace(judge, head_dim=4))
    for make, words in (
        (lambda: network(dtype="bfloat16"), ("task.network.dtype=bfloat16", "float32")),
        (lambda: network(attention="splash"), ("task.network.attention=splash", "second derivative", "xla")),
        (lambda: network(precondition="vp"), ("task.network", "preconditioning")),
        (lambda: energy.EnergyDistill(energy.Mixture()), ("task.network", "Raw")),
        (lambda: EnergySampling(form="score"), ("form, stop and rho", "temper")),
        (lambda: EnergySampling(particles=Particles(8)), ("particles have nothing to weigh",)),
        (lambda: EnergySampling(Euler(), temper=2.0), ("solver=euler", "weights")),
        (lambda: EnergySampling(temper=2.0, form="hybrid"), ("stop=0", "hybrid")),
        (lambda: EnergySampling(temper=2.0, guidance=Guidance(1.0, low=0.1)), ("guidance", "at all levels")),
        (lambda: hybrid.islands(jax.random.split(jax.random.key(0), 1), (0.002, 80.0), [], (2,)), ("stop=90", "from 80 to 0.002")),
        (lambda: energy.EnergyProduct(PRODUCT.parts[:1]), ("task.parts", "at least 2")),
        (lambda: energy.EnergyProduct((TASK, larger)), ("task.parts", "(4, 4, 1)", "(8, 8, 1)")),
        (lambda: energy.EnergyTilted(larger, judge), ("task.energy", "(8, 8, 1)", "(4, 4, 1)")),
        (lambda: PRODUCT.loss({}, {}, jax.random.key(0)), ("nothing to train",)),
        (lambda: PRODUCT.Sampling(guidance=1.0), ("guidance", "know no class")),
        (lambda: models.given_weights({"part0": "edm-digits"}, PRODUCT), ("weights.part0=edm-digits", "Edm is not what 'part0' is")),
        (lambda: models.given_weights({"part0": str(tmp_path / "norm")}, PRODUCT), ('differs in head ("norm" there, and here "inner")',)),
        (lambda: models.given_weights({"classifier": str(tmp_path / "judge")}, tilted), ("differs in head_dim (8 there, and here 4)",)),
    ):  # fmt: skip
        with told(*words):
            make()
