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
    batch: ClassVar[int] = 1

    def version(self) -> str:
        return str(REVISION)

    def check(self) -> None:
        """Needs nothing."""

    def extract(self, images: Sequence[Image.Image], keep: Keep | None = None) -> list[Extraction]:
        """An image without the renderer's record is one with an error."""

        def read(image: Image.Image) -> Extraction:
            if TEXT_CHUNK not in image.info:
                raise ValueError(
                    f"the image has no text chunk {TEXT_CHUNK!r}: the oracle reads only what zoo has rendered"
                )
            return Extraction(str(image.info[TEXT_CHUNK]))

        return base.each(images, read, keep)


@dataclass(frozen=True)
class RapidOcr:
    """RapidOCR (the extra `typescore`), whose networks lie in its wheel: needs no network access and repairs no words."""

    threads: base.Threads = base.aside(2)  # of one operation, on the CPU
    least_score: Share = 0.5  # lines with less confidence are left out; 0 to 1

    name: ClassVar[str] = "rapidocr"
    batch: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_fields(self, f"extractor {self.name}: ")

    def version(self) -> str:
        """The package's, since its networks come with it, and ours."""
        self.check()
        return f"{metadata.version('rapidocr')}+{REVISION}"

    def check(self) -> None:
        # onnxruntime is no dependency of rapidocr's, which asks for it only when it reads
        base.need_packages(f"extractor {self.name}", "onnxruntime", "rapidocr")

    def extract(self, images: Sequence[Image.Image], keep: Keep | None = None) -> list[Extraction]:
        self.check()
        engine = _rapidocr(min(self.threads, os.cpu_count() or 1), self.least_score)

        def read(image: Image.Image) -> Extraction:
            found = engine(np.ascontiguousarray(np.asarray(image)[:, :, ::-1]))  # it wants blue first
            if found.boxes is None:  # nothing found: None in every field
                return Extraction("")
            lines = tuple(
                Line(str(text), tuple((float(x), float(y)) for x, y in box), float(score))
                for text, box, score in zip(found.txts, as_read(np.asarray(found.boxes, dtype=float)), found.scores)
            )
            return Extraction(base.text_of(lines), lines)

        return base.each(images, read, keep)


def as_read(boxes: np.ndarray) -> np.ndarray:
    """Corners [N, 4, 2] as the text is read, of boxes whose corners begin at the image's top left.

    RapidOCR turns tall boxes by 90 degrees against the clock, which it does not tell. A tall box in a page of wide ones is a
    letter such as I and left alone.
    """
    wide, high = (np.linalg.norm(boxes[:, i] - boxes[:, 0], axis=-1) for i in (1, 3))
    tall = high >= 1.5 * wide  # its own rule
    if high[tall].sum() > wide[~tall].sum():
        boxes = np.where(tall[:, None, None], np.roll(boxes, -1, axis=1), boxes)
    return boxes


@functools.cache
def _rapidocr(threads: int, least_score: float) -> Any:
    from rapidocr import RapidOCR

    return RapidOCR(
        params={
            "Global.log_level": "error",  # it tells of every file it opens and warns of every image without text
            "Global.text_score": least_score,
            "Global.use_cls": False,  # it takes a short upright line for one upside down now and then
            # numbers above the cores would be ignored, and OMP_NUM_THREADS is: left alone it takes all cores
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )
