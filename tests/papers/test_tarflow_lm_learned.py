"""What TarFlowLM learns in minutes (slow): couplings in order, stages that lose nothing, directions, samples like the text."""

import dataclasses
import math
import random
import string

import jax
import pytest

from zoo import config
from zoo.data.text.tokens import Docstrings, Text
from zoo.metrics.text import Generation, TextBound
from zoo.train.loop import train

pytestmark = pytest.mark.slow


def reached(variant, folder, data=None, **fields):
    """The run, its parameters and its bits per token on held-out text."""
    run = config.load(f"tarflow_lm/couplings:{variant}")
    run = dataclasses.replace(run, data=data or Docstrings(), workdir=str(folder / variant), evals=(), **fields)
    state, _ = train(run, quiet=True)
    found = TextBound()(run.task, state.params, run.data, jax.random.key(0))
    return run, state.params, found["bits_per_token"]


@pytest.fixture(scope="module")
def couplings(tmp_path_factory):
    """Bits of the couplings on the standard library's docstrings, and the Mix-d model."""
    folder = tmp_path_factory.mktemp("couplings")
    names = ("discrete", "mixd", "mix1_k8", "affine", "affine_flat")
    runs = {name: reached(name, folder) for name in names}
    return folder, {name: bits for name, (*_, bits) in runs.items()}, runs["mixd"]


def test_couplings_come_in_the_order_of_what_they_can_express(couplings):
    _, bits, _ = couplings
    assert list(bits.values()) == sorted(bits.values())
    assert bits["mix1_k8"] < bits["affine"] - 0.25
    assert bits["mixd"] < bits["discrete"] + 0.5


def test_a_stage_loses_nothing(couplings):
    folder, bits, _ = couplings
    *_, after = reached("stage2", folder, weights={"": str(folder / "mixd")}, steps=200)
    assert after < bits["mixd"] + 0.01


def test_samples_are_like_the_text(couplings):
    *_, (run, params, _) = couplings
    found = Generation()(run.task, params, run.data, jax.random.key(0))
    assert found["unigram_kl"] < 0.05
    assert abs(found["bigram_log_likelihood"] - found["data_bigram_log_likelihood"]) < 0.3


def test_right_to_left_alone_learns_what_depends_on_the_right(tmp_path):
    """Windows of 8 letters, each a function of the next: only the last one is news."""
    rng = random.Random(0)
    follows = [rng.randrange(26) for _ in range(26)]
    text = []
    for _ in range(10_000):
        letters = [rng.randrange(26)]
        while len(letters) < 8:
            letters.append(follows[letters[-1]])
        text += [string.ascii_lowercase[i] for i in reversed(letters)]
    (tmp_path / "text.txt").write_text("".join(text))
    data = Text(str(tmp_path / "text.txt"), tokenizer="text8", valid_fraction=0.0, test_fraction=0.1)
    task = config.load("tarflow_lm/couplings").task
    right = dataclasses.replace(task, length=8, layers=(dataclasses.replace(task.layers[0], reverse=True),))
    *_, bits = reached("mixd", tmp_path, data=data, task=right)
    assert math.log2(26) / 8 - 0.01 < bits < math.log2(26) / 8 + 0.02
