"""iTARFlow on ImageNet 128x128 by class: the official recipe, not a result of ours.

Levels from .01 to 0.5, weight t, four blocks of 4, 4, 4 and 24 layers, batch 512. The published evaluation takes a guidance of
2.7 (their scale is 1 + weight) in stage one and 50 steps of `euler` in stage two, without a clip.

    zoo train itarflow/imagenet128
    zoo compile itarflow/imagenet128 --topology v5p:4x4x4
    zoo sample runs/itarflow-imagenet128 n=16 guidance=2.7 nfe=50
"""

from dataclasses import replace

from zoo.config import load
from zoo.data.images import Images

_base = load("itarflow/imagenet64")
config = replace(
    _base,
    task=replace(_base.task, image=128, patch=4, width=1600, high=0.5),
    data=Images("data/imagenet128", size=128, flip=True),
    steps=1_125_900,
    samples=replace(_base.samples, options={"guidance": 2.7}),
    workdir=None,
)
smoke = replace(load("itarflow/imagenet64:smoke"), workdir=None)
