"""WVD in made rooms of which everything differs, seen from the first camera: 8 frames of 32x32 pixels, for a GPU.

    zoo train wvd/open
    zoo eval runs/wvd-open geometry draws=8
    zoo sample runs/wvd-open task=camera from=test path=orbit n=8

`:rgb` has images alone; `:s` has the width and depth of the smallest latent model, for `zoo bench`.
"""

from dataclasses import replace

from zoo.data.scenes import Scenes
from zoo.data.synthetic import Synthetic
from zoo.papers import wvd
from zoo.papers.wvd.metrics import Geometry
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=wvd.Wvd(frames=8, image=32, width=192, depth=6, dtype="bfloat16", attention="auto"),
    data=Scenes("open", frames=8, size=32, train=20_000),
    optim=AdamW(lr=1e-3, final_lr=1e-5, warmup=500, b2=0.95, weight_decay=0.01, clip=1.0),
    ema=0.999,
    steps=20_000,
    batch=64,
    checkpoint=Checkpoint(every=5_000, keep=2),
    samples=Samples(every=5_000, n=8, options={"task": "stereo"}),
    evals=(Geometry(limit=64),),
    log_every=100,
)
rgb = replace(  # in half of the steps sees the task image as often
    config,
    task=replace(config.task, modalities="rgb", tasks=wvd.Mixture(joint=0.4, image=0.6, stereo=0, camera=0, render=0)),
    steps=10_000,
    samples=Samples(every=5_000, n=8, options={"task": "image"}),
)
s = replace(config, task=replace(config.task, patch=2, width=384, depth=12, head_dim=64))

smoke = replace(
    config,
    task=replace(config.task, frames=2, image=8, width=16, depth=2, head_dim=8),
    data=Synthetic(),
    optim=replace(config.optim, warmup=0),
    steps=4,
    batch=8,
    evals=(),
    samples=Samples(n=2, options={"task": "camera", "nfe": 2}),
)
