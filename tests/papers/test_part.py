"""PART: geometry, crops, heads and the other pretexts against the paper's equations and plain numpy, with random weights."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.special import erf, log_softmax, softmax

from zoo import dist, weights
from zoo.errors import UserError
from zoo.papers.part import (
    AbsolutePosition,
    MaskedAutoencoder,
    Part,
    PartClassifier,
    Vit,
    crop,
    grid_boxes,
    rebuild,
    relation,
    sample_boxes,
)
from zoo.papers.part import task as tasks
from zoo.papers.part.model import CrossAttentionHead, PairwiseHead
from zoo.papers.part.sampling import grid_patches, pad_crop, random_resized_crop
from zoo.train.step import split

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


@functools.cache
def loss_of(task: Any) -> Callable[..., Any]:
    return jax.jit(task.loss)


# relations of boxes


def test_the_relation_of_a_pair_by_hand() -> None:
    """i = (0, 0, 8, 4), j = (8, 4, 12, 12) as corners."""
    i, j = np.array([[[0, 0], [8, 4]], [[8, 4], [4, 8]]], np.float32)
    assert RELATION(i, j).tolist() == [0.75, 1.5, 0.5, 2.0]
    assert RELATION(i, j, centred=False).tolist() == [1.0, 1.0, 0.5, 2.0]
    assert RELATION(i, j, sizes=False).tolist() == [0.75, 1.5]
    assert RELATION(i, j, sizes=False, centred=False).tolist() == [1.0, 1.0]
    assert RELATION(j, i).tolist() == [-1.5, -0.75, 2.0, 0.5]
    assert RELATION(i[:, :1], j[:, :1]).tolist() == [0.75, 0.5]
    assert RELATION(i, i).tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("axes", [1, 2])
def test_relations_form_a_group(axes: int, centred: bool) -> None:
    i, j, k = (some_boxes(seed, (500,), 32, axes, (2, 8)) for seed in range(3))

    def parts(a: Array, b: Array) -> tuple[Array, Array]:
        found = np.asarray(RELATION(a, b, centred=centred), np.float64)
        return found[:, :axes], found[:, axes:]

    (d_ij, s_ij), (d_ji, s_ji), (d_jk, s_jk), (d_ik, s_ik) = parts(i, j), parts(j, i), parts(j, k), parts(i, k)
    np.testing.assert_allclose(d_ji, -d_ij * i[:, 1] / j[:, 1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(s_ji, 1 / s_ij, rtol=1e-5)
    np.testing.assert_allclose(d_ik, d_ij + s_ij * d_jk, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(s_ik, s_ij * s_jk, rtol=1e-5)
    moved = [np.stack([x[:, 0] * 3 + 7, x[:, 1] * 3], 1) for x in (i, j)]
    np.testing.assert_allclose(
        RELATION(*moved, centred=centred), np.concatenate([d_ij, s_ij], -1), rtol=1e-4, atol=1e-4
    )


# where boxes are


@pytest.mark.parametrize("extent", [(32, 20), (40,)])
def test_boxes_are_uniform_in_size_and_in_what_is_left(extent: tuple[int, ...]) -> None:
    n = 40_000
    found = np.asarray(BOXES(jax.random.key(0), (n // 2, 2), extent, 2.0, 8.0), np.float64)
    assert found.shape == (n // 2, 2, 2, len(extent))
    start, size = found.reshape(n, 2, len(extent)).swapaxes(0, 1)
    assert size.min() >= 2
    assert size.max() <= 8
    assert start.min() >= 0
    assert (start + size <= np.array(extent) + 1e-5).all()
    share = start / (np.array(extent) - size)
    columns = np.concatenate([(size - 2) / 6, share], 1)
    for x in columns.T:
        counts = np.histogram(x, 20, (0, 1))[0]
        assert ((counts - n / 20) ** 2 / (n / 20)).sum() < 50  # chi squared of 19 degrees: 5e-4 to 1 that it is more
    apart = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    assert np.abs(apart).max() < 0.02  # width, height and both starts know nothing of each other
    again = np.asarray(BOXES(jax.random.key(0), (n // 2, 2), extent, 2.0, 8.0))
    np.testing.assert_array_equal(again, found)
    assert not np.array_equal(np.asarray(BOXES(jax.random.key(1), (n // 2, 2), extent, 2.0, 8.0)), found)


def test_whole_boxes_have_every_size_and_start_alike() -> None:
    start, size = np.moveaxis(np.asarray(BOXES(jax.random.key(1), (30_000,), (9, 7), 2, 4, whole=True)), 1, 0)
    for axis, side in enumerate((9, 7)):
        for s in (2, 3, 4):
            of = start[:, axis][size[:, axis] == s]
            assert len(of) / 30_000 == pytest.approx(1 / 3, abs=0.015)
            values, counts = np.unique(of, return_counts=True)
            assert values.tolist() == list(range(side - s + 1))  # both ends
            np.testing.assert_allclose(counts / len(of), 1 / (side - s + 1), atol=0.015)
    assert set(np.unique(size)) == {2, 3, 4}


def test_boxes_as_large_as_the_signal_begin_at_its_edge() -> None:
    found = BOXES(jax.random.key(2), (50,), (5,), 5, 5, whole=True)
    np.testing.assert_array_equal(found, np.broadcast_to([[0.0], [5.0]], (50, 2, 1)))


# what boxes show


def test_the_grid_is_in_raster_order_and_its_boxes_show_its_patches() -> None:
    found = grid_boxes((12, 8), 4)
    assert found[:, 0].tolist() == [[0, 0], [4, 0], [8, 0], [0, 4], [4, 4], [8, 4]]  # x first, y slowest
    assert (found[:, 1] == 4).all()
    image, series = numbers(0, 2, 8, 12, 3), numbers(1, 2, 12, 3)
    assert grid_boxes((12,), 4)[:, 0].tolist() == [[0], [4], [8]]
    for signal, boxes in ((image, found), (series, grid_boxes((12,), 4))):
        cut = CROP(signal, np.broadcast_to(boxes, (2, *boxes.shape)), 4)
        np.testing.assert_allclose(grid_patches(signal, 4), cut, atol=1e-6)
    np.testing.assert_array_equal(grid_patches(image, 4)[1, 4], image[1, 4:8, 4:8])
    np.testing.assert_array_equal(grid_patches(series, 4)[1, 2], series[1, 8:])


def test_a_box_of_the_patch_size_at_a_whole_pixel_is_a_slice() -> None:
    image = numbers(0, 3, 16, 16, 2)
    start = np.random.default_rng(0).integers(0, 13, (3, 10, 2))
    start[0, :4] = [[0, 0], [12, 12], [0, 12], [12, 0]]  # the corners
    boxes = np.stack([start, np.full_like(start, 4)], 2).astype(np.float32)
    found = np.asarray(CROP(image, boxes, 4))
    assert found.shape == (3, 10, 4, 4, 2)
    for b, n in np.ndindex(3, 10):
        x, y = start[b, n]
        np.testing.assert_allclose(found[b, n], image[b, y : y + 4, x : x + 4], atol=1e-6)


def dense_resampling(side: int, start: float, size: float, patch: int) -> Array:
    """[P, side]: triangles around the centres of P cells, as wide as a cell or a pixel, with weights that sum to 1."""
    centre = start + (np.arange(patch) + 0.5) * size / patch
    pixel = np.arange(side) + 0.5
    weight = np.maximum(0, 1 - np.abs(pixel - centre[:, None]) / max(size / patch, 1))
    return weight / weight.sum(1, keepdims=True)


def test_crops_are_those_of_pillow_and_of_a_dense_matrix() -> None:
    patch, side = 6, 24
    image = numbers(0, 2, side, side, 2)
    boxes = some_boxes(1, (2, 40), side, 2, (patch / 2, 2 * patch))
    boxes[0, 0] = [[0, 0], [3, 12]]
    boxes[0, 1] = [[21, 12], [3, 12]]  # at the border, where the triangle is cut
    boxes[0, 2] = [[0, 0], [24, 24]]  # the whole image, four times as large
    found = np.asarray(CROP(image, boxes, patch))
    for b, n in np.ndindex(2, 40):
        (x, y), (w, h) = boxes[b, n].astype(np.float64)
        across, down = dense_resampling(side, x, w, patch), dense_resampling(side, y, h, patch)
        np.testing.assert_allclose(found[b, n], np.einsum("py,qx,yxc->pqc", down, across, image[b]), atol=2e-5)
        edges = (x, y, min(x + w, side), min(y + h, side))
        for c in range(2):
            whole = Image.fromarray(image[b, ..., c])
            theirs = whole.resize((patch, patch), Image.Resampling.BILINEAR, box=edges)
            np.testing.assert_allclose(found[b, n, ..., c], theirs, atol=2e-5, err_msg=str(boxes[b, n]))


def test_crops_of_series_are_those_of_a_dense_matrix() -> None:
    series = numbers(0, 2, 40, 3)
    boxes = some_boxes(1, (2, 20), 40, 1, (3, 12))
    found = np.asarray(CROP(series, boxes, 6))
    assert found.shape == (2, 20, 6, 3)
    for b, n in np.ndindex(2, 20):
        (start,), (size,) = boxes[b, n].astype(np.float64)
        np.testing.assert_allclose(found[b, n], dense_resampling(40, start, size, 6) @ series[b], atol=2e-5)


def test_crops_of_constants_and_ramps() -> None:
    """A constant stays one at every border; pixel centres of a ramp are where they are, away from borders."""
    side, patch = 32, 6
    y, x = np.mgrid[:side, :side] + 0.5
    image = np.stack([np.full_like(x, 3.5), x, y], -1)[None].astype(np.float32)
    boxes = some_boxes(0, (1, 200), side, 2, (3, 12))
    found = np.asarray(CROP(jnp.asarray(image), jnp.asarray(boxes), patch))[0]
    np.testing.assert_allclose(found[..., 0], 3.5, atol=1e-5)
    start, size = boxes[0].swapaxes(0, 1)
    centre = start[:, None] + (np.arange(patch)[:, None] + 0.5) * size[:, None] / patch  # [N, P, 2]
    inside = ((start > 2) & (start + size < side - 2)).all(1)
    assert inside.sum() > 50
    for axis, got in ((0, found[:, 0, :, 1]), (1, found[:, :, 0, 2])):
        small = inside & (size[:, axis] <= patch)
        np.testing.assert_allclose(got[small], centre[small, :, axis], atol=1e-4)
        np.testing.assert_allclose(got[inside], centre[inside, :, axis], atol=0.1)  # triangles of pixels: nearly


def test_crops_move_with_the_image() -> None:
    whole = numbers(0, 1, 40, 40, 1)
    boxes = some_boxes(1, (1, 40), 20, 2, (3, 12)) + np.array([[6, 6], [0, 0]], np.float32)
    here = CROP(jnp.asarray(whole[:, :34, :34]), jnp.asarray(boxes), 6)
    moved = boxes - np.array([[5, 3], [0, 0]], np.float32)
    there = CROP(jnp.asarray(whole[:, 3:37, 5:39]), jnp.asarray(moved), 6)
    np.testing.assert_allclose(there, here, atol=2e-5)


def test_larger_boxes_do_not_alias() -> None:
    """Stripes of one pixel, cut at half the resolution, are grey; without a wider triangle they would be stripes."""
    stripes = np.broadcast_to(np.where(np.arange(32) % 2, 1.0, -1.0)[:, None], (1, 32, 32, 1)).astype(np.float32)
    found = CROP(jnp.asarray(stripes), jnp.array([[[[5.0, 7.0], [12.0, 12.0]], [[5.3, 7.2], [11.0, 11.0]]]]), 6)
    assert np.abs(found).max() < 0.15


def coordinates(side: int, batch: int = 1) -> jax.Array:
    """Images [B, S, S, 2] whose channels say where a pixel's centre is, (x, y) in pixels."""
    y, x = np.mgrid[:side, :side] + 0.5
    return jnp.asarray(np.broadcast_to(np.stack([x, y], -1), (batch, side, side, 2)), jnp.float32)


