"""Whether a text is drawn in the style that was asked for, told apart from what it says.

With boxes of the text that was found, colour, case and placement are measured. What boxes do not tell counts in no mean.
"""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageColor

from zoo.papers.typescore.extractors.base import Line, flat
from zoo.papers.typescore.render import COLOURS

NEAR = 25.0  # Delta E (CIE 1976) up to which an ink is of a named colour
_SAME = "covwxszukpCOVWXSZUKPIl"  # letters that look like one of the other case: readers mix these up
_SHORTEST, _LONGEST = 3, 640  # pixels of a box's sides that are looked at


class Verdict(NamedTuple):
    """Whether one attribute was followed, None where that was not evaluated; and what was seen."""

    followed: bool | None
    found: str


def measured(style: Mapping[str, str], picture: Image.Image, lines: Sequence[Line]) -> dict[str, Verdict]:
    """A verdict for each attribute of `style`, from the boxes of what was read in the picture.

    Colour: the median ink inside the boxes within `NEAR` of the named colour, one of `render.COLOURS` or of CSS. Case: of the
    letters that tell. Placement: in which third of the picture the centre of the box around all lines lies, of "centre" both ways.
    """
    lines = [line for line in lines if line.text.strip()]
    text = " ".join(line.text for line in lines)
    tell = {
        "colour": lambda value: _colour(value, picture, lines),
        "case": lambda value: _case(value, text),
        "placement": lambda value: _placement(value, flat(picture).size, lines),
    }
    found = {}
    for attribute, value in style.items():
        verdict = tell[attribute](value.strip().lower()) if lines and attribute in tell else None
        found[attribute] = verdict or Verdict(None, "not evaluated: boxes do not tell")
    return found


def share(followed: Iterable[bool | None]) -> float | None:
    """Of the attributes that were evaluated, how many were followed, in 0..100; None where none was."""
    known = [one for one in followed if one is not None]
    return 100 * sum(known) / len(known) if known else None


def lab(colours: Any) -> np.ndarray:
    """CIE Lab [..., 3] (white as of D65) of red, green, blue in 0..255."""
    c = np.asarray(colours, np.float64) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
    t = xyz / [0.9505, 1.0, 1.089]
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def ink(picture: Image.Image, lines: Sequence[Line]) -> np.ndarray | None:
    """The median colour of letters, red, green, blue in 0..255 [3]; None where no box shows anything but its ground.

    The ground of a box is the median of its rim. Ink is what is furthest from it: the rims of letters are mixtures.
    """
    seen = flat(picture)
    inks = []
    for line in lines:
        corners = np.asarray(line.box, float)
        wide, high = (int(np.clip(np.linalg.norm(corners[i] - corners[0]), _SHORTEST, _LONGEST)) for i in (1, 3))
        top_left, top_right, bottom_right, bottom_left = corners
        quad = (*top_left, *bottom_left, *bottom_right, *top_right)
        pixels = np.asarray(
            seen.transform((wide, high), Image.Transform.QUAD, tuple(map(float, quad)), Image.Resampling.BILINEAR)
        )
        rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        apart = np.linalg.norm(lab(pixels) - lab(np.median(rim, axis=0)), axis=-1)
        far = np.quantile(apart, 0.98)
        if far > 10:  # less than that is noise of the ground
            inks.append(pixels[apart >= 0.75 * far])
    return np.median(np.concatenate(inks), axis=0) if inks else None


def _colour(value: str, picture: Image.Image, lines: Sequence[Line]) -> Verdict | None:
    named = [COLOURS[value]] if value in COLOURS else []
    with contextlib.suppress(ValueError):
        named.append(ImageColor.getrgb(value.replace(" ", ""))[:3])
    seen = ink(picture, lines)
    if not named or seen is None:
        return None
    apart = min(float(np.linalg.norm(lab(seen) - lab(colour))) for colour in named)
    return Verdict(apart < NEAR, f"#{''.join(f'{round(c):02x}' for c in seen)}, Delta E {apart:.0f}")


def _case(value: str, text: str) -> Verdict | None:
    starts, inside = _telling(text)
    letters = [*starts, *inside]
    capitals = sum(c.isupper() for c in letters)
    if not letters or value not in ("capitals", "uppercase", "lowercase"):
        return None
    if value == "lowercase":  # one capital at a word's start makes a sentence or a name; within words it was misread
        followed = not any(c.isupper() for c in starts) and capitals <= 1 and 10 * capitals <= len(letters)
    else:
        followed = 10 * capitals >= 9 * len(letters)
    return Verdict(followed, f"{capitals} of {len(letters)} letters that tell are capitals")


def _telling(text: str) -> tuple[list[str], list[str]]:
    """The letters of a reading that tell its case: those that begin words, and others.

    Readers go by the size of neighbours where a capital looks like its small letter. They are right at the start of a word,
    where capitals belong, unless that letter stands alone or beside digits, and mix such letters up within words. Where
    nothing else tells, letters are taken as they were read.
    """
    starts: list[str] = []
    rest: list[str] = []
    for word in re.findall(r"[^\W_]+(?:['’][^\W_]+)*", unicodedata.normalize("NFC", text)):
        letters = [c for c in word if c.isupper() or c.islower()]
        if word[0] in letters:
            first, *letters = letters
            odd = first in _SAME and first.islower() and any(c.isupper() for c in letters)  # "cOME": nobody writes so
            beside = bool(letters) or first == "I"  # a word by itself, the only one of these
            if first not in _SAME or (beside and not odd and not any(c.isdigit() for c in word)):
                starts.append(first)
            elif not odd:
                rest.append(first)
        rest += letters
    inside = [c for c in rest if c not in _SAME]
    return starts, inside or rest


def _placement(value: str, size: tuple[int, int], lines: Sequence[Line]) -> Verdict | None:
    corners = np.array([line.box for line in lines], float).reshape(-1, 2)
    x, y = (corners.min(axis=0) + corners.max(axis=0)) / 2 / size
    thirds = [
        ("left", "middle", "right")[int(np.clip(3 * x, 0, 2))],
        ("top", "middle", "bottom")[int(np.clip(3 * y, 0, 2))],
    ]
    said = f"centre at {x:.0%}, {y:.0%}"
    if value in ("centre", "center", "middle"):
        return Verdict(thirds == ["middle", "middle"], said)
    return Verdict(value in thirds, said) if value in ("top", "bottom", "left", "right") else None
