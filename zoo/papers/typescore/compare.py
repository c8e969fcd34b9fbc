"""Models compared by their results: ranking, paired intervals, win rates, and how many pairs a metric tells apart.

Scores of two metrics have different ranges and spreads, so metrics are compared by z = mean(d) / (std(d) / sqrt(n)), d the differences
of two models by instruction: the resolution of a metric is the share of pairs of models with |z| > 1.96,
and, where the true order of the models is known, of pairs told apart in the right direction. Judgements of people are compared with
scores by picture and by model, and extractors by the order in which they put the same models.
"""

from __future__ import annotations

import csv
import difflib
import functools
import io
import itertools
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from PIL import Image

from zoo.errors import UserError, suggest
from zoo.papers.typescore.evaluate import (
    NOTE,
    RECORDS,
    SETTING,
    SUMMARY,
    Record,
    _from,
    _on_disk,
    _write,
    _writing,
    by_instruction,
    differences,
)
from zoo.papers.typescore.extractors.base import flat
from zoo.papers.typescore.instructions import Instruction
from zoo.papers.typescore.render import render

COMPARISON, TABLE, PLOT = "comparison.json", "comparison.md", "comparison.png"
_OWN = ("images", "wanted_sha256", "style")  # of a setting: a result's own; texts are compared one by one
_SURE = 1.96  # |z| of two models that are told apart
_SEED = 1_000_003  # of the right pictures: none of a model's own seeds
_CHUNK = 16  # pictures that another metric is given at a time
_NAMED = 5  # of a long list, how many are named
_TIED = 1e-9  # scores and ratings that differ by less are tied
_log = logging.getLogger("zoo")

Scores = Mapping[str, float]  # by instruction


# --- results ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One model's records, under the name that tells it from others."""

    label: str
    folder: Path
    setting: dict[str, Any]
    records: list[Record]

    @property
    def read(self) -> list[Record]:
        return [record for record in self.records if record["error"] is None]

    def scores(self, key: str = "score") -> dict[str, float]:
        """The mean over the pictures of each instruction."""
        return {name: float(np.mean(values)) for name, values in by_instruction(self.read, key).items()}

    def images(self) -> Path:
        """The folder of the pictures, as seen from the results."""
        return self.folder / self.setting["images"]


def load(name: str) -> Result:
    """The results in a folder that `TypeScore` wrote, named by it or by a file in it. UserError where there are none."""
    folder = Path(name)
    if folder.suffix in (".json", ".jsonl"):
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"results: {name} does not exist; name the folder that `zoo eval configs/typescore/...` wrote")
    try:
        setting = json.loads((folder / SETTING).read_bytes())
        setting["extractor"]["name"], setting["normalisation"], setting["images"]
    except OSError:
        raise UserError(
            f"results: {folder} holds no {SETTING}, so it is no folder of results; name the one that "
            "`zoo eval configs/typescore/...` wrote"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"results: {folder / SETTING} is damaged; evaluate these pictures again") from None
    if not (folder / SUMMARY).exists():
        raise UserError(f"results: the evaluation of {folder} has not come to its end; start it again, it goes on")
    records = list(_on_disk(folder / RECORDS).values())
    label = folder.resolve().name.removesuffix("-typescore")
    result = Result(label, folder, setting, records)
    if not result.read:
        raise UserError(f"results: {folder} holds no picture that was read; evaluate these pictures again")
    return result


def load_all(names: Sequence[str], extractors: bool = False) -> list[Result]:
    """Several results that compare, with names of their own. UserError where a setting differs, and in what.

    A result is named as its folder without -typescore, or as the path to it where two are named alike. With `extractors` the
    extractor may differ, and a result is named as the folder of its pictures, which are a model's.
    """
    if not names:
        raise UserError("results is empty; name folders of results, results=a-typescore,b-typescore")
    found = [load(name) for name in names]
    folders = [one.folder.resolve() for one in found]
    if len(set(folders)) < len(folders):
        twice = next(one.folder for one in found if folders.count(one.folder.resolve()) > 1)
        raise UserError(f"results: {twice} is named twice; name each result once")
    if extractors:
        models = [one.images().resolve() for one in found]
        alike = len({model.name for model in models}) < len(set(models))
        found = [
            replace(one, label=Path(os.path.relpath(model)).as_posix() if alike else model.name)
            for one, model in zip(found, models, strict=True)
        ]
    else:
        for full in (
            lambda one: one.folder.as_posix().removesuffix("-typescore"),  # a/out and b/out
            lambda one: one.folder.as_posix(),  # out and out-typescore
        ):
            if len({one.label for one in found}) < len(found):
                found = [replace(one, label=full(one)) for one in found]
    apart = (*_OWN, "extractor") if extractors else _OWN
    first = found[0]
    mine = {k: v for k, v in first.setting.items() if k not in apart}
    for other in found[1:]:
        unlike = differences(mine, {k: v for k, v in other.setting.items() if k not in apart})
        if unlike:
            raise UserError(
                f"results of {first.label} and {other.label} do not compare, since they differ in {'; '.join(unlike[:3])}; "
                "evaluate both in one way"
                + (", or compare extractors with extractors=true" if _only_extractors(unlike) else "")
            )
        wanted = {record["id"]: record["wanted"] for record in first.records}
        for record in other.records:
            if wanted.get(record["id"], record["wanted"]) != record["wanted"]:
                raise UserError(
                    f"results of {first.label} and {other.label} do not compare: instruction {record['id']!r} wants "
                    f"{wanted[record['id']]!r} in one and {record['wanted']!r} in the other; evaluate both with one list"
                )
    return found


def _only_extractors(unlike: Sequence[str]) -> bool:
    return all(one.startswith("extractor.") for one in unlike)


# --- pairs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two models on the instructions that both have scores of. `difference` is a's mean less b's."""

    a: str
    b: str
    instructions: int
    difference: float
    low: float
    high: float
    win_rate: float  # of a, in 0..1; a tie is half a win
    ties: int
    z: float  # infinite where all differences are the same and not 0

    @property
    def told_apart(self) -> bool:
        return abs(self.z) > _SURE


