"""iTARFlow: Normalizing Flows with Iterative Denoising (arXiv:2604.20041).

TarFlow's stack (`zoo/flows/patches.py`), trained as the exact density p_t of images with Gaussian noise of all levels t. A
sample comes from the flow's inverse at a high level (stage one), and a solver of diffusion takes its noise away with the exact
score (stage two). The paper's text was not at hand; the equations are those of its official code.
B images, S pixels a side, C channels, T tokens of D numbers, N = T D; x = image + t n.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from zoo.diffusion.energies import denoised, scored
from zoo.diffusion.levels import Levels
from zoo.diffusion.potentials import Potential
from zoo.diffusion.sampling import Conditions, DenoiserSampling, clipped, onward
from zoo.diffusion.smc import EnergySampling, Particles
from zoo.diffusion.solvers import Euler, Solver
from zoo.dist import constrain
from zoo.errors import UserError
from zoo.fields import Layers, NonNegative, Positive, Side, Size, SizeOr0, Some, Whole, check_fields
from zoo.flows.inverse import ByBlock, Chain, Guidance, Inverted, Jacobi, Method
from zoo.flows.patches import PatchFlow, PatchStack, block_names
from zoo.nn.transformer import layer_names, split_trunk
from zoo.task import About, Batch, Name, Params, sample_keys


@dataclass(frozen=True)
class ITarFlowSampling:
    """How images are drawn: the flow's inverse at `level`, then a solver down to the lowest, or weighted particles."""

    level: Positive | None = None  # t1, of stage one; None: the highest that the model knows
    guidance: NonNegative | Guidance = 0.0  # of stage one: a weight (annealed, scale and shift), or a `Guidance`
    temperature: NonNegative = 1.0  # factor on the standard deviation of z
    method: Method | Jacobi = "auto"  # how blocks are inverted; auto: what `convergence` has saved, else token by token
    solver: Solver = Euler()  # of stage two; the official `ode`; `ancestral` is its `sde_vanilla`
    nfe: Whole | None = (
        None  # calls, 10; 0: stage one alone, whose noise stays; 1: TarFlow's step; of particles levels, 101
    )
    levels: Levels = Levels()  # of stage two; None said: even in t for `euler` and `ancestral`, else the solver's own
    clip: bool = False  # x0 is kept within [-1, 1] at each call
    temper: Positive = 1.0  # the target is the model to this power
    potentials: tuple[Potential, ...] = ()  # by name: box, halfspace, ...
    particles: Particles | None = None  # of `temper` and `potentials`; None: 512
    form: Literal["ratio", "score"] = "ratio"  # of their weights

    def __post_init__(self) -> None:
        check_fields(self)
        if self.weighted:
            self._by_weights  # noqa: B018 (its own checks)
            if Guidance.of(self.guidance, "linear", True).active or self.temperature != 1:
                raise UserError(
                    "particles begin as exact samples of the model, without guidance or temperature; leave those out"
                )
        elif self.calls > 1:
            self._by_solver  # noqa: B018 (its own checks)

    @property
    def weighted(self) -> bool:
        """Whether particles are drawn, and no solver."""
        return self.particles is not None or self.temper != 1 or bool(self.potentials)

    @property
    def calls(self) -> int:
        """Of the denoiser in stage two, or levels of particles."""
        return (101 if self.weighted else 10) if self.nfe is None else self.nfe

    @property
    def _by_solver(self) -> DenoiserSampling:
        even = self.levels == Levels() and self.solver.name in ("euler", "ancestral")
        return DenoiserSampling(self.solver, self.calls, 0.0, Levels(kind="edm", rho=1.0) if even else self.levels)

    @property
    def _by_weights(self) -> EnergySampling:
        return EnergySampling(
            nfe=self.calls,
            levels=self.levels,
            form=self.form,
            temper=self.temper,
            potentials=self.potentials,
            particles=self.particles,
        )


