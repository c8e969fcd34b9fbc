"""STARFlow from captions at 1024 pixels in mixed aspect ratios, tuned from t2i_512: about 16,384 tokens.

    zoo prepare latents PAIRS data/pairs1024-latents size=1024 aspects=true vae=exports/sd-vae text=exports/flan-t5-xl
    zoo train starflow/t2i_1024

Every batch is of one of nine aspect ratios, which the captions name (`template="aspect"`); the train step is compiled once for each.
Positions of the finer grid lie between those of the coarse one (`reach` stays 32). How the paper's authors tuned theirs is not known:
steps, batch and learning rate are guesses.
"""

from dataclasses import replace

from zoo.data.images.latents import Latents
from zoo.data.synthetic import Synthetic
from zoo.dist import Mesh
from zoo.encoders.text import T5, xl
from zoo.encoders.vae import AutoEncoder, sd
from zoo.papers import starflow
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=starflow.text_to_image(
        latent=(128, 128),
        vae=sd(image=1024),
        text=xl(dtype="bfloat16"),
        template="aspect",
        dtype="bfloat16",
        remat="full",
        attention="auto",
    ),
    data=Latents("data/pairs1024-latents", aspect="mixed"),
    weights={"": "runs/starflow-t2i_512"},
    optim=AdamW(lr=2e-5, final_lr=1e-6, warmup=500, b2=0.95, weight_decay=1e-4, decay_all=True, clip=1.0),
    steps=20_000,
    batch=128,
    mesh=Mesh(data=1, fsdp=-1),
    checkpoint=Checkpoint(every=1_000, keep=3),
    samples=Samples(every=5_000, n=16, options={"guidance": 2.5}),
    log_every=50,
)

smoke = replace(
    config,
    task=starflow.StarFlow(
        latent=(4, 4),
        channels=2,
        width=32,
        depths=(1, 2),
        head_dim=32,
        text_tokens=4,
        text_width=8,
        reach=4.0,
        dtype="bfloat16",
        vae=AutoEncoder(image=4, channels=3, latent=2, widths=(4,), layers=1, groups=4, scale=1.0),
        text=T5(width=8, heads=2, head_dim=4, mlp=16, depth=1, vocab=16, tokens=4),
    ),
    data=Synthetic(),
    weights=None,
    steps=4,
    batch=8,
    mesh=Mesh(),
    samples=Samples(n=4),
)
