"""The convolutional autoencoder with a small Gaussian latent that latent flows and diffusions look through.

High-Resolution Image Synthesis with Latent Diffusion Models (arXiv:2112.10752), the f8 family with a KL penalty, in the
layout that published files have. The same class trains a small one of its own, with an error in pixels alone.
B images, H and W pixels, C channels, h = H/f and w = W/f for the factor f, Z channels of the latent.
Order of this file: network, task, published weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from zoo.errors import UserError
from zoo.fields import Dtype, Layers, NonNegative, Offset, Positive, Side, Size, Some, check_fields
from zoo.nn.attention import attend
from zoo.nn.layers import Conv, Dense, GroupNorm
from zoo.task import About, Batch, Name, Params

HOW = (
    "get the published one with `zoo import starflow/sd_vae FILE OUT`, or train a small one with "
    "`zoo train starflow/mnist_vae`"
)  # to come by one

LOW, HIGH = -30.0, 20.0  # what log-variances are clipped to

_QUERIES = 1024  # pixels that attend at a time: those of a latent of 256 pixels' image are done at once

# Keys of the middle's attention in older files, and what they are called now.
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Residual(nn.Module):
    """Twice GroupNorm, SiLU and a convolution, added to the input (through a 1x1 convolution where widths differ)."""

    width: int
    groups: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, inputs] -> [B, H, W, width]."""
        h = nn.silu(GroupNorm(self.groups, name="norm1")(x))
        h = Conv(self.width, dtype=self.dtype, name="conv1")(h)
        h = nn.silu(GroupNorm(self.groups, name="norm2")(h))
        h = Conv(self.width, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.width:
            x = Conv(self.width, size=1, dtype=self.dtype, name="shortcut")(x)
        return x + h


class PixelAttention(nn.Module):
    """Attention of every pixel to every pixel with one head, added to the input."""

    groups: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, D] -> [B, H, W, D]."""
        batch, height, wide, width = x.shape
        h = GroupNorm(self.groups, name="norm")(x).reshape(batch, height * wide, width)
        # Whole on every device, as the convolutions around them are.
        q, k, v = (Dense(width, (None, None), dtype=self.dtype, name=n)(h)[:, :, None] for n in ("q", "k", "v"))
        h = _attend(q, k, v)[:, :, 0]
        return x + Dense(width, (None, None), dtype=self.dtype, name="out")(h).reshape(x.shape)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`attend` of all pixels to all, [B, T, 1, K]; of large images some queries at a time, whose logits fit into memory."""
    tokens = q.shape[1]
    if tokens <= _QUERIES or tokens % _QUERIES:
        return attend(q, k, v, causal=False)
    parts = q.reshape(q.shape[0], -1, _QUERIES, *q.shape[2:]).swapaxes(0, 1)
    found = jax.lax.map(jax.checkpoint(lambda part: attend(part, k, v, causal=False)), parts)
    return found.swapaxes(0, 1).reshape(q.shape)


class Middle(nn.Module):
    """Residual block, attention, residual block."""

    groups: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, D] -> [B, H, W, D]."""
        width = x.shape[-1]
        x = Residual(width, self.groups, self.dtype, name="residual0")(x)
        x = PixelAttention(self.groups, self.dtype, name="attention")(x)
        return Residual(width, self.groups, self.dtype, name="residual1")(x)


class Stage(nn.Module):
    """Residual blocks at one resolution, then the way to the next one, half or twice as fine."""

    width: int
    layers: int
    groups: int
    dtype: str
    after: Literal["half", "twice", "same"]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, inputs] -> [B, H', W', width]."""
        for i in range(self.layers):
            x = Residual(self.width, self.groups, self.dtype, name=f"residual{i}")(x)
        if self.after == "half":  # one row and one column of zeros, at the bottom and at the right alone
            x = Conv(self.width, stride=2, padding=((0, 1), (0, 1)), dtype=self.dtype, name="resize")(x)
        elif self.after == "twice":
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            x = Conv(self.width, dtype=self.dtype, name="resize")(x)
        return x


