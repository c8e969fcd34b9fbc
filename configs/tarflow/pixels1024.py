"""TarFlow on 1024x1024 pixels: 16,384 tokens an image, 1.4 billion parameters. A starting point, not a recipe of the paper.

The paper stops at 256 pixels. Width and depth are those of the pixel model (1.3 billion parameters at 256 pixels) that the
STARFlow paper re-trained; noise, batch and steps are guesses that nobody has trained. What is known is what
`zoo compile tarflow/pixels1024 --topology v5p:4x4x4 mesh.data=4 mesh.fsdp=16` prints: it fits, and how fast it can be.
With fewer images than chips, `mesh.sequence=4` shares out the tokens of an image. `data.path` is a folder of class folders
or what `zoo prepare images` makes of it.
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
        image=1024,
        patch=8,
        width=1280,
        depth=8,
        blocks=8,
        head_dim=64,
        noise=0.15,
        dtype="bfloat16",
        remat="full",
        attention="auto",
    ),
    data=Images("data/images1024", size=1024, flip=True),
    optim=AdamW(lr=1e-4, final_lr=1e-6, warmup=5_000, b2=0.95, weight_decay=1e-4, decay_all=True, clip=1.0),
    ema=0.9999,
    steps=500_000,
    batch=256,
    mesh=Mesh(data=1, fsdp=-1),
    checkpoint=Checkpoint(every=1_000, keep=3),
    samples=Samples(every=10_000, n=64),
    evals=(Bits(every=10_000, batch=64, limit=1_024),),
    log_every=50,
)

smoke = replace(
    config,
    task=tarflow.TarFlow(image=4, patch=2, width=8, depth=1, blocks=2, head_dim=8, noise=0.15, dtype="bfloat16"),
    data=Synthetic(),
    steps=4,
    batch=8,
    mesh=Mesh(),
    evals=(),
    samples=Samples(n=4),
)
