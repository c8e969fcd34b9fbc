"""WVD at 256 pixels with two billion parameters, the size that the paper reports, and its number of steps, batch and rate.

    zoo import starflow/sd_vae FILE exports/sd-vae
    zoo train wvd/2b256 data.path=FOLDER
    zoo compile wvd/2b256 --topology v5p:4x4x4

`wvd/rgbd256`, wider and deeper. The paper fine-tunes a model of images or videos; here all begins anew. It reports betas of
(0.99, 0.95), which are kept as a remark: `optim.b1=0.99`.
"""

from dataclasses import replace

from zoo.config import load

_base = load("wvd/rgbd256")
config = replace(
    _base,
    task=replace(_base.task, width=2048, depth=40, head_dim=128),
    steps=1_000_000,
    batch=128,
    workdir=None,
)
smoke = replace(load("wvd/rgbd256:smoke"), workdir=None)
