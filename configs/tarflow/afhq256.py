"""TarFlow on AFHQ 256x256 by class (cat, dog, wild): patches of 8, Gaussian noise 0.07, bf16, 4,000 epochs.

`data.path` is the folder of the data set, train/ and val/ with a subfolder per class. Steps count 57 batches of 256 an
epoch (14,630 training images).
"""

from dataclasses import replace

from zoo.config import load
from zoo.data.images import Images
from zoo.metrics.likelihood import Bits

_base, _small = load("tarflow/imagenet64_cond"), load("tarflow/imagenet64_cond:smoke")
config = replace(
    _base,
    task=replace(_base.task, image=256, patch=8, classes=3, noise=0.07),
    data=Images("data/afhq", size=256, flip=True),
    optim=replace(_base.optim, warmup=57),
    steps=228_000,
    samples=replace(_base.samples, options={"guidance": 3.4}),
    evals=(Bits(every=10_000),),
    workdir=None,
)
smoke = replace(_small, task=replace(_small.task, classes=3, noise=config.task.noise), optim=config.optim, workdir=None)
