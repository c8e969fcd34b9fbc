"""TarFlowLM: networks and heads, one flow layer, the stack of them, and its inverse.

B texts, T tokens, V vocabulary, d numbers per token, P tokens per patch, S = T/P steps, C = P d channels of a step,
K components, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from zoo.dist import constrain, gather_before_loop
from zoo.fields import Layers, Size, check_fields
from zoo.flows.inverse import Chain, PreviousBlock, Stepper
from zoo.flows.stack import apply
from zoo.flows.transforms import (
    affine,
    affine_inverse,
    codebook_log_prob,
    mixture,
    mixture_inverse,
    mixture_log_prob,
    normal_log_prob,
    rosenblatt,
    rosenblatt_inverse,
    shift_right,
)
from zoo.nn.embed import rope_angles
from zoo.nn.layers import Dense, LayerNorm, gelu, normal, over_tokens, zeros
from zoo.nn.transformer import Block, Transformer, cast_trunk
from zoo.task import Params

_LOG_SIGMA = (-5.0, 3.0)  # limits of the log-scales of tokens
_LOG_SCALE = (-7.0, 5.0)  # and of a mixture's components
HIDDEN = 128  # D_m of the head that goes channel by channel (section H of the paper); half of it per channel


@dataclass(frozen=True)
class Layer:
    """One flow layer: how it couples a step to those before it, and the transformer that reads those."""

    coupling: Literal["mix1", "mixd", "affine"] = "mix1"
    depth: Layers = 2  # transformer layers
    components: Size = 64  # K; of a tied codebook it is the vocabulary
    maf: bool = True  # mix1, affine: channels of a step follow one another; False: independent given the steps before
    tied: bool = True  # mixd, first layer: its components are the tokens' own Gaussians
    reverse: bool | None = None  # reads right to left; None: every second layer does

    def __post_init__(self) -> None:
        check_fields(self, "task.layers: ")


# --- networks and heads ---------------------------------------------------------------------------


class Context(Transformer):
    """The steps before s -> features of step s."""

    steps: int
    project: bool

    @nn.compact
    def __call__(self, before: jax.Array, cache: Any = None, index: Any = None) -> tuple[jax.Array, Any]:
        """before [B, Q, C], at each step the vector of the step before it -> features [B, Q, W], cache.

        Without a cache Q = S; with one, these are the steps from `index` on. A learned vector stands before the first step.
        """
        start: Any = self.param("start", nn.with_logical_partitioning(normal(0.02), ("embed",)), (self.width,))
        h = before.astype(self.dtype)
        h = Dense(self.width, (None, "embed"), dtype=self.dtype, name="in")(h) if self.project else h
        first = 0 if index is None else index
        at = first + jnp.arange(h.shape[1])
        h = jnp.where((at == 0)[:, None], start.astype(h.dtype), h)
        pairs = self.head_dim // 2
        rope = jnp.asarray(rope_angles(np.arange(self.steps)[:, None], (pairs,)))
        rope = rope if index is None else jax.lax.dynamic_slice_in_dim(rope, index, h.shape[1])
        block = Block(self.head_dim, causal=True, dtype=self.dtype, backend=self.attention, parent=None)
        h, cache = self.trunk(block)(h, cache, index, rope=rope)
        return LayerNorm(name="norm")(h), cache

    @nn.nowrap
    def memory(self, rows: int) -> Any:
        """Empty caches for so many texts."""
        return self.caches(rows, self.steps)


class IndependentHead(nn.Module):
    """Features of a step -> `outputs` numbers for each of its `rows`, at once."""

    rows: int
    outputs: int
    dtype: str
    kernel_init: Any
    bias_init: Any
    axis: str | None = None  # logical axis of the outputs

    @nn.compact
    def __call__(self, f: jax.Array) -> jax.Array:
        """[..., W] -> float32 [..., rows, outputs]."""
        out = Dense(
            (self.rows, self.outputs),
            ("embed", None, self.axis),
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            name="out",
        )
        return out(f).astype(jnp.float32)


def cast_flat(params: Params, dtype: str) -> Params:
    """Parameters of a `IndependentHead` with its kernel in `dtype`, once, before a loop that uses it many times."""
    return {"out": {**params["out"], "kernel": params["out"]["kernel"].astype(dtype)}}


def _channel_features(z: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """What a channel tells those behind it: z [...] , kernel [..., 3, E], bias [..., E] -> [..., E]."""
    triple = jnp.stack([z, jax.nn.elu(z), jax.nn.elu(-z)], -1)
    return gelu(jnp.einsum("...t,...te->...e", triple, kernel) + bias)


def told_by(channels: int) -> int:
    """E, numbers that each channel tells those behind it."""
    return min(max(1, int(HIDDEN * 9 / 16 / max(channels - 1, 1))), 96)


class ChannelHead(nn.Module):
    """The head that goes channel by channel: `outputs` numbers for channel i from the features and channels before i.

    That of Categorical Normalizing Flows (arXiv:2006.09790) without its masks: the kernel from channel j to channel i > j
    is stored for such pairs only.
    """

    channels: int
    outputs: int
    kernel_init: Any
    bias_init: Any

    @nn.compact
    def __call__(self, f: jax.Array, v: jax.Array, solve: Callable[..., jax.Array] | None = None) -> jax.Array:
        """f [..., W] and the step's own channels v [..., C] -> numbers for each channel, float32 [..., C, outputs].

        With `solve` v is what the channels are solved from, [..., C, *], one after the other, and the channels [..., C]
        are returned: solve(v of a channel, its numbers) -> the channel.
        """
        c, m = self.channels, HIDDEN // 2
        e = told_by(c)
        hidden = Dense((c, m), ("embed", None, None), name="context")(f).astype(jnp.float32)
        embed: Any = jnp.zeros((0, 3, e)), jnp.zeros((0, e))
        mix = jnp.zeros((c, c, e, m))  # from channel, to channel
        if c > 1:
            embed = (
                self.param("embed_kernel", normal(3**-0.5), (c - 1, 3, e)),
                self.param("embed_bias", zeros, (c - 1, e)),
            )
            source, target = np.triu_indices(c, 1)
            packed: Any = self.param("mix_kernel", normal((e * (c - 1)) ** -0.5), (len(source), e, m))
            mix = mix.at[source, target].set(packed)
        out: Any = self.param("out_kernel", self.kernel_init, (c, m, self.outputs))
        bias: Any = self.param("out_bias", self.bias_init, (c, self.outputs))
        if solve is None:
            told = _channel_features(v[..., :-1].astype(jnp.float32), *embed)
            hidden = hidden + jnp.einsum("...je,jiem->...im", told, mix[:-1])
            return jnp.einsum("...im,imo->...io", gelu(hidden), out) + bias

        def channel(hidden: jax.Array, of: Any) -> tuple[jax.Array, jax.Array]:
            i, v, (kernel, tell_bias), onward, out, bias = of
            here = jax.lax.dynamic_index_in_dim(hidden, i, -2, keepdims=False)
            z = solve(v, gelu(here) @ out + bias)
            told = _channel_features(z, kernel, tell_bias)
            return hidden + jnp.einsum("...e,iem->...im", told, onward), z

        filled = [jnp.pad(x, ((0, 1), *((0, 0),) * (x.ndim - 1))) for x in embed]  # the last channel tells nobody
        _, z = jax.lax.scan(channel, hidden, (jnp.arange(c), jnp.moveaxis(v, f.ndim - 1, 0), filled, mix, out, bias))
        return jnp.moveaxis(z, 0, -1)


@dataclass(frozen=True)
class Flow:
    """The layers of a flow, at the data first, and what they share."""

    layers: tuple[Layer, ...]  # with all that a layer may leave open filled in; `tied` is False where none is
    contexts: tuple[Context, ...]  # the transformer of each
    dims: int  # d
    patch: int  # P
    mix: bool  # channels of a patch change places between layers
    sigma: float  # of the Gaussians that a layer at the data starts with

    @property
    def steps(self) -> int:
        """S."""
        return self.contexts[0].steps

    @property
    def channels(self) -> int:
        """C."""
        return self.patch * self.dims

    def mixing(self, l: int) -> np.ndarray | None:
        """Where each channel that layer l sees comes from: even ones first, then odd ones, once for each layer before it.

        None where it sees them in the order of the text.
        """
        if not self.mix or self.patch == 1 or l == 0:
            return None
        places = np.arange(self.channels)
        for _ in range(l):
            places = np.concatenate([places[0::2], places[1::2]])
        return places


_TIGHT = 0.2  # half the range of the means of a layer that starts as the identity


def _component_bias(components: int, identity: bool) -> Callable[..., jax.Array]:
    """Initial (weight logits, means, log-scales) [3 K] of each channel: means apart, else they never part.

    As the identity, the mixture has mean 0 and variance 1, and is N(0, 1) up to the fourth power of how far they are apart.
    """
    reach, spread = (_TIGHT, 1.0) if identity else (1.5, 0.5)
    means = np.linspace(-reach, reach, components) if components > 1 else np.zeros(1)
    if identity or components == 1:
        spread = math.sqrt(1 - float(np.square(means).mean()))
    row = np.concatenate([np.zeros(components), means, np.full(components, math.log(spread))])

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(row, dtype), shape)

    return init


def _head(flow: Flow, l: int) -> IndependentHead | ChannelHead:
    """The head of layer l. All layers but the first start as the identity."""
    layer, identity = flow.layers[l], l > 0
    kernel = zeros if identity else normal(0.02)
    if layer.coupling == "mixd":
        return IndependentHead(flow.patch, layer.components, flow.contexts[l].dtype, kernel, zeros, "vocab")
    outputs = 2 if layer.coupling == "affine" else 3 * layer.components
    bias = zeros if layer.coupling == "affine" else _component_bias(layer.components, identity)
    if layer.maf:
        return ChannelHead(flow.channels, outputs, kernel, bias)
    return IndependentHead(flow.channels, outputs, "float32", kernel, bias)


def init_layer(flow: Flow, l: int, rng: jax.Array) -> Params:
    """Fresh parameters of a flow layer: its context, its head, and a codebook where it has one of its own."""
    context_rng, head_rng, codebook_rng = jax.random.split(rng, 3)
    net, layer, head = flow.contexts[l], flow.layers[l], _head(flow, l)
    h, f = jnp.zeros((1, flow.steps, flow.channels)), jnp.zeros((1, 1, net.width))
    context: Any = net.init(context_rng, h)["params"]
    made: Any = head.init(head_rng, f, h[:, :1]) if isinstance(head, ChannelHead) else head.init(head_rng, f)
    params = {"context": context, "head": made["params"]}
    if layer.coupling == "mixd" and not layer.tied:
        count = layer.components
        means, scale = jax.random.normal(codebook_rng, (count, flow.dims)), jnp.float32(flow.sigma)
        if l:  # N(0, I) but for what breaks the symmetry, which in several dimensions has to be little
            means = 0.02 * (means - means.mean(0))
            scale = jnp.sqrt(1 - jnp.square(means).mean())
        params["codebook"] = {"means": means, "log_scales": jnp.broadcast_to(jnp.log(scale), (count,))}
    return params


# --- one flow layer -------------------------------------------------------------------------------


def _split(outputs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-weights, means and log-scales [..., K] of mixtures from the numbers of a head [..., 3 K]."""
    logits, means, log_scales = jnp.split(outputs.astype(jnp.float32), 3, -1)
    return jax.nn.log_softmax(logits), means, jnp.clip(log_scales, *_LOG_SCALE)


