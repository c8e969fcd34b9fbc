"""STARFlow from captions at 1024 pixels in mixed aspect ratios, tuned from t2i_512: about 16,384 tokens.

    zoo prepare latents PAIRS data/pairs1024-latents size=1024 aspects=true vae=exports/sd-vae text=exports/flan-t5-xl
    zoo train starflow/t2i_1024

Every batch is of one of nine aspect ratios, which the captions name (`template="aspect"`); the train step is compiled once for each.
Positions of the finer grid lie between those of the coarse one (`reach` stays 32). How the paper's authors tuned theirs is not known:
steps, batch and learning rate are guesses.
"""

from dataclasses import replace

from zoo.config import load
from zoo.data.images.latents import Latents
from zoo.encoders.vae import sd

_base = load("starflow/t2i_512")
config = replace(
    _base,
    task=replace(_base.task, latent=(128, 128), vae=sd(image=1024)),
    data=Latents("data/pairs1024-latents", aspect="mixed"),
    weights={"": "runs/starflow-t2i_512"},
    steps=20_000,
    batch=128,
    samples=replace(_base.samples, n=16),
    workdir=None,
)
smoke = replace(load("starflow/t2i_512:smoke"), workdir=None)
