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

from zoo.fields import check_fields
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
        base.need_packages()

    def extract(self, images: Sequence[Image.Image], keep: Keep | None = None) -> list[Extraction]:
        """An image without the renderer's record is one with an error."""

        def read(image: Image.Image) -> Extraction:
            if TEXT_CHUNK not in image.info:
                raise ValueError(f"no text chunk {TEXT_CHUNK!r}: the oracle reads only what zoo has rendered")
            return Extraction(str(image.info[TEXT_CHUNK]))

        return base.each(images, read, keep)


@dataclass(frozen=True)
class RapidOcr:
    """RapidOCR (the extra `typescore`), whose networks lie in its wheel: needs no network access and repairs no words."""

    threads: base.Threads = base.aside(2)  # of one operation, on the CPU

    name: ClassVar[str] = "rapidocr"
    batch: ClassVar[int] = 1
    replaced: ClassVar[dict[str, str]] = {
        "upside_down": "pictures are read as they stand; leave it out",
        "least_score": "lines with a confidence of less than a half are left out",
    }

    def __post_init__(self) -> None:
        check_fields(self, f"extractor {self.name}: ")

    def version(self) -> str:
        """The package's, since its networks come with it, and ours."""
        self.check()
        return f"{metadata.version('rapidocr')}+{REVISION}"

    def check(self) -> None:
        # onnxruntime is no dependency of rapidocr's, which asks for it only when it reads
        base.need_packages("onnxruntime", "rapidocr")

    def extract(self, images: Sequence[Image.Image], keep: Keep | None = None) -> list[Extraction]:
        self.check()
        engine = _rapidocr(min(self.threads, os.cpu_count() or 1))

        def read(image: Image.Image) -> Extraction:
            found = engine(np.ascontiguousarray(np.asarray(image)[:, :, ::-1]))  # it wants blue first
            if found.boxes is None:  # nothing found: None in every field
                return Extraction("")
            boxes = (tuple((float(x), float(y)) for x, y in box) for box in found.boxes)
            lines = tuple(Line(str(text), box) for text, box in zip(found.txts, boxes))
            return Extraction(base.text_of(lines), lines)

        return base.each(images, read, keep)


@functools.cache
def _rapidocr(threads: int) -> Any:
    from rapidocr import RapidOCR

    return RapidOCR(
        params={
            "Global.log_level": "error",  # it tells of every file it opens and warns of every image without text
            "Global.text_score": 0.5,  # lines with less confidence are left out
            "Global.use_cls": False,  # it takes a short upright line for one upside down now and then
            # numbers above the cores would be ignored, and OMP_NUM_THREADS is: left alone it takes all cores
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )
