"""EDM2's task: a denoiser of images or latents by class that also learns how uncertain it is (arXiv:2312.02696).

B images, S pixels a side, C channels; x = x0 + sigma n. Samples come from any solver of `zoo.diffusion.solvers`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from zoo.diffusion.guidance import Guidance
from zoo.diffusion.levels import LogNormal
from zoo.diffusion.precondition import Precondition, over
from zoo.diffusion.sampling import clipped
from zoo.diffusion.tasks import ByClass
from zoo.encoders.vae import AutoEncoder, sd
from zoo.errors import UserError
from zoo.fields import Below1, Dtype, Layers, Positive, Share, Side, Size, SizeOr0, Some, check_fields
from zoo.nn.attention import Backend, check_backend
from zoo.nn.transformer import Remat
from zoo.nn.unet import check_levels
from zoo.papers.edm2.networks import Linear, MagnitudeUNet, fourier, unit
from zoo.task import About, Batch, Decodes, Name, Network, Params

_HOW = "import the published one with `zoo import edm2/sd_vae FILE OUT`"  # whose latents have units of their own
_LICENCE = (
    "the published EDM2 weights are under CC BY-NC-SA 4.0, which also binds converted files: no commercial use, name the "
    "authors, share alike"
)


@dataclass(frozen=True)
class UNet:
    """The U-Net that preserves magnitudes; the defaults are those of all published sizes, with the width of S."""

    width: Size = 192
    multiples: Some[Size] = (1, 2, 3, 4)  # of the width, a level each
    blocks: Layers = 3  # of a level on the way down; one more on the way up
    attention: tuple[Side, ...] = (16, 8)  # sides of the levels that attend; the coarsest always does, once
    head_dim: Size = 64
    dropout: Below1 = 0.0
    noise_multiple: Size | None = None  # of the width, features of the noise; None: as wide as the finest level
    embedding_multiple: Size | None = None  # of the width, numbers of the condition; None: as wide as the widest level
    residual_balance: Share = 0.3  # share of the new in a sum: of a block,
    attention_balance: Share = 0.3  # of attention,
    skip_balance: Share = 0.5  # of what skips to the way up,
    label_balance: Share = 0.5  # and of the class
    clip: Positive = 256.0  # bound on activations
    taps: Some[Positive] = (1.0, 1.0)  # filter of half and twice the side
    uncertainty: Size = 128  # features of the noise from which the log-variance is learned

    def __post_init__(self) -> None:
        check_fields(self, "task.network.")
        if len(self.taps) % 2:
            raise UserError(f"task.network.taps={self.taps} must be an even number of them, e.g. task.network.taps=1,1")

    @property
    def features(self) -> int:
        """Fourier features of the noise."""
        return self.width * (self.noise_multiple or self.multiples[0])

    @property
    def embedding(self) -> int:
        """Numbers of the condition."""
        return self.width * (self.embedding_multiple or max(self.multiples))

    def check_image(self, side: int) -> None:
        """UserError where it takes no images of this side, or its heads do not fill a level that attends."""
        check_levels(side, self.multiples, self.attention)
        sides = [side >> i for i in range(len(self.multiples))]
        for one, multiple in zip(sides, self.multiples):
            wide = multiple * self.width
            if (one in self.attention or one == sides[-1]) and wide % self.head_dim:
                best = max(d for d in range(1, min(wide, self.head_dim) + 1) if wide % d == 0)
                raise UserError(
                    f"task.network.head_dim={self.head_dim} does not divide {wide}, the width of the level of side {one}, "
                    f"which attends; choose a divisor, e.g. task.network.head_dim={best}"
                )


@dataclass(frozen=True)
class Edm2(ByClass):
    """A denoiser, conditioned on the class where there are classes, with a learned log-variance of its error."""

    image: Side = 64  # pixels a side, or numbers of a latent
    channels: Size = 3
    classes: SizeOr0 = 0  # 0: unconditional
    inputs: Literal["images", "latents"] = "images"  # what a batch holds and the network models
    network: UNet = UNet()
    data: Positive = 0.5  # standard deviation of the data
    noise: LogNormal = LogNormal(-0.8, 1.6)  # levels of training steps
    low: Positive = 0.002  # levels that it is asked for in sampling
    high: Positive = 80.0
    vae: AutoEncoder | None = None  # held; decodes latents
    dtype: Dtype = "float32"  # of hidden layers; norms, embeddings, the log-variance, x0 and losses stay float32
    remat: Remat = "none"  # none, dots or full: what the backward pass recomputes
    attention: Backend = "xla"  # xla; cudnn on NVIDIA GPUs in bfloat16; splash on TPUs; auto: whichever the device has

    def __post_init__(self) -> None:
        super().__post_init__()
        check_backend(self.attention, self.dtype)
        self.network.check_image(self.image)
        if self.vae is not None and self.inputs == "images":
            raise UserError(
                "task.inputs='images' models the pixels themselves; leave task.vae out, or inputs='latents'"
            )
        if self.vae is not None and self.vae.latent != self.channels:
            raise UserError(
                f"task.channels={self.channels}, but the latents of task.vae have {self.vae.latent}; set "
                f"task.channels={self.vae.latent}"
            )

    @property
    def about(self) -> About:
        """Fourier frequencies and phases are drawn once and stay."""
        return About(
            classes=self.classes,
            networks={"vae": Network(self.vae, Decodes, how=_HOW)} if self.vae else {},
            buffers=("fourier",),
            licence=_LICENCE,
        )

    @property
    def _net(self) -> MagnitudeUNet:
        names = {field.name for field in dataclasses.fields(MagnitudeUNet)}
        own: dict[str, Any] = {k: v for k, v in dataclasses.asdict(self.network).items() if k in names}
        own |= {"classes": self.classes, "embedding": self.network.embedding}
        return MagnitudeUNet(**own, dtype=self.dtype, remat=self.remat, backend=self.attention, parent=None)

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`image` [B, S, S, C] in [-1, 1], or `latent` and `latent_std` likewise; `label` [B] where there are classes."""
        spec = super().spec(batch)
        if self.inputs == "images":
            return spec
        image = spec.pop("image")
        return {"latent": image, "latent_std": image, **spec}

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters: kernels are normal, gains zero, so x0 begins as c_skip x (section 2.3 of the paper)."""
        net, head, noise, uncertain, vae = jax.random.split(rng, 5)
        image = jnp.zeros((1, self.image, self.image, self.channels))
        made: Any = self._net.init(net, image, jnp.zeros((1, self.network.features)))
        log_variance: Any = Linear(1, whole=True, parent=None).init(head, jnp.zeros((1, self.network.uncertainty)))

        def waves(key: jax.Array, count: int) -> dict[str, jax.Array]:
            one, two = jax.random.split(key)
            return {
                "frequencies": 2 * jnp.pi * jax.random.normal(one, (count,)),
                "phases": 2 * jnp.pi * jax.random.uniform(two, (count,)),
            }

        params: Params = {
            "net": made["params"],
            "uncertainty": log_variance["params"],
            "fourier": {
                "noise": waves(noise, self.network.features),
                "uncertainty": waves(uncertain, self.network.uncertainty),
            },
        }
        return {**params, "vae": self.vae.init(vae)} if self.vae else params

    def before_step(self, trained: Params) -> Params:
        """Kernels of unit magnitude, which the step then moves: "forced weight normalisation" (equation 66).

        Their length, which changes nothing but how fast they turn, cannot grow.
        """
        return jax.tree.map(lambda x: unit(x) if x.ndim > 1 else x, trained)

    def raw(
        self, params: Params, z: jax.Array, noise: jax.Array, hot: jax.Array | None = None, rngs: Any = None
    ) -> jax.Array:
        """The network before preconditioning, [B, S, S, C] float32.

        Args:
            noise: log sigma / 4, [B] or [].
            hot: [B, classes], one-hot or shares of classes; None: no class.
            rngs: a key `dropout`, in training.
        """
        waves = params["fourier"]["noise"]
        features = fourier(jnp.atleast_1d(noise), **waves)
        found: Any = self._net.apply({"params": params["net"]}, z, features, hot, rngs=rngs)
        return found

    def log_variance(self, params: Params, sigma: jax.Array) -> jax.Array:
        """u, the learned logarithm of the weighted squared error at each level (equations 14 to 16); sigma's shape."""
        noise = Precondition("edm", self.data).coefficients(sigma)[3]
        features = fourier(noise, **params["fourier"]["uncertainty"])
        found: Any = Linear(1, whole=True, parent=None).apply({"params": params["uncertainty"]}, features)
        return found[..., 0]

    def denoise(self, params: Params, x: jax.Array, sigma: jax.Array, conditions: Batch | None = None) -> jax.Array:
        """E[x0 | x] [B, S, S, C] in float32. A label below 0, or none, is no class, which training has never shown."""
        network = functools.partial(self.raw, params, hot=self.hot(conditions))
        return Precondition("edm", self.data).denoise(network, x, sigma)

    def losses(
        self,
        params: Params,
        image: jax.Array,
        sigma: jax.Array,
        noise: jax.Array,
        hot: jax.Array | None = None,
        rngs: Any = None,
    ) -> tuple[jax.Array, jax.Array]:
        """w exp(-u) |x0 - image|^2 + u and |x0 - image|^2 for each number [B, S, S, C], w = (sigma^2 + data^2) / (sigma data)^2.

        Args:
            sigma: [B].
            noise: standard normal [B, S, S, C].
            hot: as of `raw`.
            rngs: as of `raw`.
        """
        precondition = Precondition("edm", self.data)
        network = functools.partial(self.raw, params, hot=hot, rngs=rngs)
        square = jnp.square(precondition.denoise(network, image + over(sigma, image) * noise, sigma) - image)
        u = self.log_variance(params, sigma)
        return over(precondition.weight(sigma) * jnp.exp(-u), image) * square + over(u, image), square

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean over images and numbers of `losses` (equations 14 to 16).

        Metrics: `x0_error`, the root mean square of x0 - image.
        """
        draw_rng, level_rng, noise_rng, net_rng = jax.random.split(rng, 4)
        image = batch["image" if self.inputs == "images" else "latent"]
        if self.inputs == "latents":
            image = image + batch["latent_std"] * jax.random.normal(draw_rng, image.shape)
        sigma = self.noise.draw(level_rng, len(image), self.sigmas)
        noise = jax.random.normal(noise_rng, image.shape)
        loss, square = self.losses(params, image, sigma, noise, self.hot(batch), {"dropout": net_rng})
        return loss.mean(), {"x0_error": jnp.sqrt(square.mean())}

    def sample(
        self, params: Params, rng: jax.Array, n: int, conditions: Batch | None = None, options: Any = None
    ) -> dict[str, jax.Array]:
        """As of every denoiser by class. UserError for guidance, which has nothing to compare with."""
        if options and Guidance.of(options.guidance).weight:
            raise UserError(
                "guidance compares a class with none, and this network was trained with its class always; leave it out, or "
                "guide it by another network (autoguidance/imagenet512)"
            )
        return super().sample(params, rng, n, conditions, options)

    def finished(self, params: Params, x: jax.Array, given: Batch) -> dict[str, jax.Array]:
        """`image` [n, S, S, C] clipped to [-1, 1], of a model of latents `latent`, and where there is an autoencoder its `image`."""
        if self.inputs == "images":
            return super().finished(params, x, given)
        if self.vae is None:
            return {"latent": x, **given}
        return {"latent": x, "image": clipped(self.vae.decode(params["vae"], x)), **given}

    def import_names(self) -> list[Name]:
        """The state dict of the official wrapper (convolutions [out, in, h, w], linear maps [out, in]).

        Of each head it has queries, keys and values number by number, we have all queries first.
        """
        shapes: Any = jax.eval_shape(lambda: self.init(jax.random.key(0)))
        names = []
        for path, leaf in jax.tree_util.tree_leaves_with_path({k: v for k, v in shapes.items() if k != "vae"}):
            target = "/".join(part.key for part in path if isinstance(part, jax.tree_util.DictKey))
            source, layout, sizes = target, {4: "o i h w -> h w i o", 2: "o i -> i o"}.get(leaf.ndim), {}
            for ours, theirs in _NAMES.items():
                source = re.sub(ours, theirs, source)
            if target.endswith(("skip/kernel", "proj/kernel")):
                layout = "o i 1 1 -> i o"
            if target.endswith("qkv/kernel"):
                layout, sizes = "(a c j) i 1 1 -> i (j a c)", {"c": self.network.head_dim, "j": 3}
            names.append(Name(source, target, layout, sizes))
        return names


_NAMES = {  # of parts of our paths, one after the other
    "fourier/noise": "unet/emb_fourier",
    "fourier/uncertainty": "logvar_fourier",
    "frequencies": "freqs",
    "^uncertainty": "logvar_linear",
    "net/gain": "unet/out_gain",
    "net/(noise|label)/": r"unet/emb_\1/",
    "net/out/": "unet/out_conv/",
    r"net/(enc|dec)_(\d+)_": r"unet/\1/\2x\2_",
    "/conv([01])/": r"/conv_res\1/",
    "/affine/": "/emb_linear/",
    "/skip/": "/conv_skip/",
    "/(qkv|proj)/": r"/attn_\1/",
    "/gain": "/emb_gain",
    "kernel": "weight",
    "/": ".",
}


# --- sizes ----------------------------------------------------------------------------------------

_WIDTHS = {"xxs": 64, "xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}
Named = Literal["xxs", "xs", "s", "m", "l", "xl", "xxl"]


def sized(name: Named, **fields: Any) -> Edm2:
    """A published size (table 6 of the paper): 31 million parameters to 1.5 billion; from M on with dropout of a tenth."""
    width = _WIDTHS[name]
    return Edm2(network=UNet(width=width, dropout=0.1 if width >= _WIDTHS["m"] else 0.0), **fields)


def autoencoder(**fields: Any) -> AutoEncoder:
    """The published f8 autoencoder as EDM2's latents of ImageNet 512 have it: pixels from 0 to 1, channels of mean 0 and std 0.5.

    Fields may be overridden.
    """
    published: dict[str, Any] = {
        "image": 512,
        "mean": (5.81, 3.25, 0.12, -2.15),
        "std": (4.17, 4.62, 3.71, 3.28),
        "scale": 0.5,
        "unit": True,
    }
    return sd(**{**published, **fields})
