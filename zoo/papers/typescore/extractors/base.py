"""What an extractor hands back, the order of reading, and what all extractors share."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol, TypeAlias, runtime_checkable

import msgspec
import numpy as np
from msgspec import Meta
from PIL import Image, ImageOps
from tqdm import tqdm

from zoo.errors import UserError
from zoo.files import writing

REVISION = 1  # of what is done here with a reading: order, joining, prompt, cleaning. Scores of two do not compare
TEXT_CHUNK = "typescore_text"  # the PNG text chunk in which the renderer leaves what it drew
LONGEST = 300  # characters of an error
WAY = "free some space, or name another folder with out=FOLDER"  # where a folder cannot be written

Box: TypeAlias = tuple[tuple[float, float], ...]
Threads: TypeAlias = Annotated[int, Meta(ge=1, le=2**10)]


@dataclass(frozen=True)
class Line:
    """A piece of text found in an image."""

    text: str
    box: Box  # corners top left, top right, bottom right, bottom left as the text is read: (x, y) in pixels, y down


@dataclass(frozen=True)
class Extraction:
    """What was read from one image. No text is a reading (""); with an `error` it is none, and counts in no mean."""

    text: str
    lines: tuple[Line, ...] = ()  # in the reader's own order; empty where it gives no boxes
    error: str | None = None


Keep: TypeAlias = Callable[[int, Extraction], object]  # is told of the i-th image's reading


@runtime_checkable
class TextExtractor(Protocol):
    """Reads the text in images. Implementations are frozen dataclasses of plain values, so that configs may name them."""

    name: ClassVar[str]

    @property
    def batch(self) -> int: ...  # how many images are worth handing over at once

    def version(self) -> str: ...  # of all that decides what is read from an image, beside the fields

    def check(self) -> None: ...  # UserError when something that reading needs is missing: a package, a key

    def extract(self, images: Sequence[Image.Image], keep: Keep | None = None) -> list[Extraction]:
        """One extraction per image, in order; one with an error where it cannot be read.

        `keep` is called with each as it is done, in any order, so that a call that is stopped loses none. Raises Retryable
        where a service is out of order.
        """


def aside(default: Any) -> Any:
    """A field of an extractor that does not change what is read (time limits, threads): no part of `describe`."""
    return dataclasses.field(default=default, metadata={"aside": True})


def describe(extractor: Any) -> dict[str, Any]:
    """Name, version, the fields that decide what is read, and the prompt if there is one: scores compare only where these are equal."""
    decide = [f.name for f in dataclasses.fields(extractor) if not f.metadata.get("aside", False)]
    config = {name: getattr(extractor, name) for name in decide}
    prompt = {"prompt": extractor.prompt} if hasattr(extractor, "prompt") else {}
    return {"name": extractor.name, "version": extractor.version(), "config": config, **prompt}


def need_packages(*packages: str) -> None:
    """UserError naming the extra where one of these, or of what every evaluation needs, is not installed."""
    for package in (*packages, "rapidfuzz", "scipy", "jinja2"):
        try:
            importlib.import_module(package)
        except ImportError:
            way = 'install the extra `typescore` (pip install -e ".[typescore]")'
            raise UserError(f"typescore needs the package {package}, which is not installed; {way}") from None


class Key(NamedTuple):
    """What was read: a picture's name and the digest of its content."""

    image: str
    sha256: str


class _Entry(msgspec.Struct):
    key: Key
    extraction: Extraction


class Readings:
    """What was read, a line each in a file as soon as it has come: a run that is stopped pays for nothing twice.

    Failures are there too, and are tried again, after all others. Damaged lines are passed over. UserError where the file
    cannot be written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path  # None: in memory
        self._found: dict[Key, Extraction] = {}
        for line in path.read_bytes().split(b"\n") if path is not None and path.exists() else ():
            with contextlib.suppress(msgspec.DecodeError):
                entry = msgspec.json.decode(line, type=_Entry)
                self._found[entry.key] = entry.extraction

    def _put(self, keys: Sequence[Key], i: int, one: Extraction) -> None:
        self._found[keys[i]] = one
        if self.path is not None:
            entry = b"\n" + msgspec.json.encode(_Entry(keys[i], one))  # in one piece, behind what may be half a line
            with writing(self.path, WAY), open(self.path, "ab", buffering=0) as file:
                file.write(entry)

    def through(
        self, extractor: TextExtractor, keys: Sequence[Key], opened: Callable[[int], Image.Image | Extraction]
    ) -> Iterator[tuple[int, Any, Extraction]]:
        """The index, picture and reading of every key; the extractor reads what is not there.

        `opened` gives the i-th picture, or the failed extraction that says why there is none.
        """
        order = sorted(range(len(keys)), key=lambda i: keys[i] in self._found)
        for start in tqdm(range(0, len(order), extractor.batch), unit_scale=extractor.batch, disable=None):
            some = {i: opened(i) for i in order[start : start + extractor.batch]}
            good = {i for i in some if keys[i] in self._found and self._found[keys[i]].error is None}
            todo = {i: one for i, one in some.items() if isinstance(one, Image.Image) and i not in good}
            if unread := [keys[i] for i in todo]:
                read = extractor.extract([*todo.values()], functools.partial(self._put, unread))
                self._found |= dict(zip(unread, read, strict=True))
            for i, one in some.items():
                yield i, one, one if isinstance(one, Extraction) else self._found[keys[i]]


def flat(image: Image.Image) -> Image.Image:
    """`image` as RGB the way it is seen: turned as its EXIF data say, transparency on white. Its `info` is kept.

    Raises OSError or the like when the file behind it is broken, ValueError for shades of more than 8 bits.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # Pillow would make white of all shades above 255
        raise ValueError(f"black and white of mode {image.mode} are not known; save it as RGB or as 8-bit grey")
    if not image.has_transparency_data:
        return image.convert("RGB")
    over = image.convert("RGBA")
    seen = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    seen.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return seen


