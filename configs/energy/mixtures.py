"""Naive scores beside weighted particles on exact mixtures in the plane: tempered, multiplied, bounded; no training, seconds.

    zoo eval configs/energy/mixtures.py
    zoo eval configs/energy/mixtures.py count=512 levels=51 out=fewer     # fewer particles and steps

Energies and truths are exact, so what is off is the sampler's.
"""

from zoo.papers.energy import Mixtures

config = Mixtures()
