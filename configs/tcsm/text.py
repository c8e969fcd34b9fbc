"""TCSM on a text file of yours, character by character: normalised to 27 symbols, or in the characters it has.

zoo train tcsm/text data.path=FILE.txt
zoo train tcsm/text data.path=FILE.txt data.tokenizer=chars task.vocab=N workdir=runs/mine
zoo train tarflow_lm/text:discrete data.path=FILE.txt                     # the yardstick, token by token
"""

from dataclasses import replace

from zoo.data.synthetic import Synthetic
from zoo.data.text.tokens import Text
from zoo.metrics.text import TextBound
from zoo.papers.tcsm import Tcsm
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=Tcsm(vocab=27, length=96, width=256, depth=6, scan=False),
    data=Text("data/text.txt", tokenizer="text8"),
    optim=AdamW(lr=1e-3, final_lr=1e-6, warmup=200, b2=0.99, weight_decay=0.0, clip=1.0),
    ema=0.999,
    steps=10_000,
    batch=32,
    checkpoint=Checkpoint(every=500, keep=2),
    samples=Samples(every=2_000, n=8),
    evals=(TextBound(split="valid", every=2_000, limit=500), TextBound(draws=4)),
    log_every=50,
)
sedd = replace(config, task=replace(config.task, objective="sedd", time=True))
uniform = replace(sedd, task=replace(sedd.task, kernel="uniform"))

smoke = replace(
    config,
    task=Tcsm(
        vocab=5,
        length=6,
        kernel="uniform",
        schedule="geometric",
        objective="sedd",
        time=True,
        width=8,
        depth=1,
        head_dim=8,
        scan=False,
    ),
    data=Synthetic(values=5),
    steps=4,
    batch=8,
    ema=0.9,
    evals=(),
    samples=Samples(n=4, options={"steps": 3}),
)
