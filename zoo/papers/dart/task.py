"""The DART task: its hyper-parameters, loss, sampler with a cache, and its face as a denoiser (arXiv:2410.08159).

B examples, T copies, the noisiest first, K tokens of D numbers; S tokens of a caption.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from msgspec import Meta

from zoo.diffusion.sampling import noises
from zoo.dist import gather_before_loop
from zoo.encoders.inputs import Inputs
from zoo.errors import UserError
from zoo.fields import Count, Dtype, Layers, NonNegative, Offset, Positive, Side, Size, check_fields
from zoo.flows.inverse import Stepper, sequential
from zoo.nn.attention import Backend, check_backend, reaches, reaching
from zoo.nn.embed import patchify, unpatchify
from zoo.nn.transformer import Remat, cast_trunk
from zoo.papers.dart.model import DartNet, FlowHead, Layout, Mask
from zoo.papers.dart.process import Nomad, Schedule
from zoo.task import About, Batch, Params, sample_keys

Steps = Annotated[int, Meta(ge=2, le=2**10)]
HeadDim = Annotated[int, Meta(ge=16, le=2**18, multiple_of=16)]  # its pairs are shared out among step, row, column
CoarseSteps = Annotated[int, Meta(ge=0, le=2**10)]


@dataclass(frozen=True)
class DartSampling:
    """How images are drawn: T calls of the network, no solver."""

    guidance: NonNegative = 0.0  # x0 + weight (x0 - x0 without class or caption); 0: off (papers say 1 + weight)
    cache: bool = True  # False: all blocks anew at every call, which gives the same; to time and to check

    def __post_init__(self) -> None:
        check_fields(self)


def _apart(keys: jax.Array, use: int) -> jax.Array:
    """Keys [B] of their own for another use of each of these."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, use)


class Reader(NamedTuple):
    """The network on new tokens, with what it keeps of those before, under guidance."""

    read: Any  # (tokens [n, Q, D], kept, slot of the first) -> (output [n, Q, D], hidden [n, Q, W], kept)
    kept: Any


