"""TarFlowLM: what is trained and sampled, and the discrete language model beside it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from zoo.dist import constrain, gather_before_loop
from zoo.errors import UserError, check_divisor
from zoo.fields import Count, Dtype, Layers, Positive, Share, Size, Some, Vocabulary, Whole, check_fields
from zoo.flows.inverse import Jacobi, Method, Stepper, invert, sequential, swept
from zoo.flows.transforms import shift_right
from zoo.nn.attention import Backend, check_backend
from zoo.nn.layers import Table, normal, over_tokens, zeros
from zoo.nn.transformer import Remat, cast_trunk, check_rotary
from zoo.papers.tarflow_lm import model
from zoo.papers.tarflow_lm.model import Context, Flow, IndependentHead, Layer, apply, cast_flat, take
from zoo.task import About, Batch, Likelihood, Network, Params, sample_keys


def _check_common(task: Any) -> None:
    check_fields(task, "task.")
    check_rotary(task.width, task.head_dim)
    check_backend(task.attention, task.dtype)


@dataclass(frozen=True)
class TarFlowLMSampling:
    """How texts are drawn."""

    temperature: Positive = 1.0  # divides the logits of the weights of Mix-d layers; other layers have only `shrink`
    shrink: Positive = 1.0  # factor on the standard deviation of the noise
    strength: Share = 0.5  # in [0, 1], how much of the noise of a given text is new: 0 gives it back, 1 forgets it
    top: Count | None = None  # Mix-d layers keep so many of their likeliest components only; None: all
    passes: bool = False  # also give what every layer makes of the text
    method: Method | Jacobi = "auto"  # how layers are inverted (`zoo.flows.inverse.Jacobi`); auto is token by token

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class TarFlowLM:
    """A Gaussian for every token, and flows over the vectors; trained on a lower bound of the likelihood."""

    vocab: Vocabulary = 27  # V
    length: Size = 256  # T, tokens of a text
    dims: Size = 5  # d, numbers per token
    patch: Size = 1  # P, tokens that a step models together
    layers: Some[Layer] = (Layer("mixd", depth=8, components=27), Layer(components=2), Layer(components=2))
    width: Size = 768
    head_dim: Size = 64
    stage: Whole = (
        0  # k: the first k groups of layers, of which the last is trained and the others are held; 0: all at once
    )
    groups: tuple[Layers, ...] = ()  # layers of each stage; (): one each
    mix: bool = (
        True  # channels of a patch change places between layers (Algorithm 2); patches of one token have none to
    )
    sigma: Positive = 0.3  # standard deviation of the Gaussian of a token at the start; their means start from N(0, I)
    dtype: Dtype = "float32"  # of activations; mixtures, log-dets and losses stay float32
    scan: bool = True  # scan over transformer layers (compiles fast); False unrolls (small models on CPU step faster)
    remat: Remat = "none"  # none, dots or full: what the backward pass recomputes
    attention: Backend = "xla"  # xla; cudnn on NVIDIA GPUs in bfloat16; splash on TPUs; auto: whichever the device has

    Sampling = TarFlowLMSampling

    def __post_init__(self) -> None:
        _check_common(self)
        check_divisor("patch", self.patch, "length", self.length)
        if self.groups and sum(self.groups) != len(self.layers):
            raise UserError(
                f"task.groups={self.groups} must share out the {len(self.layers)} layers of task.layers; leave it out for one each"
            )
        stages = len(self.groups or self.layers)
        if self.stage > stages:
            raise UserError(
                f"task.stage={self.stage} is no stage; there are {stages}, from 1, and 0 trains all at once"
            )
        if self.mix and self.patch > 1 and self.channels % 2:
            raise UserError(
                f"task.mix: halves of {self.channels} channels (task.patch={self.patch} times task.dims={self.dims}) change "
                "places, which must be even; choose an even one of the two, or task.mix=false"
            )
        for l, layer in enumerate(self.layers):
            name = f"task.layers.{l}"
            if self.is_tied(l) and layer.components != self.vocab:
                raise UserError(
                    f"{name}.components={layer.components}, but a tied codebook has one for each of task.vocab={self.vocab} tokens; "
                    f"set {name}.components={self.vocab}, or {name}.tied=false"
                )

    @property
    def flow_layers(self) -> int:
        """How many this stage has, with those of earlier ones."""
        return sum((self.groups or (1,) * len(self.layers))[: self.stage]) if self.stage else len(self.layers)

    @property
    def about(self) -> About:
        """`nll` is a bound, from one draw of vectors. Tokens' Gaussians and layers of earlier stages come from their runs."""
        return About(
            unit="sequences",
            completes=("tokens",),
            networks=dict.fromkeys(self._done, Network()),
            likelihood=Likelihood((self.length,), "bound"),
            vocabulary=self.vocab,
        )

    @property
    def _done(self) -> tuple[str, ...]:
        """The tokens' Gaussians and the layers that earlier stages trained."""
        if self.stage < 2:
            return ()
        done = sum((self.groups or (1,) * len(self.layers))[: self.stage - 1])
        return ("codebook", *(f"layer{l}" for l in range(done)))

    @property
    def steps(self) -> int:
        """S, steps of a text."""
        return self.length // self.patch

    @property
    def channels(self) -> int:
        """C, numbers of a step."""
        return self.patch * self.dims

    def flops(self) -> float:
        """Floating-point operations of one training text: two per weight and step, six where a gradient is taken.

        What a causal mask hides is no work, and the loops that invert nothing are left out.
        """
        width, held = self.width, self._done
        total = 0.0 if self.is_tied(0) else self.length * self.vocab * self.dims * (2.0 if held else 6.0)
        c = self.channels
        for l, layer in enumerate(self.flow.layers):
            outputs = 2 if layer.coupling == "affine" else 3 * layer.components
            if layer.coupling == "mixd":
                head = self.patch * layer.components * (width + self.dims)
            elif layer.maf:
                half, e = model.HIDDEN // 2, model.told_by(c)
                head = c * half * (width + outputs) + (c - 1) * e * (3 + c * half // 2)
            else:
                head = c * width * outputs
            weights = self.steps * (c * width + layer.depth * 12 * width**2 + head)
            total += (weights + layer.depth * self.steps**2 * width) * (2.0 if f"layer{l}" in held else 6.0)
        return total

    def is_tied(self, l: int) -> bool:
        """Whether the components of layer l are the tokens' Gaussians."""
        return l == 0 and self.layers[0].coupling == "mixd" and self.layers[0].tied

    @property
    def flow(self) -> Flow:
        """The layers of this stage."""
        layers = [
            dataclasses.replace(
                layer,
                components=self.vocab if self.is_tied(l) else layer.components,
                tied=self.is_tied(l),
                reverse=l % 2 == 1 if layer.reverse is None else layer.reverse,
            )
            for l, layer in enumerate(self.layers[: self.flow_layers])
        ]
        contexts = [Context.of(self, depth=layer.depth, steps=self.steps, project=True) for layer in layers]
        return Flow(tuple(layers), tuple(contexts), self.dims, self.patch, self.mix, self.sigma)

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`tokens` [B, T]."""
        return {"tokens": jax.ShapeDtypeStruct((batch, self.length), jnp.int32)}

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters; every layer but the first starts as the identity."""
        flow, keys = self.flow, jax.random.split(rng, self.flow_layers + 1)
        codebook = {
            "means": jax.random.normal(keys[0], (self.vocab, self.dims)),
            "log_scales": jnp.full((self.vocab,), math.log(self.sigma)),
        }
        return {
            "codebook": codebook,
            **{f"layer{l}": model.init_layer(flow, l, keys[l + 1]) for l in range(self.flow_layers)},
        }

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Minus the one-draw bound, nats per token."""
        loss = (
            -model.elbo(self.flow, params, batch["tokens"], self._normal(rng, len(batch["tokens"]))).mean()
            / self.length
        )
        means, log_sigma = model.codebook_of(params)
        # the scale of vectors is free: one that runs away breaks the limits of log-scales
        scales = {"codebook_rms": jnp.sqrt(jnp.square(means).mean()), "sigma": jnp.exp(log_sigma.mean())}
        return loss, {"bits": loss / math.log(2), **scales}

    def nll(self, params: Params, batch: Batch, keys: jax.Array) -> jax.Array:
        """An upper bound of -log p [B] of the whole text in nats, from one draw of its vectors."""
        tokens = batch["tokens"]
        return -model.elbo(self.flow, params, tokens, self._normal(keys, len(tokens)))

    def _normal(self, rng: jax.Array, n: int) -> jax.Array:
        """Standard normal numbers [n, T, d] of one key, or of n keys."""
        shape = (self.length, self.dims)
        if jnp.ndim(rng):
            return jax.vmap(lambda key: jax.random.normal(key, shape))(rng)
        return jax.random.normal(rng, (n, *shape))

    def sample(
        self,
        params: Params,
        rng: jax.Array,
        n: int,
        conditions: Batch | None = None,
        options: TarFlowLMSampling | None = None,
    ) -> dict[str, jax.Array]:
        """n texts; text i depends on (rng, i) alone, and on its condition.

        The layer at the noise draws a component and then a Gaussian, which is the distribution of its inverse without the
        search for roots; where its noise is shrunk, swept over or that of a text, it is inverted like all others.

        Args:
            rng: one key, or n keys.
            conditions: `tokens` [n, T], texts to rewrite; None: texts out of nothing.
            options: None: the defaults.

        Returns:
            `tokens` int32 [n, T], -1 where the inverse overflowed. With `passes` also the text after each layer, that of
            the noise first and the sample last, `passes` int32 [n, layers + 1, T], and its vectors `latents` [n, layers + 1,
            T, d] (section 4). Where layers were swept over `sweeps` and `unconverged` (`zoo.flows.inverse.Inverted`).
        """
        o = options or TarFlowLMSampling()
        mixd = any(layer.coupling == "mixd" for layer in self.layers[: self.flow_layers])
        for name, value, plain in (("temperature", o.temperature, 1), ("top", o.top, None)):
            if not mixd and isinstance(value, (int, float)) and value != plain:
                raise UserError(
                    f"{name}={value} chooses among the components of Mix-d layers, and this model has none; use shrink=, which "
                    "scales the noise of all layers"
                )
        flow, keys, text = self.flow, sample_keys(rng, n), (conditions or {}).get("tokens")
        shape, last = (self.steps, self.channels), self.flow_layers - 1
        u = constrain(jax.vmap(lambda key: jax.random.normal(key, shape))(keys), "batch")
        plan, shrinks = (
            Jacobi.of(o.method).block(last, last + 1),
            not isinstance(o.shrink, (int, float)) or o.shrink != 1,
        )
        fresh = text is None and not shrinks and not swept(plan, self.steps)
        if fresh:
            picks = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 1), shape))(keys)
            u = jnp.concatenate([u, constrain(picks, "batch")], -1)
        elif text is not None:
            # vectors as in training, so that their noise is N(0, I); their means where the text is to come back
            eps = self._normal(jax.vmap(jax.random.fold_in, (0, None))(keys, 2), n)
            states, _ = model.forward(flow, params, model.encode(params, text, jnp.where(o.strength > 0, eps, 0.0)))
            u = jnp.sqrt(1 - jnp.square(o.strength)) * states[-1] + o.strength * u
        chain = model.chain(flow, params, n, fresh=fresh, temperature=o.temperature, top=o.top)
        found = invert(chain, u if fresh else o.shrink * u, o.method)
        z = found.states[-1].reshape(n, self.length, self.dims)
        drawn = {"tokens": model.decode(params, z), **found.report}
        if not o.passes:
            return drawn
        states = found.states
        if fresh:  # the noise that the layer would have been inverted from
            before = model.order(flow, last, states[1])
            noise, _ = model.couple(flow, params, last, before, temperature=o.temperature)
            assert noise is not None
            states = [model.back(flow, last, noise), *states[1:]]
        latents = jnp.stack([h.reshape(n, self.length, self.dims) for h in states], 1)
        texts = model.decode(params, latents.reshape(-1, self.length, self.dims)).reshape(n, -1, self.length)
        return {**drawn, "passes": texts, "latents": latents}


@dataclass(frozen=True)
class DiscreteLMSampling:
    """How texts are drawn."""

    temperature: Positive = 1.0  # divides the logits

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class DiscreteLM:
    """The usual language model with the same transformer, by which the flows are measured: p(x_t | x_<t) as a softmax."""

    vocab: Vocabulary = 27
    length: Size = 256
    width: Size = 768
    depth: Layers = 12
    head_dim: Size = 64
    dtype: Dtype = "float32"
    scan: bool = True
    remat: Remat = "none"
    attention: Backend = "xla"

    Sampling = DiscreteLMSampling

    def __post_init__(self) -> None:
        _check_common(self)

    @property
    def about(self) -> About:
        """An exact likelihood."""
        return About(unit="sequences", likelihood=Likelihood((self.length,)), vocabulary=self.vocab)

    def flops(self) -> float:
        """Floating-point operations of one training text, as of `TarFlowLM.flops`."""
        weights = self.depth * 12 * self.width**2 + self.width * self.vocab
        return 6.0 * (self.length * weights + self.depth * self.length**2 * self.width)

    def _context(self) -> Context:
        return Context.of(self, steps=self.length, project=False)

    def _head(self) -> IndependentHead:
        return IndependentHead(1, self.vocab, self.dtype, normal(0.02), zeros, "vocab")

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`tokens` [B, T]."""
        return {"tokens": jax.ShapeDtypeStruct((batch, self.length), jnp.int32)}

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters."""
        keys = jax.random.split(rng, 3)
        table: Any = Table(self.vocab, self.width, std=0.02).init(keys[0])
        context: Any = self._context().init(keys[1], jnp.zeros((1, self.length, self.width)))
        head: Any = self._head().init(keys[2], jnp.zeros((1, 1, self.width)))
        return {"embedding": table["params"], "context": context["params"], "head": head["params"]}

    def nll(self, params: Params, batch: Batch, keys: jax.Array | None = None) -> jax.Array:
        """-log p [B] of the whole text in nats, without noise."""
        tokens = batch["tokens"]

        def cross_entropy(f: jax.Array, tokens: jax.Array) -> jax.Array:
            logits = apply(self._head(), params["head"], f)[..., 0, :]
            return jax.nn.logsumexp(logits, -1) - take(logits, tokens)

        return over_tokens(cross_entropy, 1, self.vocab, self._features(params, tokens), tokens).sum(1)

    def _features(self, params: Params, tokens: jax.Array) -> jax.Array:
        """[B, T, W], each of the tokens before it."""
        table = params["embedding"]["table"]
        x = table[tokens] if tokens.ndim == 2 else tokens @ table
        return apply(self._context(), params["context"], shift_right(x))[0]

    def predict(self, params: Params, tokens: jax.Array) -> jax.Array:
        """log p(x_t | x_<t) float32 [B, T, V] of tokens [B, T], or of rows [B, T, V] in place of them."""

        def logs(f: jax.Array) -> jax.Array:
            return jax.nn.log_softmax(apply(self._head(), params["head"], f)[..., 0, :])

        return over_tokens(logs, 1, self.vocab, self._features(params, tokens))

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Cross-entropy, nats per token."""
        loss = self.nll(params, batch).mean() / self.length
        return loss, {"bits": loss / math.log(2)}

    def sample(
        self,
        params: Params,
        rng: jax.Array,
        n: int,
        conditions: Batch | None = None,
        options: DiscreteLMSampling | None = None,
    ) -> dict[str, jax.Array]:
        """n texts `tokens` int32 [n, T], token by token with a cache; text i depends on (rng, i) alone."""
        temperature = (options or DiscreteLMSampling()).temperature
        picks = jax.vmap(lambda key: jax.random.normal(key, (self.length, 1)))(sample_keys(rng, n))
        cache = self._context().memory(n)
        context, head = cast_trunk(params["context"], self.dtype), cast_flat(params["head"], self.dtype)
        mine = {**params, "context": context, "head": head}
        mine = gather_before_loop(mine, lambda: self.init(jax.random.key(0)))

        def step(x: jax.Array, cache: Any, index: jax.Array) -> tuple[jax.Array, Any]:
            embedded = mine["embedding"]["table"][x[..., 0].astype(jnp.int32)]
            return apply(self._context(), mine["context"], embedded, cache, index)

        def solve(v: jax.Array, features: jax.Array) -> jax.Array:
            logits = apply(self._head(), mine["head"], features)[..., 0, :] / temperature
            return model.pick(jax.nn.log_softmax(logits), v[..., 0])[..., None].astype(jnp.float32)

        ids, _ = sequential(Stepper(step, cache, jnp.zeros(1), solve=solve), constrain(picks, "batch"))
        return {"tokens": ids[..., 0].astype(jnp.int32)}
