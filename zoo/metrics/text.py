"""Metrics of language models: bits per token of held-out texts, statistics of drawn ones, and what each pass changes.

B texts, T tokens, V vocabulary, L flow layers, d numbers per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo import hosts
from zoo.data.pipeline import epoch
from zoo.data.text.tokens import check_vocabulary
from zoo.errors import UserError
from zoo.fields import AtLeast2, Count, Whole
from zoo.metrics.likelihood import per_example
from zoo.metrics.samples import drawer, std_error
from zoo.task import Likely, Metric, Options, Params, Samples, is_text, option_names, options_of

_BIGRAMS = 1_024  # symbols up to which there is a table of all pairs
_LENGTHS = (1, 2, 3)  # of the runs of tokens that are counted


def bounds(nats: jax.Array) -> jax.Array:
    """Of -log p in nats by single draws [draws, B]: their mean, and -log of the mean probability (IWAE); [2, B]."""
    return jnp.stack([nats.mean(0), math.log(len(nats)) - jax.nn.logsumexp(-nats, 0)])


def check_texts(task: Any, metric: Any) -> None:
    """UserError for a task that models no texts."""
    if not is_text(task):
        raise UserError(
            f"the metric {metric.name} is of texts, and {type(task).__name__} models {', '.join(task.spec(1))}; "
            "`zoo list` names the language models"
        )


@dataclass(frozen=True)
class TextBound(Metric):
    """Bits per token of held-out texts: exact, or by an upper bound for a model of latents.

    The headline averages one-draw bounds over draws, as papers report them. With several draws of latents there is the
    importance-weighted bound of each text as well, which is tighter. Noise of a text depends on its index alone.

    The standard error takes texts as independent. Windows cut from one long text are not: neighbours resemble each other,
    and the true error is larger.
    """

    draws: Count = 1  # of the latents of a text
    split: str = "test"
    batch: Count = 32
    limit: Count | None = None  # texts at most
    every: Whole = 0  # steps between measurements while training; 0: at the end only

    name = "text"
    needs = (Likely,)

    def check(self, task: Any) -> None:
        """UserError for a task that models no texts; asked before a run's first step."""
        check_texts(task, self)

    def __call__(self, task: Any, params: Params, data: Any, rng: jax.Array) -> dict[str, Any]:
        """The figures, the standard error over texts, and what they were measured on; `bound` says whether they are one.

        Where the data know how many characters a token stands for on average there is `bits_per_char` as well.

        Raises:
            UserError: no texts, or data of another vocabulary.
        """
        self.check(task)
        spec, likelihood = task.spec(self.batch), task.about.likelihood
        source = data.source(self.split, spec)
        check_vocabulary(task, source)
        nll, found, first = per_example(task, self.draws, bounds), [], 0
        for batch, count in epoch(data, self.batch, split=self.split, spec=spec, limit=self.limit):
            found.append(hosts.fetch(nll(params, batch, first + jnp.arange(self.batch), rng))[:, :count])
            first += count
        length = spec["tokens"].shape[1]
        plain, weighted = np.concatenate(found, 1).astype(np.float64) / length  # nats per token [N] each
        nats = float(plain.mean())
        out: dict[str, Any] = {
            "nats_per_token": nats,
            "bits_per_token": nats / math.log(2),
            "bits_per_token_std_error": std_error(plain) / math.log(2),
            "perplexity": float(np.exp(nats)),
        }
        if share := source.characters_per_token:
            out["bits_per_char"] = out["bits_per_token"] / share
        if self.draws > 1 and (likelihood is None or likelihood.weighted):
            nats = float(weighted.mean())
            out["iw_nats_per_token"], out["iw_bits_per_token"] = nats, nats / math.log(2)
        return {
            **out,
            "bound": likelihood is None or likelihood.kind != "exact",
            "texts": len(plain),
            "draws": self.draws,
            "split": self.split,
        }


# --- drawn texts ----------------------------------------------------------------------------------


def the_tokens(drawn: Mapping[str, jax.Array]) -> jax.Array:
    """Of what a sampler gives, the texts."""
    return drawn["tokens"]


