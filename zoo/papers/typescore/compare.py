"""Models compared by their results: ranking, paired intervals, win rates, how many pairs a metric tells apart, and who agrees.

Two models are told apart by z = mean(d) / (std(d) / sqrt(n)), d the differences by instruction. Scores of two metrics have different
ranges and spreads, so metrics are compared by z: the resolution of a metric is the share of pairs of models with |z| > 1.96, and,
where the true order of the models is known, of pairs told apart in the right direction.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from zoo import files
from zoo.errors import UserError, suggest
from zoo.fields import Count, NotEmpty, Seed, check_fields
from zoo.papers.typescore.evaluate import NOTE, RECORDS, SETTING, SUMMARY, Record, as_json, claim, relative
from zoo.papers.typescore.metric import by_instruction, interval, mean_of
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
    human: str = ""  # a CSV file of ratings or preferences
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
            raise UserError(
                f"results={','.join(self.results)} is no two results; name them as results=a-typescore,b-typescore (one is enough "
                "with human=FILE, to be compared with people)"
            )
        results, out = load_all(self.results), Path(self.out)
        folders = [{"label": one.label, "folder": relative(one.folder, out)} for one in results]
        setting = {k: v for k, v in results[0].setting.items() if k not in _OWN}
        head = {"metric": "typescore comparison", "note": NOTE, "results": folders}
        figures = {**head, **setting, **self._figures(results)}
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
            raise UserError(
                f"results have {len(common)} instructions in common, and need two; evaluate all with one list"
            )
        for label, one in every.items():
            if lost := len(one) - len(common):
                _log.warning("typescore: %d instructions of %s are not in all results and left out", lost, label)
        sign = results[0].sign
        scores = {label: np.array([one[name] for name in common]) for label, one in every.items()}
        order = sorted(scores, key=lambda label: (-sign * scores[label].mean(), label))
        found = self._pairs(scores, order, sign, self.resamples)
        ranking = [
            {
                "place": place,
                "label": label,
                **mean_of(dict(zip(common, scores[label])), self.resamples, self.seed),
                "failed": next(len(one.records) - len(one.read) for one in results if one.label == label),
                "left_out": len(every[label]) - len(common),
                "told_apart_from_next": next((one["told_apart"] for one in found if one["a"] == label), None),
            }
            for place, label in enumerate(order, 1)
        ]
        resolutions = {"TypeScore": resolution(found, self.truth, sign)} if found else {}
        if self.other:
            theirs = self._pairs(self._other(results, common), order, 1, 1)
            resolutions[Path(self.other).stem] = resolution(theirs, self.truth)
        figures = {"instructions": len(common), "ranking": ranking, "pairs": found, "resolution": resolutions}
        if self.human:
            figures["human"] = agreement(self.human, results, self.resamples, self.seed)
        return figures

    def _pairs(
        self, scores: Mapping[str, np.ndarray], order: Sequence[str], sign: int, resamples: int
    ) -> list[dict[str, Any]]:
        both = itertools.combinations(order, 2)
        return [{"a": a, "b": b, **pair(scores[a], scores[b], resamples, self.seed, sign)} for a, b in both]

    def _other(self, results: Sequence[Result], common: Sequence[str]) -> dict[str, np.ndarray]:
        """Another metric's means by instruction, of every model."""
        known, rows = pictures(results), []
        for at, row in lines("other", self.other, "image,score"):
            label, record = found(known, row["image"], at)
            rows.append({"label": label, "id": record["id"], "score": number(row["score"], at)})
        means = {one.label: by_instruction(row for row in rows if row["label"] == one.label) for one in results}
        for label, name in itertools.product(means, common):
            if name not in means[label]:
                raise UserError(f"other={self.other} has no score of instruction {name!r} by {label}; add it")
        return {label: np.array([one[name] for name in common]) for label, one in means.items()}


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

    @property
    def sign(self) -> int:
        """-1 where less is better."""
        return -1 if self.setting["kind"] == "dissimilarity" else 1


