"""EDM on MNIST by class: a U-Net of width 64 with attention at 7x7.

`data.path` is an .npz file with train_images, train_labels, test_images and test_labels, or what `zoo prepare images channels=1`
makes of it.

    zoo train edm/mnist data.path=data/mnist.npz
    zoo train edm/mnist:short data.path=data/mnist.npz      # minutes on two CPU cores
"""

from dataclasses import replace

from zoo.data.images import Images
from zoo.data.synthetic import Synthetic
from zoo.metrics.denoising import Denoising
from zoo.papers import edm
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=edm.Edm(
        image=28,
        channels=1,
        classes=10,
        network=edm.UNet(width=64, multiples=(1, 2, 2), blocks=2, attention=(7,), dropout=0.1),
        dtype="bfloat16",
    ),
    data=Images("data/mnist.npz", size=28, channels=1),
    optim=AdamW(lr=1e-3, final_lr=1e-5, warmup=500, b2=0.99, clip=1.0),
    ema=0.999,
    steps=20_000,
    batch=128,
    checkpoint=Checkpoint(every=1_000, keep=2),
    samples=Samples(every=2_000, n=100, options={"nfe": 17}),
    evals=(Denoising(limit=2_000),),
    log_every=50,
)

# What two CPU cores do in some minutes.
short = replace(
    config,
    task=replace(config.task, network=edm.UNet(width=16, multiples=(1, 2, 2), blocks=1, dropout=0.0), dtype="float32"),
    optim=replace(config.optim, lr=2e-3, warmup=50),
    ema=0.99,
    steps=500,
    batch=64,
    samples=Samples(n=100, options={"nfe": 17}),
)

smoke = replace(
    config,
    task=edm.Edm(image=4, channels=1, classes=2, network=edm.UNet(width=8, multiples=(1, 1), blocks=1, attention=(2,))),
    data=Synthetic(),
    steps=4,
    batch=8,
    evals=(),
    samples=Samples(n=4, options={"nfe": 3}),
)
