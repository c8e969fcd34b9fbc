"""Matryoshka-DART on the bundled scans of digits, enlarged: 16x16 pixels after 8x8 ones in one sequence, by class.

    zoo train configs/dart/digits_matryoshka.py
    zoo sample runs/dart-digits_matryoshka n=64 guidance=1
    zoo eval runs/dart-digits_matryoshka context      # do the large copies use the small ones?

Copies 1 to 6 are of the small digits, 16 tokens each, and 7 to 10 of the large ones, 64 tokens each. `:blind`: no copy sees another.
"""

from dataclasses import replace

from zoo.data.images import Digits
from zoo.data.synthetic import Synthetic
from zoo.papers import dart
from zoo.papers.dart.metrics import Context
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=dart.Dart(
        latent=(16, 16),
        channels=1,
        classes=10,
        inputs="pixels",
        steps=4,
        coarse=6,
        schedule="chain",
        width=48,
        depth=3,
        head_dim=16,
        base=100.0,
        centre=-0.381,
        spread=0.698,
        scan=False,
    ),
    data=Digits(size=16),
    optim=AdamW(lr=2e-3, final_lr=1e-5, warmup=50, b2=0.95, weight_decay=0.01, clip=2.0),
    ema=0.995,
    steps=1_200,
    batch=32,
    checkpoint=Checkpoint(every=400, keep=2),
    samples=Samples(n=100),
    evals=(Context(),),
    log_every=50,
)
blind = replace(config, task=replace(config.task, mask="same"))

smoke = replace(
    config,
    task=replace(config.task, latent=(4, 4), patch=1, classes=2, steps=2, coarse=2, width=16, depth=2),
    data=Synthetic(),
    steps=4,
    batch=8,
    evals=(),
    samples=Samples(n=4, options={"guidance": 1.0}),
)
