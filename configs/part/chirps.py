"""PART on one-dimensional series: synthetic chirps of 256 samples, windows of 16 to 48 cut anywhere; a minute on two CPU cores.

The class of a chirp is its rate, which no single window tells. `:residual` adds the query to what the head's attention gives (not in
the paper); `:absolute` tells the slots of regular windows instead.
"""

from dataclasses import replace

from zoo.data.series import Chirps
from zoo.data.synthetic import Synthetic
from zoo.metrics.probe import Probe
from zoo.papers import part
from zoo.papers.part.metrics import Relations
from zoo.run import Checkpoint, Run
from zoo.train.optim import AdamW

_encoder = {"image": 0, "length": 256, "channels": 1, "patch": 32, "width": 48, "depth": 3, "head_dim": 16}
_downstream = (Probe(train=2_000, baseline=True), Probe(train=100, baseline=True))

config = Run(
    task=part.Part(**_encoder, smallest=16, largest=48, pairs=64),
    data=Chirps(),
    optim=AdamW(lr=2e-3, final_lr=1e-5, warmup=100, weight_decay=0.05, clip=1.0),
    steps=600,
    batch=64,
    checkpoint=Checkpoint(every=300, keep=2),
    evals=(Relations(), *_downstream),
    log_every=50,
)
residual = replace(config, task=replace(config.task, residual=True))
absolute = replace(config, task=part.AbsolutePosition(**_encoder), evals=_downstream)

smoke = replace(
    config,
    task=part.Part(image=0, length=16, channels=1, patch=4, width=8, depth=1, head_dim=8, pairs=4),
    data=Synthetic(),
    steps=4,
    batch=8,
    evals=(),
)
