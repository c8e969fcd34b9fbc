"""EDM: Elucidating the Design Space of Diffusion-Based Generative Models (arXiv:2206.00364).

`networks`: the U-Nets and the transformer. `task`: its training, and samples by any solver. `official`: the published layout.
"""

from zoo.papers.edm.networks import Ablated, DDPMpp, DiT
from zoo.papers.edm.task import ADM, Edm, Transformer, UNet

__all__ = ["ADM", "Ablated", "DDPMpp", "DiT", "Edm", "Transformer", "UNet"]
