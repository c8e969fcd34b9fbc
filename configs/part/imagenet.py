"""PART on ImageNet with ViT-B/16: 196 patches of 8 to 32 pixels a side, 4,802 pairs, bfloat16, 400 epochs of batches of 1,024.

Sizes, pairs, head and optimiser are those of the official launch script, which ran up to 1,600 epochs; the number of epochs and the
clipping are ours, and nobody has trained this config. The encoder goes on in `part/finetune_imagenet`, or as a plain ViT-B/16 in other
libraries: `zoo export RUN vit.safetensors --format official`.
"""

from dataclasses import replace

from zoo.data.images import Images
from zoo.data.synthetic import Synthetic
from zoo.dist import Mesh
from zoo.metrics.probe import Probe
from zoo.papers import part
from zoo.papers.part.metrics import Relations
from zoo.run import Checkpoint, Run
from zoo.train.optim import AdamW

_encoder = {
    "image": 224,
    "channels": 3,
    "patch": 16,
    "width": 768,
    "depth": 12,
    "head_dim": 64,
    "drop_path": 0.1,
    "augment": "resized",
    "dtype": "bfloat16",
    "scan": True,
    "remat": "dots",
}

config = Run(
    task=part.Part(**_encoder, head="pairwise", pairs=4_802),
    data=Images("tfds:imagenet2012", size=224, flip=True),
    optim=AdamW(lr=1.25e-4, final_lr=1e-5, warmup=25_020, weight_decay=0.05, clip=1.0),
    steps=500_400,
    batch=1_024,
    mesh=Mesh(data=1, fsdp=-1),
    checkpoint=Checkpoint(every=2_500, keep=3),
    evals=(Relations(every=25_000, test=256, batch=32), Probe(train=20_000, test=10_000, iterations=200)),
    log_every=100,
)
cross_attention = replace(config, task=part.Part(**_encoder, pairs=4_802))
absolute = replace(config, task=part.AbsolutePosition(**_encoder), evals=config.evals[1:])
mae = replace(
    config,
    task=part.MaskedAutoencoder(**_encoder, decoder_width=512, decoder_depth=8, decoder_head_dim=32),
    evals=config.evals[1:],
)

smoke = replace(
    config,
    task=part.Part(image=8, channels=1, patch=2, width=8, depth=1, head_dim=8, pairs=8),
    data=Synthetic(),
    steps=4,
    batch=8,
    mesh=Mesh(),
    evals=(),
)
