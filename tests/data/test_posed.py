"""Posed folders and point maps: read as they were made, cut around the principal point, and refused where they are not what they seem."""

from __future__ import annotations

import json

import numpy as np
import pytest
from clips import OPENGL, posed
from mistakes import told
from PIL import Image

from zoo.cameras import look_at, project, to_world
from zoo.data.posed import PointMaps, Posed
from zoo.data.scenes import _SCENE, Room, Scenes, cast
from zoo.errors import UserError

CENTRES = np.stack(np.meshgrid(np.arange(24) + 0.5, np.arange(24) + 0.5), -1)


def test_a_folder_gives_the_clip_it_was_written_from(tmp_path) -> None:
    made = posed(tmp_path / "npy")
    found = Posed(str(tmp_path / "npy"), size=48, test_fraction=0).source("train")
    assert len(found) == 1
    for key, x in made.items():
        assert found[0][key].dtype == x.dtype
        np.testing.assert_allclose(found[0][key], x, atol=2e-6, err_msg=key)
    made = posed(tmp_path / "png", png=True)  # sixteen bits are thousandths
    found = Posed(str(tmp_path / "png"), size=48, test_fraction=0).source("train")[0]
    assert 1e-5 < np.abs(found["points"] - made["points"]).max() < 2e-3


def test_images_are_cut_around_their_principal_points_and_pixels_made_square(tmp_path) -> None:
    """A scene whose columns are doubled and whose left edge is cut off: every point still lies where its pixel sees it."""
    posed(tmp_path, size=48)
    said = json.loads((tmp_path / "cameras.json").read_text())
    for frame in said["frames"]:
        image = np.asarray(Image.open(tmp_path / frame["image"])).repeat(2, 1)[:, 6:]
        Image.fromarray(image).save(tmp_path / frame["image"])
        np.save(tmp_path / frame["depth"], np.load(tmp_path / frame["depth"]).repeat(2, 1)[:, 6:])
    (fx, _, cx), (_, fy, cy), _ = said["K"]
    said["K"] = [[2 * fx, 0, 2 * cx - 6], [0, fy, cy], [0, 0, 1]]
    (tmp_path / "cameras.json").write_text(json.dumps(said))
    found = Posed(str(tmp_path), size=24, frames=4, test_fraction=0).source("train")[0]
    assert found["focal"] == pytest.approx(fx * 12 / (24 - 3), rel=1e-6)
    where, depth = project(found["points"], found["camera"], np.broadcast_to(found["focal"], 4), 24, 24)
    assert np.abs(where - CENTRES).max() < 1e-3
    assert depth.min() > 0
    assert found["frames"].shape == (4, 24, 24, 3)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("y up", r"e-0\d if its cameras have y up"),
        ("inverse", "if its matrices take the world to cameras: write their inverses"),
        ("ray length, png", "if its depth is the length of rays"),
        ("half less, png", "add 1/2 to both numbers of the principal point"),
        ("half more", "take 1/2 off both of its numbers"),
        ("unit", "set depth_unit to a thousandth of what it is"),
        ("intrinsics", "images are 48x48; it seems made for images of about 96x96"),
        ("sizes", "the frames of a scene are 48x48 and 48x24; give all one size"),
        ("no depth", r"depth/2.npy knows no depth anywhere"),
        ("missing", r"depth/2.npy, the depth of frame 2, does not exist"),
    ],
)
def test_a_usual_mistake_is_told(kind: str, said: str, tmp_path) -> None:
    posed(tmp_path, kind.removesuffix(", png"), png=kind.endswith("png"))
    with pytest.raises(UserError, match=said):
        Posed(str(tmp_path), size=24, frames=4, test_fraction=0).source("train")


