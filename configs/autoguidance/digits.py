"""EDM's digits, led away from what a worse network would draw; there is nothing to train here.

    zoo train edm/digits:guide
    zoo sample autoguidance/digits n=64 guidance=1

The guide is that run, the main network comes with the package. `guidance=0` is the main network alone, to the bit.
"""

from dataclasses import replace

from zoo.data.images import Digits
from zoo.data.synthetic import Synthetic
from zoo.papers import edm
from zoo.papers.autoguidance import Guided
from zoo.run import Run

MAIN = edm.Edm(image=8, channels=1, classes=10, network=edm.Transformer(width=64, depth=4, head_dim=16, patch=2))
SMALL = edm.Edm(image=4, channels=1, classes=2, network=edm.Transformer(width=8, depth=1, head_dim=4, patch=2))

config = Run(
    task=Guided(MAIN, replace(MAIN, network=edm.Transformer(width=32, depth=2, head_dim=16, patch=2))),
    data=Digits(),
    weights={"main": "edm-digits", "guide": "runs/edm-digits-guide"},
    steps=1,
    batch=64,
)

smoke = replace(config, task=Guided(SMALL, replace(SMALL, classes=0)), data=Synthetic(), weights=None, batch=8)
