"""TCSM on text8 at the usual sizes: 12 layers of width 768, 256 characters, 27 symbols and no others.

    zoo train tcsm/text8 data.path=FOLDER/text8
    zoo train tcsm/text8:ratio

`sedd` and `uniform` are SEDD with masked and with replaced tokens, `score` is the score form. Published bounds in bits per character
on test text are 1.25 (TCSM), 1.39 (SEDD), 1.37 (MD4), 1.24 (EDLM), and 1.23 of a model that writes character by character
(arXiv:2507.00425, table 2). The recipe is MDLM's without its dropout; nothing here has been run to the end.
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
    task=Tcsm(vocab=27, length=256, dtype="bfloat16", remat="dots", attention="auto"),
    data=Text("data/text8", tokenizer="text8"),
    optim=AdamW(lr=3e-4, warmup=2_500, schedule="constant", weight_decay=0.0, clip=1.0),
    ema=0.9999,
    steps=1_000_000,
    batch=512,
    mesh=Mesh(data=1, fsdp=-1),
    checkpoint=Checkpoint(every=2_000, keep=3),
    samples=Samples(every=20_000, n=16),
    evals=(TextBound(split="valid", every=20_000, limit=2_000), TextBound(draws=16)),
    log_every=100,
)
sedd = replace(config, task=replace(config.task, objective="sedd", time=True))
uniform = replace(sedd, task=replace(sedd.task, kernel="uniform"))
score = replace(config, task=replace(config.task, objective="gkl", weight="one"))
ratio = replace(
    config,
    task=TcsmRatio(vocab=27, length=256, dtype="bfloat16", remat="dots", attention="auto"),
    weights={"net": "runs/tcsm-text8:net", "start": "runs/tcsm-text8:net"},
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
