"""WVD on folders of posed images with depth at 256 pixels, over latents of the published autoencoder: 85 million parameters.

    zoo import starflow/sd_vae FILE exports/sd-vae
    zoo train wvd/rgbd256 data.path=FOLDER

The paper's data are RealEstate10K, MVImgNet, CO3D, ScanNet and Habitat at this size; what of them has no depth got points from
DUSt3R. Width, depth, patches and the noise are not known; these are our choice.
"""

from dataclasses import replace

from zoo.data.posed import Posed
from zoo.data.synthetic import Synthetic
from zoo.dist import Mesh
from zoo.encoders.vae import AutoEncoder, sd
from zoo.papers import wvd
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

SMALL = AutoEncoder(image=8, channels=3, latent=2, widths=(4, 4), layers=1, groups=4, scale=1.0)

config = Run(
    task=wvd.Wvd(
        frames=8,
        image=256,
        patch=2,
        width=768,
        depth=12,
        head_dim=64,
        base=10_000.0,
        vae=sd(),
        dtype="bfloat16",
        remat="full",
        attention="auto",
    ),
    data=Posed("data/rgbd", size=256, frames=8),
    weights={"vae": "exports/sd-vae"},
    optim=AdamW(lr=3e-4, warmup=5_000, schedule="constant", b2=0.95, weight_decay=0.01, clip=1.0),
    ema=0.9999,
    steps=200_000,
    batch=64,
    mesh=Mesh(data=1, fsdp=-1),
    checkpoint=Checkpoint(every=5_000, keep=3),
    samples=Samples(every=25_000, n=8, options={"task": "image", "nfe": 50}),
    log_every=50,
)

smoke = replace(
    config,
    task=replace(config.task, frames=2, image=16, width=16, depth=2, head_dim=8, vae=SMALL),
    data=Synthetic(),
    weights=None,
    optim=replace(config.optim, warmup=0),
    steps=4,
    batch=8,
    mesh=Mesh(),
    samples=Samples(n=2, options={"task": "camera", "nfe": 2}),
)
