"""DART on ImageNet 256 by class, over latents 32x32x4 of the published autoencoder: 16 copies of 256 tokens.

    zoo import starflow/sd_vae FILE exports/sd-vae
    zoo prepare latents IMAGENET data/imagenet256-latents size=256 vae=exports/sd-vae
    zoo train dart/imagenet256:xl

`:s`, `:b`, `:l` and `:xl` have the widths and depths, and all have the recipe, that a public re-implementation reports of the
paper; its number of steps is not known, nor are these runs' results. v with the weight SNR + 1 is our choice.
"""

from dataclasses import replace

from zoo.data.images.latents import Latents
from zoo.data.synthetic import Synthetic
from zoo.dist import Mesh
from zoo.encoders.vae import AutoEncoder, sd
from zoo.papers import dart
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

SMALL = AutoEncoder(image=8, channels=3, latent=2, widths=(4, 4), layers=1, groups=4, scale=1.0)

config = Run(
    task=dart.Dart(
        latent=(32, 32),
        channels=4,
        classes=1000,
        target="v",
        cap=None,
        width=384,
        depth=12,
        vae=sd(),
        dtype="bfloat16",
        remat="full",
        attention="auto",
    ),
    data=Latents("data/imagenet256-latents"),
    weights={"vae": "exports/sd-vae"},
    optim=AdamW(lr=3e-4, final_lr=1e-5, warmup=10_000, b2=0.95, weight_decay=0.01, clip=2.0),
    ema=0.9999,
    steps=500_000,
    batch=128,
    mesh=Mesh(data=1, fsdp=-1),
    checkpoint=Checkpoint(every=5_000, keep=3),
    samples=Samples(every=25_000, n=64, options={"guidance": 0.5}),
    log_every=50,
)
s = config
b = replace(config, task=replace(config.task, width=768))
l = replace(config, task=replace(config.task, width=1024, depth=24))
xl = replace(config, task=replace(config.task, width=1152, depth=28))

smoke = replace(
    config,
    task=replace(config.task, latent=(4, 4), channels=2, classes=2, steps=2, width=16, depth=2, head_dim=16, vae=SMALL),
    data=Synthetic(),
    weights=None,
    steps=4,
    batch=8,
    mesh=Mesh(),
    samples=Samples(n=4),
)
