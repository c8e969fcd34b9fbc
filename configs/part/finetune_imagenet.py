"""Fine-tuning on ImageNet, ViT-B/16: the encoder of `part/imagenet`, positions that are new to it, and a linear classifier.

300 epochs of batches of 2,048 with mixup, CutMix, erasing and label smoothing as the official recipe has them; its RandAugment, colour
jitter and repeated augmentation are left out, and nobody has trained this config. `task.image=384 data.size=384` fine-tunes at another
resolution: positions are fresh in any case. A masked autoencoder's encoder wants `task.start=sincos`, the positions it knew.
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
        image=224,
        channels=3,
        patch=16,
        width=768,
        depth=12,
        head_dim=64,
        drop_path=0.1,
        augment="resized",
        least_area=0.08,
        dtype="bfloat16",
        scan=True,
        remat="dots",
        classes=1_000,
        smoothing=0.1,
        mixup=0.8,
        cutmix=1.0,
        erase=0.25,
    ),
    data=Images("tfds:imagenet2012", size=224, flip=True),
    weights={"encoder": "runs/part-imagenet:encoder"},
    optim=AdamW(lr=2e-3, final_lr=1e-6, warmup=3_125, weight_decay=0.05),
    steps=187_500,
    batch=2_048,
    mesh=Mesh(data=1, fsdp=-1),
    checkpoint=Checkpoint(every=2_500, keep=3),
    evals=(Accuracy(every=12_500),),
    log_every=100,
)
scratch = replace(config, weights=None)

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
