"""Drawn texts judged by another language model and by a reward, against closed forms."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mistakes import told
from PIL import Image
from unigram import Lossy, Unigram, Windows

from zoo import config, metrics, models
from zoo.data.text.vocabulary import characters, text8
from zoo.metrics.judge import Judge, MeanReward
from zoo.rewards import LetterShare

RNG = jax.random.key(0)
LOGITS = {"logits": jnp.asarray(np.random.default_rng(0).normal(size=27), jnp.float32)}


@dataclass(frozen=True)
class Steps:
    steps: int = 8


@dataclass(frozen=True)
class Stepwise(Unigram):
    """With one step all tokens of a text are the same."""

    Sampling = Steps

    def sample(
        self, params: Any, rng: jax.Array, n: int, conditions: Any = None, options: Any = None
    ) -> dict[str, jax.Array]:
        tokens = super().sample(params, rng, n)["tokens"]
        return {"tokens": jnp.where((options or Steps()).steps == 1, tokens[:, :1], tokens)}


@dataclass(frozen=True)
class Reader(Unigram):
    """It is told one token in two: p(x_t | x_<t) is its table, sharper by how many tokens there are before."""

    def predict(self, params: Any, tokens: jax.Array) -> jax.Array:
        rows = params["logits"] * jnp.arange(self.length)[:, None]
        return jnp.broadcast_to(jax.nn.log_softmax(rows), (*tokens.shape, self.vocab))


def judge(task: Any = Reader(), vocabulary: Any = text8()) -> Any:
    return SimpleNamespace(task=task, params=LOGITS, vocabulary=vocabulary)


def test_perplexity_is_that_of_what_is_drawn_and_never_alone() -> None:
    task, metric = Unigram(), Judge("RUN", samples=40, batch=16)
    found = metric(task, LOGITS, Windows(), RNG, judge())
    keys = jax.vmap(jax.random.fold_in, (None, 0))(RNG, jnp.arange(48))
    tokens = np.asarray(task.sample(LOGITS, keys, 48)["tokens"])[:40]
    logits = np.asarray(LOGITS["logits"], np.float64) * np.arange(8)[:, None]
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    nats = -logs[np.arange(8), tokens].mean(1)
    assert found["perplexity"] == pytest.approx(math.exp(nats.mean()), rel=1e-4)
    assert found["perplexity_std_error"] == pytest.approx(
        math.exp(nats.mean()) * nats.std(ddof=1) / math.sqrt(40), rel=1e-3
    )
    shares = [np.bincount(row, minlength=27) / 8 for row in tokens]
    entropy = np.mean([-(p[p > 0] * np.log(p[p > 0])).sum() for p in shares])
    assert found["token_entropy"] == pytest.approx(entropy)
    assert {"data_perplexity", "data_token_entropy"} <= found.keys()
    assert (found["texts"], found["not_finite"], found["judge_network"]) == (40, 0, "RUN")
    json.dumps(found)


def test_steps_make_rows_and_a_picture() -> None:
    found = Judge("RUN", steps=(1, 8), samples=64)(Stepwise(), LOGITS, Windows(), RNG, judge())
    one, eight = found["judge"]
    assert (one["steps"], eight["steps"]) == (1, 8)
    assert one["token_entropy"] == pytest.approx(0) != eight["token_entropy"]
    assert eight["perplexity"] == pytest.approx(
        Judge("RUN", samples=64)(Stepwise(), LOGITS, Windows(), RNG, judge())["perplexity"]
    )
    assert isinstance(found["pictures"]["judge"], Image.Image)
    made = config.override(Judge(), ["network=RUN", "steps=4,8"], Steps)
    assert (made.opens(), made.steps) == ("RUN", (4, 8))


def test_texts_that_overflowed_are_counted_and_left_out() -> None:
    found = Judge("RUN", samples=40)(Lossy(), LOGITS, Windows(), RNG, judge())
    assert found["texts"] + found["not_finite"] == 40
    assert 0 < found["not_finite"] < 40
    assert math.isfinite(found["perplexity"])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (judge(Unigram()), ("network=RUN of the metric judge needs 'predict'", "Unigram")),
        (judge(Reader(vocab=28)), ("knows 27 symbols (text8)", "same symbols")),
        (judge(vocabulary=characters("".join(map(chr, range(97, 124))))), ("knows 27 symbols (chars)", "same symbols")),
        (judge(Reader(length=9)), ("reads texts of 9 tokens", "these have 8")),
    ],
    ids=["cannot", "vocab", "symbols", "length"],
)
def test_a_judge_of_other_texts_is_refused(other: Any, words: tuple[str, ...]) -> None:
    with told(*words):
        Judge("RUN")(Unigram(), LOGITS, Windows(), RNG, other)


def test_what_is_asked_for_must_be_there() -> None:
    with told("the metric judge has no judge", "network=RUN_OR_EXPORT"):
        models.loaded_for(Judge())
    with told("options of the metric judge", "no option 'steps'"):
        Judge("RUN", steps=(4,))(Unigram(), LOGITS, Windows(), RNG, judge())
    with told("evals: steps of the metric judge make a table", "steps=4,8"):
        Judge("RUN", steps=(4, 8)).check(Stepwise())
    with told("steps", "from 1"):
        Judge(steps=(0,))


def test_the_mean_reward_of_samples_stands_beside_that_of_texts() -> None:
    letter = LetterShare("o")
    found = MeanReward(letter, samples=200)(Unigram(), LOGITS, Windows(), RNG)
    share = float(jax.nn.softmax(LOGITS["logits"])[15])
    assert abs(found["reward"] - share) < 4 * found["reward_std_error"] < 0.1
    text = "".join(Windows().text[i : i + 8] for i in range(8, 264, 16))
    assert found["data_reward"] == pytest.approx(text.count("o") / len(text))
    assert metrics.named()["reward"] is MeanReward
    assert config.override(MeanReward(), ["reward=letters", "reward.letter=z"]).reward == LetterShare("z")
    assert replace(MeanReward(), reward=letter) == config.undump(config.dump(MeanReward(letter)))
