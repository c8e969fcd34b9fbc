"""TarFlowLM on text8 at the paper's sizes: Mix-d over 27 symbols, then two Mix-1 layers, each trained on those before it.

    zoo train tarflow_lm/text8 data.path=FOLDER/text8; zoo train tarflow_lm/text8:stage2; zoo train tarflow_lm/text8:stage3

`mix1` and `affine` are trained at once, `discrete` is the usual model with as many transformer layers. The paper reports at
most 1.30 (Mix-d), 1.37 (Mix-1) and 1.54 (affine) bits per character on test text, a discrete model 1.23. It gives neither
the optimiser nor the depths of Mix-d, the length of texts, batch size or steps: those here are the usual ones of the
models it compares with, and have not been run to the end.
"""

from dataclasses import replace

from zoo.data.synthetic import Synthetic
from zoo.data.text.tokens import Text
from zoo.dist import Mesh
from zoo.metrics.text import TextBound
from zoo.papers.tarflow_lm import DiscreteLM, Layer, TarFlowLM
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=TarFlowLM(
        vocab=27,
        length=256,
        dims=5,
        layers=(
            Layer("mixd", depth=8, components=27),
            Layer("mix1", depth=2, components=2),
            Layer("mix1", depth=2, components=2),
        ),
        stage=1,
        width=768,
        head_dim=64,
        dtype="bfloat16",
        remat="dots",
        attention="auto",
    ),
    data=Text("data/text8", tokenizer="text8"),
    optim=AdamW(lr=3e-4, warmup=2_500, schedule="constant", weight_decay=0.0, clip=1.0),
    ema=0.9999,
    steps=500_000,
    batch=512,
    mesh=Mesh(data=1, fsdp=-1),
    checkpoint=Checkpoint(every=2_000, keep=3),
    samples=Samples(every=10_000, n=16),
    evals=(TextBound(split="valid", every=10_000, limit=2_000), TextBound(draws=16)),
    log_every=100,
)
stage1 = replace(config, workdir="runs/tarflow_lm-text8")  # `config` by its name as a stage
stage2 = replace(
    config,
    task=replace(config.task, stage=2),
    weights={"": "runs/tarflow_lm-text8"},
    steps=250_000,
)
stage3 = replace(
    stage2,
    task=replace(config.task, stage=3),
    weights={"": "runs/tarflow_lm-text8-stage2"},
)
mix1 = replace(
    config,
    task=replace(config.task, layers=tuple(Layer("mix1", depth=n, components=27) for n in (2, 2, 8)), stage=0),
)
affine = replace(
    mix1,
    task=replace(mix1.task, layers=tuple(Layer("affine", depth=2) for _ in range(6))),
)
discrete = replace(
    config,
    task=DiscreteLM(vocab=27, length=256, width=768, depth=12, dtype="bfloat16", remat="dots", attention="auto"),
)

smoke = replace(
    config,
    task=TarFlowLM(
        vocab=5,
        length=6,
        dims=2,
        layers=(Layer("mixd", depth=1, components=5), Layer("mix1", depth=1, components=2)),
        stage=2,
        width=8,
        head_dim=8,
        dtype="bfloat16",
    ),
    data=Synthetic(values=5),
    steps=4,
    batch=8,
    ema=0.9,
    mesh=Mesh(),
    evals=(),
    samples=Samples(n=4),
)
