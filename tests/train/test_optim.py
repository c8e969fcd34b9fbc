"""Optimisers: the schedule's values, what decays, what is clipped, and one optimiser per part of a model."""

from __future__ import annotations

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from mistakes import told

from zoo.train import optim
from zoo.train.optim import AdamW

PARAMS = {
    "net": {
        "kernel": jnp.full((3, 2), 2.0),
        "bias": jnp.full(2, 2.0),
        "norm": {"scale": jnp.full(2, 2.0)},
        "labels": {"table": jnp.full((4, 2), 2.0)},
    },
    "head": {"kernel": jnp.full((2, 2), 2.0)},
}


def zeros(like: Any = PARAMS) -> Any:
    return jax.tree.map(jnp.zeros_like, like)


def gradients(seed: int, like: Any = PARAMS) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), like)


def run(optimizer: optax.GradientTransformation, params: Any, steps: int = 3) -> Any:
    """Parameters after some steps of fixed random gradients."""
    state = optimizer.init(params)
    for k in range(steps):
        grads = gradients(k, PARAMS)
        updates, state = optimizer.update({key: grads[key] for key in params}, state, params)
        params = optax.apply_updates(params, updates)
    return params


# ---------------------------------------------------------------------------------------------------------- schedule


def test_the_schedule_warms_up_from_the_final_rate_and_returns_to_it() -> None:
    rate = AdamW(lr=1.0, final_lr=0.1, warmup=10).learning_rate(110)
    expected = {0: 0.1, 5: 0.55, 10: 1.0, 35: 0.1 + 0.45 * (1 + math.cos(math.pi / 4)), 60: 0.55, 110: 0.1, 500: 0.1}
    for n, value in expected.items():
        assert float(rate(n)) == pytest.approx(value, abs=1e-6), n
    assert all(float(rate(n)) < float(rate(n + 1)) for n in range(10))
    assert all(float(rate(n)) > float(rate(n + 1)) for n in range(10, 110))


def test_schedules_without_a_warm_up_or_without_an_end() -> None:
    assert float(AdamW(lr=1.0, final_lr=0.1).learning_rate(10)(0)) == pytest.approx(1.0)
    assert float(AdamW(lr=1.0, final_lr=0.1).learning_rate(10)(10)) == pytest.approx(0.1)
    constant = AdamW(lr=1.0, final_lr=0.1, warmup=2, schedule="constant").learning_rate(10)
    np.testing.assert_allclose([float(constant(n)) for n in (0, 1, 2, 3, 10, 99)], [0.1, 0.55, 1, 1, 1, 1], rtol=1e-6)
    # all of a run spent on warming up divides by no zero
    np.testing.assert_allclose(AdamW(lr=1.0, final_lr=0.5, warmup=4).learning_rate(4)(4), 1.0)


def test_the_first_step_goes_at_the_final_rate() -> None:
    """The rate is that of the 0-based step: Adam's first update is the rate itself, whatever the gradient."""
    params = {"kernel": jnp.ones(3)}
    optimizer = AdamW(lr=1.0, final_lr=0.25, warmup=4, weight_decay=0.0).build(100)
    state = optimizer.init(params)
    grads = {"kernel": jnp.array([3.0, -2.0, 1e-2])}
    first, state = optimizer.update(grads, state, params)
    np.testing.assert_allclose(first["kernel"], [-0.25, 0.25, -0.25], rtol=1e-5)
    second, _ = optimizer.update(grads, state, params)
    np.testing.assert_allclose(second["kernel"], [-0.4375, 0.4375, -0.4375], rtol=1e-4)


# -------------------------------------------------------------------------------------------------- decay and clipping


def moved(one: AdamW, params: Any = PARAMS) -> set[str]:
    """Names of the parameters that a step with zero gradient shrinks, each by rate x decay."""
    optimizer = one.build(10)
    updates, _ = optimizer.update(zeros(params), optimizer.init(params), params)
    leaves = jax.tree_util.tree_flatten_with_path(updates)[0]
    found = set()
    for path, leaf in leaves:
        if np.abs(leaf).max():
            np.testing.assert_allclose(leaf, -one.lr * one.weight_decay * 2.0, rtol=1e-5)
            found.add(jax.tree_util.keystr(path, simple=True, separator="/"))
    return found


def test_only_kernels_decay_unless_all_are_told_to() -> None:
    assert moved(AdamW(lr=0.1, weight_decay=0.5)) == {"net/kernel", "head/kernel"}
    assert len(moved(AdamW(lr=0.1, weight_decay=0.5, decay_all=True))) == 5
    assert moved(AdamW(lr=0.1, weight_decay=0.0, decay_all=True)) == set()


def test_an_optimiser_takes_parameters_boxed_with_logical_axes() -> None:
    boxed = jax.tree.map(lambda p: nn.Partitioned(p, (None,) * p.ndim), PARAMS)
    for one in (AdamW(), AdamW(decay_all=True)):
        for built in (one.build(10), optim.build({"net": one, "head": one}, 10)):
            plain, made = built.init(PARAMS), nn.meta.unbox(built.init(boxed))
            chex.assert_trees_all_equal(jax.tree.leaves(made), jax.tree.leaves(plain))


def test_clipping_bounds_the_norm_that_the_optimiser_sees() -> None:
    params = {"kernel": jnp.zeros(2)}
    for scale, first in ((1.0, [0.6, 0.8]), (0.1, [0.3, 0.4])):  # norms 5 and 0.5 against 1
        optimizer = AdamW(clip=1.0, b1=0.5).build(10)
        grads = {"kernel": scale * jnp.array([3.0, 4.0])}
        _, state = optimizer.update(grads, optimizer.init(params), params)
        (adam,) = [s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
        np.testing.assert_allclose(adam.mu["kernel"], 0.5 * np.array(first), rtol=1e-5)


# ------------------------------------------------------------------------------------------------ one optimiser a part


def test_a_dict_of_optimisers_equals_as_many_separate_ones() -> None:
    one = AdamW(lr=0.1, final_lr=0.01, warmup=2, clip=0.5, eps=0.1)
    other = AdamW(lr=0.3, b1=0.5, weight_decay=0.2, decay_all=True, clip=0.1, eps=0.1)
    together = run(optim.build({"net": one, "head": other}, 20), PARAMS)
    chex.assert_trees_all_equal(together["net"], run(one.build(20), {"net": PARAMS["net"]})["net"])
    chex.assert_trees_all_equal(together["head"], run(other.build(20), {"head": PARAMS["head"]})["head"])
    # each clips by its own norm: one optimiser over all, or the settings swapped, give something else
    swapped = run(optim.build({"net": other, "head": one}, 20), PARAMS)
    assert not np.allclose(together["head"]["kernel"], swapped["head"]["kernel"])
    joint = run(optim.build(other, 20), PARAMS)
    assert not np.allclose(together["head"]["kernel"], joint["head"]["kernel"])


def test_a_dict_of_optimisers_names_exactly_the_trained_parts() -> None:
    for names, words in ((["net"], "no entry for the parameters ['head']"), (["net", "head", "hat"], "names ['hat']")):
        with told(words):
            optim.build({name: AdamW() for name in names}, 10).init(PARAMS)
