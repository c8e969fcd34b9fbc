"""Tuning an autoencoder's decoder on noised latents, so that decoding a sample removes its noise (STARFlow, section 3.4).

The encoder is frozen. Decoder and discriminator learn from one loss: each part stops the gradient of the other side, which
gives exactly the two separate gradients; the run has one optimiser for each.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from zoo.encoders.vae import HOW, AutoEncoder
from zoo.errors import UserError
from zoo.fields import Layers, NonNegative, Size, check_fields
from zoo.nn.layers import Conv
from zoo.task import About, Batch, Decodes, Encodes, Network, Params, abilities

_FEATURES = "train one with `zoo train`, with the task that task.network names"
_BLUR = np.outer([1, 3, 3, 1], [1, 3, 3, 1]).astype(np.float32) / 64  # binomial: halves without aliasing


class Discriminator(nn.Module):
    """Convolutions that judge patches of an image, real or decoded; every stage halves the resolution after a blur."""

    width: int
    stages: int

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """[B, H, W, C] -> logits [B, h, w], positive for real."""
        h = Conv(self.width, name="in")(image)
        for i in range(self.stages):
            h = Conv(self.width * 2 ** min(i, 2), name=f"conv{i}")(nn.leaky_relu(h, 0.2))
            h = _halve(h)
        return Conv(1, name="out")(nn.leaky_relu(h, 0.2))[..., 0]


def _halve(x: jax.Array) -> jax.Array:
    """Every channel blurred, and every second pixel of it."""
    channels = x.shape[-1]
    kernel = jnp.broadcast_to(jnp.asarray(_BLUR)[:, :, None, None], (4, 4, 1, channels))
    return jax.lax.conv_general_dilated(
        x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=channels
    )


@dataclass(frozen=True)
class DecoderTune:
    """A decoder that learns to decode noised latents: squared error, features of a frozen network, and a discriminator."""

    vae: AutoEncoder = AutoEncoder()
    noise: NonNegative = 0.3  # standard deviation of the Gaussian noise on the scaled latents, that of the flow
    square: NonNegative = 1.0  # weight of the squared error
    feature: NonNegative = 1.0  # weight of the squared difference of features
    gan: NonNegative = 0.1  # weight of the discriminator's judgement; the discriminator itself learns whatever it is
    lecam: NonNegative = 0.001  # weight of the discriminator's regulariser (arXiv:2104.03310)
    network: Any = None  # a task with features, its weights under Run.weights["features"]; None: that term is off
    width: Size = 128  # of the discriminator
    stages: Layers = 3  # of the discriminator

    def __post_init__(self) -> None:
        check_fields(self, "task.")
        if self.vae.image < 2**self.stages:
            raise UserError(
                f"task.stages={self.stages} halves images of {self.vae.image} pixels to nothing; choose "
                f"{self.vae.image.bit_length() - 1} or fewer"
            )
        if self.network is not None:
            if "features" not in abilities(self.network):
                raise UserError(
                    f"task.network: {type(self.network).__name__} has no features, it can: "
                    f"{', '.join(abilities(self.network))}; choose a task that has"
                )
            want, got = self.vae.spec(1)["image"].shape, self.network.spec(1)["image"].shape
            if want != got:
                raise UserError(
                    f"task.network takes images of {list(got[1:])}, task.vae makes {list(want[1:])}; choose one that fits"
                )

    @property
    def about(self) -> About:
        """The running means of the regulariser and the measured scale of the latents move by rules."""
        # the encoder lies beside its decoder, and both come from one autoencoder
        networks = {"encoder": Network(self.vae, Decodes, how=HOW, entry="weights={'': 'OUT'}")}
        if self.network:
            networks["features"] = Network(self.network, Encodes, how=_FEATURES)
        return About(networks=networks, buffers=("lecam", *self.vae.about.buffers))

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`image` [B, S, S, C] in [-1, 1]."""
        return self.vae.spec(batch)

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters; encoder and decoder are meant to come from `Run.weights={"": AUTOENCODER}`."""
        one, two, three = jax.random.split(rng, 3)
        params = {**self.vae.init(one), "lecam": {"real": jnp.zeros(()), "decoded": jnp.zeros(())}}
        params["discriminator"] = self._judge().init(
            two, jnp.zeros((1, 2**self.stages, 2**self.stages, self.vae.channels))
        )["params"]
        return {**params, "features": self.network.init(three)} if self.network else params

    def _judge(self) -> Discriminator:
        return Discriminator(self.width, self.stages)

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The decoder's part, with the discriminator fixed, plus the discriminator's, with the decoded image fixed.

        Decoder: squared error + feature distance - gan mean D(decoded). Discriminator: hinge on both, and LeCam: its
        judgement of each kind stays near the running mean of the other. Arrays for `after_step`: `lecam_real`,
        `lecam_decoded` [1].
        """
        image = batch["image"]
        mean, std = jax.lax.stop_gradient(self.vae.encode(params, image))
        draw, noise = jax.random.split(rng)
        latent = mean + std * jax.random.normal(draw, mean.shape) + self.noise * jax.random.normal(noise, mean.shape)
        decoded = self.vae.decode(params, latent)

        def judge(weights: Params, x: jax.Array) -> jax.Array:
            found: Any = self._judge().apply({"params": weights}, x)
            return found

        error = jnp.square(decoded - image)
        fixed = jax.lax.stop_gradient(params["discriminator"])
        fooled = -judge(fixed, decoded).mean() if self.gan else 0.0
        distance = self._feature_distance(params, decoded, image)
        generator = self.square * error.mean() + self.feature * distance + self.gan * fooled

        real = judge(params["discriminator"], image)
        fake = judge(params["discriminator"], jax.lax.stop_gradient(decoded))
        hinge = nn.relu(1 - real).mean() + nn.relu(1 + fake).mean()
        anchor = params["lecam"]
        near = jnp.square(real - anchor["decoded"]).mean() + jnp.square(fake - anchor["real"]).mean()
        metrics = {
            "psnr": (10 * jnp.log10(4 / jnp.maximum(error.mean((1, 2, 3)), 1e-10))).mean(),
            "feature_distance": distance,
            "hinge": hinge,
            "judged_real": real.mean(),
            "judged_decoded": fake.mean(),
            "lecam_real": real.mean()[None],
            "lecam_decoded": fake.mean()[None],
        }
        return generator + hinge + self.lecam * near, metrics

    def _feature_distance(self, params: Params, decoded: jax.Array, image: jax.Array) -> jax.Array:
        """Mean squared difference of features [B, D], those of each image scaled to a mean square of 1."""
        if self.network is None or not self.feature:
            if self.feature:
                warnings.warn(
                    "the feature loss is off: task.network names no network; set it, with weights.features=RUN_OR_EXPORT, "
                    "or task.feature=0 to say that none is wanted",
                    stacklevel=2,
                )
            return jnp.zeros(())

        def unit(x: jax.Array) -> jax.Array:
            found = self.network.features(params["features"], {"image": x})
            return found * jax.lax.rsqrt(jnp.square(found).mean(-1, keepdims=True) + 1e-6)

        return jnp.square(unit(decoded) - jax.lax.stop_gradient(unit(image))).mean()

    def after_step(self, params: Params, metrics: dict[str, jax.Array]) -> Params:
        """The running means follow the discriminator's judgement: m <- 0.999 m + 0.001 mean D."""
        old = params["lecam"]
        new = {kind: 0.999 * old[kind] + 0.001 * metrics[f"lecam_{kind}"][0] for kind in old}
        return {**params, "lecam": new}
