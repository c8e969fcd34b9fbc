"""The train step: what one step changes, what it must not, and that its placement changes nothing."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import chex
import fresh
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from zoo import dist
from zoo.draws import Use, key_of, keys
from zoo.papers.tarflow import TarFlow
from zoo.task import About, Batch, Network, Params
from zoo.train.optim import AdamW
from zoo.train.step import State, Step, compile_step, init_state, make_train_step, split
from zoo.weights.layout import named_leaves

pytestmark = pytest.mark.devices8


@dataclass(frozen=True)
class Line:
    """Linear regression: 0.5 mean |x W + b - y|^2, whose gradient is x^T r / B and mean r."""

    noise: float = 0.0  # standard deviation of noise on x, drawn from the step's key
    bad: float = 0.0  # what the loss becomes where a batch says so; its gradients stay finite

    about = About(networks={"teacher": Network()}, buffers=("mean",))

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            "x": jax.ShapeDtypeStruct((batch, 4), jnp.float32),
            "y": jax.ShapeDtypeStruct((batch, 2), jnp.float32),
        }

    def init(self, rng: jax.Array) -> Params:
        kernel = jax.random.normal(rng, (4, 2))
        return {
            "net": {
                "kernel": nn.LogicallyPartitioned(kernel, ("embed", "mlp")),
                "bias": nn.LogicallyPartitioned(jnp.zeros(2), ("mlp",)),
            },
            "teacher": {"kernel": jnp.ones((4, 2))},
            "mean": jnp.zeros(4),
        }

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = batch["x"] + self.noise * jax.random.normal(rng, batch["x"].shape)
        # the teacher multiplies in by one, so that it would get a gradient if it were let
        residual = x @ (params["net"]["kernel"] * params["teacher"]["kernel"]) + params["net"]["bias"] - batch["y"]
        loss = 0.5 * jnp.square(residual).sum(1).mean()
        worst = jnp.abs(jax.lax.stop_gradient(batch["y"])).max()
        loss = loss + jnp.where(worst > 1e6, self.bad, 0.0)
        return loss, {"largest": jnp.abs(residual).max(), "x_mean": batch["x"].mean(0), "draw": jax.random.uniform(rng)}

    def after_step(self, params: Params, metrics: dict[str, jax.Array]) -> Params:
        return {**params, "mean": 0.9 * params["mean"] + 0.1 * metrics["x_mean"]}


def batch_of(n: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=(n, width)).astype(np.float32) for k, width in (("x", 4), ("y", 2))}


@functools.cache
def made(*, noise: float = 0.0, accumulate: int = 1) -> tuple[State, Step]:
    """A fresh state on one device and the jitted step, which leaves its input alone."""
    task, optimizer = Line(noise, bad=jnp.nan), AdamW(lr=0.1, final_lr=0.1).build(100)
    state = dist.unbox(init_state(task, optimizer, 0, 0.9))
    return state, jax.jit(make_train_step(task, optimizer, ema=0.9, accumulate=accumulate))


def data_of(state: State) -> dict[str, Any]:
    return {"params": state.params, "ema": state.ema, "opt": state.opt}


def equal(a: State, b: State) -> bool:
    """Whether parameters, average and optimiser state agree to the bit."""
    same = jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), data_of(a), data_of(b))
    return jax.tree.all(same)


# -------------------------------------------------------------------------------------------------------- one update


def test_a_step_is_gradient_descent_on_the_mean_loss() -> None:
    optimizer = optax.sgd(0.5)
    state = dist.unbox(init_state(Line(), optimizer, 0, 0.0))
    step = jax.jit(make_train_step(Line(), optimizer, ema=0.0))
    batch = batch_of()
    kernel = np.asarray(state.params["net"]["kernel"])
    residual = batch["x"] @ kernel - batch["y"]
    new, metrics = step(state, batch)
    gradient = batch["x"].T @ residual / 8
    np.testing.assert_allclose(new.params["net"]["kernel"], kernel - 0.5 * gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new.params["net"]["bias"], -0.5 * residual.mean(0), rtol=1e-5, atol=1e-6)
    assert float(metrics["loss"]) == pytest.approx(0.5 * float(np.square(residual).sum(1).mean()), rel=1e-6)
    norm = np.sqrt(np.square(gradient).sum() + np.square(residual.mean(0)).sum())
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    assert (int(new.step), int(new.skipped), int(new.streak)) == (1, 0, 0)
    assert new.ema == {}
    assert {k for k, v in metrics.items() if v.ndim} == set(), "arrays are for after_step, not for the log"


def test_accumulation_equals_the_large_batch() -> None:
    whole, step = made()
    parts, step_parts = made(accumulate=4)
    for k in range(3):
        whole, a = step(whole, batch_of(seed=k))
        parts, b = step_parts(parts, batch_of(seed=k))
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=name)
    chex.assert_trees_all_close(whole.params, parts.params, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(whole.ema, parts.ema, rtol=1e-4, atol=1e-6)


def test_micro_batches_draw_different_noise() -> None:
    """With one key for all parts, four equal rows would stay equal under noise."""
    same = {k: np.tile(v, (4, 1)) for k, v in batch_of(1).items()}
    one, step = made(noise=1.0)
    four, step_four = made(noise=1.0, accumulate=4)
    draws = [float(jax.random.uniform(r)) for r in jax.random.split(jax.random.fold_in(one.rng, 1), 4)]
    assert len(set(draws)) == 4
    _, metrics = step_four(four, same)
    assert float(metrics["draw"]) == pytest.approx(np.mean(draws), rel=1e-6)
    assert float(step(one, same)[1]["loss"]) != float(metrics["loss"])


@dataclass(frozen=True)
class Weak(Line):
    """A line with a parameter that starts as a Python number."""

    def init(self, rng: jax.Array) -> Params:
        params = super().init(rng)
        return {**params, "mean": jnp.full(4, 0.0), "number": 0.0}


def test_the_step_is_compiled_once_whatever_parameters_start_as() -> None:
    mesh = dist.Mesh(data=1).build(jax.devices()[:1])
    with dist.use(mesh):
        init, step, _ = compile_step(Weak(), AdamW().build(10), mesh)
        state = init(0)
        for k in range(2):
            state, _ = step(state, batch_of(seed=k))
    assert step._cache_size() == 1


# ------------------------------------------------------------------------------------------------------ skipped steps


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_batch_that_is_not_finite_changes_nothing_but_the_counters(accumulate: int) -> None:
    first, step = made(accumulate=accumulate)
    state, _ = step(first, batch_of())
    assert not equal(first, state)
    for value in (np.nan, np.inf, 1e7):  # the last: a loss that is NaN and gradients that are finite
        bad = batch_of(seed=1)
        bad["y"][3, 0] = value
        after, metrics = step(state, bad)
        assert equal(state, after)
        assert (int(after.step), int(after.skipped), int(after.streak)) == (2, 1, 1)
        assert (int(metrics["skipped"]), int(metrics["streak"])) == (1, 1)
        assert not np.isfinite(metrics["loss"])
        assert np.isfinite(metrics["grad_norm"]) == (value == 1e7)
        chex.assert_trees_all_equal(jax.random.key_data(state.rng), jax.random.key_data(after.rng))


def test_a_good_step_ends_the_streak_and_keeps_the_count() -> None:
    state, step = made()
    bad = {**batch_of(), "y": np.full((8, 2), np.nan, np.float32)}
    seen = []
    for good in (True, False, False, True, False):
        before = state
        state, _ = step(state, batch_of() if good else bad)
        seen.append((int(state.skipped), int(state.streak)))
        assert equal(before, state) is not good
    assert seen == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]
    chex.assert_tree_all_finite(data_of(state))


# ------------------------------------------------------------------------------------------------- average, held keys


def test_the_average_warms_up_and_leaves_out_held_keys() -> None:
    state, step = made()
    assert set(state.ema) == {"net"}
    expected = np.asarray(state.ema["net"]["kernel"])
    decays = []
    for n in range(90):
        state, _ = step(state, batch_of(seed=n))
        decays.append(min(0.9, (1 + n) / (10 + n)))
        expected = decays[-1] * expected + (1 - decays[-1]) * np.asarray(state.params["net"]["kernel"])
    assert decays[0] == pytest.approx(0.1)
    assert decays[79] < 0.9 == decays[-1], "both branches of the minimum are seen"
    np.testing.assert_allclose(state.ema["net"]["kernel"], expected, rtol=1e-4, atol=1e-6)
    assert not np.allclose(state.ema["net"]["kernel"], state.params["net"]["kernel"], atol=1e-4)


def test_held_keys_get_no_gradient_and_no_optimiser_state() -> None:
    state, step = made()
    trained, held = split(Line(), state.params)
    assert (set(trained), set(held)) == ({"net"}, {"teacher", "mean"})
    names = [n for n in named_leaves(state.opt) if "kernel" in n or "bias" in n or "mean" in n]
    assert len(names) == 4, "first and second moments of two parameters"
    assert all("net" in n for n in names)
    after, _ = step(state, batch_of())
    chex.assert_trees_all_equal(after.params["teacher"], state.params["teacher"])
    assert (np.asarray(after.params["net"]["kernel"]) != np.asarray(state.params["net"]["kernel"])).all()


@pytest.mark.parametrize("accumulate", [1, 4])
def test_after_step_writes_held_keys_from_the_mean_over_micro_batches(accumulate: int) -> None:
    state, step = made(accumulate=accumulate)
    batch = batch_of()
    state, metrics = step(state, batch)
    assert "x_mean" not in metrics
    np.testing.assert_allclose(state.params["mean"], 0.1 * np.asarray(batch["x"]).mean(0), rtol=1e-5, atol=1e-7)


# ----------------------------------------------------------------------------------------------------- keys and seeds


def test_parameters_steps_looks_and_samples_of_all_seeds_draw_from_keys_of_their_own() -> None:
    """The keys of neighbouring seeds, and those that a use splits or folds its own into: no two are the same."""
    bases = [key_of(seed, use) for seed in range(4) for use in Use]
    split = jax.vmap(lambda base: jax.random.split(base, 64))(jnp.stack(bases))
    used = np.concatenate(
        [jax.random.key_data(k).reshape(-1, 2) for k in (*bases, split, keys(0, np.arange(64), attempt=1))]
    )
    assert len(np.unique(used, axis=0)) == len(used)
    state = jax.jit(lambda seed: dist.unbox(init_state(Line(), optax.sgd(1.0), seed, 0.0)))
    one, other = state(np.uint32(0)), state(np.uint32(2**32 - 1))
    chex.assert_trees_all_equal(one.params, dist.unbox(Line().init(key_of(0, Use.PARAMETERS))))
    assert one.rng == key_of(0, Use.STEPS) != other.rng


def test_one_seed_gives_one_run_and_another_a_different_one() -> None:
    task, optimizer = Line(noise=0.5), AdamW(lr=0.1).build(10)
    mesh = dist.Mesh(data=1).build(jax.devices()[:1])
    with dist.use(mesh):
        init, step, _ = compile_step(task, optimizer, mesh, ema=0.9)

        def run(seed: int) -> State:
            state = init(seed)
            for k in range(3):
                state, _ = step(state, batch_of(seed=k))
            return state

        # the average starts as a copy of the parameters: sharing their memory would donate one buffer twice
        begun = init(0)
        chex.assert_trees_all_equal(begun.params["net"], begun.ema["net"])
        kernels = [tree["net"]["kernel"].addressable_shards[0].data for tree in (begun.params, begun.ema)]
        assert kernels[0].unsafe_buffer_pointer() != kernels[1].unsafe_buffer_pointer()
        a, b, c = run(0), run(0), run(1)
        assert equal(a, b)
        chex.assert_trees_all_equal(jax.random.key_data(a.rng), jax.random.key_data(b.rng))
        assert not equal(a, c)
        # every seed that the data takes makes a state, and its own one
        big = [init(seed).params["net"]["kernel"] for seed in (2**31 - 1, 2**31, 2**32 - 1)]
        assert len({np.asarray(k).tobytes() for k in big}) == 3


def test_the_key_depends_on_the_step_alone() -> None:
    """Whatever happened before: two histories with one step number draw the same."""
    state, step = made(noise=1.0)
    nan = {**batch_of(), "y": np.full((8, 2), np.nan, np.float32)}
    one, other = state, state
    draws = []
    for k in range(3):
        one, a = step(one, batch_of(seed=k))
        other, b = step(other, nan)
        assert float(a["draw"]) == float(b["draw"])
        draws.append(float(a["draw"]))
    assert len(set(draws)) == 3
    moved = state.replace(step=jnp.int32(2))
    assert float(step(moved, batch_of(seed=7))[1]["draw"]) == draws[2]


# --------------------------------------------------------------------------------------------------------- placement


FLOW = TarFlow(image=4, channels=1, patch=2, width=8, depth=1, blocks=1, head_dim=4)
ONE = dist.Mesh(data=1)


@pytest.fixture(scope="module")
def flow() -> tuple[State, dict[str, Any]]:
    """A state on the host with parameters away from their start, where every output is constant; and a batch."""
    abstract = jax.eval_shape(lambda: dist.unbox(init_state(FLOW, optax.sgd(1.0), 0, 0.0)))
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract.replace(rng=None))
    image = np.random.default_rng(0).uniform(-1, 1, (16, 4, 4, 1)).astype(np.float32)
    return state.replace(params=jax.device_get(fresh.noise(FLOW, 0.2))), {"image": image}


def test_the_fresh_states_of_other_tests_are_those_of_the_program() -> None:
    mesh = dist.Mesh(data=2, fsdp=4).build()
    with dist.use(mesh):
        optimizer = AdamW().build(10)
        init, _, abstract = compile_step(FLOW, optimizer, mesh, ema=0.9)
        other = fresh.placed(
            lambda seed: dist.unbox(init_state(FLOW, optimizer, seed, 0.9)),
            jax.tree.map(lambda x: x.sharding, abstract),
        )
        one, two = init(7), other(np.uint32(7))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
            assert a.sharding == b.sharding
        chex.assert_trees_all_equal(one.rng, two.rng)
        rounding = 0.0 if jax.__version_info__ >= (0, 12) else 1e-6  # JAX 0.10 rounds the two otherwise
        chex.assert_trees_all_close(one.replace(rng=None), two.replace(rng=None), rtol=rounding)


def descended(flow: tuple[State, dict[str, Any]], mesh: dist.Mesh, accumulate: int) -> tuple[float, Params]:
    """The loss, and the parameters after a step of gradient descent: what they lost is the gradient."""
    built = mesh.build(jax.devices()[: 1 if mesh is ONE else 8])
    with dist.use(built):
        _, step, abstract = compile_step(FLOW, optax.sgd(1.0), built, accumulate=accumulate)
        begun = flow[0].replace(rng=jax.random.key(1))  # a step gives away what it is given
        state = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), begun, abstract)
        given, (state, metrics) = state, step(state, jax.device_put(flow[1], dist.batch_sharding(built)))
        # memory for two states would halve the largest model
        assert [n for n, x in named_leaves(given.params).items() if not x.is_deleted()] == []
    return float(metrics["loss"]), jax.device_get(state.params)


@pytest.mark.parametrize(
    "mesh, accumulate", [(dist.Mesh(fsdp=2, tensor=2), 1), (dist.Mesh(data=1, fsdp=2, sequence=2, tensor=2), 2)]
)
def test_a_flow_descends_on_a_mesh_as_alone(flow: Any, mesh: dist.Mesh, accumulate: int) -> None:
    loss, params = descended(flow, mesh, accumulate)
    expected, single = descended(flow, ONE, accumulate)
    assert loss == pytest.approx(expected, rel=1e-6)
    moved = max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(flow[0].params), jax.tree.leaves(single)))
    assert 0.01 < moved < 10
    chex.assert_trees_all_close(params, single, rtol=1e-6, atol=1e-6)
