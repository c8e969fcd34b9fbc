"""The contract, for every shipped config: paper eleven gets these tests free."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest
from fresh import fresh

from zoo import config, dist, weights
from zoo.errors import UserError
from zoo.run import Run
from zoo.train import optim
from zoo.train.loop import train
from zoo.train.step import State, abstract_state, compile_step, make_sampler, sampler_spec, split

ROOT = Path(__file__).parent.parent
RUNS = [name for name, path in config.shipped().items() if isinstance(config.load(str(path)), Run)]


@functools.cache
def smoke(name: str) -> Run:
    return dataclasses.replace(config.load(f"{name}:smoke"), workdir=None)


def choices(value: Any, place: str = "") -> set[str]:
    """What of a task decides its program, choice by choice: not its rates, dtypes, sizes or frozen autoencoder."""
    if isinstance(value, dict):
        return {
            c
            for k, v in value.items()
            if k not in ("dtype", "levels")
            for c in choices(bool(v) if k == "vae" else v, f"{place}.{k}")
        }
    if isinstance(value, list):
        return {c for v in value for c in choices(v, place)}
    return {f"{place}={bool(value) if isinstance(value, int | float) else value}"}


def covering(names: list[str]) -> list[str]:
    """A few of the smoke configs that make every choice between them, the one with the most new ones first."""
    left = {name: choices(config.dump(smoke(name).task), type(smoke(name).task).__name__) for name in names}
    missing, taken = set().union(*left.values()), []
    while missing:
        taken.append(max(sorted(left), key=lambda name: len(left[name] & missing)))
        missing -= left[taken[-1]]
    return sorted(taken)


@functools.cache
def trained_kinds() -> set[type]:
    """Tasks that have something to train, by one config of each."""
    kinds = {type(smoke(name).task): smoke(name).task for name in RUNS}
    return {kind for kind, task in kinds.items() if weights.abstract(task).keys() - {*task.about.held}}


def trains(name: str) -> bool:
    return type(smoke(name).task) in trained_kinds()


CONFIGS = [name for name in RUNS if trains(name)]
SMOKES = covering(CONFIGS)


def test_there_are_configs() -> None:
    assert len(CONFIGS) >= 16
    assert {type(smoke(name).task) for name in SMOKES} == {type(smoke(name).task) for name in CONFIGS}


@pytest.mark.parametrize("name", RUNS)
def test_full_config_is_built_abstractly_and_survives_json(name: str) -> None:
    run = config.load(name)
    run.mesh.build(jax.devices()[:1])  # one GPU is enough to start any of them
    mesh = dist.Mesh(data=2, fsdp=4).abstract(8)
    with dist.use(mesh, run.rules):
        state = abstract_state(run.task, optim.build(run.optim, run.steps), mesh, run.ema)
    assert sum(x.size for x in jax.tree.leaves(state.params)) > 1000
    assert config.undump(config.dump(run)) == run
    assert run.workdir == "runs/" + name.replace("/", "-")
    assert config.describe(name)


@pytest.mark.parametrize("name", sorted({*CONFIGS} - {*SMOKES}))
def test_a_smoke_config_that_is_not_trained_has_a_loss_and_samples(name: str) -> None:
    run = smoke(name)
    params = weights.abstract(run.task)
    loss, _ = jax.eval_shape(run.task.loss, params, run.spec(), jax.random.key(0))
    assert loss.shape == ()
    batch = next(iter(run.batches()))
    assert {key: (x.shape, x.dtype) for key, x in run.spec().items()} == {
        k: (x.shape, x.dtype) for k, x in batch.items()
    }
    if run.samples.n:
        draw = make_sampler(run.task, run.samples.n, run.samples.options)
        assert jax.eval_shape(draw, params, jax.random.key(0), sampler_spec(run.task, run.samples.n))


@pytest.mark.parametrize("name", sorted({*RUNS} - {*CONFIGS}))
def test_what_is_made_of_trained_models_samples_and_says_that_it_does_not_train(name: str) -> None:
    run = smoke(name)
    label = {"label": np.zeros(4, np.int32)} if run.task.about.classes else None
    drawn = jax.jit(make_sampler(run.task, 4, {"nfe": 5}))(fresh(run.task), jax.random.key(0), label)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(drawn))
    with pytest.raises(UserError, match="nothing to train"):
        train(run, quiet=True)


@pytest.fixture(scope="module", params=SMOKES)
def trained(request: pytest.FixtureRequest) -> tuple[Run, State, list[dict[str, float]]]:
    """Four steps of a smoke run, with its sheet of samples: the compiled programs that all tests below share."""
    run = dataclasses.replace(smoke(request.param), steps=4, log_every=1)
    return run, *train(run, quiet=True)


def test_smoke_run_learns_something(trained: Any) -> None:
    run, state, history = trained
    assert len(history) == 4
    assert all(np.isfinite(h["loss"]) for h in history)
    assert int(state.step) == 4
    assert int(state.skipped) == 0
    batch = next(iter(run.batches()))
    for key, want in run.spec().items():
        assert batch[key].shape == want.shape
        assert batch[key].dtype == want.dtype


def test_every_trained_leaf_gets_a_gradient_and_held_ones_stay(trained: Any) -> None:
    run, state, _ = trained
    # The second moment of Adam is zero exactly where no step had a gradient. Four steps, since zero-initialised
    # heads and gates make the first ones blind.
    moments = [s.nu for s in jax.tree.leaves(state.opt, is_leaf=lambda s: hasattr(s, "nu")) if hasattr(s, "nu")]
    parts = [leaf for tree in moments for leaf in weights.flatten(tree).items()]
    found = {
        name: leaf for name, leaf in parts if hasattr(leaf, "shape")
    }  # one of several optimisers masks the others'
    params, held = split(run.task, state.params)
    assert set(found) == set(weights.flatten(params))
    for name, leaf in found.items():
        assert np.abs(leaf).max() > 0, name
    if held and not hasattr(run.task, "after_step"):
        mesh = run.mesh.build()
        with dist.use(mesh, run.rules):  # the same program as the run's, so equal to the bit
            init, *_ = compile_step(run.task, optim.build(run.optim, run.steps), mesh, ema=run.ema)
            chex.assert_trees_all_equal(held, split(run.task, init(run.seed).params)[1])


def test_samples_have_the_promised_shape(trained: Any) -> None:
    run, state, _ = trained
    if not hasattr(run.task, "sample"):
        pytest.skip("this task has no sampler")
    assert run.samples.n > 0, "the smoke run draws no samples"
    drawn = jax.eval_shape(make_sampler(run.task, 4, {}), state.params, jax.random.key(0), sampler_spec(run.task, 4))
    spec = run.task.spec(4)
    assert set(drawn) & set(spec)
    for key in set(drawn) & set(spec):
        assert drawn[key].shape == spec[key].shape
