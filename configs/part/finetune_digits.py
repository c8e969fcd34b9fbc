"""Fine-tuning on the bundled digits: the encoder of `part/digits`, positions that are new to it, and a linear classifier.

`weights.encoder=RUN:encoder` takes another run's encoder; `:scratch` takes none; `:probe` holds the encoder.
"""

from dataclasses import replace

from zoo.data.images import Digits
from zoo.data.synthetic import Synthetic
from zoo.metrics.probe import Accuracy
from zoo.papers import part
from zoo.run import Checkpoint, Run
from zoo.train.optim import AdamW

config = Run(
    task=part.PartClassifier(image=8, channels=1, patch=2, width=64, depth=3, head_dim=16, classes=10),
    data=Digits(),
    weights={"encoder": "runs/part-digits:encoder"},
    optim=AdamW(lr=1e-3, final_lr=1e-6, warmup=50, weight_decay=0.05),
    steps=1_000,
    batch=64,
    checkpoint=Checkpoint(every=500, keep=2),
    evals=(Accuracy(),),
    log_every=50,
)
probe = replace(config, task=replace(config.task, frozen=True), optim=replace(config.optim, lr=1e-2))
scratch = replace(config, weights=None)

smoke = replace(
    config,
    task=part.PartClassifier(image=8, channels=1, patch=2, width=8, depth=1, head_dim=8, classes=2),
    data=Synthetic(),
    weights=None,
    steps=4,
    batch=8,
    evals=(),
)
