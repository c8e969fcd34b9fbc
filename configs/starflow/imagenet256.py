"""STARFlow on ImageNet 256 by class, 1.4 billion parameters: FID 2.40 in the paper, with a decoder tuned on noisy latents.

    zoo import starflow/sd_vae FILE exports/sd-vae
    zoo prepare latents IMAGENET data/imagenet256-latents size=256 vae=exports/sd-vae
    zoo train starflow/imagenet256

Batch, learning rate, AdamW's moments, weight decay and the 400 million images seen are the paper's; its warm-up and the share of
dropped classes are not stated: one "epoch" of 50,000 examples and 0.1, as the official text-to-image config has them.
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
    task=starflow.class_conditional(vae=sd(), dtype="bfloat16", remat="full", attention="auto"),
    data=Latents("data/imagenet256-latents"),
    weights={"vae": "exports/sd-vae"},
    optim=AdamW(lr=1e-4, final_lr=1e-6, warmup=98, b2=0.95, weight_decay=1e-4, decay_all=True),
    steps=781_250,
    batch=512,
    mesh=Mesh(data=1, fsdp=-1),
    checkpoint=Checkpoint(every=2_000, keep=3),
    samples=Samples(every=10_000, n=64, options={"guidance": 3.0}),
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
