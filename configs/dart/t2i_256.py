"""DART from captions at 256 pixels: the largest model of `dart/imagenet256`, with the features of a caption in front of the copies.

    zoo import starflow/sd_vae FILE exports/sd-vae
    zoo import starflow/flan_t5_xl FOLDER exports/flan-t5-xl
    zoo prepare latents PAIRS data/pairs256-latents size=256 vae=exports/sd-vae text=exports/flan-t5-xl
    zoo train dart/t2i_256

How the paper brings captions in is not known here; a prefix of 128 tokens of Flan-T5-XL is our choice.
"""

from dataclasses import replace

from zoo.data.images.latents import Latents
from zoo.data.synthetic import Synthetic
from zoo.dist import Mesh
from zoo.encoders.text import T5, xl
from zoo.encoders.vae import AutoEncoder, sd
from zoo.papers import dart
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

SMALL = AutoEncoder(image=8, channels=3, latent=2, widths=(4, 4), layers=1, groups=4, scale=1.0)

config = Run(
    task=dart.Dart(
        latent=(32, 32),
        channels=4,
        text_tokens=128,
        text_width=2048,
        target="v",
        cap=None,
        width=1152,
        depth=28,
        vae=sd(),
        text=xl(dtype="bfloat16"),
        dtype="bfloat16",
        remat="full",
        attention="auto",
    ),
    data=Latents("data/pairs256-latents"),
    weights={"vae": "exports/sd-vae", "text": "exports/flan-t5-xl"},
    optim=AdamW(lr=3e-4, final_lr=1e-5, warmup=10_000, b2=0.95, weight_decay=0.01, clip=2.0),
    ema=0.9999,
    steps=500_000,
    batch=128,
    mesh=Mesh(data=1, fsdp=-1),
    checkpoint=Checkpoint(every=5_000, keep=3),
    samples=Samples(every=25_000, n=64, options={"guidance": 2.0}),
    log_every=50,
)

smoke = replace(
    config,
    task=replace(
        config.task,
        latent=(4, 4),
        channels=2,
        text_tokens=4,
        text_width=8,
        steps=2,
        width=16,
        depth=2,
        head_dim=16,
        vae=SMALL,
        text=T5(width=8, heads=2, head_dim=4, mlp=16, depth=1, vocab=16, tokens=4),
    ),
    data=Synthetic(),
    weights=None,
    steps=4,
    batch=8,
    mesh=Mesh(),
    samples=Samples(n=4),
)
