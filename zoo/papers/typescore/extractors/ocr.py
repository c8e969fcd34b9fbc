"""Extractors without a language model: the renderer's own record, and RapidOCR."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from zoo.fields import Share, check_fields
from zoo.papers.typescore.extractors import base
from zoo.papers.typescore.extractors.base import REVISION, TEXT_CHUNK, Extraction, Keep, Line


@dataclass(frozen=True)
class Oracle:
    """Reads what the renderer wrote beside the pixels, which tells faults of the strings' metric from faults of reading."""

    name: ClassVar[str] = "oracle"

    @property
    def batch(self) -> int:
        return 1

    def version(self) -> str:
        return str(REVISION)

    def check(self) -> None:
        """Needs nothing."""

    def extract(self, images: Sequence[Image.Image], keep: Keep | None = None) -> list[Extraction]:
        """An image without the renderer's record is one with an error."""

        def read(image: Image.Image) -> Extraction:
            text = image.info.get(TEXT_CHUNK)
            if not isinstance(text, str):
                raise ValueError(
                    f"the image has no text chunk {TEXT_CHUNK!r}: the oracle reads only what zoo has rendered"
                )
            return Extraction(str(text))

        return base.each(images, read, keep)


@dataclass(frozen=True)
class RapidOcr:
    """RapidOCR (the extra `typescore`), whose networks lie in its wheel: needs no network access and repairs no words."""

    threads: base.Threads = base.aside(2)  # of one operation, on the CPU
    least_score: Share = 0.5  # lines with less confidence are left out; 0 to 1
    upside_down: bool = True  # whether text that is upside down is turned

    name: ClassVar[str] = "rapidocr"

    def __post_init__(self) -> None:
        check_fields(self, f"extractor {self.name}: ")

    @property
    def batch(self) -> int:
        return 1

    def version(self) -> str:
        """The package's, since its networks come with it, and ours."""
        self.check()
        return f"{metadata.version('rapidocr')}+{REVISION}"

    def check(self) -> None:
        # onnxruntime is no dependency of rapidocr's, which asks for it only when it reads
        base.need_packages(f"extractor {self.name}", "onnxruntime", "rapidocr")

    def extract(self, images: Sequence[Image.Image], keep: Keep | None = None) -> list[Extraction]:
        self.check()
        engine = _rapidocr(min(self.threads, os.cpu_count() or 1), self.least_score, self.upside_down)

        def read(image: Image.Image) -> Extraction:
            found = engine(np.ascontiguousarray(np.asarray(image)[:, :, ::-1]))  # it wants blue first
            texts = getattr(found, "txts", None)  # nothing found: None in every field
            if texts is None or found.boxes is None:
                return Extraction("")
            boxes = as_read(np.asarray(found.boxes, dtype=float), engine.upside_down)
            lines = tuple(
                Line(str(text), tuple((float(x), float(y)) for x, y in box), float(score))
                for text, box, score in zip(texts, boxes, found.scores)
            )
            return Extraction(base.text_of(lines), lines)

        return base.each(images, read, keep)


def as_read(boxes: np.ndarray, upside_down: bool) -> np.ndarray:
    """Corners [N, 4, 2] as the text is read, of boxes whose corners begin at the image's top left.

    RapidOCR turns tall boxes by 90 degrees against the clock, which it does not tell. A tall box in a page of wide ones is a
    letter such as I and left alone.

    Args:
        upside_down: whether the lines were turned by 180 degrees after that.
    """
    wide, high = (np.linalg.norm(boxes[:, i] - boxes[:, 0], axis=-1) for i in (1, 3))
    tall = high >= 1.5 * wide  # its own rule
    if high[tall].sum() > wide[~tall].sum():
        boxes = np.where(tall[:, None, None], np.roll(boxes, -1, axis=1), boxes)
    return np.roll(boxes, 2, axis=1) if upside_down else boxes


@functools.cache
def _rapidocr(threads: int, least_score: float, upside_down: bool) -> Any:
    from rapidocr import RapidOCR

    class Engine(RapidOCR):
        """Turns all lines of an image or none: its classifier takes a short upright line for one upside down now and then.

        Where the classifier finds one, all are read both ways, and the way that is read with more confidence is right.
        """

        _doubtful = False
        upside_down = False  # whether the lines of the last image were

        def cls_and_rotate(self, crops: list[np.ndarray]) -> tuple[list[np.ndarray], Any]:
            _, said = super().cls_and_rotate(crops)
            self._doubtful = any("180" in str(label) for label, _ in said.cls_res or ())
            return crops, said

        def recognize_txt(self, crops: list[np.ndarray]) -> Any:
            read, self.upside_down = super().recognize_txt(crops), False
            if self._doubtful:
                turned = super().recognize_txt([np.ascontiguousarray(crop[::-1, ::-1]) for crop in crops])
                widths = [crop.shape[1] for crop in crops]
                if np.dot(turned.scores, widths) > np.dot(read.scores, widths):
                    read, self.upside_down = turned, True
            self._doubtful = False
            return read

    return Engine(
        params={
            "Global.log_level": "error",  # it tells of every file it opens and warns of every image without text
            "Global.text_score": least_score,
            "Global.use_cls": upside_down,
            # numbers above the cores would be ignored, and OMP_NUM_THREADS is: left alone it takes all cores
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )
