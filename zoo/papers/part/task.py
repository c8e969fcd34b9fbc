"""What is trained: relations of patches off the grid (PART), the two pretexts it is compared with, and a classifier.

B examples, N patches of P pixels or samples a side, C channels, D width, A axes, R numbers of a relation.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from msgspec import Meta

from zoo.errors import UserError, check_divisor
from zoo.fields import AtLeast2, Below1, Count, Layers, NonNegative, Positive, Share, Size
from zoo.nn.layers import Dense, LayerNorm, Table, linear_names, truncated_normal
from zoo.nn.transformer import Block, Transformer
from zoo.papers.part.model import EPSILON, CrossAttentionHead, PairwiseHead, Vit
from zoo.papers.part.sampling import crop, grid_boxes, grid_patches, rebuild, relation, sample_boxes
from zoo.task import About, Batch, Name, Network, Params

Metrics = dict[str, jax.Array]


def _left(patches: int, mask: float) -> int:
    """How many patches a mask leaves, rounded down: of 25 at 0.8 these are 5, whatever 1 - 0.8 is in binary."""
    return int(patches * (1 - mask) + 1e-6)


def _check_several(task: Vit) -> None:
    """UserError for a grid of one patch, of which nothing can be asked."""
    if task.tokens < 2:
        raise UserError(f"task.patch={task.patch} makes one patch of the whole input; choose a smaller task.patch")


def _check_mask(task: Vit, patches: int, mask: float) -> None:
    """UserError for a mask that leaves no key, or for a kernel that takes no mask."""
    if not _left(patches, mask):
        raise UserError(f"task.mask={mask} leaves none of {patches} patches; choose a smaller share")
    if mask and task.attention in ("cudnn", "splash"):
        raise UserError(
            f"task.attention={task.attention!r} cannot leave out keys (task.mask={mask}); set task.attention=auto or xla"
        )


def _some(rng: jax.Array, batch: int, patches: int, count: int) -> jax.Array:
    """bool [B, N]: a random choice of `count` patches of each example."""
    order = jnp.argsort(jax.random.uniform(rng, (batch, patches)), -1)
    ranks: jax.Array = jnp.argsort(order, -1)
    return ranks < count


@functools.lru_cache(maxsize=32)
def _deviations(task: Part) -> np.ndarray:
    """Standard deviations [R] of the relations that the sampler of a task makes, from 100,000 pairs of it."""
    n = task.tokens

    def drawn() -> jax.Array:
        if task.sampling == "grid":
            boxes = jnp.asarray(grid_boxes(task.extent, task.patch))
            i, j = np.divmod(np.arange(n * n), n)
            return task.compared(boxes[i], boxes[j]).std(0)
        boxes = task.boxes(jax.random.key(0), 100_000, 2)
        return task.compared(boxes[:, 0], boxes[:, 1]).std(0)

    with jax.ensure_compile_time_eval():  # constants, also where a trace asks for them first
        deviation = np.asarray(jax.jit(drawn)())
        return np.where(deviation < 1e-6, 1.0, deviation)  # where all boxes have one size


@dataclass(frozen=True)
class Part(Vit):
    """Regresses how one patch lies to another from their pixels alone: shift in units of the first one's size, and ratio of sizes."""

    patches: AtLeast2 | None = None  # in a set; None: as many as the regular grid has
    sampling: Literal["off_grid", "pixels", "grid"] = "off_grid"  # continuous, whole numbers, or the regular grid
    smallest: Positive | None = None  # pixels a side; None: half a patch, or of "pixels" a patch
    largest: Positive | None = None  # pixels a side; None: two patches, or of "pixels" a patch
    sizes: bool = True  # whether the ratios of sizes are predicted too
    centred: bool = True  # shifts are between centres, otherwise between upper left corners
    target_norm: Literal["raw", "log_ratio", "std"] = "raw"  # log_ratio: logarithms of ratios; std: by their deviation
    error: Literal["squared", "absolute", "huber"] = "squared"  # the paper's is squared
    head: Literal["cross_attention", "pairwise"] = "cross_attention"
    query: Literal["patch_cat", "positional"] = "patch_cat"  # of cross-attention; positional is told slots, not patches
    heads: Size = 1  # of cross-attention
    residual: bool = False  # adds the query to what attention gives; not in the paper
    pairs: Count = 64  # in a step, the same in all examples
    pairing: Literal["distinct", "independent", "matching"] | None = (
        None  # None: distinct for cross-attention, else independent
    )
    mask: Below1 = 0.0  # share of patches that are no keys of the encoder

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, unset in (("query", "patch_cat"), ("heads", 1), ("residual", False)):
            if self.head == "pairwise" and getattr(self, name) != unset:
                raise UserError(
                    f"task.{name}={getattr(self, name)} belongs to task.head=cross_attention, and task.head=pairwise has no such "
                    f"thing; leave it at {unset}"
                )
        self._check_boxes()
        _check_mask(self, self.count, self.mask)
        self._check_pairs()
        check_divisor("heads", self.heads, "width", self.width)
        if self.query == "positional" and self.width % 4:
            raise UserError(
                f"task.width={self.width} is not divisible by 4, as task.query='positional' needs; change it"
            )

    def _check_boxes(self) -> None:
        if self.patches is None:
            _check_several(self)
        if self.sampling != "grid":
            self._check_sizes()
        elif self.patches not in (None, self.tokens):
            raise UserError(
                f"task.patches={self.patches}: the regular grid has {self.tokens}; leave task.patches out, or set "
                "task.sampling=off_grid"
            )

    def _check_sizes(self) -> None:
        smallest, largest = self.between
        name, side = self.side
        if largest > side:
            what = f"task.largest={largest:g}" if self.largest is not None else f"two patches, {largest:g},"
            raise UserError(
                f"{what} is larger than task.{name}={side}: no such box fits; set task.largest={side} or less"
            )
        if smallest > largest:
            raise UserError(
                f"task.smallest={smallest:g} and task.largest={largest:g} leave no size; choose 0 < task.smallest <= task.largest"
            )
        if self.sampling == "pixels" and (smallest % 1 or largest % 1):
            raise UserError(
                f"task.smallest={smallest:g} and task.largest={largest:g} must be whole with task.sampling=pixels; round them"
            )

    def _check_pairs(self) -> None:
        n = self.count
        most = {"distinct": n * n, "matching": n}.get(self.paired)
        if most is not None and self.pairs > most:
            raise UserError(
                f"task.pairs={self.pairs} is more than the {most} {self.paired} pairs of {n} patches; choose {most} or fewer, or "
                "set task.pairing=independent"
            )

    @property
    def count(self) -> int:
        """Patches in a set."""
        return self.tokens if self.patches is None else self.patches

    @property
    def between(self) -> tuple[float, float]:
        """The smallest and the largest side of a box."""
        low, high = (1.0, 1.0) if self.sampling == "pixels" else (0.5, 2.0)
        return (
            low * self.patch if self.smallest is None else self.smallest,
            high * self.patch if self.largest is None else self.largest,
        )

    @property
    def _most(self) -> float:
        """The largest ratio of sizes."""
        smallest, largest = self.between
        return 1.0 if self.sampling == "grid" else largest / smallest

    @property
    def paired(self) -> str:
        """How pairs are drawn."""
        return self.pairing or ("distinct" if self.head == "cross_attention" else "independent")

    @property
    def relation_names(self) -> tuple[str, ...]:
        """What the R numbers of a relation are."""
        axes = ("t",) if self.length else ("x", "y")
        sizes = ("w",) if self.length else ("w", "h")
        return (*(f"d{a}" for a in axes), *((f"d{s}" for s in sizes) if self.sizes else ()))

    def boxes(self, rng: jax.Array, batch: int, patches: int) -> jax.Array:
        """Where patches are taken [B, N, 2, A]."""
        if self.sampling == "grid":
            return jnp.broadcast_to(grid_boxes(self.extent, self.patch), (batch, self.tokens, 2, len(self.extent)))
        return sample_boxes(rng, (batch, patches), self.extent, *self.between, whole=self.sampling == "pixels")

    def crops(self, batch: Batch, rng: jax.Array, *, augment: bool = True) -> tuple[jax.Array, jax.Array]:
        """A set of patches [B, N, P, P, C] of each example, and their boxes [B, N, 2, A]."""
        one, two = jax.random.split(rng)
        signal = self.signal(batch)
        signal = self.augmented(one, signal) if augment else signal
        boxes = self.boxes(two, len(signal), self.count)
        patches = grid_patches(signal, self.patch) if self.sampling == "grid" else crop(signal, boxes, self.patch)
        return patches, boxes

    def compared(self, reference: jax.Array, target: jax.Array) -> jax.Array:
        """The relation of boxes [..., 2, A] as this task has it, in raw numbers [..., R]."""
        return relation(reference, target, sizes=self.sizes, centred=self.centred)

    def normalised(self, raw: jax.Array) -> jax.Array:
        """Relations [..., R] as they are regressed (`target_norm`)."""
        axes = len(self.extent)
        if self.target_norm == "std":
            return raw / _deviations(self)
        if self.target_norm == "log_ratio":
            return jnp.concatenate([raw[..., :axes], jnp.log(raw[..., axes:])], -1)
        return raw

    def raw(self, normalised: jax.Array) -> jax.Array:
        """The way back of `normalised`."""
        axes = len(self.extent)
        if self.target_norm == "std":
            return normalised * _deviations(self)
        if self.target_norm == "log_ratio":
            return jnp.concatenate([normalised[..., :axes], jnp.exp(normalised[..., axes:])], -1)
        return normalised

    def draw_pairs(self, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        """References and targets, both int [pairs]."""
        n = self.count
        if self.paired == "distinct":
            return jnp.divmod(jax.random.permutation(rng, n * n)[: self.pairs], n)
        if self.paired == "matching":
            return jnp.arange(self.pairs), jax.random.permutation(rng, n)[: self.pairs]
        drawn = jax.random.randint(rng, (2, self.pairs), 0, n)
        return drawn[0], drawn[1]

    def _head(self) -> CrossAttentionHead | PairwiseHead:
        if self.head == "pairwise":
            return PairwiseHead(len(self.relation_names))
        return CrossAttentionHead(len(self.relation_names), self.heads, self.query, self.residual, self.dtype)

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters: `encoder`, `head`."""
        one, two = jax.random.split(rng)
        pair = jnp.zeros(1, jnp.int32)
        head = self._head().init(two, jnp.zeros((1, self.count, self.width)), pair, pair)["params"]
        return {"encoder": self.init_encoder(one), "head": head}

    def relate(self, params: Params, z: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        """Relations [B, n, R] of the patches i to j from their tokens [B, N, D], normalised."""
        found: Any = self._head().apply({"params": params["head"]}, z, i, j)
        return found

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        """Mean error over examples, pairs and numbers, in float32; of each number, and the distance of shifts, in raw units."""
        take, pick, hide, drop = jax.random.split(rng, 4)
        patches, boxes = self.crops(batch, take)
        i, j = self.draw_pairs(pick)
        seen = _some(hide, len(patches), self.count, _left(self.count, self.mask)) if self.mask else None
        z, _ = self.encode(params, patches, seen=seen, rng=drop)
        predicted = self.relate(params, z, i, j)
        wanted = self.compared(boxes[:, i], boxes[:, j])
        off = predicted - self.normalised(wanted)
        errors = {"squared": jnp.square, "absolute": jnp.abs, "huber": optax.losses.huber_loss}
        value = errors[self.error](off).mean()
        apart = self.raw(predicted) - wanted
        shift = jnp.linalg.norm(jax.lax.stop_gradient(apart[..., : len(self.extent)]), axis=-1).mean()
        each = jnp.square(apart).mean((0, 1))
        return value, {"distance": shift, **{f"mse_{name}": each[k] for k, name in enumerate(self.relation_names)}}

    def relations(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """All N^2 relations in a set of patches of each example, predicted and true, in raw numbers.

        Returns:
            `patches` [B, N, P, P, C], `boxes` [B, N, 2, A], `predicted` and `true` [B, N, N, R] (reference, then target), and
            `layout` [B, N, 2, A]: the boxes rebuilt from `predicted` alone, around 0, in units of their geometric mean size.
        """
        patches, boxes = self.crops(batch, rng, augment=False)
        n = self.count
        i, j = np.divmod(np.arange(n * n), n)
        z, _ = self.encode(params, patches)
        predicted = self.raw(self.relate(params, z, jnp.asarray(i), jnp.asarray(j)))
        predicted = predicted.reshape(len(patches), n, n, -1)
        return {
            "patches": patches,
            "boxes": boxes,
            "predicted": predicted,
            "true": self.compared(boxes[:, :, None], boxes[:, None]),
            "layout": rebuild(predicted, len(self.extent), self._most, centred=self.centred),
        }


@dataclass(frozen=True)
class AbsolutePosition(Vit):
    """Tells the slot of each patch of the regular grid from the pixels of all: the pretext that PART does without a grid."""

    mask: Below1 = 0.0  # share of patches that are no keys of the encoder
    known: Below1 = 0.0  # share of patches that keep a code of their position, and are not asked for theirs (DropPos)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_several(self)
        _check_mask(self, self.tokens, self.mask)
        told = round(self.known * self.tokens)
        if self.known and not 0 < told < self.tokens:
            what = "tells no patch's place" if not told else "leaves no patch to ask for"
            raise UserError(f"task.known={self.known} {what}: there are {self.tokens}; choose a share of whole patches")
        if told:
            self.fixed_positions()  # widths that sine and cosine codes do not fit

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters: `encoder`, `head`."""
        one, two = jax.random.split(rng)
        head = self._head().init(two, jnp.zeros((1, 1, self.width)))["params"]
        return {"encoder": self.init_encoder(one), "head": head}

    def _head(self) -> Dense:
        return Dense(self.tokens, ("embed", None))

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        """Mean cross entropy (nats) of the slots among N, over the patches without a code; `accuracy` of the largest logit."""
        move, hide, tell, drop = jax.random.split(rng, 4)
        signal = self.signal(batch)
        patches = grid_patches(self.augmented(move, signal), self.patch)
        told = round(self.known * self.tokens)
        asked = ~_some(tell, len(patches), self.tokens, told)
        positions = None
        if told:
            codes = jnp.asarray(self.fixed_positions())
            positions = jnp.where(jnp.pad(asked, ((0, 0), (1, 0)), constant_values=True)[..., None], 0.0, codes)
        seen = _some(hide, len(patches), self.tokens, _left(self.tokens, self.mask)) if self.mask else None
        z, _ = self.encode(params, patches, positions, seen=seen, rng=drop)
        logits: Any = self._head().apply({"params": params["head"]}, z)
        slots = jnp.arange(self.tokens)
        nll = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.broadcast_to(slots, logits.shape[:2]))
        count = len(patches) * (self.tokens - told)  # the same in every example
        right = (logits.argmax(-1) == slots) & asked
        return (nll * asked).sum() / count, {"accuracy": right.sum() / count}


