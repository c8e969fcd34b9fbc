"""Extractors: what reads the text in an image. A score means something only beside the name and version of its extractor.

`base.py`: what they hand back, and the order of reading. `ocr.py`: the renderer's own record, RapidOCR (the default) and
Tesseract. `chat.py`: the prompt, and a vision model run here. `endpoint.py`: one behind HTTP. `cache.py`: readings kept on disk.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec

from zoo.errors import UserError, suggest
from zoo.papers.typescore.extractors.base import (
    REVISION,
    TEXT_CHUNK,
    Extraction,
    Line,
    TextExtractor,
    describe,
    join,
    reading_order,
    text_of,
)
from zoo.papers.typescore.extractors.cache import Cached, digest
from zoo.papers.typescore.extractors.chat import PROMPT, Transformers, clean
from zoo.papers.typescore.extractors.endpoint import Http
from zoo.papers.typescore.extractors.ocr import Oracle, RapidOcr, Tesseract

EXTRACTORS: dict[str, type] = {cls.name: cls for cls in (RapidOcr, Tesseract, Http, Transformers, Oracle)}


def get_extractor(name: str, **fields: Any) -> TextExtractor:
    """The extractor called `name` with `fields` (strings are converted). Packages are looked for in its `check`.

    Raises:
        UserError: no such extractor or field, or a value that the field does not take.
    """
    if name not in EXTRACTORS:
        raise UserError(f"extractor: {name!r} is none; {suggest(name, EXTRACTORS)}")
    cls = EXTRACTORS[name]
    known = [field.name for field in dataclasses.fields(cls)]
    for field in fields:
        if field not in known:
            raise UserError(f"extractor {name} has no field {field!r}; {suggest(field, known)}")
    try:
        made: TextExtractor = msgspec.convert(fields, cls, strict=False)
    except msgspec.ValidationError as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(f"extractor {name}: {error}") from None
    return made


__all__ = [
    "EXTRACTORS",
    "PROMPT",
    "REVISION",
    "TEXT_CHUNK",
    "Cached",
    "Extraction",
    "Http",
    "Line",
    "Oracle",
    "RapidOcr",
    "Tesseract",
    "TextExtractor",
    "Transformers",
    "clean",
    "describe",
    "digest",
    "get_extractor",
    "join",
    "reading_order",
    "text_of",
]
