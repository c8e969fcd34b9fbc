"""TarFlow on AFHQ 256x256 by class (cat, dog, wild): patches of 8, Gaussian noise 0.07, bf16, 4,000 epochs.

`data.path` is the folder of the data set, train/ and val/ with a subfolder per class. Steps count 57 batches of 256 an
epoch (14,630 training images).
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
        image=256,
        patch=8,
        width=768,
        depth=8,
        blocks=8,
        head_dim=64,
        classes=3,
        noise=0.07,
        dtype="bfloat16",
        remat="dots",
        attention="auto",
    ),
    data=Images("data/afhq", size=256, flip=True),
    optim=AdamW(lr=1e-4, final_lr=1e-6, warmup=57, b2=0.95, weight_decay=1e-4, decay_all=True),
    steps=228_000,
    batch=256,
    mesh=Mesh(data=1, fsdp=-1),
    checkpoint=Checkpoint(every=2_000, keep=3),
    samples=Samples(every=10_000, n=64, options={"guidance": 3.4}),
    evals=(Bits(every=10_000),),
    log_every=100,
)

smoke = replace(
    config,
    task=tarflow.TarFlow(
        image=4, patch=2, width=8, depth=1, blocks=2, head_dim=8, classes=3, noise=0.07, dtype="bfloat16"
    ),
    data=Synthetic(),
    steps=4,
    batch=8,
    mesh=Mesh(),
    evals=(),
    samples=Samples(n=4),
)
