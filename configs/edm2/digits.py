"""EDM2 on the bundled scans of digits, by class: a small U-Net that keeps magnitudes, minutes on two CPU cores.

zoo train edm2/digits
zoo sample runs/edm2-digits n=64 nfe=35
"""

from dataclasses import replace

from zoo.data.images import Digits
from zoo.data.synthetic import Synthetic
from zoo.metrics.denoising import Denoising
from zoo.papers import edm2
from zoo.run import Checkpoint, Run, Samples
from zoo.train.averages import Power
from zoo.train.optim import AdamW

config = Run(
    task=edm2.Edm2(
        image=8,
        channels=1,
        classes=10,
        network=edm2.UNet(width=32, multiples=(1, 2), blocks=1, attention=(), head_dim=32, uncertainty=32),
    ),
    data=Digits(),
    optim=AdamW(lr=0.01, final_lr=1e-4, warmup=100, b2=0.99, weight_decay=0.0),
    ema=(Power(0.05), Power(0.1)),
    steps=500,
    batch=64,
    checkpoint=Checkpoint(every=250, keep=2),
    samples=Samples(n=100, options={"nfe": 17}),
    evals=(Denoising(sigmas=(0.2, 0.5, 1.0)),),
    log_every=50,
)
smoke = replace(
    config,
    task=edm2.Edm2(
        image=4,
        channels=1,
        classes=2,
        network=edm2.UNet(width=8, multiples=(1,), blocks=1, attention=(), head_dim=4, uncertainty=8),
    ),
    data=Synthetic(),
    steps=4,
    batch=8,
    evals=(),
    samples=Samples(n=4, options={"nfe": 3}),
)
