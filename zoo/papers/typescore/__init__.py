"""TypeScore: A Text Fidelity Metric for Text-to-Image Generative Models (arXiv:2411.02437).

`score.py`: the pinned metric. `instructions.py`: what an image was asked to show.
"""

from zoo.papers.typescore.instructions import Instruction, quoted
from zoo.papers.typescore.score import (
    SPEC_VERSION,
    Normalisation,
    Parts,
    Segment,
    align,
    assign,
    batch,
    bootstrap,
    error_type,
    parts,
    typescore,
)

__all__ = [
    "SPEC_VERSION",
    "Instruction",
    "Normalisation",
    "Parts",
    "Segment",
    "align",
    "assign",
    "batch",
    "bootstrap",
    "error_type",
    "parts",
    "quoted",
    "typescore",
]
