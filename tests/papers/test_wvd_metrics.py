"""Figures of geometry: values by hand, zero for the truth, and the controls that a clip of somewhere else fails."""

from __future__ import annotations

import numpy as np
import pytest

from zoo.cameras import project
from zoo.data.scenes import Scenes
from zoo.papers.wvd.geometry import depth_of
from zoo.papers.wvd.metrics import (
    agreement,
    aligned,
    cameras_of,
    covisible_with_first,
    depth_figures,
    frame_figures,
    point_error,
    point_figures,
    pose_figures,
    psnr,
    reprojection,
)

RNG = np.random.default_rng(0)


def depths_of(points, found):
    return np.stack([depth_of(x, one.camera, one.focal) for x, one in zip(points, found)])


@pytest.fixture(scope="module")
def clips() -> dict[str, np.ndarray]:
    source = Scenes("open", 4, 24, train=1, test=4).source("test")
    return {key: np.stack([source[i][key] for i in range(4)]) for key in source[0]}


@pytest.fixture(scope="module")
def cameras(clips):
    return cameras_of(clips["points"], clips["seen"])


def test_the_error_of_points_is_a_length() -> None:
    """3-4-0 off is 5 off, not 7 / 3; what is not seen does not count."""
    true = RNG.normal(size=(2, 3, 4, 4, 3))
    seen = RNG.random((2, 3, 4, 4)) < 0.5
    points = true + np.array([3.0, 4.0, 0.0]) * np.array([1, 2])[:, None, None, None, None]
    points[~seen] = 1e6
    np.testing.assert_allclose(point_error(points, true, seen), [5, 10])
    np.testing.assert_allclose(aligned(points, true, seen)[seen], true[seen], atol=1e-9)


def test_alignment_takes_away_what_no_image_tells() -> None:
    true, seen = RNG.normal(size=(3, 2, 4, 4, 3)), np.ones((3, 2, 4, 4), bool)
    turn = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]])
    found = point_figures(2 * true @ turn.T + 1, true, seen, true.mean(0))
    assert found["points"] > 1
    assert found["points_aligned"] < 1e-9
    assert found["points_shuffled_aligned"] > 1
    assert found["points_mean"] == pytest.approx(np.linalg.norm(true - true.mean(0), axis=-1).mean())
    exact = point_figures(true, true, seen)
    assert exact["points"] == exact["points_median"] == 0
    assert exact["points_shuffled"] == pytest.approx(np.linalg.norm(np.roll(true, 1, 0) - true, axis=-1).mean())
    assert "points_mean" not in exact
    still = point_figures(np.zeros_like(true), true, seen)
    assert still["points_aligned"] == pytest.approx(still["points"]), "points in one place are left as they are"


def test_depth_by_hand() -> None:
    true = np.array([1.0, 2, 4, 8]).reshape(1, 1, 2, 2)
    seen = np.ones(true.shape, bool)
    assert depth_figures(3 * true, true, seen) == {"depth_rel": 0, "depth_1.25": 1, "depth_1.03": 1}
    found = depth_figures(true * np.array([1.02, 1, 1, 1.5]).reshape(true.shape), true, seen)
    assert found == pytest.approx({"depth_rel": 0.52 / 4, "depth_1.25": 0.75, "depth_1.03": 0.75})
    seen[0, 0, 1, 1] = False
    assert depth_figures(true * 2, true, seen)["depth_1.03"] == 1
    assert depth_figures(np.full_like(true, np.nan), true, seen) == {}


def test_cameras_of_true_points_are_the_true_ones(clips, cameras) -> None:
    found = pose_figures(cameras, clips["camera"], clips["focal"])
    assert found["pose_identity"] > 5
    for key in ("pose_turn", "pose_move", "pose_absolute"):
        assert found[key] < 0.05, key
    assert found["auc30"] > 0.99
    assert found["focal_off"] < 1e-3
    assert found["unsolved"] == 0
    assert reprojection(clips["points"], cameras, clips["seen"]) < 1e-3
    _, depth = project(clips["points"], clips["camera"], np.broadcast_to(clips["focal"][:, None], (4, 4)), 24, 24)
    figures = depth_figures(depths_of(clips["points"], cameras), depth, clips["seen"])
    assert figures["depth_1.03"] == 1


def test_cameras_of_other_clips_are_others_and_flat_frames_are_lost(clips, cameras) -> None:
    other = pose_figures(cameras[1:] + cameras[:1], clips["camera"], clips["focal"])
    assert other["pose_turn"] > 1
    assert other["auc30"] < 0.9
    flat = clips["points"].copy()
    flat[0, 1, ..., 2] = 0
    lost = cameras_of(flat, clips["seen"])
    found = pose_figures(lost, clips["camera"], clips["focal"])
    assert found["unsolved"] == 1 / 16
    assert found["pose_turn"] < 0.05
    assert found["auc30"] == pytest.approx(1 - 3 / 24, abs=0.01), "three of 24 pairs have a camera that is lost"
    assert np.isnan(depths_of(flat, lost)[0, 1]).all()
    assert np.isfinite(agreement(clips["frames"], flat, clips["seen"], lost)["agree_points"])


def test_frames_of_one_world_agree_and_frames_of_two_do_not(clips, cameras) -> None:
    true = agreement(clips["frames"], clips["points"], clips["seen"], cameras)
    assert true["covisible"] > 0.4
    assert true["agree_points"] < 0.02
    assert true["agree_frames"] < 0.1 * true["agree_random"]
    wrong = agreement(np.roll(clips["frames"], 1, 1), clips["points"], clips["seen"], cameras)
    assert wrong["agree_frames"] > 3 * true["agree_frames"]
    noise = agreement(RNG.uniform(-1, 1, clips["frames"].shape), clips["points"], clips["seen"], cameras)
    assert noise["agree_frames"] == pytest.approx(noise["agree_random"], rel=0.05)


def test_what_the_first_frame_shows_is_told_from_what_is_new(clips) -> None:
    both = covisible_with_first(clips["points"], clips["seen"], clips["camera"], clips["focal"])
    assert both[:, 0].all()
    assert 0.3 < both[:, 1:].mean() < 0.95
    drawn = np.where(both[..., None], clips["frames"], 0.5)
    found = frame_figures(drawn, clips["frames"], both)
    assert found["psnr_covisible"] == pytest.approx(10 * np.log10(4 / 1e-12))
    assert found["psnr_new"] < found["psnr"] < 30
    first = np.broadcast_to(clips["frames"][:, :1], clips["frames"].shape)
    assert found["psnr_copy"] == frame_figures(first, clips["frames"], both)["psnr"]


def test_psnr_by_hand() -> None:
    true = np.zeros((1, 1, 2, 2, 3))
    where = np.array([[[[True, True], [True, False]]]])
    drawn = np.array([0.2, 0.2, 0.2, 9.0]).reshape(1, 1, 2, 2, 1) + true
    assert psnr(drawn, true, where) == pytest.approx(20 * np.log10(2 / 0.2))
    assert psnr(drawn, true, ~where) == pytest.approx(20 * np.log10(2)), "clipped to [-1, 1]"
    assert np.isnan(psnr(drawn, true, np.zeros_like(where)))
