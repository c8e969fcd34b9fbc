"""iTARFlow on ImageNet 128x128 by class: the official recipe, not a result of ours.

Levels from .01 to 0.5, weight t, four blocks of 4, 4, 4 and 24 layers, batch 512. The published evaluation takes a guidance of
2.7 (their scale is 1 + weight) in stage one and 50 steps of `euler` in stage two, without a clip.

    zoo train itarflow/imagenet128
    zoo compile itarflow/imagenet128 --topology v5p:4x4x4
    zoo sample runs/itarflow-imagenet128 n=16 guidance=2.7 nfe=50
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
        image=128,
        patch=4,
        width=1600,
        classes=1000,
        high=0.5,
        chunk=16,
        dtype="bfloat16",
        remat="dots",
        attention="auto",
    ),
    data=Images("data/imagenet128", size=128, flip=True),
    optim=AdamW(lr=1e-4, final_lr=1e-5, warmup=2_502, b2=0.95, weight_decay=1e-4, decay_all=True),
    steps=1_125_900,
    batch=512,
    mesh=Mesh(data=1, fsdp=-1),
    checkpoint=Checkpoint(every=2_000, keep=3),
    samples=Samples(every=10_000, n=64, options={"guidance": 2.7}),
    evals=(EnergyByLevel(every=10_000, limit=5_000),),
    log_every=100,
)

smoke = replace(
    config,
    task=itarflow.ITarFlow(image=4, patch=2, width=8, depth=(1, 2), head_dim=8, classes=2, dtype="bfloat16", chunk=2),
    data=Synthetic(),
    steps=4,
    batch=8,
    mesh=Mesh(),
    evals=(),
    samples=Samples(n=4, options={"nfe": 2}),
)
