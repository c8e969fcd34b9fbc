"""Whether an extractor reads what is drawn, or repairs it: pictures with known faults, read and scored.

An extractor that repairs misspelt words, as language models do, gives faulty pictures too high a score. Each text is drawn with
a growing share of its letters replaced, and the score of what was read is compared with that of the drawn text itself.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from msgspec import Meta

from zoo.errors import UserError
from zoo.fields import NotEmpty, Seed, Share, Some, check_fields
from zoo.files import write
from zoo.papers.typescore.extractors import Cached, RapidOcr, TextExtractor, describe
from zoo.papers.typescore.files import as_json, as_png, claim, seen, writing
from zoo.papers.typescore.render import TEXT, Corruption, corrupt, plain
from zoo.papers.typescore.score import SPEC_VERSION, Normalisation, Parts, batch, typescore

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
_RESULT = "calibration.json"
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
    size: Annotated[int, Meta(ge=64, le=2**14)] = 512  # pixels of a picture's side
    cache: str = ""  # a folder in which readings are kept; empty for none
    out: NotEmpty = "typescore-calibration"  # a folder for the results

    standalone: ClassVar[bool] = True  # `zoo eval` runs it without a model

    def __post_init__(self) -> None:
        check_fields(self)
        if not all(text.strip() for text in self.texts):
            raise UserError("texts holds a blank one; give texts of four words or more")
        for text in self.texts:
            if not Normalisation(self.case_sensitive, self.ignore_punct)(text):
                raise UserError(
                    f"texts: {text!r} is nothing without its punctuation; leave ignore_punct out, or give another text"
                )
        if len(set(self.levels)) < len(self.levels):
            raise UserError(f"levels={self.levels} must be shares from 0 to 1, each once")

    def run(self) -> dict[str, Any]:
        """Writes calibration.json, calibration.md and calibration.png into `out`, in place of older ones of the same setting;
        returns the first.

        "verdict" is "faithful", "repairs" where a level scores more than 3 points above its text, "misreads" where one scores
        more than 3 below, "repairs and misreads" for both. Failed readings are counted and left out of both sides.
        UserError where nothing was read, and before anything is for an `out` of another setting.
        """
        from tqdm import tqdm

        self.extractor.check()
        out = Path(self.out)
        normalise = Normalisation(self.case_sensitive, self.ignore_punct)
        about = {
            "spec_version": SPEC_VERSION,
            "extractor": describe(self.extractor),
            "normalisation": dataclasses.asdict(normalise),
        }
        setting = {
            **about,
            "texts": list(self.texts),
            "levels": list(self.levels),
            "styles": _STYLES,
            "seed": self.seed,
            "size": self.size,
        }
        jobs = [(style, level, i) for style in _STYLES for level in self.levels for i in range(len(self.texts))]
        rows = []
        with (
            claim(out, setting, "a calibration"),
            tqdm(total=len(jobs), unit=" images", disable=not seen(), file=sys.stderr) as bar,
        ):
            reader: Any = Cached(self.extractor, self.cache) if self.cache else self.extractor
            size = max(int(reader.batch), 1)
            for start in range(0, len(jobs), size):
                some = jobs[start : start + size]
                pictures = [self.picture(*job) for job in some]
                for (style, level, i), picture, read in zip(some, pictures, reader.extract(pictures), strict=True):
                    drawn = picture.info[TEXT]
                    rows.append(
                        {"style": style, "level": level, "wanted": self.texts[i], "drawn": drawn, "read": read.text}
                        | {"error": read.error, "seconds": read.seconds}
                    )
                    bar.update()
            good = [row for row in rows if row["error"] is None]
            if not good:
                raise UserError(
                    f"extractor {reader.name} read none of {len(rows)} pictures; the first: {rows[0]['error']}"
                )
            wanted = [normalise(row["wanted"]) for row in good]
            by_read = batch(wanted, [normalise(row["read"]) for row in good])
            by_text = batch(wanted, [normalise(row["drawn"]) for row in good])
            for row, ours, text in zip(good, by_read, by_text):
                row["parts"] = {name: round(float(value), 6) for name, value in zip(Parts._fields, ours)}
                row["score"], row["text_score"] = round(float(typescore(ours)), 4), round(float(typescore(text)), 4)
            levels = [
                level_figures(style, level, [row for row in good if row["style"] == style and row["level"] == level])
                for style in _STYLES
                for level in self.levels
            ]
            levels = [one for one in levels if one["read"]]
            figures = {
                "metric": "typescore calibration",
                **about,
                "verdict": verdict(levels),
                "largest_difference": max((one["difference"] for one in levels), key=abs),
                "spearman": {style: _spearman([row for row in good if row["style"] == style]) for style in _STYLES},
                "levels": levels,
                "read": len(good),
                "failed": len(rows) - len(good),
                "seconds": round(sum(row["seconds"] for row in rows), 2),
            }
            with writing(out):
                whole = {**figures, "setting": setting, "pictures": rows}
                write(out / _RESULT, as_json(whole, indent=1))
                write(out / "calibration.md", table(figures).encode())
                write(out / "calibration.png", plot(levels))
        if figures["failed"]:
            _log.warning("typescore: %d of %d pictures were not read and are left out", figures["failed"], len(rows))
        _log.info("typescore: %s %s; see %s", self.extractor.name, figures["verdict"], out / "calibration.md")
        return {**figures, "out": str(out)}

    def picture(self, style: str, level: float, i: int) -> Any:
        """The i-th text in one of the two styles, with a share of its letters replaced; higher levels hold lower ones' faults."""
        rng = np.random.default_rng([self.seed, i])
        drawn = corrupt(self.texts[i], Corruption(p_char=level), rng)
        return plain(drawn, seed=self.seed + i, size=self.size, **_STYLES[style])