def z_of(differences: np.ndarray) -> float:
    """mean / (std / sqrt(n)) of paired differences [N], N at least 2; 0 where all are 0, infinite where all are one number."""
    middle, spread = float(differences.mean()), float(differences.std(ddof=1))
    if spread <= 1e-12 * max(1.0, abs(middle)):
        return 0.0 if abs(middle) <= 1e-12 else math.copysign(math.inf, middle)
    return middle / (spread / math.sqrt(len(differences)))


def pair(
    a: str, b: str, one: Scores, other: Scores, resamples: int = 1000, seed: int = 0, lower_is_better: bool = False
) -> Pair:
    """Two models compared by instruction, with the interval of the difference by a paired bootstrap.

    UserError where they share fewer than two instructions.
    """
    common = sorted(set(one) & set(other))
    if len(common) < 2:
        raise UserError(
            f"results of {a} and {b} have {len(common)} instructions in common, and comparing needs two at least; evaluate both "
            "with one list"
        )
    apart = np.array([one[name] - other[name] for name in common])
    low, high = _interval(lambda pick: float(apart[pick].mean()), len(apart), resamples, seed)
    ties = np.abs(apart) < _TIED
    better = apart < 0 if lower_is_better else apart > 0
    wins = float((better & ~ties).mean() + 0.5 * ties.mean())
    return Pair(a, b, len(common), float(apart.mean()), low, high, wins, int(ties.sum()), z_of(apart))


def pairs(
    scores: Mapping[str, Scores], resamples: int = 1000, seed: int = 0, lower_is_better: bool = False
) -> list[Pair]:
    """All pairs of models."""
    return [
        pair(a, b, scores[a], scores[b], resamples, seed, lower_is_better) for a, b in itertools.combinations(scores, 2)
    ]


@dataclass(frozen=True)
class Resolution:
    """Of the pairs of models, the share that a metric tells apart; `right` of those in the true order, None if none is known."""

    pairs: int
    told_apart: float
    median_z: float
    right: float | None = None


def resolution(found: Sequence[Pair], truth: Sequence[str] | None = None, lower_is_better: bool = False) -> Resolution:
    """How finely a metric tells models apart; `truth` names them from best to worst.

    UserError where there is no pair, or `truth` does not name all models of the pairs, or another.
    """
    if not found:
        raise UserError("resolution needs a pair of models; name two results at least")
    right = None
    if truth is not None:
        _check_truth(truth, list(dict.fromkeys(label for one in found for label in (one.a, one.b))))
        place = {label: i for i, label in enumerate(truth)}
        right = float(
            np.mean(
                [
                    one.told_apart and (one.z < 0 if lower_is_better else one.z > 0) == (place[one.a] < place[one.b])
                    for one in found
                ]
            )
        )
    return Resolution(
        len(found),
        float(np.mean([one.told_apart for one in found])),
        float(np.median([abs(one.z) for one in found])),
        right,
    )


def _check_truth(truth: Sequence[str], labels: Sequence[str]) -> None:
    for label in truth:
        if label not in labels:
            raise UserError(f"truth names {label!r}, which is none of the results; {suggest(label, labels)}")
    lacking = [label for label in labels if label not in truth]
    if lacking or len(set(truth)) < len(truth):
        what = f"does not name {', '.join(lacking)}" if lacking else "names a model twice"
        raise UserError(f"truth={','.join(truth)} {what}; name every result once, best first")


# --- coarse metrics ---------------------------------------------------------------------------------


class ImageTextScorer(Protocol):
    """How well pictures fit their instructions, by one number a picture: what a fine metric is compared with."""

    name: ClassVar[str]

    def check(self) -> None:
        """UserError where something that it needs is missing."""
        ...

    def score(self, pictures: Sequence[Image.Image], instructions: Sequence[Instruction]) -> list[float]:
        """A number for each picture, more being better; called with some pictures at a time, and many times."""
        ...


@dataclass(frozen=True)
class Coarse:
    """The cosine of a picture and of the right one, each shrunk to 16x16: a stand-in for a coarse metric, and not CLIPScore."""

    right: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)  # drawn once for all models

    name: ClassVar[str] = "coarse surrogate"

    def check(self) -> None:
        """Needs nothing."""

    def score(self, pictures: Sequence[Image.Image], instructions: Sequence[Instruction]) -> list[float]:
        found = []
        for picture, one in zip(pictures, instructions, strict=True):
            key = repr(one)  # not its id: lists may differ
            if key not in self.right:
                self.right[key] = _shrunk(render(one, seed=_SEED))
            found.append(float(_shrunk(picture) @ self.right[key]))
        return found


def _shrunk(picture: Image.Image) -> np.ndarray:
    small = np.asarray(flat(picture).resize((16, 16), Image.Resampling.BOX), np.float64).ravel()
    return small / max(float(np.linalg.norm(small)), 1e-9)


@dataclass(frozen=True)
class Clip:
    """max(0, 2.5 cos) of CLIP's embeddings, by transformers (the extra `vlm`), with weights of your own in a folder.

    CLIP reads 77 tokens at most, so the end of long instructions is not seen.
    """

    model: str = ""  # a folder of a CLIP model, or its name on a hub that can be reached

    name: ClassVar[str] = "CLIPScore"

    def check(self) -> None:
        """Opens the model. UserError where a package is not installed, or it cannot be opened."""
        for package in ("transformers", "torch"):
            try:
                __import__(package)
            except ImportError:
                raise UserError(
                    f"clip={self.model} needs the package {package}, which is not installed; install the extra `vlm`, or leave "
                    "clip out"
                ) from None
        _ = self._opened

    @functools.cached_property
    def _opened(self) -> tuple[Any, Any]:
        """The model and what prepares its input: opened once, since that takes seconds."""
        import transformers

        try:
            model = transformers.CLIPModel.from_pretrained(self.model).eval()
            return model, transformers.CLIPProcessor.from_pretrained(self.model)
        except (OSError, ValueError) as error:
            raise UserError(
                f"clip={self.model} could not be opened as a CLIP model ({str(error).strip().partition(chr(10))[0]}); name a "
                "folder with the model and its processor, or leave clip out"
            ) from None

    def score(self, pictures: Sequence[Image.Image], instructions: Sequence[Instruction]) -> list[float]:
        self.check()
        import torch

        if len(pictures) != len(instructions):
            raise ValueError(f"{len(pictures)} pictures of {len(instructions)} instructions")
        model, processor = self._opened
        with torch.no_grad():
            inputs = processor(
                text=[one.instruction or one.text for one in instructions],
                images=[flat(picture) for picture in pictures],
                return_tensors="pt",
                truncation=True,
                padding=True,  # changes no embedding: that of a text is of its last token, which sees none behind it
            )
            out = model(**inputs)
            cosines = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
        return [max(0.0, 2.5 * float(cosine)) for cosine in cosines]


