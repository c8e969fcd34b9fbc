"""A small autoencoder on MNIST, 28x28 -> 7x7x4: the first step of the latent path that runs with nothing downloaded.

Then `zoo prepare latents data/mnist.npz data/mnist-latents size=28 vae=runs/starflow-mnist_vae` and
`zoo train starflow/mnist_latents`. `data.path` is an .npz file with train_images, train_labels, test_images, test_labels.
"""

from dataclasses import replace

from zoo.data.images import Images
from zoo.data.synthetic import Synthetic
from zoo.encoders.vae import AutoEncoder
from zoo.run import Checkpoint, Run
from zoo.train.optim import AdamW

vae = AutoEncoder(image=28, channels=1, latent=4, widths=(16, 32, 64), layers=1, groups=8, scale=None, kl=1e-3)

config = Run(
    task=vae,
    data=Images("data/mnist.npz", size=28, channels=1),
    optim=AdamW(lr=2e-3, final_lr=1e-5, warmup=100, clip=1.0),
    steps=1_500,
    batch=64,
    checkpoint=Checkpoint(every=500, keep=2),
    log_every=50,
)

smoke = replace(
    config,
    task=AutoEncoder(image=8, channels=1, latent=2, widths=(8, 8), layers=1, groups=4, scale=None),
    data=Synthetic(),
    steps=4,
    batch=8,
)
