"""EDM: Elucidating the Design Space of Diffusion-Based Generative Models (arXiv:2206.00364).

`networks`: the U-Net. `task`: its training, and samples by any solver.
"""

from zoo.papers.edm.networks import DDPMpp
from zoo.papers.edm.task import Edm, UNet

__all__ = ["DDPMpp", "Edm", "UNet"]