def scored(result: Result, scorer: ImageTextScorer, instructions: Mapping[str, Instruction]) -> dict[str, float]:
    """Another metric's mean by instruction, on the pictures of a result that were read.

    UserError where an instruction is unknown or wants another text than the result's, before a picture is opened; and where a
    picture cannot be opened.
    """
    read = result.read
    for record in read:
        one = instructions.get(record["id"])
        if one is None:
            raise UserError(
                f"wanted has no instruction {record['id']!r}, which {result.label} has; name the list it was evaluated with"
            )
        if one.text != record["wanted"]:
            raise UserError(
                f"wanted says {one.text!r:.120} of instruction {record['id']!r}, and {result.label} was evaluated for "
                f"{record['wanted']!r:.120}; name the list it was evaluated with"
            )
    values: dict[str, list[float]] = {}
    for start in range(0, len(read), _CHUNK):
        some = read[start : start + _CHUNK]
        pictures = [_picture(result.images() / record["image"], scorer.name) for record in some]
        found = scorer.score(pictures, [instructions[record["id"]] for record in some])
        for record, value in zip(some, found, strict=True):
            values.setdefault(record["id"], []).append(value)
    return {name: float(np.mean(some)) for name, some in values.items()}


def _picture(path: Path, needed_by: str) -> Image.Image:
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except OSError as error:
        why = "is no longer there" if isinstance(error, FileNotFoundError) else f"cannot be opened ({error})"
        raise UserError(
            f"results: {path} {why}, and {needed_by} needs the pictures; bring it back, or set surrogate=false and leave "
            "clip out"
        ) from None


# --- people -----------------------------------------------------------------------------------------


class Judged(NamedTuple):
    """A picture that people may have judged: whose it is, what it was asked for, its score (more is better, None if not read)."""

    label: str
    id: str
    score: float | None


