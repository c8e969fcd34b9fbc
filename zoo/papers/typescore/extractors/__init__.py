"""Extractors: what reads the text in an image. A score means something only beside the name and version of its extractor.

`base.py`: what they hand back, readings kept on disk, and the order of reading. `ocr.py`: the renderer's own record, and RapidOCR (the
default). `endpoint.py`: any model that sees, behind HTTP.
"""

from zoo.papers.typescore.extractors.base import Extraction, Line, TextExtractor, describe
from zoo.papers.typescore.extractors.endpoint import PROMPT, Http
from zoo.papers.typescore.extractors.ocr import Oracle, RapidOcr

__all__ = ["PROMPT", "Extraction", "Http", "Line", "Oracle", "RapidOcr", "TextExtractor", "describe"]
