"""Couplings compared on one text of 27 symbols: the same small transformer, 800 steps, minutes on two CPU cores.

    for v in discrete mixd mix1_k27 mix1_k8 mix1_k2 affine mix1_k8_flat affine_flat affine_stack joint; do
      zoo train configs/tarflow_lm/couplings.py:$v data.path=TEXT.txt
    done

`mixd` has one component for every symbol, tied to its Gaussian; the numbers of the others are mixture components, `_flat`
ones predict all channels of a symbol at once. `stage2` and `stage3` add layers to a finished `mixd`; `patch2_*` model two
symbols at a time; `long_*` train eight times as long.
"""

from dataclasses import replace

from zoo.data.synthetic import Synthetic
from zoo.data.text.tokens import Text
from zoo.metrics.text import TextBound
from zoo.papers.tarflow_lm import DiscreteLM, Layer, TarFlowLM
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

mixd = Run(
    task=TarFlowLM(
        vocab=27,
        length=48,
        dims=5,
        layers=(Layer("mixd", depth=2, components=27),),
        width=64,
        head_dim=16,
        scan=False,
    ),
    data=Text("data/text.txt", tokenizer="text8", valid_fraction=0.0, test_fraction=0.1),
    optim=AdamW(lr=2e-3, final_lr=1e-6, warmup=50, b2=0.99, weight_decay=0.0),
    steps=800,
    batch=32,
    checkpoint=Checkpoint(every=400, keep=2),
    samples=Samples(n=8),
    evals=(TextBound(),),
    log_every=50,
)


def flow(*layers: Layer, **fields: int) -> Run:
    """The same run with other layers."""
    return replace(mixd, task=replace(mixd.task, layers=layers, **fields))


config = mixd
discrete = replace(mixd, task=DiscreteLM(vocab=27, length=48, width=64, depth=2, head_dim=16, scan=False))
mix1_k27 = flow(Layer("mix1", components=27))
mix1_k8 = flow(Layer("mix1", components=8))
mix1_k2 = flow(Layer("mix1", components=2))
affine = flow(Layer("affine"))
mix1_k8_flat = flow(Layer("mix1", components=8, maf=False))
affine_flat = flow(Layer("affine", maf=False))
affine_stack = replace(flow(Layer("affine"), Layer("affine"), Layer("affine")), steps=600)
joint = replace(flow(mixd.task.layers[0], Layer("mix1", components=2)), steps=600)

# one layer after the other: what is trained is held, and the next begins as the identity
stack = (mixd.task.layers[0], Layer("mix1", depth=1, components=2), Layer("mix1", depth=1, components=2))
stage2 = replace(flow(*stack, stage=2), weights={"": "runs/tarflow_lm-couplings-mixd"})
stage3 = replace(flow(*stack, stage=3), weights={"": "runs/tarflow_lm-couplings-stage2"})

# two symbols at a time
patch2_flat = flow(Layer("mix1", components=8, maf=False), patch=2)
patch2_stack = flow(*(Layer("mix1", components=8, maf=False),) * 3, patch=2)
patch2_maf = flow(Layer("mix1", components=8), patch=2)
patch2_mixd = flow(mixd.task.layers[0], patch=2)
patch2_mixd_stack = flow(mixd.task.layers[0], *(Layer("mix1", components=8),) * 2, patch=2)

long_mixd = replace(mixd, steps=6_400)
long_discrete = replace(discrete, steps=6_400)

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
