"""What the digits 0 to 3 and the digits 2 to 5 have in common: the product of two energies; there is nothing to train here.

    zoo train energy/digits:low
    zoo train energy/digits:high
    zoo sample energy/digits_product n=16 particles.count=64 --batch 4
    zoo sample energy/digits_product n=64 rho=0 particles.count=2 --out naive      # no weights: what summed scores give

Every sample is one of an island of `particles.count`, so that time and memory are those of so many times as many.
"""

from dataclasses import replace

from zoo.data.images import Digits
from zoo.data.synthetic import Synthetic
from zoo.papers import edm, energy
from zoo.run import Run

PART = energy.EnergyDistill(
    edm.Edm(image=8, channels=1, network=edm.Transformer(width=64, depth=3, head_dim=64, patch=8)),
    target="data",
)
SMALL = energy.EnergyDistill(
    edm.Edm(image=4, channels=1, network=edm.Transformer(width=8, depth=1, head_dim=4, patch=4)),
    target="data",
)

config = Run(
    task=energy.EnergyProduct((PART, PART)),
    data=Digits(),
    weights={"part0": "runs/energy-digits-low", "part1": "runs/energy-digits-high"},
    steps=1,
    batch=64,
)

smoke = replace(config, task=energy.EnergyProduct((SMALL, SMALL)), data=Synthetic(), weights=None, batch=8)
