"""Texts with rewards and pairs of texts: preferences from files, and both made out of any source of texts by a reward.

A pair is `tokens` int32 [T], the winner, and `rejected` int32 [T], the loser; a text with a reward `tokens` and `reward` float32 [].
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from zoo.data.documents import SPLITS, check_fractions, cuts, is_plain, list_texts, rows
from zoo.data.folders import existing
from zoo.data.pipeline import Around, Data, Example, Source
from zoo.data.text import vocabulary as vocabularies
from zoo.data.text.tokens import check_split
from zoo.data.text.vocabulary import Vocabulary
from zoo.errors import UserError
from zoo.fields import Below1, NotEmpty, Positive, Seed
from zoo.files import sha256
from zoo.rewards import Reward, rewarded

_log = logging.getLogger("zoo")
# several threads open a source at once, and one reads or scores its texts: by a run on pairs, both
_LOCK = threading.RLock()
_KEYS = ("chosen", "rejected")

SpecOf = Mapping[str, jax.ShapeDtypeStruct]
Pair = tuple[np.ndarray, np.ndarray]  # tokens of a winner and of a loser


def _check_spec(data: Data, spec: SpecOf | None, key: str) -> int:
    """The length of the task's texts. UserError for a task that does not take `key` beside its texts."""
    if spec is None or not {"tokens", key} <= {*spec}:
        raise UserError(
            f"data={type(data).__name__} gives 'tokens' and {key!r}, and the task wants {', '.join(map(repr, spec or ()))}; use a "
            "task that learns from both, or plain texts"
        )
    return int(spec["tokens"].shape[1])


# --- from files -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs(Data):
    """Preferences by path: .jsonl or .parquet files with the texts `chosen` and `rejected`, or a folder of such.

    Texts are cut to the length of the task's, and shorter ones filled up with the token that ends documents, or with blanks
    where there is none. Lines of files that name no split are shared out in their order.
    """

    path: NotEmpty
    tokenizer: str = "text8"  # as of `Text`
    valid_fraction: Below1 = 0.05  # of the pairs, where the files do not say it
    test_fraction: Below1 = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fractions(self.valid_fraction, self.test_fraction)

    def source(self, split: str, spec: SpecOf | None = None) -> _Pairs:
        """The pairs of a split, as long as the task's texts."""
        length, (vocabulary, splits) = _check_spec(self, spec, "rejected"), self._read()
        check_split(split)
        if not (pairs := splits[split]):
            raise UserError(f"{self.path} has no {split} pairs; give more, or set a larger data.{split}_fraction")
        if long := sum(max(map(len, pair)) > length for pair in pairs):
            _note(f"{self.path}: {long:,} of {len(pairs):,} pairs of the {split} split are cut to {length} tokens")
        return _Pairs(pairs, length, vocabulary)

    def vocabulary(self) -> Vocabulary:
        """What the tokens mean."""
        return self._read()[0]

    def fingerprint(self, split: str) -> str:
        """What the pairs of a split are, wherever they lie."""
        check_split(split)
        vocabulary, splits = self._read()
        parts = (part for pair in splits[split] for ids in pair for part in (ids.data, b"\0"))
        return sha256(vocabulary.digest, *parts)

    def _read(self) -> tuple[Vocabulary, dict[str, list[Pair]]]:
        root = existing(self.path)
        stamps = tuple((file, file.stat().st_mtime_ns) for some in list_texts(root).values() for file in some)
        with _LOCK:
            return _pairs(root, self.tokenizer, self.valid_fraction, self.test_fraction, stamps)


@lru_cache
def _note(text: str) -> None:
    """Once is enough."""
    _log.info(text)


@lru_cache(maxsize=2)
def _pairs(
    root: Path, tokenizer: str, valid_fraction: float, test_fraction: float, stamps: Any
) -> tuple[Vocabulary, dict[str, list[Pair]]]:
    """Of files with these `stamps`: one that was written again is another one."""
    files = list_texts(root)
    texts = {split: [pair for file in some for pair in _texts(file)] for split, some in files.items()}
    symbols = "".join(sorted({c for some in texts.values() for _, pair in some for text in pair for c in text} | {" "}))
    vocabulary = vocabularies.named(tokenizer, symbols, "data.tokenizer=")
    found = {}
    for split, some in texts.items():
        plain = [vocabulary.normalise(text) for _, pair in some for text in pair]
        names = [f'{where}, "{key}",' for where, _ in some for key in _KEYS]
        for name, text in zip(names, plain):
            if not text:
                raise UserError(f"{name} has no text in {vocabulary}; mend or remove it")
        ids = vocabulary.encode_all(plain, names)
        found[split] = list(zip(ids[::2], ids[1::2]))
    if None not in found:
        return vocabulary, {str(split): some for split, some in found.items()}
    pairs = found[None]
    ends = (0, *cuts(np.arange(1, len(pairs) + 1), valid_fraction, test_fraction), len(pairs))
    return vocabulary, {split: pairs[a:b] for split, a, b in zip(SPLITS, ends, ends[1:])}


