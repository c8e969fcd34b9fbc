"""EDM's task: a denoiser of images by class, trained at all noise levels (arXiv:2206.00364, section 5).

B images, S pixels a side, C channels; x = x0 + sigma n. Its samples come from any solver of `zoo.diffusion.solvers`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from zoo.diffusion.levels import LogNormal
from zoo.diffusion.precondition import Precondition, iddpm_levels, over
from zoo.diffusion.tasks import ByClass, dropped, labels
from zoo.dist import unbox
from zoo.errors import UserError, check_divisor
from zoo.fields import Below1, Dtype, Layers, Positive, Side, Size, SizeOr0, Some, check_fields
from zoo.nn.attention import Backend, check_backend
from zoo.nn.transformer import Remat
from zoo.nn.unet import check_levels
from zoo.papers.edm.networks import Ablated, DDPMpp, DiT, Kind
from zoo.papers.edm.official import LICENCE, names
from zoo.task import About, Batch, Name, Params


@dataclass(frozen=True)
class _Pyramid:
    """What the U-Nets share."""

    width: Size = 128
    multiples: Some[Size] = (2, 2, 2)  # of the width, a level each
    blocks: Layers = 4  # of a level on the way down; one more on the way up
    attention: tuple[Side, ...] = ()  # sides of the levels that attend; the coarsest always does, once
    dropout: Below1 = 0.13

    def __post_init__(self) -> None:
        check_fields(self, "task.network.")
        # Group norms take 32 groups, or one for every four channels, of each level and of two beside each other.
        step = 4 if 2 * max(self.multiples) * self.width <= 128 else 32
        if self.width % step:
            best = max(step, round(self.width / step) * step)
            raise UserError(
                f"task.network.width={self.width} must be a multiple of {step}, e.g. task.network.width={best}"
            )

    def check_image(self, side: int) -> None:
        """UserError where it takes no images of this side."""
        check_levels(side, self.multiples, self.attention)


@dataclass(frozen=True)
class UNet(_Pyramid):
    """The U-Net of DDPM++ or NCSN++; with `attention=(16,)` that of CIFAR-10.

    NCSN++ has random frequencies for the noise, twice as many, a wider filter between levels, and brings the image to each level
    (arXiv:2206.00364, table 7).
    """

    kind: Kind = "ddpm++"
    augment: SizeOr0 = 0  # numbers that tell how an image was augmented: 9 in published networks; unused here


@dataclass(frozen=True)
class ADM(_Pyramid):
    """The U-Net of ADM (arXiv:2105.05233); the defaults are ImageNet-64's. All blocks of a level that attends do."""

    width: Size = 192
    multiples: Some[Size] = (1, 2, 3, 4)
    blocks: Layers = 3
    attention: tuple[Side, ...] = (32, 16, 8)
    dropout: Below1 = 0.1
    head_dim: Size = 64  # channels of a head; blocks with fewer do not attend

    def __post_init__(self) -> None:
        super().__post_init__()
        for width in (multiple * self.width for multiple in self.multiples):
            heads = width // self.head_dim
            if heads and width % heads:
                raise UserError(
                    f"task.network.head_dim={self.head_dim} gives a level of {width} channels {heads} heads, which do not divide "
                    f"it; choose a divisor, e.g. task.network.head_dim={math.gcd(width, self.head_dim)}"
                )


@dataclass(frozen=True)
class Transformer:
    """A transformer over patches, modulated by noise and class; the defaults are DiT-S/2's (arXiv:2212.09748, table 1)."""

    width: Size = 384
    depth: Layers = 12
    head_dim: Size = 64
    patch: Side = 2

    def __post_init__(self) -> None:
        check_fields(self, "task.network.")
        check_divisor("network.head_dim", self.head_dim, "network.width", self.width)

    def check_image(self, side: int) -> None:
        """UserError where it takes no images of this side."""
        check_divisor("network.patch", self.patch, "image", side)


