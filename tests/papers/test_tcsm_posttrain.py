"""TCSM after pre-training: where texts, laws and rewards can be listed, and what is refused."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tabular
from fresh import noise
from mistakes import told
from tabular import CLEAN, NOISY, L, Tabular, V, kl, law

from zoo import config, dist, weights
from zoo.data.text.pairs import Compared
from zoo.data.text.tokens import Docstrings
from zoo.papers.tarflow_lm import DiscreteLM
from zoo.papers.tcsm import Tcsm, TcsmDistill, TcsmPreference, TcsmReward, TcsmRewardModel
from zoo.rewards import LetterShare, rewarded
from zoo.run import Run
from zoo.task import About
from zoo.train.loop import train
from zoo.train.optim import AdamW
from zoo.train.step import compile_step, init_state, make_train_step

RNG = np.random.default_rng(1)
P = law()
R = RNG.normal(size=len(CLEAN)).astype(np.float32)
BETA = 0.5
GOAL = P * np.exp(R / BETA) / (P * np.exp(R / BETA)).sum()
SIZE: dict[str, Any] = {"vocab": V, "length": L}
SMALL: dict[str, Any] = {**SIZE, "width": 8, "depth": 1, "head_dim": 8, "scan": False}


def denoiser(p: np.ndarray) -> dict[str, Any]:
    """Parameters of the exact denoiser of a law."""
    return tabular.net(np.log(np.maximum(tabular.marginals(tabular.posterior(p, 0.5, True)[1]), 1e-30)))


def sampled(net: Any, run: int = 0, steps: int = 64) -> np.ndarray:
    """The law of the texts that a sampler draws, exactly, of one of several runs."""
    each = np.exp(np.asarray(jax.nn.log_softmax(net["table"].reshape(-1, len(NOISY), L, V)[run]), np.float64))
    each = np.where((NOISY == V)[..., None], each, NOISY[..., None] == np.arange(V))  # what is known stays
    return tabular.pruned(tabular.drawn(lambda _: each, np.linspace(1, 0, steps + 1), True))


@dataclass(frozen=True)
class Tilted(TcsmReward, Tabular):
    pass


@dataclass(frozen=True)
class Preferred(TcsmPreference, Tabular):
    pass


@dataclass(frozen=True)
class Distilled(TcsmDistill, Tabular):
    pass


@dataclass(frozen=True)
class Joint:
    """A language model of any law of three tokens."""

    about = About(vocabulary=V)

    def spec(self, batch: int) -> Any:
        return {"tokens": jax.ShapeDtypeStruct((batch, L), jnp.int32)}

    def init(self, rng: jax.Array) -> Any:
        return {"law": jnp.asarray(P, jnp.float32)}

    def predict(self, params: Any, tokens: jax.Array) -> jax.Array:
        rows = jax.nn.one_hot(tokens, V) if tokens.ndim == 2 else tokens
        joint = params["law"].reshape(V, V, V)
        two, one = joint.sum(2), joint.sum((1, 2))
        first = jnp.broadcast_to(jnp.log(one), (len(rows), V))
        second = rows[:, 0] @ jnp.log(two / one[:, None])
        third = jnp.einsum("na,nb,abc->nc", rows[:, 0], rows[:, 1], jnp.log(joint / two[..., None]))
        return jnp.stack([first, second, third], 1)


def drawn(p: np.ndarray, *shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).choice(len(p), shape, p=p)


def trained(task: Any, params: Any, batches: Any, lr: float) -> Any:
    """Parameters after all steps of each of several runs: batches [runs, steps, B, ...]."""
    count = next(iter(batches.values())).shape[1]
    optimizer = optax.adam(optax.cosine_decay_schedule(lr, count))
    step = make_train_step(task, optimizer)

    def run(batches: Any) -> Any:
        state = dist.unbox(init_state(task, optimizer, 0, 0.0))
        state, _ = jax.lax.scan(step, state.replace(params={**state.params, **params}), batches)
        return state.params

    return jax.jit(jax.vmap(run))(batches)


# --- rewards --------------------------------------------------------------------------------------


def test_texts_are_weighted_over_the_mean_of_all_batches_so_far() -> None:
    task = Tilted(**SIZE, beta=BETA, clip=3.0)
    params, rng = task.init(jax.random.key(0)), np.random.default_rng(2)
    seen, used = [], []
    for step in range(8):
        reward = rng.normal(-70, 1, 4).astype(np.float32)  # of a size that no exponential has room for
        batch = {"tokens": jnp.zeros((4, L), jnp.int32), "reward": jnp.asarray(reward)}
        target, metrics = task.target(params, batch, batch["tokens"], jax.random.key(0))
        seen.append(np.exp(reward.astype(np.float64) / BETA + 140))
        weight = np.ones(4) if step < 2 else np.minimum(seen[-1] / np.mean(seen[1:-1]), 3)
        np.testing.assert_allclose(target.weight, weight, rtol=2e-4)
        if step > 2:
            np.testing.assert_allclose(metrics["ess"], np.mean(used) ** 2 / np.mean(np.square(used)), rtol=2e-4)
        used += [weight] * (step > 1)
        parts = ({key: x[i::2] for key, x in batch.items()} for i in (0, 1))
        halves = [task.target(params, part, None, None)[1]["seen"] for part in parts]
        np.testing.assert_allclose(np.mean(halves, 0), metrics["seen"], rtol=1e-5)  # as micro-batches are put together
        params = task.after_step(params, metrics)
    assert np.square(used).max() == 9
    assert task.about.held == ("norm",)


def test_a_reward_tilts_the_law_and_one_that_is_shuffled_over_the_texts_does_not() -> None:
    task = Tilted(**SIZE, beta=BETA, clip=1e3)
    steps, batch = 1500, 256
    free, given = drawn(P, steps, batch), drawn(P, 4000, seed=2)
    shuffled = np.random.default_rng(3).permutation(R[given])  # whose text is another's
    rows = np.random.default_rng(4).integers(0, len(given), (steps, batch))
    batches = {
        "tokens": np.stack([CLEAN[free], CLEAN[given[rows]]]).astype(np.int32),
        "reward": np.stack([R[free], shuffled[rows]]),
    }
    base = {"net": denoiser(P)}
    found = trained(task, base, batches, 0.02)
    best, worst = kl(GOAL, sampled(denoiser(GOAL))), kl(GOAL, P)
    assert worst > 0.5
    assert kl(GOAL, sampled(found["net"], 0)) < 1.5 * best + 0.01 * worst
    moved = (sampled(found["net"], 1) - sampled(base["net"])) @ R
    weights = np.exp(shuffled / BETA)
    error = np.sqrt(P @ R**2 - (P @ R) ** 2) * np.sqrt((weights**2).sum()) / weights.sum()
    assert abs(moved) < 2 * error < 0.2 * (GOAL - P) @ R


# --- preferences ----------------------------------------------------------------------------------


def test_the_reward_of_a_denoiser_is_beta_times_its_bound_over_the_reference() -> None:
    """Of exact denoisers the bound is log p of each text; what both networks share cancels."""
    task = Preferred(**SIZE, beta=2.0, draws=256)
    params = {"net": denoiser(GOAL), "reference": denoiser(P)}
    texts = jnp.tile(CLEAN.astype(np.int32), (2, 16, 1))
    rewards = jax.jit(task.rewards)
    found = rewards(params, texts, jax.random.key(0))
    np.testing.assert_array_equal(found[0], found[1])  # two texts of a row see the same noise
    each = np.asarray(found[0], np.float64).reshape(16, -1)
    off, error = each.mean(0) - 2 * np.log(GOAL / P), each.std(0, ddof=1) / 4
    assert (np.abs(off) < 5 * error + 1e-3).all()
    assert np.median(error) < 0.15
    assert np.abs(rewards({**params, "net": params["reference"]}, texts, jax.random.key(1))).max() == 0
    with told("task.draws=3", "from 4"):
        Preferred(draws=3)


def test_preferences_tilt_a_denoiser_towards_their_reward() -> None:
    """An exact optimum ends at 3 % of the divergence, not at none; noise of the bounds leaves more."""
    task = Preferred(**SIZE, draws=16)
    pairs = drawn(P, 800, 64, 2)
    first = np.random.default_rng(5).logistic(size=pairs.shape[:2]) < (R[pairs[..., 0]] - R[pairs[..., 1]]) / BETA
    pairs = np.where(first[..., None], pairs, pairs[..., ::-1])
    batches = {key: CLEAN[pairs[..., i]].astype(np.int32)[None] for i, key in enumerate(("tokens", "rejected"))}
    base = denoiser(P)
    found = trained(task, {"net": base, "reference": base}, batches, 0.02)
    np.testing.assert_array_equal(found["reference"]["table"][0], base["table"])
    after = sampled(found["net"])
    assert kl(GOAL, after) < 0.1 * kl(GOAL, P)
    assert (after - P) @ R > 0.8 * (GOAL - P) @ R


def test_a_reward_model_learns_who_is_chosen() -> None:
    task = TcsmRewardModel(**{**SMALL, "vocab": 27, "length": 16, "width": 16})
    source = Compared(Docstrings(), LetterShare(), scale=0.02).source("train", task.spec(1))
    rows = [source[i] for i in range(60 * 64)]
    batches = {key: np.stack([row[key] for row in rows]).reshape(1, 60, 64, -1) for key in task.spec(1)}
    params = jax.tree.map(lambda x: x[0], trained(task, noise(task), batches, 0.02))
    texts = np.stack([source[i]["tokens"] for i in range(4000, 4500)])
    rewards = task.logits(params, {"tokens": texts})
    assert rewards.shape == (500, 1)
    assert np.corrcoef(rewards[:, 0], rewarded(LetterShare(), texts, None))[0, 1] > 0.8


# --- distillation ---------------------------------------------------------------------------------


def test_the_target_is_the_teachers_conditional_at_noisy_positions() -> None:
    task = Distilled(**SIZE, teacher=Joint(), candidates=V, positions=1)
    params = task.init(jax.random.key(0))
    texts, joint = CLEAN.astype(np.int32), P.reshape(V, V, V)
    xt = np.where(np.arange(L) == 1, np.int32(V), texts)
    for proposals, k in (("left", V), ("taylor", V), ("left", 2)):
        own = dataclasses.replace(task, proposals=proposals, candidates=k)
        run = jax.jit(lambda xt, own=own: own.target(params, {"tokens": texts}, xt, jax.random.key(1))[0])
        target = jax.device_get(run(xt))
        share = np.exp(target.log)
        np.testing.assert_array_equal(target.ids[:, :, 0], CLEAN)
        np.testing.assert_array_equal(share[:, [0, 2], 0], 1)  # which are known
        for text, ids, given in zip(CLEAN, target.ids[:, 1], share[:, 1]):
            wanted = joint[text[0], ids, text[2]]
            np.testing.assert_allclose(given, wanted / wanted.sum(), rtol=1e-4)
            left = joint[text[0]].sum(1)
            others = np.delete(np.arange(V), text[1])
            assert k == V or ids[1] == others[left[others].argmax()]


def test_a_teacher_tells_more_of_few_texts_than_they_do_themselves() -> None:
    sizes, runs = (30, 100), 3
    sets = [CLEAN[drawn(P, n, seed=10 + i)] for n in sizes for i in range(runs)]
    rng = np.random.default_rng(6)
    batches = {"tokens": np.stack([own[rng.integers(0, len(own), (800, 64))] for own in sets]).astype(np.int32)}
    soft = trained(Distilled(**SIZE, teacher=Joint(), candidates=V, positions=L), {}, batches, 0.05)
    hard = trained(Tabular(**SIZE), {}, batches, 0.05)
    ours, theirs = (
        np.reshape([kl(P, sampled(params["net"], i)) for i in range(len(sets))], (2, runs)).mean(1)
        for params in (soft, hard)
    )
    assert (ours < 0.5 * theirs).all(), (ours, theirs)


# --- devices --------------------------------------------------------------------------------------


def test_two_devices_train_what_one_does() -> None:
    """The running mean too, wherever it lies."""
    task = Tilted(**SIZE, beta=BETA)
    rng, losses, states = np.random.default_rng(0), {}, {}
    batches = [
        {key: rng.integers(0, V, x.shape).astype(x.dtype) if x.dtype == jnp.int32 else R[: x.shape[0]] * (k + 1)
         for key, x in task.spec(4).items()}
        for k in range(4)
    ]  # fmt: skip
    for name, own, count in (("one", dist.Mesh(data=1), 1), ("two", dist.Mesh(data=1, fsdp=2), 2)):
        mesh = own.build(jax.devices()[:count])
        with dist.use(mesh):
            init, step, _ = compile_step(task, AdamW(lr=0.01).build(10), mesh, ema=0.9)
            state, losses[name] = init(3), []
            for batch in batches:
                state, metrics = step(state, jax.device_put(batch, dist.batch_sharding(mesh)))
                losses[name].append(float(metrics["loss"]))
            states[name] = jax.device_get(state.params)
    np.testing.assert_allclose(losses["two"], losses["one"], rtol=1e-4)
    chex.assert_trees_all_close(states["two"], states["one"], rtol=1e-3, atol=1e-5)
    assert states["one"]["norm"]["mean"] != init(3).params["norm"]["mean"]


# --- configs --------------------------------------------------------------------------------------


def test_configs_have_their_data_and_start_from_the_main_run() -> None:
    base = config.load("tcsm/stdlib")
    for name in ("reward", "prefer", "chosen", "reward_chosen", "distil"):
        run = config.load(f"tcsm/stdlib:{name}")
        assert config.undump(config.dump(run)) == run
        shapes = weights.abstract(run.task)
        for key, where in (run.weights or {}).items():
            path, part = weights.parts_of(where)
            other = base if path == base.workdir else config.load("tarflow_lm/stdlib:discrete")
            assert path == other.workdir
            given = weights.abstract(other.task)
            assert shapes[key] == (given[part] if part else given)
        if name != "reward_chosen":  # which needs a run
            example = run.source("train")[0]
            assert {key: x.shape for key, x in example.items()} == {key: x.shape[1:] for key, x in run.spec().items()}


def test_a_reward_of_ones_own_is_named_by_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rewards.py").write_text(
        "from dataclasses import dataclass\n"
        "import zoo.rewards\n\n\n"
        "@dataclass(frozen=True)\n"
        "class Short(zoo.rewards.Reward):\n"
        "    def __call__(self, tokens):\n"
        "        return (tokens == 0).mean(1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with told("data.reward names the class own_rewards.Short", "--allow own_rewards"):
        config.load("tcsm/stdlib:reward", ["data.reward=own_rewards.Short"])
    run = config.load("tcsm/stdlib:reward", ["data.reward=own_rewards.Short"], ["own_rewards"])
    example = run.source("train")[7]
    assert example["reward"] == pytest.approx((example["tokens"] == 0).mean())
    assert config.undump(config.dump(run), ["own_rewards"]) == run


# --- mistakes -------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    teacher = DiscreteLM(**SMALL)
    with told("task.candidates=4", "task.vocab=3"):
        TcsmDistill(**SMALL, teacher=teacher)
    with told("task.positions=4", "task.length=3"):
        TcsmDistill(**SMALL, teacher=teacher, candidates=3)
    for field in ("vocab", "length"):
        with told("task.teacher reads texts of 3 tokens out of 3", f"task.{field}=6"):
            TcsmDistill(**{**SMALL, field: 6}, teacher=teacher, candidates=3, positions=3)
    with told("task.teacher", "must be a Predicts"):
        TcsmDistill(**SMALL, teacher=Tcsm(**SMALL), candidates=3, positions=3)


def test_nothing_is_trained_from_random_networks() -> None:
    small = {**SMALL, "vocab": 27, "length": 16}
    task = TcsmDistill(**small, teacher=DiscreteLM(**small))
    with told("weights.teacher is missing", "would stay random", "`zoo train t"):
        train(Run(task=task, data=Docstrings(), steps=1, batch=4), quiet=True)
