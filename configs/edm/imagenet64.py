"""EDM's training of a transformer on ImageNet 64x64 by class: DiT-B over patches of 4 (arXiv:2212.09748), bfloat16.

The paper's ImageNet-64 network is a U-Net of 296 million parameters (ADM); this one has 92 million and meets matrix units
better. Nobody has published figures of it.

    zoo compile edm/imagenet64 --topology v5e:4x4
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
        network=edm.Transformer(width=768, depth=12, patch=4),
        dtype="bfloat16",
        remat="dots",
        attention="auto",
    ),
    data=Images("tfds:imagenet_resized/64x64", size=64, flip=True),
    optim=AdamW(lr=2e-4, final_lr=0.0, warmup=5_000, schedule="constant", b2=0.99, weight_decay=0.0, clip=1.0),
    ema=0.9999,
    steps=500_000,
    batch=1_024,
    mesh=Mesh(data=1, fsdp=-1),
    checkpoint=Checkpoint(every=2_000, keep=3),
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
        network=edm.Transformer(width=8, depth=2, head_dim=4, patch=2),
        dtype="bfloat16",
        remat="dots",
    ),
    data=Synthetic(),
    optim=replace(config.optim, warmup=0),
    steps=4,
    batch=8,
    mesh=Mesh(),
    evals=(),
    samples=Samples(n=4, options={"nfe": 3}),
)