def agreement(path: str | Path, results: Sequence[Result], resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """How far scores agree with what people said, by picture and, under "models", by model; figures are [value, low, high].

    The file is CSV with the columns image and rating (a number, more is better), or image_a, image_b and preferred (a, b or
    tie); several lines of one picture are of several people. A picture is named as its file, of several results LABEL/FILE.
    Ratings give Spearman's rho, Kendall's tau-b and the accuracy on pairs that people rate differently: on all pairs, and on
    those of one instruction alone, which are free of how hard instructions are. Preferences give the accuracy. A tied score
    is half right, a tie of people's is left out. Models are compared by their mean score and rating, or by the shares of
    comparisons that they win by score and by people, where a tie is half a win.

    Intervals are of a bootstrap over instructions, each drawn with all its lines: those of one picture, and of pictures of
    one text, are not independent. A pair across two instructions counts as often as both are drawn together. Lines of
    pictures that were not read are counted as `left_out`. UserError names the line and what is wrong with it.
    """
    rows, fields = _csv(path)
    sign = -1 if results[0].setting["kind"] == "dissimilarity" else 1
    known: dict[str, Judged] = {}
    for result in results:
        for record in result.records:
            name = record["image"] if len(results) == 1 else f"{result.label}/{record['image']}"
            score = None if record["error"] is not None else sign * float(record["score"])
            known[name] = Judged(result.label, record["id"], score)

    def find(name: str, line: int) -> Judged:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            said = suggest(name, near or sorted(known)[:_NAMED])
            more = "" if near or len(known) <= _NAMED else f" and {len(known) - _NAMED} more"
            how = " (of several results: LABEL/FILE)" if len(results) > 1 else ""
            raise UserError(f"human={path}, line {line}: the results have no picture {name!r:.120}; {said}{more}{how}")
        return known[name]

    if {"image", "rating"} <= fields:
        return _ratings(path, rows, find, sign, resamples, seed)
    if {"image_a", "image_b", "preferred"} <= fields:
        return _preferences(path, rows, find, resamples, seed)
    raise UserError(
        f"human={path} has the columns {', '.join(sorted(fields))}; give image and rating, or image_a, image_b and preferred"
    )


def _csv(path: str | Path) -> tuple[list[tuple[int, dict[str, str]]], set[str]]:
    """The lines of a CSV file with their numbers, and the names of its columns."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"human={path} cannot be read ({why}); name a CSV file") from None
    reader = csv.DictReader(io.StringIO(text, newline=None), strict=True)  # lines may end in CR alone
    rows = []
    try:
        for row in reader:
            if None in row:  # a rating of 3,5 would be taken for 3
                raise UserError(
                    f"human={path}, line {reader.line_num}: more fields than the header has; quote those with a comma in them"
                )
            rows.append((reader.line_num, {name: value or "" for name, value in row.items()}))
        fields = set(reader.fieldnames or ())
    except csv.Error as error:
        at = reader.reader.line_num
        raise UserError(
            f"human={path}, line {at}: not CSV ({error}); write fields between commas, and close every quote"
        ) from None
    if not rows:
        raise UserError(f"human={path} has no lines; give a header such as image,rating and a line for each judgement")
    return rows, fields


_Rows = Sequence[tuple[int, dict[str, str]]]
_Find = Callable[[str, int], Judged]


def _ratings(path: str | Path, rows: _Rows, find: _Find, sign: int, resamples: int, seed: int) -> dict[str, Any]:
    said: dict[str, list[float]] = {}
    pictures: dict[str, Judged] = {}
    left_out = 0
    for line, row in rows:
        name = row["image"]
        one = find(name, line)
        try:
            value = float(row["rating"])
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f"human={path}, line {line}: rating is {row['rating']!r:.120}; write a number")
        if one.score is None:
            left_out += 1
        else:
            pictures[name] = one
            said.setdefault(name, []).append(value)
    names = sorted(said)
    if len(names) < 3:
        raise UserError(
            f"human={path} rates {len(names)} pictures that were read ({left_out} lines are of others); agreement needs three"
        )
    x = np.array([pictures[name].score for name in names], np.float64)
    y = np.array([np.mean(said[name]) for name in names])
    ids, of = np.unique([pictures[name].id for name in names], return_inverse=True)
    right, counted = _matched(x, y, of, len(ids))

    def accuracy(times: np.ndarray, among: np.ndarray) -> float:
        taken = np.outer(times, times)
        np.fill_diagonal(taken, times)  # pairs of one instruction come with it, and no picture meets its own copy
        taken = taken * among
        whole = float((taken * counted).sum())
        return float((taken * right).sum()) / whole if whole else math.nan

    def interval(value: Callable[[np.ndarray], float]) -> list[float | None]:
        return _with_interval(value, len(ids), resamples, seed)

    every, within = np.ones((len(ids), len(ids))), np.eye(len(ids))
    found: dict[str, Any] = {
        "ratings": sum(map(len, said.values())),
        "left_out": left_out,
        "pictures": len(names),
        "instructions": len(ids),
    }
    for name, correlation in _CORRELATIONS.items():
        found[name] = interval(lambda t, c=correlation: c(np.repeat(x, t[of]), np.repeat(y, t[of])))  # type: ignore[misc]
    found |= {
        "pair_accuracy": interval(lambda t: accuracy(t, every)),
        "pairs": int(counted.sum()) // 2,  # each stands there both ways
        "pair_accuracy_within_instructions": interval(lambda t: accuracy(t, within)),
        "pairs_within_instructions": int(np.trace(counted)) // 2,
    }
    labels, model = np.unique([pictures[name].label for name in names], return_inverse=True)
    if len(labels) < 2:
        return found
    cell = model * len(ids) + of
    shape = (len(labels), len(ids))
    number = np.bincount(cell, minlength=len(labels) * len(ids)).reshape(shape)
    by_score, by_people = (
        np.bincount(cell, values, len(labels) * len(ids)).reshape(shape) / np.maximum(number, 1) for values in (x, y)
    )

    def means(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weights = (number > 0) * times  # means by instruction weigh the same, however many pictures they are of
        whole = weights.sum(1)
        return (by_score * weights).sum(1) / whole, (by_people * weights).sum(1) / whole

    scores, ratings = means(np.ones(len(ids), int))
    rows_of = [
        {"label": str(label), "score": round(sign * float(score), 4), "rating": round(float(rating), 4)}
        for label, score, rating in zip(labels, scores, ratings, strict=True)
    ]
    return {**found, "models": {"of": rows_of, **_of_models(means, len(ids), resamples, seed)}}


def _preferences(path: str | Path, rows: _Rows, find: _Find, resamples: int, seed: int) -> dict[str, Any]:
    sides: list[tuple[Judged, Judged]] = []
    apart: list[float] = []
    won: list[float] = []  # by a: 1, by b: 0, a tie 0.5
    left_out = 0
    for line, row in rows:
        choice = row["preferred"].strip().lower()
        if choice not in ("a", "b", "tie"):
            raise UserError(f"human={path}, line {line}: preferred is {row['preferred']!r:.120}; write a, b or tie")
        a, b = find(row["image_a"], line), find(row["image_b"], line)
        if row["image_a"] == row["image_b"]:
            raise UserError(f"human={path}, line {line}: image_a and image_b are one picture; name two")
        if a.score is None or b.score is None:
            left_out += 1
            continue
        sides.append((a, b))
        apart.append(a.score - b.score)
        won.append({"a": 1.0, "b": 0.0, "tie": 0.5}[choice])
    people, score = np.array(won), (_sign(np.array(apart)) + 1) / 2
    decided = people != 0.5
    if not decided.any():
        raise UserError(
            f"human={path} holds no preference but ties ({left_out} lines are of pictures that were not read); accuracy needs "
            "one at least"
        )
    ids, of = np.unique([one.id for both in sides for one in both], return_inverse=True)
    of = of.reshape(-1, 2)
    same = of[:, 0] == of[:, 1]
    right = 1 - np.abs(score - people)

    def weights(times: np.ndarray) -> np.ndarray:
        return np.where(same, times[of[:, 0]], times[of[:, 0]] * times[of[:, 1]])

    def accuracy(times: np.ndarray) -> float:
        taken = weights(times) * decided
        return float(taken @ right / taken.sum()) if taken.any() else math.nan

    found: dict[str, Any] = {
        "preferences": int(decided.sum()),
        "ties": int((~decided).sum()),
        "left_out": left_out,
        "instructions": len(ids),
        "pair_accuracy": _with_interval(accuracy, len(ids), resamples, seed),
    }
    labels, model = np.unique([one.label for both in sides for one in both], return_inverse=True)
    is_a, is_b = (np.arange(len(labels))[:, None] == model.reshape(-1, 2)[:, side] for side in (0, 1))
    is_a, is_b = is_a & ~is_b, is_b & ~is_a  # two pictures of one model say nothing of models
    met = (is_a | is_b).any(1)
    if met.sum() < 2:
        return found
    labels, is_a, is_b = labels[met], is_a[met].astype(float), is_b[met].astype(float)

    def shares(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        taken = weights(times)
        whole = (is_a + is_b) @ taken
        by_score, by_people = ((is_a @ (taken * w) + is_b @ (taken * (1 - w))) / whole for w in (score, people))
        return by_score, by_people

    by_score, by_people = shares(np.ones(len(ids), int))
    rows_of = [
        {"label": str(label), "won_by_score": round(float(ours), 4), "won_by_people": round(float(theirs), 4)}
        for label, ours, theirs in zip(labels, by_score, by_people, strict=True)
    ]
    return {**found, "models": {"of": rows_of, **_of_models(shares, len(ids), resamples, seed)}}


def _of_models(
    values: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], n: int, resamples: int, seed: int
) -> dict[str, Any]:
    """The agreement of two values of each model, which follow from how often each of n instructions is drawn."""

    def accuracy(x: np.ndarray, y: np.ndarray) -> float:
        right, counted = _matched(x, y, np.zeros(len(x), int), 1)
        return float(right[0, 0] / counted[0, 0]) if counted[0, 0] else math.nan

    _, people = values(np.ones(n, int))
    return {
        **{
            name: _with_interval(lambda times, c=correlation: c(*values(times)), n, resamples, seed)  # type: ignore[misc]
            for name, correlation in _CORRELATIONS.items()
        },
        "pair_accuracy": _with_interval(lambda times: accuracy(*values(times)), n, resamples, seed),
        "pairs": int(_matched(people, people, np.zeros(len(people), int), 1)[1][0, 0]) // 2,
    }


def _matched(x: np.ndarray, y: np.ndarray, of: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """How many ordered pairs with different y have x in the same order, a tie being half, and how many pairs there are.

    Both [n, n], by the groups `of` [N] of the two; kept by groups, since pairs of thousands of pictures are millions.
    """
    right, counted = np.zeros((n, n)), np.zeros((n, n))
    for i, group in enumerate(of):
        order = _sign(y[i] - y)
        keep = order != 0
        agree = (_sign(x[i] - x) * order + 1) / 2
        right[group] += np.bincount(of[keep], agree[keep], n)
        counted[group] += np.bincount(of[keep], minlength=n)
    return right, counted


def _sign(differences: np.ndarray) -> np.ndarray:
    """As np.sign, and 0 for what only rounding has made of 0: means of the same numbers in another order are tied."""
    return np.where(np.abs(differences) < _TIED, 0.0, np.sign(differences))


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    from scipy import stats

    return float(stats.spearmanr(x, y)[0]) if len(x) > 1 else math.nan


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    from scipy import stats

    return float(stats.pearsonr(x, y)[0]) if len(x) > 1 else math.nan


def _kendall(x: np.ndarray, y: np.ndarray) -> float:
    from scipy import stats

    return float(stats.kendalltau(x, y)[0]) if len(x) > 1 else math.nan


_CORRELATIONS = {"spearman": _spearman, "kendall_tau_b": _kendall}


def _with_interval(value: Callable[[np.ndarray], float], n: int, resamples: int, seed: int) -> list[float | None]:
    """[value, low, high] of what follows from how often each of n instructions is drawn [n].

    None for what is undefined, such as a correlation with ratings that are all one, or the interval of one instruction.
    """
    with (
        warnings.catch_warnings(),
        np.errstate(invalid="ignore", divide="ignore"),
    ):  # a model none of whose pictures is drawn
        warnings.simplefilter("ignore")  # scipy's on constant input
        whole = value(np.ones(n, int))
        low, high = math.nan, math.nan
        if n > 1:
            low, high = _interval(lambda pick: value(np.bincount(pick, minlength=n)), n, resamples, seed)
    return [None if not math.isfinite(v) else round(v, 6) for v in (whole, low, high)]


def _interval(
    value: Callable[[np.ndarray], float], n: int, resamples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    drawn = np.array([value(rng.integers(n, size=n)) for _ in range(resamples)])
    drawn = drawn[np.isfinite(drawn)]
    if not drawn.size:
        return math.nan, math.nan
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# --- extractors -------------------------------------------------------------------------------------


def of_extractors(results: Sequence[Result], resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """How far extractors agree on models: the order that each gives, and for each pair of extractors the agreement.

    `results` are those of `load_all(..., extractors=True)`. Means are over the pictures that all extractors read of the
    instructions that all models have; the rest is counted as `left_out`. For each pair: Spearman's rho and Kendall's tau-b of the
    models' means, Pearson's r by picture (None where undefined), and the first's mean less the second's with its interval, in
    points. UserError where an extractor lacks a model, the pictures are not the same, or fewer than two instructions are left.
    """
    by = _by_extractor(results)
    labels = sorted({one.label for one in results})
    read: dict[str, list[tuple[str, str]]] = {}  # by model, what all extractors read: (picture, instruction)
    seen = 0
    for label in labels:
        names: dict[str, Record] = {}
        for name, of in by.items():
            for record in of[label].records:
                if names.setdefault(record["image"], record)["sha256"] != record["sha256"]:
                    raise UserError(
                        f"results: {record['image']} of {label} was another picture when {name} read it; evaluate {label} again "
                        "with every extractor"
                    )
        seen += len(names)
        every = set.intersection(*({record["image"] for record in of[label].read} for of in by.values()))
        read[label] = [(image, names[image]["id"]) for image in sorted(every)]
    common = sorted(set.intersection(*({name for _, name in some} for some in read.values())))
    if len(common) < 2:
        raise UserError(
            f"{len(common)} instructions have pictures of all models that all extractors read, and comparing needs two at least; "
            "evaluate all with one list"
        )
    read = {label: [(image, name) for image, name in some if name in set(common)] for label, some in read.items()}
    worse = results[0].setting["kind"] == "dissimilarity"
    by_picture: dict[str, list[float]] = {}
    scores: dict[str, dict[str, np.ndarray]] = {}  # by extractor and model, in the order of `common`
    extractors = []
    for name, of in by.items():
        by_picture[name], scores[name] = [], {}
        for label in labels:
            values = {record["image"]: float(record["score"]) for record in of[label].read}
            by_picture[name] += [values[image] for image, _ in read[label]]
            means = by_instruction([{"id": i, "score": values[image]} for image, i in read[label]])
            scores[name][label] = np.array([np.mean(means[i]) for i in common])
        order: list[dict[str, Any]] = [
            {"label": label, **_mean(values, resamples, seed)} for label, values in scores[name].items()
        ]  # by label, so that equal means stand in its order
        order.sort(key=lambda one: one["score"] if worse else -one["score"])
        failed = sum(len(one.records) - len(one.read) for one in of.values())
        described = of[labels[0]].setting["extractor"]
        extractors.append({"label": name, "extractor": described, "failed": failed, "order": order})
    agreeing = []
    for a, b in itertools.combinations(by, 2):
        x, y = (
            np.round([scores[one][label].mean() for label in labels], 9) for one in (a, b)
        )  # rounding parts no ties
        apart = np.mean([scores[a][label] - scores[b][label] for label in labels], axis=0)
        low, high = _interval(lambda pick, d=apart: float(d[pick].mean()), len(apart), resamples, seed)  # type: ignore[misc]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy's on constant input
            found = {name: correlation(x, y) for name, correlation in _CORRELATIONS.items()}
            found["pearson_by_picture"] = _pearson(np.array(by_picture[a]), np.array(by_picture[b]))
        found |= {"difference": float(apart.mean()), "low": low, "high": high}
        agreeing.append({"a": a, "b": b, **{k: round(v, 6) if math.isfinite(v) else None for k, v in found.items()}})
    pictures = sum(map(len, read.values()))
    return {
        "models": len(labels),
        "instructions": len(common),
        "pictures": pictures,
        "left_out": seen - pictures,
        "extractors": extractors,
        "agreement": agreeing,
    }


def _by_extractor(results: Sequence[Result]) -> dict[str, dict[str, Result]]:
    """Results by the name of their extractor and the label of their model. UserError where they are no full table."""
    groups: dict[str, list[Result]] = {}
    for one in results:
        groups.setdefault(json.dumps(one.setting["extractor"], sort_keys=True), []).append(one)
    described = [json.loads(key) for key in groups]
    names = _names(described)
    if len(names) < 2:
        raise UserError(
            f"extractors=true compares extractors, and all results are of {names[0]}; name results of another too, or leave "
            "extractors out"
        )
    labels = list(dict.fromkeys(one.label for one in results))
    found: dict[str, dict[str, Result]] = {}
    for name, some in zip(names, groups.values(), strict=True):
        found[name] = {}
        for one in some:
            if one.label in found[name]:
                raise UserError(
                    f"results: {found[name][one.label].folder} and {one.folder} are both of {one.label} read by {name}; name one "
                    "of them"
                )
            found[name][one.label] = one
        lacking = [label for label in labels if label not in found[name]]
        if lacking:
            raise UserError(
                f"results hold nothing of {', '.join(lacking[:_NAMED])} read by {name}, and extractors are compared on the same "
                "models; evaluate these with it too, or leave them out"
            )
    return found


def _names(described: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names that tell extractors apart: name and version, where that is not enough with the fields in which they differ."""
    plain = [f"{one['name']} {one['version']}" for one in described]
    names = []
    for name, one in zip(plain, described, strict=True):
        alike = [_flat(other) for other, its in zip(described, plain, strict=True) if its == name]
        differ = [k for k, v in _flat(one).items() if any(other.get(k) != v for other in alike)]
        names.append(name + (f" ({', '.join(f'{k}={_flat(one)[k]!s:.40}' for k in differ)})" if differ else ""))
    return [name if names.count(name) == 1 else f"{name} #{names[:i].count(name) + 1}" for i, name in enumerate(names)]


def _flat(described: Mapping[str, Any]) -> dict[str, Any]:
    return {**described.get("config", {}), "prompt": described.get("prompt")}


def _mean(values: np.ndarray, resamples: int, seed: int) -> dict[str, float]:
    """The mean over instructions with its interval, in points."""
    low, high = _interval(lambda pick: float(values[pick].mean()), len(values), resamples, seed)
    return {"score": round(float(values.mean()), 4), "low": round(low, 4), "high": round(high, 4)}


# --- the command ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compare:
    """Several models' results on one list: who is better, and how surely; or several extractors' on the same models."""

    results: tuple[str, ...] = ()  # folders that TypeScore wrote; one is enough with `human`
    out: str = "typescore-comparison"  # a folder for the comparison
    truth: tuple[str, ...] = ()  # the models, best first, where that is known: which pairs are told apart rightly
    surrogate: bool = False  # whether the coarse surrogate's resolution is given beside; needs the pictures
    clip: str = ""  # a CLIP model whose resolution is given beside; needs the pictures and the extra vlm
    wanted: str = "typeinst_synth"  # the list of instructions, for these two
    human: str = ""  # a CSV file of ratings or preferences
    extractors: bool = (
        False  # whether extractors are compared, each on the same models; models are then named by their pictures
    )
    resamples: int = 1000  # of the bootstrap
    seed: int = 0  # of the bootstrap

    standalone: ClassVar[bool] = True  # `zoo eval` runs it without a model

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise UserError(f"resamples={self.resamples} must be at least 1, such as 1000")
        if self.seed < 0:
            raise UserError(f"seed={self.seed} must be at least 0")
        if not self.out:
            raise UserError("out is empty; name a folder for the comparison")
        for name in ("truth", "surrogate", "clip", "human"):
            if self.extractors and getattr(self, name):
                raise UserError(
                    f"extractors=true compares extractors, and {name} is for models; leave one of the two out"
                )
        if len(self.results) == 1 and (self.surrogate or self.clip):
            name = "surrogate" if self.surrogate else "clip"
            raise UserError(
                f"{name} is compared by the pairs of models that it tells apart, and results={self.results[0]} is one model; "
                f"name two results, or leave {name} out"
            )

    def run(self) -> dict[str, Any]:
        """Writes comparison.json, comparison.png and comparison.md into `out`, in place of older ones; returns the first.

        UserError for results that do not compare or are too few, and where `out` holds a comparison of other results.
        """
        if len(self.results) < 2 and not (self.results and self.human):
            raise UserError(
                f"results={','.join(self.results)} is no two results; name them as results=a-typescore,b-typescore (one is enough "
                "with human=FILE, to be compared with people)"
            )
        results = load_all(self.results, self.extractors)
        out = Path(self.out)
        _claim(out, results)
        head = {
            "metric": "typescore comparison" + (" of extractors" if self.extractors else ""),
            "note": NOTE,
            "results": [{"label": one.label, "folder": _from(one.folder, out)} for one in results],
            **{k: v for k, v in results[0].setting.items() if k not in _OWN},
        }
        if self.extractors:
            del head["extractor"]
            figures = {**head, **of_extractors(results, self.resamples, self.seed)}
            text = extractor_table(figures)
            rows = [
                {**one, "label": f"{one['label']}, by {extractor['label']}"}
                for extractor in figures["extractors"]
                for one in extractor["order"]
            ]
            drawn = plot(rows, {})
        else:
            found, scores = self._of_models(results)
            figures = {**head, **found}
            text, drawn = table(figures), plot(figures["ranking"], scores)
        with _writing(out):
            out.mkdir(parents=True, exist_ok=True)
            _write(out / COMPARISON, (json.dumps(figures, indent=1, ensure_ascii=False) + "\n").encode())
            _write(out / TABLE, text.encode())
            _write(out / PLOT, drawn)
        return {**figures, "out": str(out)}

    def _of_models(self, results: Sequence[Result]) -> tuple[dict[str, Any], dict[str, Scores]]:
        """The figures of models, and their scores by instruction, best model first."""
        if self.truth:
            _check_truth(self.truth, [result.label for result in results])
        scorers: list[ImageTextScorer] = [Coarse()] if self.surrogate else []
        scorers += [Clip(self.clip)] if self.clip else []
        for scorer in scorers:
            scorer.check()
        every = {result.label: result.scores() for result in results}
        common = sorted(set.intersection(*(set(one) for one in every.values())))
        if len(common) < 2:
            raise UserError(
                f"results: {len(common)} instructions are in all {len(results)} of them, and comparing needs two at least; "
                "evaluate all with one list"
            )
        lost = {label: len(one) - len(common) for label, one in every.items()}
        for label, n in lost.items():
            if n:
                _log.warning("typescore: %d instructions of %s are not in all results and left out", n, label)
        worse = results[0].setting["kind"] == "dissimilarity"
        means = {label: float(np.mean([one[name] for name in common])) for label, one in every.items()}
        order = sorted(means, key=lambda label: (means[label] if worse else -means[label], label))
        scores: dict[str, Scores] = {label: {name: every[label][name] for name in common} for label in order}
        found = pairs(scores, self.resamples, self.seed, worse)
        between = {(one.a, one.b): one for one in found}
        by_label = {result.label: result for result in results}
        ranking = []
        for place, label in enumerate(order):
            behind = between.get((label, order[place + 1])) if place + 1 < len(order) else None
            ranking.append(
                {
                    "place": place + 1,
                    "label": label,
                    **_mean(np.array(list(scores[label].values())), self.resamples, self.seed),
                    "failed": len(by_label[label].records) - len(by_label[label].read),
                    "left_out": lost[label],
                    "told_apart_from_next": None if behind is None else behind.told_apart,
                }
            )
        figures: dict[str, Any] = {
            "instructions": len(common),
            "ranking": ranking,
            "pairs": [_figures(one) for one in found],
            "truth": list(self.truth) or None,
            "resolution": {},
        }
        truth = self.truth or None
        if found:
            figures["resolution"]["TypeScore"] = _figures(resolution(found, truth, worse))
        if scorers:
            from zoo.papers.typescore.evaluate import TypeScore

            known = {one.id: one for one in TypeScore(wanted=self.wanted).instructions()}
            for scorer in scorers:
                other = {label: scored(by_label[label], scorer, known) for label in order}
                other = {label: {name: one[name] for name in common} for label, one in other.items()}
                figures["resolution"][scorer.name] = _figures(resolution(pairs(other, 1, self.seed), truth))
        if self.human:
            figures["human"] = agreement(self.human, results, self.resamples, self.seed)
        return figures, scores


def _claim(out: Path, results: Sequence[Result]) -> None:
    """UserError where `out` holds a comparison of other results than these, or is no folder. The same ones may be replaced."""
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out} is no folder; name another with out=FOLDER")
    try:
        theirs = {one["folder"] for one in json.loads((out / COMPARISON).read_bytes())["results"]}
    except FileNotFoundError:
        if not any((out / name).exists() for name in (TABLE, PLOT)):
            return
        theirs = set()
    except OSError as error:
        raise UserError(
            f"{out / COMPARISON} cannot be read ({error.strerror}); name another folder with out=FOLDER"
        ) from None
    except (ValueError, KeyError, TypeError):
        theirs = set()
    if theirs != {_from(one.folder, out) for one in results}:
        of = (
            f"of other results ({', '.join(sorted(theirs)[:_NAMED])})"
            if theirs
            else "that does not say of which results"
        )
        raise UserError(
            f"out={out} holds a comparison {of}, which is not overwritten; name another folder with out=FOLDER, or remove this one"
        )


