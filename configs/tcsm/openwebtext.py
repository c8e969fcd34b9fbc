"""TCSM on OpenWebText at MDLM's sizes: texts of 1,024 tokens of GPT-2; `tiny`, the main one (small) and `medium`.

    zoo prepare text FOLDER data/openwebtext tokenizer=tokenizer.json       # .parquet, .jsonl or .txt files; GPT-2's tokenizer
    zoo train tcsm/openwebtext
    zoo train tcsm/openwebtext:ratio

`sedd` and `uniform` are SEDD with masked and with replaced tokens. Published bounds of the perplexity on validation text are 23.21
(MDLM) and 24.10 (SEDD), and 17.54 of a model that writes token by token (arXiv:2507.00425, table 2). The recipe is MDLM's without its
dropout; nothing here has been run to the end. 16 chips of a v5e hold the main one, and `medium` and `ratio` with
accumulate=2. A mesh with a tensor axis must divide the 50,257 tokens (29 x 1,733): leave it at 1.
"""

from dataclasses import replace

from zoo.data.synthetic import Synthetic
from zoo.data.text.tokens import Text
from zoo.dist import Mesh
from zoo.metrics.text import TextBound
from zoo.papers.tcsm import Tcsm, TcsmRatio
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=Tcsm(vocab=50_257, length=1_024, dtype="bfloat16", remat="dots", attention="auto"),
    data=Text("data/openwebtext"),
    optim=AdamW(lr=3e-4, warmup=2_500, schedule="constant", weight_decay=0.0, clip=1.0),
    ema=0.9999,
    steps=1_000_000,
    batch=512,
    mesh=Mesh(data=1, fsdp=-1),
    checkpoint=Checkpoint(every=2_000, keep=3),
    samples=Samples(every=20_000, n=16, options={"steps": 128}),
    evals=(TextBound(split="valid", every=20_000, limit=1_000), TextBound(split="valid", draws=4)),
    log_every=100,
)
tiny = replace(config, task=replace(config.task, width=512, depth=8))
medium = replace(config, task=replace(config.task, width=1_024, depth=24))
sedd = replace(config, task=replace(config.task, objective="sedd", time=True))
uniform = replace(sedd, task=replace(sedd.task, kernel="uniform", schedule="geometric"))
ratio = replace(
    config,
    task=TcsmRatio(vocab=50_257, length=1_024, dtype="bfloat16", remat="dots", attention="auto"),
    weights={"net": "runs/tcsm-openwebtext:net", "start": "runs/tcsm-openwebtext:net"},
    steps=400_000,
    evals=(),
)

smoke = replace(
    config,
    task=Tcsm(vocab=5, length=6, width=8, depth=1, head_dim=8, dtype="bfloat16"),
    data=Synthetic(values=5),
    steps=4,
    batch=8,
    ema=0.9,
    mesh=Mesh(),
    evals=(),
    samples=Samples(n=4, options={"steps": 3}),
)
