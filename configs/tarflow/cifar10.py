"""TarFlow on CIFAR-10 by class: patches of 4, width 512, 8 blocks of 4 layers, Gaussian noise 0.05.

The paper has no CIFAR-10 run; this recipe follows what re-implementations report to be stable (clipping and a warmed-up
average). `data.path` is a folder of class folders, or what `zoo prepare images` makes of it.
"""

from dataclasses import replace

from zoo.data.images import Images
from zoo.data.synthetic import Synthetic
from zoo.metrics.likelihood import Bits
from zoo.papers import tarflow
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=tarflow.TarFlow(
        image=32,
        channels=3,
        patch=4,
        width=512,
        depth=4,
        blocks=8,
        head_dim=64,
        classes=10,
        noise=0.05,
        dtype="bfloat16",
    ),
    data=Images("data/cifar10", size=32, flip=True),
    optim=AdamW(lr=5e-4, final_lr=1e-6, warmup=1_000, b2=0.95, weight_decay=1e-4, decay_all=True, clip=0.5),
    ema=0.9999,
    steps=100_000,
    batch=128,
    checkpoint=Checkpoint(every=1_000, keep=2),
    samples=Samples(every=2_000, n=100),
    evals=(Bits(limit=2_000),),
    log_every=50,
)

# What two CPU cores do in some minutes: a model of 3 million parameters in float32.
short = replace(
    config,
    task=tarflow.TarFlow(
        image=32, channels=3, patch=4, width=128, depth=4, blocks=4, head_dim=64, classes=10, noise=0.05, scan=False
    ),
    optim=replace(config.optim, lr=1e-3, warmup=100),
    ema=0.99,
    steps=400,
    batch=64,
    samples=Samples(n=100),
)

smoke = replace(
    config,
    task=tarflow.TarFlow(image=4, channels=3, patch=2, width=8, depth=1, blocks=2, head_dim=8, classes=2, noise=0.05),
    data=Synthetic(),
    steps=4,
    batch=8,
    evals=(),
    samples=Samples(n=4),
)
