"""What an extractor hands back, the order of reading, and what all extractors share."""

from __future__ import annotations

import dataclasses
import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import numpy as np
from msgspec import Meta
from PIL import Image, ImageOps

from zoo.errors import UserError

REVISION = (
    1  # of what is done here with a reading: order, joining, prompt, cleaning. Scores of two revisions do not compare
)
TEXT_CHUNK = "typescore_text"  # the PNG text chunk in which the renderer leaves what it drew
LONGEST = 300  # characters of an error

Box = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Line:
    """A piece of text found in an image."""

    text: str
    box: (
        Box  # corners top left, top right, bottom right, bottom left as the text is read: (x, y) in pixels, y downwards
    )
    score: float  # the reader's confidence, 0 to 1


@dataclass(frozen=True)
class Extraction:
    """What was read from one image. No text is a reading (""); with an `error` it is none, and counts in no mean."""

    text: str
    lines: tuple[Line, ...] = ()  # in the reader's own order; empty where it gives no boxes
    raw: Any = None  # what else it said, JSON values only
    seconds: float = 0.0
    error: str | None = None

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, record: dict[str, Any]) -> Extraction:
        """The extraction of a `record()`. Raises KeyError, TypeError or ValueError when it is none."""
        text, error = record["text"], record["error"]
        if not isinstance(text, str) or not (error is None or isinstance(error, str)):
            raise TypeError("text and error of an extraction are strings")
        lines = []
        for line in record["lines"]:
            if not isinstance(line["text"], str):
                raise TypeError("the text of a line is a string")
            lines.append(Line(line["text"], box_of(line["box"]), float(line["score"])))
        return cls(text, tuple(lines), record["raw"], float(record["seconds"]), error)


Keep = Callable[
    [int, Extraction], object
]  # is told of the i-th image's reading; of one whose telling was broken off twice


@runtime_checkable
class TextExtractor(Protocol):
    """Reads the text in images. Implementations are frozen dataclasses of plain values, so that configs may name them."""

    name: ClassVar[str]

    @property
    def batch(self) -> int:
        """How many images are worth handing over at once."""
        ...

    def version(self) -> str:
        """Of all that decides what is read from an image, beside the fields."""
        ...

    def check(self) -> None:
        """UserError when something that reading needs is missing: a package, a program, a key."""
        ...

    def extract(self, images: Sequence[Image.Image], keep: Keep | None = None) -> list[Extraction]:
        """One extraction per image, in order. An image that cannot be read is one with an error.

        `keep` is called in this thread with each as it is done, in any order, so that a call that is stopped loses none.
        """
        ...


Seconds: TypeAlias = Annotated[float, Meta(gt=0, le=86400)]  # at most a day
Threads: TypeAlias = Annotated[int, Meta(ge=1, le=2**10)]


def aside(default: Any) -> Any:
    """A field of an extractor that does not change what is read (time limits, threads): no part of `describe`."""
    return dataclasses.field(default=default, metadata={"aside": True})


def describe(extractor: Any) -> dict[str, Any]:
    """Name, version, the fields that decide what is read, and the prompt if there is one: JSON values for every record.

    Scores compare only where these are equal.
    """
    if hasattr(extractor, "described"):  # one behind a cache
        return dict(extractor.described)
    fields = {
        f.name: getattr(extractor, f.name) for f in dataclasses.fields(extractor) if not f.metadata.get("aside", False)
    }
    found = {"name": extractor.name, "version": extractor.version(), "config": fields}
    prompt = getattr(extractor, "prompt", None)
    return found if prompt is None else {**found, "prompt": prompt}


def missing(name: str, package: str, extra: str) -> UserError:
    """The sentence for a package that is not installed."""
    return UserError(
        f"extractor {name} needs the package {package}, which is not installed; install the extra `{extra}` "
        f'(pip install -e ".[{extra}]")'
    )


def need(good: bool, name: str, field: str, value: object, expected: str) -> None:
    """UserError unless `good`."""
    if not good:
        raise UserError(f"extractor {name}: {field} is {value!r}; give {expected}")


def keeping(read: Callable[..., list[Extraction]], keep: Keep, *given: Any) -> list[Extraction]:
    """`read(*given)`, an extractor's `extract` or `ask`, and `keep` told; in the end, where that takes no `keep`."""
    if takes_keep(read):
        return read(*given, keep=keep)
    found = read(*given)
    for i, one in enumerate(found):
        keep(i, one)
    return found


def takes_keep(read: Callable[..., list[Extraction]]) -> bool:
    """Whether an `extract` or `ask` takes `keep`."""
    return "keep" in inspect.signature(read).parameters


