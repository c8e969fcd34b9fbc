"""TarFlow on ImageNet 128x128 by class: patches of 4, width 1024, Gaussian noise 0.15, bf16, 320 epochs."""

from dataclasses import replace

from zoo.data.images import Images
from zoo.data.synthetic import Synthetic
from zoo.dist import Mesh
from zoo.metrics.likelihood import Bits
from zoo.papers import tarflow
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=tarflow.TarFlow(
        image=128,
        patch=4,
        width=1024,
        depth=8,
        blocks=8,
        head_dim=64,
        classes=1000,
        noise=0.15,
        dtype="bfloat16",
        remat="dots",
        attention="auto",
    ),
    data=Images("tfds:imagenet2012", size=128, flip=True, convert=True),
    optim=AdamW(lr=1e-4, final_lr=1e-6, warmup=1_668, b2=0.95, weight_decay=1e-4, decay_all=True),
    steps=533_760,
    batch=768,
    mesh=Mesh(data=1, fsdp=-1),
    checkpoint=Checkpoint(every=2_000, keep=3),
    samples=Samples(every=10_000, n=64, options={"guidance": 1.5}),
    evals=(Bits(every=10_000, limit=5_000),),
    log_every=100,
)

smoke = replace(
    config,
    task=tarflow.TarFlow(
        image=4, patch=2, width=8, depth=1, blocks=2, head_dim=8, classes=2, noise=0.15, dtype="bfloat16"
    ),
    data=Synthetic(),
    steps=4,
    batch=8,
    mesh=Mesh(),
    evals=(),
    samples=Samples(n=4),
)
