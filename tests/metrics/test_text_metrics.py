"""Metrics of texts against closed forms."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mistakes import told
from unigram import Editor, Keyed, Lossy, Unigram, Windows

from zoo import dist
from zoo.errors import UserError
from zoo.metrics import likelihood
from zoo.metrics.likelihood import Bits
from zoo.metrics.text import (
    Generation,
    LatentPasses,
    TextBound,
    bigram_log_likelihood,
    bounds,
    distinct,
    pass_statistics,
    token_entropy,
    unigram_kl,
)
from zoo.papers.tarflow import TarFlow
from zoo.task import About, Likelihood

RNG = jax.random.key(0)
UNIFORM = {"logits": jnp.zeros(27)}


def held_out() -> np.ndarray:
    source = Windows().source("test")
    return np.stack([source[i]["tokens"] for i in range(len(source))])


# --- bounds ---------------------------------------------------------------------------------------


def test_a_uniform_model_has_the_bits_of_its_vocabulary() -> None:
    found = TextBound(batch=8)(Unigram(), UNIFORM, Windows(), RNG)
    assert found["nats_per_token"] == pytest.approx(math.log(27), rel=1e-6)
    assert found["bits_per_token"] == pytest.approx(math.log2(27), rel=1e-6)
    assert found["bits_per_char"] == pytest.approx(math.log2(27), rel=1e-6)
    assert found["bits_per_token_std_error"] == pytest.approx(0, abs=1e-6)
    assert found["perplexity"] == pytest.approx(27, rel=1e-5)
    assert (found["texts"], found["draws"], found["split"], found["bound"]) == (len(held_out()), 1, "test", True)
    assert not any(key.startswith("iw") for key in found)
    json.dumps(found)


def test_bits_are_those_of_the_held_out_tokens_and_their_error_is_over_texts() -> None:
    logits = np.random.default_rng(0).normal(size=27).astype(np.float32)
    found = TextBound(batch=8, limit=11)(Unigram(), {"logits": jnp.asarray(logits)}, Windows(), RNG)
    bits = -(logits - np.log(np.exp(logits).sum()))[held_out()[:11]].mean(1) / math.log(2)
    assert found["bits_per_token"] == pytest.approx(bits.mean(), rel=1e-5)
    assert found["bits_per_token_std_error"] == pytest.approx(bits.std(ddof=1) / math.sqrt(11), rel=1e-4)
    assert found["texts"] == 11


def test_weighted_bounds_in_closed_form() -> None:
    nats = jnp.log(jnp.array([[2.0, 5.0], [8.0, 5.0]]))
    mean, weighted = bounds(nats)
    np.testing.assert_allclose(mean, np.log([4, 5]), rtol=1e-6)
    np.testing.assert_allclose(weighted, np.log([16 / 5, 5]), rtol=1e-6)  # -log of (1/2 + 1/8) / 2
    np.testing.assert_allclose(bounds(nats + 1e4)[1] - 1e4, weighted, atol=2e-3)  # no probability underflows


def test_a_bound_is_weighted_text_by_text_over_its_own_draws() -> None:
    task, draws = Unigram(spread=4.0), 3
    found = TextBound(draws=draws, batch=4, limit=6)(task, UNIFORM, Windows(), RNG)
    keys = [[jax.random.fold_in(jax.random.fold_in(RNG, d), i) for i in range(6)] for d in range(draws)]
    noise = np.array([[4.0 * jax.random.uniform(key, (1,))[0] for key in row] for row in keys], np.float64)
    nats = 8 * math.log(27) + noise
    assert found["nats_per_token"] == pytest.approx(nats.mean() / 8, rel=1e-5)
    weighted = -np.log(np.exp(-nats).mean(0)).mean() / 8
    assert found["iw_nats_per_token"] == pytest.approx(weighted, rel=1e-5)
    assert found["iw_bits_per_token"] == pytest.approx(weighted / math.log(2), rel=1e-5)
    assert found["iw_nats_per_token"] < found["nats_per_token"]


def test_a_bound_whose_draws_are_terms_of_a_sum_is_not_weighted() -> None:
    """The mean of exp(-term) is no probability, and may lie above that of the text."""

    class Sum(Unigram):
        about = About(likelihood=Likelihood((8,), "bound", weighted=False), vocabulary=27)

    found = TextBound(batch=8, limit=8, draws=2)(Sum(spread=4.0), UNIFORM, Windows(share=2.0), RNG)
    assert found["bound"]
    assert found["bits_per_char"] == pytest.approx(found["bits_per_token"] / 2)  # of two characters each
    assert not [key for key in found if key.startswith("iw_")]


def test_a_keyed_task_is_asked_for_whole_batches_and_gives_the_same_numbers() -> None:
    metric = TextBound(batch=8, limit=13, draws=2)
    one = metric(Unigram(spread=1.0), UNIFORM, Windows(), RNG)
    for mesh in (None, dist.Mesh().build()):
        Keyed.seen.clear()
        likelihood.per_example.cache_clear()
        with dist.use(mesh) if mesh is not None else nullcontext():
            whole = metric(Keyed(spread=1.0), UNIFORM, Windows(), RNG)
        assert (whole.keys(), whole["texts"]) == (one.keys(), 13)
        for key in ("bits_per_token", "bits_per_token_std_error", "iw_bits_per_token"):
            assert whole[key] == pytest.approx(one[key], rel=1e-5)
        assert set(Keyed.seen) == {(8, 8)}


def test_data_and_options_of_another_kind_are_refused() -> None:
    image = TarFlow(image=4, channels=1, patch=2, width=8, depth=1, blocks=2, head_dim=8)
    for metric in (TextBound(), Generation()):
        with told("is of texts, and TarFlow models image"):
            metric.check(image)
        with told("the data has 27 symbols, task.vocab=30; set task.vocab=27"):
            metric(Unigram(vocab=30), {"logits": jnp.zeros(30)}, Windows(), RNG)
    with told("bits per dimension, and Unigram models texts; use text"):
        Bits().check(Unigram())
    with told("options of the metric generation", "no option 'temprature'"):
        Generation(options={"temprature": 0.5}).check(Unigram())


def test_an_exact_model_says_that_its_bits_are_no_bound() -> None:
    class Exact(Unigram):
        about = About(likelihood=Likelihood((8,)), vocabulary=27)

    assert TextBound(batch=8, limit=8)(Exact(), UNIFORM, Windows(), RNG)["bound"] is False


# --- drawn texts ----------------------------------------------------------------------------------


def test_divergence_of_tokens() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 5, (40, 30))
    assert unigram_kl(x, x, 7) == pytest.approx(0, abs=1e-12)
    p, q = np.zeros((1000, 100), int), np.zeros((1000, 100), int)
    p[:, :25], q[:, :50] = 1, 1
    assert unigram_kl(p, q, 2) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-4)
    assert unigram_kl(np.ones((1, 9), int), np.zeros((1, 9), int), 2) > 1  # what was never seen has a chance


def test_likelihood_of_pairs() -> None:
    train = np.array([[0, 1, 0, 1], [1, 1, 1, 1]])  # 0 1 twice, 1 0 once, 1 1 three times
    tokens = np.array([[0, 1, 0], [1, 1, 1], [2, 0, 1]])
    pairs = {(0, 1): 3 / 5, (1, 0): 2 / 7, (1, 1): 4 / 7, (2, 0): 1 / 3}  # plus one each, of three symbols
    want = np.mean([math.log(pairs[a, b]) for row in tokens for a, b in pairwise(row.tolist())])
    assert bigram_log_likelihood(tokens, train, 3) == pytest.approx(want)
    assert bigram_log_likelihood(tokens, np.zeros((1, 1), int), 3) == pytest.approx(-math.log(3))


def test_variety() -> None:
    assert token_entropy(np.array([[0, 1, 2, 3], [5, 5, 5, 5]])) == pytest.approx(math.log(4) / 2)
    text = np.array([[0, 1, 0, 1], [0, 1, 2, 2]])
    assert distinct(text, 1) == pytest.approx(3 / 8)
    assert distinct(text, 2) == pytest.approx(4 / 6)  # 01 10 12 22 of six
    assert distinct(text, 3) == pytest.approx(4 / 4)
    assert distinct(text, 5) == 1.0
    rng = np.random.default_rng(0)
    many = rng.integers(0, 50_000, (3, 200))
    runs = {tuple(row[i : i + 3]) for row in many.tolist() for i in range(198)}
    assert distinct(many, 3) == len(runs) / (3 * 198)


def test_samples_of_the_tokens_of_the_data_are_near_them() -> None:
    source = Windows().source("train")
    train = np.stack([source[i]["tokens"] for i in range(len(source))])
    logits = jnp.log(jnp.asarray(np.bincount(train.ravel(), minlength=27) + 1e-6))
    metric = Generation(samples=200, batch=64)
    found = metric(Unigram(), {"logits": logits}, Windows(), RNG)
    json.dumps(found)
    assert found["unigram_kl"] < 0.05
    assert metric(Unigram(), UNIFORM, Windows(), RNG)["unigram_kl"] > 0.1
    assert found["bigram_log_likelihood"] < found["data_bigram_log_likelihood"]  # it knows no pairs
    assert found["data_distinct_3"] < found["distinct_3"]  # the data repeat themselves
    assert (found["generated_texts"], found["data_texts"], found["not_finite"]) == (200, len(held_out()), 0)
    assert found == metric(Unigram(), {"logits": logits}, Windows(), RNG)


def test_texts_that_overflow_are_left_out_and_counted() -> None:
    found = Generation(samples=40, batch=40)(Lossy(), UNIFORM, Windows(), RNG)
    assert found["generated_texts"] + found["not_finite"] == 40
    assert 0 < found["not_finite"] < 40
    odd = Lossy().sample(UNIFORM, jax.vmap(jax.random.fold_in, (None, 0))(RNG, jnp.arange(40)), 40)["tokens"]
    whole = np.array(odd)[np.array(odd).min(1) >= 0]
    assert found["token_entropy"] == pytest.approx(token_entropy(whole))
    none = Generation(samples=8, batch=8)(Lossy(), {"logits": jnp.zeros(27).at[0].set(1e9)}, Windows(), RNG)
    assert (none["generated_texts"], none["not_finite"]) == (0, 8)
    assert "token_entropy" not in none
    assert "data_token_entropy" in none
    json.dumps(none, allow_nan=False)


# --- passes ---------------------------------------------------------------------------------------


def test_statistics_of_passes_in_closed_form() -> None:
    rng = np.random.default_rng(0)
    isotropic = rng.normal(size=(1, 1, 20_000, 4))
    (one,) = pass_statistics(np.zeros((1, 1, 20_000), int), isotropic)
    assert one["participation"] == pytest.approx(4, abs=0.01)
    assert one["cosine"] == pytest.approx(0, abs=0.01)
    assert one["norm"] == pytest.approx(math.sqrt(2) * math.gamma(2.5) / math.gamma(2), abs=0.02)  # of a chi with 4
    line = np.linspace(1, 2, 50)[:, None] * np.array([1.0, 2.0, 3.0])
    first, last = pass_statistics(np.array([[[1] * 50, [1] * 40 + [2] * 10]]), np.stack([line, line + 1.0])[None])
    assert first["participation"] == pytest.approx(1)  # all on one line
    assert first["cosine"] == pytest.approx(1)
    assert "movement" not in first
    assert last["movement"] == pytest.approx(math.sqrt(3))
    assert last["changed"] == pytest.approx(0.2)
    opposite = np.array([[1.0, 0.0], [-1.0, 0.0]])
    (found,) = pass_statistics(np.zeros((1, 1, 2), int), opposite[None, None])
    assert found["cosine"] == pytest.approx(-1)
    (still,) = pass_statistics(np.zeros((1, 1, 3), int), np.ones((1, 1, 3, 2)))
    assert still["participation"] == 1  # one point


def test_the_mean_and_the_spread_are_over_texts() -> None:
    latents = np.stack([np.full((1, 5, 2), 3.0), np.full((1, 5, 2), 4.0)])
    (found,) = pass_statistics(np.zeros((2, 1, 5), int), latents)
    assert found["norm"] == pytest.approx(3.5 * math.sqrt(2))
    assert found["norm_std"] == pytest.approx(0.5 * math.sqrt(2))


def test_passes_of_a_sampler() -> None:
    found = LatentPasses(samples=10, batch=8)(Editor(), UNIFORM, None, RNG)
    json.dumps(found)
    assert (len(found["passes"]), found["samples"], found["not_finite"]) == (3, 10, 0)
    assert 0 < found["passes"][2]["changed"] <= 1 / 8 < found["passes"][1]["changed"] <= 1 / 2
    with pytest.raises(UserError, match=r"through the layers of a flow, and Unigram has none"):
        LatentPasses()(Unigram(), UNIFORM, None, RNG)
    with pytest.raises(UserError, match="take it out, and run `zoo eval RUN passes` after"):
        LatentPasses().check(Editor())


def test_samples_that_overflow_are_left_out_and_counted() -> None:
    @dataclass(frozen=True)
    class Lost(Editor):
        def sample(  # type: ignore[override]
            self, params: Any, rng: jax.Array, n: int, conditions: Any = None, options: Any = None
        ) -> dict[str, jax.Array]:
            drawn = super().sample(params, rng, n, conditions, options)
            lost = drawn["passes"][:, :1, :1, None] < 3
            return {**drawn, "latents": jnp.where(lost, jnp.nan, drawn["latents"])}

    found = LatentPasses(samples=40, batch=40)(Lost(), UNIFORM, None, RNG)
    assert found["samples"] + found["not_finite"] == 40
    assert found["not_finite"] > 0
    json.dumps(found, allow_nan=False)


# --- all of them ----------------------------------------------------------------------------------
