"""Diffusion of tokens: kernels that hide them, schedules of how many are hidden when, and samples of a denoiser step by step.

Noise is the share of tokens that a kernel has replaced, 1 - alpha in the papers: 0 at time 0, the clean text, and 1 at time 1; it is
a number, or broadcasts against tokens. A denoiser gives log p(x0 | x_t) for every position by itself. n or B texts, T tokens, V
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from zoo.dist import constrain

EPS = 1e-3  # of the log-linear and the cosine schedule, and the lowest time that is drawn (arXiv:2406.07524)
_GEOMETRIC = (1e-4, 20.0)  # sigma at both ends (arXiv:2310.16834)
Schedule: TypeAlias = Literal["loglinear", "cosine", "geometric"]


# --- when -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """How the noise grows with time: noise = 1 - exp(-sigma(t))."""

    schedule: Schedule = "loglinear"

    def sigma(self, t: jax.Array) -> jax.Array:
        """The total noise -log alpha at times t; `loglinear` makes the noise grow evenly, `cosine` late (arXiv:2406.07524)."""
        if self.schedule == "geometric":
            low, high = _GEOMETRIC
            return low * jnp.exp(t * math.log(high / low))
        share = t if self.schedule == "loglinear" else 2 * jnp.square(jnp.sin(0.25 * math.pi * t))
        return -jnp.log1p(-(1 - EPS) * share)

    def noise(self, t: jax.Array) -> jax.Array:
        """1 - alpha."""
        return -jnp.expm1(-self.sigma(t))

    def rate(self, t: jax.Array) -> jax.Array:
        """sigma'(t), how often a token is replaced."""
        return jax.jvp(self.sigma, (t,), (jnp.ones_like(t),))[1]

    def weight(self, t: jax.Array) -> jax.Array:
        """-alpha' / (1 - alpha), by which cross-entropies of hidden tokens become the bound of the likelihood."""
        return self.rate(t) / jnp.expm1(self.sigma(t))

    def grid(self, steps: int) -> jax.Array:
        """Noise [steps + 1] that a sampler goes down, all at the start and none at the end."""
        return self.noise(jnp.linspace(1.0, 0.0, steps + 1)).at[0].set(1.0).at[-1].set(0.0)


def inside(share: jax.Array) -> jax.Array:
    """Times in [EPS, 1] of shares in [0, 1)."""
    return EPS + (1 - EPS) * share


def antithetic(rng: jax.Array, count: int) -> jax.Array:
    """Times [count] of a batch, one in each part of [EPS, 1] of equal length: losses differ less than by free draws."""
    return inside((jax.random.uniform(rng) + jnp.arange(count)) / count % 1)


# --- how ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Masked:
    """Tokens become MASK, which is V, one after the last of the vocabulary. Only masked positions are noisy."""

    vocab: int

    def corrupt(self, rng: jax.Array, tokens: jax.Array, noise: jax.Array) -> jax.Array:
        """x_t of clean tokens; noise broadcasts against them."""
        return jnp.where(jax.random.uniform(rng, tokens.shape) < noise, self.vocab, tokens)

    def noisy(self, xt: jax.Array) -> jax.Array:
        """Whether a position can be another token than x_t is."""
        return xt == self.vocab

    def factor(self, xt: jax.Array, y: jax.Array, noise: jax.Array) -> jax.Array:
        """log q(x_t | y) [..., K] of clean tokens y [..., K] or [K], up to what does not depend on y."""
        return jnp.where(self.noisy(xt)[..., None] | (xt[..., None] == y), 0.0, -jnp.inf)

    def prior(self, noise: jax.Array) -> jax.Array:
        """0: what of a text is left at the end of a schedule is not counted."""
        return jnp.zeros_like(noise)

    def back(self, log_p: jax.Array, xt: jax.Array, now: jax.Array, then: jax.Array) -> jax.Array:
        """log p(x_s | x_t) [..., V + 1] of a denoiser's log p(x0 | x_t) [..., V], from noise `now` to the lower noise `then`."""
        stay = jnp.broadcast_to(then / now, xt.shape)[..., None]
        moved = jnp.concatenate([log_p + jnp.log1p(-stay), jnp.log(stay)], -1)
        kept = jnp.where(xt[..., None] == jnp.arange(self.vocab + 1), 0.0, -jnp.inf)
        return jnp.where(self.noisy(xt)[..., None], moved, kept)