@dataclass(frozen=True)
class Edm(ByClass):
    """A denoiser of images, conditioned on the class where there are classes."""

    image: Side = 32
    channels: Size = 3
    classes: SizeOr0 = 0  # 0: unconditional
    network: UNet | ADM | Transformer = UNet()
    precondition: Literal["edm", "vp", "ve", "iddpm"] = "edm"  # others than edm: for published networks of older models
    data: Positive = 0.5  # standard deviation of the data
    noise: LogNormal = LogNormal()  # levels of training steps
    drop: Below1 = 0.1  # probability that a label is dropped in training
    low: Positive = 0.002  # levels that it is asked for in sampling
    high: Positive = 80.0
    dtype: Dtype = "float32"  # of hidden layers; x0 and losses stay float32
    remat: Remat = "none"  # none, dots or full: what the backward pass recomputes
    attention: Backend = "xla"  # xla; cudnn on NVIDIA GPUs in bfloat16; splash on TPUs; auto: whichever the device has

    def __post_init__(self) -> None:
        super().__post_init__()
        check_backend(self.attention, self.dtype)
        self.network.check_image(self.image)
        low, high = self._door.sigmas
        if self.low >= high or self.high <= low:
            raise UserError(
                f"task.precondition={self.precondition!r} has levels from {low:g} to {high:g}, and task.low={self.low:g} to "
                f"task.high={self.high:g} has none of them; leave both as they are"
            )

    @property
    def about(self) -> About:
        """What the network is told besides parameters that learn is held; a U-Net has a published layout."""
        buffers = ("buffers",) if self._fourier or self.precondition == "iddpm" else ()
        if isinstance(self.network, Transformer):
            lacks = {"import_names": "a transformer has none"}
            return About(classes=self.classes, buffers=buffers, lacks=lacks)
        return About(classes=self.classes, buffers=buffers, licence=LICENCE)

    @property
    def plain(self) -> bool:
        """Whether the network is all that its denoiser needs, with EDM's own preconditioning."""
        return self.precondition == "edm" and not self.about.buffers

    @property
    def sigmas(self) -> tuple[float, float]:
        """Lowest and highest level: those of the fields, within what the preconditioning knows."""
        low, high = self._door.sigmas
        return max(self.low, low), min(self.high, high)

    @property
    def _door(self) -> Precondition:
        return Precondition(self.precondition, self.data)

    @property
    def _fourier(self) -> bool:
        return isinstance(self.network, UNet) and self.network.kind == "ncsn++"

    @property
    def _net(self) -> DDPMpp | Ablated | DiT:
        n = self.network
        same: dict[str, Any] = {
            "classes": self.classes,
            "outputs": self._door.outputs,
            "dtype": self.dtype,
            "remat": self.remat,
            "backend": self.attention,
            "parent": None,
        }
        if isinstance(n, Transformer):
            return DiT(n.width, n.depth, n.head_dim, n.patch, **same)
        same |= {"multiples": n.multiples, "blocks": n.blocks, "attention": n.attention, "dropout": n.dropout}
        if isinstance(n, ADM):
            return Ablated(n.width, head_dim=n.head_dim, **same)
        return DDPMpp(n.width, augment=n.augment, kind=n.kind, **same)

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters: the output is nearly zero, so x0 begins as c_skip x.

        `buffers`: the `frequencies` [N] of NCSN++, the `levels` [1001] of iDDPM.
        """
        image, buffers = jnp.zeros((1, self.image, self.image, self.channels)), {}
        if self._fourier:
            buffers["frequencies"] = 16 * jax.random.normal(jax.random.fold_in(rng, 1), (self.network.width,))
        if self.precondition == "iddpm":
            buffers["levels"] = jnp.asarray(iddpm_levels())
        made: Any = self._net.init(rng, image, jnp.zeros(1), **_frequencies(buffers))
        return {"net": made["params"], **({"buffers": buffers} if buffers else {})}

    def raw(
        self, params: Params, z: jax.Array, noise: jax.Array, conditions: Batch | None = None, rngs: Any = None
    ) -> jax.Array:
        """The network's output for inputs z [B, S, S, C] and what it is told of the noise, [] or [B]; conditions as of `denoise`."""
        hot, buffers = self.hot(conditions), params.get("buffers", {})
        found: Any = self._net.apply({"params": params["net"]}, z, noise, hot, **_frequencies(buffers), rngs=rngs)
        return found

    def denoise(self, params: Params, x: jax.Array, sigma: jax.Array, conditions: Batch | None = None) -> jax.Array:
        """E[x0 | x] [B, S, S, C] in float32; a label below 0, or none, is no class."""
        return self._x0(params, x, sigma, conditions)

    def _x0(
        self, params: Params, x: jax.Array, sigma: jax.Array, conditions: Batch | None, rngs: Any = None
    ) -> jax.Array:
        def network(z: jax.Array, noise: jax.Array) -> jax.Array:
            return self.raw(params, z, noise, conditions, rngs)

        return self._door.denoise(network, x, sigma, params.get("buffers", {}).get("levels"))

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean over images and numbers of (sigma^2 + data^2) / (sigma data)^2 |x0 - image|^2.

        In the older preconditionings the weight is 1 / sigma^2; the levels are those of `noise` all the same.

        Metrics: `x0_error`, the root mean square of x0 - image without the weight.
        """
        image, given = batch["image"], labels(self.classes, batch)
        level_rng, noise_rng, drop_rng, net_rng = jax.random.split(rng, 4)
        sigma = self.noise.draw(level_rng, len(image), self.sigmas)
        given = dropped(drop_rng, given, self.drop)
        x = image + over(sigma, image) * jax.random.normal(noise_rng, image.shape)
        square = jnp.square(self._x0(params, x, sigma, given, {"dropout": net_rng}) - image).mean((1, 2, 3))
        loss = (self._door.weight(sigma) * square).mean()
        return loss, {"x0_error": jnp.sqrt(square.mean())}

    def import_names(self) -> list[Name]:
        """The layout of the official PyTorch networks, `EDMPrecond` and its older siblings."""
        if isinstance(self.network, Transformer):
            return []
        params = jax.eval_shape(lambda: unbox(self.init(jax.random.key(0))))
        return names(params, self.image, "adm" if isinstance(self.network, ADM) else self.network.kind)


def _frequencies(buffers: Params) -> Params:
    """What of the buffers is an argument of the network."""
    return {key: value for key, value in buffers.items() if key == "frequencies"}
