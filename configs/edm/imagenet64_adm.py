"""EDM on ImageNet 64x64 by class: the U-Net of ADM (296 million parameters) and the paper's recipe.

Batch 4096, 2,500 million images, learning rate 1e-4 after 10 million images, an average of half-life 50 million images, no
augmentation and no dropped labels (arXiv:2206.00364's code). bfloat16 is ours, float16 theirs. The paper's samples take 511 calls:

    zoo compile edm/imagenet64_adm --topology v5p:4x4x4
    zoo import edm/imagenet64_adm edm-imagenet-64x64-cond-adm.npz adm
    zoo sample adm n=64 nfe=511 solver=churn solver.churn=40 solver.low=0.05 solver.high=50 solver.noise=1.003
"""

from dataclasses import replace

from zoo.data.images import Images
from zoo.data.synthetic import Synthetic
from zoo.dist import Mesh
from zoo.metrics.denoising import Denoising
from zoo.papers import edm
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=edm.Edm(
        image=64,
        channels=3,
        classes=1000,
        network=edm.ADM(),
        drop=0.0,
        dtype="bfloat16",
        remat="full",
        attention="auto",
    ),
    data=Images("tfds:imagenet_resized/64x64", size=64),
    optim=AdamW(lr=1e-4, final_lr=0.0, warmup=2_441, schedule="constant", weight_decay=0.0),
    ema=0.999943,
    steps=610_352,
    batch=4_096,
    mesh=Mesh(data=1, fsdp=-1),
    checkpoint=Checkpoint(every=1_000, keep=3),
    samples=Samples(every=10_000, n=64, options={"nfe": 35}),
    evals=(Denoising(every=10_000, limit=5_000),),
    log_every=100,
)

smoke = replace(
    config,
    task=edm.Edm(
        image=4,
        channels=3,
        classes=2,
        network=edm.ADM(width=8, multiples=(1,), blocks=1, attention=(4,), head_dim=4),
        drop=0.0,
        dtype="bfloat16",
        remat="full",
    ),
    data=Synthetic(),
    optim=replace(config.optim, warmup=0),
    steps=4,
    batch=8,
    mesh=Mesh(),
    evals=(),
    samples=Samples(n=4, options={"nfe": 3}),
)
