"""TarFlow on ImageNet 64x64, unconditional generation: Gaussian noise 0.05, bf16, 200 epochs.

Bits here are those of noisy data (`noisy_bits_per_dim`), to watch training by; sample quality is measured with
`zoo eval RUN frechet features=EXPORT`. Guidance without labels goes by attention temperature:
`zoo sample RUN guidance.weight=0.2 guidance.attention_temperature=0.3`.
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
    samples=Samples(every=10_000, n=64),
    evals=(Bits(every=10_000, limit=5_000),),
    log_every=100,
)

smoke = replace(
    config,
    task=tarflow.TarFlow(image=4, patch=2, width=8, depth=1, blocks=2, head_dim=8, noise=0.05, dtype="bfloat16"),
    data=Synthetic(),
    steps=4,
    batch=8,
    mesh=Mesh(),
    evals=(),
    samples=Samples(n=4),
)