def shorten(text: str) -> str:
    """One line of at most `LONGEST` characters."""
    return " ".join(text.split())[:LONGEST]


def failed(error: BaseException | str) -> Extraction:
    """The record of an image that could not be read."""
    return Extraction("", error=shorten(error if isinstance(error, str) else f"{type(error).__name__}: {error}"))


def each(
    images: Sequence[Image.Image], read: Callable[[Image.Image], Extraction], keep: Keep | None
) -> list[Extraction]:
    """`read` on one image after another; what it raises becomes that image's error."""
    found = []
    for i, image in enumerate(images):
        try:
            found.append(read(flat(image)))
        except Exception as error:
            found.append(failed(error))
        if keep is not None:
            keep(i, found[-1])
    return found


def reading_order(lines: Sequence[Line]) -> list[list[Line]]:
    """Rows from top to bottom, each from left to right, of text that may be rotated as a whole.

    Every box is turned back by the median of the boxes' angles, weighted by their widths: a text turned by 10 degrees
    has the end of a row below the beginning of the next. A line starts a new row when its centre is half the median
    height or more away from the row's mean. Lines without text are left out.
    """
    lines = [line for line in lines if line.text.strip()]
    if not lines:
        return []
    boxes = np.array([line.box for line in lines], dtype=float)  # [N, 4, 2]
    across = (boxes[:, 1] - boxes[:, 0] + boxes[:, 2] - boxes[:, 3]) / 2
    down = (boxes[:, 3] - boxes[:, 0] + boxes[:, 2] - boxes[:, 1]) / 2
    angles, widths = np.arctan2(across[:, 1], across[:, 0]), np.hypot(*across.T) + 1e-9
    order = np.argsort(angles)
    theta = float(angles[order][np.searchsorted(np.cumsum(widths[order]), widths.sum() / 2)])
    x, y = boxes.mean(axis=1).T
    cos, sin = math.cos(theta), math.sin(theta)
    x, y = cos * x + sin * y, cos * y - sin * x
    apart = 0.5 * max(float(np.median(np.hypot(*down.T))), 1e-6)

    rows: list[list[int]] = []
    for i in np.argsort(y, kind="stable"):
        if rows and abs(y[i] - y[rows[-1]].mean()) < apart:
            rows[-1].append(i)
        else:
            rows.append([i])
    return [[lines[i] for i in sorted(row, key=lambda i: x[i])] for row in rows]


def join(rows: Sequence[str]) -> str:
    """Rows of text as one text. Rows are joined by a space, and words that were broken at a row's end put together.

    After "exam-" comes "ple": example; after "EXAM-" comes "PLE": EXAMPLE. Before anything but small letters (or capitals
    after capitals) the hyphen may belong to the word and stays: Coca-Cola, 24-hour. A dash apart from a word joins nothing.
    """

    def mended(found: re.Match[str]) -> str:
        first, hyphen, second = found.groups()
        capitals = len(first) > 1 and first.isalpha() and first.isupper() and second.isupper()
        broken = hyphen == "\u00ad" or (first[-1].isalpha() and (second[0].islower() or capitals))
        return first + hyphen * (not broken)

    text = "\n".join(" ".join(row.split()) for row in rows if row.strip())
    return re.sub(r"(\S*[^\W_])([-\u2010\u00ad])\n(?=([^\W_]\S*))", mended, text).replace("\n", " ")


def text_of(lines: Sequence[Line]) -> str:
    """The text of boxes in `reading_order`."""
    return join([" ".join(line.text for line in row) for row in reading_order(lines)])
