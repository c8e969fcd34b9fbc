"""Naive scores beside weighted particles on exact mixtures in the plane: tempered, multiplied, bounded; no training, seconds.

    zoo eval configs/energy/mixtures.py
    zoo eval configs/energy/mixtures.py count=512 levels=51 out=fewer     # fewer particles and steps
    zoo eval energy/mixtures:learned                                 # energies that are learned, minutes

Energies and truths are exact, so what is off is the sampler's; of `:learned` the network's too.
"""

from zoo.diffusion.levels import LogNormal
from zoo.papers import edm
from zoo.papers.energy import EnergyDistill, Learned, Mixtures

config = Mixtures()

# A point is an image of one pixel with two channels, so the transformer of one patch is a residual network.
POINT = edm.Edm(
    image=1,
    channels=2,
    network=edm.Transformer(width=64, depth=3, head_dim=64, patch=1),
    data=3.1,
    low=0.01,
    high=10.0,
)
learned = Learned(EnergyDistill(POINT, target="data", noise=LogNormal(wide=1.0)))