@dataclass(frozen=True, kw_only=True)
class _OfDrawn(Metric):
    """Base: what is measured on drawn texts, and beside it on as many held-out ones."""

    samples: AtLeast2 = 256
    options: Options = field(default_factory=dict)  # of the task's `sample`
    split: str = "test"  # of the held-out texts
    batch: Count = 64
    every: Whole = 0  # steps between measurements while training; 0: at the end only

    needs = (Samples,)

    def check(self, task: Any) -> None:
        """UserError for a task that draws no texts, or not with these options; asked before a run's first step."""
        check_texts(task, self)
        options_of(task, self.options, f"options of the metric {self.name}")

    def drawn(self, task: Any, params: Params, rng: jax.Array, options: Options) -> tuple[np.ndarray, int]:
        """Tokens [N, T] of the samples without those that overflowed (tokens below 0), and how many did.

        Sample i depends on (rng, i) alone.
        """
        parts = drawer(task, options, the_tokens).batches(params, rng, self.samples, self.batch)
        drawn = np.concatenate([tokens for tokens, *_ in parts])
        whole = drawn[(drawn >= 0).all(1)]
        return whole, self.samples - len(whole)

    def held(self, task: Any, data: Any) -> np.ndarray:
        """As many held-out texts [N, T]."""
        return some_texts(task, data, self.split, self.samples)


@dataclass(frozen=True)
class Generation(_OfDrawn):
    """Statistics of drawn texts beside those of held-out ones, which say how far chance alone takes them.

    `unigram_kl` is KL(samples || training texts) in nats over single tokens, `bigram_log_likelihood` the mean of
    log p(token | token before) under the pairs of the training texts with one added to each count (where V is at most
    1,024), `token_entropy` that of the tokens of a text in nats, a mean over texts, and `distinct_n` the share of runs of
    n tokens that occur for the first time, of all in the samples. What starts with `data_` is the same of as many held-out
    texts. Samples that overflowed (tokens below 0) are counted as `not_finite` and left out.
    """

    train: Count = 10_000  # training texts that are counted at most, a fixed random choice

    name = "generation"

    def check(self, task: Any) -> None:
        """UserError for a task that draws no texts, or not with these options; asked before a run's first step."""
        check_texts(task, self)
        if task.about.vocabulary is None:
            raise UserError(
                f"the metric generation counts symbols, and {type(task).__name__} does not say how many there are; set "
                "`vocabulary` in its About"
            )
        super().check(task)

    def __call__(self, task: Any, params: Params, data: Any, rng: jax.Array) -> dict[str, Any]:
        """The figures above and the numbers of texts; of samples none where all overflowed. Sample i depends on (rng, i) alone.

        Raises:
            UserError: options that the sampler does not take, or no texts in a split.
        """
        self.check(task)
        vocabulary = task.about.vocabulary
        train, held = some_texts(task, data, "train", self.train), self.held(task, data)
        whole, lost = self.drawn(task, params, rng, self.options)
        return {
            **(_figures(whole, train, vocabulary) if len(whole) else {}),
            "generated_texts": len(whole),
            "not_finite": lost,
            **{f"data_{k}": v for k, v in _figures(held, train, vocabulary).items()},
            "data_texts": len(held),
        }


def some_texts(task: Any, data: Any, split: str, limit: int) -> np.ndarray:
    """Tokens [N, T] of at most `limit` texts of a split, a fixed random choice: neighbours may be of one document."""
    source = data.source(split, task.spec(1))
    check_vocabulary(task, source)
    if not len(source):
        raise UserError(f"the {split} split has no texts to compare with; choose another split, or shorter texts")
    chosen = np.random.default_rng(0).choice(len(source), min(limit, len(source)), replace=False)
    return np.stack([source[int(i)]["tokens"] for i in np.sort(chosen)])


def _figures(tokens: np.ndarray, train: np.ndarray, vocab: int) -> dict[str, float]:
    found = {"unigram_kl": unigram_kl(tokens, train, vocab)}
    if vocab <= _BIGRAMS:
        found["bigram_log_likelihood"] = bigram_log_likelihood(tokens, train, vocab)
    return {**found, "token_entropy": token_entropy(tokens), **{f"distinct_{n}": distinct(tokens, n) for n in _LENGTHS}}


def unigram_kl(p: np.ndarray, q: np.ndarray, vocab: int) -> float:
    """KL(p || q) in nats between the tokens of two sets of texts, 1/V added to each count of both."""
    logs = []
    for tokens in (p, q):
        counts = np.bincount(tokens.ravel(), minlength=vocab) + 1 / vocab
        logs.append(np.log(counts / counts.sum()))
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum())


def bigram_log_likelihood(tokens: np.ndarray, train: np.ndarray, vocab: int) -> float:
    """Mean of log p(token | token before) over texts [N, T] in nats, p from the pairs of `train` plus one each."""

    def pairs(x: np.ndarray) -> np.ndarray:
        return (x[:, :-1].astype(np.int64) * vocab + x[:, 1:]).ravel()

    table = np.bincount(pairs(train), minlength=vocab**2).reshape(vocab, vocab) + 1.0
    return float(np.log(table / table.sum(1, keepdims=True)).ravel()[pairs(tokens)].mean())


