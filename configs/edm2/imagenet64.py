"""EDM2 on ImageNet 64x64 by class, XS to XL (124 million to 1.1 billion parameters); S: FID 1.58 in the paper.

    zoo train edm2/imagenet64:s
    zoo import edm2/imagenet64:s FILE exports/edm2-img64-s

Batch, learning rate and its decay, Adam's moments, averages, dropout, levels of noise and the images seen are the paper's. Its loss
is a sum over numbers and ours the mean, so `eps` is smaller by their count. The paper computes in float16, we in bfloat16.
"""

from dataclasses import replace

from zoo.data.images import Images
from zoo.data.synthetic import Synthetic
from zoo.diffusion.levels import LogNormal
from zoo.dist import Mesh
from zoo.metrics.denoising import Denoising
from zoo.papers import edm2
from zoo.run import Checkpoint, Run, Samples
from zoo.train.averages import Power
from zoo.train.optim import AdamW

s = config = Run(
    task=edm2.sized(
        "s", channels=3, classes=1000, noise=LogNormal(-0.8, 1.6), dtype="bfloat16", remat="full", attention="auto"
    ),
    data=Images("tfds:imagenet_resized/64x64", size=64),
    optim=AdamW(
        lr=0.01,
        final_lr=0.0,
        warmup=4_883,
        schedule="inverse_sqrt",
        hold=35_000,
        b2=0.99,
        eps=8.1e-13,
        weight_decay=0.0,
    ),
    ema=(Power(0.05), Power(0.1)),
    steps=524_288,
    batch=2_048,
    mesh=Mesh(data=1, fsdp=-1),
    checkpoint=Checkpoint(every=2_000, keep=3, snapshots=16_384),
    samples=Samples(every=20_000, n=64, options={"nfe": 63}),
    evals=(Denoising(every=20_000, limit=5_000),),
    log_every=100,
)


def entry(size: edm2.Named, lr: float, steps: int) -> Run:
    """A size with its learning rate and length."""
    task = replace(config.task, network=edm2.sized(size).network)
    return replace(config, task=task, optim=replace(config.optim, lr=lr), steps=steps)


xs = entry("xs", 0.012, 524_288)
m = entry("m", 0.009, 1_048_576)
l = entry("l", 0.008, 524_288)
xl = entry("xl", 0.007, 327_680)

smoke = replace(
    config,
    task=edm2.Edm2(
        image=4,
        channels=3,
        classes=2,
        network=edm2.UNet(width=8, multiples=(1, 1), blocks=1, attention=(), head_dim=4, dropout=0.1, uncertainty=8),
        dtype="bfloat16",
        remat="full",
    ),
    data=Synthetic(),
    optim=replace(config.optim, warmup=0),
    steps=4,
    batch=8,
    mesh=Mesh(),
    checkpoint=Checkpoint(snapshots=2),
    evals=(Denoising(sigmas=(0.5,), limit=8, batch=8),),
    samples=Samples(n=4, options={"nfe": 3}),
)
