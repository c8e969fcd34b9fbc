"""Whether an extractor reads what is drawn, or repairs it: pictures with known faults, read and scored.

An extractor that repairs misspelt words, as language models do, gives faulty pictures too high a score. Each text is drawn with
a growing share of its letters replaced, and the score of what was read is compared with that of the drawn text itself.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from zoo.errors import UserError
from zoo.fields import NotEmpty, Seed, Share, Some, check_fields
from zoo.files import sha256, write, writing
from zoo.papers.typescore.evaluate import READINGS, as_json, claim
from zoo.papers.typescore.extractors.base import TEXT_CHUNK, WAY, Key, Readings, TextExtractor, describe
from zoo.papers.typescore.extractors.ocr import RapidOcr
from zoo.papers.typescore.metric import SPEC_VERSION, Normalisation, Parts, parts, rank_agreement, typescore
from zoo.papers.typescore.render import Corruption, Pixels, corrupt, plain

TEXTS = (
    "Fresh bread every morning at 7",
    "The last ferry leaves the north pier at dusk",
    "Mind the step and keep to the left",
    "Winter concert in the old town hall, Friday 8 pm",
    "Small boats sail further than tall promises",
    "Please ring twice and wait beside the blue gate",
    "Grand opening of the garden market on 12 May",
)
_APART = 3.0  # points of TypeScore by which a level may differ from its text
_STYLES: dict[str, dict[str, Any]] = {
    "clean": {"points": 32},
    "styled": {"font": "handwritten", "points": 30, "rotation": 8, "noise": 20, "texture": True},
}
_log = logging.getLogger("zoo")


@dataclass(frozen=True)
class Calibrate:
    """The scores of an extractor on known faults, beside those of a perfect one."""

    extractor: TextExtractor = RapidOcr()
    texts: Some[NotEmpty] = TEXTS  # what is drawn
    levels: Some[Share] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)  # shares of the letters and digits that are replaced
    seed: Seed = 0  # of faults and pictures
    size: Pixels = 512
    out: NotEmpty = "typescore-calibration"  # a folder for the results

    replaced: ClassVar[dict[str, str]] = {
        "cache": f"readings are kept in {READINGS} of the results; leave it out",
        "case_sensitive": "case does not count in a calibration; leave it out",
        "ignore_punct": "punctuation counts in a calibration; leave it out",
    }

    def __post_init__(self) -> None:
        check_fields(self)

    def run(self) -> dict[str, Any]:
        """Writes calibration.json into `out`, in place of an older one of the same setting; returns it without the pictures.

        "verdict" is "faithful", "repairs" where a level scores more than 3 points above its text, "misreads" where one scores
        more than 3 below, "repairs and misreads" for both. Failed readings are counted and left out of both sides.
        UserError where nothing was read, and before anything is for an `out` of another setting.
        """
        self.extractor.check()
        normalise, out = Normalisation(), Path(self.out)
        about: dict[str, Any] = {"spec_version": SPEC_VERSION, "extractor": describe(self.extractor)}
        about["normalisation"] = asdict(normalise)
        own = {name: getattr(self, name) for name in ("texts", "levels", "seed", "size")}
        setting = {**about, **own, "styles": _STYLES}
        with claim(out, setting, "a calibration"):
            rows = self._rows(Readings(out / READINGS))
            good = [row for row in rows if row["error"] is None]
            if not good:
                raise UserError(f"{self.extractor.name} read none of {len(rows)} pictures: {rows[0]['error']}")
            at: dict[Any, list[Any]] = {}
            for row in good:
                ours, text = (parts(normalise(row["wanted"]), normalise(row[key])) for key in ("read", "drawn"))
                row |= {**ours._asdict(), "score": typescore(ours), "text_score": typescore(text)}
                at.setdefault((row["style"], row["level"]), []).append(row)
            levels = [_level(some) for some in at.values()]
            apart = [one["difference"] for one in levels]
            words = ["repairs"] * (max(apart) > _APART) + ["misreads"] * (min(apart) < -_APART)
            figures = {
                "metric": "typescore calibration",
                **about,
                "verdict": " and ".join(words) or "faithful",
                "largest_difference": max(apart, key=abs),
                "spearman": {kind: _spearman([row for row in good if row["style"] == kind]) for kind in _STYLES},
                "levels": levels,
                "read": len(good),
                "failed": len(rows) - len(good),
            }
            with writing(out, WAY):
                write(out / "calibration.json", as_json({**figures, "setting": setting, "pictures": rows}, indent=1))
        _log.info("typescore: %s %s; see %s", self.extractor.name, figures["verdict"], out / "calibration.json")
        return {**figures, "out": str(out)}

    def _rows(self, readings: Readings) -> list[dict[str, Any]]:
        """What was drawn and read of every style, level and text; higher levels hold the faults of lower ones."""
        jobs = list(itertools.product(_STYLES, self.levels, range(len(self.texts))))
        pictures = []
        for style, level, i in jobs:
            drawn = corrupt(self.texts[i], Corruption(p_char=level), np.random.default_rng([self.seed, i]))
            pictures.append(plain(drawn, seed=self.seed + i, size=self.size, **_STYLES[style]))
        keys = [Key("{}-{:g}-{}".format(*job), sha256(one.tobytes())) for job, one in zip(jobs, pictures)]
        found = {}
        for i, picture, one in readings.through(self.extractor, keys, pictures.__getitem__):
            style, level, text = jobs[i]
            found[i] = {"style": style, "level": level, "wanted": self.texts[text], "drawn": picture.info[TEXT_CHUNK]}
            found[i] |= {"read": one.text, "error": one.error}
        return [found[i] for i in range(len(jobs))]


def _level(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The means of one style and level. `difference` is of the score less that of the drawn text, in points of 100."""
    means = {name: float(np.mean([row[name] for row in rows])) for name in (*Parts._fields, "score", "text_score")}
    means["difference"] = means["score"] - means["text_score"]
    figures = {name: round(value, 6) for name, value in means.items()}
    return {"style": rows[0]["style"], "level": rows[0]["level"], "read": len(rows), **figures}


def _spearman(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Of the level and the score, by picture: -1 where each further fault lowers the score."""
    levels, scores = ([row[name] for row in rows] for name in ("level", "score"))
    found = rank_agreement("spearmanr", levels, scores)
    return None if math.isnan(found) else round(found, 4)
