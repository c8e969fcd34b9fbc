"""The contract, for one shipped config of every task: paper eleven gets these tests free. `test_configs.py` traces the others."""

import dataclasses
from typing import Any

import chex
import jax
import numpy as np
import pytest
from smokes import CONFIGS, KINDS, smoke

from zoo import dist, weights
from zoo.run import Run
from zoo.train import optim
from zoo.train.loop import train
from zoo.train.step import State, compile_step, make_sampler, sampler_spec, split


def test_there_are_configs() -> None:
    assert len(CONFIGS) >= 16
    assert KINDS.keys() == {type(smoke(name).task) for name in CONFIGS}


@pytest.fixture(scope="module", params=KINDS.values())
def trained(request: pytest.FixtureRequest) -> tuple[Run, State, list[dict[str, float]]]:
    """Four steps of a smoke run, its samples and metrics: the compiled programs that all tests below share."""
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
    if held := {key: leaf for key, leaf in held.items() if key not in run.task.about.buffers}:
        mesh = run.mesh.build()
        with dist.use(mesh, run.rules):  # the same program as the run's, so equal to the bit
            init, *_ = compile_step(run.task, optim.build(run.optim, run.steps), mesh, ema=run.ema)
            begun = init(run.seed).params
            chex.assert_trees_all_equal(held, {key: begun[key] for key in held})


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
