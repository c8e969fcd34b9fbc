"""PART: fine-tuning, and the layout of published encoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from part_by_hand import (
    CLASSIFIER,
    MAE,
    PART,
    SMALL,
    Array,
    away_from_start,
    by_hand,
    numbers,
    signals,
    uniform_beta,
)
from scipy.special import log_softmax

from zoo import dist, weights
from zoo.papers.part import (
    AbsolutePosition,
    PartClassifier,
)
from zoo.papers.part import task as tasks
from zoo.papers.part.sampling import grid_patches
from zoo.train.step import split

# the classifier


@pytest.mark.parametrize("pool", ["mean", "class"])
def test_logits_are_those_of_a_plain_vision_transformer(pool: str) -> None:
    task = dataclasses.replace(CLASSIFIER, pool=pool)
    params, batch = away_from_start(task), signals(task)
    run = jax.jit(task.logits)
    state = weights.to_official(task, params)
    z, first = by_hand(state, 4, grid_patches(np.asarray(batch["image"]), 4), state["pos_embed"])
    pooled = z.mean(1) if pool == "mean" else first
    found = np.asarray(run(params, batch))
    np.testing.assert_allclose(found, pooled @ state["head.weight"].T + state["head.bias"], atol=1e-4)
    moved = {"image": np.roll(batch["image"], -4, 2)}
    assert np.abs(run(params, moved) - found).max() > 0.01  # it knows where patches are
    blind = {**params, "positions": {"table": jnp.zeros((10, 8))}}
    np.testing.assert_allclose(run(blind, moved), run(blind, batch), atol=1e-4)


def test_positions_start_fresh_or_as_fixed_codes() -> None:
    fixed = PartClassifier(**SMALL, start="sincos")
    tables = [
        np.asarray(jax.jit(lambda task=task: dist.unbox(task.init(jax.random.key(0)))["positions"]["table"])())
        for task in (fixed, CLASSIFIER)
    ]
    np.testing.assert_array_equal(tables[0], fixed.fixed_positions())
    np.testing.assert_array_equal(tables[0], MAE.fixed_positions())
    assert 0.01 < tables[1].std() < 0.03
    assert np.abs(tables[1]).max() <= 0.04
    codes = fixed.fixed_positions()[1:].reshape(3, 3, 8)
    assert not fixed.fixed_positions()[0].any()
    assert np.ptp(codes[..., :4], 1).max() == 0  # the first half says the row
    assert np.ptp(codes[..., 4:], 0).max() == 0


def test_a_frozen_encoder_is_held_and_gets_no_gradient() -> None:
    task = PartClassifier(**SMALL, classes=4, frozen=True)
    assert task.about.held == ("encoder",)
    assert CLASSIFIER.about.held == ()
    trained, held = split(task, away_from_start(CLASSIFIER))
    assert set(trained) == {"positions", "classifier"}
    assert set(held) == {"encoder"}
    gradient = jax.jit(jax.grad(lambda p: task.loss({**p, **held}, signals(task), jax.random.key(0))[0]))(trained)
    for name, x in weights.flatten(gradient).items():
        assert np.abs(x).max() > 0, name


def shown_to(task: PartClassifier, batch: Any, logits: Array) -> Callable[[int], Any]:
    """To be jitted. Of a seed: the loss with `logits` in the network's place, metrics, and the images that the network gets."""
    kept: list[Any] = []

    @dataclasses.dataclass(frozen=True)
    class Fixed(PartClassifier):
        def _logits(self, params: Any, signal: jax.Array, rng: Any = None) -> jax.Array:
            kept.append(signal)
            return jnp.asarray(logits)

    fixed = Fixed(**dataclasses.asdict(task))
    return lambda seed: (*fixed.loss({}, batch, jax.random.key(seed)), kept.pop())


