"""TarFlow on ImageNet 64x64 by class: Gaussian noise 0.05, labels dropped one time in ten, bf16, 200 epochs.

Sample with `zoo sample RUN label=207 guidance=2.3` (the official evaluation of this model uses 2.3, annealed).
"""

from dataclasses import replace

from zoo.config import load

_base, _smoke = load("tarflow/imagenet64"), load("tarflow/imagenet64:smoke")
config = replace(
    _base,
    task=replace(_base.task, classes=1000),
    samples=replace(_base.samples, options={"guidance": 2.0}),
    workdir=None,
)
smoke = replace(_smoke, task=replace(_smoke.task, classes=2), workdir=None)