@dataclass(frozen=True)
class Dart(Inputs):
    """A transformer that reads the noisy copies of an image, the noisiest first, and tells the image from each and those before."""

    patch: Side = 2
    steps: Steps = 16  # T, noisy copies
    coarse: CoarseSteps = 0  # noisy copies at half the rows and columns before them: Matryoshka-DART; 0: none
    schedule: Schedule = "copies"  # whose signal falls as a cosine: the copies', or that of the chain of all of them
    writes: bool = False  # Kaleido-DART: models captions of letters too, from the image and before it
    mask: Mask = "blocks"  # who sees whom; tokens: DART-AR, one token after the other; same: no block sees another
    fed: Literal["copies", "chain"] = "copies"  # chain: the sample of the Markov chain in the place of each copy
    target: Literal["x0", "v"] = "x0"  # what the network's output is; v: of the chain, whose samples know all copies
    cap: Positive | None = 10.0  # of the weight SNR + 1 of a block's error; None: none, which is |v|^2
    head: Literal["gauss", "flow"] = "gauss"  # how the next copy follows; flow: DART-FM moves each token on from there
    head_steps: Count = 20  # of Euler's method
    head_noise: Positive | None = None  # of the last proposal; None: of x0 where it is Gaussian, 1 / sqrt(1 + SNR)
    width: Size = 384
    depth: Layers = 12
    head_dim: HeadDim = 64
    base: Positive = 10_000.0  # of the rotations: the slowest turns by 1 / base a step
    gated: bool = True  # SwiGLU; False: GELU
    centre: Offset = 0.0  # of what is modelled, taken away
    spread: Positive = 1.0  # likewise, divided by: the process is made for numbers of variance 1
    dtype: Dtype = "float32"  # of hidden layers; x0 and losses stay float32
    scan: bool = True  # scan over the layers; False unrolls
    remat: Remat = "none"  # none, dots or full: what the backward pass recomputes
    attention: Backend = "xla"  # xla; splash on TPUs; auto: whichever the device has

    Sampling = DartSampling

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.head_dim:
            raise UserError(
                f"task.head_dim={self.head_dim} does not divide task.width={self.width}; choose a multiple of it, e.g. "
                f"task.width={-(-self.width // self.head_dim) * self.head_dim}"
            )
        check_backend(self.attention, self.dtype)
        if self.attention == "cudnn" and self.mask != "tokens":
            raise UserError("task.attention='cudnn' knows no blocks of tokens; set task.attention=auto or xla")
        if self.head == "flow" and self.mask == "tokens":
            raise UserError(
                "task.head='flow' moves all tokens of a copy on together; set task.head=gauss, or task.mask=blocks"
            )
        if self.text_tokens and self.mask == "same":
            raise UserError("task.mask='same' hides the caption too; set task.text_tokens=0, or another mask")
        if self.coarse and any(n % (2 * self.patch) for n in self.latent):
            fits = ",".join(str(-(-n // (2 * self.patch)) * 2 * self.patch) for n in self.latent)
            raise UserError(
                f"task.coarse={self.coarse} models half of task.latent={self.latent} first, which task.patch={self.patch} must "
                f"divide too, e.g. task.latent={fits}"
            )
        if self.coarse and (self.mask == "tokens" or self.head == "flow"):
            raise UserError(
                f"task.coarse={self.coarse} is for whole blocks and a Gaussian step; set task.mask=blocks and task.head=gauss"
            )
        if self.writes and (self.captions != "letters" or not self.text_tokens or self.mask == "tokens"):
            raise UserError(
                "task.writes=True is of letters, and of blocks; set task.captions=letters, task.text_tokens and task.mask=blocks"
            )
        if self.fed == "chain" and self.mask != "same":
            raise UserError("task.fed='chain' is Markov's process, in which one sample says all; set task.mask=same")

    # --- sizes --------------------------------------------------------------------------------------

    @property
    def about(self) -> About:
        """The encoders are frozen."""
        lacks = {}
        if self.mask == "tokens":
            lacks["denoise"] = "task.mask='tokens'; its estimates know a part of the next copy"
        elif self.coarse:
            lacks["denoise"] = "task.coarse; its estimates know coarser copies"
        elif self.inputs == "images":
            lacks["denoise"] = "task.inputs='images'; latents are what is denoised"
        # the letters behind an image are trained where those before it are dropped
        completes = tuple(key for key in self.spec(1) if key not in self.given) if self.writes and self.drop else ()
        return About(**self.told, tokens=self.layout.slots, completes=completes, lacks=lacks)

    @property
    def process(self) -> Nomad:
        """The copies."""
        return Nomad.cosine(self.steps, self.schedule)

    @property
    def scales(self) -> tuple[Dart, ...]:
        """What is modelled one after the other: itself, and before it half the rows and columns where there are `coarse` copies."""
        if not self.coarse:
            return (self,)
        rows, columns = self.latent
        return replace(self, latent=(rows // 2, columns // 2), steps=self.coarse, coarse=0), self

    @property
    def layout(self) -> Layout:
        """The sequence. One token after the other, the clean image is its last block."""
        last = ((self.rows, self.columns),) * (self.mask == "tokens")
        grids = itertools.chain(*([(scale.rows, scale.columns)] * scale.steps for scale in self.scales), last)
        return Layout(tuple(grids), self.text_tokens + self.writes, self.writes)

    @property
    def _net(self) -> DartNet:
        condition = self.condition_width if self.prefix else 0
        names = ("dims", "width", "depth", "head_dim", "mask", "base", "gated", "dtype", "scan", "remat")
        own = {name: getattr(self, name) for name in names}
        return DartNet(self.layout, condition=condition, backend=self.attention, **own, parent=None)

    @property
    def _head(self) -> FlowHead:
        return FlowHead(self.width, parent=None)

    @property
    def _proposals(self) -> tuple[np.ndarray, np.ndarray]:
        """Signal and noise [T] of what the flow head begins with."""
        signal, noise = self.process.following
        if self.head == "flow":
            noise = np.append(noise[:-1], self.head_noise or (1 + self.process.snr[-1]) ** -0.5)
        return signal, noise

    def cache_bytes(self, n: int, guided: bool = True) -> dict[str, int]:
        """Bytes of the key/value caches while n samples are drawn."""
        rows = 2 * n if guided and self.prefix else n
        shapes = jax.tree.leaves(jax.eval_shape(lambda: self._net.memory(rows)))
        return {"all": sum(x.size * x.dtype.itemsize for x in shapes)}

    # --- contract -----------------------------------------------------------------------------------

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters: every block is the identity, and the output zero."""
        one, two, three = jax.random.split(rng, 3)
        x = jnp.zeros((1, self.layout.end - self.layout.prefix, self.dims))
        condition = jnp.zeros((1, self.prefix, self.condition_width)) if self.prefix else None
        made: Any = self._net.init(one, x, self.conditions({}, {"x": x}) if self.captions == "letters" else condition)
        params = {"net": made["params"], **self.encoders(two)}
        if self.head == "flow":
            made = self._head.init(three, x, x[..., 0], jnp.zeros((*x.shape[:2], self.width)))
            params["head"] = made["params"]
        return params

    def tokens(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] as it comes, in means of squares where it is larger -> tokens [B, K, D] of mean 0 and variance 1."""
        b, rows, _, c = x.shape
        side = rows // self.latent[0]
        x = x.reshape(b, self.latent[0], side, self.latent[1], side, c).mean((2, 4))
        return patchify((x - self.centre) / self.spread, self.patch)

    def image(self, tokens: jax.Array) -> jax.Array:
        """The way back."""
        x = unpatchify(tokens, self.patch, self.channels, rows=self.rows)
        return x * self.spread + self.centre

    def copies(self, x0: jax.Array, eps: jax.Array) -> jax.Array:
        """Noisy copies [B, T, K, D] of tokens [B, K, D] with noise [B, T, K, D]."""
        gamma = self.process.gamma
        signal, noise = (jnp.asarray(f, jnp.float32)[:, None, None] for f in (np.sqrt(gamma), np.sqrt(1 - gamma)))
        return signal * x0[:, None] + noise * eps

    def conditions(self, params: Params, batch: Batch, drop: jax.Array | None = None) -> jax.Array | None:
        """As of `Inputs`. A caption that is written comes twice, each after a beginning, and behind the image none is dropped."""
        seen = super().conditions(params, batch, drop)
        if seen is None or not self.writes:
            return seen
        behind: Any = super().conditions(params, batch)
        begin = jax.nn.one_hot(jnp.full((len(seen), 1), self.text_width - 1), self.text_width)
        return jnp.concatenate([begin, seen, begin, behind], 1)

    @property
    def _blocks(self) -> np.ndarray:
        """The number of the copy [N] that a token is of, in the order of `parts`."""
        sizes = [scale.rows * scale.columns for scale in self.scales for _ in range(scale.steps)]
        return np.repeat(np.arange(len(sizes)), sizes)

    def _noise(self, keys: jax.Array) -> list[jax.Array]:
        """Of the copies of each scale [B, T, K, D], an example's from its own key of `keys` [B]."""
        shape = len(self._blocks), self.dims
        return self.parts(jax.vmap(lambda key: jax.random.normal(key, shape))(keys))

    def parts(self, x: jax.Array) -> list[jax.Array]:
        """Of all tokens [B, N, W] those of each scale's copies, [B, T, K, W]."""
        found, begin = [], 0
        for scale in self.scales:
            size = scale.rows * scale.columns
            end = begin + scale.steps * size
            found.append(x[:, begin:end].reshape(len(x), scale.steps, size, -1))
            begin = end
        return found

    def estimates(
        self, params: Params, copies: Sequence[jax.Array], clean: jax.Array | None, condition: jax.Array | None
    ) -> list[tuple[jax.Array, jax.Array]]:
        """What `read` tells of images."""
        return self.read(params, copies, clean, condition)[0]

    def read(
        self, params: Params, copies: Sequence[jax.Array], clean: jax.Array | None, condition: jax.Array | None
    ) -> tuple[list[tuple[jax.Array, jax.Array]], jax.Array | None]:
        """x0 told from each copy and those before, [B, T, K, D] float32, and the hidden states [B, T, K, W] that told it.

        And of captions that are written the logits of the letters that follow, [B, 2 (S + 1), V]: before the image and behind.

        Args:
            copies: [B, T, K, D] of each of `scales`, as what is given back.
            clean: tokens [B, K, D]; with `mask="tokens"` the last estimates know those in front of theirs.
            condition: as of `conditions`.
        """
        b, _, k, d = copies[-1].shape
        chains = [
            # "highest": as the sampler's sums, where TPUs and GPUs would round what they multiply
            jnp.einsum("ts,bskd->btkd", jnp.asarray(scale.process.to_chain, jnp.float32), x, precision="highest")
            for scale, x in zip(self.scales, copies)
        ]
        x = jnp.concatenate([x.reshape(b, -1, d) for x in (chains if self.fed == "chain" else copies)], 1)
        if self.mask == "tokens":
            assert clean is not None
            x = jnp.concatenate([x, clean], 1)
        made: Any = self._net.apply({"params": params["net"]}, x, condition)
        out, hidden, letters, _ = made
        if self.mask == "tokens":
            out, hidden = (y[:, k - 1 : -1] for y in (out, hidden))
        found = []
        for scale, chain, own, state in zip(self.scales, chains, self.parts(out), self.parts(hidden)):
            abar = jnp.asarray(scale.process.abar, jnp.float32)[:, None, None]
            found.append((self._x0(own, chain, abar), state))
        return found, letters

    def _x0(self, out: jax.Array, chain: jax.Array, abar: Any) -> jax.Array:
        return out if self.target == "x0" else jnp.sqrt(abar) * chain - jnp.sqrt(1 - abar) * out

    @property
    def _weights(self) -> np.ndarray:
        """Of each block's squared error [T], of mean 1 where they are capped."""
        weights = np.asarray(self.process.snr) + 1
        if self.cap is None:
            return weights
        weights = np.minimum(weights, self.cap)
        return weights / weights.mean()

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean over blocks of weight |x0 - estimate|^2 (equation of section 3.1; the paper's weight is SNR, ours SNR + 1).

        And what a letter costs that is written, in nats: behind the image where it does not know the caption, else before it.

        Metrics: `x0_error`, the root mean square of x0 - estimate over all blocks, and `x0_error_last`, of the last one; `letter`.
        """
        draw, noise, drop, flow = jax.random.split(rng, 4)
        x = self.clean(params, batch, draw)
        dropped = jax.random.bernoulli(drop, self.drop, x.shape[:1])
        condition = self.conditions(params, batch, dropped)
        x0 = [scale.tokens(x) for scale in self.scales]
        eps = self.parts(jax.random.normal(noise, (len(x), len(self._blocks), self.dims)))
        copies = [scale.copies(x, e) for scale, x, e in zip(self.scales, x0, eps)]
        told, letters = self.read(params, copies, x0[-1], condition)
        square = jnp.concatenate([jnp.square(found - x[:, None]).mean((0, 2, 3)) for (found, _), x in zip(told, x0)])
        weights = np.concatenate([scale._weights for scale in self.scales])
        loss = (jnp.asarray(weights, jnp.float32) * square).mean()
        metrics = {"x0_error": jnp.sqrt(square.mean()), "x0_error_last": jnp.sqrt(square[-1])}
        if letters is not None:
            before, behind = jnp.split(letters, 2, 1)
            logits = jnp.where(dropped[:, None, None], behind, before)[:, :-1]
            metrics["letter"] = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"]).mean()
            loss = loss + metrics["letter"]
        if self.head == "flow":
            metrics["flow"] = self._flow_loss(params, copies[-1], x0[-1], *told[-1], flow)
            loss = loss + metrics["flow"]
        return loss, metrics

    def _flow_loss(
        self, params: Params, copies: jax.Array, x0: jax.Array, found: jax.Array, hidden: jax.Array, rng: jax.Array
    ) -> jax.Array:
        """Mean square of velocity - (next copy - proposal) at a random time between them; estimates get no gradient of it."""
        eps_rng, time_rng = jax.random.split(rng)
        signal, noise = (jnp.asarray(row, jnp.float32)[:, None, None] for row in self._proposals)
        proposal = signal * jax.lax.stop_gradient(found) + noise * jax.random.normal(eps_rng, copies.shape)
        target = jnp.concatenate([copies[:, 1:], x0[:, None]], 1)
        time = jax.random.uniform(time_rng, copies.shape[:-1])
        z = proposal + time[..., None] * (target - proposal)
        velocity: Any = self._head.apply({"params": params["head"]}, z, time, hidden)
        return jnp.square(velocity - (target - proposal)).mean()

    def _moved(self, params: Params, x: jax.Array, hidden: jax.Array) -> jax.Array:
        """Proposals [n, K, D] carried to the next copy by Euler's method."""

        def step(x: jax.Array, time: jax.Array) -> tuple[jax.Array, None]:
            velocity: Any = self._head.apply(
                {"params": params["head"]}, x, jnp.broadcast_to(time, x.shape[:-1]), hidden
            )
            return x + velocity / self.head_steps, None

        return jax.lax.scan(step, x, jnp.arange(self.head_steps) / self.head_steps)[0]

    def errors(self, params: Params, batch: Batch, keys: jax.Array, swap: jax.Array) -> jax.Array:
        """Mean squared error of each block's estimate [B, T] (of all scales), in the units of the process; noise follows from keys [B].

        Args:
            swap: bool []; whether the earlier copies are of the next example of the batch, with the same noise.
        """
        x = self.clean(params, batch, _apart(keys, 0))
        x0 = [scale.tokens(x) for scale in self.scales]
        condition, blocks = self.conditions(params, batch), self._blocks
        eps = self._noise(keys)
        own, other = (
            [scale.copies(jnp.roll(x, by, 0), e) for scale, x, e in zip(self.scales, x0, eps)] for by in (0, -1)
        )
        numbers = self.parts(jnp.asarray(blocks)[None, :, None])

        def block(i: jax.Array) -> jax.Array:
            copies = [jnp.where(swap & (number < i), b, a) for number, a, b in zip(numbers, own, other)]
            told = self.estimates(params, copies, x0[-1], condition)
            errors = [jnp.square(found - x[:, None]).mean((2, 3)) for (found, _), x in zip(told, x0)]
            return jnp.concatenate(errors, 1)[:, i]

        return jax.lax.map(block, jnp.arange(blocks.max() + 1)).T

    # --- a denoiser ---------------------------------------------------------------------------------

    @property
    def sigmas(self) -> tuple[float, float]:
        """Levels of the chain, from that of all copies to that of the first, in the units of what is modelled."""
        snr = self.process.snr
        return self.spread * snr[-1] ** -0.5, self.spread * snr[0] ** -0.5

    def denoise(self, params: Params, x: jax.Array, sigma: jax.Array, conditions: Batch | None = None) -> jax.Array:
        """E[x0 | x] [B, H, W, C] in float32, at the levels of the chain; at others x gets noise up to the next one.

        What the network makes of copies whose sufficient statistic is x: what their noises have besides is drawn once and for all.
        """
        process, x = self.process, x.astype(jnp.float32)
        snr = jnp.asarray(process.snr, jnp.float32)
        told = jnp.broadcast_to((self.spread / jnp.asarray(sigma, jnp.float32)) ** 2, x.shape[:1])
        level = jnp.clip((snr <= told[:, None] * (1 + 1e-4)).sum(1) - 1, 0)  # [B]
        z = self.tokens(x)
        more, eps = (
            jax.random.normal(jax.random.key(i), s) for i, s in enumerate((z.shape[1:], (self.steps, *z.shape[1:])))
        )
        z = z + jnp.sqrt(jnp.clip(1 / snr[level] - 1 / told, 0))[:, None, None] * more
        left = jnp.asarray(process.residuals, jnp.float32)[level]
        signal = jnp.asarray(np.sqrt(process.gamma), jnp.float32)[:, None, None]
        copies = signal * z[:, None] + jnp.einsum("bts,skd->btkd", left, eps, precision="highest")
        condition = self.conditions(params, {**(conditions or {}), "x": x})
        [(found, _)] = self.estimates(params, [copies], None, condition)
        return self.image(found[jnp.arange(len(x)), level])

    # --- samples ------------------------------------------------------------------------------------

    def sample(
        self, params: Params, rng: jax.Array, n: int, conditions: Batch | None = None, options: Any = None
    ) -> dict[str, jax.Array]:
        """n samples.

        Args:
            conditions: `label` [n] (negative: none), or the keys of `given`. None: neither class nor caption. Of a model that
                writes, `image` (or `latent`, with `latent_std` a draw around it), without a caption: what captions are written of.

        Returns:
            As `Inputs.drawn`, and with `coarse` the small `image` and `latent` that came first under these names with `coarse_`
            in front; or captions, `tokens` [n, S]. UserError for guidance where there is neither class nor caption to draw from.
        """
        o, keys = options or DartSampling(), sample_keys(rng, n)
        if self.writes and {"image", "latent"} & set(conditions or {}):
            if o.guidance:
                raise UserError(
                    f"guidance={o.guidance:g} is of images, and captions are written here; leave guidance out"
                )
            return {"tokens": self._written(params, conditions or {}, keys)}
        if o.guidance and not self.asked(conditions):
            raise UserError(
                f"guidance={o.guidance:g} compares a class or a caption with none, and there is neither here; leave guidance out"
            )
        if o.guidance and not self.drop:
            raise UserError(
                f"guidance={o.guidance:g} compares with no class or caption, which task.drop=0 has not trained; leave guidance out"
            )
        batch = {**(conditions or {}), "keys": keys}
        reader = self._reader(params, batch, n, o)
        move = functools.partial(self._moved, params) if self.head == "flow" else None
        if self.mask == "tokens":
            return self.drawn(
                params, self.image(self._by_tokens(reader, noises(keys, (self.layout.size, self.dims)))), conditions
            )
        drawn: dict[str, jax.Array] = {}
        slot, draws = self.layout.prefix, 0
        for scale in self.scales:
            normal, size = noises(keys, (scale.layout.size, self.dims)), scale.layout.size
            x, kept = scale._by_blocks(reader, lambda i, normal=normal, draws=draws: normal(draws + i), move, slot)
            reader, slot, draws = reader._replace(kept=kept), slot + scale.steps * size, draws + scale.steps
            found = scale.drawn(params, scale.image(x), conditions)
            drawn = {**{f"coarse_{key}": value for key, value in drawn.items() if key != "label"}, **found}
        return drawn

    def _written(self, params: Params, batch: Batch, keys: jax.Array) -> jax.Array:
        """Captions [n, S] of images, letter by letter after the images' copies."""
        n, at, apply = len(keys), self.layout, self._looped(params)
        clean, slot = self.clean(params, batch, _apart(keys, self.text_tokens)), at.prefix
        none = jax.nn.one_hot(jnp.full((n, at.prefix), self.text_width - 1), self.text_width)

        kept = apply(None, none, self._net.memory(n), 0)[-1]
        for scale, eps in zip(self.scales, self._noise(keys)):
            copies, size = scale.copies(scale.tokens(clean), eps).swapaxes(0, 1), scale.layout.size

            def block(kept: Any, row: Any) -> tuple[Any, None]:
                return apply(row[0], None, kept, row[1])[-1], None

            kept, _ = jax.lax.scan(block, kept, (copies, slot + size * jnp.arange(scale.steps)))
            slot += scale.steps * size

        def letter(carry: Any, i: jax.Array) -> tuple[Any, jax.Array]:
            last, kept = carry
            _, _, logits, kept = apply(None, jax.nn.one_hot(last, self.text_width)[:, None], kept, slot + i)
            choose = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, i), row))
            last = choose(keys, logits[:, 0])
            return (last, kept), last

        begin = jnp.full(n, self.text_width - 1)
        return jax.lax.scan(letter, (begin, kept), jnp.arange(self.text_tokens))[1].T

    def _looped(self, params: Params) -> Any:
        """The network with its parameters as a loop needs them."""
        own = gather_before_loop(cast_trunk(params["net"], self.dtype), lambda: self.init(jax.random.key(0))["net"])
        return functools.partial(self._net.apply, {"params": own})

    def _reader(self, params: Params, batch: Batch, n: int, o: DartSampling) -> Reader:
        """Guided, both passes run as one batch of 2 n."""
        apply, seen = self._looped(params), self.conditions(params, batch)
        rows, prefix = (2 * n if o.guidance else n), self.layout.prefix
        if o.guidance:
            both: Any = seen, self.conditions(params, batch, jnp.ones(n, bool))
            seen = jnp.concatenate(both)

        def call(x: jax.Array, kept: Any, slot: Any) -> tuple[jax.Array, jax.Array, Any]:
            if o.cache:
                out, hidden, _, kept = apply(x, None if prefix else seen, kept, slot)
                return out, hidden, kept
            kept = jax.lax.dynamic_update_slice_in_dim(kept, x, slot - prefix, 1)
            out, hidden, *_ = apply(kept, seen)
            cut = functools.partial(
                jax.lax.dynamic_slice_in_dim, start_index=slot - prefix, slice_size=x.shape[1], axis=1
            )
            return cut(out), cut(hidden), kept

        def read(x: jax.Array, kept: Any, slot: Any) -> tuple[jax.Array, jax.Array, Any]:
            out, hidden, kept = call(jnp.concatenate([x, x]) if o.guidance else x, kept, slot)
            if o.guidance:
                out, hidden = out[:n] + o.guidance * (out[:n] - out[n:]), hidden[:n]
            return out, hidden, kept

        if not o.cache:
            return Reader(read, jnp.zeros((rows, self.layout.end - prefix, self.dims)))
        kept = self._net.memory(rows)
        return Reader(read, apply(None, seen[:, :prefix], kept, 0)[-1] if prefix and seen is not None else kept)

    def _by_blocks(self, reader: Reader, normal: Any, move: Any = None, first: int = 0) -> tuple[jax.Array, Any]:
        """Block by block, in one scan (on a TPU in up to four, which look at no more of the cache than they fill).

        Args:
            move: (proposal [n, K, D], hidden states) -> the next copy; None: it is the proposal.
            first: slot of the first block.

        Returns:
            x0, and what the reader keeps.
        """
        process, size = self.process, self.layout.size
        of_copies = (process.sums, process.scales, process.abar, *self._proposals)
        rows = (jnp.arange(self.steps), *(jnp.asarray(row, jnp.float32) for row in of_copies))

        def step(carry: Any, row: Any) -> tuple[Any, None]:
            (x, total, kept), (i, own, scale, abar, signal, noise) = carry, row
            total = total + own * x
            chain = scale * total
            out, hidden, kept = reader.read(chain if self.fed == "chain" else x, kept, first + i * size)
            x = signal * self._x0(out, chain, abar) + noise * normal(i + 1)
            x = move(x, hidden) if move else x
            return (x, total, kept), None

        x = normal(0)
        (x, total, kept), begin = (x, jnp.zeros_like(x), reader.kept), 0
        for end in reaches(self.steps, size):
            kept = reaching(kept, first + end * size)
            part = jax.tree.map(lambda row, b=begin, e=end: row[b:e], rows)
            (x, total, kept), _ = jax.lax.scan(step, (x, total, kept), part)
            begin = end
        return x, kept

    def _by_tokens(self, reader: Reader, normal: Any) -> jax.Array:
        """Token by token after the first block, whose place of the sequence is noise alone, as the inverse of an affine flow."""
        process, size, prefix = self.process, self.layout.size, self.layout.prefix
        signal, noise = (jnp.asarray(f, jnp.float32) for f in process.following)
        first = normal(0)
        noises = jnp.concatenate([first[:, -1:], *(normal(i + 1) for i in range(self.steps))], 1)
        _, _, kept = reader.read(first[:, :-1], reader.kept, prefix) if size > 1 else (None, None, reader.kept)
        totals = jnp.zeros((len(first), size, self.dims)).at[:, :-1].set(float(process.sums[0]) * first[:, :-1])

        def step(u: jax.Array, memory: Any, index: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
            kept, totals = memory
            at = size - 1 + index  # of the token that is read; the one that follows is of block i + 1
            i, place = (at + 1) // size - 1, (at + 1) % size
            sums = jnp.asarray(process.sums, jnp.float32)[jnp.minimum(at // size, self.steps - 1)]
            totals = totals.at[:, at % size].add(sums * u[:, 0])
            out, _, kept = reader.read(u, kept, prefix + at)
            scale, abar = (jnp.asarray(row, jnp.float32)[i] for row in (process.scales, process.abar))
            x0 = self._x0(out, scale * totals[:, place][:, None], abar)
            return jnp.full_like(x0, noise[i]), signal[i] * x0, (kept, totals)

        return sequential(Stepper(step, (kept, totals), None, prefix + size - 1), noises)[0][:, -size:]
