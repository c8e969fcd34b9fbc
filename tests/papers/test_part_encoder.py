"""PART: the encoder and the heads against plain numpy, with random weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from part_by_hand import (
    CLASSIFIER,
    CROP,
    PART,
    SMALL,
    Array,
    Told,
    away_from_start,
    by_hand,
    numbers,
    signals,
)
from scipy.special import softmax

from zoo import dist, weights
from zoo.papers.part import (
    AbsolutePosition,
    MaskedAutoencoder,
    Part,
    PartClassifier,
    Vit,
)
from zoo.papers.part.model import CrossAttentionHead, PairwiseHead
from zoo.papers.part.sampling import grid_patches

# the encoder


@functools.cache
def encode(scan: bool = False, remat: str = "none") -> Callable[..., Any]:
    """Patches [B, N, ...] to tokens and class token, of the small encoder."""
    encoder = dataclasses.replace(PART, scan=scan, remat=remat).encoder()

    @jax.jit
    def run(params: Any, patches: Any, positions: Any = None, seen: Any = None, keep: Any = None) -> Any:
        patches = patches.reshape(*patches.shape[:2], -1)
        return encoder.apply({"params": params["encoder"]}, patches, positions, seen, keep)

    return run


def test_the_encoder_is_a_plain_vision_transformer() -> None:
    params, patches, codes = away_from_start(PART), numbers(1, 3, 9, 4, 4, 2), numbers(2, 10, 8)
    state = weights.to_official(PART, params)
    assert len(state) == 6 + 12 * 2
    for positions in (None, codes):
        found = encode()(params, patches, positions)
        for one, other in zip(found, by_hand(state, 4, patches, positions), strict=True):
            assert np.abs(other).max() > 0.5
            np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(("scan", "remat"), [(False, "none"), (True, "full")])
def test_keys_left_out_and_branches_dropped_are_as_by_hand(scan: bool, remat: str) -> None:
    params, patches, codes = away_from_start(PART), numbers(1, 3, 9, 4, 4, 2), numbers(2, 3, 10, 8)
    seen = np.random.default_rng(3).random((3, 9)) < 0.5
    seen[2] = False  # nothing but the class token
    keep = np.array([[[1, 1, 1], [0, 1, 1]], [[0, 0, 1.5], [1.5, 0, 0]]], np.float32)
    expected = by_hand(weights.to_official(PART, params), 4, patches, codes, seen, keep)
    if scan:
        params = weights.matching(params, weights.abstract(dataclasses.replace(PART, scan=True)))
    found = encode(scan, remat)(params, patches, codes, seen, keep)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
    ("task", "kept"),
    [
        (Part(**SMALL, pairs=20, mask=0.8, patches=25), 5),  # in binary 25 * (1 - 0.8) is less than 5
        (AbsolutePosition(**SMALL, mask=0.3), 6),
        (PART, None),
    ],
    ids=lambda x: str(x) if isinstance(x, int | None) else type(x).__name__,
)
def test_the_number_of_keys_is_the_share_that_is_not_masked(
    task: Any, kept: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, seen = away_from_start(PART if isinstance(task, Part) else task), []

    def give(patches: Any, positions: Any, keys: Any, keep: Any) -> Any:
        seen.append(keys)
        return jnp.zeros((*patches.shape[:2], 8)), None

    @jax.jit
    def run(batch: Any) -> Any:
        task.loss(params, batch, jax.random.key(0))
        return seen.pop()

    monkeypatch.setattr(Vit, "encoder", lambda task: Told(give))
    found = run(signals(task, 64))
    if kept is None:
        assert found is None
        return
    found = np.asarray(found)
    assert found.shape == (64, task.count if isinstance(task, Part) else 9)
    assert found.sum(1).tolist() == [kept] * 64
    assert len({tuple(row) for row in found.tolist()}) > 16  # each example for itself


def test_branches_are_dropped_more_often_in_later_layers_and_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Vit, "encoder", lambda task: Told(lambda *given: (given[3], None)))
    task = Part(**{**SMALL, "depth": 3}, drop_path=0.4)
    patches = jnp.zeros((5000, 1, 4, 4, 2))
    keep = np.asarray(jax.jit(lambda rng: task.encode({"encoder": None}, patches, rng=rng)[0])(jax.random.key(0)))
    assert keep.shape == (3, 2, 5000)
    for layer, rate in enumerate((0.0, 0.2, 0.4)):
        assert (keep[layer] == 0).mean() == pytest.approx(rate, abs=0.02)
        np.testing.assert_allclose(keep[layer][keep[layer] > 0], 1 / (1 - rate), rtol=1e-6)
        np.testing.assert_allclose(keep[layer].mean(-1), 1, atol=0.05)
    assert np.abs(np.corrcoef(keep[1:].reshape(4, -1)) - np.eye(4)).max() < 0.06


@pytest.mark.parametrize("kind", [Part, AbsolutePosition, MaskedAutoencoder, PartClassifier])
def test_branches_are_dropped_in_training_alone(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task = kind(**SMALL, drop_path=0.5, **({"pairs": 20} if kind is Part else {}))
    params, batch, key, kept = weights.abstract(task), signals(task), jax.random.key(0), []

    def give(patches: Any, positions: Any, seen: Any, keep: Any) -> Any:
        kept.append(keep)
        return jnp.zeros((*patches.shape[:2], 8)), jnp.zeros((len(patches), 8))

    monkeypatch.setattr(Vit, "encoder", lambda task: Told(give))
    jax.eval_shape(task.loss, params, batch, key)
    (trained,) = kept
    assert trained.shape == (2, 2, 4)
    kept.clear()
    for name in ("features", "logits", "off_grid", "relations"):
        if hasattr(task, name):
            jax.eval_shape(getattr(task, name), params, batch, *([key] if name in ("off_grid", "relations") else []))
    assert kept == [None] * (2 + (kind in (Part, PartClassifier)))


def test_features_are_the_mean_of_the_map_of_the_grid() -> None:
    params, batch = away_from_start(PART), signals(PART)
    found, of = jax.jit(lambda *x: (PART.feature_map(*x), PART.features(*x)))(params, batch)
    z, _ = by_hand(weights.to_official(PART, params), 4, grid_patches(np.asarray(batch["image"]), 4))
    np.testing.assert_allclose(found, z.reshape(4, 3, 3, 8), atol=1e-4)
    np.testing.assert_allclose(of, z.mean(1), atol=1e-4)


def test_off_grid_tokens_are_those_of_the_crops_at_their_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = signals(CLASSIFIER)

    def give(patches: Any, positions: Any, seen: Any, keep: Any) -> Any:
        assert positions is seen is keep is None  # no positions, though it has some
        return patches, None

    monkeypatch.setattr(Vit, "encoder", lambda task: Told(give))
    patches, boxes = jax.jit(CLASSIFIER.off_grid)({"encoder": None}, batch, jax.random.key(0))
    boxes = np.asarray(boxes)
    assert boxes.shape == (4, 9, 2, 2)
    assert 2 <= boxes[:, :, 1].min() < 3
    assert 6 < boxes[:, :, 1].max() <= 8
    np.testing.assert_allclose(patches, np.asarray(CROP(batch["image"], boxes, 4)).reshape(4, 9, 32), atol=1e-6)


# heads


def head_of(module: Any, seed: int = 0, patches: int = 6, width: int = 8) -> tuple[Any, Array, Array, Array]:
    """Random parameters, tokens [3, N, D], references and targets."""
    z = numbers(seed, 3, patches, width)
    i, j = np.divmod(np.random.default_rng(seed).permutation(patches * patches)[:20], patches)
    shapes = dist.unbox(jax.eval_shape(module.init, jax.random.key(0), z, i, j))["params"]
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: 0.7 * rng.normal(size=x.shape).astype(np.float32), shapes)
    return params, z, i, j


@pytest.mark.parametrize(
    ("query", "heads", "residual"),
    [("patch_cat", 2, True), ("positional", 4, False)],
)
def test_the_attention_head_asks_all_patches_of_each_pair(query: str, heads: int, residual: bool) -> None:
    module = CrossAttentionHead(4, heads, query, residual, "float32")
    params, z, i, j = head_of(module)
    found = jax.jit(module.apply)({"params": params}, z, i, j)
    assert found.shape == (3, 20, 4)
    w = {name: x["kernel"].astype(np.float64) for name, x in params.items()}
    bias = {name: x["bias"].astype(np.float64) for name, x in params.items() if "bias" in x}

    def codes(slots: Array, width: int) -> Array:
        angle = slots[:, None] * 10_000.0 ** (-np.arange(width // 2) / (width // 2))
        return np.concatenate([np.sin(angle), np.cos(angle)], -1)

    for b, n in np.ndindex(3, 20):
        if query == "patch_cat":
            both = np.concatenate([z[b, i[n]], z[b, j[n]]])
            ask = both @ np.concatenate([w["reference"], w["target"]]) + bias["reference"]
            keys = z[b].astype(np.float64)
        else:
            ask = np.concatenate([codes(j[n : n + 1], 4)[0], codes(i[n : n + 1], 4)[0]])
            keys = z[b] + codes(np.arange(6), 8)
        q = ask @ w["query"] + bias["query"]
        k, v = keys @ w["key"], keys @ w["value"] + bias["value"]
        heard = []
        for part in np.split(np.arange(8), heads):
            weight = softmax(k[:, part] @ q[part] / np.sqrt(len(part)))
            heard.append(weight @ v[:, part])
        out = np.concatenate(heard) @ w["out"] + bias["out"] + (ask if residual else 0)
        np.testing.assert_allclose(found[b, n], out @ w["relation"] + bias["relation"], atol=2e-4)


def test_the_pairwise_head_is_one_linear_map() -> None:
    module = PairwiseHead(4)
    params, z, i, j = head_of(module)
    found = jax.jit(module.apply)({"params": params}, z, i, j)
    kernel = np.concatenate([params["reference"]["kernel"], params["target"]["kernel"]])
    both = np.concatenate([z[:, i], z[:, j]], -1)
    np.testing.assert_allclose(found, both @ kernel + params["reference"]["bias"], atol=1e-5)
