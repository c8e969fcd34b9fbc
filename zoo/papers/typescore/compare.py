"""Models compared by their results: ranking, paired intervals, win rates, how many pairs a metric tells apart, and who agrees.

Two models are told apart by z = mean(d) / (std(d) / sqrt(n)), d the differences by instruction. Scores of two metrics have different
ranges and spreads, so metrics are compared by z: the resolution of a metric is the share of pairs of models with |z| > 1.96, and,
where the true order of the models is known, of pairs told apart in the right direction.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from zoo import files
from zoo.errors import UserError, suggest
from zoo.fields import Count, NotEmpty, Seed, check_fields
from zoo.papers.typescore.evaluate import NOTE, RECORDS, SETTING, SUMMARY, Record, as_json, claim, relative
from zoo.papers.typescore.metric import by_instruction, interval, mean_of, rank_agreement
from zoo.papers.typescore.report import markdown

_OWN = ("images", "wanted_sha256", "style")  # of a setting: a result's own; texts are compared one by one
_SURE = 1.96  # |z| of two models that are told apart
_DIGITS = 9  # beyond which scores and ratings are tied: only rounding sets means of the same numbers apart
_log = logging.getLogger("zoo")


@dataclass(frozen=True)
class Compare:
    """Several models' results on one list: who is better, and how surely; and how far scores agree with people."""

    results: tuple[str, ...] = ()  # folders that TypeScore wrote; one is enough with `human`
    out: NotEmpty = "typescore-comparison"  # a folder for the comparison
    truth: tuple[str, ...] = ()  # the models, best first, where that is known: which pairs are told apart rightly
    other: str = ""  # a CSV file of another metric's scores, whose resolution is given beside
    human: str = ""  # a CSV file of people's ratings
    resamples: Count = 1000  # of the bootstrap
    seed: Seed = 0  # of the bootstrap

    replaced: ClassVar[dict[str, str]] = {
        "surrogate": "give any other metric's scores as other=FILE, a CSV file of image,score",
        "clip": "give CLIPScores as other=FILE, a CSV file of image,score",
        "wanted": "the pictures are not looked at; leave it out",
        "extractors": "give the results of one extractor, and the other's scores as human=FILE, a CSV file of image,rating",
    }

    def __post_init__(self) -> None:
        check_fields(self)

    def run(self) -> dict[str, Any]:
        """Writes comparison.json and comparison.md into `out`, in place of older ones; returns the first.

        UserError for results that do not compare or are too few, and where `out` holds a comparison of other results.
        """
        if len(self.results) < 2 and not (self.results and self.human):
            raise UserError(f"results={','.join(self.results)} is no two results; name two, or one and human=FILE")
        results, out = load_all(self.results), Path(self.out)
        folders = [{"label": one.label, "folder": relative(one.folder, out)} for one in results]
        figures = {"metric": "typescore comparison", "note": NOTE, "results": folders, **results[0].setting}
        figures |= self._figures(results)
        with claim(out, {"results": sorted(one["folder"] for one in folders)}, "a comparison"):
            files.write(out / "comparison.json", as_json(figures, indent=1))
            files.write(out / "comparison.md", table(figures))
        _log.info("typescore: see %s", out / "comparison.md")
        return {**figures, "out": str(out)}

    def _figures(self, results: Sequence[Result]) -> dict[str, Any]:
        every = {result.label: by_instruction(result.read) for result in results}
        if self.truth and sorted(self.truth) != sorted(every):
            raise UserError(f"truth={','.join(self.truth)} must be every result once, best first: {', '.join(every)}")
        common = sorted(set.intersection(*map(set, every.values())))
        if len(common) < 2:
            raise UserError(f"results share {len(common)} instructions, and need two; evaluate all with one list")
        for label, one in every.items():
            if apart := len(one) - len(common):
                _log.warning("typescore: %d instructions of %s are not in all results and left out", apart, label)
        scores = {label: np.array([one[name] for name in common]) for label, one in every.items()}
        order = sorted(scores, key=lambda label: (-scores[label].mean(), label))
        found = self._pairs(scores, order, self.resamples)
        lost = {one.label: len(one.records) - len(one.read) for one in results}
        beyond = {one["a"]: one["told_apart"] for one in reversed(found)}  # the first pair of each is with the next
        ranking = [
            {"place": place, "label": label}
            | mean_of(dict(zip(common, scores[label])), self.resamples, self.seed)
            | {"failed": lost[label], "left_out": len(every[label]) - len(common)}
            | {"told_apart_from_next": beyond.get(label)}
            for place, label in enumerate(order, 1)
        ]
        resolutions = {"TypeScore": resolution(found, self.truth)} if found else {}
        if self.other:
            theirs = self._pairs(self._other(results, common), order, 1)
            resolutions[Path(self.other).stem] = resolution(theirs, self.truth)
        figures = {"instructions": len(common), "ranking": ranking, "pairs": found, "resolution": resolutions}
        if self.human:
            figures["human"] = agreement(self.human, results, self.resamples, self.seed)
        return figures

    def _pairs(self, scores: Mapping[str, np.ndarray], order: Sequence[str], resamples: int) -> list[dict[str, Any]]:
        both = itertools.combinations(order, 2)
        return [{"a": a, "b": b, **pair(scores[a], scores[b], resamples, self.seed)} for a, b in both]

    def _other(self, results: Sequence[Result], common: Sequence[str]) -> dict[str, np.ndarray]:
        """Another metric's means by instruction, of every model."""
        rows = judged("other", self.other, "score", results)
        found = {}
        for label in [one.label for one in results]:
            means = by_instruction({"id": record["id"], "score": score} for of, record, score in rows if of == label)
            if lost := sorted(set(common) - set(means)):
                raise UserError(f"other={self.other} has no score of instruction {lost[0]!r} by {label}; add it")
            found[label] = np.array([means[name] for name in common])
        return found