def _figures(one: Pair | Resolution) -> dict[str, Any]:
    """JSON values: an infinite z is "inf" or "-inf", which float() reads, and what is undefined None."""
    found = {
        k: v if not isinstance(v, float) else round(v, 6) if math.isfinite(v) else None if math.isnan(v) else str(v)
        for k, v in asdict(one).items()
    }
    return {**found, "told_apart": one.told_apart} if isinstance(one, Pair) else found


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _z(value: float | str | None) -> str:
    return "" if value is None else f"{float(value):.1f}".replace("inf", "∞")


def _share(right: float | None) -> str:
    return "" if right is None else f"{right:.0%} | "


def _setting(figures: Mapping[str, Any]) -> str:
    """What the scores were made with: without it they say nothing."""
    normalisation = ", ".join(f"{name}={json.dumps(value)}" for name, value in figures["normalisation"].items())
    weights = ", ".join(
        f"{name} {value:g}" for name, value in zip(("NED", "NLCS", "SW"), figures["weights"], strict=True)
    )
    return (
        f"Setting: {normalisation}, piece_mode={figures['piece_mode']}, kind={figures['kind']}, weights {weights}, "
        f"spec_version {figures['spec_version']}. Scores are {figures['note']}."
    )


def table(figures: Mapping[str, Any]) -> str:
    """The comparison of models as Markdown."""
    ranking, extractor = figures["ranking"], figures["extractor"]
    lines = [
        f"TypeScore of {len(ranking)} model{'s' * (len(ranking) > 1)} on {figures['instructions']} instructions, read by "
        f"{extractor['name']} {extractor['version']}.",
        "",
        _setting(figures),
        "",
        "| | model | TypeScore (95 %) | told apart from the next | failed |",
        "|---|---|---|---|---|",
    ]
    words = {True: "yes", False: "no", None: ""}
    lines += [
        f"| {one['place']} | {_cell(one['label'])} | {one['score']:.1f} ({one['low']:.1f} to {one['high']:.1f}) | "
        f"{words[one['told_apart_from_next']]} | {one['failed']} |"
        for one in ranking
    ]
    if figures["pairs"]:
        lines += ["", "| pair | difference (95 %) | win rate | z |", "|---|---|---|---|"]
    lines += [
        f"| {_cell(one['a'])} over {_cell(one['b'])} | {one['difference']:.2f} ({one['low']:.2f} to {one['high']:.2f}) | "
        f"{one['win_rate']:.0%} | {_z(one['z'])} |"
        for one in figures["pairs"]
    ]
    if figures["resolution"]:
        known = figures["truth"] is not None
        lines += ["", f"| metric | pairs told apart |{' rightly |' if known else ''} median of \\|z\\| |"]
        lines += ["|---|---|---|" + "---|" * known]
        lines += [
            f"| {name} | {one['told_apart']:.0%} of {one['pairs']} | {_share(one['right'])}{_z(one['median_z'])} |"
            for name, one in figures["resolution"].items()
        ]
        if known:
            lines += ["", f"True order, best first: {', '.join(map(_cell, figures['truth']))}."]
    if "human" in figures:
        lines += ["", *_human_table(figures["human"])]
    return "\n".join(lines) + "\n"


