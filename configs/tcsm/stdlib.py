"""TCSM on text that every machine has: the docstrings of Python's standard library, 27 symbols, minutes on two CPU cores.

    zoo train tcsm/stdlib                                             # matched to data, by cross-entropy
    zoo sample runs/tcsm-stdlib steps=32                              # texts out of nothing, in 32 calls of the network
    zoo sample runs/tcsm-stdlib prompt="the ____ of a" n=4            # holes are filled in, and what is missing behind
    zoo train tcsm/stdlib:ratio                                       # what tells its drafts from data, on the finished run

What it has learned is changed by what scores texts; each starts from the run above:

    zoo train tcsm/stdlib:reward                                      # texts with many letters e; data.reward.letter=z
    zoo train tcsm/stdlib:prefer                                      # towards the better one of two, by pairs
    zoo train tcsm/stdlib:chosen; zoo train tcsm/stdlib:reward_chosen # a reward out of pairs, then towards that
    zoo train tarflow_lm/stdlib:discrete; zoo train tcsm/stdlib:distil
    zoo eval runs/tcsm-stdlib judge network=runs/tarflow_lm-stdlib-discrete steps=4,8,16,32,64

`mdlm` draws times as MDLM does, where the main run draws low noise more often and gives it less weight: the same bound, in less noisy
steps. `sedd` and `uniform` are SEDD with masked and with replaced tokens; the first has the same bound as the main run, from outputs that
need not sum to one. `score` is the score form (generalised KL), whose times all weigh the same.
"""

from dataclasses import replace

from zoo.data.synthetic import Synthetic
from zoo.data.text.pairs import Compared, Rewarded
from zoo.data.text.tokens import Docstrings
from zoo.derived import Classifier
from zoo.metrics.judge import MeanReward
from zoo.metrics.text import Generation, TextBound
from zoo.papers.tarflow_lm import DiscreteLM
from zoo.papers.tcsm import Tcsm, TcsmDistill, TcsmPreference, TcsmRatio, TcsmReward, TcsmRewardModel
from zoo.rewards import LetterShare
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=Tcsm(vocab=27, length=64, schedule="cosine", width=80, depth=3, head_dim=40, scan=False),
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
mdlm = replace(config, task=replace(config.task, schedule="loglinear"))
sedd = replace(config, task=replace(mdlm.task, objective="sedd", time=True))
uniform = replace(sedd, task=replace(sedd.task, kernel="uniform"))
score = replace(config, task=replace(config.task, objective="gkl", weight="one"))
ratio = replace(
    config,
    task=TcsmRatio(vocab=27, length=64, schedule="cosine", width=80, depth=3, head_dim=40, scan=False),
    weights={"net": "runs/tcsm-stdlib:net", "start": "runs/tcsm-stdlib:net"},
    optim=replace(config.optim, lr=5e-4),
    steps=1_000,
    evals=(Generation(),),
)

# after pre-training
BASE, SIZE = "runs/tcsm-stdlib:net", {"vocab": 27, "length": 64, "width": 80, "depth": 3, "head_dim": 40, "scan": False}
reward = replace(
    config,
    task=TcsmReward(**SIZE, schedule="cosine", beta=0.02),
    data=Rewarded(Docstrings(), LetterShare("e")),
    weights={"net": BASE},
    optim=replace(config.optim, lr=1e-3),
    steps=600,
    evals=(MeanReward(), Generation()),
)
prefer = replace(
    reward,
    task=TcsmPreference(**SIZE, draws=8),
    data=Compared(Docstrings(), LetterShare("e"), scale=0.02),
    weights={"net": BASE, "reference": BASE},
    optim=replace(config.optim, lr=3e-4),
    steps=300,
    batch=16,
)
chosen = replace(
    prefer, task=TcsmRewardModel(**SIZE), weights=None, optim=config.optim, steps=400, samples=Samples(n=0), evals=()
)
reward_chosen = replace(
    reward,
    task=replace(reward.task, beta=1.0),  # its reward is in units of the labeller's scale
    data=Rewarded(Docstrings(), Classifier("runs/tcsm-stdlib-chosen")),
)
distil = replace(
    config,
    task=TcsmDistill(**SIZE, schedule="cosine", teacher=DiscreteLM(**{**SIZE, "width": 96, "head_dim": 32})),
    weights={"teacher": "runs/tarflow_lm-stdlib-discrete"},
    steps=1_000,
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