def load(name: str) -> Result:
    """The results in a folder that `TypeScore` wrote. UserError where there are none."""
    folder = Path(name)
    with files.reading(f"results: {folder}", "name a folder that `zoo eval configs/typescore/...` wrote"):
        setting, rows = (folder / SETTING).read_text("utf-8"), (folder / RECORDS).read_text("utf-8").split("\n")
    if not (folder / SUMMARY).exists():
        raise UserError(f"results: the evaluation of {folder} has not come to its end; start it again, it goes on")
    try:
        records = [json.loads(row) for row in rows if row]
        found = Result(folder.resolve().name.removesuffix("-typescore"), folder, json.loads(setting), records)
        whole = (
            bool(by_instruction(found.read)) and found.sign and all(one["wanted"] and one["image"] for one in records)
        )
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"results: {folder} holds nothing that was read, or is damaged; evaluate these pictures again")
    return found


def load_all(names: Sequence[str]) -> list[Result]:
    """Several results that compare, each named as its folder without -typescore, or as given where two are named alike.

    UserError where a setting differs, and in what.
    """
    found = [load(name) for name in names]
    if len({one.folder.resolve() for one in found}) < len(found):
        raise UserError(f"results={','.join(names)} names one folder twice; name each result once")
    if len({one.label for one in found}) < len(found):
        found = [replace(one, label=one.folder.as_posix()) for one in found]
    first, *others = found
    wanted = {record["id"]: record["wanted"] for record in first.records}
    for other in others:
        mine, theirs = ({k: v for k, v in one.setting.items() if k not in _OWN} for one in (first, other))
        unlike = files.differences(mine, theirs)
        texts = {record["id"]: record["wanted"] for record in other.records if record["id"] in wanted}
        unlike += files.differences({name: wanted[name] for name in texts}, texts, "text")
        if unlike:
            raise UserError(
                f"results of {first.label} and {other.label} do not compare, since they differ in {'; '.join(unlike[:3])}; "
                "evaluate both in one way"
            )
    return found


# --- pairs ------------------------------------------------------------------------------------------


def pair(one: np.ndarray, other: np.ndarray, resamples: int = 1000, seed: int = 0, sign: int = 1) -> dict[str, Any]:
    """Two models compared by instruction [N]: the first's mean less the other's with a paired interval, wins, and z.

    z is 0 where all differences are 0, and where all are one number infinite: "inf" or "-inf", which float() reads. A tie is
    half a win. `sign`: -1 where less is better.
    """
    apart = np.round(one - other, _DIGITS)
    mean, spread = float(apart.mean()), float(apart.std(ddof=1))
    if spread > 1e-12 * max(1.0, abs(mean)):
        z = mean / (spread / math.sqrt(len(apart)))
    else:
        z = math.copysign(math.inf, mean) if mean else 0.0
    low, high = interval(lambda pick: float(apart[pick].mean()), len(apart), resamples, seed)
    figures = {"difference": mean, "low": low, "high": high, "win_rate": float((np.sign(sign * apart) + 1).mean() / 2)}
    return {
        "instructions": len(apart),
        **{name: round(value, 6) for name, value in figures.items()},
        "ties": int((apart == 0).sum()),
        "z": round(z, 6) if math.isfinite(z) else str(z),
        "told_apart": abs(z) > _SURE,
    }


def resolution(found: Sequence[Mapping[str, Any]], truth: Sequence[str] = (), sign: int = 1) -> dict[str, Any]:
    """How finely a metric tells pairs of models apart; `truth` names the models from best to worst, where that is known."""
    z = np.array([sign * float(one["z"]) for one in found])
    middle, rightly = float(np.median(np.abs(z))), None
    if truth:
        first = [1 if truth.index(one["a"]) < truth.index(one["b"]) else -1 for one in found]
        rightly = round(float(np.mean(z * first > _SURE)), 6)
    share = round(float(np.mean(np.abs(z) > _SURE)), 6)
    middle_z = round(middle, 6) if math.isfinite(middle) else str(middle)
    return {"pairs": len(found), "told_apart": share, "median_z": middle_z, "right": rightly}