def test_resized_crops_keep_a_share_of_the_area() -> None:
    side, n = 16, 512
    found = np.asarray(jax.jit(random_resized_crop)(jax.random.key(0), coordinates(side, n), 0.3), np.float64)
    across, down = found[:, 8, :, 0], found[:, :, 8, 1]
    assert np.ptp(found[..., 0], axis=1).max() < 1e-3  # columns stay columns
    size = np.stack([across[:, 9] - across[:, 6], down[:, 9] - down[:, 6]], -1) * side / 3
    start = np.stack([across[:, 7] + across[:, 8], down[:, 7] + down[:, 8]], -1) / 2 - size / 2
    assert start.min() > -1e-3
    assert (start + size).max() < side + 1e-3
    area, form = size.prod(1) / side**2, size[:, 0] / size[:, 1]
    assert 0.3 - 1e-3 < area.min() < 0.33
    assert area.max() > 0.9
    assert 0.75 - 1e-3 < form.min() < 0.8
    assert 1.25 < form.max() < 4 / 3 + 1e-3
    free = area < 0.7  # larger ones may be cut to fit
    assert np.abs(np.log(form[free]).mean()) < 0.03
    assert np.histogram(area, 4, (0.3, 0.7))[0].min() > 0.7 * n * 0.1 / 0.7
    share = start / np.maximum(side - size, 1e-9)
    assert share[free].mean(0) == pytest.approx([0.5, 0.5], abs=0.05)
    assert len(np.unique(np.round(area, 4))) > n / 2  # each image for itself


