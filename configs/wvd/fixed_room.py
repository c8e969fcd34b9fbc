"""WVD in made rooms of one size and one paint with other things in each, seen from the first camera: 4 frames of 16x16 pixels.

zoo train wvd/fixed_room
zoo eval runs/wvd-fixed_room geometry
"""

from dataclasses import replace

from zoo.data.scenes import Scenes
from zoo.data.synthetic import Synthetic
from zoo.papers import wvd
from zoo.papers.wvd.metrics import Geometry
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=wvd.Wvd(frames=4, image=16, width=128, depth=4, scan=False),
    data=Scenes("fixed_room", frames=4, size=16, fov=90.0),
    optim=AdamW(lr=2e-3, final_lr=2e-5, warmup=50, b2=0.95, weight_decay=0.01, clip=1.0),
    ema=0.995,
    steps=2_000,
    batch=16,
    checkpoint=Checkpoint(every=500, keep=2),
    samples=Samples(n=8, options={"task": "stereo"}),
    evals=(Geometry(),),
    log_every=50,
)

smoke = replace(
    config,
    task=replace(config.task, frames=2, image=8, width=16, depth=2, head_dim=8),
    data=Synthetic(),
    steps=4,
    batch=8,
    evals=(),
    samples=Samples(n=2, options={"task": "camera", "nfe": 2}),
)
