"""What the digits 0 to 3 and the digits 2 to 5 have in common, by flows: weights in which nothing is approximate. Nothing to train.

    zoo train itarflow/digits:first
    zoo train itarflow/digits:last
    zoo sample itarflow/digits_product n=16 particles.count=64 --batch 4
    zoo sample itarflow/digits_product n=64 rho=0 particles.count=2 --out naive      # no weights: what summed scores give

Particles begin as exact samples of the first flow at the highest level. `energy/digits_product` does it with learned energies.
"""

from dataclasses import replace

from zoo.data.images import Digits
from zoo.data.synthetic import Synthetic
from zoo.papers import energy, itarflow
from zoo.run import Run

PART = itarflow.ITarFlow(
    image=8, channels=1, patch=2, width=32, depth=(1, 1, 2), head_dim=16, low=0.02, high=0.7, scan=False
)
SMALL = itarflow.ITarFlow(image=4, channels=1, patch=2, width=8, depth=(1, 1), head_dim=8, low=0.02, high=0.7)

config = Run(
    task=energy.EnergyProduct((PART, PART)),
    data=Digits(),
    weights={"part0": "runs/itarflow-digits-first", "part1": "runs/itarflow-digits-last"},
    steps=1,
    batch=64,
)

smoke = replace(config, task=energy.EnergyProduct((SMALL, SMALL)), data=Synthetic(), weights=None, batch=8)
