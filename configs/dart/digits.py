"""DART on the bundled scans of digits, by class: six noisy copies of 16 tokens each, minutes on two CPU cores.

    zoo train configs/dart/digits.py
    zoo sample runs/dart-digits n=64 guidance=1
    zoo eval runs/dart-digits context                 # are the earlier copies used?

Beside it, of the same size and steps: `:blind`, whose blocks do not see each other; `:markov`, which gets the sample of the
Markov chain in the place of each copy; `:ar`, which draws one token after the other.
"""

from dataclasses import replace

from zoo.data.images import Digits
from zoo.data.synthetic import Synthetic
from zoo.metrics.frechet import Frechet
from zoo.papers import dart
from zoo.papers.dart.metrics import Context
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=dart.Dart(
        latent=(8, 8),
        channels=1,
        classes=10,
        inputs="pixels",
        steps=6,
        schedule="chain",
        width=48,
        depth=3,
        head_dim=16,
        base=100.0,
        centre=-0.389,
        spread=0.752,
        scan=False,
    ),
    data=Digits(),
    optim=AdamW(lr=4e-3, final_lr=1e-5, warmup=50, b2=0.95, weight_decay=0.01, clip=2.0),
    ema=0.995,
    steps=1_600,
    batch=32,
    checkpoint=Checkpoint(every=400, keep=2),
    samples=Samples(n=100),
    evals=(Context(), Frechet("pixels", samples=2_000)),
    log_every=50,
)
blind = replace(config, task=replace(config.task, mask="same"))
markov = replace(config, task=replace(config.task, mask="same", fed="chain"))
ar = replace(config, task=replace(config.task, mask="tokens"))

smoke = replace(
    config,
    task=replace(config.task, latent=(4, 4), classes=2, steps=2, width=16, depth=2),
    data=Synthetic(),
    steps=4,
    batch=8,
    evals=(),
    samples=Samples(n=4, options={"guidance": 1.0}),
)
