"""Results of evaluations, opened and told apart: by z = mean(d) / (std(d) / sqrt(n)), d the differences of two models by instruction.

Scores of two metrics have different ranges and spreads, so metrics are compared by z: the resolution of a metric is the share of pairs of
models with |z| > 1.96, and, where the true order of the models is known, of pairs told apart in the right direction.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from zoo.errors import UserError, suggest
from zoo.files import differences
from zoo.papers.typescore.evaluate import (
    RECORDS,
    SUMMARY,
    Record,
    by_instruction,
    on_disk,
)
from zoo.papers.typescore.files import SETTING
from zoo.papers.typescore.score import interval

OWN = ("images", "wanted_sha256", "style")  # of a setting: a result's own; texts are compared one by one
_SURE = 1.96  # |z| of two models that are told apart
TIED = 1e-9  # scores and ratings that differ by less are tied

Scores = Mapping[str, float]  # by instruction


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
    try:
        if not folder.is_dir():
            raise UserError(
                f"results: {name} does not exist; name the folder that `zoo eval configs/typescore/...` wrote"
            )
        setting = json.loads((folder / SETTING).read_bytes())
        setting["extractor"]["name"], setting["normalisation"], setting["images"]
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"results: {folder} cannot be read ({error.strerror}); name another folder") from None
    except OSError:
        raise UserError(
            f"results: {folder} holds no {SETTING}, so it is no folder of results; name the one that "
            "`zoo eval configs/typescore/...` wrote"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"results: {folder / SETTING} is damaged; evaluate these pictures again") from None
    if not (folder / SUMMARY).exists():
        raise UserError(f"results: the evaluation of {folder} has not come to its end; start it again, it goes on")
    records = list(on_disk(folder / RECORDS).values())
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
    apart = (*OWN, "extractor") if extractors else OWN
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
    low, high = interval(lambda pick: float(apart[pick].mean()), len(apart), resamples, seed)
    ties = np.abs(apart) < TIED
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
        check_truth(truth, list(dict.fromkeys(label for one in found for label in (one.a, one.b))))
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


def check_truth(truth: Sequence[str], labels: Sequence[str]) -> None:
    """UserError where `truth` is not every label once."""
    for label in truth:
        if label not in labels:
            raise UserError(f"truth names {label!r}, which is none of the results; {suggest(label, labels)}")
    lacking = [label for label in labels if label not in truth]
    if lacking or len(set(truth)) < len(truth):
        what = f"does not name {', '.join(lacking)}" if lacking else "names a model twice"
        raise UserError(f"truth={','.join(truth)} {what}; name every result once, best first")
