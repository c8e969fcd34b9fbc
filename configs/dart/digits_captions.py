"""Kaleido-DART on the bundled scans of digits: captions such as "a seven", letter by letter, and images in one sequence.

    zoo train configs/dart/digits_captions.py
    zoo sample runs/dart-digits_captions prompt="a seven" n=16 guidance=1
    zoo sample runs/dart-digits_captions form=text from=test n=16 --out captions

An example has its caption in front of the copies, or where that is dropped behind them. `:draws` and `:reads` are the two halves
alone, the controls: always in front, and hardly ever.
"""

from dataclasses import replace

from zoo.data.images import Digits
from zoo.data.images.captions import Captioned
from zoo.data.synthetic import Synthetic
from zoo.papers import dart
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=dart.Dart(
        latent=(8, 8),
        channels=1,
        inputs="pixels",
        captions="letters",
        text_tokens=8,
        text_width=28,
        writes=True,
        drop=0.5,
        steps=6,
        schedule="chain",
        width=48,
        depth=3,
        head_dim=16,
        base=100.0,
        centre=-0.389,
        spread=0.752,
        scan=False,
    ),
    data=Captioned(Digits()),
    optim=AdamW(lr=2e-3, final_lr=1e-5, warmup=50, b2=0.95, weight_decay=0.01, clip=2.0),
    ema=0.995,
    steps=1_200,
    batch=32,
    checkpoint=Checkpoint(every=400, keep=2),
    samples=Samples(n=100),
    log_every=50,
)
draws = replace(config, task=replace(config.task, drop=0.0))
reads = replace(config, task=replace(config.task, drop=0.999))

smoke = replace(
    config,
    task=replace(config.task, latent=(4, 4), text_tokens=3, steps=2, width=16, depth=2),
    data=Synthetic(),
    steps=4,
    batch=8,
    samples=Samples(n=4),
)
