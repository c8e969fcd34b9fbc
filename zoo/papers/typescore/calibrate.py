"""Whether an extractor reads what is drawn, or repairs it: pictures with known faults, read and scored.

An extractor that repairs misspelt words, as language models do, gives faulty pictures too high a score. Each text is drawn with
a growing share of its letters replaced, and the score of what was read is compared with that of the drawn text itself.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from zoo.errors import UserError
from zoo.fields import NotEmpty, Seed, Share, Some, check_fields
from zoo.files import sha256, write, writing
from zoo.papers.typescore.evaluate import READINGS, as_json, claim
from zoo.papers.typescore.extractors.base import TEXT_CHUNK, Key, Readings, TextExtractor, describe, need_packages
from zoo.papers.typescore.extractors.ocr import RapidOcr
from zoo.papers.typescore.metric import SPEC_VERSION, Normalisation, Parts, parts, typescore
from zoo.papers.typescore.render import Corruption, Pixels, corrupt, plain
from zoo.papers.typescore.report import markdown

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
    texts: Some[str] = TEXTS  # what is drawn
    levels: Some[Share] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)  # shares of the letters and digits that are replaced
    case_sensitive: bool = False  # whether "Open" for "open" is an error
    ignore_punct: bool = False  # whether punctuation is left out of the comparison
    seed: Seed = 0  # of faults and pictures
    size: Pixels = 512
    out: NotEmpty = "typescore-calibration"  # a folder for the results

    replaced: ClassVar[dict[str, str]] = {"cache": f"readings are kept in {READINGS} of the results; leave it out"}

    def __post_init__(self) -> None:
        check_fields(self)
        for text in self.texts:
            if not Normalisation(self.case_sensitive, self.ignore_punct)(text):
                raise UserError(f"texts: {text!r} is nothing to compare; give texts of four words or more")
        if len(set(self.levels)) < len(self.levels):
            raise UserError(f"levels={self.levels} must be shares from 0 to 1, each once")

    def run(self) -> dict[str, Any]:
        """Writes calibration.json and calibration.md into `out`, in place of older ones of the same setting; returns the first.

        "verdict" is "faithful", "repairs" where a level scores more than 3 points above its text, "misreads" where one scores
        more than 3 below, "repairs and misreads" for both. Failed readings are counted and left out of both sides.
        UserError where nothing was read, and before anything is for an `out` of another setting.
        """
        from tqdm import tqdm

        need_packages("typescore", "rapidfuzz")
        self.extractor.check()
        normalise = Normalisation(self.case_sensitive, self.ignore_punct)
        about = {"spec_version": SPEC_VERSION, "extractor": describe(self.extractor)}
        about["normalisation"] = dataclasses.asdict(normalise)
        own = {name: getattr(self, name) for name in ("texts", "levels", "seed", "size")}
        setting = {**about, **own, "styles": _STYLES}
        jobs = list(itertools.product(_STYLES, self.levels, range(len(self.texts))))
        rows, out, size = [], Path(self.out), max(int(self.extractor.batch), 1)
        with claim(out, setting, "a calibration"):
            readings = Readings(out / READINGS)
            for start in tqdm(range(0, len(jobs), size), disable=None):
                some = jobs[start : start + size]
                pictures = [self.picture(*job) for job in some]
                keys = [Key("{}-{:g}-{}".format(*job), sha256(one.tobytes())) for job, one in zip(some, pictures)]
                read = readings.through(self.extractor.extract, keys, pictures)
                for (style, level, i), picture, one in zip(some, pictures, read):
                    row = {"style": style, "level": level, "wanted": self.texts[i], "drawn": picture.info[TEXT_CHUNK]}
                    rows.append(row | {"read": one.text, "error": one.error, "seconds": one.seconds})
            good = [row for row in rows if row["error"] is None]
            if not good:
                raise UserError(
                    f"{self.extractor.name} read none of {len(rows)} pictures; the first: {rows[0]['error']}"
                )
            for row in good:
                ours, text = (parts(normalise(row["wanted"]), normalise(row[key])) for key in ("read", "drawn"))
                row |= {**ours._asdict(), "score": typescore(ours), "text_score": typescore(text)}
            levels = [
                _level(some)
                for at in itertools.product(_STYLES, self.levels)
                if (some := [row for row in good if (row["style"], row["level"]) == at])
            ]
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
                "seconds": round(sum(row["seconds"] for row in rows), 2),
            }
            with writing(out, "free some space, or name another folder with out=FOLDER"):
                write(out / "calibration.json", as_json({**figures, "setting": setting, "pictures": rows}, indent=1))
                write(out / "calibration.md", table(figures))
        _log.info("typescore: %s %s; see %s", self.extractor.name, figures["verdict"], out / "calibration.md")
        return {**figures, "out": str(out)}

    def picture(self, style: str, level: float, i: int) -> Image.Image:
        """The i-th text in one of the two styles, with a share of its letters replaced; higher levels hold lower ones' faults."""
        drawn = corrupt(self.texts[i], Corruption(p_char=level), np.random.default_rng([self.seed, i]))
        return plain(drawn, seed=self.seed + i, size=self.size, **_STYLES[style])


def _level(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The means of one style and level. `difference` is of the score less that of the drawn text, in points of 100."""
    means = {name: float(np.mean([row[name] for row in rows])) for name in (*Parts._fields, "score", "text_score")}
    means["difference"] = means["score"] - means["text_score"]
    return {
        **{name: rows[0][name] for name in ("style", "level")},
        "read": len(rows),
        **{k: round(v, 6) for k, v in means.items()},
    }


def _spearman(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Of the level and the score, by picture: -1 where each further fault lowers the score."""
    from scipy import stats

    levels, scores = ([row[name] for row in rows] for name in ("level", "score"))
    return (
        round(float(stats.spearmanr(levels, scores).statistic), 4)
        if rows and np.ptp(levels) and np.ptp(scores)
        else None
    )


def table(figures: Mapping[str, Any]) -> str:
    """The calibration as Markdown."""
    extractor = figures["extractor"]
    text = f"{extractor['name']} {extractor['version']}: {figures['verdict']}. TypeScore of pictures with a share of their letters "
    return text + "replaced (level), and of the drawn text itself.\n\n" + markdown(figures["levels"])
