"""DART on MNIST by class: eight copies of 49 tokens. One GPU.

`data.path` is an .npz file with train_images, train_labels, test_images and test_labels, or what `zoo prepare images channels=1`
makes of it.

    zoo train dart/mnist data.path=data/mnist.npz
    zoo train dart/mnist:small data.path=data/mnist.npz      # 14x14 pixels: a CPU

`:blind` and `:markov` are the controls of `dart/digits`; `:small_blind` is the first at 14x14.
"""

from dataclasses import replace

from zoo.data.images import Images
from zoo.data.synthetic import Synthetic
from zoo.papers import dart
from zoo.papers.dart.metrics import Context
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=dart.Dart(
        latent=(28, 28),
        channels=1,
        classes=10,
        inputs="pixels",
        patch=4,
        steps=8,
        width=256,
        depth=6,
        centre=-0.739,
        spread=0.616,
        dtype="bfloat16",
    ),
    data=Images("data/mnist.npz", size=28, channels=1),
    optim=AdamW(lr=1e-3, final_lr=1e-5, warmup=200, b2=0.95, weight_decay=0.01, clip=2.0),
    ema=0.999,
    steps=10_000,
    batch=128,
    checkpoint=Checkpoint(every=1_000, keep=2),
    samples=Samples(every=5_000, n=100),
    evals=(Context(limit=1_000, draws=2),),
    log_every=50,
)
blind = replace(config, task=replace(config.task, mask="same"))
markov = replace(config, task=replace(config.task, mask="same", fed="chain"))

small = replace(
    config,
    task=replace(
        config.task,
        latent=(14, 14),
        patch=2,
        steps=6,
        schedule="chain",
        width=48,
        depth=3,
        head_dim=16,
        base=100.0,
        spread=0.56,
        dtype="float32",
        scan=False,
    ),
    data=Images("data/mnist.npz", size=14, channels=1),
    optim=replace(config.optim, lr=2e-3, warmup=50),
    ema=0.995,
    steps=1_500,
    batch=32,
    samples=Samples(n=100),
)
small_blind = replace(small, task=replace(small.task, mask="same"))

smoke = replace(
    config,
    task=replace(config.task, latent=(8, 8), classes=2, steps=2, width=16, depth=2, head_dim=16),
    data=Synthetic(),
    steps=4,
    batch=8,
    evals=(),
    samples=Samples(n=4),
)
