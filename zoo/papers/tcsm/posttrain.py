"""TCSM after pre-training: towards a reward, towards what people choose, towards a language model (arXiv:2504.16431).

Only what tells a target from data differs. B texts, T tokens, V vocabulary, K candidates for a position.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from msgspec import Meta

from zoo.diffusion.tokens import inside
from zoo.errors import UserError
from zoo.fields import Positive, Size
from zoo.papers.tcsm.model import Embed, Scalar, apply
from zoo.papers.tcsm.objectives import preferred
from zoo.papers.tcsm.targets import Target, one_hot, taylor, top_k
from zoo.papers.tcsm.task import ALIKE, Denoiser, Reader, Tcsm
from zoo.task import About, Batch, Network, Params, Predicts

_MOST, _LEAST = 60.0, 1e-30  # log-weights above those of the first texts, and their mean: beyond, numbers overflow


def _start(task: Denoiser, required: bool = True) -> Network:
    """Where the denoiser's own parameters begin."""
    how = "train one, e.g. `zoo train tcsm/stdlib`"
    return Network(task.plain, alike=ALIKE, required=required, trained=True, how=how, entry="weights.net=RUN:net")


def _pair(batch: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    return dict.fromkeys(("tokens", "rejected"), jax.ShapeDtypeStruct((batch, length), jnp.int32))


# --- a reward -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TcsmReward(Tcsm):
    """Tilted to exp(R(x) / beta) times the law of the texts that it is trained on, R being the `reward` beside each.

    The cross-entropy of texts weighted by exp(R / beta) over its mean, whose minimum is the denoiser of the tilted law. That mean is
    one of all batches so far, held: one of a batch alone would be small where its own texts are good, and tilt less. The first
    two steps find the size of R / beta and a first mean, and have no weights.
    """

    beta: Positive = 0.1  # the smaller, the more the reward decides
    clip: Positive = 10.0  # a text counts as so many at most

    @property
    def about(self) -> About:
        """The mean is a buffer; the network begins as one that is trained on such texts."""
        return dataclasses.replace(super().about, networks={"net": _start(self)}, buffers=("norm",))

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`tokens` [B, T], and `reward` [B]."""
        return {**super().spec(batch), "reward": jax.ShapeDtypeStruct((batch,), jnp.float32)}

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters, and means of no text yet."""
        norm = {"steps": 0.0, "centre": 0.0, "mean": 1.0, "weight": 1.0, "square": 1.0}
        return {**super().init(rng), "norm": {name: jnp.float32(value) for name, value in norm.items()}}

    def target(
        self, params: Params, batch: Batch, xt: jax.Array, rng: jax.Array
    ) -> tuple[Target, dict[str, jax.Array]]:
        """The data, weighted; `ess` is the effective share of the texts so far, (sum W)^2 / (N sum W^2)."""
        norm, tilt = params["norm"], batch["reward"] / self.beta
        raw = jnp.exp(jnp.minimum(tilt - norm["centre"], _MOST))
        weight = jnp.where(norm["steps"] > 1, jnp.minimum(raw / jnp.maximum(norm["mean"], _LEAST), self.clip), 1.0)
        seen = jnp.stack([tilt.mean(), raw.mean(), weight.mean(), jnp.square(weight).mean()])
        ess = jnp.square(norm["weight"]) / norm["square"]
        told = {"ess": ess, "reward": batch["reward"].mean(), "seen": seen}
        return one_hot(batch["tokens"])._replace(weight=weight), told

    def after_step(self, params: Params, metrics: dict[str, jax.Array]) -> Params:
        """The means, with those of this step's texts."""
        norm, (tilt, raw, weight, square) = params["norm"], metrics["seen"]
        steps = norm["steps"]

        def mean(name: str, new: jax.Array, since: int) -> jax.Array:
            """Of all steps but the first `since`."""
            moved = norm[name] + (new - norm[name]) / jnp.maximum(steps - since + 1, 1)
            return jnp.where(steps < since, norm[name], moved)

        moved = {
            "steps": steps + 1,
            "centre": jnp.where(steps == 0, tilt, norm["centre"]),
            "mean": mean("mean", raw, 1),
            "weight": mean("weight", weight, 2),
            "square": mean("square", square, 2),
        }
        return {**params, "norm": moved}


# --- preferences ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TcsmPreference(Denoiser):
    """Direct preference optimisation (arXiv:2305.18290) of a denoiser, with the bound of log p in the place of log p.

    Our choice, since the paper's own objective is unknown to us. At its minimum the bound is that of the tilted law, while the
    denoiser need not be that of one law: on 27 texts 3 % of the divergence are left. Few draws make margins noisy, which tilts less:
    there the mean reward comes 77 % of the way with 4 of them and 92 % with 32. A reward model and `TcsmReward` have no such rest.
    """

    beta: Positive = 1.0  # of log p, in nats of a whole text
    draws: Annotated[int, Meta(ge=4, le=256)] = 4  # of what is hidden of a pair, each in a part of the times

    @property
    def about(self) -> About:
        """The reference is held; the network begins as it does."""
        how = "it is what the preferences are to change: `zoo train tcsm/stdlib` makes one"
        reference = Network(self.plain, alike=ALIKE, how=how, entry="weights.reference=RUN:net")
        return dataclasses.replace(self.plain.about, networks={"net": _start(self), "reference": reference})

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Winners `tokens` [B, T] and losers `rejected` [B, T]."""
        return _pair(batch, self.length)

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters of the network and of its reference."""
        return {"net": self.init_net(rng), "reference": self.init_net(rng)}

    def rewards(self, params: Params, tokens: jax.Array, rng: jax.Array) -> jax.Array:
        """beta (B - B of the reference) [M, B], B a bound of log p, of M texts [M, B, T] of each of B rows.

        Both networks and all texts of a row get the same times and hidden places: the noise that they share cancels.
        """
        many, rows = tokens.shape[:2]
        when, what = jax.random.split(rng)
        t = inside((jax.random.uniform(when, (rows,)) + jnp.arange(self.draws)[:, None]) / self.draws)  # [draws, B]
        keys, noise = jax.random.split(what, t.shape), self.times.noise(t)
        hide = jax.vmap(jax.vmap(self.process.corrupt), (None, 0, None))  # of a row, then of the texts that share it
        xt = jax.vmap(hide, (0, None, 0))(keys, tokens, noise)  # [draws, M, B, T]
        flat = (self.draws * many * rows, self.length)
        clean, times = jnp.broadcast_to(tokens, xt.shape), jnp.broadcast_to(t[:, None], xt.shape[:3])

        def bound(net: Params) -> jax.Array:
            found = self.nelbo(net, clean.reshape(flat), xt.reshape(flat), times.reshape(-1))
            return found.reshape(xt.shape[:3]).mean(0)

        return self.beta * (jax.lax.stop_gradient(bound(params["reference"])) - bound(params["net"]))

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """-log of the probability that winners are chosen, a mean over pairs; `right` is the share of pairs in their order."""
        chosen, rejected = self.rewards(params, jnp.stack([batch["tokens"], batch["rejected"]]), rng)
        return preferred(chosen, rejected).mean(), _agreement(chosen, rejected)

    def nll(self, params: Params, batch: Batch, keys: jax.Array) -> jax.Array:
        """As of `Tcsm`."""
        return self.plain.nll(params, batch, keys)


def _agreement(chosen: jax.Array, rejected: jax.Array) -> dict[str, jax.Array]:
    margin = chosen - rejected
    return {"right": jnp.where(margin == 0, 0.5, margin > 0).mean(), "margin": margin.mean()}


@dataclass(frozen=True)
class TcsmRewardModel(Reader):
    """A reward out of preferences, as Bradley and Terry see them: `zoo.derived.Classifier(RUN)` is that reward, for `TcsmReward`."""

    @property
    def about(self) -> About:
        """Of texts; it has no likelihood and no sampler."""
        return About(unit="sequences", vocabulary=self.vocab, tokens=self.length)

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Winners `tokens` [B, T] and losers `rejected` [B, T]."""
        return _pair(batch, self.length)

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters: all texts are worth the same."""
        return self.init_reader(rng, scalar=Scalar())

    def logits(self, params: Params, batch: Batch) -> jax.Array:
        """The reward of each text, [B, 1]."""
        tokens = batch["tokens"]
        x = apply(Embed(self.vocab, self.width), params["embed"], tokens)
        h = apply(self.body, params["body"], x, jnp.zeros(len(tokens)))
        return apply(Scalar(), params["scalar"], h)[:, None]

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """-log of the probability that winners are chosen, a mean over pairs; `right` is the share of pairs in their order."""
        both = jnp.concatenate([batch["tokens"], batch["rejected"]])
        chosen, rejected = jnp.split(self.logits(params, {"tokens": both})[:, 0], 2)
        return preferred(chosen, rejected).mean(), _agreement(chosen, rejected)


# --- a language model -----------------------------------------------------------------------------


@dataclass(frozen=True)
class TcsmDistill(Tcsm):
    """Matched to a language model of any paper: at some noisy positions of a text to p(x_i | the other tokens) of the teacher.

    That conditional takes one pass of the teacher for every candidate in every position; so a few of both are taken, the others
    keep the text's own token. Texts should be the teacher's, or what it was trained on.
    """

    teacher: Annotated[Any, Predicts] = field(kw_only=True)  # a task; its parameters come from `weights.teacher`
    candidates: Annotated[int, Meta(ge=2, le=2**20)] = 4  # K of a position, the text's own token among them; V: exact
    positions: Size = 4  # of a text, noisy ones as far as there are
    proposals: Literal["left", "taylor"] = "left"  # candidates: the likeliest after what is before, or to first order

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates > self.vocab:
            raise UserError(
                f"task.candidates={self.candidates} is more than task.vocab={self.vocab}; choose that or fewer"
            )
        if self.positions > self.length:
            raise UserError(
                f"task.positions={self.positions} is more than task.length={self.length}; choose that or fewer"
            )
        spec, vocab = self.teacher.spec(1), self.teacher.about.vocabulary
        length = spec["tokens"].shape[1] if "tokens" in spec else 0
        if (vocab, length) != (self.vocab, self.length):
            raise UserError(
                f"task.teacher reads texts of {length} tokens out of {vocab}, and this task has task.length={self.length} and "
                f"task.vocab={self.vocab}; choose the teacher's, or another teacher"
            )

    @property
    def about(self) -> About:
        """The teacher is held; the network may begin as one that is trained."""
        how = "train one, e.g. `zoo train tarflow_lm/stdlib:discrete`"
        teacher = Network(self.teacher, Predicts, ("head_dim",), how=how, entry="weights.teacher=RUN")
        return dataclasses.replace(super().about, networks={"net": _start(self, required=False), "teacher": teacher})

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters of the network, and of the teacher."""
        return {**super().init(rng), "teacher": self.teacher.init(rng)}

    def target(
        self, params: Params, batch: Batch, xt: jax.Array, rng: jax.Array
    ) -> tuple[Target, dict[str, jax.Array]]:
        """The teacher's, of the candidates in the positions that are drawn; the data elsewhere."""
        tokens, read = batch["tokens"], functools.partial(self.teacher.predict, params["teacher"])

        def score(texts: jax.Array) -> jax.Array:
            return jnp.take_along_axis(read(texts), texts[..., None], -1).sum((1, 2))

        def rows(texts: jax.Array) -> jax.Array:
            return (read(texts) * texts).sum((1, 2))

        left = self.proposals == "left"
        proposals = read(tokens) if left else taylor(rows, tokens, self.vocab)
        order = jax.random.uniform(rng, tokens.shape) + self.process.noisy(xt)
        _, positions = jax.lax.top_k(order, self.positions)
        return top_k(score, tokens, proposals, self.candidates, positions), {}
