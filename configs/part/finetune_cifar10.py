"""Fine-tuning on CIFAR-10, ViT-S/4: the encoder of `part/cifar10`, positions that are new to it, and a linear classifier.

400 epochs with mixup, CutMix, erasing and label smoothing as the official recipe has them; its RandAugment, colour jitter and repeated
augmentation are left out. `weights.encoder=RUN:encoder` takes another run's encoder. `:small` is for two CPU cores and takes that of
`part/cifar10:small`; `:small_absolute` and `:small_mae` take those of the other pretexts, the latter with the positions it knew
(`task.start=sincos`); `:scratch` and `:small_scratch` take none.
"""

from dataclasses import replace

from zoo.data.images import Images
from zoo.data.synthetic import Synthetic
from zoo.dist import Mesh
from zoo.metrics.probe import Accuracy
from zoo.papers import part
from zoo.run import Checkpoint, Run
from zoo.train.optim import AdamW

config = Run(
    task=part.PartClassifier(
        image=32,
        channels=3,
        patch=4,
        width=384,
        depth=12,
        head_dim=64,
        drop_path=0.1,
        augment="pad",
        dtype="bfloat16",
        scan=True,
        classes=10,
        smoothing=0.1,
        mixup=0.8,
        cutmix=1.0,
        erase=0.25,
    ),
    data=Images("data/cifar10", size=32, flip=True),
    weights={"encoder": "runs/part-cifar10:encoder"},
    optim=AdamW(lr=2.5e-4, final_lr=1e-6, warmup=975, weight_decay=0.05),
    steps=78_000,
    batch=256,
    mesh=Mesh(data=-1, fsdp=1),
    checkpoint=Checkpoint(every=1_000, keep=2),
    evals=(Accuracy(every=5_000),),
    log_every=50,
)
scratch = replace(config, weights=None)

# What two CPU cores do in some minutes: too short a time for what keeps long runs from overfitting.
small = replace(
    config,
    task=part.PartClassifier(
        image=32, channels=3, patch=4, width=64, depth=4, head_dim=32, augment="pad", classes=10, smoothing=0.1
    ),
    weights={"encoder": "runs/part-cifar10-small:encoder"},
    optim=replace(config.optim, lr=1e-3, warmup=200),
    steps=1_000,
    batch=64,
    mesh=Mesh(),
    evals=(Accuracy(),),
)
small_absolute = replace(small, weights={"encoder": "runs/part-cifar10-small_absolute:encoder"})
small_mae = replace(
    small,
    task=replace(small.task, start="sincos"),
    weights={"encoder": "runs/part-cifar10-small_mae:encoder"},
)
small_scratch = replace(small, weights=None)

smoke = replace(
    config,
    task=part.PartClassifier(image=8, channels=1, patch=2, width=8, depth=1, head_dim=8, classes=2),
    data=Synthetic(),
    weights=None,
    steps=4,
    batch=8,
    mesh=Mesh(),
    evals=(),
)
