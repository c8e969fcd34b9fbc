"""Digits of a class by an energy that is asked for none: a classifier of clean digits tilts it; there is nothing to train here.

zoo train energy/digits
zoo train part/finetune_digits:scratch
zoo sample energy/digits_tilted label=3,8 n=16 particles.count=64
"""

from dataclasses import replace

from zoo.data.images import Digits
from zoo.data.synthetic import Synthetic
from zoo.papers import edm, energy, part
from zoo.run import Run

ENERGY = energy.EnergyDistill(
    edm.Edm(image=8, channels=1, classes=10, network=edm.Transformer(width=64, depth=4, head_dim=16, patch=2))
)
SMALL = energy.EnergyDistill(
    edm.Edm(image=4, channels=1, network=edm.Transformer(width=8, depth=1, head_dim=4, patch=2))
)

config = Run(
    task=energy.EnergyTilted(
        ENERGY, part.PartClassifier(image=8, channels=1, patch=2, width=64, depth=3, head_dim=16, classes=10)
    ),
    data=Digits(),
    weights={"energy": "runs/energy-digits", "classifier": "runs/part-finetune_digits-scratch"},
    steps=1,
    batch=64,
)

smoke = replace(
    config,
    task=energy.EnergyTilted(
        SMALL, part.PartClassifier(image=4, channels=1, patch=2, width=8, depth=1, head_dim=8, classes=2)
    ),
    data=Synthetic(),
    weights=None,
    batch=8,
)
