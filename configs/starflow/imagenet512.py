"""STARFlow on ImageNet 512 by class, 4,096 tokens, from the 256-pixel model: FID 3.00 in the paper.

    zoo prepare latents IMAGENET data/imagenet512-latents size=512 vae=exports/sd-vae
    zoo train starflow/imagenet512

Positions of the finer grid lie between those of the coarse one (`reach` stays 32), so that the weights go on. How long and with
which batch the paper tuned it is not known: steps, batch and learning rate are guesses.
"""

from dataclasses import replace

from zoo.data.images.latents import Latents
from zoo.data.synthetic import Synthetic
from zoo.dist import Mesh
from zoo.encoders.vae import AutoEncoder, sd
from zoo.papers import starflow
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

SMALL = AutoEncoder(image=4, channels=3, latent=2, widths=(4,), layers=1, groups=4, scale=1.0)

config = Run(
    task=starflow.class_conditional(
        latent=(64, 64), vae=sd(image=512), dtype="bfloat16", remat="full", attention="auto"
    ),
    data=Latents("data/imagenet512-latents"),
    weights={"": "runs/starflow-imagenet256"},
    optim=AdamW(lr=2e-5, final_lr=1e-6, warmup=500, b2=0.95, weight_decay=1e-4, decay_all=True, clip=1.0),
    steps=50_000,
    batch=256,
    mesh=Mesh(data=1, fsdp=-1),
    checkpoint=Checkpoint(every=1_000, keep=3),
    samples=Samples(every=5_000, n=64, options={"guidance": 3.0}),
    log_every=50,
)

smoke = replace(
    config,
    task=starflow.StarFlow(
        latent=(4, 4),
        channels=2,
        width=32,
        depths=(1, 2),
        head_dim=32,
        classes=2,
        reach=4.0,
        dtype="bfloat16",
        vae=SMALL,
    ),
    data=Synthetic(),
    weights=None,
    steps=4,
    batch=8,
    mesh=Mesh(),
    samples=Samples(n=4),
)
