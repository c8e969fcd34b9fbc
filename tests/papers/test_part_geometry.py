"""PART: relations, boxes, crops and layouts against the paper's equations and plain numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from part_by_hand import (
    BOXES,
    CROP,
    REBUILD,
    RELATION,
    Array,
    about_zero,
    coordinates,
    numbers,
    some_boxes,
)
from PIL import Image

from zoo.papers.part import (
    grid_boxes,
)
from zoo.papers.part.sampling import grid_patches, pad_crop, random_resized_crop

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
