"""TarFlowLM on OpenWebText at the paper's sizes: a codebook of all 50,257 tokens of GPT-2 in 16 dimensions.

    zoo prepare text FOLDER data/openwebtext tokenizer=tokenizer.json       # .parquet, .jsonl or .txt files; GPT-2's tokenizer
    zoo train tarflow_lm/openwebtext; zoo train tarflow_lm/openwebtext:stage2; zoo train tarflow_lm/openwebtext:stage3

The first layer trains alone, so that no gradient ever passes its Rosenblatt map; then it is held and only evaluated, a part
of the tokens at a time. The paper reports perplexities of at most 22.64 (Mix-d) and 27.11 (Mix-1) on validation text, a
discrete model 17.54. What it leaves open is as in `tarflow_lm/text8`; nothing here has been run to the end.
A mesh with a tensor axis must divide the 50,257 tokens (29 x 1,733): leave it at 1.
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
        vocab=50_257,
        length=1_024,
        dims=16,
        layers=(
            Layer("mixd", depth=8, components=50_257),
            Layer("mix1", depth=2, components=64),
            Layer("mix1", depth=2, components=64),
        ),
        stage=1,
        width=768,
        head_dim=64,
        sigma=0.2,
        dtype="bfloat16",
        remat="dots",
        attention="auto",
    ),
    data=Text("data/openwebtext"),
    optim=AdamW(lr=3e-4, warmup=2_500, schedule="constant", weight_decay=0.0, clip=1.0),
    ema=0.9999,
    steps=500_000,
    batch=512,
    mesh=Mesh(data=1, fsdp=-1),
    checkpoint=Checkpoint(every=2_000, keep=3),
    samples=Samples(every=10_000, n=4),
    evals=(TextBound(split="valid", every=10_000, limit=1_000),),
    log_every=100,
)
stage1 = replace(config, workdir="runs/tarflow_lm-openwebtext")  # `config` by its name as a stage
stage2 = replace(
    config,
    task=replace(config.task, stage=2),
    weights={"": "runs/tarflow_lm-openwebtext"},
    steps=250_000,
)
stage3 = replace(
    stage2,
    task=replace(config.task, stage=3),
    weights={"": "runs/tarflow_lm-openwebtext-stage2"},
)
mix1 = replace(
    config,
    task=replace(config.task, layers=tuple(Layer("mix1", depth=n, components=64) for n in (2, 2, 8)), stage=0),
)
discrete = replace(
    config,
    task=DiscreteLM(vocab=50_257, length=1_024, width=768, depth=12, dtype="bfloat16", remat="dots", attention="auto"),
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