def level_figures(style: str, level: float, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The means of one style and level. `difference` is of the score less that of the drawn text, in points of 100."""
    found: dict[str, Any] = {"style": style, "level": level, "read": len(rows)}
    if rows:
        found |= {name: round(float(np.mean([row["parts"][name] for row in rows])), 6) for name in Parts._fields}
        score, text = (float(np.mean([row[key] for row in rows])) for key in ("score", "text_score"))
        found |= {"score": round(score, 4), "text_score": round(text, 4), "difference": round(score - text, 4)}
    return found


def verdict(levels: Sequence[Mapping[str, Any]]) -> str:
    """What the differences of all levels say of the extractor."""
    words = []
    if any(one["difference"] > _APART for one in levels):
        words.append("repairs")
    if any(one["difference"] < -_APART for one in levels):
        words.append("misreads")
    return " and ".join(words) or "faithful"


def _spearman(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Of the level and the score, by picture: -1 where each further fault lowers the score."""
    from scipy import stats

    if len({row["level"] for row in rows}) < 2 or len({row["score"] for row in rows}) < 2:
        return None
    return round(float(stats.spearmanr([row["level"] for row in rows], [row["score"] for row in rows])[0]), 4)


def table(figures: Mapping[str, Any]) -> str:
    """The calibration as Markdown."""
    extractor = figures["extractor"]
    lines = [
        f"{extractor['name']} {extractor['version']}: {figures['verdict']}. TypeScore of pictures with a share of their letters "
        "replaced, and of the drawn text itself.",
        "",
        "| style | replaced | NED | NLCS | SW | TypeScore | of the text | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one['style']} | {one['level']:.0%} | {one['ned']:.3f} | {one['nlcs']:.3f} | {one['sw']:.3f} | {one['score']:.1f} | "
        f"{one['text_score']:.1f} | {one['difference']:+.1f} |"
        for one in figures["levels"]
    ]
    return "\n".join(lines) + "\n"


def plot(levels: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG: the scores over the share of faults, beside those of a perfect extractor."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    for style, colour in zip(_STYLES, ("#1f6fb4", "#d1571b")):
        some = sorted((one for one in levels if one["style"] == style), key=lambda one: one["level"])
        at = [100 * one["level"] for one in some]
        axes.plot(at, [one["text_score"] for one in some], color=colour, ls=":", lw=1)
        axes.plot(at, [one["score"] for one in some], color=colour, marker="o", ms=4, label=style)
    axes.set(xlabel="% of letters replaced", ylabel="TypeScore (dotted: of the drawn text)")
    axes.grid(color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.legend()
    return as_png(figure)