def test_cameras_that_fit_nothing_are_refused(tmp_path) -> None:
    posed(tmp_path)
    said = json.loads((tmp_path / "cameras.json").read_text())
    for frame in said["frames"][::2]:
        frame["camera"][1][3] += 0.3
    (tmp_path / "cameras.json").write_text(json.dumps(said))
    with told("mend cameras or depth"):
        Posed(str(tmp_path), size=24, frames=4, test_fraction=0).source("train")


def test_frames_that_do_not_overlap_are_no_mistake(tmp_path, caplog) -> None:
    """A camera that goes round and looks outwards: the frames compared show other walls, and no other reading is believed."""
    drawn = np.random.default_rng(0).random((1, _SCENE), np.float32)
    angle, size = np.radians(18) * np.arange(8), 48
    out = np.stack([np.cos(angle), np.zeros(8), np.sin(angle)], -1)
    camera = look_at(out, 2 * out, np.array([0.0, 1, 0]))
    focal = np.full(8, size / 2 / np.tan(np.radians(30)))
    _, points = cast(Room(drawn), camera[None].astype(np.float32), focal[:1].astype(np.float32), size)
    _, depth = project(points[0].astype(float), camera, focal, size, size)
    posed(tmp_path, size=size)
    said = json.loads((tmp_path / "cameras.json").read_text())
    said["K"] = [[focal[0], 0, size / 2], [0, focal[0], size / 2], [0, 0, 1]]
    for frame, one, c in zip(said["frames"], depth, camera):
        np.save(tmp_path / frame["depth"], one)
        frame["camera"] = c.tolist()
    (tmp_path / "cameras.json").write_text(json.dumps(said))
    assert len(Posed(str(tmp_path), size=24, frames=8, test_fraction=0).source("train")) == 1
    assert "frames overlap too little" in caplog.text


def test_pixels_without_depth_are_not_seen_and_take_the_point_next_to_them(tmp_path) -> None:
    posed(tmp_path)
    depth = np.load(tmp_path / "depth/1.npy")
    depth[:, 20:30] = 0
    depth[0, 0] = np.nan
    np.save(tmp_path / "depth/1.npy", depth)
    found = Posed(str(tmp_path), size=48, test_fraction=0).source("train")[0]
    assert not found["seen"][1, :, 20:30].any()
    assert found["seen"].sum() == 8 * 48**2 - 480 - 1
    np.testing.assert_array_equal(found["points"][1, :, 20], found["points"][1, :, 19])
    np.testing.assert_array_equal(found["points"][1, :, 29], found["points"][1, :, 30])


def test_whole_scenes_are_held_out_or_the_end_of_a_single_one(tmp_path) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    posed(one, frames=12, size=16)
    for i in range(3):
        posed(many / f"scene{i}", frames=6, size=16, seed=i)
    single = Posed(str(one), size=16, frames=3, stride=2, test_fraction=0.2)
    assert (len(single.source("train")), len(single.source("test"))) == (3, 1), "of 7 and of 5 frames"
    several = Posed(str(many), size=16, frames=4, test_fraction=0.3)
    assert (len(several.source("train")), len(several.source("test"))) == (6, 3)
    known = several.fingerprint("train"), several.fingerprint("test")
    assert known == (several.fingerprint("train"), several.fingerprint("test"))
    assert known[0] != known[1]
    with told("has no 15 frames in a row in its train split"):
        Posed(str(many), size=16, frames=8, stride=2).source("train")
    with told("holds no cameras"):
        Posed(str(tmp_path / "many/scene0/rgb"), size=16).source("train")


# point maps


def maps(count: int = 4, **changed) -> dict[str, np.ndarray]:
    source = Scenes("open", 3, 24, train=count, test=1).source("train")
    clips = {key: np.stack([source[i][key] for i in range(count)]) for key in source[0]}
    clips["frames"] = np.rint((clips["frames"] + 1) * 127.5).astype(np.uint8)
    return {**clips, **changed}


