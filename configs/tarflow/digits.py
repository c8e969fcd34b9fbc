"""TarFlow on the bundled scans of digits: real images, no download, minutes on a laptop.

1,797 grey 8x8 images with 17 levels come with scikit-learn; 1,500 train, 297 are held out. Uniform dequantisation, so
`bpd` is a bound on the data's own bits. Small data needs what the paper's runs go without: a warmed-up average of the
weights and clipping.
"""

from dataclasses import replace

from zoo.data.images import Digits
from zoo.data.synthetic import Synthetic
from zoo.metrics.likelihood import Bits
from zoo.papers import tarflow
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=tarflow.TarFlow(
        image=8,
        channels=1,
        patch=2,
        width=64,
        depth=2,
        blocks=4,
        head_dim=64,
        noise_type="uniform",
        levels=17,
        scan=False,
    ),
    data=Digits(),
    optim=AdamW(lr=1e-3, final_lr=1e-6, warmup=100, b2=0.95, weight_decay=1e-4, decay_all=True, clip=1.0),
    ema=0.999,
    steps=2_600,
    batch=64,
    checkpoint=Checkpoint(every=500, keep=2),
    samples=Samples(every=500, n=100),
    evals=(Bits(draws=16, baselines=True),),
    log_every=50,
)

smoke = replace(
    config,
    task=tarflow.TarFlow(
        image=4, channels=1, patch=2, width=8, depth=1, blocks=2, head_dim=8, noise_type="uniform", levels=17
    ),
    data=Synthetic(),
    steps=4,
    batch=8,
    evals=(),
    samples=Samples(n=4),
)
