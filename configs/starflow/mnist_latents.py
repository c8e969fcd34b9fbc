"""STARFlow on MNIST by class, in the latents of the small autoencoder: the whole latent path, on two CPU cores.

    zoo train starflow/mnist_vae
    zoo prepare latents data/mnist.npz data/mnist-latents size=28 vae=runs/starflow-mnist_vae
    zoo train starflow/mnist_latents
    zoo sample runs/starflow-mnist_latents n=100 guidance=1

`equal` has the same layers in blocks of one depth. `zoo eval runs/starflow-mnist_latents configs/starflow/mnist_latents.py:agreement
options.guidance=1` asks a classifier of real digits whether samples are what was asked for; `...:frechet` compares them
with real digits, in pixels.
"""

from dataclasses import replace

from zoo.data.images import Images
from zoo.data.images.latents import Latents
from zoo.data.synthetic import Synthetic
from zoo.encoders.vae import AutoEncoder
from zoo.metrics.agreement import Agreement
from zoo.metrics.frechet import Frechet
from zoo.metrics.likelihood import Bits
from zoo.papers import starflow
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=starflow.StarFlow(
        latent=(7, 7),
        channels=4,
        width=96,
        depths=(1, 1, 1, 5),
        head_dim=32,
        classes=10,
        reach=7.0,
        order="R2L",
        noise=0.3,
        vae=AutoEncoder(image=28, channels=1, latent=4, widths=(16, 32, 64), layers=1, groups=8, scale=None, kl=1e-3),
        scan=False,
    ),
    data=Latents("data/mnist-latents"),
    weights={"vae": "runs/starflow-mnist_vae"},
    optim=AdamW(lr=1e-3, final_lr=1e-6, warmup=100, b2=0.95, weight_decay=1e-4, decay_all=True, clip=1.0),
    ema=0.999,
    steps=2_500,
    batch=64,
    checkpoint=Checkpoint(every=500, keep=2),
    samples=Samples(n=100, options={"guidance": 1.0}),
    evals=(Bits(limit=2_000, baselines=True),),
    log_every=50,
)

equal = replace(config, task=replace(config.task, depths=(2, 2, 2, 2)))

digits = Images("data/mnist.npz", size=28, channels=1)
agreement = Agreement(options={"guidance": 1.0}, path=digits)
frechet = Frechet("pixels", samples=1_000, limit=1_000, path=digits, options={"guidance": 1.0})

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
        vae=AutoEncoder(image=8, channels=1, latent=2, widths=(8, 8), layers=1, groups=4, scale=None),
    ),
    data=Synthetic(),
    weights=None,
    steps=4,
    batch=8,
    evals=(),
    samples=Samples(n=4),
)
