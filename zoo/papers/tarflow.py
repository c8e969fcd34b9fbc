"""TarFlow: Normalizing Flows are Capable Generative Models (arXiv:2412.06329).

A stack of causal transformers over image patches, alternating direction, trained by exact likelihood.
B images, S pixels a side, C channels, P patch, T = (S/P)^2 tokens per image, D = C P P numbers per token.
Order of this file: network, flow, inverse and guidance, score-based denoising, task, published weights.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from zoo.dist import constrain, whole
from zoo.errors import UserError, check_divisor
from zoo.fields import Below1, Count, Dtype, Layers, NonNegative, Side, Size, SizeOr0, check_fields
from zoo.flows.inverse import Before, Chain, Guidance, Inverted, Jacobi, Method, Stepper, invert
from zoo.flows.transforms import LOG_2PI, affine, shift_right
from zoo.nn.attention import Backend, check_backend
from zoo.nn.embed import patchify, unpatchify
from zoo.nn.layers import Dense, Table, zeros
from zoo.nn.transformer import Block, Remat, Trunk, cast_trunk, init_trunk_cache
from zoo.task import About, Batch, Likelihood, Name, Params, sample_keys


class FlowNet(nn.Module):
    """The network of one flow block: tokens up to t -> log-scale and shift of token t + 1."""

    tokens: int
    outputs: int
    width: int
    depth: int
    head_dim: int
    classes: int
    flip: bool
    dtype: str
    scan: bool
    remat: str
    attention: str

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        label: jax.Array | None = None,
        cache: Any = None,
        index: Any = None,
        temperature: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, Any]:
        """x [B, T, D] in the block's own order -> outputs [B, T, outputs] float32, hidden [B, T, width], cache.

        With a cache, x are the tokens from `index` on.
        """
        positions = Table(self.tokens, self.width, name="positions")()
        if self.flip:  # a row of the table belongs to a place in the image, whatever the direction
            positions = positions[::-1]
        if cache is not None:
            positions = jax.lax.dynamic_slice_in_dim(positions, index, x.shape[1])
        h = Dense(self.width, (None, "embed"), dtype=self.dtype, name="in")(x) + positions.astype(self.dtype)
        if self.classes:
            table = Table(self.classes, self.width, name="labels")()
            mean = table.mean(0)  # stands for "no label": there is no null embedding in this paper
            if label is None:
                embedding = mean[None]
            else:
                embedding = jnp.where((label >= 0)[:, None], table[jnp.maximum(label, 0)], mean)
            h = h + embedding[:, None].astype(self.dtype)
        block = Block(self.head_dim, causal=True, dtype=self.dtype, backend=self.attention, parent=None)
        h, cache = Trunk(self.depth, block, self.scan, self.remat, name="trunk")(
            h, cache, index, temperature=temperature
        )
        out = Dense(self.outputs, ("embed", None), kernel_init=zeros, name="out")  # float32: exp() of it compounds
        return out(h), h, cache


def _net(task: TarFlow, t: int) -> FlowNet:
    outputs = task.dims * (2 if task.scale else 1)
    return FlowNet(
        tokens=task.tokens,
        outputs=outputs,
        width=task.width,
        depth=task.depth,
        head_dim=task.head_dim,
        classes=task.classes,
        flip=t % 2 == 1,
        dtype=task.dtype,
        scan=task.scan,
        remat=task.remat,
        attention=task.attention,
    )


def _init_net(task: TarFlow, rng: jax.Array) -> Params:
    """Fresh parameters of one block; directions differ in the forward pass only."""
    fresh: Any = _net(task, 0).init(rng, jnp.zeros((1, task.tokens, task.dims)))
    return fresh["params"]


def _apply(net: FlowNet, params: Params, *inputs: Any) -> tuple[jax.Array, jax.Array, Any]:
    outputs: Any = net.apply({"params": params}, *inputs)
    return outputs


def _order(x: jax.Array, t: int) -> jax.Array:
    """Even blocks run through the image in raster order, odd ones backwards; its own inverse."""
    return x[:, ::-1] if t % 2 else x


def _split(task: TarFlow, outputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-scale (first half; zeros where the flow preserves volume) and shift (second half)."""
    if task.scale:
        a, b = jnp.split(outputs, 2, axis=-1)
        return a, b
    return jnp.zeros_like(outputs), outputs


