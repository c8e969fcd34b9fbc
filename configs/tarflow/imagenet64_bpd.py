"""TarFlow as a density model of ImageNet 64x64: unconditional, uniform dequantisation, float32, 100 epochs.

The paper's figure is 2.99 bits per dimension (second-hand; see README.md here). There are two releases of down-sampled
ImageNet with different bits, and the paper does not say which it used. This config measures on the labelled one with
box-filtered images (tfds `imagenet_resized/64x64`); `data.path=tfds:downsampled_imagenet/64x64` takes the older one.
"""

from dataclasses import replace

from zoo.config import load
from zoo.metrics.likelihood import Bits

_base, _smoke = load("tarflow/imagenet64"), load("tarflow/imagenet64:smoke")
config = replace(
    _base,
    task=replace(_base.task, noise_type="uniform", dtype="float32"),
    steps=500_400,
    evals=(Bits(every=10_000),),
    workdir=None,
)
smoke = replace(_smoke, task=replace(_smoke.task, noise_type="uniform", dtype="float32"), workdir=None)
