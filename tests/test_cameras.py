"""Cameras: projection against its matrix, similarities, normalisation, and the file that cameras are kept in."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from zoo.cameras import (
    Similarity,
    cameras_json,
    look_at,
    normalisation,
    project,
    rays,
    read_cameras,
    to_camera,
    to_world,
    unproject,
)
from zoo.errors import UserError

RNG = np.random.default_rng(0)
H, W = 5, 7


def some_cameras(n: int) -> tuple[np.ndarray, np.ndarray]:
    eye = RNG.normal(size=(n, 3)) * 3
    return look_at(eye, RNG.normal(size=(n, 3)) * 0.3, np.array([0.0, -1, 0])), RNG.uniform(4, 9, n)


def test_a_pixel_is_where_the_matrix_of_its_camera_puts_its_point() -> None:
    """K [R C; 0 1]^-1 in homogeneous numbers, with the centre of the first pixel at (1/2, 1/2), and NumPy as JAX."""
    camera, focal = some_cameras(6)
    depth = RNG.uniform(0.5, 4, (6, H, W))
    points = unproject(depth, camera, focal)
    for c, f, x, d in zip(camera, focal, points, depth):
        k = np.array([[f, 0, W / 2], [0, f, H / 2], [0, 0, 1]])
        for row, column in ((0, 0), (2, 5), (4, 6)):
            seen = k @ (np.linalg.inv(c) @ [*x[row, column], 1])[:3]
            np.testing.assert_allclose(seen, np.array([column + 0.5, row + 0.5, 1]) * d[row, column], atol=1e-9)
    where, again = project(points, camera, focal, H, W)
    np.testing.assert_allclose(again, depth, atol=1e-9)
    np.testing.assert_allclose(where[:, 2, 5], [[5.5, 2.5]] * 6, atol=1e-9)
    np.testing.assert_allclose(to_camera(to_world(points, camera), camera), points, atol=1e-9)
    traced = project(*(jnp.asarray(x, jnp.float32) for x in (points, camera, focal)), H, W)
    np.testing.assert_allclose(traced[0], where, atol=1e-3)
    assert rays(focal, H, W)[..., 2].max() == 1


def test_a_camera_looks_at_its_target_upright() -> None:
    eye, target, up = np.array([[1.0, 2, 3]]), np.array([[0.0, 0.5, -1]]), np.array([0.0, 1, 0])
    camera = look_at(eye, target, up)
    where, depth = project(np.stack([target, target + 0.1 * up], 1), camera, np.array([5.0]), H, W)
    np.testing.assert_allclose(where[0, 0], [W / 2, H / 2], atol=1e-9)
    assert depth[0, 0] == pytest.approx(np.linalg.norm(target - eye))
    assert where[0, 1, 1] < H / 2, "up is up"
    assert where[0, 1, 0] == pytest.approx(W / 2), "and not tilted"
    assert np.linalg.det(camera[0, :3, :3]) == pytest.approx(1)
    for place in (eye, eye + up):
        with pytest.raises(UserError, match="looks at the place where it stands, or straight up"):
            look_at(eye, place, up)


def test_a_similarity_moves_cameras_so_that_they_see_the_same() -> None:
    camera, focal = some_cameras(8)
    points = RNG.normal(size=(2, 4, H, W, 3))
    turn = look_at(RNG.normal(size=(2, 3)), np.zeros((2, 3)), np.array([0.0, 0, 1]))[:, :3, :3]
    moved = Similarity(np.array([0.5, 3.0]), turn, RNG.normal(size=(2, 3)))
    camera, focal = camera.reshape(2, 4, 4, 4), focal.reshape(2, 4)
    before = project(points, camera, focal, H, W)
    after = project(moved.points(points), moved.cameras(camera), focal, H, W)
    scale = np.array([0.5, 3.0])[:, None, None, None]
    np.testing.assert_allclose(after[1], before[1] * scale, atol=1e-9)
    front = before[1] > 0.1
    np.testing.assert_allclose(after[0][front], before[0][front], atol=1e-6)
    back = moved.inverse()
    np.testing.assert_allclose(back.points(moved.points(points)), points, atol=1e-9)
    np.testing.assert_allclose(back.cameras(moved.cameras(camera)), camera, atol=1e-9)


def test_a_normalised_clip_fills_the_box_by_one_scale_and_stands_before_its_first_camera() -> None:
    camera, focal = some_cameras(6)
    camera, focal = camera.reshape(2, 3, 4, 4), focal.reshape(2, 3)
    points = unproject(RNG.uniform(0.5, 4, (2, 3, H, W)), camera, focal)
    seen = RNG.random((2, 3, H, W)) < 0.7
    points[~seen] = 1e6
    normal = normalisation(points, seen, camera)
    for x, mask in zip(normal.points(points), seen):
        low, high = x[mask].min(0), x[mask].max(0)
        np.testing.assert_allclose(low + high, 0, atol=1e-9)
        assert (high - low).max() == pytest.approx(2)
    np.testing.assert_allclose(normal.cameras(camera)[:, 0, :3, :3], np.stack([np.eye(3)] * 2), atol=1e-12)


def test_cameras_are_read_as_they_were_written(tmp_path) -> None:
    camera, _ = some_cameras(3)
    path = tmp_path / "cameras.json"
    path.write_text(cameras_json(camera, 7.25, (H, W), 1.5))
    found, said = read_cameras(path)
    np.testing.assert_allclose(found, camera, atol=1e-6)
    assert (said["focal"], said["scale"], said["width"], said["height"]) == (7.25, 1.5, W, H)
    path.write_text(json.dumps({"frames": [{"eye": [1, 0, 0], "target": [1, 0, 5]}]}))
    np.testing.assert_allclose(read_cameras(path)[0][0][:3], [[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]], atol=1e-12)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no list of cameras"),
        ('{"frames": []}', "has no frames"),
        ('{"frames": [{"camera": [[1, 0], [0, 1]]}]}', "is no list of cameras"),
        ('{"frames": [{"eye": [1, 2, 3], "target": [1, 2, 3]}]}', "looks at the place where it stands"),
        *(
            (json.dumps({"frames": [{"camera": camera.tolist()}]}), "frame 0 has a `camera` that is no rotation")
            for camera in (np.diag([1.0, 1, -1, 1]), 2 * np.eye(4), np.full((4, 4), np.nan))
        ),
    ],
)
def test_what_is_no_camera_is_refused(text: str, said: str, tmp_path) -> None:
    path = tmp_path / "cameras.json"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        read_cameras(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_cameras(tmp_path / "none.json")
