"""The STARFlow task: its hyper-parameters, what a batch holds, loss, likelihood and sampler, and the published layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from zoo.dist import constrain
from zoo.encoders.inputs import Inputs
from zoo.errors import UserError, check_divisor
from zoo.fields import Dtype, Layers, NonNegative, Positive, Size, Some, check_fields
from zoo.flows.inverse import Chain, Guidance, Jacobi, Method
from zoo.flows.stack import Stack
from zoo.flows.transforms import LOG_2PI
from zoo.nn.attention import Backend, check_backend
from zoo.nn.embed import patchify, unpatchify
from zoo.nn.layers import linear_names
from zoo.nn.transformer import Remat, layer_names
from zoo.papers.starflow.model import TIME_PAIRS, FlowNet, LanguageModel
from zoo.task import About, Batch, Likelihood, Name, Params, sample_keys

_LICENCE = (
    "the published STARFlow weights are under a research-only, non-commercial licence that also binds converted files: "
    "keep them to yourself and keep the attribution"
)


@dataclass(frozen=True)
class StarFlowSampling:
    """How latents, or pixels, are drawn."""

    guidance: NonNegative | Guidance = 0.0  # a weight w of the Gaussian rule; 0: off; the usual scale is 1 + w
    denoise: NonNegative | None = None  # strength of the score step; None: 1 where `task.denoiser` is "score", else 0
    temperature: NonNegative = 1.0  # factor on the standard deviation of z (the paper uses 1)
    attention_temperature: Positive = 1.0  # divides all attention logits
    grid: tuple[Size, Size] | None = None  # rows and columns of the latents; None: those of the task
    method: Method | Jacobi = "auto"  # how blocks are inverted; auto: what `convergence` has saved, else token by token

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class StarFlow(Inputs):
    """A few shallow and one deep causal transformer over the latents of a frozen autoencoder; exact likelihood."""

    width: Size = 2048
    depths: Some[Layers] = (2, 2, 2, 2, 2, 18)  # layers of each flow block, data first; the last is the deep one
    head_dim: Size = 64
    condition: Literal["deep", "all"] = "deep"  # blocks that see class or caption
    start: bool = True  # a learned start token; False: the first token of each block passes unchanged, as in TarFlow
    order: Literal["L2R", "R2L"] = "L2R"  # L2R: blocks 1, 3, 5 run through the grid forwards (5 is the deep one of six)
    positions: Literal["rope", "learned"] = "rope"
    reach: Positive = 32.0  # positions of a square grid span [0, reach), whatever its size: the weights depend on it
    scale: Literal["softplus", "exp"] = "softplus"
    clip: NonNegative = 4.0  # soft clip c tanh(x / c) of the network's outputs; 0: none
    final_norm: bool = True
    lm: LanguageModel | None = None  # sizes of a deep block built like a language model; None: like the others
    noise: NonNegative = 0.3  # standard deviation of the Gaussian noise on the latents
    penalty: NonNegative = 1e-4  # weight of the mean squares of what enters each block
    denoiser: Literal["score", "decoder"] = "score"  # what removes the noise: a score step, or a decoder tuned for it
    dtype: Dtype = "float32"  # of activations; scales, log-dets and losses stay float32
    scan: bool = True  # scan over the layers of a block; False unrolls
    remat: Remat = "none"  # none, dots or full: what the backward pass recomputes
    attention: Backend = "xla"  # xla; cudnn on NVIDIA GPUs in bfloat16; splash on TPUs; auto: whichever the device has

    Sampling = StarFlowSampling

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 2:
            raise UserError(f"task.patch={self.patch} makes one token, and a flow needs two; choose a smaller patch")
        check_divisor("head_dim", self.head_dim, "width", self.width)
        if self.positions == "rope":
            self._check_rope()
        if self.lm is not None and (self.positions != "rope" or (self.prefix and self.text_width != self.lm.width)):
            raise UserError(
                f"task.lm: a language model has rotary positions and takes its own embeddings; set task.positions=rope and "
                f"task.text_width={self.lm.width}"
            )
        check_backend(self.attention, self.dtype)

    def _check_rope(self) -> None:
        half = self.head_dim // 2
        plane = half - TIME_PAIRS if self.prefix else half
        if self.head_dim % 2 or plane < 2 or plane % 2:
            fits = "a multiple of 4 from 20 on" if self.prefix else "a multiple of 4"
            raise UserError(f"task.head_dim={self.head_dim} leaves no pairs for rows and columns; choose {fits}")

    # --- sizes --------------------------------------------------------------------------------------

    @property
    def about(self) -> About:
        """The encoders are frozen. Bits compare among runs on the same latents alone."""
        return About(
            **self.told,
            likelihood=self._likelihood,
            grid=self.trained_grid,
            tokens=self.tokens,
            licence=_LICENCE,
            lacks={} if self.noise else {"denoise": "task.noise=0; what is trained with noise has it"},
        )

    @property
    def _likelihood(self) -> Likelihood:
        event = (*self.latent, self.channels)
        name, bins = ("noisy_bits_per_dim", 255 / 2) if self.inputs == "pixels" else ("noisy_latent_bits_per_dim", 1.0)
        return Likelihood(event, "noisy", name, bins, self.noise, replace(self, noise=0.0))

    @property
    def blocks(self) -> int:
        """Flow blocks."""
        return len(self.depths)

    @property
    def tokens(self) -> int:
        """T, tokens of an example."""
        return self.rows * self.columns

    def sees(self, i: int) -> bool:
        """Whether block i sees the condition."""
        return self.prefix > 0 and (self.condition == "all" or i == self.blocks - 1)

    def flops(self) -> float:
        """Floating-point operations of one training example: 6 per weight and token, and half of the causal attention.

        The frozen encoders are left out.
        """
        count, total = self.tokens, 0.0
        for i, depth in enumerate(self.depths):
            slots = count + (self.prefix if self.sees(i) else 0)
            lm = self.lm if i == self.blocks - 1 else None
            width, inner = (lm.width, lm.heads * lm.head_dim) if lm else (self.width, self.width)
            layer = 12 * width**2
            if lm:
                layer = width * ((2 * lm.heads + 2 * lm.kv_heads) * lm.head_dim + 3 * lm.mlp)
            total += slots * depth * (layer + slots * inner) + count * 3 * self.dims * width
        return 6.0 * total

    def cache_bytes(self, n: int, guided: bool = True) -> dict[str, int]:
        """Bytes of the key/value caches while n samples of the trained size are drawn: of the deep block, of the largest other."""
        size = 2 if self.dtype == "bfloat16" else 4
        count, deep = self.tokens, self.blocks - 1
        inner = self.lm.kv_heads * self.lm.head_dim if self.lm else self.width

        def block(i: int, inner: int) -> int:
            rows = 2 * n if guided and self.sees(i) else n
            return 2 * self.depths[i] * rows * (count + (self.prefix if self.sees(i) else 0)) * inner * size

        return {"deep": block(deep, inner), "shallow": max((block(i, self.width) for i in range(deep)), default=0)}

    # --- contract -----------------------------------------------------------------------------------

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters: the output kernels are zero, their biases are not (a constant affine map at the start)."""
        keys = jax.random.split(rng, self.blocks + 1)
        params: Params = {f"block{i}": net.fresh(keys[i]) for i, net in enumerate(self.stack.nets)}
        return {**params, **self.encoders(keys[-1])}

    @property
    def stack(self) -> Stack:
        """The flow over the grid that it is trained on."""
        return self.stack_on((self.rows, self.columns))

    def stack_on(self, grid: tuple[int, int]) -> Stack:
        """The flow over a grid; its parameters serve every grid. The last block is the deep one, nearest the noise."""

        def net(i: int) -> FlowNet:
            lm = self.lm if i == self.blocks - 1 else None
            return FlowNet.of(
                self,
                grid=grid,
                width=lm.width if lm else self.width,
                depth=self.depths[i],
                prefix=self.prefix if self.sees(i) else 0,
                condition_width=self.condition_width if self.prefix else 0,
                learned=self.positions == "learned",
                reverse=i % 2 == (0 if self.order == "L2R" else 1),  # the order of a task is that of its odd blocks
                softplus=self.scale == "softplus",
                norm=self.final_norm,
                lm=lm,
                dims=self.dims,
                start=self.start,
                reach=self.reach,
                clip=self.clip,
            )

        nets = tuple(net(i) for i in range(self.blocks))
        return Stack(nets, grid[0] * grid[1], self.dims, rule="gaussian", annealed=False, first=1)

    def in_tokens(self, x: jax.Array) -> tuple[jax.Array, Stack]:
        """Latents [B, H, W, C] -> tokens [B, T, D], and the flow over their grid, which may differ from the task's."""
        rows, columns = x.shape[1] // self.patch, x.shape[2] // self.patch
        if (rows * self.patch, columns * self.patch) != x.shape[1:3]:
            raise UserError(
                f"task.patch={self.patch} does not divide latents of {x.shape[1]} x {x.shape[2]}; set task.patch=1, or encode "
                f"the images again with `zoo prepare latents multiple={self.factor * self.patch if self.vae else 'N'}`"
            )
        if self.positions == "learned" and (rows, columns) != (self.rows, self.columns):
            raise UserError(
                f"task.positions='learned' has places for {self.rows} x {self.columns} tokens, but there are {rows} x "
                f"{columns}; use task.positions=rope for other grids"
            )
        return patchify(x, self.patch, channel_first=False), self.stack_on((rows, columns))

    def add_noise(self, rng: jax.Array, x: jax.Array) -> jax.Array:
        """x + noise eps."""
        return x + self.noise * jax.random.normal(rng, x.shape)

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """0.5 mean z^2 - logdet, nats per dimension without the constant 0.5 log 2 pi, and a penalty on what enters blocks.

        It keeps the latents between blocks small (appendix on training).
        """
        draw, noise, drop = jax.random.split(rng, 3)
        x, stack = self.in_tokens(self.add_noise(noise, self.clean(params, batch, draw)))
        condition = self.conditions(params, batch, jax.random.bernoulli(drop, self.drop, x.shape[:1]))
        z, logdet, squares = stack.forward(params, x, condition)
        square = jnp.square(z).mean()
        nll = 0.5 * square - logdet.mean()
        metrics = {
            "bits": self._likelihood.bits(nll + 0.5 * LOG_2PI),
            "z_square": square,
            "logdet": logdet.mean(),
            "latent_norm": squares.mean(),
        }
        return nll + self.penalty * squares.mean(), metrics

    def nll(self, params: Params, batch: Batch, keys: jax.Array) -> jax.Array:
        """-log p in nats [B] of noisy latents, with one draw of posterior and noise; uses class or caption where given."""

        def noisy(key: jax.Array, mean: jax.Array, std: jax.Array | None) -> jax.Array:
            draw, noise = jax.random.split(key)
            x = mean if std is None else mean + std * jax.random.normal(draw, mean.shape)
            return self.add_noise(noise, x)

        x, stack = self.in_tokens(jax.vmap(noisy)(keys, *self.posterior(params, batch)))
        return -stack.log_prob(params, x, self.conditions(params, batch))

    @property
    def sigmas(self) -> tuple[float, float]:
        """The one level of noise that it models."""
        return self.noise, self.noise

    def denoise(self, params: Params, x: jax.Array, sigma: jax.Array, conditions: Batch | None = None) -> jax.Array:
        """Tweedie's formula x + sigma^2 grad log p(x) of noisy latents, or pixels, [B, H, W, C] in float32.

        Args:
            conditions: as of `sample`.
        """
        tokens, stack = self.in_tokens(x.astype(jnp.float32))
        condition = self.conditions(params, {**(conditions or {}), "x": x})
        tokens = stack.denoise(params, tokens, jnp.reshape(sigma, (-1, 1, 1)), condition)
        return unpatchify(tokens, self.patch, self.channels, rows=x.shape[1] // self.patch, channel_first=False)

    def sample(
        self,
        params: Params,
        rng: jax.Array,
        n: int,
        conditions: Batch | None = None,
        options: StarFlowSampling | None = None,
    ) -> dict[str, jax.Array]:
        """n samples; sample i depends on (rng, i) alone.

        Args:
            rng: one key, or n keys.
            conditions: `label` [n] (negative: none), or the keys of `given`. None: neither class nor caption.
            options: None: the defaults.

        Returns:
            `latent` [n, H, W, C]; where there is an autoencoder also `image`, decoded and clipped to [-1, 1]. A model of
            pixels gives `image` alone. NaN where the inverse overflowed. And `label` where given; where blocks were swept
            over also `sweeps` and `unconverged` [n, blocks] (`zoo.flows.inverse.Inverted`).
        """
        o = options or StarFlowSampling()
        rows, columns = o.grid or self.latent
        if min(rows, columns) < 1 or rows % self.patch or columns % self.patch:
            raise UserError(
                f"grid={rows},{columns} must be two sizes that task.patch={self.patch} divides, e.g. grid={self.latent[0]},"
                f"{self.latent[1]}"
            )
        keys = sample_keys(rng, n)
        self.stack.guidance(o.guidance).warn(self.asked(conditions))
        z = o.temperature * jax.vmap(lambda k: jax.random.normal(k, (rows, columns, self.channels)))(keys)
        batch = {**(conditions or {}), "z": z}
        condition, null = self._with_null(params, batch, n)
        x, stack = self.in_tokens(constrain(z, "batch"))
        found = stack.inverse(
            params, x, condition, null, o.guidance, attention_temperature=o.attention_temperature, method=o.method
        )
        x = found.states[-1]
        strength = float(self.denoiser == "score" and self.noise > 0) if o.denoise is None else o.denoise
        if not isinstance(strength, (int, float)) or strength:
            x = stack.denoise(params, x, self.noise, condition, strength)
        x = unpatchify(x, self.patch, self.channels, rows=rows // self.patch, channel_first=False)
        return {**self.drawn(params, x, conditions), **found.report}

    def chain(
        self, params: Params, batch: Batch, rng: jax.Array, *, guidance: float | Guidance = 0.0
    ) -> tuple[jax.Array, Chain]:
        """Noisy examples as tokens [B, T, D], and the blocks that map them to noise, with class or caption where given."""
        draw, noise = jax.random.split(rng)
        x, stack = self.in_tokens(self.add_noise(noise, self.clean(params, batch, draw)))
        return x, stack.chain(params, len(x), *self._with_null(params, batch, len(x)), guidance)

    def _with_null(self, params: Params, batch: Batch, n: int) -> tuple[jax.Array | None, jax.Array | None]:
        """The condition of n examples, and what stands for its absence; None for an unconditional model."""
        null = self.conditions(params, batch, jnp.ones(n, bool)) if self.prefix else None
        return self.conditions(params, batch), null

    # --- published weights --------------------------------------------------------------------------

    def import_names(self) -> list[Name]:
        """The layout of the official PyTorch implementation (linear weights stored [out, in]); the encoders are not in it.

        It turns adjacent pairs of numbers by rotary positions, we turn halves: heads are reordered. Unused buffers are
        dropped, and made again on the way back.
        """
        slots = self.tokens + self.prefix
        names = [Name("var", None, value=lambda: np.ones((self.tokens, self.dims), np.float32))]
        if self.positions == "rope":
            table = np.zeros((slots, self.head_dim), np.float32)
            names += [Name(f"feat_rope.freqs_{f}", None, value=lambda: table) for f in ("cos", "sin")]
        for i in range(self.blocks):
            theirs, ours = f"blocks.{i}", f"block{i}"
            lm = self.lm if i == self.blocks - 1 else None
            names.append(Name(f"{theirs}.attn_mask", None, value=lambda: np.tril(np.ones((slots, slots), np.float32))))
            names += linear_names(f"{theirs}.proj_in", f"{ours}/in") + linear_names(f"{theirs}.proj_out", f"{ours}/out")
            if self.start:
                names.append(Name(f"{theirs}.sos_embed", f"{ours}/start", "1 1 d -> d"))
            if self.positions == "learned":
                names.append(Name(f"{theirs}.pos_embed", f"{ours}/positions/table"))
            if self.sees(i) and not lm:
                names += linear_names(f"{theirs}.proj_txt", f"{ours}/condition")
            if self.final_norm:
                names.append(Name(f"{theirs}.final_norm.weight", f"{ours}/norm/scale"))
            for l in range(self.depths[i]):
                old, new = f"{theirs}.attn_blocks.{l}", f"{ours}/trunk/block"
                names += _lm_layer(lm, old, new, l) if lm else layer_names(old, new, l, self.width // self.head_dim)
        return names


def _lm_layer(lm: LanguageModel, theirs: str, ours: str, layer: int) -> list[Name]:
    """A layer of a language model, whose heads come in halves already."""
    norms = {"attention.norm": "attention_norm", "mlp.norm": "mlp_norm"}
    if lm.qk_norm:
        norms |= {f"attention.{long}_norm": f"{long}_norm" for long in ("query", "key")}
    if lm.post_norm:
        norms |= {f"{part}.post_norm": f"{part}_post_norm" for part in ("attention", "mlp")}
    maps = {"attention.qkv": "qkv", "attention.proj": "out"} | {
        f"mlp.{part}_proj": part for part in ("gate", "up", "down")
    }
    return [
        *(Name(f"{theirs}.{old}.weight", f"{ours}/{new}/scale", layer=layer) for old, new in norms.items()),
        *(
            Name(f"{theirs}.{old}.weight", f"{ours}/{new}/kernel", "o i -> i o", layer=layer)
            for old, new in maps.items()
        ),
    ]


def class_conditional(**fields: Any) -> StarFlow:
    """The 1.4 B model of ImageNet: 1,412,255,816 parameters (paper, section 4.1; 18(6)-2048)."""
    return StarFlow(**{"width": 2048, "depths": (2, 2, 2, 2, 2, 18), "classes": 1000, **fields})


def text_to_image(**fields: Any) -> StarFlow:
    """The 3.8 B text-to-image model: 3,858,281,544 parameters of its own (24(6)-3072), captions of 128 tokens."""
    return StarFlow(**{"width": 3072, "depths": (2, 2, 2, 2, 2, 24), "text_tokens": 128, "text_width": 2048, **fields})