class Encoder(nn.Module):
    """Image -> mean and log-variance of its latent."""

    latent: int
    widths: tuple[int, ...]
    layers: int
    groups: int
    dtype: str

    @nn.compact
    def __call__(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, H, W, C] -> moments [B, h, w, 2 Z] float32, and the last hidden layer [B, h, w, D]."""
        h = Conv(self.widths[0], dtype=self.dtype, name="in")(image)
        for i, width in enumerate(self.widths):
            after: Any = "same" if i == len(self.widths) - 1 else "half"
            h = Stage(width, self.layers, self.groups, self.dtype, after, name=f"stage{i}")(h)
        h = Middle(self.groups, self.dtype, name="middle")(h)
        h = nn.silu(GroupNorm(self.groups, name="norm")(h))
        moments = Conv(2 * self.latent, name="out")(h)  # float32: exp() of it compounds
        return Conv(2 * self.latent, size=1, name="quant")(moments), h


class Decoder(nn.Module):
    """Latent -> image."""

    channels: int
    widths: tuple[int, ...]
    layers: int
    groups: int
    dtype: str

    @nn.compact
    def __call__(self, latent: jax.Array) -> jax.Array:
        """[B, h, w, Z] -> [B, H, W, C] float32. Stages count from the coarsest."""
        h = Conv(latent.shape[-1], size=1, name="quant")(latent)
        h = Conv(self.widths[-1], dtype=self.dtype, name="in")(h)
        h = Middle(self.groups, self.dtype, name="middle")(h)
        for i, width in enumerate(reversed(self.widths)):
            after: Any = "same" if i == len(self.widths) - 1 else "twice"
            h = Stage(width, self.layers + 1, self.groups, self.dtype, after, name=f"stage{i}")(h)
        h = nn.silu(GroupNorm(self.groups, name="norm")(h))
        return Conv(self.channels, name="out")(h)  # float32: bfloat16 has fewer levels than a pixel


def _encoder(task: AutoEncoder) -> Encoder:
    return Encoder(task.latent, task.widths, task.layers, task.groups, task.dtype)


def _decoder(task: AutoEncoder) -> Decoder:
    return Decoder(task.channels, task.widths, task.layers, task.groups, task.dtype)


def _apply(net: nn.Module, params: Params, x: jax.Array) -> Any:
    return net.apply({"params": params}, x)


@dataclass(frozen=True)
class AutoEncoder:
    """A convolutional autoencoder with a Gaussian latent: trained as a task, or read from a published file and held."""

    image: Side = 256  # pixels a side in training; `encode` and `decode` take any size that `factor` divides
    channels: Size = 3
    latent: Size = 4  # channels of the latent
    widths: Some[Size] = (128, 256, 512, 512)  # of the stages, each half as fine as the one before
    layers: Layers = 2  # residual blocks per stage of the encoder; the decoder has one more
    groups: Size = 32  # of the group norms
    scale: Positive | None = 0.18215  # factor on latents; None: one over their root mean square, measured in training
    mean: tuple[Offset, ...] = ()  # of the latents, by channel, taken away before the scale; (): nothing
    std: tuple[Positive, ...] = ()  # likewise, divided by; (): nothing
    unit: bool = False  # its network sees pixels from 0 to 1, as those of EDM2 do, and not from -1 to 1
    kl: NonNegative = 1e-6  # weight of the KL divergence to N(0, I)
    dtype: Dtype = "float32"  # of hidden layers; latents, images and losses stay float32

    def __post_init__(self) -> None:
        check_fields(self, "task.")
        if (self.mean or self.std) and self.scale is None:
            raise UserError(
                "task.scale=None is measured on latents as they are, and task.mean and task.std change them; give a scale"
            )
        for name, given in (("mean", self.mean), ("std", self.std)):
            if given and len(given) != self.latent:
                raise UserError(
                    f"task.{name}={given} lists {len(given)} channels, and task.latent={self.latent}; give one number for each"
                )
        if odd := [width for width in self.widths if width % self.groups]:
            best = max(g for g in range(1, self.groups + 1) if all(width % g == 0 for width in self.widths))
            raise UserError(
                f"task.groups={self.groups} does not divide the width {odd[0]} of task.widths={self.widths}; "
                f"choose a divisor of all, e.g. task.groups={best}"
            )
        if self.image % self.factor:
            best = max(1, round(self.image / self.factor)) * self.factor
            raise UserError(
                f"task.image={self.image} is no multiple of {self.factor}, by which {len(self.widths)} stages (task.widths) "
                f"shrink it; choose one, e.g. task.image={best}"
            )

    @property
    def about(self) -> About:
        """The mean square of the latents is measured where no scale is given."""
        return About(buffers=("latents",) if self.scale is None else ())

    @property
    def factor(self) -> int:
        """Pixels of an image per pixel of its latent, along one side."""
        return 2 ** (len(self.widths) - 1)

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`image` [B, S, S, C] in [-1, 1]."""
        return {"image": jax.ShapeDtypeStruct((batch, self.image, self.image, self.channels), jnp.float32)}

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters."""
        one, two = jax.random.split(rng)
        image = jnp.zeros((1, self.factor, self.factor, self.channels))  # no parameter depends on the size
        params: Params = {
            "encoder": _encoder(self).init(one, image)["params"],
            "decoder": _decoder(self).init(two, jnp.zeros((1, 1, 1, self.latent)))["params"],
        }
        return {**params, "latents": {"square": jnp.ones(())}} if self.scale is None else params

    def _scale(self, params: Params) -> Any:
        return jax.lax.rsqrt(params["latents"]["square"]) if self.scale is None else self.scale

    def _encode(self, params: Params, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Moments [B, h, w, 2 Z] as the network gives them, and the last hidden layer [B, h, w, D]."""
        height, width, channels = image.shape[1:]
        if height % self.factor or width % self.factor or channels != self.channels:
            raise UserError(
                f"images of {height}x{width} pixels and {channels} channels do not fit this autoencoder; "
                f"give sides that {self.factor} divides, and {self.channels} channels"
            )
        return _apply(_encoder(self), params["encoder"], (image + 1) / 2 if self.unit else image)

    def _decode(self, params: Params, latent: jax.Array) -> jax.Array:
        """The image of latents [B, h, w, Z] without a scale."""
        if latent.shape[-1] != self.latent:
            raise UserError(
                f"latents of {latent.shape[-1]} channels do not fit this autoencoder, whose have {self.latent}"
            )
        image = _apply(_decoder(self), params["decoder"], latent)
        return 2 * image - 1 if self.unit else image

    def moments(self, params: Params, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance of the latent without its scale.

        Args:
            image: [B, H, W, C] in [-1, 1].

        Returns:
            mean and logvar, [B, h, w, Z] each, logvar clipped to [-30, 20].

        Raises:
            UserError: `factor` does not divide H or W, or C is not `channels`.
        """
        mean, logvar = jnp.split(self._encode(params, image)[0], 2, axis=-1)
        return mean, jnp.clip(logvar, LOW, HIGH)

    def encode(self, params: Params, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, H, W, C] -> mean and standard deviation of the scaled latent [B, h, w, Z] each; float32."""
        mean, logvar = self.moments(params, image)
        return self.scaled(params, mean, jnp.exp(0.5 * logvar))

    def scaled(self, params: Params, mean: jax.Array, std: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and standard deviation [B, h, w, Z] of latents as the network gives them, brought to those of a set."""
        scale = self._scale(params) / jnp.asarray(self.std or 1.0)
        return (mean - jnp.asarray(self.mean or 0.0)) * scale, std * scale

    def decode(self, params: Params, latent: jax.Array) -> jax.Array:
        """Latents [B, h, w, Z], scaled as `encode` gives them -> image [B, H, W, C] float32, not clipped."""
        scale = self._scale(params) / jnp.asarray(self.std or 1.0)
        return self._decode(params, latent.astype(jnp.float32) / scale + jnp.asarray(self.mean or 0.0))

    def reconstruct(self, params: Params, image: jax.Array) -> jax.Array:
        """The image [B, H, W, C] of the mean latent of an image."""
        return self._decode(params, self.moments(params, image)[0])

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """mean |x - y| + mean (x - y)^2 + kl KL / (H W C), for the image y of a latent drawn from q(. | x).

        KL is that of an image's whole latent to N(0, I) in nats. Divided by H W C, all three are per number of the image, so
        that their balance is the same at any size.

        Metrics: `l1`; `psnr` in decibels, mean over images; `kl` (as above, without its weight); `latent_std`, the root
        mean square of the drawn latents as `encode` gives them: about 1 where the scale fits, of a `mean` and `std` about
        the scale. `latent_square` [Z], their mean square without a scale, is for `after_step`.
        """
        image = batch["image"]
        mean, logvar = self.moments(params, image)
        latent = mean + jnp.exp(0.5 * logvar) * jax.random.normal(rng, mean.shape)
        error = self._decode(params, latent) - image
        l1, square = jnp.abs(error).mean(), jnp.square(error).mean((1, 2, 3))
        numbers = image[0].size
        kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).sum((1, 2, 3)).mean() / numbers
        spread = jnp.square(latent).mean((0, 1, 2))
        metrics = {
            "l1": l1,
            "psnr": (10 * jnp.log10(4 / jnp.maximum(square, 1e-10))).mean(),
            "kl": kl,
            "latent_std": jnp.sqrt(jnp.square(self.scaled(params, latent, latent)[0]).mean()),
            "latent_square": spread,
        }
        return l1 + square.mean() + self.kl * kl, metrics

    def after_step(self, params: Params, metrics: dict[str, jax.Array]) -> Params:
        """Where no scale is given, the mean square of the latents follows the batch: m <- 0.99 m + 0.01 mean z^2."""
        if self.scale is not None:
            return params
        square = 0.99 * params["latents"]["square"] + 0.01 * metrics["latent_square"].mean()
        return {**params, "latents": {"square": square}}

    def features(self, params: Params, batch: Batch) -> jax.Array:
        """Mean over pixels of the encoder's last hidden layer, [B, widths[-1]] float32."""
        return self._encode(params, batch["image"])[1].astype(jnp.float32).mean((1, 2))

    def import_names(self) -> list[Name]:
        """The layout of `diffusers`' AutoencoderKL (convolutions [out, in, h, w], linear maps [out, in]).

        A measured scale is no part of it: `latents.square` is a name of our own.
        """
        names = [*_conv("quant_conv", "encoder/quant"), *_conv("post_quant_conv", "decoder/quant")]
        for side, stages, widths, layers, resize in (
            ("encoder", "down_blocks", self.widths, self.layers, "downsamplers"),
            ("decoder", "up_blocks", self.widths[::-1], self.layers + 1, "upsamplers"),
        ):
            names += [*_conv(f"{side}.conv_in", f"{side}/in"), *_conv(f"{side}.conv_out", f"{side}/out")]
            names += _norm(f"{side}.conv_norm_out", f"{side}/norm")
            middle, ours = f"{side}.mid_block", f"{side}/middle"
            for j in range(2):
                names += _residual(f"{middle}.resnets.{j}", f"{ours}/residual{j}", False)
            names += _norm(f"{middle}.attentions.0.group_norm", f"{ours}/attention/norm")
            for theirs, own in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "out")):
                source, target = f"{middle}.attentions.0.{theirs}", f"{ours}/attention/{own}"
                names += [
                    Name(f"{source}.weight", f"{target}/kernel", "o i -> i o"),
                    Name(f"{source}.bias", f"{target}/bias"),
                ]
            before = widths[0]
            for i, width in enumerate(widths):
                stage, ours = f"{side}.{stages}.{i}", f"{side}/stage{i}"
                for j in range(layers):
                    names += _residual(f"{stage}.resnets.{j}", f"{ours}/residual{j}", before != width)
                    before = width
                if i < len(widths) - 1:
                    names += _conv(f"{stage}.{resize}.0.conv", f"{ours}/resize")
        if self.scale is None:
            names.append(Name("latents.square", "latents/square"))
        return names

    def import_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A published state dict with today's keys for the attention, its 1x1 convolutions as linear maps.

        Where the scale is measured and the file has no measure, it starts at 1, as in a fresh model.
        """
        new: dict[str, Any] = {}
        for key, array in state.items():
            found = re.fullmatch(rf"(.*\.attentions\.0\.)({'|'.join(OLD)})(\.\w+)", key)
            name = f"{found[1]}{OLD[found[2]]}{found[3]}" if found else key
            if name != key and name in state:
                name = key  # a file with both has one too many, which the import then says
            if re.search(r"\.attentions\.0\.to_\w+(\.0)?\.weight$", name) and tuple(array.shape[2:]) == (1, 1):
                array = array[:, :, 0, 0]
            new[name] = array
        if self.scale is None:
            new.setdefault("latents.square", np.ones((), np.float32))
        return new


def _conv(theirs: str, ours: str) -> list[Name]:
    return [
        Name(f"{theirs}.weight", f"{ours}/kernel", "o i h w -> h w i o"),
        Name(f"{theirs}.bias", f"{ours}/bias"),
    ]


def _norm(theirs: str, ours: str) -> list[Name]:
    return [Name(f"{theirs}.weight", f"{ours}/scale"), Name(f"{theirs}.bias", f"{ours}/bias")]


def _residual(theirs: str, ours: str, shortcut: bool) -> list[Name]:
    names = []
    for i in (1, 2):
        names += [*_norm(f"{theirs}.norm{i}", f"{ours}/norm{i}"), *_conv(f"{theirs}.conv{i}", f"{ours}/conv{i}")]
    return names + (_conv(f"{theirs}.conv_shortcut", f"{ours}/shortcut") if shortcut else [])


def sd(**fields: Any) -> AutoEncoder:
    """The published f8 family, as the defaults are: 8 pixels a side to one, 4 channels, 84 million parameters."""
    return AutoEncoder(**fields)
