"""How hard blocks are to invert by sweeps: the statistics against numpy, and that strategies are what was timed."""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo import weights
from zoo.data.pipeline import epoch
from zoo.data.synthetic import Synthetic
from zoo.errors import UserError
from zoo.flows.inverse import Jacobi, invert
from zoo.flows.stack import apply
from zoo.metrics import convergence
from zoo.metrics.convergence import Convergence
from zoo.nn.embed import patchify
from zoo.papers.starflow import StarFlow
from zoo.papers.tarflow import TarFlow

TAR = TarFlow(image=6, channels=1, patch=2, width=8, depth=1, blocks=2, head_dim=8, classes=2, scan=False)
SHIFTS = TarFlow(image=4, channels=1, patch=2, width=8, depth=1, blocks=2, head_dim=8, scale=False, scan=False)
STAR = StarFlow(
    latent=(2, 3), channels=2, width=20, depths=(1, 1), head_dim=20, classes=2, reach=3.0, condition="all", scan=False
)
RNG = jax.random.key(4)
DATA = Synthetic(examples=53)


@cache
def randomised(task: Any) -> Any:
    """Parameters whose every number matters."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), weights.abstract(task))


def first_rows(task: Any, n: int) -> Any:
    return next(iter(epoch(DATA, n, split="train", spec=task.spec(n), limit=n)))[0]


@cache
def programs(task: Any) -> tuple[Any, Any]:
    """(params, rows, key) -> states of the flow and what blocks see; (i, params, u, seen) -> log-scale and shift of block i."""

    def flow(params: Any, rows: Any, rng: jax.Array) -> tuple[Any, Any]:
        if isinstance(task, StarFlow):
            draw, noise = jax.random.split(rng)
            x, _ = task.in_tokens(task.add_noise(noise, task.clean(params, rows, draw)))
            seen = task.conditions(params, rows)
        else:
            x, seen = patchify(task.add_noise(rng, rows["image"]), task.patch), rows.get("label")
        return task.stack.flow(params, x, seen)[0], seen

    network = lambda i, params, *inputs: apply(task.stack.nets[i], params[f"block{i}"], *inputs)[:2]  # noqa: E731
    return jax.jit(flow), jax.jit(network, static_argnums=0)


def passes(task: Any, params: Any, rows: Any, rng: jax.Array) -> list[Any]:
    """Of every block: u, v and how the network makes scale and shift of a guess, without steppers and caches."""
    flow, network = programs(task)
    states, seen = flow(params, rows, rng)
    states, odd = [np.asarray(x, np.float64) for x in states], 0 if isinstance(task, StarFlow) else 1
    turn = lambda x, i: x[:, ::-1] if i % 2 == odd else x  # noqa: E731

    def affine(i: int, u: Any) -> tuple[np.ndarray, np.ndarray]:
        a, b = (np.asarray(x, np.float64) for x in network(i, params, np.float32(u), seen))
        return np.exp(a), b

    return [(turn(states[i], i), turn(states[i + 1], i), partial(affine, i)) for i in range(task.blocks)]


def by_hand(task: Any, params: Any, batches: list[Any]) -> list[dict[str, float]]:
    """The formulas of the docstring; batches of (rows, how many of them are real, key)."""
    gone = [(n, passes(task, params, rows, rng)) for rows, n, rng in batches]
    found = []
    for i in range(task.blocks):
        drift, guesses, count = 0.0, [0.0, 0.0], sum(n for n, _ in gone)
        for n, blocks in gone:
            u, v, affine = blocks[i]
            zeros = np.zeros_like(v)
            if not isinstance(task, StarFlow):
                zeros[:, 0] = v[:, 0]  # known: it passes unchanged
            drift = drift + (u / affine(u)[0])[:n].sum(0) / count
            for k, guess in enumerate((v, zeros)):
                scale, shift = affine(guess)
                guesses[k] = guesses[k] + (v * scale + shift - u)[:n].sum(0) / count
        kernel = np.asarray(params[f"block{i}"]["out"]["kernel"], np.float64)
        parts = (
            [kernel[:, : task.dims], kernel[:, task.dims :]] if getattr(task, "scale", True) else [0 * kernel, kernel]
        )
        norm, w_a, w_b, igm_v, igm_zeros = (np.linalg.svd(x)[1][0] for x in (drift, *parts, *guesses))
        found.append({"crm": norm * w_a + w_b, "igm_v": igm_v, "igm_zeros": igm_zeros})
    total = sum(b["crm"] for b in found)
    return [{**b, "crm": b["crm"] / total} for b in found]


def compare(found: list[dict[str, float]], want: list[dict[str, float]]) -> None:
    assert len(found) == len(want)
    for i, (one, other) in enumerate(zip(found, want)):
        assert one.keys() == other.keys()
        for key, value in other.items():
            assert one[key] == pytest.approx(value, rel=1e-3), (i, key)
    assert sum(b["crm"] for b in found) == pytest.approx(1)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Convergence, "_timed", lambda self, *inputs: {"start": inputs[-1]})
        return Convergence(samples=53, batches=(1, 4))(TAR, randomised(TAR), DATA, RNG)


def test_statistics_follow_from_their_formulas(found: dict[str, Any]) -> None:
    """Of 53 examples in batches of 4 the last batch is filled up with copies, which do not count."""
    params, batches = randomised(TAR), []
    for k, (rows, n) in enumerate(epoch(DATA, 4, split="train", spec=TAR.spec(4), limit=53)):
        batches.append((rows, n, jax.random.fold_in(RNG, 4 * k)))
    assert [n for _, n, _ in batches] == [4] * 13 + [1]
    compare(found["blocks"], by_hand(TAR, params, batches))
    assert (found["samples"], found["split"]) == (53, "train")


@pytest.mark.parametrize("task", [SHIFTS, STAR], ids=["shifts", "starflow"])
def test_statistics_of_shifts_alone_and_of_a_start_token(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Convergence, "_strategy", lambda *_: {})
    params = randomised(task)
    metric = Convergence(samples=4)
    want = by_hand(task, params, [(first_rows(task, 4), 4, jax.random.fold_in(RNG, 0))])
    compare(metric(task, params, DATA, RNG)["blocks"], want)
    if task is SHIFTS:
        other = Convergence(samples=4, split="test")(task, params, DATA, RNG)["blocks"]
        assert abs(other[0]["igm_v"] - want[0]["igm_v"]) > 1e-3


def test_a_block_that_changes_nothing_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Convergence, "_strategy", lambda *_: {})
    params = randomised(TAR)
    still = {**params, "block0": {**params["block0"], "out": jax.tree.map(jnp.zeros_like, params["block0"]["out"])}}
    metric = Convergence(samples=4)
    first, second = metric(TAR, still, DATA, RNG)["blocks"]
    assert (first["crm"], second["crm"]) == (0, 1)
    assert first["igm_v"] == pytest.approx(0, abs=1e-6)
    assert second["igm_v"] > 0.1
    none = {**still, "block1": {**params["block1"], "out": still["block0"]["out"]}}
    assert [b["crm"] for b in metric(TAR, none, DATA, RNG)["blocks"]] == [0, 0]  # as in a model that is not trained


def test_a_guess_that_overflows_is_infinitely_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []
    monkeypatch.setattr(Convergence, "_strategy", lambda *inputs: starts.append(inputs[-1]))
    params = randomised(TAR)
    bias = params["block1"]["out"]["bias"].at[: TAR.dims].set(-60.0)  # of the log-scale: v is u times exp(60)
    steep = {**params, "block1": {**params["block1"], "out": {**params["block1"]["out"], "bias": bias}}}
    _, block = Convergence(samples=4)(TAR, steep, DATA, RNG)["blocks"]
    assert block["igm_v"] is None  # JSON has no infinity
    assert np.isfinite(block["igm_zeros"])
    assert starts[0][1] == "zeros"


def test_there_is_a_strategy_for_each_batch_size(found: dict[str, Any]) -> None:
    starts = ["v" if b["igm_v"] <= b["igm_zeros"] else "zeros" for b in found["blocks"]]
    same = {"device": jax.devices()[0].device_kind, "guidance": 0.0, "tol": 1e-5, "start": starts}
    assert found["strategies"] == [{"batch": n, "devices": devices, **same} for n, devices in ((1, 1), (4, 2))]


def test_what_is_timed_inverts_each_block_from_where_a_sampler_does(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, timed = 2.0, convergence._medians
    params, rows, ways = randomised(TAR), first_rows(TAR, 4), []

    def medians(calls: Any, rounds: int) -> list[float]:
        assert rounds == 7
        assert min(timed(calls, 1)) > 0
        ways.append([call()[0] for call in calls])
        return [1.0, 0.5]

    monkeypatch.setattr(convergence, "_medians", medians)
    monkeypatch.setattr(Convergence, "_statistics", lambda *_: [{"igm_v": 2.0, "igm_zeros": 1.0}] * 2)
    metric = Convergence(batches=(4,), modules=(1, 99), rounds=7, guidance=weight)  # 99 modules are more than tokens
    (strategy,) = metric(TAR, params, DATA, RNG)["strategies"]
    assert (strategy["guidance"], strategy["start"], strategy["modules"]) == (weight, ["zeros", "zeros"], [1, 1])
    Jacobi(tuple(strategy["modules"]), tol=strategy["tol"], start=tuple(strategy["start"]))
    for block in strategy["blocks"]:
        sweeps = block.pop("modules_1_sweeps")
        assert block == {"modules": 1, "start": "zeros", "sequential_ms": 1e3, "modules_1_ms": 500}
        assert 2 <= sweeps <= TAR.tokens - 1

    (u, *_), (_, z, _) = passes(TAR, params, rows, RNG)

    @jax.jit
    def guided(params: Any) -> Any:
        chain = TAR.chain(params, rows, RNG, guidance=weight)[1]
        states = invert(chain, chain.order(jnp.asarray(z, jnp.float32), 1)).states
        return [chain.order(states[-1], 0), chain.order(states[-2], 1)]

    want = guided(params)
    assert np.abs(want[0] - u).max() > 1e-4
    for found, u in zip(ways, want, strict=True):
        assert len(found) == 2
        for one in found:
            np.testing.assert_allclose(one, u, atol=1e-4)


@pytest.mark.parametrize(
    ("seconds", "modules"),
    [([1.0, 0.5, 0.4], 3), ([1.0, 0.4, 0.5], 1), ([1.0, 0.96, 2.0], 0), ([1.0, 0.94, 2.0], 1), ([1.0, 2.0, 3.0], 0)],
)
def test_sweeps_are_chosen_where_they_are_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, seconds: list[float], modules: int
) -> None:
    monkeypatch.setattr(convergence, "_medians", lambda calls, rounds: seconds[: len(calls)])
    monkeypatch.setattr(jax, "jit", lambda f: (lambda *_: (None, np.ones(2, int))) if hasattr(f, "args") else quick)
    states = [jnp.zeros((2, TAR.tokens, TAR.dims))] * 2
    quick = lambda *_: states  # noqa: E731
    found = Convergence(modules=(1, 3))._timed(TAR, None, None, RNG, 2, ["v", "zeros"])
    assert found["modules"] == [modules] * 2
    assert found["start"] == ["v", "zeros"]
    assert found["blocks"][0]["modules_3_ms"] == pytest.approx(1e3 * seconds[2])


@dataclass(frozen=True)
class Nothing(Synthetic):
    """A split without examples."""

    def source(self, split: str, spec: Any = None) -> Any:
        source = super().source(split, spec)
        empty = type("Empty", (type(source),), {"__len__": lambda _: 0})
        return empty(self, split, dict(spec))


def test_a_split_without_examples_is_said() -> None:
    with pytest.raises(UserError, match=r"split='valid' of the metric convergence has no examples; choose another"):
        Convergence(split="valid")(TAR, randomised(TAR), Nothing(), RNG)
