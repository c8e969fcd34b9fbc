"""TarFlow on ImageNet 64x64 by class: Gaussian noise 0.05, labels dropped one time in ten, bf16, 200 epochs.

Sample with `zoo sample RUN label=207 guidance=2.3` (the official evaluation of this model uses 2.3, annealed).
"""

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
        image=64,
        patch=2,
        width=768,
        depth=8,
        blocks=8,
        head_dim=64,
        classes=1000,
        noise=0.05,
        dtype="bfloat16",
        remat="dots",
        attention="auto",
    ),
    data=Images("tfds:imagenet_resized/64x64", size=64, flip=True),
    optim=AdamW(lr=1e-4, final_lr=1e-6, warmup=5_004, b2=0.95, weight_decay=1e-4, decay_all=True),
    steps=1_000_800,
    batch=256,
    mesh=Mesh(data=1, fsdp=-1),
    checkpoint=Checkpoint(every=2_000, keep=3),
    samples=Samples(every=10_000, n=64, options={"guidance": 2.0}),
    evals=(Bits(every=10_000, limit=5_000),),
    log_every=100,
)

smoke = replace(
    config,
    task=tarflow.TarFlow(
        image=4, patch=2, width=8, depth=1, blocks=2, head_dim=8, classes=2, noise=0.05, dtype="bfloat16"
    ),
    data=Synthetic(),
    steps=4,
    batch=8,
    mesh=Mesh(),
    evals=(),
    samples=Samples(n=4),
)
