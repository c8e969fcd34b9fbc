"""DART on CIFAR-10 by class, in pixels: eight copies of 256 tokens, 33 million parameters. One GPU or more; not run here.

`data.path` is a folder of class folders, or what `zoo prepare images size=32` makes of it.

    zoo train dart/cifar10 data.path=data/cifar10
"""

from dataclasses import replace

from zoo.data.images import Images
from zoo.data.synthetic import Synthetic
from zoo.papers import dart
from zoo.papers.dart.metrics import Context
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=dart.Dart(
        latent=(32, 32),
        channels=3,
        classes=10,
        inputs="pixels",
        steps=8,
        width=384,
        depth=12,
        centre=-0.053,
        spread=0.503,
        dtype="bfloat16",
        remat="full",
        attention="auto",
    ),
    data=Images("data/cifar10", size=32, flip=True),
    optim=AdamW(lr=3e-4, final_lr=1e-5, warmup=2_000, b2=0.95, weight_decay=0.01, clip=2.0),
    ema=0.9995,
    steps=100_000,
    batch=128,
    checkpoint=Checkpoint(every=2_000, keep=2),
    samples=Samples(every=10_000, n=100, options={"guidance": 0.5}),
    evals=(Context(limit=1_000, draws=1),),
    log_every=50,
)

smoke = replace(
    config,
    task=replace(config.task, latent=(4, 4), classes=2, steps=2, width=16, depth=2, head_dim=16),
    data=Synthetic(),
    steps=4,
    batch=8,
    evals=(),
    samples=Samples(n=4),
)
