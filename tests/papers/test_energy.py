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

import zoo
from zoo import cli, config, models, weights
from zoo.diffusion.guidance import Guidance
from zoo.diffusion.potentials import Potential
from zoo.diffusion.precondition import Precondition
from zoo.diffusion.smc import EnergySampling, Particles
from zoo.diffusion.solvers import Euler
from zoo.papers import edm, energy, part
from zoo.task import Denoises, Energetic, Samples

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
        wanted = jax.jit(NETWORK.denoise)(params["teacher"], x, sigma, LABEL) if target == "teacher" else batch["image"]
        square = jnp.square(jax.jit(task.denoise)(params, x, sigma, LABEL) - wanted).mean((1, 2, 3))
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
    options = EnergySampling(nfe=6, guidance=1.0, particles=Particles(8))
    draw = jax.jit(lambda keys, label: TASK.sample(params, keys, len(keys), {"label": label}, options))
    keys, label = jax.random.split(jax.random.key(0), 3), jnp.asarray([0, 1, -1])
    whole = draw(keys, label)
    np.testing.assert_allclose(draw(keys[::-1], label[::-1])["image"][::-1], whole["image"], atol=1e-5)
    assert float(jnp.abs(draw(keys, label[::-1])["image"] - whole["image"])[::2].max()) > 1e-3
    least = whole["trace"].figures()["ess"]
    assert least[2] == pytest.approx(1, abs=1e-5)  # a class and none: without one there is nothing to weigh
    assert (least[:2] < 0.999).all()
    own = PRODUCT.init(jax.random.key(0))
    image = PRODUCT.sample(own, jax.random.key(0), 3, None, PRODUCT.Sampling(nfe=5, particles=Particles(8)))["image"]
    assert image.shape == (3, 4, 4, 1)
    assert np.isfinite(image).all()


@dataclasses.dataclass(frozen=True)
class Breaks(Potential):
    """Of one particle no number."""

    name = "breaks"

    def log(self, x: jax.Array, x0: jax.Array, sigma: jax.Array) -> jax.Array:
        return jnp.where((jnp.arange(len(x)) == 13) & (sigma < 1), jnp.nan, 0.0)


def test_how_samples_came_about_is_kept_and_printed_and_a_lost_island_is_told(
    params: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights.save(tmp_path / "model", params, about(TASK), "a card")
    out, some = tmp_path / "out", ["sample", str(tmp_path / "model"), "nfe=5", "particles.count=8"]
    own = ["temper=2", "--batch", "2", "--out", str(out)]
    assert cli.main([*some, "n=2", *own]) == 0
    assert "mean and spread of 2 samples: ess " in capsys.readouterr().out
    first = json.loads((out / "trace.json").read_text())
    (out / "000001.png").unlink()
    assert cli.main([*some, "n=3", *own]) == 0
    assert "mean and spread of 3 samples: ess " in capsys.readouterr().out
    kept = json.loads((out / "trace.json").read_text())
    assert set(kept) == {"0", "1", "2"}
    assert set(kept["0"]) == {"ess", "resampled", "roots", "log_normaliser"}
    for i in first:
        assert kept[i] == pytest.approx(first[i], rel=1e-4)
    drawn = zoo.load(str(tmp_path / "model")).sample(3, nfe=5, temper=2.0, particles=Particles(8))
    assert [kept[str(i)]["roots"] for i in range(3)] == drawn["trace"].figures()["roots"].tolist()

    assert cli.main([*some, "n=2", "potentials=breaks", "--batch", "2", "--out", str(tmp_path / "lost")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "potential breaks: the weight of particle 5 is no finite number at level 3" in said
    assert "of island 1" in said


def test_energies_that_cannot_be_are_told(params: Any, tmp_path: Path) -> None:
    with told("task.network.dtype=bfloat16", "float32"):
        energy.EnergyDistill(dataclasses.replace(NETWORK, dtype="bfloat16"))
    with told("task.network.attention=splash", "second derivative", "xla"):
        energy.EnergyDistill(dataclasses.replace(NETWORK, attention="splash"))
    with told("task.network", "Raw"):
        energy.EnergyDistill(energy.Mixture())
    with told("task.network", "preconditioning"):
        energy.EnergyDistill(dataclasses.replace(NETWORK, precondition="vp"))
    with told("form, stop and rho", "temper"):
        EnergySampling(form="score")
    with told("particles have nothing to weigh"):
        EnergySampling(particles=Particles(8))
    with told("solver=euler", "weights"):
        EnergySampling(Euler(), temper=2.0)
    with told("stop=0", "hybrid"):
        EnergySampling(temper=2.0, form="hybrid")
    for stop in (0.001, 90.0):
        with told(f"stop={stop:g}", "from 80 to 0.002"):
            EnergySampling(temper=2.0, form="hybrid", stop=stop).islands(
                jax.random.split(jax.random.key(0), 1), (0.002, 80.0), [], (2,)
            )
    with told("two or more"):
        energy.EnergyProduct(PRODUCT.parts[:1])
    other = dataclasses.replace(TASK, network=dataclasses.replace(NETWORK, image=8))
    with told("task.parts", "(4, 4, 1)", "(8, 8, 1)"):
        energy.EnergyProduct((TASK, other))
    with told("task.energy", "(4, 4, 1)", "(8, 8, 1)"):
        energy.EnergyTilted(TASK, part.PartClassifier(image=8, channels=1, patch=2, width=8, depth=1, head_dim=8))
    with told("nothing to train"):
        PRODUCT.loss({}, {}, jax.random.key(0))
    with told("weights.part0=edm-digits", "Edm is not what 'part0' is", "energy/digits:low"):
        models.given_weights({"part0": "edm-digits"}, PRODUCT)
    norm = dataclasses.replace(PRODUCT.parts[0], head="norm")
    weights.save(tmp_path / "norm", {"net": params["net"]}, about(norm), "a card")
    with told(f'weights.part0={tmp_path / "norm"} differs in head ("norm" there, and here "inner")'):
        models.given_weights({"part0": str(tmp_path / "norm")}, PRODUCT)
    other = config.load("energy/digits", ["task.network.network.head_dim=32"]).task
    with told("weights.teacher=edm-digits differs in network.head_dim (16 there, and here 32)"):
        models.given_weights({"teacher": "edm-digits"}, other)
    judge = part.PartClassifier(image=4, channels=1, patch=2, width=8, depth=1, head_dim=8)
    numbers = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), weights.abstract(judge))
    weights.save(tmp_path / "judge", numbers, about(judge), "a card")
    tilted = energy.EnergyTilted(TASK, dataclasses.replace(judge, head_dim=4))
    with told("judge differs in head_dim (8 there, and here 4)"):
        models.given_weights({"classifier": str(tmp_path / "judge")}, tilted)
    with told("guidance", "no class here"):
        TASK.sample(params, jax.random.key(0), 2, None, EnergySampling(nfe=5, temper=2.0, guidance=1.0))
    with told("guidance", "at all levels"):
        EnergySampling(temper=2.0, guidance=Guidance(1.0, low=0.1))
    with told("guidance", "know no class"):
        PRODUCT.Sampling(guidance=1.0)
