"""Paths of cameras: what they keep still, files in another world's units, and those that lead nowhere."""

from __future__ import annotations

import json

import numpy as np
import pytest

from zoo.cameras import cameras_json, look_at, project
from zoo.commands.trajectory import check_clear, trajectory
from zoo.data.scenes import Scenes
from zoo.errors import UserError
from zoo.papers.wvd.geometry import angle_between

FIRST = look_at(np.array([1.0, -0.5, 2]), np.array([0.2, 0.1, -1]), np.array([0.0, -1, 0]))
AHEAD = FIRST[:3, 3] + 2.5 * FIRST[:3, 2]


@pytest.mark.parametrize("path", ["orbit", "dolly", "pan"])
def test_a_path_begins_at_the_first_camera_and_moves_evenly(path: str) -> None:
    found = trajectory(path, FIRST, 2.5, 5)
    np.testing.assert_allclose(found[0], FIRST, atol=1e-12)
    assert np.ptp(np.linalg.norm(np.diff(found[:, :3, 3], axis=0), axis=-1)) < 1e-9
    assert np.ptp(angle_between(found[1:, :3, :3], found[:-1, :3, :3])) < 1e-6
    where, depth = project(np.broadcast_to(AHEAD, (5, 1, 3)), found, np.full(5, 9.0), 8, 8)
    if path == "orbit":
        np.testing.assert_allclose(where, 4, atol=1e-9)
        np.testing.assert_allclose(depth, 2.5, atol=1e-9)
        assert (np.diff(found[:, :3, 3] @ FIRST[:3, 0]) < 0).all(), (
            "what is ahead turns to the right of where it was seen from"
        )
    if path == "dolly":
        np.testing.assert_allclose(where, 4, atol=1e-9)
        assert depth[-1, 0] == pytest.approx(1.5)
    if path == "pan":
        assert np.ptp(found[:, :3, 3], 0).max() < 1e-12
        assert (np.diff(where[:, 0, 0]) < 0).all(), "turning right, things go left"


def test_a_file_is_walked_from_the_first_camera_in_its_own_scale(tmp_path) -> None:
    """A path written in another world, turned and three times as large, is the same path here."""
    want = trajectory("orbit", FIRST, 2.5, 4)
    other = look_at(np.array([9.0, 9, 9]), np.zeros(3), np.array([0.0, -1, 0])) @ np.linalg.inv(FIRST) @ want
    other[:, :3, 3] = other[0, :3, 3] + 3 * (other[:, :3, 3] - other[0, :3, 3])
    path = tmp_path / "a.json"
    path.write_text(cameras_json(other, 9.0, (8, 8), 7.5))
    np.testing.assert_allclose(trajectory(str(path), FIRST, 2.5, 4), want, atol=1e-5)


def written(tmp_path, **said) -> str:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"frames": [{"eye": [0, 0, k], "target": [0, 0, 9]} for k in range(4)], **said}))
    return str(path)


def test_a_path_that_leads_nowhere_is_refused(tmp_path) -> None:
    for said in ({}, {"scale": 0}, {"scale": "far"}):
        with pytest.raises(UserError, match='does not say in what scale; add "scale"'):
            trajectory(written(tmp_path, **said), FIRST, 1.0, 4)
    assert trajectory(written(tmp_path, scale=2), FIRST, 1.0, 4).shape == (4, 4, 4)
    with pytest.raises(UserError, match="has 4 cameras, and a clip has 8"):
        trajectory(written(tmp_path, scale=2), FIRST, 1.0, 8)
    still = [{"eye": [0, 0, 0], "target": [k - 2, 0, 5]} for k in range(4)]
    assert np.ptp(trajectory(written(tmp_path, frames=still), FIRST, 1.0, 4)[:, :3, 3], 0).max() < 1e-12


def test_a_camera_inside_a_wall_is_refused() -> None:
    e = Scenes("open", 2, 16, train=1, test=1).source("test")[0]
    first, focal = e["camera"][0].astype(float), float(e["focal"])
    _, depth = project(e["points"][0], e["camera"][0], e["focal"], 16, 16)
    far = float(depth[8, 8])
    known = (e["points"][0], e["seen"][0], first, focal)
    check_clear("dolly", trajectory("dolly", first, far, 4), *known)
    check_clear("orbit", trajectory("orbit", first, far, 4), *known)
    with pytest.raises(UserError, match=r"path=a\.json: camera [23] stands .* inside of what that sees"):
        check_clear("a.json", trajectory("dolly", first, 4 * far, 4), *known)
    check_clear(
        "a.json", trajectory("dolly", first, 4 * far, 4), e["points"][0], np.zeros((16, 16), bool), first, focal
    )
