"""Fine-tuning on labelled series of your own: the encoder of `part/series`, positions that are new to it, and a linear classifier.

Set `task.classes` and `task.channels` to those of the data.
"""

from dataclasses import replace

from zoo.data.series import Series
from zoo.data.synthetic import Synthetic
from zoo.metrics.probe import Accuracy
from zoo.papers import part
from zoo.run import Checkpoint, Run
from zoo.train.optim import AdamW

config = Run(
    task=part.PartClassifier(
        image=0, length=2_048, channels=1, patch=64, width=192, depth=6, head_dim=64, drop_path=0.1, classes=2
    ),
    data=Series("data/series.npz", length=2_048),
    weights={"encoder": "runs/part-series:encoder"},
    optim=AdamW(lr=3e-4, final_lr=1e-6, warmup=100, weight_decay=0.05),
    steps=2_000,
    batch=64,
    checkpoint=Checkpoint(every=500, keep=2),
    evals=(Accuracy(),),
    log_every=50,
)
scratch = replace(config, weights=None)

smoke = replace(
    config,
    task=part.PartClassifier(image=0, length=16, channels=1, patch=4, width=8, depth=1, head_dim=8, classes=2),
    data=Synthetic(),
    weights=None,
    steps=4,
    batch=8,
    evals=(),
)
