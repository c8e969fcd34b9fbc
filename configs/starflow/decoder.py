"""An autoencoder's decoder tuned on noised latents, so that decoding a sample removes its noise: rFID 2.73 in the paper.

    zoo import starflow/sd_vae FILE exports/sd-vae
    zoo train starflow/decoder
    zoo train starflow/imagenet256 weights.vae=runs/starflow-decoder task.denoiser=decoder

200,000 updates of 64 ImageNet images with AdamW, betas 0.9 and 0.999, weight decay 1e-4 and 10,000 steps of warm-up are the paper's
and the code's; the learning rate is not known and a guess. The feature loss is off until `task.network` names a network, with
`weights.features` its weights: the published recipe takes LPIPS and ConvNeXt, which are not part of zoo. `data.path` is a folder of
class folders or what `zoo prepare images` makes of it.
"""

from dataclasses import replace

from zoo.data.images import Images
from zoo.data.synthetic import Synthetic
from zoo.encoders.vae import AutoEncoder, sd
from zoo.papers import starflow
from zoo.run import Checkpoint, Run
from zoo.train.optim import AdamW

adam = AdamW(lr=1e-4, final_lr=1e-6, warmup=10_000, weight_decay=1e-4)

config = Run(
    task=starflow.DecoderTune(vae=sd(), noise=0.3),
    data=Images("data/imagenet", size=256),
    weights={"": "exports/sd-vae"},
    optim={"decoder": adam, "discriminator": adam},
    steps=200_000,
    batch=64,
    checkpoint=Checkpoint(every=2_000, keep=3),
    log_every=50,
)

mnist = replace(
    config,
    task=starflow.DecoderTune(
        vae=AutoEncoder(image=28, channels=1, latent=4, widths=(16, 32, 64), layers=1, groups=8, scale=None, kl=1e-3),
        noise=0.3,
        feature=0.0,
        width=16,
        stages=2,
    ),
    data=Images("data/mnist.npz", size=28, channels=1),
    weights={"": "runs/starflow-mnist_vae"},
    optim={"decoder": replace(adam, lr=1e-3, warmup=50), "discriminator": replace(adam, lr=1e-3, warmup=50)},
    steps=500,
    checkpoint=Checkpoint(every=250),
)

smoke = replace(
    config,
    task=starflow.DecoderTune(
        vae=AutoEncoder(image=8, channels=3, latent=2, widths=(4, 4), layers=1, groups=4, scale=1.0),
        width=4,
        stages=2,
        network=AutoEncoder(image=8, channels=3, latent=2, widths=(4, 4), layers=1, groups=4, scale=1.0),
    ),
    data=Synthetic(),
    weights=None,
    steps=4,
    batch=8,
)
