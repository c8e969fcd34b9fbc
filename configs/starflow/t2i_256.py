"""STARFlow from captions at 256 pixels, 3.86 billion parameters, by the released config (arXiv:2506.06276).

    zoo import starflow/sd_vae FILE exports/sd-vae
    zoo import starflow/flan_t5_xl FOLDER exports/flan-t5-xl
    zoo prepare latents PAIRS data/pairs256-latents size=256 vae=exports/sd-vae text=exports/flan-t5-xl
    zoo train starflow/t2i_256

Or bring in the published weights, which are for research only: `zoo import starflow/t2i_256 FILE exports/starflow`. Batch, learning
rates, penalty, noise and dropping are the released config's, warm-up its default (one "epoch" of 50,000 examples), 400 million
images the paper's. `attention` needs bfloat16 on GPUs; for a single GPU set `mesh.fsdp=1 batch=...`.
`zoo train starflow/t2i_256:typescore` also measures now and then whether texts are drawn as captions ask for them (extra `typescore`).
"""

from dataclasses import replace

from zoo.data.images.latents import Latents
from zoo.data.synthetic import Synthetic
from zoo.dist import Mesh
from zoo.encoders.text import T5, xl
from zoo.encoders.vae import AutoEncoder, sd
from zoo.metrics.prompted import Prompted
from zoo.papers import starflow
from zoo.papers.typescore import TypeScore
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=starflow.text_to_image(vae=sd(), text=xl(dtype="bfloat16"), dtype="bfloat16", remat="full", attention="auto"),
    data=Latents("data/pairs256-latents"),
    weights={"vae": "exports/sd-vae", "text": "exports/flan-t5-xl"},
    optim=AdamW(lr=6.4e-5, final_lr=1e-6, warmup=48, b2=0.95, weight_decay=1e-4, decay_all=True),
    steps=390_625,
    batch=1024,
    mesh=Mesh(data=1, fsdp=-1),
    checkpoint=Checkpoint(every=1_000, keep=3),
    samples=Samples(every=10_000, n=64, options={"guidance": 2.5}),
    log_every=50,
)

typescore = replace(config, evals=(Prompted(TypeScore(limit=32), options={"guidance": 2.5}, every=20_000),))

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
