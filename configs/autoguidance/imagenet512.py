"""EDM2 on ImageNet 512x512, size S, led away from XS without classes, as in the papers' figures; there is nothing to train here.

    zoo import edm2/imagenet512 FILE.npz exports/edm2-s weights.vae=exports/sd-vae-edm2
    zoo import edm2/imagenet512:uncond FILE.npz exports/edm2-xs-uncond
    zoo sample autoguidance/imagenet512 n=16 guidance=0.4

The published weight (a scale of 1.4, so 0.4 here) and widths of averages stand in `configs/edm2/README.md`.
"""

from dataclasses import replace

from zoo.data.images.latents import Latents
from zoo.data.synthetic import Synthetic
from zoo.diffusion.levels import LogNormal
from zoo.papers import edm2
from zoo.papers.autoguidance import Guided
from zoo.run import Run

MAIN = edm2.Edm2(
    image=64,
    channels=4,
    classes=1000,
    inputs="latents",
    network=edm2.sized("s").network,
    noise=LogNormal(-0.4, 1.0),
    vae=edm2.autoencoder(),
    dtype="bfloat16",
    attention="auto",
)
SMALL = edm2.Edm2(
    image=4,
    channels=2,
    classes=2,
    inputs="latents",
    network=edm2.UNet(width=8, multiples=(1,), blocks=1, attention=(), head_dim=4, uncertainty=8),
)

config = Run(
    task=Guided(MAIN, replace(MAIN, network=edm2.sized("xs").network, classes=0, vae=None)),
    data=Latents("data/imagenet512-edm2"),
    weights={"main": "exports/edm2-s", "guide": "exports/edm2-xs-uncond"},
    steps=1,
    batch=64,
)

smoke = replace(config, task=Guided(SMALL, replace(SMALL, classes=0)), data=Synthetic(), weights=None, batch=8)
