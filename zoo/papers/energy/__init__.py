"""Composition and Control with Distilled Energy Diffusion Models and Sequential Monte Carlo (arXiv:2502.12786).

An energy whose gradient denoises tells not only where to go but how likely a place is: what is tempered, composed or bounded
can be drawn with weights that are right (`zoo.diffusion.smc`).
`task`: energies made of a denoiser's network. `mixtures`: exact energies in two dimensions, where everything can be compared with
the truth. `learned`: energies of these that are learned, beside the exact ones.
"""

from zoo.papers.energy.learned import Learned
from zoo.papers.energy.mixtures import Mixture, MixtureProduct, Mixtures, Mode
from zoo.papers.energy.task import EnergyDistill, EnergyProduct, EnergyTilted

__all__ = ["EnergyDistill", "EnergyProduct", "EnergyTilted", "Learned", "Mixture", "MixtureProduct", "Mixtures", "Mode"]