def test_padded_crops_shift_by_up_to_an_eighth_over_black() -> None:
    found = np.asarray(jax.jit(pad_crop)(jax.random.key(0), coordinates(16, 256)))
    shift = found[:, 8, 8] - 8.5
    assert {tuple(s) for s in shift} == {(x, y) for x in range(-2, 3) for y in range(-2, 3)}
    here = np.mgrid[:16, :16].transpose(1, 2, 0)[None, ..., ::-1] + 0.5 + shift[:, None, None]
    inside = ((here > 0) & (here < 16)).all(-1, keepdims=True)
    np.testing.assert_array_equal(found, np.where(inside, here, -1))


# layouts


def about_zero(boxes: Array, scaled: bool = True) -> Array:
    """Boxes as a layout has them: the mean centre 0, the geometric mean size 1 along each axis."""
    start, size = boxes[..., 0, :].astype(np.float64), boxes[..., 1, :].astype(np.float64)
    unit = np.exp(np.log(size).mean(-2, keepdims=True)) if scaled else size[..., :1, :]
    centre = (start + size / 2) / unit
    centre -= centre.mean(-2, keepdims=True)
    return np.stack([centre - size / unit / 2, size / unit], -2)


@pytest.mark.parametrize("sizes", [True, False])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("axes", [1, 2])
def test_exact_relations_give_the_layout(axes: int, centred: bool, sizes: bool) -> None:
    boxes = some_boxes(0, (3, 12), 32, axes, (2, 8) if sizes else (4, 4))
    for moved in (boxes, boxes * 2.5, boxes + np.array([[9.0], [0.0]], np.float32)):
        all_of = RELATION(moved[:, :, None], moved[:, None], sizes=sizes, centred=centred)
        found = REBUILD(jnp.asarray(all_of), axes, 4.0, centred=centred)
        assert found.shape == (3, 12, 2, axes)
        np.testing.assert_allclose(found, about_zero(boxes), atol=2e-4)


def test_the_layout_averages_noise_and_survives_any_ratio() -> None:
    boxes = some_boxes(0, (1, 40), 16, 2, (4, 4))
    true = np.asarray(RELATION(boxes[:, :, None], boxes[:, None]))
    noise = 0.2 * numbers(1, *true.shape)
    off = np.asarray(REBUILD(jnp.asarray(true + noise), 2, 16.0)) - about_zero(boxes)
    centre = off[0, :, 0] + off[0, :, 1] / 2
    # mean of 40 pairs, counted both ways round, and what the noisy sizes add
    assert centre.std() < 0.2 / np.sqrt(2 * 40) * 2
    assert off[..., 1, :].std() < 0.2 / np.sqrt(2 * 40) * 2
    bad = true.copy()
    bad[0, :3, 5, 2:] = -1.0
    bad[0, 7, 2, 2:] = 0.0
    bad[0, 1, 2, 3] = 1e9
    found = np.asarray(REBUILD(jnp.asarray(bad), 2, 16.0))
    assert np.isfinite(found).all()
    assert (found[:, :, 1] > 0).all()


def test_sizes_are_rebuilt_up_to_the_ratio_that_is_named() -> None:
    boxes = some_boxes(0, (3, 12), 64, 2, (1, 2))
    boxes[:, :, 1] = np.where(np.random.default_rng(1).random((3, 12, 2)) < 0.5, 1, 32)
    true = RELATION(boxes[:, :, None], boxes[:, None])
    np.testing.assert_allclose(REBUILD(true, 2, 32.0), about_zero(boxes), rtol=1e-4, atol=1e-3)
    assert np.abs(REBUILD(true, 2, 16.0) - about_zero(boxes)).max() > 0.1


# the encoder


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


def test_permuted_patches_give_permuted_tokens_unless_there_are_positions() -> None:
    params, patches, codes = away_from_start(PART), numbers(1, 3, 9, 4, 4, 2), numbers(2, 10, 8)
    order = np.random.default_rng(0).permutation(9)
    z, first = map(np.asarray, encode()(params, patches))
    moved, same = encode()(params, patches[:, order])
    np.testing.assert_allclose(moved, z[:, order], atol=1e-5)
    np.testing.assert_allclose(same, first, atol=1e-5)
    assert np.abs(z[:, order] - z).max() > 0.1
    z, first = map(np.asarray, encode()(params, patches, codes))
    moved, same = map(np.asarray, encode()(params, patches[:, order], codes))
    assert np.abs(moved - z[:, order]).max() > 0.1
    assert np.abs(same - first).max() > 0.01