def flow(
    task: TarFlow, params: Params, x: jax.Array, label: jax.Array | None = None
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Data to noise in tokens: [B, T, D] -> the output of every block (the last is z) and its log-det [B] per dimension."""
    states, logdets = [], []
    for t in range(task.blocks):
        u = _order(x, t)
        outputs, *_ = _apply(_net(task, t), params[f"block{t}"], u, label)
        a, b = _split(task, shift_right(outputs))
        v, logdet = affine(u, a, b)
        x = constrain(_order(v, t), "batch", "tokens", None)
        states.append(x)
        logdets.append(logdet)
    return states, logdets


def forward(
    task: TarFlow, params: Params, image: jax.Array, label: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Data to noise.

    Args:
        image: [B, S, S, C] in about [-1, 1], noise already added.
        label: [B] class numbers, negative for "no label"; None for no label at all.

    Returns:
        z [B, T, D] and logdet [B], the mean over all T D dimensions (times T D: nats).
    """
    chex.assert_shape(image, (None, task.image, task.image, task.channels))
    states, logdets = flow(task, params, patchify(image, task.patch), label)
    return states[-1], sum(logdets[1:], logdets[0])


def _stepper(
    task: TarFlow,
    params: Params,
    t: int,
    batch: int,
    label: jax.Array | None,
    guidance: Guidance,
    before: Before | None,
) -> Stepper:
    """What inverts block t; guided, both passes run as one batch of 2 B."""
    net, tokens = _net(task, t), task.tokens
    guided = guidance.active
    temperature = None
    if guided:
        strong = jnp.full((batch,), -1) if label is None else label
        label = jnp.concatenate([strong, jnp.full((batch,), -1)]) if task.classes else None
        if guidance.tempered:
            temperature = jnp.concatenate([jnp.ones(batch), jnp.full((batch,), guidance.attention_temperature)])
    rows = 2 * batch if guided else batch
    heads = task.width // task.head_dim
    cache = Before.memory(
        before, lambda: init_trunk_cache(task.depth, task.scan, rows, tokens, heads, task.head_dim, task.dtype)
    )
    mine = Before.then(before, params[f"block{t}"])
    block = whole(cast_trunk(mine, task.dtype), lambda: _init_net(task, jax.random.key(0)))

    def step(u: jax.Array, cache: Any, index: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        u = jnp.concatenate([u, u]) if guided else u
        outputs, _, cache = _apply(net, block, u, label, cache, index, temperature)
        a, b = _split(task, outputs)
        if guided:
            ramp = ((index + 1 + jnp.arange(u.shape[1])) / (tokens - 1))[:, None]
            return *guidance.apply((a[:batch], b[:batch]), (a[batch:], b[batch:]), ramp), cache
        return jnp.exp(a), b, cache

    return Stepper(step, cache)


def chain(
    task: TarFlow, params: Params, batch: int, label: jax.Array | None = None, guidance: float | Guidance = 0.0
) -> Chain:
    """The blocks of the flow as their inverse sees them, for `batch` examples."""
    guidance = Guidance.of(guidance, "linear", annealed=True)
    label = label if task.classes else None

    def stepper(t: int, before: Before | None = None) -> Stepper:
        here = guidance if guidance.blocks == "all" or t == task.blocks - 1 else Guidance()
        return _stepper(task, params, t, batch, label, here, before)

    return Chain(task.blocks, stepper, _order, lambda t: params[f"block{t}"]["out"]["kernel"])


def inverse(
    task: TarFlow,
    params: Params,
    z: jax.Array,
    label: jax.Array | None = None,
    guidance: float | Guidance = 0.0,
    *,
    method: str | Jacobi = "sequential",
    sequence: bool = False,
) -> jax.Array:
    """Noise to data, token by token with a key/value cache or by sweeps; jit it with `task` and a `Guidance` static.

    Args:
        z: [B, T, D] drawn from N(0, I); the prior variances are multiplied in here, so the round trip reads
            inverse(forward(x) / sqrt(var)) = x.
        label: [B] class numbers, negative for "no label"; None for no label at all.
        guidance: a weight (annealed, log-scale and shift), or a `Guidance`.
        method: how blocks are inverted, see `zoo.flows.inverse.Jacobi.of`.
        sequence: also return the states on the way.

    Returns:
        image [B, S, S, C], not clipped; with `sequence` [blocks + 1, B, S, S, C]: z before its scaling, then the state
        after each inverted block, the image last.
    """
    states = _invert(task, params, z, label, guidance, method).states
    images = [unpatchify(s, task.patch, task.channels) for s in ([z, *states[1:]] if sequence else states[-1:])]
    return jnp.stack(images) if sequence else images[0]


def _invert(
    task: TarFlow,
    params: Params,
    z: jax.Array,
    label: jax.Array | None,
    guidance: float | Guidance,
    method: str | Jacobi,
) -> Inverted:
    """`inverse` in tokens, with what the method has to tell."""
    chex.assert_shape(z, (None, task.tokens, task.dims))
    guidance = Guidance.of(guidance, "linear", annealed=True)
    if not guidance.active and guidance.tempered:
        warnings.warn(
            "guidance.weight is 0: the other fields of guidance do nothing; set a weight such as 2", stacklevel=2
        )
    unlabelled = task.classes == 0 or label is None
    if guidance.active and unlabelled and not guidance.tempered:
        warnings.warn(
            "guidance without labels and with attention_temperature=1 compares a pass with itself: it changes nothing and "
            "costs twice; give labels, or an attention temperature such as 0.5",
            stacklevel=2,
        )
    return invert(chain(task, params, len(z), label, guidance), z * jnp.sqrt(params["prior"]["var"]), method)


def log_prob(task: TarFlow, params: Params, image: jax.Array, label: jax.Array | None = None) -> jax.Array:
    """log p(image) in nats [B] under N(0, I) on z, of the (noisy) image as it is."""
    z, logdet = forward(task, params, image, label)
    return task.tokens * task.dims * (logdet - 0.5 * jnp.square(z).mean((1, 2)) - 0.5 * LOG_2PI)


def score(task: TarFlow, params: Params, image: jax.Array, label: jax.Array | None = None) -> jax.Array:
    """Gradient of log p (nats, whole image) with respect to each image, [B, S, S, C]."""
    return jax.grad(lambda x: log_prob(task, params, x, label).sum())(image)


def denoise(
    task: TarFlow, params: Params, image: jax.Array, label: jax.Array | None = None, strength: float = 1.0
) -> jax.Array:
    """One step of Tweedie's formula, x + strength sigma^2 score(x): removes the noise the model was trained with.

    Raises:
        UserError: the model was trained with uniform noise, which this formula does not remove.
    """
    if task.noise_type != "gaussian":
        raise UserError(
            f"task.noise_type={task.noise_type!r}: denoising removes Gaussian noise only; sample with denoise=0"
        )
    return image + strength * task.noise**2 * score(task, params, image, label)


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
class TarFlow:
    """Causal transformers over image patches, alternating direction; trained by exact likelihood."""

    image: Side = 64  # pixels a side
    channels: Size = 3
    patch: Side = 2
    width: Size = 768
    depth: Layers = 8  # transformer layers per flow block
    blocks: Layers = 8  # flow blocks
    head_dim: Size = 64
    classes: SizeOr0 = 0  # 0: unconditional
    scale: bool = True  # False: shifts only, a flow that preserves volume
    noise: NonNegative = 0.05  # standard deviation of the Gaussian noise on pixels in [-1, 1]
    noise_type: Literal["gaussian", "uniform"] = "gaussian"  # uniform: dequantisation over `levels` grey levels
    levels: Count = 256  # grey levels of the data, for uniform noise and for bits per dimension
    drop: Below1 = 0.1  # probability that a label is dropped in training
    dtype: Dtype = "float32"  # of activations; log-scales, log-dets and losses stay float32
    scan: bool = (
        True  # scan over the layers of a block (compiles fast); False unrolls (small models on CPU step faster)
    )
    remat: Remat = "none"  # none, dots or full: what the backward pass recomputes
    attention: Backend = "xla"  # xla; cudnn on NVIDIA GPUs in bfloat16; splash on TPUs; auto: whichever the device has

    Sampling = TarFlowSampling

    def __post_init__(self) -> None:
        check_fields(self, "task.")
        if self.image % self.patch:
            fits = [p for p in range(1, self.image + 1) if self.image % p == 0 and self.image // p > 1]
            best = min(fits or [1], key=lambda p: abs(p - self.patch))
            raise UserError(
                f"task.patch={self.patch} does not divide task.image={self.image}; choose a divisor, e.g. task.patch={best}"
            )
        if self.tokens < 2:
            raise UserError(
                f"task.patch={self.patch} makes one token of a {self.image}-pixel image, and a flow needs two; choose a smaller patch"
            )
        check_divisor("head_dim", self.head_dim, "width", self.width)
        check_backend(self.attention, self.dtype)

    @property
    def about(self) -> About:
        """`prior`: variances of z, used when sampling; they move only where scale=False.

        `bpd` is a bound on the data's own bits; with Gaussian noise only those of noisy data can be told.
        """
        return About(classes=self.classes, buffers=("prior",), likelihood=self._likelihood, tokens=self.tokens)

    @property
    def _likelihood(self) -> Likelihood:
        event, bins = (self.image, self.image, self.channels), self.levels / 2
        if self.noise_type == "gaussian":
            return Likelihood(event, "noisy", "noisy_bits_per_dim", bins)
        return Likelihood(event, "bound", bins=bins)

    @property
    def tokens(self) -> int:
        """T, patches of an image."""
        return (self.image // self.patch) ** 2

    @property
    def dims(self) -> int:
        """D, numbers per token."""
        return self.channels * self.patch**2

    def flops(self) -> float:
        """Floating-point operations of one training example: 6 per weight and token, and attention's 6 T^2 width a layer.

        The causal half of the attention counts once (what is masked is no model FLOP); sampling needs a third of it.
        """
        outputs = self.dims * (2 if self.scale else 1)
        weights = self.dims * self.width + self.depth * 12 * self.width**2 + self.width * outputs
        attention = self.depth * self.tokens * self.width  # 2 products x T/2 keys x width multiply-adds per token
        return 6.0 * self.blocks * self.tokens * (weights + attention)

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`image` [B, S, S, C] in [-1, 1], and `label` [B] for a class-conditional model."""
        spec = {"image": jax.ShapeDtypeStruct((batch, self.image, self.image, self.channels), jnp.float32)}
        if self.classes:
            spec["label"] = jax.ShapeDtypeStruct((batch,), jnp.int32)
        return spec

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters: the output kernels are zero, their biases are not (a constant affine map at the start)."""
        # All blocks at once: one graph to compile instead of one per block.
        many = jax.vmap(lambda key: _init_net(self, key))(jax.random.split(rng, self.blocks))
        params: Params = {f"block{t}": jax.tree.map(lambda p, t=t: p[t], many) for t in range(self.blocks)}
        return {**params, "prior": {"var": jnp.ones((self.tokens, self.dims))}}

    def add_noise(self, rng: jax.Array, image: jax.Array) -> jax.Array:
        """What the flow models: image + noise eps, or (k + u) dequantised to [-1, 1) for grey level k."""
        if self.noise_type == "gaussian":
            return image + self.noise * jax.random.normal(rng, image.shape)
        k = jnp.round((image + 1) / 2 * (self.levels - 1))
        return 2 * (k + jax.random.uniform(rng, image.shape)) / self.levels - 1

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """0.5 mean z^2 - logdet: nats per dimension without the constant 0.5 log 2 pi."""
        noise_rng, drop_rng = jax.random.split(rng)
        label = batch.get("label") if self.classes else None
        if label is not None and self.drop:
            label = jnp.where(jax.random.bernoulli(drop_rng, self.drop, label.shape), -1, label)
        z, logdet = forward(self, params, self.add_noise(noise_rng, batch["image"]), label)
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
        label = batch.get("label") if self.classes else None
        return -log_prob(self, params, jax.vmap(self.add_noise)(keys, batch["image"]), label)

    def features(self, params: Params, batch: Batch) -> jax.Array:
        """Mean over tokens of the middle block's last hidden layer, [B, width]; image without noise, no label."""
        x = patchify(batch["image"], self.patch)
        middle = self.blocks // 2
        for t in range(middle + 1):
            u = _order(x, t)
            outputs, hidden, _ = _apply(_net(self, t), params[f"block{t}"], u)
            x = _order(affine(u, *_split(self, shift_right(outputs)))[0], t)
        return hidden.astype(jnp.float32).mean(1)

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
        keys, o = sample_keys(rng, n), options or TarFlowSampling()
        z = o.temperature * jax.vmap(lambda k: jax.random.normal(k, (self.tokens, self.dims)))(keys)
        label = (conditions or {}).get("label") if self.classes else None
        found = _invert(self, params, constrain(z, "batch"), label, o.guidance, o.method)
        image = unpatchify(found.states[-1], self.patch, self.channels)
        strength = float(self.noise_type == "gaussian" and self.noise > 0) if o.denoise is None else o.denoise
        if not isinstance(strength, (int, float)) or strength:
            image = denoise(self, params, image, label, strength)
        drawn = {"image": jnp.where(jnp.isfinite(image), jnp.clip(image, -1, 1), jnp.nan), **found.report}
        return drawn if label is None else {**drawn, "label": label}

    def chain(
        self, params: Params, batch: Batch, rng: jax.Array, *, guidance: float | Guidance = 0.0
    ) -> tuple[jax.Array, Chain]:
        """Noisy examples as tokens [B, T, D], and the blocks that map them to noise; with `label` where the batch has it."""
        x = patchify(self.add_noise(rng, batch["image"]), self.patch)
        return x, chain(self, params, len(x), batch.get("label"), guidance)

    def import_names(self) -> list[Name]:
        """The layout of the official PyTorch implementation (linear weights stored [out, in])."""
        names = [Name("var", "prior/var")]
        for t in range(self.blocks):
            theirs, ours = f"blocks.{t}", f"block{t}"
            names += [
                Name(f"{theirs}.proj_in.weight", f"{ours}/in/kernel", "o i -> i o"),
                Name(f"{theirs}.proj_in.bias", f"{ours}/in/bias"),
                Name(f"{theirs}.pos_embed", f"{ours}/positions/table"),
                Name(f"{theirs}.proj_out.weight", f"{ours}/out/kernel", "o i -> i o"),
                Name(f"{theirs}.proj_out.bias", f"{ours}/out/bias"),
                Name(
                    f"{theirs}.attn_mask", None, value=lambda: np.tril(np.ones((self.tokens, self.tokens), np.float32))
                ),
            ]
            if self.classes:
                names.append(Name(f"{theirs}.class_embed", f"{ours}/labels/table", "c 1 w -> c w"))
            for l in range(self.depth):
                layer, block = f"{theirs}.attn_blocks.{l}", f"{ours}/trunk/block"
                names += [
                    Name(f"{layer}.attention.norm.weight", f"{block}/attention_norm/scale", layer=l),
                    Name(f"{layer}.attention.norm.bias", f"{block}/attention_norm/bias", layer=l),
                    Name(
                        f"{layer}.attention.qkv.weight",
                        f"{block}/attention/qkv/kernel",
                        "(s h) w -> w s h",
                        {"s": 3},
                        l,
                    ),
                    Name(f"{layer}.attention.qkv.bias", f"{block}/attention/qkv/bias", "(s h) -> s h", {"s": 3}, l),
                    Name(f"{layer}.attention.proj.weight", f"{block}/attention/out/kernel", "o i -> i o", layer=l),
                    Name(f"{layer}.attention.proj.bias", f"{block}/attention/out/bias", layer=l),
                    Name(f"{layer}.mlp.norm.weight", f"{block}/mlp_norm/scale", layer=l),
                    Name(f"{layer}.mlp.norm.bias", f"{block}/mlp_norm/bias", layer=l),
                    Name(f"{layer}.mlp.main.0.weight", f"{block}/mlp/up/kernel", "o i -> i o", layer=l),
                    Name(f"{layer}.mlp.main.0.bias", f"{block}/mlp/up/bias", layer=l),
                    Name(f"{layer}.mlp.main.2.weight", f"{block}/mlp/down/kernel", "o i -> i o", layer=l),
                    Name(f"{layer}.mlp.main.2.bias", f"{block}/mlp/down/bias", layer=l),
                ]
        return names
