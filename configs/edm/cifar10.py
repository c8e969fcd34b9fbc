"""EDM on CIFAR-10 by class: the DDPM++ U-Net of the paper (56 million parameters) and its recipe, without the augmentation.

Batch 512, 200 million images, learning rate 1e-3 after 10 million images, an average of half-life half a million images
(arXiv:2206.00364's code). Ours are bfloat16 and the labels that are dropped.
`data.path` is a folder of class folders, or what `zoo prepare images size=32` makes of it.

    zoo train edm/cifar10 data.path=data/cifar10
    zoo compile edm/cifar10 --topology v5e:2x2
    zoo import edm/cifar10:ncsnpp edm-cifar10-32x32-cond-ve.npz cifar10-ve
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
        image=32,
        channels=3,
        classes=10,
        network=edm.UNet(width=128, multiples=(2, 2, 2), blocks=4, attention=(16,), dropout=0.13, augment=9),
        dtype="bfloat16",
    ),
    data=Images("data/cifar10", size=32, flip=True),
    optim=AdamW(lr=1e-3, final_lr=0.0, warmup=19_532, schedule="constant", weight_decay=0.0),
    ema=0.99929,
    steps=390_625,
    batch=512,
    checkpoint=Checkpoint(every=2_000, keep=2),
    samples=Samples(every=10_000, n=100, options={"nfe": 35}),
    evals=(Denoising(limit=2_000),),
    log_every=50,
)

# The other network of the paper, published as "ve"; the one above as "vp".
ncsnpp = replace(config, task=replace(config.task, network=replace(config.task.network, kind="ncsn++")))

# One GPU, minutes: half the width and few images.
short = replace(
    config,
    task=replace(config.task, network=replace(config.task.network, width=64, augment=0)),
    optim=AdamW(lr=1e-3, final_lr=1e-5, warmup=500, weight_decay=0.0, clip=1.0),
    ema=0.999,
    steps=6_000,
    batch=256,
    checkpoint=Checkpoint(every=1_000, keep=2),
    samples=Samples(every=2_000, n=100, options={"nfe": 17}),
)

smoke = replace(
    config,
    task=edm.Edm(image=4, channels=3, classes=2, network=edm.UNet(width=8, multiples=(1, 1), blocks=1, attention=(2,))),
    data=Synthetic(),
    optim=replace(config.optim, warmup=0),
    steps=4,
    batch=8,
    evals=(),
    samples=Samples(n=4, options={"nfe": 3}),
)