class Decoder(Transformer):
    """The small transformer that fills in masked patches."""

    outputs: int

    @nn.compact
    def __call__(self, z: jax.Array, order: jax.Array, codes: jax.Array) -> jax.Array:
        """Tokens z [B, V, D] of the visible patches -> [B, N, outputs] of all, in their places.

        `order` int [B, N] begins with the numbers of the visible patches; `codes` [N, width] are those of the positions.
        """
        h = Dense(self.width, (None, "embed"), dtype=self.dtype, name="in")(z)
        hidden = Table(1, self.width, start=truncated_normal(0.02), name="hidden")().astype(h.dtype)
        missing = jnp.broadcast_to(hidden, (len(h), order.shape[1] - h.shape[1], self.width))
        h = jnp.concatenate([h, missing], 1)
        h = jnp.take_along_axis(h, jnp.argsort(order, -1)[..., None], 1) + codes.astype(h.dtype)
        block = Block(self.head_dim, dtype=self.dtype, backend=self.attention, epsilon=EPSILON, parent=None)
        h, _ = self.trunk(block)(h)
        return Dense(self.outputs, ("embed", None), name="out")(LayerNorm(EPSILON, name="norm")(h).astype(jnp.float32))


@dataclass(frozen=True)
class MaskedAutoencoder(Vit):
    """Fills in masked patches of the regular grid from the others (MAE, arXiv:2111.06377), with fixed codes of positions."""

    mask: Below1 = 0.75  # share of patches that the encoder does not see
    decoder_width: Size = 32
    decoder_depth: Layers = 1
    decoder_head_dim: Size = 16
    normalise: bool = True  # each patch is filled in up to its own mean and deviation

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_several(self)
        if not 0 < self.visible < self.tokens:
            what = "shows" if not self.visible else "hides"
            raise UserError(
                f"task.mask={self.mask} {what} none of {self.tokens} patches; choose a share in between, e.g. 0.5"
            )
        check_divisor("decoder_head_dim", self.decoder_head_dim, "decoder_width", self.decoder_width)
        self.fixed_positions()  # widths that sine and cosine codes do not fit
        self._codes()

    @property
    def visible(self) -> int:
        """How many patches the encoder sees."""
        return _left(self.tokens, self.mask)

    def positions(self, params: Params) -> jax.Array:
        """Fixed sine and cosine codes."""
        return jnp.asarray(self.fixed_positions())

    def _codes(self) -> np.ndarray:
        return self.fixed_positions("decoder_width")[1:]

    def _decoder(self) -> Decoder:
        sizes = {"width": self.decoder_width, "depth": self.decoder_depth, "head_dim": self.decoder_head_dim}
        return Decoder.of(self, **sizes, outputs=self.dims)

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters: `encoder`, `decoder`."""
        one, two = jax.random.split(rng)
        order = jnp.arange(self.tokens)[None]
        decoder = self._decoder().init(two, jnp.zeros((1, self.visible, self.width)), order, jnp.asarray(self._codes()))
        return {"encoder": self.init_encoder(one), "decoder": decoder["params"]}

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        """Mean squared error of the masked patches' pixels."""
        move, hide, drop = jax.random.split(rng, 3)
        signal = self.signal(batch)
        patches = grid_patches(self.augmented(move, signal), self.patch)
        patches = patches.reshape(*patches.shape[:2], self.dims)
        order = jnp.argsort(jax.random.uniform(hide, patches.shape[:2]), -1)
        shown = order[:, : self.visible]
        codes = jnp.asarray(self.fixed_positions())
        positions = jnp.concatenate([jnp.broadcast_to(codes[:1], (len(patches), 1, self.width)), codes[1:][shown]], 1)
        z, _ = self.encode(params, jnp.take_along_axis(patches, shown[..., None], 1), positions, rng=drop)
        filled: Any = self._decoder().apply({"params": params["decoder"]}, z, order, jnp.asarray(self._codes()))
        if self.normalise:
            centre = patches.mean(-1, keepdims=True)
            patches = (patches - centre) / jnp.sqrt(patches.var(-1, keepdims=True) + 1e-6)
        hidden = order[:, self.visible :, None]
        off = jnp.take_along_axis(filled, hidden, 1) - jnp.take_along_axis(patches, hidden, 1)
        return jnp.square(off).mean(), {}

    def _published_positions(self) -> np.ndarray:
        return self.fixed_positions()[None]


