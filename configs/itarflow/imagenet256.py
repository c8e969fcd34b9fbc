"""iTARFlow on ImageNet 256x256 by class: the official recipe, not a result of ours.

Levels from .01 to 0.7, weight t, four blocks of 4, 4, 4 and 24 layers, batch 512. The published evaluation takes a guidance of
3.2 (their scale is 1 + weight) in stage one and 70 steps of `euler` in stage two, without a clip. The official command drops no
labels here (`drop_label 0.0`), which leaves the mean class untrained that guidance compares with; ours drops one in ten.

    zoo train itarflow/imagenet256
    zoo compile itarflow/imagenet256 --topology v5p:4x4x4
    zoo sample runs/itarflow-imagenet256 n=16 guidance=3.2 nfe=70
"""

from dataclasses import replace

from zoo.config import load
from zoo.data.images import Images

_base = load("itarflow/imagenet64")
config = replace(
    _base,
    task=replace(_base.task, image=256, patch=8, width=2176, high=0.7),
    data=Images("data/imagenet256", size=256, flip=True),
    steps=1_501_200,
    samples=replace(_base.samples, options={"guidance": 3.2}),
    workdir=None,
)
smoke = replace(load("itarflow/imagenet64:smoke"), workdir=None)
