"""Pairs of texts and texts with rewards: from files, by a reward, out of a run's samples."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from mistakes import told
from texts import prose
from unigram import Unigram

from zoo import derived, dist
from zoo.data.documents import SPLITS
from zoo.data.text.pairs import Compared, Pairs, Rewarded
from zoo.data.text.tokens import Text
from zoo.derived import Classifier, Sampled
from zoo.rewards import LetterShare, Reward, rewarded

ROWS = [{"chosen": f"good {i}", "rejected": f"a bad one {i}"} for i in range(40)]


def spec(length: int = 8, **more: str) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = {"tokens": (4, length), "rejected": (4, length), "reward": (4,)}
    kinds = {"tokens": "int32", **more}
    return {key: jax.ShapeDtypeStruct(shapes[key], kind) for key, kind in kinds.items()}


PAIR, WEIGHED = spec(rejected="int32"), spec(reward="float32")


@pytest.fixture
def book(tmp_path: Path) -> Text:
    (tmp_path / "book.txt").write_text(prose())
    return Text(str(tmp_path / "book.txt"))


@dataclasses.dataclass(frozen=True)
class Odd(Reward):
    """What a reward of one's own may do wrong."""

    kind: str = ""

    def __call__(self, tokens: np.ndarray) -> Any:
        found = (tokens == 5).mean(1)
        return {
            "shape": tokens == 5,
            "words": np.full(len(tokens), "good"),
            "nan": np.where(found > 0.1, np.nan, found),
            "constant": np.zeros(len(tokens)),
        }.get(self.kind, found)


# --- from files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_pairs_are_those_of_the_file_cut_and_filled_up(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"pairs.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    data = Pairs(str(path), valid_fraction=0.1, test_fraction=0.2)
    sources = [data.source(split, spec(12, rejected="int32")) for split in SPLITS]
    assert [len(source) for source in sources] == [28, 4, 8]
    words = data.vocabulary().decode
    first, last = sources[0][3], sources[2][7]
    assert words(first["tokens"]) == "good three  "
    assert words(first["rejected"]) == "a bad one th"
    assert words(last["rejected"]) == "a bad one th"
    assert {x.dtype for x in first.values()} == {np.dtype("int32")}
    assert len({data.fingerprint(split) for split in SPLITS}) == 3


def test_what_is_no_file_of_pairs_is_refused_with_its_line(tmp_path: Path) -> None:
    def refused(name: str, rows: Any, *words: str) -> None:
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
        else:
            (tmp_path / name).write_text("\n".join(map(json.dumps, rows)) + "\n")
        with told(name, *words):
            Pairs(str(tmp_path / name)).source("train", PAIR)

    for row in ({"chosen": "a"}, {"chosen": "a", "rejected": " "}, {"chosen": "a", "rejected": None}, ["a", "b"]):
        refused("some.jsonl", [*ROWS[:2], row], "line 3", '"chosen"' if isinstance(row, list) else '"rejected"')
    refused("none.parquet", [{**ROWS[0], "rejected": None}, ROWS[1]], "row 1", '"rejected"')
    refused("half.parquet", [{"chosen": "a"}], "has no column 'rejected'")
    refused("plain.txt", [], "is plain text", ".jsonl or .parquet")
    refused("marks.jsonl", [{"chosen": "...", "rejected": "b"}], "line 1", '"chosen"')
    with told("Pairs gives 'tokens' and 'rejected'", "the task wants 'tokens'"):
        Pairs(str(tmp_path / "marks.jsonl")).source("train", spec())


# --- by a reward ----------------------------------------------------------------------------------


def test_rewards_lie_beside_their_texts(book: Text) -> None:
    source = Rewarded(book, LetterShare("t")).source("train", WEIGHED)
    plain = book.source("train", spec())
    assert len(source) == len(plain) > 100
    for i in (0, 57):
        np.testing.assert_array_equal(source[i]["tokens"], plain[i]["tokens"])
        text = book.vocabulary().decode(plain[i]["tokens"])
        assert source[i]["reward"] == pytest.approx(text.count("t") / 8)
    assert source[0]["reward"].dtype == np.float32
    assert source.vocabulary == book.vocabulary()


def test_the_labeller_prefers_as_bradley_and_terry_say(book: Text) -> None:
    """Among pairs of one difference of rewards the share of winners is the logistic function of it."""
    text, reward = dataclasses.replace(book, test_fraction=0.0, valid_fraction=0.0), LetterShare("t")
    source = text.source("train", spec())
    scores = rewarded(reward, (source[i]["tokens"] for i in range(800)), None)
    ahead = []
    for seed in range(40):
        source = Compared(text, reward, scale=0.1, seed=seed).source("train", PAIR)
        pairs = source.pairs[(source.pairs < 800).all(1)]
        ahead.append(scores[pairs[:, 0]] - scores[pairs[:, 1]])
    difference = np.concatenate(ahead)
    for step in (1 / 8, 2 / 8):
        wins, losses = (np.isclose(difference, sign * step).sum() for sign in (1, -1))
        share = 1 / (1 + np.exp(-step / 0.1))
        assert wins + losses > 1000
        assert abs(wins / (wins + losses) - share) < 4 * np.sqrt(share * (1 - share) / (wins + losses))
    pairs = source.pairs
    np.testing.assert_array_equal(np.bincount(pairs.ravel()), 2)
    again = Compared(text, reward, scale=0.1, seed=39).source("train", PAIR)
    np.testing.assert_array_equal(again.pairs, pairs)
    np.testing.assert_array_equal(source[3]["rejected"], text.source("train", spec())[int(pairs[3, 1])]["tokens"])


