"""EDM on the bundled scans of digits, by class: a small U-Net, minutes on two CPU cores.

    zoo train configs/edm/digits.py
    zoo sample runs/edm-digits n=64 guidance=1

1,500 scans of 8x8 pixels train, 297 are held out. Samples take 17 calls of the network (Heun's steps); `nfe` and
`guidance` are options of the sampler; `configs/edm/README.md` has other solvers.
"""

from dataclasses import replace

from zoo.data.images import Digits
from zoo.data.synthetic import Synthetic
from zoo.papers import edm
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=edm.Edm(
        image=8,
        channels=1,
        classes=10,
        network=edm.UNet(width=32, multiples=(1, 2), blocks=1, attention=(4,), dropout=0.1),
    ),
    data=Digits(),
    optim=AdamW(lr=2e-3, final_lr=1e-5, warmup=100, b2=0.99, weight_decay=1e-4, clip=1.0),
    ema=0.999,
    steps=4_000,
    batch=64,
    checkpoint=Checkpoint(every=1_000, keep=2),
    samples=Samples(every=1_000, n=100, options={"nfe": 17}),
    log_every=50,
)

smoke = replace(
    config,
    task=edm.Edm(
        image=4,
        channels=1,
        classes=2,
        network=edm.UNet(width=8, multiples=(1, 1), blocks=1, attention=(), dropout=0.1),
    ),
    data=Synthetic(),
    steps=4,
    batch=8,
    samples=Samples(n=4, options={"nfe": 3}),
)
