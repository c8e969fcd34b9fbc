"""An energy of the bundled digits by class, distilled from EDM's denoiser of them, which comes with the package: minutes on two cores.

    zoo train energy/digits
    zoo sample runs/energy-digits n=64                          # by a solver of its denoiser
    zoo sample runs/energy-digits n=16 temper=2 form=score particles.count=64 --batch 4    # colder, by weighted particles

`:dsm` learns from the data instead, from the same start. `:low` and `:high` know the digits 0 to 3 and 2 to 5 alone, for
`energy/digits_product`: small networks without classes, from scratch, since particles ask them hundreds of times as often.
"""

from dataclasses import replace

from zoo.data.images import Digits
from zoo.data.synthetic import Synthetic
from zoo.metrics.denoising import Denoising
from zoo.papers import edm, energy
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

NETWORK = edm.Edm(image=8, channels=1, classes=10, network=edm.Transformer(width=64, depth=4, head_dim=16, patch=2))
SMALL = edm.Edm(image=4, channels=1, classes=2, network=edm.Transformer(width=8, depth=2, head_dim=4, patch=2))

config = Run(
    task=energy.EnergyDistill(NETWORK),
    data=Digits(),
    weights={"teacher": "edm-digits", "net": "edm-digits:net"},
    optim=AdamW(lr=5e-4, final_lr=1e-5, warmup=50, b2=0.99, weight_decay=0.0, clip=1.0),
    ema=0.995,
    steps=1_000,
    batch=64,
    checkpoint=Checkpoint(every=500, keep=2),
    samples=Samples(n=100, options={"nfe": 17}),
    evals=(Denoising(sigmas=(0.2, 0.5, 1.0)),),
    log_every=50,
)
dsm = replace(config, task=replace(config.task, target="data"), weights={"net": "edm-digits:net"})
student = replace(
    dsm, weights={"net": "runs/energy-digits:net"}
)  # the distilled energy without its teacher; nothing to train

# One patch is one token: a residual network that the noise modulates.
PART = edm.Edm(image=8, channels=1, network=edm.Transformer(width=64, depth=3, head_dim=64, patch=8))
low = replace(
    dsm,
    task=energy.EnergyDistill(PART, target="data"),
    data=Digits((0, 1, 2, 3)),
    weights=None,
    optim=AdamW(lr=2e-3, final_lr=1e-5, warmup=100, b2=0.99, weight_decay=1e-4, clip=1.0),
    ema=0.999,
    steps=5_000,
    checkpoint=Checkpoint(every=1_000, keep=2),
)
high = replace(low, data=Digits((2, 3, 4, 5)))

smoke = replace(
    config,
    task=energy.EnergyDistill(SMALL, target="data"),  # a fresh teacher says what a fresh student does
    data=Synthetic(),
    weights=None,
    steps=4,
    batch=8,
    evals=(),
    samples=Samples(n=4, options={"nfe": 3}),
)