def flat(image: Image.Image) -> Image.Image:
    """`image` as RGB the way it is seen: turned as its EXIF data say, transparency on white. Its `info` is kept.

    Raises OSError or the like when the file behind it is broken, ValueError for shades of unknown range.
    """
    png = image.format == "PNG"  # which the next line forgets
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image, png)
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if not image.has_transparency_data:
        return image.convert("RGB")
    over = image.convert("RGBA")
    seen = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    seen.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return seen


def _eight_bits(image: Image.Image, png: bool) -> Image.Image:
    """A grey image of 16 or 32 bits as one of 8, mode L or LA. Pillow's own conversion would make white of all above 255.

    Shades of 32 bits are taken for 0 to 65535 in a PNG file, which holds no other, and where the largest is above 32767, and
    for 0 to 255 where it is from 2 to 255. ValueError where they may be of another range, such as 0 to 1 or 12 bits.
    """
    shades = np.asarray(image)
    low, high = (float(shades.min()), float(shades.max())) if shades.size else (0.0, 0.0)
    if image.mode.startswith("I;16") or png or (low >= 0 and 32767 < high <= 65535):
        scaled = np.rint(shades / 257.0)
    elif low >= 0 and 1 < high <= 255:
        scaled = np.rint(shades)
    else:
        raise ValueError(
            f"the image has mode {image.mode} with shades from {low:g} to {high:g}, of which black and white are not known; "
            "hand it over as RGB or as L with 0 to 255"
        )
    seen = Image.fromarray(scaled.astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # the shade that is transparent, on the scale of the file
        seen = Image.merge("LA", (seen, Image.fromarray(np.where(shades == clear, 0, 255).astype(np.uint8))))
    seen.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return seen


def shorten(text: str) -> str:
    """One line of at most `LONGEST` characters."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def failed(error: BaseException | str, seconds: float = 0.0, raw: Any = None) -> Extraction:
    """The record of an image that could not be read."""
    if isinstance(error, BaseException):
        error = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return Extraction("", (), raw, seconds, shorten(error))


def each(
    images: Sequence[Image.Image], read: Callable[[Image.Image], Extraction], keep: Keep | None = None
) -> list[Extraction]:
    """`read` on one image after another, timed; what it raises becomes that image's error."""
    found = []
    for i, image in enumerate(images):
        start = time.perf_counter()
        try:
            one = read(flat(image))
        except Exception as error:
            one = failed(error)
        found.append(dataclasses.replace(one, seconds=round(time.perf_counter() - start, 4)))
        if keep is not None:
            keep(i, found[-1])
    return found


def box_of(corners: Any) -> Box:
    """Four (x, y) corners of any nested sequence or array. ValueError when they are not."""
    array = np.asarray(corners, dtype=float)
    if array.shape != (4, 2) or not np.isfinite(array).all():
        raise ValueError(f"a box has four corners (x, y), not {corners!r}")
    return tuple((float(x), float(y)) for x, y in array)


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
    theta = _median_angle(np.arctan2(across[:, 1], across[:, 0]), np.hypot(*across.T))
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


def _median_angle(angles: np.ndarray, weights: np.ndarray) -> float:
    """Weighted median of angles in radians, unwrapped around their mean: of texts upside down some have π, some -π."""
    weights = weights + 1e-9
    mean = np.angle(np.sum(weights * np.exp(1j * angles)))
    apart = np.angle(np.exp(1j * (angles - mean)))
    order = np.argsort(apart, kind="stable")
    middle = int(np.searchsorted(np.cumsum(weights[order]), weights.sum() / 2))
    return float(mean + apart[order[min(middle, len(order) - 1)]])


_HYPHENS = ("-", "\u2010", "\u00ad")


def join(rows: Sequence[str]) -> str:
    """Rows of text as one text. Rows are joined by a space, and words that were broken at a row's end put together.

    After "exam-" comes "ple": example; after "EXAM-" comes "PLE": EXAMPLE. Before anything but small letters (or capitals
    after capitals) the hyphen may belong to the word and stays: Coca-Cola, 24-hour. A dash apart from a word joins nothing.
    """
    text = ""
    for row in (" ".join(row.split()) for row in rows):
        if not row:
            continue
        if len(text) > 1 and text.endswith(_HYPHENS) and text[-2].isalnum() and row[0].isalnum():
            first, second = text[:-1].rsplit(" ", 1)[-1], row.split(" ", 1)[0]
            capitals = len(first) > 1 and first.isalpha() and first.isupper() and second.isupper()
            broken = text[-1] == "\u00ad" or (text[-2].isalpha() and (row[0].islower() or capitals))
            text = (text[:-1] if broken else text) + row
        else:
            text = f"{text} {row}" if text else row
    return text


def text_of(lines: Sequence[Line]) -> str:
    """The text of boxes in `reading_order`."""
    return join([" ".join(line.text for line in row) for row in reading_order(lines)])