@dataclass(frozen=True)
class Uniform:
    """Tokens become one of the vocabulary, each as likely as any other; nobody sees which ones did."""

    vocab: int

    def corrupt(self, rng: jax.Array, tokens: jax.Array, noise: jax.Array) -> jax.Array:
        """As of `Masked`."""
        which, other = jax.random.split(rng)
        drawn = jax.random.randint(other, tokens.shape, 0, self.vocab)
        return jnp.where(jax.random.uniform(which, tokens.shape) < noise, drawn, tokens)

    def noisy(self, xt: jax.Array) -> jax.Array:
        """As of `Masked`: everywhere."""
        return jnp.ones(xt.shape, bool)

    def _likelihood(self, xt: jax.Array, noise: jax.Array, y: jax.Array | None = None) -> jax.Array:
        noise, y = jnp.asarray(noise)[..., None], jnp.arange(self.vocab) if y is None else y
        return (1 - noise) * (xt[..., None] == y) + noise / self.vocab

    def factor(self, xt: jax.Array, y: jax.Array, noise: jax.Array) -> jax.Array:
        """As of `Masked`."""
        return jnp.log(self._likelihood(xt, noise, y))

    def prior(self, noise: jax.Array) -> jax.Array:
        """KL of a token that is so noisy to one that is drawn evenly, which the bound of the likelihood counts."""
        own, other = 1 - noise + noise / self.vocab, noise / self.vocab
        return own * jnp.log(own * self.vocab) + (self.vocab - 1) * other * jnp.log(noise)

    def forward(self, log_p: jax.Array, xt: jax.Array, now: jax.Array, then: jax.Array) -> jax.Array:
        """sum_x p(x | x_t) q_then(y | x) / q_now(x_t | x) [..., V] of each y.

        Where both noises are one it is the ratio p_t(y) / p_t(x_t) of noisy texts that differ in one place (arXiv:2310.16834).
        """
        each, then = jnp.exp(log_p) / self._likelihood(xt, now), jnp.asarray(then)[..., None]
        return (1 - then) * each + then / self.vocab * each.sum(-1, keepdims=True)

    def back(self, log_p: jax.Array, xt: jax.Array, now: jax.Array, then: jax.Array) -> jax.Array:
        """As of `Masked`, [..., V]: sum_y p(y | x_t) q(x_s | x_t, y)."""
        tiny = jnp.finfo(jnp.float32).tiny  # late noise of a schedule may round to one twice
        between = self._likelihood(xt, (now - then) / jnp.maximum(1 - then, tiny))
        return jnp.log(between * self.forward(log_p, xt, now, then))


Kernel: TypeAlias = Masked | Uniform


# --- samples --------------------------------------------------------------------------------------


def sharpened(log_p: jax.Array, temperature: float = 1.0, top_p: float = 1.0) -> jax.Array:
    """log p [..., V] at a temperature, of the fewest likeliest tokens that hold `top_p` of it (arXiv:1904.09751)."""
    if temperature != 1:
        log_p = jax.nn.log_softmax(log_p / temperature)
    if top_p < 1:
        falling = -jnp.sort(-log_p, -1)
        before = jnp.cumsum(jnp.exp(falling), -1) - jnp.exp(falling)
        least = jnp.where(before < top_p, falling, jnp.inf).min(-1, keepdims=True)
        log_p = jax.nn.log_softmax(jnp.where(log_p >= least, log_p, -jnp.inf))
    return log_p


def reveal(
    keys: jax.Array,
    denoise: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    kernel: Kernel,
    grid: jax.Array,
    start: jax.Array,
    known: jax.Array | None = None,
) -> jax.Array:
    """Clean tokens int32 [n, T], drawn step by step down the noise in `grid`; one call of the denoiser a step, in one scan.

    With many steps the law is that of the denoiser's joint, with few the tokens of a step do not know of each other. Draws are
    made in 48 bits: with 24 the tail of a large vocabulary would be cut off.

    Args:
        keys: [n]; text i follows from keys[i] alone.
        denoise: (x_t [n, T], noise [], keys [n]) -> log p(x0 | x_t) [n, T, V], which `sharpened` makes less random.
        grid: noise [steps + 1], falling to 0, as of `Times.grid`.
        start: x_t [n, T] at the first noise.
        known: bool [n, T], positions that stay as they are in `start`; None: none.

    Returns:
        -1 at all positions of a text of which a probability was not finite.
    """

    def step(
        carry: tuple[jax.Array, jax.Array], row: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        (x, lost), (i, now, then) = carry, row
        draw, own = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, i)))(keys), 1, 0)
        log_p = kernel.back(denoise(x, now, own), x, now, then)
        found = jax.vmap(partial(jax.random.categorical, mode="high"))(draw, log_p)
        found = found.astype(jnp.int32) if known is None else jnp.where(known, start, found)
        return (constrain(found, "batch"), lost | jnp.isnan(log_p).any((1, 2))), None

    begin = constrain(start.astype(jnp.int32), "batch"), jnp.zeros(len(start), bool)
    rows = jnp.arange(len(grid) - 1), grid[:-1], grid[1:]
    (x, lost), _ = jax.lax.scan(step, begin, rows)
    return jnp.where(lost[:, None], -1, x)
