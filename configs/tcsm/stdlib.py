"""TCSM on text that every machine has: the docstrings of Python's standard library, 27 symbols, minutes on two CPU cores.

    zoo train tcsm/stdlib                                             # matched to data: MDLM's objective
    zoo sample runs/tcsm-stdlib steps=32                              # texts out of nothing, in 32 calls of the network
    zoo sample runs/tcsm-stdlib prompt="the ____ of a" n=4            # holes are filled in, and what is missing behind
    zoo train tcsm/stdlib:ratio                                       # what tells its drafts from data, on the finished run

`sedd` and `uniform` are SEDD with masked and with replaced tokens; the first has the same bound as the main run, from outputs that
need not sum to one. `score` is the score form (generalised KL), whose times all weigh the same.
"""

from dataclasses import replace

from zoo.data.synthetic import Synthetic
from zoo.data.tokens import Docstrings
from zoo.metrics.text import Generation, TextBound
from zoo.papers.tcsm import Tcsm, TcsmRatio
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=Tcsm(vocab=27, length=64, width=96, depth=3, head_dim=32, scan=False),
    data=Docstrings(),
    optim=AdamW(lr=2e-3, final_lr=1e-6, warmup=100, b2=0.99, weight_decay=0.0, clip=1.0),
    ema=0.999,
    steps=3_000,
    batch=32,
    checkpoint=Checkpoint(every=500, keep=2),
    samples=Samples(n=8),
    evals=(TextBound(draws=4, limit=1_000), Generation()),
    log_every=50,
)
sedd = replace(config, task=replace(config.task, objective="sedd", time=True))
uniform = replace(sedd, task=replace(sedd.task, kernel="uniform"))
score = replace(config, task=replace(config.task, objective="gkl", weight="one"))
ratio = replace(
    config,
    task=TcsmRatio(vocab=27, length=64, width=96, depth=3, head_dim=32, scan=False),
    weights={"net": "runs/tcsm-stdlib:net"},
    optim=replace(config.optim, lr=1e-3),
    steps=1_000,
    evals=(Generation(),),
)

smoke = replace(
    config,
    task=Tcsm(vocab=5, length=6, width=8, depth=1, head_dim=8, scan=False),
    data=Synthetic(values=5),
    steps=4,
    batch=8,
    ema=0.9,
    evals=(),
    samples=Samples(n=4, options={"steps": 3}),
)