def _human_table(found: Mapping[str, Any]) -> list[str]:
    said = (
        f"{found['ratings']} ratings"
        if "ratings" in found
        else f"{found['preferences']} preferences and {found['ties']} ties"
    )
    names = {
        "spearman": "Spearman's rho",
        "kendall_tau_b": "Kendall's tau-b",
        "pair_accuracy": "accuracy on pairs",
        "pair_accuracy_within_instructions": "accuracy on pairs of one instruction",
    }
    pairs_of = {
        "pair_accuracy": found.get("pairs", found.get("preferences")),
        "pair_accuracy_within_instructions": found.get("pairs_within_instructions"),
    }
    models = found.get("models", {})
    lines = [
        f"Agreement with people: {said} on {found['instructions']} instructions; {found['left_out']} lines of pictures that were "
        "not read are left out. Intervals resample instructions.",
        "",
        "| agreement | value (95 %) | pairs |",
        "|---|---|---|",
    ]
    lines += [
        f"| by picture: {words} | {_with_range(found[name])} | {pairs_of.get(name, '')} |"
        for name, words in names.items()
        if name in found
    ]
    lines += [
        f"| by model ({len(models['of'])}): {words} | {_with_range(models[name])} | "
        f"{models['pairs'] if name == 'pair_accuracy' else ''} |"
        for name, words in names.items()
        if name in models
    ]
    return lines


