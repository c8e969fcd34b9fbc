"""WVD in one made room, whose clips differ by the camera's path alone: 4 frames of 16x16 pixels, minutes on two CPU cores.

    zoo train wvd/one_world
    zoo sample runs/wvd-one_world task=stereo from=test n=8
    zoo eval runs/wvd-one_world geometry

Beside it, of the same size and steps: `:rgb`, of images alone, which cannot be told a path.
"""

from dataclasses import replace

from zoo.data.scenes import Scenes
from zoo.data.synthetic import Synthetic
from zoo.papers import wvd
from zoo.papers.wvd.metrics import Geometry
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    task=wvd.Wvd(
        frames=4,
        image=16,
        width=128,
        depth=4,
        tasks=wvd.Mixture(joint=1, image=2, stereo=3, camera=0, render=2),
        scan=False,
    ),
    data=Scenes("one_world", frames=4, size=16, fov=90.0),
    optim=AdamW(lr=2e-3, final_lr=2e-5, warmup=50, b2=0.95, weight_decay=0.01, clip=1.0),
    ema=0.995,
    steps=1_200,
    batch=16,
    checkpoint=Checkpoint(every=400, keep=2),
    samples=Samples(n=8, options={"task": "stereo"}),
    evals=(Geometry(),),
    log_every=50,
)
rgb = replace(  # sees the task image as often; where the other is told of points it is told nothing
    config,
    task=replace(config.task, modalities="rgb", tasks=wvd.Mixture(joint=6, image=2, stereo=0, camera=0, render=0)),
    samples=Samples(n=8, options={"task": "image"}),
)

smoke = replace(
    config,
    task=replace(config.task, frames=2, image=8, width=16, depth=2, head_dim=8),
    data=Synthetic(),
    steps=4,
    batch=8,
    evals=(),
    samples=Samples(n=2, options={"task": "stereo", "nfe": 2}),
)
