"""iTARFlow on the bundled scans of digits, by class: a flow for all levels of noise from .02 to .7, minutes on two CPU cores.

    zoo train itarflow/digits
    zoo sample runs/itarflow-digits n=64 level=0.35 nfe=10
    zoo sample runs/itarflow-digits n=64 level=0.7 nfe=1           # TarFlow's one step, from too high a level
    zoo sample runs/itarflow-digits n=64 solver=tada nfe=8
    zoo sample runs/itarflow-digits n=4 temper=2 particles.count=64

1,500 scans of 8x8 pixels train, 297 are held out. What it costs to know all levels shows beside a flow of one, which is TarFlow with
blocks of unequal depth: `task.low=0.0999 task.high=0.1`. `:first` and `:last` are the parts of `itarflow/digits_product`.
"""

from dataclasses import replace

from zoo.data.images import Digits
from zoo.data.synthetic import Synthetic
from zoo.metrics.denoising import Denoising, EnergyByLevel
from zoo.papers import itarflow
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=itarflow.ITarFlow(
        image=8,
        channels=1,
        patch=2,
        width=64,
        depth=(1, 1, 1, 3),
        head_dim=16,
        classes=10,
        low=0.02,
        high=0.7,
        scan=False,
    ),
    data=Digits(),
    optim=AdamW(lr=1e-3, final_lr=1e-5, warmup=100, b2=0.95, weight_decay=1e-4, decay_all=True, clip=1.0),
    ema=0.999,
    steps=3_000,
    batch=64,
    checkpoint=Checkpoint(every=1_000, keep=2),
    samples=Samples(every=1_500, n=100, options={"level": 0.35}),
    evals=(Denoising(sigmas=(0.1, 0.2, 0.5)), EnergyByLevel(sigmas=(0.02, 0.05, 0.1, 0.2, 0.35, 0.7))),
    log_every=50,
)

# Smaller flows of some classes together: digits 0 to 3, and 2 to 5.
PART = replace(config.task, width=32, depth=(1, 1, 2), classes=0)
first = replace(config, task=PART, data=Digits((0, 1, 2, 3)), steps=2_000)
last = replace(first, data=Digits((2, 3, 4, 5)))

smoke = replace(
    config,
    task=itarflow.ITarFlow(
        image=4, channels=1, patch=2, width=8, depth=(1, 2), head_dim=8, classes=2, low=0.02, high=0.7
    ),
    data=Synthetic(),
    steps=4,
    batch=8,
    evals=(),
    samples=Samples(n=4, options={"nfe": 2}),
)
