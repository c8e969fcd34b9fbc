"""TarFlow on 1024x1024 pixels: 16,384 tokens an image, 1.4 billion parameters. A starting point, not a recipe of the paper.

The paper stops at 256 pixels. Width and depth are those of the pixel model (1.3 billion parameters at 256 pixels) that the
STARFlow paper re-trained; noise, batch and steps are guesses that nobody has trained. What is known is what
`zoo compile tarflow/pixels1024 --topology v5p:4x4x4 mesh.data=4 mesh.fsdp=16` prints: it fits, and how fast it can be.
With fewer images than chips, `mesh.sequence=4` shares out the tokens of an image. `data.path` is a folder of class folders
or what `zoo prepare images` makes of it.
"""

from dataclasses import replace

from zoo.config import load
from zoo.data.images import Images
from zoo.metrics.likelihood import Bits
from zoo.run import Checkpoint

_base, _small = load("tarflow/imagenet64"), load("tarflow/imagenet64:smoke")
config = replace(
    _base,
    task=replace(_base.task, image=1024, patch=8, width=1280, noise=0.15, remat="full"),
    data=Images("data/images1024", size=1024, flip=True),
    optim=replace(_base.optim, warmup=5_000, clip=1.0),
    ema=0.9999,
    steps=500_000,
    checkpoint=Checkpoint(every=1_000, keep=3),
    evals=(Bits(every=10_000, batch=64, limit=1_024),),
    log_every=50,
    workdir=None,
)
smoke = replace(
    _small,
    task=replace(_small.task, noise=config.task.noise),
    optim=config.optim,
    ema=config.ema,
    checkpoint=config.checkpoint,
    log_every=config.log_every,
    workdir=None,
)
