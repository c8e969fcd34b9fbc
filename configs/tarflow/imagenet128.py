"""TarFlow on ImageNet 128x128 by class: patches of 4, width 1024, Gaussian noise 0.15, bf16, 320 epochs."""

from dataclasses import replace

from zoo.config import load
from zoo.data.images import Images

_base, _small = load("tarflow/imagenet64_cond"), load("tarflow/imagenet64_cond:smoke")
config = replace(
    _base,
    task=replace(_base.task, image=128, patch=4, width=1024, noise=0.15),
    data=Images("tfds:imagenet2012", size=128, flip=True, convert=True),
    optim=replace(_base.optim, warmup=1_668),
    steps=533_760,
    batch=768,
    samples=replace(_base.samples, options={"guidance": 1.5}),
    workdir=None,
)
smoke = replace(_small, task=replace(_small.task, noise=config.task.noise), optim=config.optim, workdir=None)
