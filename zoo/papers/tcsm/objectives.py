"""TCSM: the losses of one position. All are linear in the target, so that what they average over clean texts is the target.

p is the model's p(x0 | x_t) at a position, as log-probabilities [..., V]; c = p(y) / p(x0) is its concrete score.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from zoo.papers.tcsm.targets import Target

Divergence: TypeAlias = Literal["squared", "gkl", "is"]  # of concrete scores: F = c^2 / 2, c log c, -log c
Objective: TypeAlias = Literal["distribution", "squared", "gkl", "is", "sedd"]
Ratio: TypeAlias = Literal["bce", "lsif", "gkl"]
_CLIP = 12.0  # of -log p inside exponentials, and of log-ratios: beyond, gradients are those of outliers


def expected(values: jax.Array, target: Target) -> jax.Array:
    """The mean over the target [...] of a number for each symbol [..., V]."""
    found = values if target.ids is None else jnp.take_along_axis(values, target.ids, -1)
    return (jnp.exp(target.log) * found).sum(-1)


def distribution(log_p: jax.Array, target: Target) -> jax.Array:
    """The cross-entropy [...] to the target: its forward KL and a constant (the distribution form)."""
    return -expected(log_p, target)


def score(kind: Divergence, log_p: jax.Array, target: Target) -> jax.Array:
    """E[D_F(c, c of the model)] [...] over clean tokens from the target, divided by V, up to a constant (the score form).

    Over tokens of the target generalised KL and Itakura-Saito are one loss, -log p + 1 / (V p) + mean_y log p: both are V KL and
    the sum of p / p_model - log(p / p_model) - 1.
    """
    vocab = log_p.shape[-1]
    if kind == "squared":
        p, clipped = jnp.exp(log_p), jnp.maximum(log_p, -_CLIP)
        norm = jnp.square(p).sum(-1) * expected(jnp.exp(-2 * clipped), target) / 2
        return (norm - expected(p, target) * jnp.exp(-clipped).sum(-1)) / vocab
    inverse = jnp.exp(-jnp.maximum(log_p, -_CLIP))
    return expected(inverse / vocab - log_p, target) + log_p.mean(-1)


def score_entropy(outputs: jax.Array, target: Target) -> jax.Array:
    """Of masked tokens [...], from outputs [..., V] that need not sum to one: sum_y exp(output) - output of the target - 1.

    SEDD's loss (arXiv:2310.16834) divided by sigma' / (e^sigma - 1), exp(output) being its score times e^sigma - 1. Of outputs that
    do sum to one it is the cross-entropy.
    """
    return jnp.exp(outputs).sum(-1) - expected(outputs, target) - 1


def score_entropy_uniform(log_score: jax.Array, target: Target, xt: jax.Array, noise: jax.Array) -> jax.Array:
    """SEDD's loss [...] for the uniform kernel divided by sigma': the generalised KL of ratios of noisy texts, meaned over y.

    Zero where the scores are q(y | x0) / q(x_t | x0) of the target's x0.

    Args:
        log_score: log p_t(y) / p_t(x_t) [..., V] of the model.
        noise: [...].
    """
    vocab = log_score.shape[-1]
    if target.ids is None:
        share = jnp.exp(target.log)
    else:
        share = (jnp.exp(target.log)[..., None] * jax.nn.one_hot(target.ids, vocab)).sum(-2)
    here = xt[..., None] == jnp.arange(vocab)
    own = (here * share).sum(-1, keepdims=True)  # of x0 = x_t
    low = (noise / (noise + vocab * (1 - noise)))[..., None]  # q(y | x0) / q(x0 | x0)
    terms = ((own, low), (share, 1 / low), (1 - own - share, jnp.ones_like(low)))
    ratio = sum(weight * value for weight, value in terms)
    constant = sum(weight * value * (jnp.log(value) - 1) for weight, value in terms)
    each = jnp.exp(log_score) - ratio * log_score + constant
    return jnp.where(here, 0.0, each).sum(-1) / vocab


# --- ratios and preferences -----------------------------------------------------------------------


def _limited(log_ratio: jax.Array) -> jax.Array:
    return jnp.exp(jnp.minimum(log_ratio, _CLIP))


RATIOS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "bce": lambda data, drawn: jax.nn.softplus(-data) + jax.nn.softplus(drawn),
    "lsif": lambda data, drawn: jnp.square(_limited(drawn)) / 2 - _limited(data),
    "gkl": lambda data, drawn: _limited(drawn) - data,
}


def ratio(kind: Ratio, data: jax.Array, drawn: jax.Array) -> jax.Array:
    """The loss [...] of log-ratios of texts from the data and of texts drawn from the reference; their density ratio minimises it."""
    return RATIOS[kind](data, drawn)


def preferred(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """-log of the Bradley-Terry probability [...] that a text with the first reward is chosen before one with the second.

    With beta (B - B of the reference), B a bound of log p, for a reward it is the loss of direct preference optimisation
    (arXiv:2305.18290).
    """
    return jax.nn.softplus(rejected - chosen)
