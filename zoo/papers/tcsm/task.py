"""TCSM: what is trained and sampled: a denoiser matched to a target, and its correction by a ratio (arXiv:2504.16431).

B texts, T tokens, V vocabulary, K candidates for a position.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from msgspec import Meta

from zoo.diffusion.tokens import Kernel, Masked, Schedule, Times, Uniform, antithetic, inside, reveal, sharpened
from zoo.dist import constrain, gather_before_loop
from zoo.errors import UserError
from zoo.fields import Dtype, Layers, Positive, Share, Size, Vocabulary, check_fields
from zoo.nn.attention import Backend, check_backend
from zoo.nn.layers import over_tokens
from zoo.nn.transformer import Remat, cast_trunk, check_rotary
from zoo.papers.tcsm.model import Beside, Body, Embed, Head, Scalar, apply
from zoo.papers.tcsm.objectives import (
    Objective,
    Ratio,
    distribution,
    ratio,
    score,
    score_entropy,
    score_entropy_uniform,
)
from zoo.papers.tcsm.targets import Target, given_noise, one_hot
from zoo.task import About, Batch, Likelihood, Network, Params, sample_keys

Steps = Annotated[int, Meta(ge=1, le=2**16)]
Mass = Annotated[float, Meta(gt=0, le=1)]
Candidates = Annotated[int, Meta(ge=1, le=2**10)]
ALIKE = ("kernel", "head_dim")  # of a denoiser's network, what no shape of a parameter shows


@dataclass(frozen=True)
class TcsmSampling:
    """How texts are drawn."""

    steps: Steps = 64  # calls of the network
    temperature: Positive = 1.0  # divides the logits
    top_p: Mass = 1.0  # the fewest likeliest tokens that hold so much of the probability
    strength: Share = 0.5  # share of a given text that is hidden and drawn anew: 0 gives it back, 1 forgets it

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def network_calls(self) -> int:
        """For one text."""
        return self.steps


@dataclass(frozen=True)
class TcsmRatioSampling(TcsmSampling):
    """How texts are drawn: every step of the reference proposes candidates, and the ratio chooses one."""

    candidates: Candidates = 4

    @property
    def network_calls(self) -> int:
        """For one text: of the denoiser, and of the ratio for every candidate."""
        return self.steps * (1 + self.candidates)


@dataclass(frozen=True)
class Reader:
    """What the tasks share: a transformer that sees all tokens of a text."""

    vocab: Vocabulary = 27  # V
    length: Size = 256  # T, tokens of a text
    width: Size = 768
    depth: Layers = 12
    head_dim: Size = 64
    dtype: Dtype = "float32"  # of hidden layers; losses stay float32
    scan: bool = True  # scan over layers (compiles fast); False unrolls (small models on CPU step faster)
    remat: Remat = "none"  # none, dots or full: what the backward pass recomputes
    attention: Backend = "xla"  # xla; cudnn on NVIDIA GPUs in bfloat16; splash on TPUs; auto: whichever the device has

    def __post_init__(self) -> None:
        check_fields(self, "task.")
        check_rotary(self.width, self.head_dim)
        check_backend(self.attention, self.dtype)

    @property
    def body(self) -> Body:
        """The transformer, without embeddings and outputs."""
        names = ("length", "width", "depth", "head_dim", "dtype", "scan", "remat", "attention")
        return Body(**{name: getattr(self, name) for name in names}, time=False)

    def init_reader(self, rng: jax.Array, **last: nn.Module) -> Params:
        """Fresh parameters of the embeddings, the transformer, and what reads its features."""
        keys, h = jax.random.split(rng, 3), jnp.zeros((1, self.length, self.width))
        made: dict[str, Any] = {
            "embed": Embed(self.vocab, self.width).init(keys[0], jnp.zeros((1, 1), jnp.int32)),
            "body": self.body.init(keys[1], h, jnp.zeros(1)),
            **{name: module.init(keys[2], h) for name, module in last.items()},
        }
        return {name: part["params"] for name, part in made.items()}


@dataclass(frozen=True)
class Denoiser(Reader):
    """A process that hides tokens, and under `net` the parameters of a network that tells them all at once."""

    kernel: Literal["masked", "uniform"] = "masked"  # what becomes of a token: MASK, or any of the vocabulary
    schedule: Schedule = "loglinear"  # of the noise: loglinear, cosine or geometric
    time: bool = False  # the network is told the noise; masked tokens tell it by themselves

    Sampling = TcsmSampling

    @property
    def told(self) -> dict[str, Any]:
        """What of `About` follows from this: texts, whose holes it fills in."""
        texts = {"unit": "sequences", "vocabulary": self.vocab, "tokens": self.length}
        return {**texts, "completes": ("tokens",), "holes": True}

    @property
    def body(self) -> Body:
        """As of `Reader`, told the noise where `time` is set."""
        return super().body.clone(time=self.time)

    @property
    def process(self) -> Kernel:
        """What hides tokens."""
        return Masked(self.vocab) if self.kernel == "masked" else Uniform(self.vocab)

    @property
    def times(self) -> Times:
        """How much is hidden when."""
        return Times(self.schedule)

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`tokens` [B, T]."""
        return {"tokens": jax.ShapeDtypeStruct((batch, self.length), jnp.int32)}

    @property
    def plain(self) -> Tcsm:
        """The denoiser that its network may come from."""
        return Tcsm(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Denoiser)}, weight="one")

    def init_net(self, rng: jax.Array) -> Params:
        """Fresh parameters of a denoiser, which finds all tokens equally likely."""
        return self.init_reader(rng, head=Head(self.vocab, self.dtype))

    def compared(
        self, net: Params, xt: jax.Array, noise: jax.Array, call: Callable[..., jax.Array], *arrays: jax.Array
    ) -> jax.Array:
        """call(outputs [B, S, V], x_t, noise [B, S], arrays [B, S, ...]) -> [B, S] for all positions, a part of a long text at a time.

        Args:
            net: parameters of a denoiser: `params["net"]`, or those of a frozen one.
            noise: [B].
        """
        h = apply(self.body, net["body"], apply(Embed(self.vocab, self.width), net["embed"], xt), noise)
        each = jnp.broadcast_to(noise[:, None], xt.shape)

        def part(h: jax.Array, *own: jax.Array) -> jax.Array:
            return call(apply(Head(self.vocab, self.dtype), net["head"], h), *own)

        return over_tokens(part, 1, self.vocab, h, xt, each, *arrays)

    def log_p(self, net: Params, xt: jax.Array, noise: jax.Array) -> jax.Array:
        """log p(x0 | x_t) [B, T, V] of every position by itself, float32; a token that is not noisy is itself."""

        def all_of(outputs: jax.Array, xt: jax.Array, noise: jax.Array) -> jax.Array:
            kernel = self.process
            known = kernel.factor(xt, jnp.arange(self.vocab), noise)
            return jnp.where(kernel.noisy(xt)[..., None], jax.nn.log_softmax(outputs), known)

        return self.compared(net, xt, noise, all_of)

    def nelbo(self, net: Params, tokens: jax.Array, xt: jax.Array, t: jax.Array) -> jax.Array:
        """-log p [B] of whole texts in nats is at most the mean of this over times t [B] in [0, 1] and x_t [B, T]; differentiable.

        Of masked tokens it is the cross-entropy times -alpha' / (1 - alpha) (arXiv:2406.07524, equation 11), of others SEDD's
        loss (arXiv:2310.16834) of the scores that the denoiser implies, and what the end of the schedule remembers.
        """
        noise = self.times.noise(t)
        each = self._losses(net, xt, noise, one_hot(tokens), "distribution" if self.kernel == "masked" else "sedd")
        weight = self.times.weight(t) if self.kernel == "masked" else self.times.rate(t)
        return weight * each.sum(1) + self.length * self.process.prior(self.times.noise(jnp.ones(())))

    def _losses(self, net: Params, xt: jax.Array, noise: jax.Array, target: Target, objective: Objective) -> jax.Array:
        """The objective [B, T], 0 where x_t is not noisy."""
        kernel, vocab = self.process, self.vocab

        def losses(outputs: jax.Array, xt: jax.Array, noise: jax.Array, log: jax.Array, *ids: jax.Array) -> jax.Array:
            own = Target(ids[0] if ids else None, log, target.weight)
            log_p = jax.nn.log_softmax(outputs)
            if objective == "distribution":
                return distribution(log_p, own)
            if objective != "sedd":
                return score(objective, log_p, own)
            if isinstance(kernel, Masked):
                return score_entropy(outputs - math.log(vocab), own)  # which starts as of sum one
            return score_entropy_uniform(jnp.log(kernel.forward(log_p, xt, noise, noise)), own, xt, noise)

        found = self.compared(net, xt, noise, losses, target.log, *([] if target.ids is None else [target.ids]))
        return jnp.where(kernel.noisy(xt), found, 0.0)

    def hidden(self, rng: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(t [B], x_t [B, T]) of one key, with times spread over the batch, or of B keys, each for its own text."""
        if not jnp.ndim(rng):
            when, what = jax.random.split(rng)
            t = antithetic(when, len(tokens))
            return t, self.process.corrupt(what, tokens, self.times.noise(t)[:, None])
        pairs = jax.vmap(jax.random.split)(rng)
        t = inside(jax.vmap(jax.random.uniform)(pairs[:, 0]))
        return t, jax.vmap(self.process.corrupt)(pairs[:, 1], tokens, self.times.noise(t))

    def _whole(self, net: Params) -> Params:
        """Parameters as a loop needs them."""
        net = {**net, "body": cast_trunk(net["body"], self.dtype)}
        return gather_before_loop(net, lambda: self.init_net(jax.random.key(0)))

    def proposed(self, params: Params, options: Any) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
        """The denoiser that a sampler asks: (x_t [n, T], noise [n], keys [n]) -> log p [n, T, V], as sharp as the options say."""
        net = self._whole(params["net"])

        def ask(x: jax.Array, noise: jax.Array, keys: jax.Array) -> jax.Array:
            log_p = self.log_p(net, x, noise)
            return sharpened(log_p, options.temperature, options.top_p)

        return ask

    def sample(
        self, params: Params, rng: jax.Array, n: int, conditions: Batch | None = None, options: Any = None
    ) -> dict[str, jax.Array]:
        """n texts `tokens` int32 [n, T], revealed in so many steps.

        Args:
            conditions: `tokens` [n, T]. A text with holes, tokens of -1, is filled in; of one without, a share `strength` is
                hidden and drawn anew. All else comes back as it is. None: texts out of nothing.
        """
        o = options or self.Sampling()
        pairs = jax.vmap(lambda key: jax.random.split(key, 3))(sample_keys(rng, n))
        keys, kernel = pairs[:, 0], self.process
        blank = jax.vmap(lambda key: kernel.corrupt(key, jnp.zeros(self.length, jnp.int32), jnp.ones(())))(pairs[:, 1])
        start, known, share = constrain(blank, "batch"), None, jnp.ones(n)
        text = (conditions or {}).get("tokens")
        if text is not None:
            hole = text < 0
            again = jax.vmap(lambda key: jax.random.uniform(key, (self.length,)))(pairs[:, 2]) < o.strength
            known = ~jnp.where(hole.any(1, keepdims=True), hole, again)
            start = jnp.where(known, text, blank)
            if self.kernel == "masked":  # given tokens beside replaced ones are a text of no noise
                share = (~known).mean(1)
        ask = self.proposed(params, o)

        def denoise(x: jax.Array, noise: jax.Array, keys: jax.Array) -> jax.Array:
            return ask(x, noise * share, keys)  # the share of all that is hidden, as in training

        return {"tokens": reveal(keys, denoise, kernel, self.times.grid(o.steps), start, known)}


@dataclass(frozen=True)
class Tcsm(Denoiser):
    """A denoiser matched to a target: to data it is MDLM as it stands, and SEDD with `objective="sedd"` and `time=True`.

    Another target is a subclass whose `target` says what texts are matched to; the loss, the bound and the sampler stay. It may
    hold frozen networks (`about.networks`) and buffers, which `target` reads from `params` and moves by what it logs: whatever it
    returns besides the target is among the metrics of the loss, arrays for `after_step`. `init` of such a class adds to
    `{"net": self.init_net(rng)}`. One that compares whole texts takes `hidden` and `nelbo` for a loss of its own.
    """

    objective: Objective = "distribution"  # cross-entropy; of concrete scores squared, gkl or is; sedd: of noisy ratios
    weight: Literal["nelbo", "one"] = "nelbo"  # of times: that of the likelihood's bound, or the same for all

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel == "uniform" and self.objective != "sedd" and self.weight == "nelbo":
            raise UserError(
                f"task.weight='nelbo' with task.kernel='uniform' is of task.objective='sedd', and here it is {self.objective!r}; set "
                "task.weight=one, or that objective"
            )

    @property
    def about(self) -> About:
        """`nll` is a bound, from one draw of a time and of what is hidden."""
        return About(**self.told, likelihood=Likelihood((self.length,), "bound", weighted=False))

    def flops(self) -> float | None:
        """Floating-point operations of one training text: two per weight and token, six with the gradient. None beside other networks."""
        if self.about.networks:
            return None
        weights = self.depth * 12 * self.width**2 + self.width * self.vocab
        return 6.0 * (self.length * weights + 2 * self.depth * self.length**2 * self.width)

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters."""
        return {"net": self.init_net(rng)}

    def target(
        self, params: Params, batch: Batch, xt: jax.Array, rng: jax.Array
    ) -> tuple[Target, dict[str, jax.Array]]:
        """What the denoiser is matched to at x_t [B, T], and metrics: here the data. No gradient passes it."""
        return one_hot(batch["tokens"]), {}

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The objective, a mean over tokens with the weights of times and of the target; in nats where it is a bound of -log p of data."""
        draw, own = jax.random.split(rng)
        t, xt = self.hidden(draw, batch["tokens"])
        noise = self.times.noise(t)
        target, metrics = self.target(params, batch, xt, own)
        target = jax.lax.stop_gradient(given_noise(target, self.process, xt, noise[:, None]))
        each = self._losses(params["net"], xt, noise, target, self.objective)
        if self.weight == "nelbo":
            uniform = self.kernel == "uniform"
            each = each * (self.times.rate(t) if uniform else self.times.weight(t))[:, None]
        loss = (each * target.weight.reshape(len(each), -1)).mean()
        data = type(self).target is Tcsm.target
        bound = data and self.weight == "nelbo" and self.objective in ("distribution", "sedd")
        return loss, {**({"bits": loss / math.log(2)} if bound else {}), **metrics}

    def nll(self, params: Params, batch: Batch, keys: jax.Array) -> jax.Array:
        """An upper bound of -log p [B] of the whole text in nats, from one draw of a time and of what is hidden.

        All schedules have the same bound (arXiv:2107.00630); a single draw of it varies least where the noise grows evenly.
        As the papers' it leaves out the lowest and the highest thousandth of the noise.
        """
        even = dataclasses.replace(self, schedule="loglinear")
        t, xt = even.hidden(keys, batch["tokens"])
        return even.nelbo(params["net"], batch["tokens"], xt, t)


@dataclass(frozen=True)
class TcsmRatio(Denoiser):
    """p(x0 | x_t) as that of a held denoiser, `net`, times a ratio that sees whole texts, which tokens drawn together need.

    The ratio's own network begins as a denoiser too, `start`: from fresh parameters it tells nothing apart for hundreds of steps.
    Trained to tell data from what the denoiser draws (EDLM's NCE, arXiv:2410.21357, is `bce`). Its bound of the likelihood would
    ask for the ratio's mean over all texts, so there is none.
    """

    divergence: Ratio = "bce"  # how the density ratio is estimated: bce, lsif or gkl

    Sampling = TcsmRatioSampling

    @property
    def about(self) -> About:
        """The denoiser is held; the ratio may begin as it."""
        how = "it is the denoiser that the ratio corrects: `zoo train tcsm/stdlib` makes one"
        reference = Network(self.plain, alike=ALIKE, how=how, entry="weights.net=RUN:net")
        start = Network(self.plain, alike=ALIKE, required=False, trained=True, how=how, entry="weights.start=RUN:net")
        return About(**self.told, networks={"net": reference, "start": start})

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters: the ratio is one."""
        net, start, *keys = jax.random.split(rng, 4)
        h = jnp.zeros((1, 1, self.width))
        made: dict[str, Any] = {"beside": Beside().init(keys[0], h), "scalar": Scalar().init(keys[1], h)}
        ratio = {**{name: part["params"] for name, part in made.items()}, "own": jnp.zeros(())}
        return {"net": self.init_net(net), "start": self.init_net(start), "ratio": ratio}

    def log_ratio(self, params: Params, tokens: jax.Array, xt: jax.Array, noise: jax.Array) -> jax.Array:
        """log p(x0 | x_t) / p_reference [B] of whole clean texts [B, T], up to a constant of x_t.

        A sum over positions, so that it grows with the text: of the clean text's features there, and of the output that they give
        the token itself.
        """
        start, own, embed = params["start"], params["ratio"], Embed(self.vocab, self.width)
        h = apply(embed, start["embed"], tokens) + apply(Beside(), own["beside"], apply(embed, start["embed"], xt))
        h = apply(self.body, start["body"], h, noise)
        head = start["head"]["out"]
        logit = (h.astype(jnp.float32) * head["kernel"].T[tokens]).sum(-1) + head["bias"][tokens]
        each = apply(Scalar(), own["scalar"], h.reshape(-1, 1, self.width)).reshape(tokens.shape) + own["own"] * logit
        return each.sum(1)

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The divergence, a mean over texts; `margin` is how much larger log-ratios of data are than of what the denoiser draws."""
        draw, other = jax.random.split(rng)
        tokens = batch["tokens"]
        t, xt = self.hidden(draw, tokens)
        noise = self.times.noise(t)

        def guess(outputs: jax.Array, xt: jax.Array, noise: jax.Array, keys: jax.Array) -> jax.Array:
            found = jax.vmap(jax.vmap(partial(jax.random.categorical, mode="high")))(keys, outputs)
            return jnp.where(self.process.noisy(xt), found.astype(xt.dtype), xt)

        drawn = self.compared(params["net"], xt, noise, guess, jax.random.split(other, xt.shape))
        both = jnp.concatenate([tokens, drawn]), jnp.concatenate([xt, xt]), jnp.concatenate([noise, noise])
        data, made = jnp.split(self.log_ratio(params, *both), 2)
        return ratio(self.divergence, data, made).mean(), {"margin": (data - made).mean()}

    def proposed(self, params: Params, options: Any) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
        """One of the candidates that the denoiser draws, by the ratio, as log-probabilities of one token each."""
        ask, k = super().proposed(params, options), options.candidates
        own = {**params, "start": self._whole(params["start"])}

        def choose(x: jax.Array, noise: jax.Array, keys: jax.Array) -> jax.Array:
            n, t = x.shape
            pairs = jax.vmap(jax.random.split)(keys)
            log_p = ask(x, noise, keys)
            found = jax.vmap(lambda key, row: jax.random.categorical(key, row, shape=(k, t), mode="high"))(
                pairs[:, 0], log_p
            )
            found = found.astype(jnp.int32)
            many = found.reshape(n * k, t), jnp.repeat(x, k, 0), jnp.repeat(noise, k)
            scores = self.log_ratio(own, *many).reshape(n, k)
            picked = jax.vmap(jax.random.categorical)(pairs[:, 1], scores)
            lost = jnp.isnan(log_p).any((1, 2)) | jnp.isnan(scores).any(1)
            one = jnp.log(jax.nn.one_hot(found[jnp.arange(n), picked], self.vocab))
            return jnp.where(lost[:, None, None], jnp.nan, one)

        return choose
