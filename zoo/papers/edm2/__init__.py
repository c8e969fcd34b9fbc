"""EDM2: Analyzing and Improving the Training Dynamics of Diffusion Models (arXiv:2312.02696).

`networks`: the U-Net that preserves magnitudes. `task`: its training, its samples by any solver, and its published weights.
"""

from zoo.papers.edm2.networks import MagnitudeUNet
from zoo.papers.edm2.task import Edm2, Named, UNet, autoencoder, sized

__all__ = ["Edm2", "MagnitudeUNet", "Named", "UNet", "autoencoder", "sized"]
