"""Texts of three tokens out of three, by enumeration: laws, posteriors and samplers exact in NumPy, and a denoiser that is a table."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo.papers.tcsm import Tcsm
from zoo.task import Params

V = L = 3
CLEAN = np.array(list(itertools.product(range(V), repeat=L)))  # [27, L]
NOISY = np.array(list(itertools.product(range(V + 1), repeat=L)))  # [64, L], 3 is MASK
HIDING = np.array(list(itertools.product((False, True), repeat=L)))  # [8, L]
NOT_SEEN = len(NOISY) - 1  # the text that is all MASK


def law(seed: int = 0, spread: float = 0.3) -> np.ndarray:
    """p [27], a Dirichlet with a little of everything."""
    return 0.999 * np.random.default_rng(seed).dirichlet([spread] * len(CLEAN)) + 1e-3 / len(CLEAN)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * (np.log(p) - np.log(q))).sum())


def index(texts: Any, states: int = V + 1) -> Any:
    """The number of a text [..., L] among all of them."""
    return texts[..., 0] * states**2 + texts[..., 1] * states + texts[..., 2]


def kernel(noise: float, masked: bool) -> np.ndarray:
    """q(x_t | x_0) [V, V or V + 1] of one token."""
    if masked:
        return np.concatenate([(1 - noise) * np.eye(V), np.full((V, 1), noise)], 1)
    return (1 - noise) * np.eye(V) + noise / V


def posterior(p: np.ndarray, noise: float, masked: bool) -> tuple[np.ndarray, np.ndarray]:
    """Law of noisy texts [S], and p(x0 | x_t) [S, 27], over all S noisy ones."""
    states, q = NOISY if masked else CLEAN, kernel(noise, masked)
    both = p * np.prod([q[CLEAN[:, i]][:, states[:, i]] for i in range(L)], 0).T
    total = both.sum(1)
    return total, both / np.maximum(total[:, None], 1e-300)


def marginals(posteriors: np.ndarray) -> np.ndarray:
    """p(x0_i | x_t) [S, L, V] of [S, 27]."""
    return np.einsum("sx,xiv->siv", posteriors, np.eye(V)[CLEAN])


def drawn(table: Callable[[float], np.ndarray], grid: np.ndarray, masked: bool) -> np.ndarray:
    """The exact law [S] of a sampler's texts by going through all states, each step with Bayes' rule token by token.

    Args:
        table: noise -> p(x0_i | x_t) [S, L, V].
    """
    states = NOISY if masked else CLEAN
    now = (states == V).all(1).astype(float) if masked else np.full(len(states), 1 / len(states))
    for high, low in itertools.pairwise(grid):
        between = 1 - (1 - high) / (1 - low)
        step = np.eye(V + 1) if masked else kernel(between, False)
        if masked:
            step[:V], step[:V, V] = (1 - between) * step[:V], between
        # p(x_s | x_t, y) [y, t, s] of one token
        joint = kernel(low, masked)[:, None, :] * step.T[None]
        joint = joint / np.maximum(joint.sum(-1, keepdims=True), 1e-300)
        each = np.einsum("siv,vsiz->siz", table(high), joint[:, states])  # [S, L, z]
        moves = np.prod([each[:, i][:, states[:, i]] for i in range(L)], 0)
        now = now @ moves
    return now


def pruned(law: np.ndarray) -> np.ndarray:
    """Of the law of noisy texts that of the clean ones."""
    return law[index(CLEAN)]


@dataclass(frozen=True)
class Tabular(Tcsm):
    """A denoiser whose outputs are a table [64, L, V] (of the uniform kernel [27, L, V]), in the place of the network."""

    vocab: int = V
    length: int = L

    def init_net(self, rng: jax.Array) -> Params:
        return net(jnp.zeros((len(NOISY if self.kernel == "masked" else CLEAN), L, V)))

    def compared(self, net: Params, xt: jax.Array, noise: jax.Array, call: Any, *arrays: jax.Array) -> jax.Array:
        outputs = net["table"][index(xt, V + 1 if self.kernel == "masked" else V)]
        found: jax.Array = call(outputs, xt, jnp.broadcast_to(noise[:, None], xt.shape), *arrays)
        return found


def net(table: Any) -> Params:
    """Parameters `net` of a `Tabular`."""
    return {"table": jnp.asarray(table), "body": {"trunk": {}}}