@dataclass(frozen=True)
class PartClassifier(Vit):
    """A classifier on an encoder that one of the pretexts has trained: fine-tuning, with positions it never had."""

    classes: Annotated[int, Meta(ge=2, le=2**18)] = 10
    start: Literal["fresh", "sincos"] = (
        "fresh"  # of the learned positions: "fresh" (truncated normal), or "sincos", as a masked autoencoder knew them
    )
    pool: Literal["mean", "class"] = "mean"  # what is classified: the "mean" of the patch tokens, or the "class" token
    frozen: bool = False  # the encoder is held, and only positions and classifier learn
    smoothing: Below1 = 0.0  # of labels
    mixup: NonNegative = 0.0  # alpha of the Beta distribution of mixing weights; 0: off
    cutmix: NonNegative = 0.0  # alpha likewise; with both, each batch takes one of them
    erase: Share = 0.0  # share of images of which a rectangle becomes noise

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start == "sincos":
            self.fixed_positions()
        for name in ("cutmix", "erase"):
            if self.length and getattr(self, name):
                raise UserError(f"task.{name}={getattr(self, name)} is for images; set task.{name}=0 for a series")

    @property
    def about(self) -> About:
        """A frozen encoder, that of a linear probe, must come from `Run.weights`; a trained one may."""
        encoder = Network(
            required=self.frozen,
            trained=not self.frozen,
            how="train one with `zoo train`, e.g. part/digits",
            entry="weights.encoder=RUN:encoder",
        )
        return replace(super().about, classes=self.classes, networks={"encoder": encoder})

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """As of `Vit`, and `label` int32 [B]."""
        return {**super().spec(batch), "label": jax.ShapeDtypeStruct((batch,), jnp.int32)}

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters: `encoder`, `positions` and `classifier`."""
        one, two, three = jax.random.split(rng, 3)
        fixed = self.fixed_positions() if self.start == "sincos" else None
        begin = truncated_normal(0.02) if fixed is None else lambda *_: jnp.asarray(fixed)
        positions = Table(1 + self.tokens, self.width, start=begin).init(two)["params"]
        classifier = self._classifier().init(three, jnp.zeros((1, self.width)))["params"]
        return {"encoder": self.init_encoder(one), "positions": positions, "classifier": classifier}

    def _classifier(self) -> Dense:
        return Dense(self.classes, ("embed", None), kernel_init=truncated_normal(0.02))

    def positions(self, params: Params) -> jax.Array:
        """The learned ones."""
        table: jax.Array = params["positions"]["table"]
        return table

    def _logits(self, params: Params, signal: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        z, first = self.encode(params, grid_patches(signal, self.patch), self.positions(params), rng=rng)
        pooled = z.mean(1) if self.pool == "mean" else first
        found: Any = self._classifier().apply({"params": params["classifier"]}, pooled)
        return found

    def logits(self, params: Params, batch: Batch) -> jax.Array:
        """[B, classes]."""
        return self._logits(params, self.signal(batch))

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        """Mean cross entropy (nats) of augmented and mixed examples; `accuracy` of the largest logit, where none are mixed."""
        move, rub, mix, drop = jax.random.split(rng, 4)
        signal, label = self.augmented(move, self.signal(batch)), batch["label"]
        wanted = optax.smooth_labels(jax.nn.one_hot(label, self.classes), self.smoothing)
        if self.erase:
            signal = _erased(rub, signal, self.erase)
        if mixed := (self.mixup > 0 or self.cutmix > 0):
            signal, share = _mixed(mix, signal, self.mixup, self.cutmix)
            wanted = share * wanted + (1 - share) * wanted[::-1]
        logits = self._logits(params, signal, drop)
        value = optax.losses.softmax_cross_entropy(logits, wanted).mean()
        return value, {} if mixed else {"accuracy": (logits.argmax(-1) == label).mean()}

    def import_names(self) -> list[Name]:
        """As of `Vit`, with positions and the classifier as `head`; UserError for a series."""
        names = [name for name in super().import_names() if name.source != "pos_embed"]
        return [*names, Name("pos_embed", "positions/table", "1 t d -> t d"), *linear_names("head", "classifier")]

    def import_note(self) -> str:
        """How timm reads that layout, where the class token is classified unless it is told otherwise."""
        pooled: dict[str, Any] = (
            {"global_pool": "avg", "fc_norm": False} if self.pool == "mean" else {"global_pool": "token"}
        )
        model = self._published_model(num_classes=self.classes, **pooled)
        return f"{model}; it gives the logits of images [B, C, H, W] in [-1, 1]"


def _rectangles(rng: jax.Array, image: jax.Array, area: jax.Array) -> jax.Array:
    """bool [B, H, W, 1]: inside a rectangle of a share `area` [B] of each image around a uniform centre, cut at the border."""
    count, rows, columns = image.shape[:3]
    centre = jax.random.uniform(rng, (count, 2))
    inside = jnp.ones((count, rows, columns), bool)
    for axis, side in ((0, rows), (1, columns)):
        place = (jnp.arange(side) + 0.5) / side
        near = jnp.abs(place - centre[:, axis, None]) < 0.5 * jnp.sqrt(area)[:, None]
        inside &= jnp.expand_dims(near, 2 - axis)
    return inside[..., None]


def _mixed(rng: jax.Array, signal: jax.Array, mixup: float, cutmix: float) -> tuple[jax.Array, jax.Array]:
    """Examples mixed with those of the batch turned round, and the share [B or 1, 1] of their own labels.

    mixup (arXiv:1710.09412): a weighted mean with a weight of Beta(alpha, alpha). CutMix (arXiv:1905.04899): a rectangle of the
    other, whose share is that of its pixels. With both a batch takes either with probability 1/2.
    """
    which, one, two, three = jax.random.split(rng, 4)
    other = signal[::-1]
    share = jnp.ones((len(signal), 1))
    found = signal
    if mixup:
        weight = jax.random.beta(one, mixup, mixup)
        found, share = weight * signal + (1 - weight) * other, share * weight
    if cutmix:
        weight = jax.random.beta(two, cutmix, cutmix)
        inside = _rectangles(
            three, signal[:1], 1 - weight[None]
        )  # one for the batch: pairs must see it alike both ways
        cut, kept = jnp.where(inside, other, signal), 1 - inside.mean() * jnp.ones_like(share)
        if not mixup:
            return cut, kept
        take = jax.random.bernoulli(which)
        found, share = jnp.where(take, cut, found), jnp.where(take, kept, share)
    return found, share


def _erased(rng: jax.Array, image: jax.Array, share: float) -> jax.Array:
    """A share of the images with normal noise in a rectangle of 2 to 33 % of the area (random erasing, arXiv:1708.04896)."""
    one, two, three, four = jax.random.split(rng, 4)
    area = jax.random.uniform(one, (len(image),), minval=0.02, maxval=1 / 3)
    inside = _rectangles(two, image, area) & jax.random.bernoulli(three, share, (len(image), 1, 1, 1))
    return jnp.where(inside, jax.random.normal(four, image.shape), image)
