"""iTARFlow on ImageNet 64x64 by class: the official recipe, not a result of ours.

Levels from .01 to 0.3, weight t, four blocks of 4, 4, 4 and 24 layers, batch 512. The published evaluation takes a guidance of
1.1 (their scale is 1 + weight) in stage one and 30 steps of `euler` in stage two, without a clip.

    zoo train itarflow/imagenet64
    zoo compile itarflow/imagenet64 --topology v5p:4x4x4
    zoo sample runs/itarflow-imagenet64 n=16 guidance=1.1 nfe=30
"""

from dataclasses import replace

from zoo.data.images import Images
from zoo.data.synthetic import Synthetic
from zoo.dist import Mesh
from zoo.metrics.denoising import EnergyByLevel
from zoo.papers import itarflow
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=itarflow.ITarFlow(
        image=64,
        patch=2,
        width=1280,
        classes=1000,
        high=0.3,
        chunk=16,
        dtype="bfloat16",
        remat="dots",
        attention="auto",
    ),
    data=Images("tfds:imagenet_resized/64x64", size=64, flip=True),
    optim=AdamW(lr=1e-4, final_lr=1e-5, warmup=2_502, b2=0.95, weight_decay=1e-4, decay_all=True),
    steps=750_600,
    batch=512,
    mesh=Mesh(data=1, fsdp=-1),
    checkpoint=Checkpoint(every=2_000, keep=3),
    samples=Samples(every=10_000, n=64, options={"guidance": 1.1}),
    evals=(EnergyByLevel(every=10_000, limit=5_000),),
    log_every=100,
)

smoke = replace(
    config,
    task=itarflow.ITarFlow(image=4, patch=2, width=8, depth=(1, 2), head_dim=8, classes=2, dtype="bfloat16"),
    data=Synthetic(),
    steps=4,
    batch=8,
    mesh=Mesh(),
    evals=(),
    samples=Samples(n=4, options={"nfe": 2}),
)