def test_patches_that_are_no_keys_influence_themselves_alone() -> None:
    params, patches = away_from_start(PART), numbers(1, 3, 9, 4, 4, 2)
    seen = np.arange(9) != np.array([[0], [4], [8]])
    other = np.where(seen[..., None, None, None], patches, -patches)
    z, first = map(np.asarray, encode()(params, patches, None, seen, None))
    changed, same = map(np.asarray, encode()(params, other, None, seen, None))
    np.testing.assert_allclose(changed[seen], z[seen], atol=1e-6)
    np.testing.assert_allclose(same, first, atol=1e-6)
    assert np.abs(changed - z)[~seen].max(-1).min() > 0.05


class Told:
    """In a network's place: does with what it is given what a test wants."""

    def __init__(self, give: Callable[..., Any]) -> None:
        self.give = give

    def apply(self, variables: Any, *given: Any) -> Any:
        return self.give(*given)


@pytest.mark.parametrize(
    ("task", "kept"),
    [
        (Part(**SMALL, mask=0.5), 4),  # int(9 * 0.5)
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
    whole = dataclasses.replace(task, drop_path=0.0)
    assert whole.encode({"encoder": None}, patches, rng=jax.random.key(0))[0] is None


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
    [("patch_cat", 1, False), ("patch_cat", 2, True), ("positional", 1, True), ("positional", 4, False)],
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


# pairs


def test_pairs_are_drawn_as_the_paper_says() -> None:
    every = Part(**SMALL, pairs=81)
    few = Part(**SMALL, pairs=20)
    matching = Part(**SMALL, pairing="matching", pairs=7, head="pairwise")
    independent = Part(**SMALL, head="pairwise", pairs=20_000, patches=5)
    assert [task.paired for task in (every, matching, independent)] == ["distinct", "matching", "independent"]
    draw = jax.jit(lambda rng: [jnp.stack(task.draw_pairs(rng)) for task in (every, few, matching, independent)])
    whole, some, matched, free = (np.asarray(x) for x in draw(jax.random.key(0)))
    assert sorted(map(tuple, whole.T.tolist())) == [(i, j) for i in range(9) for j in range(9)]  # self-pairs too
    assert some.shape == (2, 20)
    assert len(set(map(tuple, some.T.tolist()))) == 20
    assert matched[0].tolist() == list(range(7))
    assert len(set(matched[1].tolist())) == 7
    assert 0 <= matched.min() <= matched.max() < 9
    counts = np.zeros((5, 5))
    np.add.at(counts, tuple(free), 1)
    np.testing.assert_allclose(counts / 20_000, 1 / 25, atol=0.006)
    for one, same, other in zip(
        (whole, some, matched, free), draw(jax.random.key(0)), draw(jax.random.key(1)), strict=True
    ):
        np.testing.assert_array_equal(one, same)
        assert not np.array_equal(one, other)


# the loss


@dataclasses.dataclass(frozen=True)
class Knows(Part):
    """Answers from the boxes themselves, or with reference and target swapped."""

    swapped: bool = False
    add: float = 0.0

    def crops(self, batch: Any, rng: jax.Array, *, augment: bool = True) -> tuple[jax.Array, jax.Array]:
        boxes = self.boxes(rng, len(batch[self.key]), self.count)
        return boxes, boxes

    def encode(self, params: Any, patches: jax.Array, positions: Any = None, **_: Any) -> Any:
        assert positions is None
        return patches, None

    def relate(self, params: Any, z: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        assert i.ndim == j.ndim == 1  # one choice for the whole batch
        i, j = (j, i) if self.swapped else (i, j)
        axes = len(self.extent)
        a, b = z[:, i], z[:, j]
        middle = 0.5 if self.centred else 0.0
        shift = (b[..., 0, :] + middle * b[..., 1, :] - a[..., 0, :] - middle * a[..., 1, :]) / a[..., 1, :]
        ratio = b[..., 1, :] / a[..., 1, :]
        if self.target_norm == "log_ratio":
            ratio = jnp.log(ratio)
        found = jnp.concatenate([shift, ratio], -1) if self.sizes else shift
        assert found.shape[-1] == axes * (1 + self.sizes)
        return (found / tasks._deviations(self) if self.target_norm == "std" else found) + self.add


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"centred": False, "target_norm": "log_ratio", "dtype": "bfloat16"},
        {"sampling": "pixels", "sizes": False, "patches": 5},
        {"sampling": "grid", "head": "pairwise", "target_norm": "std"},
        {**SERIES, "target_norm": "log_ratio", "smallest": 0.5, "largest": 20},
        {**SERIES, "sizes": False},
    ],
    ids=lambda x: "-".join(str(v) for k, v in x.items() if k not in SERIES) or "paper",
)
def test_a_task_that_knows_the_answers_has_no_loss(fields: dict[str, Any]) -> None:
    """The row of a relation is its reference: in float32 the exact answer leaves nothing, and the swapped one much."""
    task = Knows(**{**SMALL, **fields, "pairs": 20, "pairing": "independent"})
    batch = signals(task)

    @jax.jit
    def run(batch: Any, rng: jax.Array) -> Any:
        swapped = dataclasses.replace(task, swapped=True).loss({}, batch, rng)[0] if not fields else None
        asked = task.target_norm != "std" and (task.sizes or not task.length)  # the others add no law
        found = task.relations({}, batch, rng) if asked else None
        return task.loss({}, batch, rng), swapped, found

    (loss, metrics), wrong, found = run(batch, jax.random.key(0))
    assert loss.dtype == jnp.float32
    assert loss < 1e-9
    assert wrong is None or wrong > 0.1
    assert set(metrics) == {"distance", *(f"mse_{name}" for name in task.relation_names)}
    assert max(metrics.values()) < 1e-5
    if found is None:
        return
    n = task.count
    assert found["true"].shape == (4, n, n, len(task.relation_names))
    np.testing.assert_allclose(found["predicted"], found["true"], rtol=1e-4, atol=1e-5)
    found = jax.tree.map(np.asarray, found)
    boxes = found["boxes"]
    for i, j in ((0, 1), (3, 2)):
        step = (boxes[:, j] - boxes[:, i])[:, 0] + (boxes[:, j] - boxes[:, i])[:, 1] / 2 * task.centred
        np.testing.assert_allclose(
            found["true"][:, i, j, : boxes.shape[-1]], step / boxes[:, i, 1], rtol=1e-4, atol=1e-5
        )
    if task.sizes:
        np.testing.assert_allclose(found["layout"], about_zero(boxes), atol=1e-3)