@dataclass(frozen=True)
class ITarFlow(PatchFlow):
    """Causal transformers over image patches that know the level of noise; trained by exact likelihood at all levels."""

    patch: ByBlock[Side] = 2  # one for all blocks, or one for each
    width: ByBlock[Size] = 1280  # likewise
    depth: Some[Layers] = (4, 4, 4, 24)  # transformer layers of each block, the one nearest the data first
    low: Positive = 0.01  # t0, the lowest level
    high: Positive = 0.3  # t1, the highest
    law: Literal["uni", "linear", "edm"] = "uni"  # of t in training: even in t, even in t^2, EDM's, which has no bounds
    weight: Literal["t", "ones", "t_norm", "sqr_t", "sqr_t_norm"] = "t"  # of the nll at t
    input_scale: Positive = 1.0  # what tokens are multiplied by in front of the flow
    shared: SizeOr0 = 0  # of the layers of each block the first so many are the same ones; no recipe uses it
    chunk: SizeOr0 = 0  # images whose score is computed at a time; 0: all at once

    Sampling = ITarFlowSampling

    def __post_init__(self) -> None:
        for name in ("patch", "width"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != len(self.depth):
                raise UserError(
                    f"task.{name}={value} for the {len(self.depth)} blocks of task.depth={self.depth}; give one for all, or one "
                    "for each"
                )
        super().__post_init__()
        if self.low >= self.high:
            raise UserError(f"task.low={self.low:g} must be below task.high={self.high:g}")
        if self.shared and (self.shared >= min(self.depth) or len({width for _, width, _ in self.sizes}) > 1):
            raise UserError(
                f"task.shared={self.shared}: every block needs a layer of its own besides (task.depth={self.depth}), and all one "
                f"width (task.width={self.width})"
            )

    @property
    def about(self) -> About:
        """Its density is that of noisy images: no bits of clean ones can be told."""
        return About(classes=self.classes, tokens=self.tokens)

    @property
    def sizes(self) -> list[tuple[int, int, int]]:
        """Patch, width and transformer layers of each block."""
        each = (x if isinstance(x, tuple) else (x,) * len(self.depth) for x in (self.patch, self.width))
        return list(zip(*each, self.depth))

    @property
    def sigmas(self) -> tuple[float, float]:
        """Lowest and highest level."""
        return self.low, self.high

    @property
    def stack(self) -> PatchStack:
        """The flow over patches."""
        return self.stacked("linear_scale", level=True)

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters: the output kernels are zero, their biases are not. `shared`: layers of all blocks."""
        params = self.stack.fresh(rng)
        if not self.shared:
            return params
        parts = {key: split_trunk(block["trunk"], self.shared) for key, block in params.items()}
        own = {key: {**params[key], "trunk": rest} for key, (_, rest) in parts.items()}
        return {**own, "shared": parts["block0"][0]}

    def to_tokens(self, image: jax.Array) -> jax.Array:
        """Images [B, S, S, C] as the flow takes them, [B, T, D]."""
        return self.input_scale * super().to_tokens(image)

    def to_image(self, tokens: jax.Array) -> jax.Array:
        """The inverse of `to_tokens`."""
        return super().to_image(tokens) / self.input_scale

    def condition(self, n: int, t: float | jax.Array, label: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """What the stack is told of n images: labels, -1 for none, and log t, [1] where all have one level."""
        known = jnp.full(n, -1) if label is None else label
        return known, jnp.log(jnp.atleast_1d(jnp.asarray(t, jnp.float32)))

    def forward(
        self, params: Params, image: jax.Array, t: float | jax.Array, label: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """z [B, T, D] of noisy images at levels t [] or [B], log-det [B] per dimension, and nll [B] per dimension.

        The nll is that of N(0, I) without its constant: 0.5 mean z^2 - logdet.
        """
        z, logdet, _ = self.stack.forward(params, self.to_tokens(image), self.condition(len(image), t, label))
        logdet = logdet + math.log(self.input_scale)
        return z, logdet, 0.5 * jnp.square(z).mean((1, 2)) - logdet

    def levels(self, share: jax.Array) -> jax.Array:
        """t of training steps for shares u in [0, 1) of their law."""
        if self.law == "edm":
            return jnp.exp(-1.2 + jax.scipy.special.ndtri(jnp.maximum(share, 1e-7)))
        if self.law == "linear":
            return jnp.sqrt(self.low**2 + (self.high**2 - self.low**2) * share)
        return self.low + (self.high - self.low) * share

    def weigh(self, t: jax.Array) -> jax.Array:
        """w(t)."""
        power = {"ones": 0, "t": 1, "t_norm": 1, "sqr_t": 2, "sqr_t_norm": 2}[self.weight]
        total = self.low**power + self.high**power if self.weight.endswith("norm") else 1.0
        return t**power / total

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean over images of w(t) nll, nats per dimension without the constant 0.5 log 2 pi.

        Metrics: `nll` without the weight, and `nll_over_t` less its floor log t + 0.5: levels differ in that, so its mean can be
        compared between laws.
        """
        level_rng, noise_rng, drop_rng = jax.random.split(rng, 3)
        image = batch["image"]
        t = self.levels(jax.random.uniform(level_rng, (len(image),)))
        x = image + t[:, None, None, None] * jax.random.normal(noise_rng, image.shape)
        _, _, nll = self.forward(params, x, t, self.dropped(drop_rng, batch))
        return (self.weigh(t) * nll).mean(), {"nll": nll.mean(), "nll_over_t": (nll - jnp.log(t) - 0.5).mean()}

    def nll(self, params: Params, batch: Batch, keys: jax.Array) -> jax.Array:
        """-log p_t in nats [B] of the image with one draw of noise of the lowest level; uses `label` where the batch has it."""
        noise = jax.vmap(lambda key: jax.random.normal(key, batch["image"].shape[1:]))(keys)
        return self.energy(params, batch["image"] + self.low * noise, self.low, batch)

    def energy(
        self, params: Params, x: jax.Array, sigma: float | jax.Array, conditions: Batch | None = None
    ) -> jax.Array:
        """-log p_t(x) in nats [B], exact: nothing is left out."""
        nll = self.forward(params, x.astype(jnp.float32), sigma, self.label(conditions))[2]
        return math.prod(x.shape[1:]) * (nll + 0.5 * math.log(2 * math.pi))

    def denoise(self, params: Params, x: jax.Array, sigma: jax.Array, conditions: Batch | None = None) -> jax.Array:
        """E[x0 | x] = x + t^2 grad log p_t, [B, S, S, C] in float32, in pieces of `chunk`; a label below 0, or none, is no class."""

        def some(x: jax.Array, label: jax.Array, log_t: jax.Array) -> jax.Array:
            return denoised(lambda x, t: self.energy(params, x, t, {"label": label}), x, jnp.exp(log_t))

        rows = (x, *self.condition(len(x), jnp.broadcast_to(sigma, len(x)), self.label(conditions)))
        if not self.chunk or len(x) <= self.chunk:
            return some(*rows)
        return jax.lax.map(lambda row: some(*(a[None] for a in row))[0], rows, batch_size=self.chunk)

    def features(self, params: Params, batch: Batch) -> jax.Array:
        """Mean over tokens of the middle block's last hidden layer, [B, width]; image without noise at the lowest level, no label."""
        x = self.to_tokens(batch["image"])
        return self.stack.hidden(params, x, self.condition(len(x), self.low, None))

    def sample(
        self,
        params: Params,
        rng: jax.Array,
        n: int,
        conditions: Batch | None = None,
        options: ITarFlowSampling | None = None,
    ) -> dict[str, Any]:
        """n images; image i depends on (rng, i) alone.

        Args:
            rng: one key, or n keys.
            conditions: `label` [n]; negative numbers for "no label". None: no labels.
            options: None: the defaults.

        Returns:
            `image` [n, S, S, C] clipped to [-1, 1] (NaN where it overflowed), `label` [n] where given, where blocks were swept over
            `sweeps` and `unconverged` [n, blocks], and of particles a `trace`.
        """
        o = options or ITarFlowSampling()
        level = self.high if o.level is None else o.level
        if not self.low <= level <= self.high:
            warnings.warn(
                f"level={level:g} is outside of what the model was trained on, {self.low:g} to {self.high:g}; what it draws "
                "there means little",
                stacklevel=2,
            )
        keys, label, bounds = sample_keys(rng, n), self.label(conditions), (min(self.low, level), level)
        known = {} if label is None else {"label": label}
        if o.weighted:

            def target(each: Conditions) -> tuple[list[Any], list[Potential]]:
                return [scored(lambda x, sigma: self.energy(params, x, sigma, each))], []

            def start(keys: jax.Array, each: Conditions) -> jax.Array:
                return self.begin(params, keys, level, each)

            shape = (self.image, self.image, self.channels)
            image, trace = o._by_weights.draw(keys, n, bounds, target, shape, known or None, start=start)
            return {"image": clipped(image), **known, "trace": trace}

        def denoise(x: jax.Array, sigma: jax.Array) -> jax.Array:
            x0 = self.denoise(params, x, sigma, known)
            return jnp.clip(x0, -1, 1) if o.clip else x0

        self.stack.guidance(o.guidance).warn(label is not None)
        z = constrain(o.temperature * self.latent(keys), "batch")
        found = self._inverse(params, z, label, level, o.guidance, o.method)
        x = self.to_image(found.states[-1])
        if o.calls:
            x = denoise(x, jnp.float32(level)) if o.calls == 1 else onward(o._by_solver.plan(bounds), denoise, x, keys)
        return {"image": clipped(x), **found.report, **known}

    def begin(self, params: Params, keys: jax.Array, level: float, conditions: Conditions = None) -> jax.Array:
        """Noisy images [N, S, S, C] of a level, exact samples of the flow, one for each key."""
        return self.inverse(params, self.latent(keys), self.label(conditions), level)

    def inverse(
        self, params: Params, z: jax.Array, label: jax.Array | None = None, t: float | None = None
    ) -> jax.Array:
        """Noisy images [B, S, S, C] of level t (None: the highest), of z [B, T, D] from N(0, I) and label [B] or None."""
        return self.to_image(self._inverse(params, z, label, self.high if t is None else t).states[-1])

    def _inverse(
        self, params: Params, z: jax.Array, label: Any, t: Any, guidance: Any = 0.0, method: Any = "sequential"
    ) -> Inverted:
        strong, weak = (self.condition(len(z), t, y) for y in (label, None))
        return self.stack.inverse(params, z, strong, weak, guidance, method=method)

    def chain(
        self, params: Params, batch: Batch, rng: jax.Array, *, guidance: float | Guidance = 0.0
    ) -> tuple[jax.Array, Chain]:
        """Examples as tokens [B, T, D] with the noise of the highest level, and the blocks that map them to noise there."""
        image = batch["image"] + self.high * jax.random.normal(rng, batch["image"].shape)
        strong, weak = (self.condition(len(image), self.high, y) for y in (self.label(batch), None))
        return self.to_tokens(image), self.stack.chain(params, len(image), strong, weak, guidance)

    def import_names(self) -> list[Name]:
        """The layout of the official PyTorch implementation (linear weights stored [out, in])."""
        nets, last = self.stack.nets, self.stack.nets[-1]
        names = [Name("var", None, value=lambda: np.ones((last.tokens, last.dims), np.float32))]
        for i, net in enumerate(nets):
            names += block_names(i, net, range(net.depth - self.shared), "head_blocks")
        return names + [n for j in range(self.shared) for n in layer_names(f"shared_backbone.{j}", "shared/block", j)]

    def import_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """With the names of the newest code, and shared layers once. UserError for TarFlow's, whose blocks know no levels."""
        if any("attn_blocks" in key for key in state) and not any("time_embed" in key for key in state):
            raise UserError(
                "this is a checkpoint of TarFlow, whose blocks are told of no level of noise; import it with a config of tarflow"
            )
        names = {key: key.replace(".attn_blocks.", ".head_blocks.") for key in state}
        return {new: state[key] for key, new in names.items() if not re.match(r"blocks\.\d+\.shared_backbone", new)}