def _affine_of(outputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Shift and log-scale of an affine coupling [..., C]."""
    return outputs[..., 0].astype(jnp.float32), jnp.clip(outputs[..., 1].astype(jnp.float32), *_LOG_SCALE)


def codebook_of(params: Params, l: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Means [K, d] and log-scales [K] of the tokens' Gaussians, or of the components of layer l, which may be these."""
    shared = params["codebook"]
    found = shared if l is None else params[f"layer{l}"].get("codebook", shared)
    return found["means"], jnp.clip(found["log_scales"], *_LOG_SIGMA)


def order(flow: Flow, l: int, h: jax.Array) -> jax.Array:
    """[B, S, C] from the order of the text to that of layer l: channels mixed l times, right to left where it reads so."""
    mixing = flow.mixing(l)
    if mixing is not None and h.shape[-1] == flow.channels:  # fresh noise is as good in any order
        h = h[..., mixing]
    return h[:, ::-1] if flow.layers[l].reverse else h


def back(flow: Flow, l: int, h: jax.Array) -> jax.Array:
    """The inverse of `order`."""
    h, mixing = h[:, ::-1] if flow.layers[l].reverse else h, flow.mixing(l)
    return h if mixing is None else h[..., np.argsort(mixing)]


def _tokens_of(flow: Flow, h: jax.Array) -> jax.Array:
    """[..., C] -> [..., P, d]."""
    return h.reshape(*h.shape[:-1], flow.patch, flow.dims)


def couple(
    flow: Flow,
    params: Params,
    l: int,
    h: jax.Array,
    *,
    output: bool = True,
    bridged: bool = False,
    temperature: float = 1.0,
) -> tuple[jax.Array | None, jax.Array]:
    """One layer, data to noise, in the layer's own order.

    Args:
        h: [B, S, C].
        output: False where nobody needs what comes out, which spares a Mix-d layer its loop over dimensions.
        bridged: with a tied codebook, add `bridge` of the vectors to log p(h): they share the densities of all tokens.
        temperature: divides the logits of the weights of a Mix-d layer.

    Returns:
        u [B, S, C] or None, and log p(h) [B] in nats under the layer's mixtures: log |du/dh| = log p(h) - log N(u; 0, I).
    """
    mine, layer, head = params[f"layer{l}"], flow.layers[l], _head(flow, l)
    features, _ = apply(flow.contexts[l], mine["context"], shift_right(h))
    h = h.astype(jnp.float32)
    if layer.coupling == "mixd":
        codebook = codebook_of(params, l)

        def tokenwise(f: jax.Array, h: jax.Array) -> tuple[jax.Array | None, jax.Array]:
            logits, z = apply(head, mine["head"], f) / temperature, _tokens_of(flow, h)
            u, log_p = None, jnp.zeros(z.shape[:-1])
            if output:
                u, log_p = rosenblatt(z, jax.nn.log_softmax(logits), *codebook)
                u = u.reshape(h.shape)
            if bridged or not output:
                densities = codebook_log_prob(z, *codebook)
                if not output:
                    log_p = jax.nn.logsumexp(logits + densities, -1) - jax.nn.logsumexp(logits, -1)
                log_p = log_p - jax.nn.logsumexp(densities, -1) if bridged else log_p
            return u, log_p.sum(-1)

        copies = 4 if output else 1  # of an array [rows, K] that are there at once, more or less
        u, log_p = over_tokens(tokenwise, flow.patch, copies * layer.components, features, h)
        return u, log_p.sum(1)
    outputs = apply(head, mine["head"], features, h) if layer.maf else apply(head, mine["head"], features)
    if layer.coupling == "affine":
        shift, log_scale = _affine_of(outputs)
        u, _ = affine(h, log_scale, shift)
        return u, (normal_log_prob(u) - log_scale).sum((1, 2))
    parts = _split(outputs)
    if not output:
        return None, mixture_log_prob(h, *parts).sum((1, 2))
    u, log_p = mixture(h, *parts)
    return u, log_p.sum((1, 2))


# --- the stack ------------------------------------------------------------------------------------


def forward(
    flow: Flow, params: Params, z: jax.Array, *, last: bool = True, bridged: bool = False
) -> tuple[list[jax.Array], jax.Array]:
    """Data to noise through all layers.

    Args:
        z: [B, T, d] vectors of tokens.
        last: also compute what the last layer gives; its density needs it not, since -log N of its output and the base
            density cancel (equation 9 of the paper).
        bridged: add `bridge` to log p(z), which makes it the bound of the text.

    Returns:
        the output of every layer, steps and channels in the order of the text [B, S, C]; and log p(z) [B] in nats.
    """
    chex.assert_shape(z, (None, flow.steps * flow.patch, flow.dims))
    h = z.reshape(len(z), flow.steps, flow.channels)
    states, total = [], bridge(params, z) if bridged and not flow.layers[0].tied else jnp.zeros(len(z))
    for l, layer in enumerate(flow.layers):
        end, shared = l == len(flow.layers) - 1, bridged and layer.tied
        u, log_p = couple(flow, params, l, order(flow, l, h), output=last or not end, bridged=shared)
        total = total + log_p
        if u is not None:
            h = constrain(back(flow, l, u), "batch", "tokens", None)
            states.append(h)
            total = total if end else total - normal_log_prob(u).sum((1, 2))
    return states, total


def encode(params: Params, tokens: jax.Array, eps: jax.Array | None = None) -> jax.Array:
    """mu_x + sigma_x eps: tokens [B, T] -> vectors [B, T, d]; without `eps` the means (section 3.1)."""
    means, log_sigma = codebook_of(params)
    z = means[tokens]
    return z if eps is None else z + jnp.exp(log_sigma[tokens])[..., None] * eps


def decode(params: Params, z: jax.Array) -> jax.Array:
    """The likeliest token of each vector under the Bayes decoder, a uniform prior over tokens: [B, T, d] -> int32 [B, T].

    A vector that is not finite has none, -1.
    """

    def likeliest(z: jax.Array) -> jax.Array:
        found = codebook_log_prob(z, *codebook_of(params)).argmax(-1).astype(jnp.int32)
        return jnp.where(jnp.isfinite(z).all(-1), found, -1)

    return over_tokens(likeliest, 1, len(params["codebook"]["means"]), z)


def bridge(params: Params, z: jax.Array) -> jax.Array:
    """log p(x|z) - log q(z|x) [B], which does not depend on x: minus the log-sum of all tokens' densities at z (equation 9)."""

    def total(z: jax.Array) -> jax.Array:
        return jax.nn.logsumexp(codebook_log_prob(z, *codebook_of(params)), -1)

    return -over_tokens(total, 1, len(params["codebook"]["means"]), z).sum(1)


def elbo(flow: Flow, params: Params, tokens: jax.Array, eps: jax.Array) -> jax.Array:
    """One-draw lower bound of log p(tokens) [B] in nats (equation 3): tokens [B, T], eps [B, T, d] from N(0, I)."""
    return forward(flow, params, encode(params, tokens, eps), last=False, bridged=True)[1]


# --- inverse --------------------------------------------------------------------------------------


def pick(log_weights: jax.Array, normal: jax.Array) -> jax.Array:
    """A component for each standard normal number [...], by the inverse distribution function of log_weights [..., K]."""
    cumulative = jnp.cumsum(jnp.exp(log_weights), -1)
    total = cumulative[..., -1:]
    at = jax.scipy.special.ndtr(normal)[..., None] * total
    return jnp.minimum((cumulative <= at).sum(-1), (cumulative < total).sum(-1))  # never one of no weight


def take(values: jax.Array, index: jax.Array) -> jax.Array:
    """Of values [..., K] the one at index [...]."""
    return jnp.take_along_axis(values, index[..., None], -1)[..., 0]


def _solver(
    flow: Flow, params: Params, l: int, fresh: bool, temperature: float, top: int | None
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(v [..., C], features of its steps [..., W]) -> h [..., C] with couple(h) = v.

    Where what goes in is `fresh` noise, v is [..., 2 C]: a component is drawn with the second half and a Gaussian with the
    first. It is the distribution of the inverse, without its roots.
    """
    mine, layer, head = params[f"layer{l}"], flow.layers[l], _head(flow, l)

    def channel(v: jax.Array, outputs: jax.Array) -> jax.Array:
        if layer.coupling == "affine":
            shift, log_scale = _affine_of(outputs)
            return affine_inverse(v[..., 0], jnp.exp(log_scale), shift)
        log_weights, means, log_scales = _split(outputs)
        if not fresh:
            return mixture_inverse(v[..., 0], log_weights, means, log_scales)
        k = pick(log_weights, v[..., 1])
        return take(means, k) + jnp.exp(take(log_scales, k)) * v[..., 0]

    def tokenwise(v: jax.Array, features: jax.Array) -> jax.Array:
        means, log_scales = codebook_of(params, l)
        logits = apply(head, mine["head"], features) / temperature
        u = _tokens_of(flow, v[..., : flow.channels])
        kept = None
        if top is not None and top < layer.components:
            logits, kept = jax.lax.top_k(logits, top)
        log_weights = jax.nn.log_softmax(logits)
        if fresh:
            k = pick(log_weights, v[..., flow.channels : flow.channels + flow.patch])
            k = k if kept is None else take(kept, k)
            z = means[k] + jnp.exp(log_scales[k])[..., None] * u
        elif kept is None:
            z = rosenblatt_inverse(u, log_weights, means, log_scales)
        else:  # a codebook for each vector
            few = jnp.vectorize(rosenblatt_inverse, signature="(d),(k),(k,d),(k)->(d)")
            z = few(u, log_weights, means[kept], log_scales[kept])
        return z.reshape(*v.shape[:-1], flow.channels)

    def solve(v: jax.Array, features: jax.Array) -> jax.Array:
        if layer.coupling == "mixd":
            return tokenwise(v, features)
        halves = jnp.stack([v[..., : flow.channels], v[..., -flow.channels :]], -1)  # the second unused where not fresh
        if layer.maf:
            return apply(head, mine["head"], features, halves, channel)
        return channel(halves, apply(head, mine["head"], features))

    return solve


def chain(
    flow: Flow,
    params: Params,
    batch: int,
    *,
    fresh: bool = False,
    temperature: float = 1.0,
    top: int | None = None,
) -> Chain:
    """The layers as their inverse sees them, for `batch` texts; `fresh`: the noise that goes in has 2 C numbers a step."""

    def stepper(l: int, before: PreviousBlock | None = None) -> Stepper:
        net, key = flow.contexts[l], f"layer{l}"
        cache = PreviousBlock.memory(before, lambda: net.memory(batch))
        mine = PreviousBlock.then(before, {**params[key], "context": cast_trunk(params[key]["context"], net.dtype)})
        if flow.layers[l].coupling == "mixd":
            mine = {**mine, "head": cast_flat(mine["head"], net.dtype)}
        mine = gather_before_loop(mine, lambda: init_layer(flow, l, jax.random.key(0)))

        def step(h: jax.Array, cache: Any, index: jax.Array) -> tuple[jax.Array, Any]:
            return apply(net, mine["context"], h, cache, index)

        first = fresh and l == len(flow.layers) - 1
        solve = _solver(flow, {**params, key: mine}, l, first, temperature, top)
        return Stepper(step, cache, jnp.zeros(flow.channels), solve=solve)

    return Chain(len(flow.layers), stepper, lambda h, l: order(flow, l, h), back=lambda h, l: back(flow, l, h))
