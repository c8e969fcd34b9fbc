"""PART on the bundled scans of digits: 16 patches of 1 to 4 pixels a side, cut anywhere in 8x8; a minute or so on a laptop.

1,797 grey images come with scikit-learn; 1,500 train, 297 are held out. `:absolute` and `:mae` are the pretexts it is compared with, on
the same encoder and budget.
"""

from dataclasses import replace

from zoo.data.images import Digits
from zoo.data.synthetic import Synthetic
from zoo.metrics.probe import Neighbours, Probe
from zoo.papers import part
from zoo.papers.part.metrics import Relations
from zoo.run import Checkpoint, Run
from zoo.train.optim import AdamW

_downstream = (Probe(baseline=True), Neighbours(baseline=True))

config = Run(
    task=part.Part(image=8, channels=1, patch=2, width=64, depth=3, head_dim=16, head="pairwise", pairs=256),
    data=Digits(),
    optim=AdamW(lr=2e-3, final_lr=1e-5, warmup=100, weight_decay=0.05, clip=1.0),
    steps=1_500,
    batch=64,
    checkpoint=Checkpoint(every=500, keep=2),
    evals=(Relations(), *_downstream),
    log_every=50,
)

absolute = replace(
    config,
    task=part.AbsolutePosition(image=8, channels=1, patch=2, width=64, depth=3, head_dim=16),
    evals=_downstream,
)
mae = replace(
    config,
    task=part.MaskedAutoencoder(image=8, channels=1, patch=2, width=64, depth=3, head_dim=16),
    evals=_downstream,
)

smoke = replace(
    config,
    task=part.Part(image=8, channels=1, patch=2, width=8, depth=1, head_dim=8, pairs=8),
    data=Synthetic(),
    steps=4,
    batch=8,
    evals=(),
)
