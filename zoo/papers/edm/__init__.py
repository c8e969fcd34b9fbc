"""EDM: Elucidating the Design Space of Diffusion-Based Generative Models (arXiv:2206.00364).

`networks`: the U-Net and the transformer. `task`: its training, and samples by any solver.
"""

from zoo.papers.edm.networks import DDPMpp, DiT
from zoo.papers.edm.task import Edm, Transformer, UNet

__all__ = ["DDPMpp", "DiT", "Edm", "Transformer", "UNet"]
