"""TypeScore: A Text Fidelity Metric for Text-to-Image Generative Models (arXiv:2411.02437).

`metric.py`: the pinned metric. `instructions.py`: what an image was asked to show; `render.py`: pictures of it with known faults.
`extractors`: what reads an image. `evaluate.py`, `compare.py`, `calibrate.py`: what `zoo eval` runs.
"""

from zoo.papers.typescore.calibrate import Calibrate
from zoo.papers.typescore.compare import Compare
from zoo.papers.typescore.evaluate import TypeScore
from zoo.papers.typescore.instructions import Instruction, quoted
from zoo.papers.typescore.metric import Normalisation, Parts, error_type, parts, typescore
from zoo.papers.typescore.render import Render

__all__ = ["Calibrate", "Compare", "Instruction", "Normalisation", "Parts", "Render", "TypeScore"]
__all__ += ["error_type", "parts", "quoted", "typescore"]
