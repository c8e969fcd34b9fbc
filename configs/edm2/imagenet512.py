"""EDM2 on latents of ImageNet 512 by class, XXS to XXL (31 million to 1.5 billion parameters); XXL: FID 1.91 without guidance.

    zoo import edm2/sd_vae FILE exports/sd-vae-edm2
    zoo prepare latents IMAGENET data/imagenet512-edm2 size=512 vae=exports/sd-vae-edm2
    zoo train edm2/imagenet512:xxl
    zoo import edm2/imagenet512:s FILE exports/edm2-img512-s

What is the paper's: as in `edm2/imagenet64`. The latents are those of the paper's autoencoder, 64x64x4.
"""

from dataclasses import replace

from zoo.data.images.latents import Latents
from zoo.data.synthetic import Synthetic
from zoo.diffusion.levels import LogNormal
from zoo.dist import Mesh
from zoo.encoders.vae import AutoEncoder
from zoo.metrics.denoising import Denoising
from zoo.papers import edm2
from zoo.run import Checkpoint, Run, Samples
from zoo.train.averages import Power
from zoo.train.optim import AdamW

SMALL = AutoEncoder(
    image=4,
    channels=3,
    latent=2,
    widths=(4,),
    layers=1,
    groups=4,
    scale=0.5,
    mean=(1.0, -1.0),
    std=(2.0, 0.5),
    unit=True,
)

s = config = Run(
    task=edm2.sized(
        "s",
        channels=4,
        classes=1000,
        inputs="latents",
        noise=LogNormal(-0.4, 1.0),
        vae=edm2.autoencoder(),
        dtype="bfloat16",
        remat="full",
        attention="auto",
    ),
    data=Latents("data/imagenet512-edm2"),
    weights={"vae": "exports/sd-vae-edm2"},
    optim=AdamW(
        lr=0.01,
        final_lr=0.0,
        warmup=4_883,
        schedule="inverse_sqrt",
        hold=70_000,
        b2=0.99,
        eps=6.1e-13,
        weight_decay=0.0,
    ),
    ema=(Power(0.05), Power(0.1)),
    steps=1_048_576,
    batch=2_048,
    mesh=Mesh(data=1, fsdp=-1),
    checkpoint=Checkpoint(every=2_000, keep=3, snapshots=16_384),
    samples=Samples(every=20_000, n=64, options={"nfe": 63}),
    evals=(Denoising(every=20_000, limit=5_000),),
    log_every=100,
)


def entry(size: edm2.Named, lr: float, steps: int) -> Run:
    """A size with its learning rate and length."""
    task = replace(config.task, network=edm2.sized(size).network)
    return replace(config, task=task, optim=replace(config.optim, lr=lr), steps=steps)


xxs = entry("xxs", 0.017, 1_048_576)
xs = entry("xs", 0.012, 1_048_576)
m = entry("m", 0.009, 1_048_576)
l = entry("l", 0.008, 917_504)
xl = entry("xl", 0.007, 655_360)
xxl = entry("xxl", 0.0065, 458_752)
uncond = replace(xs, task=replace(xs.task, classes=0, vae=None), weights=None)  # the published guide

smoke = replace(
    config,
    task=edm2.Edm2(
        image=4,
        channels=2,
        classes=2,
        inputs="latents",
        network=edm2.UNet(width=8, multiples=(1,), blocks=1, attention=(), head_dim=4, uncertainty=8),
        vae=SMALL,
        dtype="bfloat16",
    ),
    data=Synthetic(),
    weights=None,
    optim=replace(config.optim, warmup=0),
    steps=4,
    batch=8,
    mesh=Mesh(),
    checkpoint=Checkpoint(snapshots=2),
    evals=(Denoising(sigmas=(0.5,), limit=8, batch=8),),
    samples=Samples(n=4, options={"nfe": 3}),
)
