"""EDM on FFHQ 64x64 without classes: the DDPM++ U-Net of the paper (62 million parameters) and its recipe, without the augmentation.

Batch 256, 200 million images, learning rate 2e-4 after 10 million images, an average of half-life half a million images
(arXiv:2206.00364's code). Ours are bfloat16 and the flips that stand for the augmentation's.
`data.path` is a folder of images, or what `zoo prepare images size=64` makes of it.

    zoo train edm/ffhq64 data.path=data/ffhq64
    zoo import edm/ffhq64:ncsnpp edm-ffhq-64x64-uncond-ve.npz ffhq64-ve
    zoo sample ffhq64-ve n=64 nfe=79
"""

from dataclasses import replace

from zoo.data.images import Images
from zoo.data.synthetic import Synthetic
from zoo.metrics.denoising import Denoising
from zoo.papers import edm
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=edm.Edm(
        image=64,
        channels=3,
        network=edm.UNet(width=128, multiples=(1, 2, 2, 2), blocks=4, attention=(16,), dropout=0.05, augment=9),
        dtype="bfloat16",
        attention="auto",
    ),
    data=Images("data/ffhq64", size=64, flip=True),
    optim=AdamW(lr=2e-4, final_lr=0.0, warmup=39_063, schedule="constant", weight_decay=0.0),
    ema=0.999645,
    steps=781_250,
    batch=256,
    checkpoint=Checkpoint(every=2_000, keep=2),
    samples=Samples(every=10_000, n=64, options={"nfe": 79}),
    evals=(Denoising(limit=2_000),),
    log_every=50,
)

# The other network of the paper, published as "ve"; the one above as "vp".
ncsnpp = replace(config, task=replace(config.task, network=replace(config.task.network, kind="ncsn++")))

# AFHQv2 64x64: fewer images, so more dropout.
afhqv2 = replace(
    config,
    task=replace(config.task, network=replace(config.task.network, dropout=0.25)),
    data=Images("data/afhqv2-64", size=64, flip=True),
)

smoke = replace(
    config,
    task=edm.Edm(
        image=4,
        channels=3,
        network=edm.UNet(width=8, multiples=(1, 1), blocks=1, attention=(2,)),
    ),
    data=Synthetic(),
    optim=replace(config.optim, warmup=0),
    steps=4,
    batch=8,
    evals=(),
    samples=Samples(n=4, options={"nfe": 3}),
)
