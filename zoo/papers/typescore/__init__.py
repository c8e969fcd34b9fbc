"""TypeScore: A Text Fidelity Metric for Text-to-Image Generative Models (arXiv:2411.02437).

`score.py`: the pinned metric. `instructions.py`: what an image was asked to show; `synth.py` the list that comes with zoo, and
`render.py` pictures of it. `extractors`: what reads an image. `evaluate.py`, `compare.py`, `calibrate.py`: what `zoo eval` runs.
"""

from zoo.papers.typescore.calibrate import Calibrate
from zoo.papers.typescore.compare import Compare
from zoo.papers.typescore.evaluate import TypeScore
from zoo.papers.typescore.instructions import Instruction, quoted
from zoo.papers.typescore.pictures import Render
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
    "Calibrate",
    "Compare",
    "Instruction",
    "Normalisation",
    "Parts",
    "Render",
    "Segment",
    "TypeScore",
    "align",
    "assign",
    "batch",
    "bootstrap",
    "error_type",
    "parts",
    "quoted",
    "typescore",
]
