"""PART: Self-supervised learning of the relative composition of images (arXiv:2506.03682).

A vision transformer without positions sees a set of patches cut off the grid and tells how any of them lies to any other.
`sampling.py`: boxes, crops, relations, layouts. `model.py`: the encoder, the heads, what all tasks share. `task.py`: PART, the two
pretexts it is compared with, and fine-tuning.
"""

from zoo.papers.part.model import Vit
from zoo.papers.part.sampling import crop, grid_boxes, rebuild, relation, sample_boxes
from zoo.papers.part.task import AbsolutePosition, MaskedAutoencoder, Part, PartClassifier

__all__ = [
    "AbsolutePosition",
    "MaskedAutoencoder",
    "Part",
    "PartClassifier",
    "Vit",
    "crop",
    "grid_boxes",
    "rebuild",
    "relation",
    "sample_boxes",
]