def token_entropy(tokens: np.ndarray) -> float:
    """Entropy in nats of the tokens of a text, a mean over texts [N, T]."""
    shares = [np.unique(row, return_counts=True)[1] / len(row) for row in tokens]
    return float(np.mean([-(p * np.log(p)).sum() for p in shares]))


def distinct(tokens: np.ndarray, n: int) -> float:
    """Different runs of n tokens in texts [N, T], as a share of all; 1 where none fits."""
    if tokens.shape[1] < n:
        return 1.0
    runs = np.lib.stride_tricks.sliding_window_view(tokens, n, axis=1).reshape(-1, n)
    _, ids = np.unique(runs[:, 0], return_inverse=True)
    for column in runs.T[1:]:  # runs so far and the next token, numbered anew: no number grows large
        _, ids = np.unique(ids.astype(np.int64) * (int(tokens.max()) + 1) + column, return_inverse=True)
    return float((ids.max() + 1) / len(runs))


# --- passes ---------------------------------------------------------------------------------------


def the_passes(drawn: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Of what a sampler gives, the text after each layer [B, L + 1, T] and its vectors [B, L + 1, T, d]."""
    return drawn["passes"], drawn["latents"]


@dataclass(frozen=True)
class LatentPasses(Metric):
    """What each flow layer does to a text while it is generated, noise first (arXiv:2507.00425, section 4 and appendix G)."""

    samples: Count = 64
    options: Options = field(default_factory=dict)  # of the task's `sample`
    batch: Count = 16

    name = "passes"
    needs = (Samples,)
    every = 0

    def check(self, task: Any) -> None:
        """UserError: its figures are lists, one for each layer, which have no place in a curve."""
        raise UserError(
            "evals: the metric passes gives a list of layers; take it out, and run `zoo eval RUN passes` after training"
        )

    def __call__(self, task: Any, params: Params, data: Any, rng: jax.Array) -> dict[str, Any]:
        """`passes`, the statistics of each (see `pass_statistics`), and how many samples were not finite and left out.

        Raises:
            UserError: a sampler without passes, or options that it does not take.
        """
        if "passes" not in option_names(task):
            raise UserError(
                f"the metric passes follows a text through the layers of a flow, and {type(task).__name__} has none; give a "
                "flow of texts"
            )
        options = {**self.options, "passes": True}
        options_of(task, options, "options of the metric passes")
        parts = drawer(task, options, the_passes).batches(params, rng, self.samples, self.batch)
        tokens, latents = (np.concatenate(part) for part in zip(*(found for found, *_ in parts)))
        finite = np.isfinite(latents).all((1, 2, 3))
        if not finite.any():
            raise UserError(
                f"none of the {self.samples} samples is finite; the model has diverged, or shrink its noise"
            )
        return {
            "passes": pass_statistics(tokens[finite], latents[finite]),
            "samples": int(finite.sum()),
            "not_finite": int((~finite).sum()),
        }


def pass_statistics(tokens: np.ndarray, latents: np.ndarray) -> list[dict[str, float]]:
    """Statistics of each pass, a mean over texts and `_std`, their standard deviation.

    `norm`, the mean length of a vector; `cosine`, the mean over pairs of vectors of a text; `participation`, the
    participation ratio (sum of eigenvalues)^2 / sum of their squares of the covariance of its vectors, in [1, d]; and, but
    for the first pass, `movement`, the distance between the centroids before and after, and `changed`, the share of tokens.

    Args:
        tokens: [B, L + 1, T].
        latents: [B, L + 1, T, d].
    """
    h = latents.astype(np.float64)
    count = h.shape[2]
    length = np.linalg.norm(h, axis=-1)
    total = np.square((h / (length[..., None] + 1e-9)).sum(2)).sum(-1)  # over all pairs, each vector with itself too
    centre = h.mean(2)
    covariance = np.einsum("bltd,blte->blde", h - centre[:, :, None], h - centre[:, :, None]) / count
    trace, square = np.trace(covariance, axis1=2, axis2=3), np.square(covariance).sum((2, 3))
    own = {
        "norm": length.mean(2),
        "cosine": (total - count) / max(count * (count - 1), 1),
        "participation": np.divide(trace**2, square, out=np.ones_like(trace), where=square > 0),
    }
    between = {
        "movement": np.linalg.norm(centre[:, 1:] - centre[:, :-1], axis=-1),
        "changed": (tokens[:, 1:] != tokens[:, :-1]).mean(2),
    }
    rows: list[dict[str, float]] = []
    for k in range(h.shape[1]):
        values = {name: x[:, k] for name, x in own.items()}
        values |= {name: x[:, k - 1] for name, x in between.items()} if k else {}
        rows.append(
            {n: float(f) for name, x in values.items() for n, f in ((name, x.mean()), (f"{name}_std", x.std()))}
        )
    return rows