def test_labels_are_shared_as_pixels_are_and_shares_follow_beta() -> None:
    """Images of one colour for each class: the mean pixel of what is shown is the share of each label."""
    task = PartClassifier(
        image=16, channels=4, patch=4, width=8, depth=1, head_dim=4, classes=4, mixup=0.8, cutmix=1.0, smoothing=0.1
    )  # fmt: skip
    label = np.array([0, 1, 2])
    image = np.broadcast_to(np.eye(4)[label][:, None, None], (3, 16, 16, 4))
    batch, logits = {"image": image.astype(np.float32), "label": label}, numbers(0, 3, 4)
    loss, metrics, seen = jax.jit(jax.vmap(shown_to(task, batch, logits)))(np.arange(3000))
    assert metrics == {}  # accuracy of what label?
    seen = np.asarray(seen)
    shares = seen.mean((2, 3))
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-5)
    wanted = 0.9 * shares + 0.1 / 4
    np.testing.assert_allclose(loss, -(wanted * log_softmax(logits, -1)).sum(-1).mean(-1), rtol=1e-5)
    np.testing.assert_allclose(shares[:, 1], np.eye(4)[1] * np.ones((3000, 1)), atol=1e-6)  # its own other
    cut = np.isin(seen[:, 0], (0, 1)).all((1, 2, 3))
    assert cut.mean() == pytest.approx(0.5, abs=0.05)  # of either, whole batches
    assert np.ptp(seen[~cut], (2, 3)).max() == 0
    mixed, kept = shares[~cut, 0, 0], shares[cut, 0, 0]
    assert mixed.mean() == pytest.approx(0.5, abs=0.03)
    assert mixed.var() == pytest.approx(1 / (4 * 2.6), rel=0.1)  # of Beta(a, a): 1 / (4 (2 a + 1))
    assert kept.mean() > 0.55  # rectangles are cut at the border
    assert kept.min() < 0.2
    other = seen[cut, 0, ..., 0] == 0
    rows, columns = other.any(2), other.any(1)
    np.testing.assert_array_equal(other, rows[:, :, None] & columns[:, None])  # a rectangle
    for x in (rows, columns):
        assert (np.diff(np.pad(x, ((0, 0), (1, 1))).astype(int), axis=1) == 1).sum(1).max() == 1  # of one piece


def test_either_way_of_mixing_may_be_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    uniform_beta(monkeypatch)
    signal = np.broadcast_to(np.arange(2.0)[:, None, None, None], (2, 16, 16, 1)).astype(np.float32)
    run = jax.jit(jax.vmap(lambda key: [tasks._mixed(key, signal, *kind) for kind in ((0.8, 0.0), (0.0, 1.0))]))
    for both, (found, share) in enumerate(run(jax.random.split(jax.random.key(0), 20))):
        found, share = np.asarray(found), np.broadcast_to(share, (20, 2, 1))[..., 0]
        np.testing.assert_allclose(found[:, 1].mean((1, 2, 3)), share[:, 1], atol=1e-5)
        np.testing.assert_allclose(found[:, 0].mean((1, 2, 3)), 1 - share[:, 0], atol=1e-5)
        assert share.std() > 0.1
        assert set(np.unique(found)) == {0.0, 1.0} if both else np.ptp(found, (2, 3, 4)).max() == 0


def test_smoothing_and_accuracy_where_nothing_is_mixed() -> None:
    task, logits = PartClassifier(**SMALL, classes=4, smoothing=0.2), numbers(1, 4, 4)
    batch = signals(task)
    loss, metrics, images = jax.jit(shown_to(task, batch, logits))(0)
    np.testing.assert_array_equal(images, batch["image"])
    wanted = 0.8 * np.eye(4)[np.asarray(batch["label"])] + 0.2 / 4
    assert float(loss) == pytest.approx(-(wanted * log_softmax(logits, -1)).sum(-1).mean(), rel=1e-5)
    assert float(metrics["accuracy"]) == (logits.argmax(-1) == np.asarray(batch["label"])).mean()


def test_a_share_of_images_has_a_rectangle_of_noise() -> None:
    image = jnp.full((600, 16, 16, 2), 5.0)
    found = np.asarray(jax.jit(tasks._erased, static_argnums=2)(jax.random.key(0), image, 0.25))
    rubbed = (found != 5).all(-1)
    np.testing.assert_array_equal(rubbed, (found != 5).any(-1))
    assert rubbed.any((1, 2)).mean() == pytest.approx(0.25, abs=0.05)
    rows, columns = rubbed.any(2), rubbed.any(1)
    np.testing.assert_array_equal(rubbed, rows[:, :, None] & columns[:, None])
    area = rubbed.mean((1, 2))
    assert area.max() < 0.42  # a third, to whole pixels
    assert 0.05 < area[area > 0].mean() < 0.2
    noise = found[rubbed]
    assert noise.mean() == pytest.approx(0, abs=0.05)
    assert noise.std() == pytest.approx(1, abs=0.05)


# published layouts


def test_an_encoder_without_positions_is_published_with_none_and_fixed_ones_with_theirs() -> None:
    for task in (PART, AbsolutePosition(**SMALL)):
        state = weights.to_official(task, away_from_start(task))
        np.testing.assert_array_equal(state["pos_embed"], np.zeros((1, 10, 8)))
    params = away_from_start(MAE)
    state = weights.to_official(MAE, params)
    np.testing.assert_array_equal(state["pos_embed"], MAE.fixed_positions()[None])
    assert not any("decoder" in name for name in state)
    del state["pos_embed"]  # published ones may lack it
    back = weights.flatten(weights.from_official(MAE, state, {"decoder": params["decoder"]}))
    for name, x in weights.flatten(params).items():
        np.testing.assert_array_equal(back[name], x, err_msg=name)