def _with_range(values: Sequence[float | None]) -> str:
    value, low, high = ("undefined" if v is None else f"{v:.2f}" for v in values)
    return value if values[1] is None else f"{value} ({low} to {high})"


def extractor_table(figures: Mapping[str, Any]) -> str:
    """The comparison of extractors as Markdown."""
    lines = [
        f"{len(figures['extractors'])} extractors on {figures['models']} models: {figures['pictures']} pictures of "
        f"{figures['instructions']} instructions that all of them read; {figures['left_out']} are left out.",
        "",
        _setting(figures),
        "",
        "| extractor | models, best first: TypeScore (95 %) | failed |",
        "|---|---|---|",
    ]
    for one in figures["extractors"]:
        order = "; ".join(
            f"{_cell(m['label'])} {m['score']:.1f} ({m['low']:.1f} to {m['high']:.1f})" for m in one["order"]
        )
        lines.append(f"| {_cell(one['label'])} | {order} | {one['failed']} |")
    lines += [
        "",
        "| extractors | Spearman of models | Kendall's tau-b of models | Pearson of pictures | difference (95 %) |",
        "|---|---|---|---|---|",
    ]
    for one in figures["agreement"]:
        values = (one[name] for name in ("spearman", "kendall_tau_b", "pearson_by_picture"))
        cells = " | ".join("undefined" if v is None else f"{v:.3f}" for v in values)
        lines.append(
            f"| {_cell(one['a'])} and {_cell(one['b'])} | {cells} | {one['difference']:+.2f} "
            f"({one['low']:+.2f} to {one['high']:+.2f}) |"
        )
    return "\n".join(lines) + "\n"


def plot(ranking: Sequence[Mapping[str, Any]], scores: Mapping[str, Scores]) -> bytes:
    """A PNG: means with their intervals in the order given, over the scores by instruction where there are some."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.4 + 0.5 * len(ranking)), dpi=110, layout="constrained")
    axes = figure.subplots()
    for row, one in enumerate(ranking):
        values = list(scores.get(one["label"], {}).values())
        axes.plot(values, [row] * len(values), "|", color="#9ec5e8", ms=12)
        axes.errorbar(
            one["score"],
            row,
            xerr=[[max(one["score"] - one["low"], 0)], [max(one["high"] - one["score"], 0)]],
            fmt="o",
            color="#1f6fb4",
            capsize=4,
        )
    names = [one["label"] if len(one["label"]) < 40 else "..." + one["label"][-37:] for one in ranking]
    axes.set_yticks(range(len(ranking)), [name.replace("$", r"\$") for name in names])
    axes.set(
        xlabel="TypeScore: mean with its interval" + (", and every instruction" if scores else ""),
        ylim=(len(ranking) - 0.5, -0.5),
    )
    axes.grid(color="#e4e4e4", axis="x")
    axes.set_axisbelow(True)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()