@dataclass(frozen=True)
class Result:
    """One model's records, under the name that tells it from others."""

    label: str
    folder: Path
    setting: dict[str, Any]  # what decides a score
    records: list[Record]

    @property
    def read(self) -> list[Record]:
        return [record for record in self.records if record["error"] is None]


def load(name: str) -> Result:
    """The results in a folder that `TypeScore` wrote. UserError where there are none."""
    folder = Path(name)
    with files.reading(f"results: {folder}", "name a folder that `zoo eval configs/typescore/...` wrote"):
        setting, rows = (folder / SETTING).read_text("utf-8"), (folder / RECORDS).read_text("utf-8").split("\n")
    if not (folder / SUMMARY).exists():
        raise UserError(f"results: the evaluation of {folder} has not come to its end; start it again, it goes on")
    label = folder.resolve().name.removesuffix("-typescore")
    try:
        decides = {key: value for key, value in json.loads(setting).items() if key not in _OWN}
        return Result(label, folder, decides, [json.loads(row) for row in rows if row])
    except ValueError:
        raise UserError(f"results: {folder} is damaged; evaluate these pictures again") from None


def load_all(names: Sequence[str]) -> list[Result]:
    """Several results that compare, each named as its folder without -typescore, or as given where two are named alike.

    UserError where a setting differs, and in what.
    """
    found = [load(name) for name in names]
    if len({one.folder.resolve() for one in found}) < len(found):
        raise UserError(f"results={','.join(names)} names one folder twice; name each result once")
    if len({one.label for one in found}) < len(found):
        found = [replace(one, label=one.folder.as_posix()) for one in found]
    first = found[0]
    wanted = {record["id"]: record["wanted"] for record in first.records}
    for other in found[1:]:
        texts = {record["id"]: record["wanted"] for record in other.records if record["id"] in wanted}
        unlike = files.differences(first.setting, other.setting)
        unlike += files.differences({name: wanted[name] for name in texts}, texts, "text")
        if unlike:
            raise UserError(
                f"{first.label} and {other.label} differ in {'; '.join(unlike[:3])}; evaluate both in one way"
            )
    return found