@dataclasses.dataclass(frozen=True)
class Silent(Knows):
    """Answers nothing."""

    def relate(self, params: Any, z: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        return jnp.zeros((len(z), len(i), len(self.relation_names)))


def test_what_never_differs_is_no_large_target() -> None:
    task = Silent(**SMALL, sampling="pixels", target_norm="std", pairs=16)
    loss, metrics = loss_of(task)({}, signals(task), jax.random.key(0))
    assert 0.5 < loss < 2
    assert metrics["mse_dw"] == metrics["mse_dh"] == 1


def test_errors_are_means_over_examples_pairs_and_numbers() -> None:
    cases = (("squared", 3.0, 9.0), ("absolute", -3.0, 3.0), ("huber", 3.0, 2.5), ("huber", 0.5, 0.125))
    known = [Knows(**SMALL, pairs=20, error=error, add=off, pairing="independent") for error, off, _ in cases]
    results = jax.jit(lambda batch: [task.loss({}, batch, jax.random.key(0)) for task in known])(signals(PART))
    for (_, off, value), (loss, metrics) in zip(cases, results, strict=True):
        assert float(loss) == pytest.approx(value, rel=1e-5)
        assert float(metrics["mse_dw"]) == pytest.approx(off**2, rel=1e-5)
        assert float(metrics["distance"]) == pytest.approx(abs(off) * np.sqrt(2), rel=1e-5)


@pytest.mark.parametrize("augment", ["none", "resized"])
def test_boxes_say_where_patches_were_taken(augment: str) -> None:
    """Images of coordinates show where a patch is. Augmentation comes first: relations of what the network sees."""
    task = Part(image=32, channels=2, patch=8, width=8, depth=1, head_dim=4, pairs=40, augment=augment)
    patches, boxes = jax.jit(lambda batch, rng: task.crops(batch, rng))(
        {"image": coordinates(32, 8)}, jax.random.key(0)
    )
    assert patches.shape == (8, 16, 8, 8, 2)
    seen, boxes = np.asarray(patches), np.asarray(boxes)
    place = seen.mean((2, 3))
    size = np.stack([seen[:, :, 0, 6, 0] - seen[:, :, 0, 1, 0], seen[:, :, 6, 0, 1] - seen[:, :, 1, 0, 1]], -1) * 8 / 5
    read = np.stack([place - size / 2, size], 2)
    of_both = [np.asarray(RELATION(x[:, :, None], x[:, None])) for x in (read, boxes)]
    error, spread = of_both[0] - of_both[1], of_both[1].std((0, 1, 2))
    assert (np.sqrt((error**2).mean((0, 1, 2))) < 0.15 * spread).all()  # borders, where pixels end
    if augment == "none":
        assert np.abs(place - (boxes[:, :, 0] + boxes[:, :, 1] / 2)).max() < 0.7
    else:  # the same boxes, of another part of each image
        assert np.abs(place - (boxes[:, :, 0] + boxes[:, :, 1] / 2)).max() > 3


@pytest.mark.parametrize(
    ("norm", "sampling", "sizes"),
    [
        ("raw", "grid", True),
        ("log_ratio", "off_grid", True),
        ("log_ratio", "pixels", False),
        ("std", "off_grid", True),
        ("std", "pixels", True),  # all of one size
        ("std", "grid", True),
    ],
)
def test_normalised_targets_have_a_way_back(norm: str, sampling: str, sizes: bool) -> None:
    task = Part(**SMALL, sampling=sampling, sizes=sizes, target_norm=norm, pairs=20)

    @jax.jit
    def run(rng: jax.Array) -> Any:
        boxes = task.boxes(rng, 3000, 9)[:, :2]
        raw = task.compared(boxes[:, 0], boxes[:, 1])
        normal = task.normalised(raw)
        return boxes, raw, normal, task.raw(normal)

    boxes, raw, normal, back = map(np.asarray, run(jax.random.key(5)))
    np.testing.assert_allclose(back, raw, rtol=1e-5, atol=1e-6)
    if norm == "raw":
        np.testing.assert_array_equal(normal, raw)
    if norm == "std" and sampling != "grid":
        np.testing.assert_allclose(normal[:, : 4 if sampling == "off_grid" else 2].std(0), 1, atol=0.06)
    if norm == "std" and sampling == "grid":
        i, j = np.divmod(np.arange(81), 9)
        cells = grid_boxes((12, 12), 4)
        spread = np.asarray(task.normalised(RELATION(cells[i], cells[j]))).std(0)
        np.testing.assert_allclose(spread, [1, 1, 0, 0], rtol=1e-5)
    if norm == "std" and sampling != "off_grid":
        np.testing.assert_array_equal(normal[:, 2:], 1)  # what never differs stays as it is
    if norm == "log_ratio" and sizes:
        np.testing.assert_allclose(normal[:, 2:], np.log(boxes[:, 1, 1] / boxes[:, 0, 1]), atol=1e-5)
        np.testing.assert_array_equal(normal[:, :2], raw[:, :2])


def test_deviations_are_constants_also_where_a_trace_asks_first() -> None:
    task = Part(**SMALL, target_norm="std", smallest=3, pairs=20)
    found = jax.jit(task.normalised)(jnp.ones((2, 4)))
    np.testing.assert_allclose(found, task.normalised(jnp.ones((2, 4))), rtol=1e-6)
    assert isinstance(tasks._deviations(task), np.ndarray)


# the other pretexts


def test_the_slot_of_a_patch_is_by_chance_one_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    task = AbsolutePosition(**SMALL, known=0.4)
    monkeypatch.setattr(Vit, "encoder", lambda task: Told(lambda *_: (jnp.asarray(numbers(0, 4, 9, 8)), None)))
    blind = {"encoder": None, "head": {"kernel": np.zeros((8, 9), np.float32), "bias": np.zeros(9, np.float32)}}
    loss, metrics = jax.jit(task.loss)(blind, signals(task), jax.random.key(0))
    assert float(loss) == pytest.approx(np.log(9), rel=1e-6)
    assert 0 <= float(metrics["accuracy"]) <= 1 / 5  # the first slot wins, which one of the five may have


@pytest.mark.parametrize("known", [0.0, 0.4])
def test_patches_whose_slot_is_told_are_not_asked(known: float, monkeypatch: pytest.MonkeyPatch) -> None:
    task = AbsolutePosition(**{**SMALL, "width": 12}, known=known)
    batch, told, right = signals(task), [], None

    def give(patches: Any, positions: Any, seen: Any, keep: Any) -> Any:
        if positions is None:
            given = np.zeros((4, 9), bool)
        else:
            assert positions.shape == (4, 10, 12)
            given = (positions[:, 1:] != 0).any(-1)
        told.append((given, positions))
        good, bad = np.eye(9), np.roll(np.eye(9), 1, 1)
        logits = jnp.where((given != right)[..., None], good, bad)  # of those told, the opposite of the others
        return jnp.pad(50 * logits, ((0, 0), (0, 0), (0, 3))), None

    @jax.jit
    def run(answer: jax.Array) -> Any:
        nonlocal right
        right = answer
        return *task.loss(params, batch, jax.random.key(0)), told.pop()

    monkeypatch.setattr(Vit, "encoder", lambda task: Told(give))
    params = {"encoder": None, "head": {"kernel": jnp.eye(12)[:, :9], "bias": jnp.zeros(9)}}
    loss, metrics, (given, positions) = jax.tree.map(np.asarray, run(True))
    assert float(loss) == pytest.approx(0, abs=1e-5)
    assert float(metrics["accuracy"]) == 1
    assert given.sum(1).tolist() == [round(known * 9)] * 4
    if known:
        expected = np.where(np.pad(given, ((0, 0), (1, 0)))[..., None], task.fixed_positions(), 0)
        np.testing.assert_array_equal(positions, expected)  # nothing for the class token and those that are asked
    loss, metrics, _ = run(False)
    assert float(loss) == pytest.approx(50, rel=1e-3)
    assert float(metrics["accuracy"]) == 0


MAE = MaskedAutoencoder(**SMALL, mask=0.5, decoder_width=12, decoder_head_dim=4)  # shows 4 of 9


@pytest.mark.parametrize("normalise", [True, False])
def test_masked_patches_are_not_read_and_visible_ones_not_scored(
    normalise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = dataclasses.replace(MAE, normalise=normalise)
    batch, codes = signals(task), task.fixed_positions()
    patches = np.asarray(batch["image"]).reshape(4, 3, 4, 3, 4, 2).transpose(0, 1, 3, 2, 4, 5).reshape(4, 9, 32)
    answers = patches
    if normalise:
        answers = (patches - patches.mean(-1, keepdims=True)) / patches.std(-1, keepdims=True)
    read: list[Any] = []
    exact: list[Any] = []

    def give(shown: Any, positions: Any, seen: Any, keep: Any) -> Any:
        read.append((shown, positions))
        return jnp.zeros((4, 4, 8)), None

    def fill(z: Any, order: Any, codes: Any) -> Any:
        read.append(codes)
        visible = jax.vmap(lambda row: jnp.zeros(9, bool).at[row[:4]].set(True))(order)
        return jnp.where((visible == exact.pop())[..., None], answers + 7, answers)

    @jax.jit
    def run(hidden_exact: jax.Array) -> Any:
        exact.append(hidden_exact)
        return task.loss({"encoder": None, "decoder": None}, batch, jax.random.key(0))[0], read.pop(), read.pop()

    monkeypatch.setattr(Vit, "encoder", lambda task: Told(give))
    monkeypatch.setattr(MaskedAutoencoder, "_decoder", lambda task: Told(fill))
    loss, told, (shown, positions) = jax.tree.map(np.asarray, run(True))
    assert float(loss) < 1e-6
    np.testing.assert_array_equal(told, task.fixed_positions("decoder_width")[1:])
    assert shown.shape == (4, 4, 32)
    places = np.array([[int(np.abs(codes[1:] - p).sum(-1).argmin()) for p in row[1:]] for row in positions])
    assert all(len(set(row)) == 4 for row in places.tolist())
    assert len(np.unique(places, axis=0)) > 1  # each example for itself
    np.testing.assert_array_equal(shown, np.take_along_axis(patches, places[..., None], 1))
    np.testing.assert_array_equal(positions[:, 1:], codes[1:][places])
    assert not positions[:, 0].any()
    assert float(run(False)[0]) == pytest.approx(49, rel=1e-4)


def test_the_decoder_puts_tokens_in_their_places() -> None:
    params, decoder = away_from_start(MAE)["decoder"], MAE._decoder()
    z, codes = numbers(0, 3, 4, 8), np.asarray(MAE.fixed_positions("decoder_width")[1:])
    order = np.stack([np.random.default_rng(b).permutation(9) for b in range(3)])
    found = jax.jit(decoder.apply)({"params": params}, z, order, codes)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    h = np.zeros((3, 9, 12))
    for b, n in np.ndindex(3, 9):
        token = z[b, n] @ p["in"]["kernel"] + p["in"]["bias"] if n < 4 else p["hidden"]["table"][0]
        h[b, order[b, n]] = token + codes[order[b, n]]
    layer = p["trunk"]["layer0"]
    x = norm(h, **layer["attention_norm"])
    into, last = layer["attention"]["qkv"], layer["attention"]["out"]
    q, k, v = ((x @ into["kernel"][:, s] + into["bias"][s]).reshape(3, 9, 3, 4) for s in range(3))
    y = np.einsum("bhts,bshk->bthk", softmax(np.einsum("bthk,bshk->bhts", q, k) / 2, -1), v).reshape(3, 9, 12)
    h += y @ last["kernel"] + last["bias"]
    up, down = layer["mlp"]["up"], layer["mlp"]["down"]
    x = norm(h, **layer["mlp_norm"]) @ up["kernel"] + up["bias"]
    h += (x * (1 + erf(x / np.sqrt(2))) / 2) @ down["kernel"] + down["bias"]
    out = norm(h, **p["norm"]) @ p["out"]["kernel"] + p["out"]["bias"]
    np.testing.assert_allclose(found, out, atol=2e-4)


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
    assert len(np.unique(codes.reshape(9, 8), axis=0)) == 9


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
    middles = [(x * np.arange(16)).sum(1)[x.any(1)] / x.sum(1)[x.any(1)] for x in (rows, columns)]
    assert [m.mean() for m in middles] == pytest.approx([7.5, 7.5], abs=0.4)


def uniform_beta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of mixing that compile fast."""
    monkeypatch.setattr(jax.random, "beta", lambda key, a, b: jax.random.uniform(key))


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
    task = PartClassifier(**SMALL, classes=4, smoothing=0.2)
    batch = signals(task)
    logits = numbers(1, 4, 4)
    loss, metrics, seen = jax.jit(shown_to(task, batch, logits))(0)
    np.testing.assert_array_equal(seen, batch["image"])
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


@pytest.mark.parametrize("scan", [False, True])
def test_the_published_layout_goes_there_and_back(scan: bool) -> None:
    task = dataclasses.replace(CLASSIFIER, scan=scan)
    params = away_from_start(task)
    state = weights.to_official(task, params)
    assert {name: state[name].shape for name in sorted(state) if not name.startswith("blocks")} == {
        "cls_token": (1, 1, 8),
        "head.bias": (4,),
        "head.weight": (4, 8),
        "norm.bias": (8,),
        "norm.weight": (8,),
        "patch_embed.proj.bias": (8,),
        "patch_embed.proj.weight": (8, 2, 4, 4),
        "pos_embed": (1, 10, 8),
    }
    assert state["blocks.1.attn.qkv.weight"].shape == (24, 8)
    assert state["blocks.1.mlp.fc1.weight"].shape == (32, 8)
    np.testing.assert_array_equal(state["pos_embed"][0], params["positions"]["table"])
    back = weights.flatten(weights.from_official(task, state))
    for name, x in weights.flatten(params).items():
        np.testing.assert_array_equal(back[name], x, err_msg=name)


def test_an_encoder_without_positions_is_published_with_none_and_fixed_ones_with_theirs() -> None:
    for task in (PART, AbsolutePosition(**SMALL)):
        state = weights.to_official(task, away_from_start(task))
        np.testing.assert_array_equal(state["pos_embed"], np.zeros((1, 10, 8)))
    params = away_from_start(MAE)
    state = weights.to_official(MAE, params)
    np.testing.assert_array_equal(state["pos_embed"], MAE.fixed_positions()[None])
    assert not any("decoder" in name for name in state)
    back = weights.from_official(MAE, state, {"decoder": params["decoder"]})
    np.testing.assert_array_equal(back["encoder"]["class"]["table"], params["encoder"]["class"]["table"])
    del state["pos_embed"]
    weights.from_official(MAE, state, {"decoder": params["decoder"]})


# series


@pytest.mark.parametrize(
    "task",
    [
        Part(**SERIES, pairs=30, mask=0.5, residual=True, heads=2),
        Part(**SERIES, pairs=6, sizes=False, sampling="pixels", head="pairwise", pairing="matching"),
        AbsolutePosition(**SERIES, known=0.5, mask=0.5),
        MaskedAutoencoder(**SERIES, decoder_width=8, decoder_head_dim=4),
        PartClassifier(**SERIES, classes=3, mixup=0.8, smoothing=0.1, start="sincos"),
    ],
    ids=lambda task: type(task).__name__,
)
def test_series_train_and_have_maps(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    uniform_beta(monkeypatch)
    params, batch, key = away_from_start(task), signals(task), jax.random.key(0)
    assert task.about.unit == "series"
    assert batch["series"].shape == (4, 24, 2)
    loss, metrics = loss_of(task)(params, batch, key)
    assert 0 < float(loss) < 1e3
    assert np.isfinite(list(metrics.values())).all()
    assert jax.eval_shape(task.feature_map, params, batch).shape == (4, 6, 8)
    z, boxes = jax.eval_shape(task.off_grid, params, batch, key)
    assert z.shape == (4, 6, 8)
    assert boxes.shape == (4, 6, 2, 1)
    if isinstance(task, Part):
        numbers_of = 2 if task.sizes else 1
        assert task.relation_names == ("dt", "dw")[:numbers_of]
        found = jax.eval_shape(task.relations, params, batch, key)
        assert found["patches"].shape == (4, 6, 4, 2)
        assert found["predicted"].shape == found["true"].shape == (4, 6, 6, numbers_of)
        assert found["layout"].shape == (4, 6, 2, 1)
    with pytest.raises(UserError, match=r"task\.length=24: .*; use `zoo export` without"):
        task.import_names()


# what is refused


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (Part, {"image": 0}, "task.image=0 and task.length=0: give one of them"),
        (Part, {"length": 24}, "task.image=12 and task.length=24: give one of them"),
        (Part, {"patch": 5}, "task.patch=5 does not divide task.image=12; choose a divisor, e.g. task.patch=4"),
        (Part, {"image": 0, "length": 25}, "task.patch=4 does not divide task.length=25; .* e.g. task.patch=5"),
        (Part, {"head_dim": 3}, "task.head_dim=3 does not divide task.width=8; .* task.head_dim=2"),
        (Part, {**SERIES, "augment": "pad"}, "task.augment='pad' is for images; set task.augment=none"),
        (Part, {"largest": 13}, "task.largest=13 is larger than task.image=12: .* set task.largest=12 or less"),
        (Part, {"patch": 12}, "two patches, 24, is larger than task.image=12: .* set task.largest=12 or less"),
        (Part, {"smallest": 5, "largest": 3}, "task.smallest=5 and task.largest=3 leave no size; choose 0 < "),
        (Part, {"sampling": "pixels", "smallest": 2.5}, "task.smallest=2.5 and .* must be whole .*; round them"),
        (Part, {"patches": 1}, "task.patches=1: a relation is between two; set task.patches to 2 or more"),
        (Part, {"patch": 12, "largest": 12}, "task.patch=12 makes one patch: a relation is between two; set"),
        (Part, {"patch": 12, "sampling": "pixels"}, "task.patch=12 makes one patch: a relation is between two; set"),
        (Part, {"patch": 12, "sampling": "grid"}, "task.patch=12 makes one patch: a relation is between two; set"),
        (Part, {"mask": 0.9}, "task.mask=0.9 leaves none of 9 patches; choose 0.8.* or less"),
        (Part, {"mask": 0.5, "attention": "splash"}, "task.attention='splash' cannot leave out keys .*; set"),
        (Part, {"patches": 8, "sampling": "grid"}, "task.patches=8: the regular grid has 9; leave task.patches out"),
        (Part, {"pairs": 82}, "task.pairs=82 is more than the 81 distinct pairs of 9 patches; choose 81 or fewer"),
        (Part, {"pairs": 10, "pairing": "matching"}, "task.pairs=10 is more than the 9 matching .* task.pairing=indep"),
        (Part, {"heads": 3}, "task.heads=3 does not divide task.width=8; choose a divisor"),
        (Part, {"width": 6, "head_dim": 2, "query": "positional"}, "task.width=6 is not divisible by 4, .* change it"),
        (Part, {"head": "pairwise", "residual": True}, "task.residual=True belongs to task.head=cross_attention"),
        (AbsolutePosition, {"known": 0.99}, "task.known=0.99 leaves no patch to ask for: there are 9; choose a share"),
        (AbsolutePosition, {"known": 0.05}, "task.known=0.05 tells no patch's place: there are 9; choose a share"),
        (AbsolutePosition, {"width": 6, "head_dim": 2, "known": 0.5}, "task.width=6 is not divisible by 4, .* choose 8"),
        (AbsolutePosition, {"mask": 0.9}, "task.mask=0.9 leaves none of 9 patches; choose 0.8.* or less"),
        (AbsolutePosition, {"mask": 0.5, "attention": "splash"}, "task.attention='splash' cannot leave out keys "),
        (MaskedAutoencoder, {"mask": 0.0}, "task.mask=0.0 hides none of 9 patches; choose a share in between, e.g. 0.5"),
        (MaskedAutoencoder, {"mask": 0.9}, "task.mask=0.9 shows none of 9 patches; choose a share in between, e.g. 0.5"),
        (MaskedAutoencoder, {"decoder_width": 6, "decoder_head_dim": 3}, "task.decoder_width=6 is not divisible by 4, "),
        (MaskedAutoencoder, {"decoder_head_dim": 5}, "task.decoder_head_dim=5 does not divide task.decoder_width=32"),
        (MaskedAutoencoder, {"width": 6, "head_dim": 2}, "task.width=6 is not divisible by 4, .* choose 8"),
        (PartClassifier, {"width": 6, "head_dim": 2, "start": "sincos"}, "task.width=6 is not divisible by 4"),
        (PartClassifier, {**SERIES, "cutmix": 1.0}, "task.cutmix=1.0 is for images; set task.cutmix=0"),
        (PartClassifier, {**SERIES, "erase": 0.5}, "task.erase=0.5 is for images; set task.erase=0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_a_sentence(kind: type, fields: dict[str, Any], message: str) -> None:
    pairs = {"pairs": 9} if kind is Part else {}
    kind(**{**SMALL, **pairs})  # the others are fine
    with pytest.raises(UserError, match=re.sub(r"(?<!\\)\.(?!\*)", r"\.", message)):
        kind(**{**SMALL, **pairs, **fields})


def refusal(kind: type, **fields: Any) -> str:
    with pytest.raises(UserError) as raised:
        kind(**fields)
    return str(raised.value)


def test_masks_that_are_advised_may_be_had() -> None:
    grid: dict[str, Any] = {"sampling": "grid", "pairs": 1}
    for patches in (2, 3, 4, 9, 16, 25, 64, 196, 1000):
        fields = {**SERIES, "length": patches, "patch": 1}
        for kind, own in ((AbsolutePosition, {}), (Part, grid)):
            advised = re.search(r"choose (\S+) or less", refusal(kind, **fields, **own, mask=1 - 1e-5))
            assert advised
            kind(**fields, **own, mask=float(advised[1]))
        for mask in (0.0, 1 - 1e-5):
            advised = re.search(r"e\.g\. (\S+)$", refusal(MaskedAutoencoder, **fields, mask=mask))
            assert advised
            assert 0 < MaskedAutoencoder(**fields, mask=float(advised[1])).visible < patches


def test_what_does_not_matter_is_not_refused() -> None:
    Part(**SMALL, sampling="grid", pairs=9, smallest=20, largest=40)  # the grid has its own sizes
    Part(**{**SMALL, "patch": 12}, patches=2, pairs=4, largest=12)
    Part(**SMALL, pairs=9, attention="splash")
    AbsolutePosition(**{**SMALL, "width": 6, "head_dim": 2})  # no codes
    task = MaskedAutoencoder(**{**SMALL, "image": 20}, mask=0.8, attention="splash")  # leaves patches out, not keys
    assert task.visible == 5  # of 25


def test_a_batch_of_another_shape_fails_while_tracing() -> None:
    for task in (PART, AbsolutePosition(**SMALL), MAE, CLASSIFIER):
        batch = {**signals(task), "image": jnp.zeros((4, 16, 16, 2))}
        with pytest.raises(AssertionError, match="16"):
            jax.eval_shape(task.loss, weights.abstract(task), batch, jax.random.key(0))
