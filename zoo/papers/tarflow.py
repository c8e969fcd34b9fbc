"""TarFlow: Normalizing Flows are Capable Generative Models (arXiv:2412.06329).

A stack of causal transformers over image patches, alternating direction, trained by exact likelihood.
B images, S pixels a side, C channels, P patch, T = (S/P)^2 tokens per image, D = C P P numbers per token.
The networks of its blocks are in `zoo/flows/patches.py`; flow, inverse and guidance, score-based denoising in `zoo/flows/stack.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from zoo.diffusion.sampling import clipped
from zoo.dist import constrain
from zoo.errors import UserError
from zoo.fields import Count, Layers, NonNegative, Side, Size, check_fields
from zoo.flows.inverse import Chain, Guidance, Jacobi, Method
from zoo.flows.patches import PatchFlow, PatchStack, block_names
from zoo.flows.transforms import LOG_2PI
from zoo.task import About, Batch, Denoises, Likelihood, Name, Params, check_needs, sample_keys


@dataclass(frozen=True)
class TarFlowSampling:
    """How images are drawn."""

    guidance: NonNegative | Guidance = 0.0  # a weight (annealed, log-scale and shift), or a `Guidance`; 0: off
    denoise: NonNegative | None = None  # strength of the denoising step; None: 1 where the noise is Gaussian, else 0
    temperature: NonNegative = 1.0  # factor on the standard deviation of z (the paper uses 1)
    method: Method | Jacobi = "auto"  # how blocks are inverted; auto: what `convergence` has saved, else token by token

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class TarFlow(PatchFlow):
    """Causal transformers over image patches, alternating direction; trained by exact likelihood."""

    patch: Side = 2
    width: Size = 768
    depth: Layers = 8  # transformer layers per flow block
    blocks: Layers = 8  # flow blocks
    scale: bool = True  # False: shifts only, a flow that preserves volume
    noise: NonNegative = 0.05  # standard deviation of the Gaussian noise on pixels in [-1, 1]
    noise_type: Literal["gaussian", "uniform"] = "gaussian"  # uniform: dequantisation over `levels` grey levels
    levels: Count = 256  # grey levels of the data, for uniform noise and for bits per dimension

    Sampling = TarFlowSampling

    @property
    def about(self) -> About:
        """`prior`: variances of z, used when sampling; they move only where scale=False.

        `bpd` is a bound on the data's own bits; with Gaussian noise only those of noisy data can be told.
        """
        why = f"task.noise_type={self.noise_type!r}, task.noise={self.noise:g}; what is trained with Gaussian noise has it"
        return About(
            classes=self.classes,
            buffers=("prior",),
            likelihood=self._likelihood,
            tokens=self.tokens,
            lacks={} if self._noisy else {"denoise": why},
        )

    @property
    def _noisy(self) -> bool:
        return self.noise_type == "gaussian" and self.noise > 0

    @property
    def _likelihood(self) -> Likelihood:
        event, bins = (self.image, self.image, self.channels), self.levels / 2
        if self.noise_type == "gaussian":
            clean = dataclasses.replace(self, noise=0.0)
            return Likelihood(event, "noisy", "noisy_bits_per_dim", bins, self.noise, clean)
        return Likelihood(event, "bound", bins=bins)

    @property
    def sizes(self) -> list[tuple[int, int, int]]:
        """Patch, width and transformer layers of each block."""
        return [(self.patch, self.width, self.depth)] * self.blocks

    @property
    def stack(self) -> PatchStack:
        """The flow over patches."""
        return self.stacked("linear", scale=self.scale)

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters: the output kernels are zero, their biases are not (a constant affine map at the start)."""
        return {**self.stack.fresh(rng), "prior": {"var": jnp.ones((self.tokens, self.dims))}}

    def add_noise(self, rng: jax.Array, image: jax.Array) -> jax.Array:
        """What the flow models: image + noise eps, or (k + u) dequantised to [-1, 1) for grey level k."""
        if self.noise_type == "gaussian":
            return image + self.noise * jax.random.normal(rng, image.shape)
        k = jnp.round((image + 1) / 2 * (self.levels - 1))
        return 2 * (k + jax.random.uniform(rng, image.shape)) / self.levels - 1

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """0.5 mean z^2 - logdet: nats per dimension without the constant 0.5 log 2 pi."""
        noise_rng, drop_rng = jax.random.split(rng)
        x = self.to_tokens(self.add_noise(noise_rng, batch["image"]))
        z, logdet, _ = self.stack.forward(params, x, self.dropped(drop_rng, batch))
        square = jnp.square(z).mean(0)
        loss = 0.5 * square.mean() - logdet.mean()
        bits = self._likelihood.bits(loss + 0.5 * LOG_2PI)
        metrics = {"bits": bits, "z_square": square.mean(), "logdet": logdet.mean()}
        return loss, metrics if self.scale else {**metrics, "variance": square}

    def after_step(self, params: Params, metrics: dict[str, jax.Array]) -> Params:
        """Where there is no scale, the prior variances follow the batch: var <- 0.9 var + 0.1 mean z^2."""
        if self.scale:
            return params
        return {**params, "prior": {"var": 0.9 * params["prior"]["var"] + 0.1 * metrics["variance"]}}

    def nll(self, params: Params, batch: Batch, keys: jax.Array) -> jax.Array:
        """-log p in nats [B] of the image with one draw of noise; uses `label` where the batch has it."""
        image = jax.vmap(self.add_noise)(keys, batch["image"])
        return -self.stack.log_prob(params, self.to_tokens(image), self.label(batch))

    @property
    def sigmas(self) -> tuple[float, float]:
        """The one level of noise that it models."""
        return self.noise, self.noise

    def denoise(self, params: Params, x: jax.Array, sigma: jax.Array, conditions: Batch | None = None) -> jax.Array:
        """Tweedie's formula x + sigma^2 grad log p(x), [B, S, S, C] in float32; a label below 0, or none, is no class.

        UserError where the noise is uniform, whose mean it does not give.
        """
        check_needs(self, (Denoises,), "TarFlow.denoise")
        tokens, sigma = self.to_tokens(x.astype(jnp.float32)), jnp.reshape(sigma, (-1, 1, 1))
        return self.to_image(self.stack.denoise(params, tokens, sigma, self.label(conditions)))

    def features(self, params: Params, batch: Batch) -> jax.Array:
        """Mean over tokens of the middle block's last hidden layer, [B, width]; image without noise, no label."""
        return self.stack.hidden(params, self.to_tokens(batch["image"]))

    def sample(
        self,
        params: Params,
        rng: jax.Array,
        n: int,
        conditions: Batch | None = None,
        options: TarFlowSampling | None = None,
    ) -> dict[str, jax.Array]:
        """n images; image i depends on (rng, i) alone.

        Args:
            rng: one key, or n keys.
            conditions: `label` [n]; negative numbers for "no label". None: no labels.
            options: None: the defaults.

        Returns:
            `image` [n, S, S, C] clipped to [-1, 1] (NaN where the inverse overflowed), `label` [n] where given, and where
            blocks were swept over `sweeps` and `unconverged` [n, blocks] (`zoo.flows.inverse.Inverted`).
        """
        o = options or TarFlowSampling()
        strength = float(self._noisy) if o.denoise is None else o.denoise
        denoised = not isinstance(strength, (int, float)) or strength != 0
        if denoised and self.noise_type != "gaussian":
            raise UserError(
                f"task.noise_type={self.noise_type!r}: denoising removes Gaussian noise only; sample with denoise=0"
            )
        stack, label = self.stack, self.label(conditions)
        stack.guidance(o.guidance).warn(label is not None)
        z = constrain(o.temperature * self.latent(sample_keys(rng, n)), "batch")
        found = stack.inverse(params, z, label, jnp.full(n, -1), o.guidance, method=o.method)
        x = found.states[-1]
        if denoised:
            x = stack.denoise(params, x, self.noise, label, strength)
        drawn = {"image": clipped(self.to_image(x)), **found.report}
        return drawn if label is None else {**drawn, "label": label}

    def inverse(self, params: Params, z: jax.Array, label: jax.Array | None = None) -> jax.Array:
        """Images [B, S, S, C], noisy and not clipped, of z [B, T, D] from N(0, I) and label [B] or None."""
        return self.to_image(self.stack.inverse(params, z, label).states[-1])

    def chain(
        self, params: Params, batch: Batch, rng: jax.Array, *, guidance: float | Guidance = 0.0
    ) -> tuple[jax.Array, Chain]:
        """Noisy examples as tokens [B, T, D], and the blocks that map them to noise; with `label` where the batch has it."""
        x = self.to_tokens(self.add_noise(rng, batch["image"]))
        return x, self.stack.chain(params, len(x), self.label(batch), jnp.full(len(x), -1), guidance)

    def import_names(self) -> list[Name]:
        """The layout of the official PyTorch implementation (linear weights stored [out, in])."""
        names = [n for i, net in enumerate(self.stack.nets) for n in block_names(i, net, range(self.depth))]
        return [Name("var", "prior/var"), *names]

    def import_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """As it is. UserError for a checkpoint of iTARFlow, whose blocks are told of the noise."""
        if any("time_embed" in key for key in state):
            raise UserError(
                "this is a checkpoint of iTARFlow, which knows all levels of noise; import it with a config of itarflow"
            )
        return state