def test_a_reward_that_cannot_be_is_told_before_a_step(book: Text) -> None:
    for kind, words in {
        "shape": ("Odd(kind='shape') gives bool[", "one number for each text"),
        "words": ("Odd(kind='words') gives <U4",),
        "nan": ("Odd(kind='nan') is nan for the text", "e"),
        "constant": ("Odd(kind='constant') is 0 for all", "nothing is tilted"),
    }.items():
        with told(*words):
            Rewarded(book, Odd(kind)).source("train", WEIGHED)
    with told("reward.letter='ee'", "27 symbols"):
        LetterShare("ee")
    with told("LetterShare(letter='e') knows the 27 symbols of text8", "bytes"):
        Rewarded(dataclasses.replace(book, tokenizer="bytes"), LetterShare()).source("train", WEIGHED)
    with told("Rewarded gives 'tokens' and 'reward'"):
        Rewarded(book, LetterShare()).source("train", spec())


# --- out of a run ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Classes(Unigram):
    """It knows how often each of the first symbols stands in a text."""

    outputs: int = 2

    def logits(self, params: Any, batch: Any) -> jax.Array:
        counts = jnp.stack([(batch["tokens"] == i).sum(1) for i in range(self.outputs)], 1)
        return counts + params["logits"][: self.outputs]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Opens in the place of a run: a task by its name."""
    from zoo.data.text.vocabulary import text8
    from zoo.models import Model

    opened = []

    def opens(name: str, **options: Any) -> Model:
        opened.append(name)
        folder = tmp_path / name
        text8().save(folder)
        task = {"plain": Unigram(), "classes": Classes(), "score": Classes(outputs=1)}[name]
        weights = {"logits": jax.device_put(jnp.zeros(27), jax.devices()[0])}  # as those on the host lie
        return Model(task, weights, "raw", 5, None, (), folder, None)

    monkeypatch.setattr(derived.models, "open_model", opens)
    monkeypatch.chdir(tmp_path)
    for cached in (derived._opened, derived._drawn, derived._logits):
        monkeypatch.setattr(derived, cached.__name__, functools.cache(cached.__wrapped__))
    return opened


def test_samples_of_a_run_are_drawn_once(model: Any, tmp_path: Path) -> None:
    data = Sampled("plain", n=100, test_fraction=0.1)
    train, test = data.source("train", spec()), data.source("test", spec())
    assert (len(train), len(test)) == (90, 10)
    drawn = derived._opened("plain").sample(100, 0)["tokens"]
    np.testing.assert_array_equal([train[i]["tokens"] for i in range(90)], drawn[:90])
    np.testing.assert_array_equal(test[0]["tokens"], drawn[90])
    (file,) = tmp_path.rglob("drawn/*.npy")
    np.save(file, np.load(file)[::-1])
    derived._drawn.cache_clear()
    np.testing.assert_array_equal(data.source("test", spec())[9]["tokens"], drawn[0])  # read, not drawn again
    derived._opened("plain").params["logits"] += jnp.arange(27.0)  # a run of the same name, trained anew
    derived._drawn.cache_clear()
    assert (data.source("train", spec())[0]["tokens"] != drawn[[0, 99]]).any(1).all()  # neither as drawn nor as kept
    assert len(Sampled("plain", n=64).source("train", spec())) == 61
    with told("data.run=plain draws texts of 8 tokens", "task.length=8"):
        data.source("train", spec(9))
    with told("no option 'steps'"):
        Sampled("plain", options={"steps": 3}).source("train", spec())


def test_a_classifier_is_a_reward(model: Any) -> None:
    tokens = np.asarray(jax.random.randint(jax.random.key(0), (300, 8), 0, 3))
    counts = (tokens[..., None] == np.arange(2)).sum(1)
    vocabulary = derived._opened("classes").vocabulary
    found = rewarded(Classifier("classes", label=1), tokens, vocabulary)
    np.testing.assert_allclose(found, counts[:, 1] - np.log(np.exp(counts).sum(1)), rtol=1e-5, atol=1e-6)
    with dist.use(dist.Mesh(data=2).build(jax.devices()[:2])):  # a run's
        np.testing.assert_allclose(rewarded(Classifier("score"), tokens, vocabulary), counts[:, 0])
    with told("reward.label=2", "0 to 1"):
        rewarded(Classifier("classes", label=2), tokens, vocabulary)
    with told("reads texts of 8 tokens", "these have 7"):
        rewarded(Classifier("classes"), tokens[:, :7], vocabulary)
    with told("reward.run=plain needs 'logits'"):
        rewarded(Classifier("plain"), tokens, vocabulary)