def _texts(file: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    """Where each pair of a file stands, and its texts. UserError where a side is missing."""
    if is_plain(file):
        raise UserError(
            f"{file} is plain text, and pairs are rows with {' and '.join(_KEYS)}; give .jsonl or .parquet files"
        )
    word = "row" if file.suffix == ".parquet" else "line"
    for number, texts in rows(file, _KEYS):
        for key, text in zip(_KEYS, texts):
            if not text or not text.strip():
                raise UserError(f'{file}, {word} {number:,} has no text under "{key}"; mend or remove it')
        yield f"{file}, {word} {number:,}", (str(texts[0]), str(texts[1]))


class _Pairs(Source):
    def __init__(self, pairs: list[Pair], length: int, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._pairs, self._length = pairs, length
        self._fill = int(vocabulary.encode(" ")[-1]) if vocabulary.end is None else vocabulary.end

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Example:
        found = {}
        for key, ids in zip(("tokens", "rejected"), self._pairs[index]):
            found[key] = np.full(self._length, self._fill, np.int32)
            found[key][: len(ids)] = ids[: self._length]
        return found


# --- by a reward ----------------------------------------------------------------------------------

_scores: dict[Any, np.ndarray] = {}  # of what was scored in this process


class _Scored(Data):
    """Base: texts of other data with what a reward says of each, found when a split is first opened."""

    data: Data
    reward: Reward

    @property
    def place(self) -> str:
        """Where the texts lie."""
        return self.data.place

    def vocabulary(self) -> Vocabulary | None:
        """That of the texts."""
        found: Vocabulary | None = self.data.vocabulary()
        return found

    def fingerprint(self, split: str) -> str | None:
        """That of the texts and of how they were scored."""
        texts = self.data.fingerprint(split)
        return None if texts is None else sha256(texts, repr(self.reward))

    def _scored(self, split: str, spec: SpecOf) -> tuple[Source, np.ndarray]:
        """The texts of a split and their rewards [N]. UserError where these are all the same, or what `rewarded` raises."""
        texts = self.data.source(split, {"tokens": spec["tokens"]})
        length = spec["tokens"].shape[1]
        key = (repr(self.data), type(self.reward), repr(self.reward), split, length, self.data.fingerprint(split))
        with _LOCK:
            if key not in _scores:
                _scores[key] = rewarded(self.reward, (texts[i]["tokens"] for i in range(len(texts))), texts.vocabulary)
        found = _scores[key]
        if split == "train" and len(found) and found.min() == found.max():
            raise UserError(
                f"the reward {self.reward} is {found[0]:g} for all {len(found):,} texts of the {split} split, so that nothing is tilted; "
                "give a reward in which they differ"
            )
        return texts, found


@dataclass(frozen=True)
class Rewarded(_Scored):
    """Texts with their reward, which lies beside each as `reward`."""

    data: Data
    reward: Reward

    def source(self, split: str, spec: SpecOf | None = None) -> _Beside:
        """The texts of a split. UserError where the reward of one is no finite number, or the same for all."""
        _check_spec(self, spec, "reward")
        assert spec is not None
        return _Beside(*self._scored(split, spec))


class _Beside(Around):
    def __init__(self, texts: Source, rewards: np.ndarray) -> None:
        super().__init__(texts)
        self._rewards = rewards

    def __getitem__(self, index: int) -> Example:
        return {**self._source[index], "reward": self._rewards[index]}


@dataclass(frozen=True)
class Compared(_Scored):
    """Pairs of texts, the better one as a Bradley-Terry labeller sees it: a before b with probability sigmoid((R(a) - R(b)) / scale).

    Every text is in two pairs. Who is with whom and what the labeller says follows from the seed.
    """

    data: Data
    reward: Reward
    scale: Positive = 1.0  # of the labeller: the larger, the less the reward decides
    seed: Seed = 0

    def fingerprint(self, split: str) -> str | None:
        """That of the texts, how they were scored and paired."""
        texts = super().fingerprint(split)
        return None if texts is None else sha256(texts, f"{self.scale} {self.seed}")

    def source(self, split: str, spec: SpecOf | None = None) -> _Compared:
        """The pairs of a split. UserError where the reward of a text is no finite number, or the same for all."""
        _check_spec(self, spec, "rejected")
        assert spec is not None
        texts, rewards = self._scored(split, spec)
        rng = np.random.default_rng((self.seed, SPLITS.index(split)))
        ring = rng.permutation(len(rewards))
        pairs = np.stack([ring, np.roll(ring, 1)], 1)
        lead = (rewards[pairs[:, 0]] - rewards[pairs[:, 1]]).astype(np.float64) / self.scale
        wins = rng.logistic(size=len(pairs)) < lead
        return _Compared(texts, np.where(wins[:, None], pairs, pairs[:, ::-1]))


class _Compared(Around):
    def __init__(self, texts: Source, pairs: np.ndarray) -> None:
        super().__init__(texts)
        self.pairs = pairs  # int [N, 2], the winner and the loser among the texts

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Example:
        winner, loser = (self._source[int(i)]["tokens"] for i in self.pairs[index])
        return {"tokens": winner, "rejected": loser}
