"""TarFlow on MNIST by class, the recipe of the official notebook: Gaussian noise 0.1, no label dropping, 100 epochs.

`data.path` is an .npz file with train_images, train_labels, test_images and test_labels, or what `zoo prepare images channels=1`
makes of it. `bayes` classifies test digits by the likelihood of each class.
"""

from dataclasses import replace

from zoo.data.images import Images
from zoo.data.synthetic import Synthetic
from zoo.metrics.likelihood import BayesAccuracy, Bits
from zoo.papers import tarflow
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=tarflow.TarFlow(
        image=28,
        channels=1,
        patch=4,
        width=128,
        depth=4,
        blocks=4,
        head_dim=64,
        classes=10,
        noise=0.1,
        drop=0.0,
        scan=False,
    ),
    data=Images("data/mnist.npz", size=28, channels=1),
    optim=AdamW(lr=2e-3, final_lr=1e-6, warmup=234, b2=0.95, weight_decay=1e-4, decay_all=True),
    steps=23_400,
    batch=256,
    checkpoint=Checkpoint(every=1_000, keep=2),
    samples=Samples(every=2_000, n=100),
    evals=(
        Bits(limit=2_000),
        BayesAccuracy(limit=2_000),
    ),
    log_every=50,
)

# What two CPU cores do in some minutes: half an epoch of smaller batches.
short = replace(
    config,
    optim=replace(config.optim, warmup=100),
    steps=500,
    batch=64,
    samples=Samples(n=100),
)

smoke = replace(
    config,
    task=tarflow.TarFlow(image=4, channels=1, patch=2, width=8, depth=1, blocks=2, head_dim=8, classes=2, noise=0.1),
    data=Synthetic(),
    steps=4,
    batch=8,
    evals=(),
    samples=Samples(n=4),
)
