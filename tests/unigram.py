"""The smallest language model there is, and texts for it: what the tests of commands, metrics and training share."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from zoo.data.pipeline import Data, Source
from zoo.data.text.vocabulary import Vocabulary, text8
from zoo.task import About, Batch, Likelihood, Params, sample_keys


@dataclass(frozen=True)
class Temperature:
    temperature: float = 1.0


@dataclass(frozen=True)
class Unigram:
    """Tokens drawn from one table of logits; `spread` makes its likelihood a bound that varies with the draw."""

    vocab: int = 27
    length: int = 8
    spread: float = 0.0

    Sampling = Temperature

    @property
    def about(self) -> About:
        return About(
            unit="sequences",
            likelihood=Likelihood((self.length,), "bound"),
            vocabulary=self.vocab,
            completes=self.takes,
        )

    @property
    def takes(self) -> tuple[str, ...]:
        return ()

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {"tokens": jax.ShapeDtypeStruct((batch, self.length), jnp.int32)}

    def init(self, rng: jax.Array) -> Params:
        return {"logits": jnp.zeros(self.vocab)}

    def nll(self, params: Params, batch: Batch, keys: jax.Array) -> jax.Array:
        logs = jax.nn.log_softmax(params["logits"])
        return self.spread * jax.vmap(jax.random.uniform)(keys) - logs[batch["tokens"]].sum(1)

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        keys = sample_keys(rng, len(batch["tokens"]))
        loss = self.nll(params, batch, keys).mean() / self.length
        return loss, {"bits": loss / math.log(2)}

    def sample(
        self, params: Params, rng: jax.Array, n: int, conditions: Batch | None = None, options: Any = None
    ) -> dict[str, jax.Array]:
        keys = rng if rng.ndim else jax.random.split(rng, n)
        logits = params["logits"] / (options or Temperature()).temperature
        return {"tokens": jax.vmap(lambda k: jax.random.categorical(k, logits, shape=(self.length,)))(keys)}


@dataclass(frozen=True)
class Keyed(Unigram):
    """Its likelihood goes through a whole batch at once; `seen` are the shapes of the tokens that it was asked for."""

    seen: ClassVar[list[tuple[int, ...]]] = []

    def nll(self, params: Params, batch: Batch, keys: jax.Array) -> jax.Array:
        self.seen.append(batch["tokens"].shape)
        return super().nll(params, batch, keys)


@dataclass(frozen=True)
class Lossy(Unigram):
    """Texts whose first token is even overflow, which is said by a token of -1."""

    def sample(
        self, params: Params, rng: jax.Array, n: int, conditions: Batch | None = None, options: Any = None
    ) -> dict[str, jax.Array]:
        tokens = super().sample(params, rng, n, conditions, options)["tokens"]
        lost = tokens[:, 0] % 2 == 0
        return {"tokens": tokens.at[:, 3].set(jnp.where(lost, -1, tokens[:, 3])), "lost": lost}


@dataclass(frozen=True)
class Passes:
    strength: float = 0.5
    passes: bool = False


@dataclass(frozen=True)
class Editor(Unigram):
    """A text out of two passes: the first keeps half of the tokens of the noise, the second all but the first token."""

    Sampling = Passes
    takes = ("tokens",)

    def sample(
        self, params: Params, rng: jax.Array, n: int, conditions: Batch | None = None, options: Any = None
    ) -> dict[str, jax.Array]:
        drawn = super().sample(params, rng, n)["tokens"]
        noise = drawn if conditions is None else conditions["tokens"]
        half = jnp.where(jnp.arange(self.length) % 2 == 0, noise, 1)
        last = half.at[:, 0].set(0)
        if not (options or Passes()).passes:
            return {"tokens": last}
        states = jnp.stack([noise, half, last], 1)
        return {"tokens": last, "passes": states, "latents": jax.nn.one_hot(states, 3) * (1.0 + states[..., None])}


@dataclass(frozen=True)
class Filled:
    strength: float = 0.5
    network_calls: int = 7


@dataclass(frozen=True)
class Filler(Editor):
    """Fills holes in with the token 1."""

    Sampling = Filled

    @property
    def about(self) -> About:
        return replace(super().about, holes=True)

    def sample(
        self, params: Params, rng: jax.Array, n: int, conditions: Batch | None = None, options: Any = None
    ) -> dict[str, jax.Array]:
        given = jnp.full((n, self.length), -1) if conditions is None else conditions["tokens"]
        return {"tokens": jnp.where(given < 0, 1, given)}


class Listed(list, Source):
    """Examples in a list, as a source."""


@dataclass(frozen=True)
class Windows(Data):
    """A text of 27 symbols, cut into windows: even ones to train, odd ones to test."""

    text: str = "the quick brown fox jumps over the lazy dog " * 6
    share: float = 1.0  # characters that a token is said to stand for

    def vocabulary(self) -> Vocabulary:
        return text8()

    def source(self, split: str, spec: Any = None) -> Any:
        length = 8 if spec is None else spec["tokens"].shape[1]
        ids = text8().encode(self.text)
        rows = ids[: len(ids) // length * length].reshape(-1, length)
        return _Source(rows[0 if split == "train" else 1 :: 2], self.vocabulary(), self.share)


class _Source(Source):
    def __init__(self, rows: np.ndarray, vocabulary: Vocabulary, characters_per_token: float) -> None:
        self.rows, self.vocabulary, self.characters_per_token = rows, vocabulary, characters_per_token

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"tokens": self.rows[index]}
