"""TarFlowLM on text that every machine has: the docstrings of Python's standard library, 27 symbols, minutes on two CPU cores.

    zoo train tarflow_lm/stdlib                                               # Mix-d: a component for every symbol
    zoo train tarflow_lm/stdlib:stage2; zoo train tarflow_lm/stdlib:stage3    # two layers more, each on those before it
    zoo sample runs/tarflow_lm-stdlib-stage3 n=2 passes=true                  # what every layer makes of a text

`patch2` writes two symbols at a time. `discrete` is the usual language model, a little wider: width 96 and 3 layers.
"""

from dataclasses import replace

from zoo.data.synthetic import Synthetic
from zoo.data.text.tokens import Docstrings
from zoo.metrics.text import TextBound
from zoo.papers.tarflow_lm import DiscreteLM, Layer, TarFlowLM
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=TarFlowLM(
        vocab=27,
        length=64,
        dims=5,
        layers=(
            Layer("mixd", depth=3, components=27),
            Layer("mix1", depth=1, components=2),
            Layer("mix1", depth=1, components=2),
        ),
        stage=1,
        width=80,
        head_dim=40,
        scan=False,
    ),
    data=Docstrings(),
    optim=AdamW(lr=2e-3, final_lr=1e-6, warmup=100, b2=0.99, weight_decay=0.0, clip=1.0),
    ema=0.999,
    steps=800,
    batch=32,
    checkpoint=Checkpoint(every=250, keep=2),
    samples=Samples(n=8),
    evals=(TextBound(limit=1_000),),
    log_every=50,
)
stage1 = replace(config, workdir="runs/tarflow_lm-stdlib")  # `config` by its name as a stage
stage2 = replace(
    config,
    task=replace(config.task, stage=2),
    weights={"": "runs/tarflow_lm-stdlib"},
    steps=400,
)
stage3 = replace(
    stage2,
    task=replace(config.task, stage=3),
    weights={"": "runs/tarflow_lm-stdlib-stage2"},
)
patch2 = replace(
    config,
    task=replace(config.task, layers=config.task.layers[:1], patch=2),
)
discrete = replace(
    config,
    task=DiscreteLM(vocab=27, length=64, width=96, depth=3, head_dim=32, scan=False),
)

smoke = replace(
    config,
    task=DiscreteLM(vocab=5, length=6, width=8, depth=1, head_dim=8, scan=False),
    data=Synthetic(values=5),
    steps=4,
    batch=8,
    ema=0.9,
    evals=(),
    samples=Samples(n=4),
)
