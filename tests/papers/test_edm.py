"""EDM: what the task promises of a U-Net and of a transformer; and guidance."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fresh import drawn, randomised
from mistakes import told

import zoo
from zoo import config, dist
from zoo.diffusion.guidance import Guidance
from zoo.diffusion.levels import Levels
from zoo.diffusion.precondition import Precondition
from zoo.diffusion.sampling import DenoiserSampling
from zoo.diffusion.solvers import Churn
from zoo.diffusion.tasks import dropped
from zoo.papers.edm import Edm, Transformer, UNet
from zoo.papers.tada import Tada
from zoo.task import Denoises, Samples
from zoo.train.loop import train

# --- the task -------------------------------------------------------------------------------------

# one level: the way down and up again is that of `test_edm_networks.py`
TASK = Edm(image=4, channels=1, classes=3, network=UNet(width=8, multiples=(1,), blocks=1, attention=(), dropout=0.2))
DIT = dataclasses.replace(TASK, network=Transformer(width=8, depth=3, head_dim=4, patch=2))


@pytest.fixture(scope="module")
def params() -> Any:
    return randomised(TASK)


@pytest.fixture(scope="module")
def dit_params() -> Any:
    return randomised(DIT)


def silent(task: Edm, params: Any) -> Any:
    """Such parameters with the output layer that fresh ones have."""
    out = drawn(lambda key: dist.unbox(task.init(key))["net"]["out"], jax.random.key(0))
    return {**params, "net": {**params["net"], "out": out}}


@pytest.mark.parametrize("task", [TASK, DIT], ids=["unet", "dit"])
def test_it_denoises_in_float32_at_all_levels_and_knows_its_class(task: Edm, params: Any, dit_params: Any) -> None:
    assert isinstance(task, Denoises)
    assert isinstance(task, Samples)
    own, x = params if task is TASK else dit_params, np.random.default_rng(0).normal(size=(3, 4, 4, 1))
    exact, bfloat16 = jax.jit(task.denoise), jax.jit(dataclasses.replace(task, dtype="bfloat16").denoise)

    def ask(label: Any, x: Any = x, sigma: Any = 1.0, own: Any = own, run: Any = exact) -> np.ndarray:
        label, sigma = np.broadcast_to(np.int32(label), 3), np.broadcast_to(np.float32(sigma), 3)
        found = run(own, np.float32(x), sigma, {"label": label})
        assert found.dtype == jnp.float32
        return np.asarray(found)

    for sigma in task.sigmas:
        assert np.isfinite(ask(range(3), x * sigma, sigma, run=bfloat16)).all()
    one, other, none = (ask(label) for label in (0, 1, -1))
    assert np.abs(one - other).max() > 1e-4
    for nothing in ({}, {"label": None}):
        assert task.hot(nothing) is None
    np.testing.assert_allclose(none, exact(own, np.float32(x), np.ones(3, np.float32)), atol=1e-6)
    assert set(jax.eval_shape(lambda: task.sample(own, jax.random.key(0), 2, {"label": None}))) == {"image"}
    rough = ask(0, run=bfloat16)
    np.testing.assert_allclose(rough, one, atol=0.02)
    assert np.abs(rough - one).max() > 1e-6
    sigma, label = np.array([0.1, 1.0, 9.0]), np.array([0, 2, -1])
    each = ask(label, sigma=sigma)  # images one by one
    np.testing.assert_allclose(ask(label[::-1], x[::-1], sigma[::-1])[::-1], each, atol=1e-6)
    if task is DIT:  # a fresh one says nothing
        skip = (DIT.data**2 / (DIT.data**2 + sigma**2))[:, None, None, None]
        np.testing.assert_allclose(ask(label, sigma=sigma, own=silent(DIT, own)), skip * x, rtol=1e-6)


def test_remat_acts_in_a_unet(params: Any) -> None:
    x = jnp.zeros((2, 4, 4, 1))
    tasks = TASK, dataclasses.replace(TASK, remat="full")
    plain, saving = (str(jax.make_jaxpr(lambda p, t=t: t.denoise(p, x, 1.0))(params)).count("remat") for t in tasks)
    assert plain < saving


def test_the_loss_of_fresh_parameters_is_that_of_the_best_guess_without_a_network(params: Any) -> None:
    """x0 = c_skip x, whose weighted error on data of variance v is (v + data^2) / 2 data^2 on average near sigma = data."""
    task = dataclasses.replace(TASK, noise=dataclasses.replace(TASK.noise, mean=float(np.log(0.5)), std=1e-3))
    image = 0.5 * np.random.default_rng(1).normal(size=(512, 4, 4, 1)).astype(np.float32)
    batch = {"image": image, "label": np.zeros(512, np.int32)}
    loss, metrics = jax.jit(task.loss)(silent(task, params), batch, jax.random.key(2))
    assert float(loss) == pytest.approx(1.0, rel=0.05)
    assert float(metrics["x0_error"]) == pytest.approx(0.5 / 2**0.5, rel=0.05)


def test_sample_i_depends_on_its_key_alone(params: Any) -> None:
    options, label = DenoiserSampling(Churn(), 3, 1.5), jnp.asarray([0, 1, -1])
    keys = jax.random.split(jax.random.key(0), 3)
    draw = jax.jit(lambda k, label: TASK.sample(params, k, len(label), {"label": label}, options)["image"])
    whole = draw(keys, label)
    assert np.isfinite(whole).all()
    assert np.abs(whole[0] - whole[1]).max() > 1e-3
    np.testing.assert_allclose(draw(keys[::-1], label[::-1])[::-1], whole, atol=1e-5)


@pytest.mark.devices8
def test_samples_of_a_mesh_are_those_of_one_device(dit_params: Any) -> None:
    keys, label, found = jax.random.split(jax.random.key(0), 8), jnp.arange(8) % 3, []
    mesh = dist.Mesh(data=2, fsdp=2, tensor=2).build(jax.devices())
    for built in (dist.Mesh(data=1).build(jax.devices()[:1]), mesh):
        with dist.use(built):
            draw = jax.jit(
                lambda p: DIT.sample(p, keys, 8, {"label": label}, DenoiserSampling(Tada(), 5, 1.5))["image"]
            )
            found.append(np.asarray(draw(dit_params)))
    np.testing.assert_allclose(*found, atol=1e-5)


def test_dropout_and_dropped_labels_act_in_training_alone(params: Any) -> None:
    x, label = jax.random.normal(jax.random.key(1), (8, 4, 4, 1)), jnp.zeros(8, jnp.int32)
    none = dataclasses.replace(TASK, network=dataclasses.replace(TASK.network, dropout=0.0), drop=0.0)
    tasks = none, dataclasses.replace(none, drop=0.99), dataclasses.replace(none, network=TASK.network)
    losses = jax.jit(lambda: [task.loss(params, {"image": x, "label": label}, jax.random.key(2))[0] for task in tasks])
    assert len(set(np.asarray(losses()).tolist())) == 3
    given = dropped(jax.random.key(0), {"label": label}, 0.5)["label"]
    assert set(given.tolist()) == {-1, 0}
    programs = {str(jax.make_jaxpr(one.denoise)(params, x, jnp.ones(8), {"label": label})) for one in (TASK, none)}
    assert len(programs) == 1


def test_options_that_do_not_fit_are_told(params: Any) -> None:
    smoke = config.load("edm/digits:smoke")
    unconditional = dataclasses.replace(smoke, workdir=None, task=dataclasses.replace(smoke.task, classes=0))
    for options, words in (({"levels": Levels(high=100.0)}, "levels.high"), ({"guidance": 1.0}, "guidance")):
        drawn = dataclasses.replace(smoke.samples, options={"nfe": 3, **options})
        with told(words):  # before the first step
            train(dataclasses.replace(unconditional, samples=drawn), quiet=True)
    with told("guidance", "no class"):
        zoo.load("edm-digits").sample(2, label="none", guidance=1.0)
    two = dataclasses.replace(TASK, network=dataclasses.replace(TASK.network, multiples=(1, 1)))
    fast = dataclasses.replace(DIT, attention="cudnn", dtype="bfloat16")
    for make, words in (
        (lambda: DenoiserSampling(nfe=8), ("nfe=8", "heun", "7 or 9")),
        (lambda: DenoiserSampling(levels=Levels(given=(2.0, 1.0))), ("nfe=35 takes 18 levels", "lists 2")),
        (lambda: DenoiserSampling(Tada(), 5, levels=Levels(rho=3.0)).plan((0.1, 1.0)), ("levels.rho=3", "flow")),
        (lambda: DenoiserSampling(Churn(high=100.0), 3).plan((0.002, 80.0)), ("113.1", "0.002 to 80", "solver.high")),
        (lambda: Guidance(1.0, 2.0, 1.0), ("guidance.low=2", "guidance.high=1")),
        (lambda: Guidance(low=1.0), ("guidance.weight",)),
        (lambda: Churn(low=2.0, high=1.0), ("solver.low=2", "solver.high=1")),
        (lambda: dataclasses.replace(two, image=5), ("task.image=5", "task.image=4")),
        (lambda: dataclasses.replace(two, network=dataclasses.replace(two.network, attention=(3,))), ("attention=3", "[4, 2]")),
        (lambda: UNet(width=48), ("task.network.width=48", "multiple of 32", "task.network.width=64")),
        (lambda: dataclasses.replace(DIT, image=5), ("task.network.patch=2", "task.image=5", "task.network.patch=1")),
        (lambda: dataclasses.replace(DIT, attention="cudnn"), ("task.attention='cudnn'", "task.dtype")),
        (lambda: jax.eval_shape(fast.init, jax.random.key(0)), ("task.attention='cudnn'", "task.attention=xla")),
    ):  # fmt: skip
        with told(*words):
            make()


# --- guidance -------------------------------------------------------------------------------------


def test_a_guided_mixture_is_the_closed_form_and_an_interval_costs_one_pass_elsewhere() -> None:
    """Two Gaussians of variance v at -1 and 1: the posterior mean of one, of both, and their combination."""
    v, calls = 0.1, {"alone": 0, "both": 0}

    def one(x: Any, sigma: Any) -> Any:
        return (v * x + sigma**2) / (v + sigma**2)

    def mixed(x: Any, sigma: Any) -> Any:
        other = (v * x - sigma**2) / (v + sigma**2)
        share = jax.nn.sigmoid(2 * x / (v + sigma**2))
        return share * one(x, sigma) + (1 - share) * other

    def alone(x: Any, sigma: Any) -> Any:
        jax.debug.callback(lambda: calls.__setitem__("alone", calls["alone"] + 1))
        return one(x, sigma)

    def both(x: Any, sigma: Any) -> Any:
        jax.debug.callback(lambda: calls.__setitem__("both", calls["both"] + 1))
        return one(x, sigma), mixed(x, sigma)

    x = jnp.linspace(-2, 2, 9)
    guided = jax.jit(Guidance(1.5, low=0.5, high=2.0).denoiser(alone, both))
    for sigma in (0.5, 1.0, 2.0, 2.1):
        inside = 0.5 < sigma <= 2.0
        plain = one(x, sigma)
        wanted = plain + 1.5 * (plain - mixed(x, sigma)) if inside else plain
        before = dict(calls)
        found = guided(x, jnp.float32(sigma))
        jax.effects_barrier()
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        assert {k: calls[k] - before[k] for k in calls} == {"alone": int(not inside), "both": int(inside)}
    assert Guidance(0.0).denoiser(alone, both) is alone


def test_functions_of_other_parametrisations_come_through_the_same_door() -> None:
    """The exact functions of N(0, 0.25): velocity, v and eps give the denoiser of all of them."""
    x, sigma = jnp.linspace(-3, 3, 7), jnp.float32(0.8)
    x0, root = x * 0.25 / (0.25 + sigma**2), 1 / jnp.sqrt(1 + sigma**2)
    n = (x - x0) / sigma
    for kind, value, scale in (
        ("flow", n - x0, 1 / (1 + sigma)),
        ("v", root * n - sigma * root * x0, root),
        ("eps", n, root),
        ("x0", x0, 1 / jnp.sqrt(0.25 + sigma**2)),
    ):

        def network(z: jax.Array, noise: jax.Array, value: Any = value, scale: Any = scale) -> jax.Array:
            np.testing.assert_allclose(z, x * scale, rtol=1e-6)
            return value

        np.testing.assert_allclose(Precondition(kind).denoise(network, x, sigma), x0, atol=1e-6)
