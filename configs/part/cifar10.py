"""PART on CIFAR-10 with ViT-S/4: 64 patches of 2 to 8 pixels a side, 100 epochs; `:small` for two CPU cores.

`data.path` is a folder of class folders, or what `zoo prepare images` makes of it. `:absolute` and `:mae` are the pretexts it is compared
with, on the same encoder and budget, and so are `:small_absolute` and `:small_mae`. `part/finetune_cifar10` goes on from any of them.
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
    "image": 32,
    "channels": 3,
    "patch": 4,
    "width": 384,
    "depth": 12,
    "head_dim": 64,
    "drop_path": 0.1,
    "augment": "pad",
    "dtype": "bfloat16",
    "scan": True,
}
_small = {**_encoder, "width": 64, "depth": 4, "head_dim": 32, "drop_path": 0.0, "dtype": "float32", "scan": False}
_decoder = {"decoder_width": 192, "decoder_depth": 4, "decoder_head_dim": 32}

config = Run(
    task=part.Part(**_encoder, pairs=1_024),
    data=Images("data/cifar10", size=32, flip=True),
    optim=AdamW(lr=5e-4, final_lr=1e-5, warmup=3_900, weight_decay=0.05, clip=1.0),
    steps=19_500,
    batch=256,
    mesh=Mesh(data=-1, fsdp=1),
    checkpoint=Checkpoint(every=1_000, keep=2),
    evals=(Relations(every=5_000), Probe(train=10_000, test=10_000)),
    log_every=50,
)
absolute = replace(config, task=part.AbsolutePosition(**_encoder), evals=config.evals[1:])
mae = replace(config, task=part.MaskedAutoencoder(**_encoder, **_decoder), evals=config.evals[1:])

# What two CPU cores do in some minutes.
small = replace(
    config,
    task=part.Part(**_small, head="pairwise", pairs=1_024),
    optim=replace(config.optim, lr=1e-3, warmup=200),
    steps=2_000,
    batch=64,
    mesh=Mesh(),
    evals=(Relations(), Probe(train=10_000, test=10_000, baseline=True)),
)
small_absolute = replace(small, task=part.AbsolutePosition(**_small), evals=(Probe(train=10_000, test=10_000),))
small_mae = replace(
    small_absolute,
    task=part.MaskedAutoencoder(**_small, decoder_width=64, decoder_depth=1, decoder_head_dim=32),
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
