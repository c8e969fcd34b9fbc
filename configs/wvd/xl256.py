"""WVD at 256 pixels with 446 million parameters: `wvd/rgbd256`, wider and deeper, and the paper's number of steps and batch.

zoo import starflow/sd_vae FILE exports/sd-vae
zoo train wvd/xl256 data.path=FOLDER
zoo compile wvd/xl256 --topology v5p:4x4x4
"""

from dataclasses import replace

from zoo.config import load

_base = load("wvd/rgbd256")
config = replace(
    _base,
    task=replace(_base.task, width=1152, depth=28, head_dim=72),
    steps=1_000_000,
    batch=128,
    workdir=None,
)
smoke = replace(load("wvd/rgbd256:smoke"), workdir=None)
