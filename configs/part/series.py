"""PART on series of your own (EEG, ECG, sensors): windows of half a second to two of 128 Hz in pieces of 16 seconds, say.

`data.path` is an .npz file with train_series [N, T, C] and train_labels (`data.labels=` without), a CSV file with a row per time step
and a column per channel, or a folder of such files, by class or not. Set `task.channels` to theirs. The series must change over the
length of a window: where every piece looks like every other, nothing can be learned. `part/finetune_series` goes on from it.
"""

from dataclasses import replace

from zoo.data.series import Series
from zoo.data.synthetic import Synthetic
from zoo.papers import part
from zoo.papers.part.metrics import Relations
from zoo.run import Checkpoint, Run
from zoo.train.optim import AdamW

config = Run(
    task=part.Part(
        image=0, length=2_048, channels=1, patch=64, width=192, depth=6, head_dim=64, head="pairwise", pairs=512
    ),
    data=Series("data/series.npz", length=2_048),
    optim=AdamW(lr=1e-3, final_lr=1e-5, warmup=200, weight_decay=0.05, clip=1.0),
    steps=10_000,
    batch=64,
    checkpoint=Checkpoint(every=1_000, keep=2),
    evals=(Relations(),),
    log_every=50,
)

smoke = replace(
    config,
    task=part.Part(image=0, length=16, channels=1, patch=4, width=8, depth=1, head_dim=8, pairs=4),
    data=Synthetic(),
    steps=4,
    batch=8,
    evals=(),
)
