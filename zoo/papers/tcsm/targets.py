"""TCSM: what the denoiser is matched to. Pure functions of clean texts and of whatever can score them, to a `Target`.

B texts, T tokens, V vocabulary, K candidates for a position, P positions of a text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from zoo.diffusion.tokens import Kernel

Score = Callable[[jax.Array], jax.Array]  # log p [N] of texts [N, T], up to a constant


class Target(NamedTuple):
    """The target's p(x_i | the other clean tokens) at every position, over some candidates or all of the vocabulary.

    The right target depends on the clean text that it was made from: for a denoiser that tells positions by themselves texts
    have to come from the target itself, or be weighted by what it is more likely to draw them.
    """

    ids: jax.Array | None  # [B, T, K]; None: K = V, in the order of the vocabulary
    log: jax.Array  # [B, T, K], of sum one
    weight: jax.Array  # [B], or [B, T] where positions differ


def one_hot(tokens: jax.Array) -> Target:
    """The data's own token: cross-entropy."""
    return Target(tokens[..., None], jnp.zeros((*tokens.shape, 1)), jnp.ones(len(tokens)))


def scored(score: Score, tokens: jax.Array, ids: jax.Array, positions: jax.Array | None = None) -> jax.Array:
    """Scores [B, P, K] of the texts that differ from `tokens` in one place, position by position.

    Args:
        ids: candidates [B, P, K] for these positions.
        positions: [B, P]; None: all T.
    """
    b, t = tokens.shape
    places = jnp.broadcast_to(jnp.arange(t), (b, t)) if positions is None else positions

    def one(of: tuple[jax.Array, jax.Array]) -> jax.Array:
        place, options = of  # [B], [B, K]
        texts = jnp.where(jnp.arange(t) == place[:, None, None], options[..., None], tokens[:, None])
        return score(texts.reshape(-1, t)).reshape(options.shape)

    return jnp.moveaxis(jax.lax.map(one, (places.T, jnp.moveaxis(ids, 1, 0))), 0, 1)


def exact(score: Score, tokens: jax.Array, vocab: int) -> Target:
    """All V T texts that differ in one place, each scored."""
    ids = jnp.broadcast_to(jnp.arange(vocab), (*tokens.shape, vocab))
    return Target(None, jax.nn.log_softmax(scored(score, tokens, ids)), jnp.ones(len(tokens)))


def top_k(score: Score, tokens: jax.Array, proposals: jax.Array, k: int, positions: jax.Array | None = None) -> Target:
    """The token itself and the k - 1 likeliest others of `proposals`, scored and normalised among themselves.

    Positions that are left out have the token itself for a target, which has the same minimiser.

    Args:
        proposals: [B, T, V], the larger the likelier.
        positions: [B, P], different ones of each text; None: all.
    """
    (b, t), vocab = tokens.shape, proposals.shape[-1]
    own = tokens[..., None] == jnp.arange(vocab)
    ids = jax.lax.top_k(jnp.where(own, jnp.inf, proposals), k)[1].astype(tokens.dtype)
    if positions is None:
        return Target(ids, jax.nn.log_softmax(scored(score, tokens, ids)), jnp.ones(b))
    rows = jnp.arange(b)[:, None]
    found = jax.nn.log_softmax(scored(score, tokens, ids[rows, positions], positions))
    hard = jnp.broadcast_to(jnp.where(jnp.arange(k) == 0, 0.0, -jnp.inf), (b, t, k))
    return Target(ids, hard.at[rows, positions].set(found), jnp.ones(b))


def taylor(score: Score, tokens: jax.Array, vocab: int) -> jax.Array:
    """First-order log p [B, T, V] of the texts that differ in one place, from one backward pass: to propose, not to match.

    Args:
        score: of texts as rows [N, T, V] in place of ids. A language model has to read its tokens from them and to take the
            log-probabilities of its predictions by them.
    """
    rows = jax.nn.one_hot(tokens, vocab)
    slope = jax.grad(lambda rows: score(rows).sum())(rows)
    return jax.nn.log_softmax(slope)


def given_noise(target: Target, kernel: Kernel, xt: jax.Array, noise: jax.Array) -> Target:
    """The target given x_t [B, T] too: times q(x_t | y), normalised again. Of masked positions it stays as it is."""
    ids = jnp.arange(kernel.vocab) if target.ids is None else target.ids
    return target._replace(log=jax.nn.log_softmax(target.log + kernel.factor(xt, ids, noise)))
