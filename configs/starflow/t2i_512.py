"""STARFlow from captions at 512 pixels in mixed aspect ratios, tuned from t2i_256: about 4,096 tokens.

    zoo prepare latents PAIRS data/pairs512-latents size=512 aspects=true vae=exports/sd-vae text=exports/flan-t5-xl
    zoo train starflow/t2i_512

Every batch is of one of nine aspect ratios, which the captions name (`template="aspect"`); the train step is compiled once for each.
Positions of the finer grid lie between those of the coarse one (`reach` stays 32). How the paper's authors tuned theirs is not known:
steps, batch and learning rate are guesses.
"""

from dataclasses import replace

from zoo.config import load
from zoo.data.images.latents import Latents
from zoo.encoders.vae import sd

_base = load("starflow/t2i_256")
config = replace(
    _base,
    task=replace(_base.task, latent=(64, 64), vae=sd(image=512), template="aspect"),
    data=Latents("data/pairs512-latents", aspect="mixed"),
    weights={"": "runs/starflow-t2i_256"},
    optim=replace(_base.optim, lr=2e-5, warmup=500, clip=1.0),
    steps=40_000,
    batch=512,
    samples=replace(_base.samples, every=5_000, n=32),
    workdir=None,
)
smoke = replace(load("starflow/t2i_256:smoke"), optim=config.optim, workdir=None)
