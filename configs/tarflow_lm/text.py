"""TarFlowLM on a text file of yours, character by character: normalised to 27 symbols, or in the characters it has.

zoo train tarflow_lm/text data.path=FILE.txt
zoo train tarflow_lm/text data.path=FILE.txt data.tokenizer=chars task.vocab=N task.layers.0.components=N workdir=runs/mine
zoo train tarflow_lm/text:discrete data.path=FILE.txt                     # the yardstick
"""

from dataclasses import replace

from zoo.data.synthetic import Synthetic
from zoo.data.text.tokens import Text
from zoo.metrics.text import TextBound
from zoo.papers.tarflow_lm import DiscreteLM, Layer, TarFlowLM
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=TarFlowLM(
        vocab=27,
        length=96,
        dims=5,
        layers=(Layer("mixd", depth=6, components=27),),
        width=256,
        head_dim=64,
        scan=False,
    ),
    data=Text("data/text.txt", tokenizer="text8"),
    optim=AdamW(lr=1e-3, final_lr=1e-6, warmup=200, b2=0.99, weight_decay=0.0, clip=1.0),
    ema=0.999,
    steps=2_000,
    batch=32,
    checkpoint=Checkpoint(every=250, keep=2),
    samples=Samples(every=500, n=8),
    evals=(TextBound(split="valid", every=500, limit=500), TextBound()),
    log_every=50,
)
mix1 = replace(
    config,
    task=replace(config.task, layers=tuple(Layer("mix1", depth=n, components=27) for n in (1, 1, 4))),
)
discrete = replace(config, task=DiscreteLM(vocab=27, length=96, width=256, depth=6, scan=False))

smoke = replace(
    config,
    task=TarFlowLM(
        vocab=5,
        length=6,
        dims=2,
        patch=2,
        layers=(Layer("affine", depth=1), Layer("mix1", depth=1, components=2, maf=False)),
        width=8,
        head_dim=8,
        scan=False,
    ),
    data=Synthetic(values=5),
    steps=4,
    batch=8,
    ema=0.9,
    evals=(),
    samples=Samples(n=4),
)