# --- people -----------------------------------------------------------------------------------------


def agreement(path: str, results: Sequence[Result], resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """How far scores agree with what people said, by picture and, under "models", by model; figures are [value, low, high].

    The file is CSV with the columns image and rating (a number, more is better), or image_a, image_b and preferred (a, b or
    tie); several lines of one picture are of several people. Ratings give Spearman's rho, Kendall's tau-b and the accuracy on
    pairs that people rate differently, preferences the accuracy. A tied score is half right, a tie of people's is left out.
    Models are compared by their mean score and rating, or by the shares of comparisons that they win by score and by people.

    Intervals are of a bootstrap over instructions, each drawn with all its pictures, which are not independent. Lines of
    pictures that were not read are counted as `left_out`. UserError names the line and what is wrong with it.
    """
    known, sign = pictures(results), results[0].sign
    rows = lines("human", path, "image,rating", "image_a,image_b,preferred")
    rated, left_out = "rating" in rows[0][1], 0
    said: dict[str, list[float]] = {}
    points: list[tuple[str, str, float, float]] = []  # model, instruction, by score, by people
    for at, row in rows:
        some = [found(known, row[name], at) for name in (("image",) if rated else ("image_a", "image_b"))]
        rating = (
            number(row["rating"], at)
            if rated
            else {"a": 1.0, "b": 0.0, "tie": 0.5}.get(row["preferred"].strip().lower())
        )
        if rating is None or (not rated and some[0] == some[1]):
            raise UserError(f"{at}: preferred is {row['preferred']!r:.120}; write a, b or tie of two pictures")
        if any(record["error"] is not None for _, record in some):
            left_out += 1
        elif rated:
            said.setdefault(row["image"], []).append(rating)
        else:
            (a, first), (b, second) = some
            ours = (np.sign(round(sign * (first["score"] - second["score"]), _DIGITS)) + 1) / 2
            points += [(a, first["id"], ours, rating), (b, second["id"], 1 - ours, 1 - rating)]
    for name, ratings in said.items():
        label, record = known[name]
        points.append((label, record["id"], sign * record["score"], float(np.mean(ratings))))
    if len(points) < 3:
        raise UserError(
            f"human={path} judges {len(points)} pictures that were read, {left_out} lines are of others; give three"
        )
    x, y = (np.round([point[k] for point in points], _DIGITS) for k in (2, 3))
    ids, of = np.unique([point[1] for point in points], return_inverse=True)
    labels, model = np.unique([point[0] for point in points], return_inverse=True)
    places = [np.flatnonzero(of == i) for i in range(len(ids))]

    def figures(by: Callable[[np.ndarray], Any], kinds: Mapping[str, Any]) -> dict[str, list[float | None]]:
        """Each kind of agreement between the two columns that `by` makes of the points drawn, with its interval."""
        out = {}
        for kind, value in kinds.items():

            def drawn(pick: np.ndarray, value: Any = value) -> float:
                return float(value(*by(np.concatenate([places[i] for i in pick]))))

            low_high = interval(drawn, len(ids), resamples, seed)
            out[kind] = [round(v, 6) if math.isfinite(v) else None for v in (drawn(np.arange(len(ids))), *low_high)]
        return out

    def means(pick: np.ndarray) -> list[np.ndarray]:
        count = np.bincount(model[pick], minlength=len(labels))
        return [
            np.round(np.bincount(model[pick], v[pick], len(labels))[count > 0] / count[count > 0], _DIGITS)
            for v in (x, y)
        ]

    kinds = _KINDS if rated else {"pair_accuracy": _preferred}
    out: dict[str, Any] = {"judgements": len(rows) - left_out, "left_out": left_out, "instructions": len(ids)}
    out |= figures(lambda pick: (x[pick], y[pick]), kinds)
    if len(labels) > 1:
        both = zip(labels, *means(np.arange(len(x))))
        of_models = [{"label": str(label), "by_score": float(a), "by_people": float(b)} for label, a, b in both]
        out["models"] = {"of": of_models, **figures(means, _KINDS)}
    return out


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    from scipy import stats

    return float(stats.spearmanr(x, y).statistic) if np.ptp(x) and np.ptp(y) else math.nan


def _kendall(x: np.ndarray, y: np.ndarray) -> float:
    from scipy import stats

    return float(stats.kendalltau(x, y).statistic) if np.ptp(x) and np.ptp(y) else math.nan


def _accuracy(x: np.ndarray, y: np.ndarray) -> float:
    """Of the pairs with different y, the share that x has in the same order, a tie being half: what tau-b says, scaled."""
    squares = [len(v) ** 2 - float((np.unique(v, return_counts=True)[1] ** 2).sum()) for v in (x, y)]  # twice the pairs
    if not all(squares):
        return 0.5 if squares[1] else math.nan
    return (1 + _kendall(x, y) * math.sqrt(squares[0] / squares[1])) / 2


def _preferred(ours: np.ndarray, people: np.ndarray) -> float:
    decided = people != 0.5
    return float(np.mean(1 - np.abs(ours - people)[decided])) if decided.any() else math.nan


_KINDS = {"spearman": _spearman, "kendall_tau_b": _kendall, "pair_accuracy": _accuracy}


def pictures(results: Sequence[Result]) -> dict[str, tuple[str, Record]]:
    """The label and record of every picture by its name: as its file, of several results LABEL/FILE."""
    every = [(one.label, record) for one in results for record in one.records]
    return {
        record["image"] if len(results) == 1 else f"{label}/{record['image']}": (label, record)
        for label, record in every
    }


def found(known: Mapping[str, tuple[str, Record]], name: str, at: str) -> tuple[str, Record]:
    """The label and record of a picture. UserError, with the place `at` that names it, for one that no result has."""
    if name not in known:
        raise UserError(f"{at}: the results have no picture {name!r:.120}; {suggest(name, known)}")
    return known[name]


def lines(field: str, path: str, *columns: str) -> list[tuple[str, dict[str, str]]]:
    """The lines of a CSV file that has one of these sets of columns, each with what to call it in an error."""
    with files.reading(f"{field}={path}", "name a CSV file"):
        text = Path(path).read_bytes().decode("utf-8-sig")
    reader = csv.DictReader(io.StringIO(text, newline=None), restkey="", restval="", strict=True)  # lines may end in CR
    try:
        rows = [(f"{field}={path}, line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise UserError(f"{field}={path} is not CSV ({error}); write fields between commas, and close quotes") from None
    if not rows or not any(set(some.split(",")) <= set(rows[0][1]) for some in columns):
        raise UserError(f"{field}={path} needs lines with the columns {' or '.join(columns)}")
    for at, row in rows:
        if "" in row:  # a rating of 3,5 would be taken for 3
            raise UserError(f"{at}: more fields than the header has; quote those with a comma in them")
    return rows


def number(text: str, at: str) -> float:
    """A finite number. UserError where the text is none."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{at}: {text!r:.120} is no number; write one")
    return value


# --- tables -----------------------------------------------------------------------------------------


def table(figures: Mapping[str, Any]) -> str:
    """The comparison as Markdown, with its setting, without which a score says nothing."""
    names = ("extractor", "normalisation", "piece_mode", "kind", "weights", "spec_version")
    setting = json.dumps({name: figures[name] for name in names})
    text = f"TypeScore on {figures['instructions']} instructions. Setting: {setting}. Scores are {figures['note']}.\n\n"
    text += markdown(figures["ranking"]) + markdown(figures["pairs"])
    text += markdown([{"metric": name, **one} for name, one in figures["resolution"].items()])
    people = figures.get("human", {})
    for by, some in (("picture", people), ("model", people.get("models", {}))):
        told = [
            {"agreement by": by, "as": kind, **dict(zip(("value", "low", "high"), some[kind]))}
            for kind in _KINDS
            if kind in some
        ]
        text += markdown(told)
    return text
