"""Agreement of the scores with people, by picture and by model, and of extractors with one another."""

from __future__ import annotations

import csv
import difflib
import io
import itertools
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zoo.errors import UserError, suggest
from zoo.files import reading
from zoo.papers.typescore.evaluate import (
    Record,
    by_instruction,
)
from zoo.papers.typescore.files import NAMED
from zoo.papers.typescore.results import TIED, Result
from zoo.papers.typescore.score import interval

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
            said = suggest(name, near or sorted(known)[:NAMED])
            more = "" if near or len(known) <= NAMED else f" and {len(known) - NAMED} more"
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
    with reading(f"human={path}", "name a CSV file"):
        text = Path(path).read_bytes().decode("utf-8-sig")
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

    def ranged(value: Callable[[np.ndarray], float]) -> list[float | None]:
        return _with_interval(value, len(ids), resamples, seed)

    every, within = np.ones((len(ids), len(ids))), np.eye(len(ids))
    found: dict[str, Any] = {
        "ratings": sum(map(len, said.values())),
        "left_out": left_out,
        "pictures": len(names),
        "instructions": len(ids),
    }
    for name, correlation in _CORRELATIONS.items():
        found[name] = ranged(lambda t, c=correlation: c(np.repeat(x, t[of]), np.repeat(y, t[of])))  # type: ignore[misc]
    found |= {
        "pair_accuracy": ranged(lambda t: accuracy(t, every)),
        "pairs": int(counted.sum()) // 2,  # each stands there both ways
        "pair_accuracy_within_instructions": ranged(lambda t: accuracy(t, within)),
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
    return np.where(np.abs(differences) < TIED, 0.0, np.sign(differences))


def _tied(*values: np.ndarray) -> list[np.ndarray]:
    """Means, with those equal that only rounding sets apart, as `_sign` has it."""
    return [np.round(one, 9) for one in values]


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    from scipy import stats

    return float(stats.spearmanr(*_tied(x, y))[0]) if len(x) > 1 else math.nan


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    from scipy import stats

    return float(stats.pearsonr(x, y)[0]) if len(x) > 1 else math.nan


def _kendall(x: np.ndarray, y: np.ndarray) -> float:
    from scipy import stats

    return float(stats.kendalltau(*_tied(x, y))[0]) if len(x) > 1 else math.nan


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
            low, high = interval(lambda pick: value(np.bincount(pick, minlength=n)), n, resamples, seed)
    return [None if not math.isfinite(v) else round(v, 6) for v in (whole, low, high)]


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
    kept = set(common)
    read = {label: [(image, name) for image, name in some if name in kept] for label, some in read.items()}
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
            {"label": label, **mean_of(values, resamples, seed)} for label, values in scores[name].items()
        ]  # by label, so that equal means stand in its order
        order.sort(key=lambda one: one["score"] if worse else -one["score"])
        failed = sum(len(one.records) - len(one.read) for one in of.values())
        described = of[labels[0]].setting["extractor"]
        extractors.append({"label": name, "extractor": described, "failed": failed, "order": order})
    agreeing = []
    for a, b in itertools.combinations(by, 2):
        x, y = (np.array([scores[one][label].mean() for label in labels]) for one in (a, b))
        apart = np.mean([scores[a][label] - scores[b][label] for label in labels], axis=0)
        low, high = interval(lambda pick, d=apart: float(d[pick].mean()), len(apart), resamples, seed)  # type: ignore[misc]
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
                f"results hold nothing of {', '.join(lacking[:NAMED])} read by {name}, and extractors are compared on the same "
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


def mean_of(values: np.ndarray, resamples: int, seed: int) -> dict[str, float]:
    """The mean over instructions with its interval, in points."""
    low, high = interval(lambda pick: float(values[pick].mean()), len(values), resamples, seed)
    return {"score": round(float(values.mean()), 4), "low": round(low, 4), "high": round(high, 4)}
