"""The z-buffer against a loop over points, what is mended, and which pixels two views share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from zoo.cameras import project
from zoo.data.scenes import Scenes
from zoo.papers.wvd.projection import carried, mended, shared, splat, told_by_first

SIZE = (6, 9)
SPLAT = jax.jit(splat, static_argnums=4)
CARRIED = jax.jit(carried, static_argnums=4)
MENDED = jax.jit(mended)
TOLD = jax.jit(told_by_first)


def by_hand(points: np.ndarray, seen: np.ndarray, focal: float) -> tuple[np.ndarray, np.ndarray]:
    height, width = SIZE
    number, depth = np.full(SIZE, -1), np.full(SIZE, np.inf, np.float32)
    for k, (x, y, z) in enumerate(points):
        if not seen[k] or z <= 1e-6:
            continue
        column, row = np.floor(x / z * focal + width / 2), np.floor(y / z * focal + height / 2)
        if 0 <= column < width and 0 <= row < height and z < depth[int(row), int(column)]:
            number[int(row), int(column)], depth[int(row), int(column)] = k, z
    return number, depth


def test_a_pixel_sees_the_nearest_point_that_falls_on_it() -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        points = rng.normal(size=(200, 3)).astype(np.float32)
        points[:, 2] = np.round(points[:, 2] + 1, 1)  # many at the same depth: then the first
        seen = rng.random(200) < 0.8
        number, depth = SPLAT(points, seen, jnp.eye(4), jnp.float32(5), SIZE)
        want = by_hand(points, seen, 5)
        assert np.array_equal(number, want[0])
        np.testing.assert_allclose(depth, want[1], rtol=1e-6)


def test_what_shows_through_is_dropped_and_cracks_are_filled() -> None:
    number, depth = jnp.arange(25).reshape(5, 5), jnp.ones((5, 5))
    for broken in ((number, depth.at[2, 2].set(3.0)), (number.at[2, 2].set(-1), depth.at[2, 2].set(jnp.inf))):
        found, near = MENDED(*broken)
        assert found[2, 2] in (6, 7, 8, 11, 13, 16, 17, 18)
        assert near[2, 2] == 1
        assert (np.asarray(found).ravel() == np.arange(25)).sum() == 24
    # an edge between near and far is no hole, and neither is what is outside of it
    edge = depth.at[:, 3:].set(3.0)
    assert np.array_equal(MENDED(number, edge)[0], number)
    empty = number.at[:, 3:].set(-1), depth.at[:, 3:].set(jnp.inf)
    assert np.array_equal(MENDED(*empty)[0], empty[0])


def test_points_are_carried_into_the_views_of_other_cameras() -> None:
    """Into their own they come back to the bit; into others, away from edges, 95 % are nearer than .05 to what is there."""
    source = Scenes("open", 4, 48, train=1, test=8).source("test")
    back, near = [], []
    for i in range(8):
        e = source[i]
        points, seen = e["points"][0].reshape(-1, 3), e["seen"][0].reshape(-1)
        found, hit = (np.asarray(x) for x in CARRIED(points, seen, e["camera"], e["focal"], (48, 48)))
        assert hit[0].all()
        back.append((found[0] == e["points"][0]).all(-1))
        known = {tuple(x) for x in points.tolist()}
        assert all(tuple(x) in known for x in found[hit][::7].tolist()), "what is shown is some point, to the bit"
        _, depth = project(e["points"], e["camera"], np.broadcast_to(e["focal"], 4), 48, 48)
        steps = [np.abs(depth - np.roll(depth, by, a)) for a in (1, 2) for by in (-1, 1)]
        flat = np.max(steps, 0) < 0.1 * depth
        told = np.asarray(TOLD(e["points"], e["seen"], e["camera"], e["focal"]))
        assert told[0].all()
        assert 0.4 < told[1:].mean() < 0.95
        off = np.linalg.norm(found - e["points"], axis=-1) * e["focal"] / depth
        assert (told == (hit & (off <= 1.5))).all()
        near.append((np.linalg.norm(found - e["points"], axis=-1) < 0.05)[1:][(hit & flat)[1:]])
    assert np.mean(back) >= 0.99
    assert np.concatenate(near).mean() >= 0.95


def test_points_are_moved_by_whole_products() -> None:
    """On a TPU float32 products have 8 bits where nobody asks for more."""
    shapes = ((2, 4, 4, 3), (2, 4, 4), (2, 4, 4), ())
    program = str(
        jax.make_jaxpr(told_by_first)(*(jnp.ones(s, bool if i == 1 else float) for i, s in enumerate(shapes)))
    )
    products = program.count("dot_general[")
    assert products == program.count("precision=(Precision.HIGHEST") > 0, program


def test_two_views_share_what_both_see() -> None:
    """A wall at depth 2, a pole before it: the second camera stands half a unit to the right."""
    camera = np.stack([np.eye(4)] * 2)
    camera[1, 0, 3] = 0.5
    focal, width = np.full(2, 8.0), 16
    x = np.broadcast_to((np.arange(width) + 0.5 - width / 2) / 8, (2, 4, width))
    y = np.broadcast_to(((np.arange(4) + 0.5 - 2) / 8)[:, None], (2, 4, width))
    depth = np.full((2, 4, width), 2.0)
    depth[0, :, 8:10], depth[1, :, 4:6] = 1.0, 1.0  # at x = 0 to 1/4
    points = np.stack([x * depth, y * depth, depth], -1)
    points[1, ..., 0] += 0.5
    where, both = shared(points[0], camera[1], focal[1], points[1], np.ones((4, width), bool))
    np.testing.assert_allclose(where[0, :, 0], np.where(depth[0, 0] == 1, np.arange(16) - 3.5, np.arange(16) - 1.5))
    # columns 0 and 1 are outside, 6 and 7 are behind the pole there
    assert both[1].tolist() == [False] * 2 + [True] * 4 + [False] * 2 + [True] * 8
    hidden = shared(points[0], camera[1], focal[1], points[1], np.zeros((4, width), bool))[1]
    assert not hidden.any()
    traced = jax.jit(shared)(
        *(jnp.asarray(v) for v in (points[0], camera[1], focal[1], points[1])), jnp.ones((4, width), bool)
    )
    assert np.array_equal(traced[1], both)