def pair(one: np.ndarray, other: np.ndarray, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Two models compared by instruction [N]: the first's mean less the other's with a paired interval, wins, and z.

    z is 0 where all differences are 0, and where all are one number infinite: "inf" or "-inf", which float() reads. A tie is
    half a win.
    """
    apart = np.round(one - other, _DIGITS)
    mean, spread = float(apart.mean()), float(apart.std(ddof=1))
    if spread > 1e-12 * max(1.0, abs(mean)):
        z = mean / (spread / math.sqrt(len(apart)))
    else:
        z = math.copysign(math.inf, mean) if mean else 0.0
    low, high = interval(lambda pick: float(apart[pick].mean()), len(apart), resamples, seed)
    figures = {"difference": mean, "low": low, "high": high, "win_rate": float((np.sign(apart) + 1).mean() / 2)}
    found = {"instructions": len(apart)} | {name: round(value, 6) for name, value in figures.items()}
    return found | {"ties": int((apart == 0).sum()), "z": _number(z), "told_apart": abs(z) > _SURE}


def _number(z: float) -> float | str:
    """As JSON holds it."""
    return round(z, 6) if math.isfinite(z) else str(z)


def resolution(found: Sequence[Mapping[str, Any]], truth: Sequence[str] = ()) -> dict[str, Any]:
    """How finely a metric tells pairs of models apart; `truth` names the models from best to worst, where that is known."""
    z, rightly = np.array([float(one["z"]) for one in found]), None
    if truth:
        first = [1 if truth.index(one["a"]) < truth.index(one["b"]) else -1 for one in found]
        rightly = round(float(np.mean(z * first > _SURE)), 6)
    share = round(float(np.mean(np.abs(z) > _SURE)), 6)
    return {
        "pairs": len(found),
        "told_apart": share,
        "median_z": _number(float(np.median(np.abs(z)))),
        "right": rightly,
    }


def agreement(path: str, results: Sequence[Result], resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """How far scores agree with people's ratings by picture: Spearman's rho, Kendall's tau-b and the accuracy on pairs.

    The file is CSV with the columns image and rating (a number, more is better); several lines of one picture are of several
    people, whose mean counts. Accuracy is over pairs that people rate differently, and a tied score is half right. Figures are
    [value, low, high], by a bootstrap over instructions, each drawn with all its pictures, which are not independent. Lines of
    pictures that were not read are counted as `left_out`. UserError names the line and what is wrong with it.
    """
    rows = judged("human", path, "rating", results)
    known = [(label, record, rating) for label, record, rating in rows if record["error"] is None]
    said: dict[tuple[str, str], tuple[Record, list[float]]] = {}
    for label, record, rating in known:
        said.setdefault((label, record["image"]), (record, []))[1].append(rating)
    if len(said) < 3:
        raise UserError(f"human={path} judges {len(said)} pictures that were read; give three")
    x = np.round([record["score"] for record, _ in said.values()], _DIGITS)
    y = np.round([np.mean(ratings) for _, ratings in said.values()], _DIGITS)
    ids, of = np.unique([record["id"] for record, _ in said.values()], return_inverse=True)
    places = [np.flatnonzero(of == i) for i in range(len(ids))]
    out: dict[str, Any] = {"judgements": len(known), "left_out": len(rows) - len(known), "instructions": len(ids)}

    def drawn(value: Any, pick: np.ndarray) -> float:
        some = np.concatenate([places[i] for i in pick])
        return float(value(x[some], y[some]))

    for kind, value in _KINDS.items():
        of_pick = functools.partial(drawn, value)
        figures = (of_pick(np.arange(len(ids))), *interval(of_pick, len(ids), resamples, seed))
        out[kind] = [round(v, 6) if math.isfinite(v) else None for v in figures]
    return out


def _accuracy(x: np.ndarray, y: np.ndarray) -> float:
    """Of the pairs with different y, the share that x has in the same order, a tie being half: what tau-b says, scaled."""
    squares = [len(v) ** 2 - float((np.unique(v, return_counts=True)[1] ** 2).sum()) for v in (x, y)]  # twice the pairs
    if not all(squares):
        return 0.5 if squares[1] else math.nan
    return (1 + rank_agreement("kendalltau", x, y) * math.sqrt(squares[0] / squares[1])) / 2


_KINDS = {
    "spearman": functools.partial(rank_agreement, "spearmanr"),
    "kendall_tau_b": functools.partial(rank_agreement, "kendalltau"),
    "pair_accuracy": _accuracy,
}


def judged(field: str, path: str, column: str, results: Sequence[Result]) -> list[tuple[str, Record, float]]:
    """The lines of a CSV file with the columns `image` and `column`: the picture's model, its record, and a finite number.

    Pictures are named as their files, of several results LABEL/FILE. UserError names the line and what is wrong with it.
    """
    import pyarrow
    from pyarrow import csv

    known: dict[str, tuple[str, Record]] = {}
    for one in results:
        within = f"{one.label}/" if len(results) > 1 else ""
        known |= {within + record["image"]: (one.label, record) for record in one.records}
    kinds = {"image": pyarrow.string(), column: pyarrow.float64()}
    options = csv.ConvertOptions(column_types=kinds, include_columns=list(kinds))
    way = f"name a CSV file with the columns image and {column}"
    with files.reading(f"{field}={path}", way):
        try:
            table = csv.read_csv(path, convert_options=options)
        except (pyarrow.ArrowException, KeyError) as error:
            raise UserError(f"{field}={path}: {files.first_line(error)}; {way}") from None
    rows = []
    for line, (name, number) in enumerate(zip(*(table[kind].to_pylist() for kind in kinds)), 2):
        if name not in known:
            raise UserError(f"{field}={path}, line {line}: no result has {name!r:.120}; {suggest(name, known)}")
        if number is None or not math.isfinite(number):
            raise UserError(f"{field}={path}, line {line}: {column} of {name!r} is no number; write one")
        rows.append((*known[name], number))
    return rows


def table(figures: Mapping[str, Any]) -> str:
    """The comparison as Markdown, with its setting, without which a score says nothing."""
    setting = json.dumps({name: figures[name] for name in ("extractor", "normalisation", "weights", "spec_version")})
    text = f"TypeScore on {figures['instructions']} instructions. Setting: {setting}. Scores are {figures['note']}.\n\n"
    text += markdown(figures["ranking"]) + markdown(figures["pairs"])
    text += markdown([{"metric": name, **one} for name, one in figures["resolution"].items()])
    people = figures.get("human", {})
    told = [{"agreement": kind, **dict(zip(("value", "low", "high"), people[kind]))} for kind in _KINDS if people]
    return text + markdown(told)
