"""STARFlow on ImageNet 512 by class, 4,096 tokens, from the 256-pixel model: FID 3.00 in the paper.

    zoo prepare latents IMAGENET data/imagenet512-latents size=512 vae=exports/sd-vae
    zoo train starflow/imagenet512

Positions of the finer grid lie between those of the coarse one (`reach` stays 32), so that the weights go on. How long and with
which batch the paper tuned it is not known: steps, batch and learning rate are guesses.
"""

from dataclasses import replace

from zoo.config import load
from zoo.data.images.latents import Latents
from zoo.encoders.vae import sd
from zoo.run import Checkpoint

_base = load("starflow/imagenet256")
config = replace(
    _base,
    task=replace(_base.task, latent=(64, 64), vae=sd(image=512)),
    data=Latents("data/imagenet512-latents"),
    weights={"": "runs/starflow-imagenet256"},
    optim=replace(_base.optim, lr=2e-5, warmup=500, clip=1.0),
    steps=50_000,
    batch=256,
    checkpoint=Checkpoint(every=1_000, keep=3),
    samples=replace(_base.samples, every=5_000),
    workdir=None,
)
smoke = replace(load("starflow/imagenet256:smoke"), optim=config.optim, checkpoint=config.checkpoint, workdir=None)
