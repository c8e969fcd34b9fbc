"""EDM on the bundled scans of digits, by class: a small transformer, four minutes on two CPU cores.

    zoo train configs/edm/digits.py
    zoo sample runs/edm-digits n=64 guidance=1

1,500 scans of 8x8 pixels train, 297 are held out. The sheets of training take 17 calls of the network (Heun's steps), `zoo
sample` 35 where `nfe` does not say; `configs/edm/README.md` has other solvers.
"""

from dataclasses import replace

from zoo.data.images import Digits
from zoo.data.synthetic import Synthetic
from zoo.metrics.denoising import Denoising
from zoo.papers import edm
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=edm.Edm(
        image=8,
        channels=1,
        classes=10,
        network=edm.Transformer(width=64, depth=4, head_dim=16, patch=2),
    ),
    data=Digits(),
    optim=AdamW(lr=2e-3, final_lr=1e-5, warmup=100, b2=0.99, weight_decay=1e-4, clip=1.0),
    ema=0.999,
    steps=5_000,
    batch=64,
    checkpoint=Checkpoint(every=1_000, keep=2),
    samples=Samples(every=2_500, n=100, options={"nfe": 17}),
    evals=(Denoising(sigmas=(0.2, 0.5, 1.0)),),
    log_every=50,
)

# A worse copy of itself, as a guide (autoguidance/digits).
guide = replace(
    config,
    task=replace(config.task, network=edm.Transformer(width=32, depth=2, head_dim=16, patch=2)),
    steps=500,
    samples=Samples(n=100, options={"nfe": 17}),
)

smoke = replace(
    config,
    task=edm.Edm(
        image=4,
        channels=1,
        classes=2,
        network=edm.Transformer(width=8, depth=2, head_dim=4, patch=2),
    ),
    data=Synthetic(),
    steps=4,
    batch=8,
    evals=(),
    samples=Samples(n=4, options={"nfe": 3}),
)
