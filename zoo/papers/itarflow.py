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
from zoo.diffusion.sampling import DenoiserSampling, clipped, onward
from zoo.diffusion.smc import EnergySampling, Particles
from zoo.diffusion.solvers import Euler, Solver
from zoo.dist import constrain
from zoo.errors import UserError, check_divisor
from zoo.fields import Below1, Dtype, Layers, NonNegative, Positive, Side, Size, SizeOr0, Some, Whole, check_fields
from zoo.flows.inverse import ByBlock, Chain, Guidance, Jacobi, Method
from zoo.flows.patches import (
    FlowNet,
    PatchStack,
    block_names,
    check_patch,
    flops,
    init_blocks,
    layer_names,
    warn_guidance,
)
from zoo.nn.attention import Backend, check_backend
from zoo.nn.embed import patchify, unpatchify
from zoo.nn.transformer import Remat
from zoo.task import About, Batch, Name, Params, image_spec, sample_keys


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
        same: dict[str, Any] = {"temper": self.temper, "potentials": self.potentials, "particles": self.particles}
        return EnergySampling(nfe=self.calls, levels=self.levels, form=self.form, **same)


@dataclass(frozen=True)
class ITarFlow:
    """Causal transformers over image patches that know the level of noise; trained by exact likelihood at all levels."""

    image: Side = 64  # pixels a side
    channels: Size = 3
    patch: ByBlock[Side] = 2  # one for all blocks, or one for each
    width: ByBlock[Size] = 1280  # likewise
    depth: Some[Layers] = (4, 4, 4, 24)  # transformer layers of each block, the one nearest the data first
    head_dim: Size = 64
    classes: SizeOr0 = 0  # 0: unconditional
    low: Positive = 0.01  # t0, the lowest level
    high: Positive = 0.3  # t1, the highest
    law: Literal["uni", "linear", "edm"] = "uni"  # of t in training: even in t, even in t^2, EDM's, which has no bounds
    weight: Literal["t", "ones", "t_norm", "sqr_t", "sqr_t_norm"] = "t"  # of the nll at t
    input_scale: Positive = 1.0  # what tokens are multiplied by in front of the flow
    shared: SizeOr0 = 0  # of the layers of each block the first so many are the same ones; no recipe uses it
    drop: Below1 = 0.1  # probability that a label is dropped in training
    chunk: SizeOr0 = 0  # images whose score is computed at a time; 0: all at once
    dtype: Dtype = "float32"  # of activations; levels, log-scales, log-dets and losses stay float32
    scan: bool = True  # scan over the layers of a block (compiles fast); False unrolls
    remat: Remat = "none"  # none, dots or full: what the backward pass recomputes
    attention: Backend = "xla"  # xla; cudnn on NVIDIA GPUs in bfloat16; splash on TPUs; auto: whichever the device has

    Sampling = ITarFlowSampling

    def __post_init__(self) -> None:
        check_fields(self, "task.")
        for name in ("patch", "width"):
            if len(self._each(name)) != self.blocks:
                raise UserError(
                    f"task.{name}={getattr(self, name)} for the {self.blocks} blocks of task.depth={self.depth}; give one for all, "
                    "or one for each"
                )
        for patch, width in zip(self._each("patch"), self._each("width")):
            check_patch(self.image, patch)
            check_divisor("head_dim", self.head_dim, "width", width)
        if self.low >= self.high:
            raise UserError(f"task.low={self.low:g} must be below task.high={self.high:g}")
        if self.shared and (self.shared >= min(self.depth) or len({*self._each("width")}) > 1):
            raise UserError(
                f"task.shared={self.shared}: every block needs a layer of its own besides (task.depth={self.depth}), and all one "
                f"width (task.width={self.width})"
            )
        check_backend(self.attention, self.dtype)

    def _each(self, name: str) -> tuple[int, ...]:
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * self.blocks

    @property
    def about(self) -> About:
        """Its density is that of noisy images: no bits of clean ones can be told."""
        return About(classes=self.classes, tokens=self.tokens)

    @property
    def blocks(self) -> int:
        """How many there are."""
        return len(self.depth)

    @property
    def tokens(self) -> int:
        """T, patches of an image in block 0."""
        return (self.image // self._each("patch")[0]) ** 2

    @property
    def sigmas(self) -> tuple[float, float]:
        """Lowest and highest level."""
        return self.low, self.high

    @property
    def _nets(self) -> tuple[FlowNet, ...]:
        return tuple(
            FlowNet(
                tokens=(self.image // patch) ** 2,
                dims=self.channels * patch**2,
                width=width,
                depth=depth,
                head_dim=self.head_dim,
                classes=self.classes,
                flip=i % 2 == 1,
                scale=True,
                dtype=self.dtype,
                scan=self.scan,
                remat=self.remat,
                attention=self.attention,
                level=True,
            )
            for i, (patch, width, depth) in enumerate(zip(self._each("patch"), self._each("width"), self.depth))
        )

    @property
    def stack(self) -> PatchStack:
        """The flow over patches: even blocks run through the image in raster order, odd ones backwards."""
        nets, patches = self._nets, self._each("patch")
        same: dict[str, Any] = {"rule": "linear_scale", "annealed": True, "first": 0}
        return PatchStack(nets, nets[0].tokens, nets[0].dims, **same, patches=patches, channels=self.channels)

    def flops(self) -> float:
        """Floating-point operations of one training example (`zoo.flows.patches.flops`); of a denoising step as many."""
        return flops(self._nets)

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`image` [B, S, S, C] in [-1, 1], and `label` [B] for a class-conditional model."""
        return image_spec(batch, self.image, self.channels, self.classes)

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters: the output kernels are zero, their biases are not. `shared`: layers of all blocks."""
        params = init_blocks(self._nets, rng)
        if not self.shared:
            return params
        parts = [self._cut(params[f"block{i}"]["trunk"]) for i in range(self.blocks)]
        own = {f"block{i}": {**params[f"block{i}"], "trunk": mine} for i, (_, mine) in enumerate(parts)}
        return {**own, "shared": parts[0][0]}

    def _cut(self, trunk: Params) -> tuple[Params, Params]:
        """The layers of a trunk that all blocks share, and the others."""
        n = self.shared
        if self.scan:
            return jax.tree.map(lambda x: x[:n], trunk), jax.tree.map(lambda x: x[n:], trunk)
        layers = [trunk[f"layer{i}"] for i in range(len(trunk))]
        return {f"layer{i}": p for i, p in enumerate(layers[:n])}, {f"layer{i}": p for i, p in enumerate(layers[n:])}

    def _joined(self, params: Params) -> Params:
        """Parameters as the stack takes them, each block with all its layers."""
        if not self.shared:
            return params

        def trunk(mine: Params) -> Params:
            if self.scan:
                joined: Params = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), params["shared"], mine)
                return joined
            layers = [part[f"layer{i}"] for part in (params["shared"], mine) for i in range(len(part))]
            return {f"layer{i}": p for i, p in enumerate(layers)}

        blocks = {key: block for key, block in params.items() if key != "shared"}
        return {key: {**block, "trunk": trunk(block["trunk"])} for key, block in blocks.items()}

    def condition(self, n: int, t: float | jax.Array, label: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """What the stack is told of n images: labels, -1 for none, and log t."""
        known = jnp.full(n, -1) if label is None or not self.classes else label
        return known, jnp.log(jnp.broadcast_to(jnp.asarray(t, jnp.float32), (n,)))

    def forward(
        self, params: Params, image: jax.Array, t: float | jax.Array, label: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """z [B, T, D] of noisy images at levels t [] or [B], log-det [B] per dimension, and nll [B] per dimension.

        The nll is that of N(0, I) without its constant: 0.5 mean z^2 - logdet.
        """
        x = self.input_scale * patchify(image, self._each("patch")[0])
        z, logdet, _ = self.stack.forward(self._joined(params), x, self.condition(len(image), t, label))
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
        image, label = batch["image"], batch.get("label") if self.classes else None
        if label is not None and self.drop:
            label = jnp.where(jax.random.bernoulli(drop_rng, self.drop, label.shape), -1, label)
        t = self.levels(jax.random.uniform(level_rng, (len(image),)))
        x = image + t[:, None, None, None] * jax.random.normal(noise_rng, image.shape)
        _, _, nll = self.forward(params, x, t, label)
        return (self.weigh(t) * nll).mean(), {"nll": nll.mean(), "nll_over_t": (nll - jnp.log(t) - 0.5).mean()}

    def log_prob(self, params: Params, x: jax.Array, t: float | jax.Array, label: jax.Array | None = None) -> jax.Array:
        """log p_t(x) in nats [B] of noisy images x at levels t [] or [B]."""
        nll = self.forward(params, x, t, label)[2]
        return -math.prod(x.shape[1:]) * (nll + 0.5 * math.log(2 * math.pi))

    def nll(self, params: Params, batch: Batch, keys: jax.Array) -> jax.Array:
        """-log p_t in nats [B] of the image with one draw of noise of the lowest level; uses `label` where the batch has it."""
        noise = jax.vmap(lambda key: jax.random.normal(key, batch["image"].shape[1:]))(keys)
        return -self.log_prob(params, batch["image"] + self.low * noise, self.low, batch.get("label"))

    def energy(self, params: Params, x: jax.Array, sigma: jax.Array, conditions: Batch | None = None) -> jax.Array:
        """-log p_t(x) in nats [B], exact: nothing is left out."""
        return -self.log_prob(params, x.astype(jnp.float32), sigma, (conditions or {}).get("label"))

    def denoise(self, params: Params, x: jax.Array, sigma: jax.Array, conditions: Batch | None = None) -> jax.Array:
        """E[x0 | x] = x + t^2 grad log p_t, [B, S, S, C] in float32, in pieces of `chunk`; a label below 0, or none, is no class."""
        given = self.condition(len(x), sigma, (conditions or {}).get("label"))

        def some(x: jax.Array, label: jax.Array, log_t: jax.Array) -> jax.Array:
            return denoised(lambda x, sigma: self.energy(params, x, sigma, {"label": label}), x, jnp.exp(log_t))

        if not self.chunk or len(x) <= self.chunk:
            return some(x, *given)
        rows = jax.lax.map(lambda row: some(*(a[None] for a in row))[0], (x, *given), batch_size=self.chunk)
        return rows

    def features(self, params: Params, batch: Batch) -> jax.Array:
        """Mean over tokens of the middle block's last hidden layer, [B, width]; image without noise at the lowest level, no label."""
        x = self.input_scale * patchify(batch["image"], self._each("patch")[0])
        return self.stack.hidden(self._joined(params), x, self.condition(len(x), self.low, None))

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
        o, shape = options or ITarFlowSampling(), (self.image, self.image, self.channels)
        level = self.high if o.level is None else o.level
        if not self.low <= level <= self.high:
            warnings.warn(
                f"level={level:g} is outside of what the model was trained on, {self.low:g} to {self.high:g}; what it draws "
                "there means little",
                stacklevel=2,
            )
        keys, label = sample_keys(rng, n), (conditions or {}).get("label") if self.classes else None
        told: Any = {} if label is None else {"label": label}
        bounds = (min(self.low, level), level)
        if o.weighted:

            def target(given: Any) -> tuple[list[Any], list[Potential]]:
                return [scored(lambda x, sigma: self.energy(params, x, sigma, given))], []

            def start(keys: jax.Array, given: Any) -> jax.Array:
                return self.begin(params, keys, level, given)

            image, trace = o._by_weights.draw(keys, n, bounds, target, shape, told or None, start=start)
            return {"image": clipped(image), **told, "trace": trace}
        warn_guidance(self.stack.guidance(o.guidance), label)
        z = constrain(o.temperature * self.latent(keys), "batch")
        x, report = self._inverse(params, z, label, level, o.guidance, o.method)
        if o.calls:

            def denoise(x: jax.Array, sigma: jax.Array) -> jax.Array:
                x0 = self.denoise(params, x, sigma, told)
                return jnp.clip(x0, -1, 1) if o.clip else x0

            one = o.calls == 1
            x = denoise(x, jnp.float32(level)) if one else onward(o._by_solver.plan(bounds), denoise, x, keys)
        return {"image": clipped(x), **report, **told}

    def begin(self, params: Params, keys: jax.Array, level: float, conditions: Batch | None = None) -> jax.Array:
        """Noisy images [N, S, S, C] of a level, exact samples of the flow, one for each key."""
        return self.inverse(params, self.latent(keys), (conditions or {}).get("label"), level)

    def latent(self, keys: jax.Array) -> jax.Array:
        """z [n, T, D] from N(0, I), from a key for each."""
        shape = (self.stack.tokens, self.stack.dims)
        return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)

    def inverse(
        self, params: Params, z: jax.Array, label: jax.Array | None = None, t: float | None = None
    ) -> jax.Array:
        """Noisy images [B, S, S, C] of level t (None: the highest), of z [B, T, D] from N(0, I) and label [B] or None."""
        return self._inverse(params, z, label, self.high if t is None else t, 0.0, "sequential")[0]

    def _inverse(
        self, params: Params, z: jax.Array, label: Any, t: Any, guidance: Any, method: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        strong, weak = (self.condition(len(z), t, y) for y in (label, None))
        found = self.stack.inverse(self._joined(params), z, strong, weak, guidance, method=method)
        return self.to_image(found.states[-1]), found.report

    def to_image(self, tokens: jax.Array) -> jax.Array:
        """Images [B, S, S, C] of the flow's tokens [B, T, D]."""
        return unpatchify(tokens, self._each("patch")[0], self.channels) / self.input_scale

    def chain(
        self, params: Params, batch: Batch, rng: jax.Array, *, guidance: float | Guidance = 0.0
    ) -> tuple[jax.Array, Chain]:
        """Examples as tokens [B, T, D] with the noise of the highest level, and the blocks that map them to noise there."""
        image = batch["image"] + self.high * jax.random.normal(rng, batch["image"].shape)
        strong, weak = (self.condition(len(image), self.high, y) for y in (batch.get("label"), None))
        x = self.input_scale * patchify(image, self._each("patch")[0])
        return x, self.stack.chain(self._joined(params), len(x), strong, weak, guidance)

    def import_names(self) -> list[Name]:
        """The layout of the official PyTorch implementation (linear weights stored [out, in])."""
        nets, last = self._nets, self._nets[-1]
        names = [Name("var", None, value=lambda: np.ones((last.tokens, last.dims), np.float32))]
        for i, net in enumerate(nets):
            names += block_names(i, net, range(net.depth - self.shared), "head_blocks")
        return names + [n for j in range(self.shared) for n in layer_names(f"shared_backbone.{j}", "shared", j)]

    def import_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """With the names of the newest code, and shared layers once. UserError for TarFlow's, whose blocks know no levels."""
        if any("attn_blocks" in key for key in state) and not any("time_embed" in key for key in state):
            raise UserError(
                "this is a checkpoint of TarFlow, whose blocks are told of no level of noise; import it with a config of tarflow"
            )
        names = {key: key.replace(".attn_blocks.", ".head_blocks.") for key in state}
        return {new: state[key] for key, new in names.items() if not re.match(r"blocks\.\d+\.shared_backbone", new)}
