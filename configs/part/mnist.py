"""PART on MNIST: 16 patches of 3.5 to 14 pixels a side, cut anywhere; 64 pairs a step. Minutes on two CPU cores.

`data.path` is an .npz file with train_images, train_labels, test_images and test_labels, or what `zoo prepare images channels=1` makes of
it. `:pairwise` has the linear head, `:long` trains it three times as long, `:fixed` cuts patches of 7 pixels and regresses shifts alone;
`:absolute` and `:mae` are the pretexts it is compared with, on the same encoder and budget.
"""

from dataclasses import replace

from zoo.data.images import Images
from zoo.data.synthetic import Synthetic
from zoo.metrics.probe import Neighbours, Probe
from zoo.papers import part
from zoo.papers.part.metrics import Relations
from zoo.run import Checkpoint, Run
from zoo.train.optim import AdamW

_downstream = (Probe(train=3_000, baseline=True), Neighbours(train=3_000, baseline=True))

config = Run(
    task=part.Part(image=28, channels=1, patch=7, width=64, depth=3, head_dim=16, pairs=64),
    data=Images("data/mnist.npz", size=28, channels=1),
    optim=AdamW(lr=2e-3, final_lr=1e-5, warmup=100, weight_decay=0.05, clip=1.0),
    steps=800,
    batch=64,
    checkpoint=Checkpoint(every=400, keep=2),
    evals=(Relations(), *_downstream),
    log_every=50,
)

pairwise = replace(config, task=replace(config.task, head="pairwise"))
long = replace(pairwise, steps=2_400)
fixed = replace(config, task=replace(config.task, smallest=7, largest=7, sizes=False))
absolute = replace(
    config,
    task=part.AbsolutePosition(image=28, channels=1, patch=7, width=64, depth=3, head_dim=16),
    evals=_downstream,
)
mae = replace(
    config,
    task=part.MaskedAutoencoder(image=28, channels=1, patch=7, width=64, depth=3, head_dim=16),
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