def test_point_maps_are_put_before_their_first_camera(tmp_path) -> None:
    """A world that was turned, moved and scaled gives the clips it was made from."""
    clips, source = maps(), Scenes("open", 3, 24, train=4, test=1).source("train")
    turn = np.array([[0, 0, 1], [0, -1, 0], [1, 0, 0]], np.float32)
    clips["points"] = 3 * clips["points"] @ turn.T + 5
    clips["camera"][..., :3, 3] = 3 * clips["camera"][..., :3, 3] @ turn.T + 5
    clips["camera"][..., :3, :3] = turn @ clips["camera"][..., :3, :3]
    np.savez(tmp_path / "a.npz", **{key: x for key, x in clips.items() if key != "seen"})
    found = PointMaps(str(tmp_path / "a.npz"), test_fraction=0).source("train")
    assert len(found) == 4
    for i in range(4):
        for key, x in source[i].items():
            np.testing.assert_allclose(found[i][key], x, atol=1e-5, err_msg=key)


def test_without_splits_a_share_is_held_out_and_unknown_points_are_not_seen(tmp_path) -> None:
    clips = maps()
    clips["points"][:, 1, 3, 4] = np.nan
    np.savez(tmp_path / "a.npz", **clips)
    data = PointMaps(str(tmp_path / "a.npz"), test_fraction=0.25)
    assert (len(data.source("train")), len(data.source("test"))) == (3, 1)
    one = data.source("test")[0]
    assert np.isfinite(one["points"]).all()
    assert np.argwhere(~one["seen"]).tolist() == [[1, 3, 4]]
    far = {**clips, "points": clips["points"] + 1_000, "camera": clips["camera"].copy()}
    far["camera"][..., :3, 3] += 1_000
    far["points"][:, 1] = np.nan
    np.savez(tmp_path / "far.npz", **far)
    assert np.abs(PointMaps(str(tmp_path / "far.npz")).source("train")[0]["points"]).max() < 1.001
    assert data.fingerprint("test") != data.fingerprint("train")


OFF = "points of clip 0 are not where their pixels see them"


def shifted(clips: dict[str, np.ndarray], pixels: float) -> np.ndarray:
    """Points as they are where pixels are counted from other centres."""
    focal = np.broadcast_to(clips["focal"][:, None], clips["camera"].shape[:2])
    where, depth = project(clips["points"], clips["camera"], focal, 24, 24)
    local = np.concatenate([(where + pixels - 12) / focal[..., None, None, None], np.ones_like(where[..., :1])], -1)
    return to_world((local * depth[..., None]).astype(np.float32), clips["camera"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: {"camera": c["camera"] @ OPENGL.astype(np.float32)}, OFF),
        (lambda c: {"camera": np.linalg.inv(c["camera"])}, OFF),
        (lambda c: {"camera": 2 * c["camera"]}, "clip 0: frame 0 has a `camera` that is no rotation"),
        (lambda c: {"points": c["points"][:, ::-1].copy()}, OFF),
        (lambda c: {"points": shifted(c, -0.5)}, OFF + ", by 0.5 pixels"),
        (lambda c: {"points": shifted(c, 0.5)}, OFF + ", by 0.5 pixels"),
        (lambda c: {"focal": c["focal"] * 2}, OFF),
        (lambda c: {"focal": c["focal"] * [1, 1, np.nan, 1]}, "focal of clip 2 is nan"),
        (lambda c: {"focal": c["focal"][:2]}, r"focal \[2\]; expected points"),
        (lambda c: {"frames": c["frames"].astype(np.float32)}, "frames float32; expected points"),
        (lambda c: {"seen": np.zeros_like(c["seen"])}, "clip 0 has no point that is seen"),
    ],
)
def test_point_maps_that_are_none_are_refused(change, said: str, tmp_path) -> None:
    np.savez(tmp_path / "a.npz", **maps(**change(maps())))
    with pytest.raises(UserError, match=said):
        PointMaps(str(tmp_path / "a.npz")).source("train")
