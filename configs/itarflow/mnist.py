"""iTARFlow on MNIST by class: levels from .02 to .7.

`data.path` is an .npz file with train_images, train_labels, test_images and test_labels, or what `zoo prepare images channels=1`
makes of it.

    zoo train itarflow/mnist data.path=mnist.npz
    zoo sample runs/itarflow-mnist n=64 level=0.35
"""

from dataclasses import replace

from zoo.data.images import Images
from zoo.data.synthetic import Synthetic
from zoo.metrics.denoising import Denoising, EnergyByLevel
from zoo.papers import itarflow
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=itarflow.ITarFlow(
        image=28,
        channels=1,
        patch=4,
        width=256,
        depth=(2, 2, 2, 8),
        classes=10,
        low=0.02,
        high=0.7,
        dtype="bfloat16",
        attention="auto",
    ),
    data=Images("data/mnist.npz", size=28, channels=1),
    optim=AdamW(lr=1e-3, final_lr=1e-5, warmup=500, b2=0.95, weight_decay=1e-4, decay_all=True, clip=1.0),
    ema=0.999,
    steps=20_000,
    batch=256,
    checkpoint=Checkpoint(every=1_000, keep=2),
    samples=Samples(every=2_000, n=100, options={"level": 0.35}),
    evals=(Denoising(sigmas=(0.1, 0.2, 0.5)), EnergyByLevel(sigmas=(0.1, 0.2, 0.5))),
    log_every=50,
)

smoke = replace(
    config,
    task=itarflow.ITarFlow(
        image=4, channels=1, patch=2, width=8, depth=(1, 2), head_dim=8, classes=2, low=0.02, high=0.7, dtype="bfloat16"
    ),
    data=Synthetic(),
    steps=4,
    batch=8,
    evals=(),
    samples=Samples(n=4, options={"nfe": 2}),
)
