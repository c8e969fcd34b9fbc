"""Tasks, parameters and a plain transformer in numpy that the tests of PART share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, softmax

from zoo import weights
from zoo.papers.part import (
    MaskedAutoencoder,
    Part,
    PartClassifier,
    Vit,
    crop,
    rebuild,
    relation,
    sample_boxes,
)

SMALL: dict[str, Any] = {"image": 12, "channels": 2, "patch": 4, "width": 8, "depth": 2, "head_dim": 4}  # 9 patches
SERIES: dict[str, Any] = {"image": 0, "length": 24, "channels": 2, "patch": 4, "width": 8, "depth": 1, "head_dim": 4}
# jitted: an operation compiles once by itself, and dozens of them take longer than one program
CROP = jax.jit(crop, static_argnums=2)
RELATION = jax.jit(relation, static_argnames=("sizes", "centred"))
REBUILD = jax.jit(rebuild, static_argnums=1, static_argnames="centred")
BOXES = jax.jit(sample_boxes, static_argnums=(1, 2, 3, 4), static_argnames="whole")
Array = np.ndarray


def numbers(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def some_boxes(seed: int, count: tuple[int, ...], side: float, axes: int, between: tuple[float, float]) -> Array:
    """Boxes [*count, 2, A] inside a signal, without the sampler under test."""
    rng = np.random.default_rng(seed)
    size = rng.uniform(*between, (*count, axes))
    return np.stack([rng.uniform(0, 1, size.shape) * (side - size), size], -2).astype(np.float32)


@functools.cache
def away_from_start(task: Any, seed: int = 0) -> Any:
    """Parameters as no initialiser makes them: every bias, scale and table counts."""
    rng = np.random.default_rng(seed)

    def leaf(path: Any, x: Any) -> jax.Array:
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + 0.3 * rng.normal(size=x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, weights.abstract(task))


def signals(task: Vit, batch: int = 4, seed: int = 0) -> dict[str, jax.Array]:
    """A batch of noise of the task's shape."""
    rng = np.random.default_rng(seed)
    found: dict[str, Any] = {task.key: rng.uniform(-1, 1, task.spec(batch)[task.key].shape).astype(np.float32)}
    if isinstance(task, PartClassifier):
        found["label"] = np.arange(batch, dtype=np.int32) % task.classes
    return {key: jnp.asarray(x) for key, x in found.items()}


def norm(x: Array, scale: Array, bias: Array) -> Array:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale + bias


def by_hand(
    state: dict[str, Array],
    head_dim: int,
    patches: Array,
    positions: Array | None = None,
    seen: Array | None = None,
    keep: Array | None = None,
) -> tuple[Array, Array]:
    """A plain vision transformer in numpy, from tensors by the names and shapes that published ones have."""
    s = {name: np.asarray(x, np.float64) for name, x in state.items()}
    h = np.einsum("bnpqc,dcpq->bnd", patches.astype(np.float64), s["patch_embed.proj.weight"])
    h = np.concatenate([np.repeat(s["cls_token"], len(h), 0), h + s["patch_embed.proj.bias"]], 1)
    h = h if positions is None else h + positions
    batch, tokens, width = h.shape
    looked = np.ones((batch, tokens), bool)
    if seen is not None:
        looked[:, 1:] = seen
    for l in range(sum(name.endswith("norm1.weight") for name in s)):
        of = {name.removeprefix(f"blocks.{l}."): x for name, x in s.items() if name.startswith(f"blocks.{l}.")}
        x = norm(h, of["norm1.weight"], of["norm1.bias"]) @ of["attn.qkv.weight"].T + of["attn.qkv.bias"]
        q, k, v = np.moveaxis(x.reshape(batch, tokens, 3, width // head_dim, head_dim), 2, 0)
        logits = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(head_dim)
        y = softmax(np.where(looked[:, None, None], logits, -np.inf), -1)
        y = np.einsum("bhts,bshk->bthk", y, v).reshape(h.shape) @ of["attn.proj.weight"].T + of["attn.proj.bias"]
        h = h + (y if keep is None else y * keep[l, 0][:, None, None])
        x = norm(h, of["norm2.weight"], of["norm2.bias"]) @ of["mlp.fc1.weight"].T + of["mlp.fc1.bias"]
        y = (x * (1 + erf(x / np.sqrt(2))) / 2) @ of["mlp.fc2.weight"].T + of["mlp.fc2.bias"]
        h = h + (y if keep is None else y * keep[l, 1][:, None, None])
    h = norm(h, s["norm.weight"], s["norm.bias"])
    return h[:, 1:], h[:, 0]


PART = Part(**SMALL, pairs=20)
CLASSIFIER = PartClassifier(**SMALL, classes=4)
MAE = MaskedAutoencoder(**SMALL, mask=0.5, decoder_width=12, decoder_head_dim=4)  # shows 4 of 9


def about_zero(boxes: Array, scaled: bool = True) -> Array:
    """Boxes as a layout has them: the mean centre 0, the geometric mean size 1 along each axis."""
    start, size = boxes[..., 0, :].astype(np.float64), boxes[..., 1, :].astype(np.float64)
    unit = np.exp(np.log(size).mean(-2, keepdims=True)) if scaled else size[..., :1, :]
    centre = (start + size / 2) / unit
    centre -= centre.mean(-2, keepdims=True)
    return np.stack([centre - size / unit / 2, size / unit], -2)


def coordinates(side: int, batch: int = 1) -> jax.Array:
    """Images [B, S, S, 2] whose channels say where a pixel's centre is, (x, y) in pixels."""
    y, x = np.mgrid[:side, :side] + 0.5
    return jnp.asarray(np.broadcast_to(np.stack([x, y], -1), (batch, side, side, 2)), jnp.float32)


class Told:
    """In a network's place: does with what it is given what a test wants."""

    def __init__(self, give: Callable[..., Any]) -> None:
        self.give = give

    def apply(self, variables: Any, *given: Any) -> Any:
        return self.give(*given)


def uniform_beta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of mixing that compile fast."""
    monkeypatch.setattr(jax.random, "beta", lambda key, a, b: jax.random.uniform(key))
