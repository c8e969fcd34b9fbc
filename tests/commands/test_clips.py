"""Clips as files: what is kept, what other programs read, and a page that asks nobody for anything."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from zoo.cameras import read_cameras
from zoo.commands.clips import Clips, gif, page, ply, steady, strip
from zoo.data.posed import PointMaps
from zoo.data.scenes import Scenes


@pytest.fixture(scope="module")
def clips() -> list[dict[str, np.ndarray]]:
    source = Scenes("open", 3, 24, train=1, test=2).source("test")
    return [source[0], source[1]]


def test_files_of_a_clip_say_what_it_is(clips, tmp_path) -> None:
    for i, clip in enumerate(clips):
        Clips().save(tmp_path, i, clip, {"seed": "7"})
    assert Clips().show(tmp_path, 2) == "viewer.html, sheet.png"
    names = {path.name for path in tmp_path.iterdir()}
    each = {f"00000{i}{suffix}" for i in range(2) for suffix in (".npz", ".gif", ".ply", ".cameras.json")}
    assert names == each | {"viewer.html", "sheet.png"}
    camera, said = read_cameras(tmp_path / "000001.cameras.json")
    np.testing.assert_allclose(camera, clips[1]["camera"], atol=1e-5)
    assert said["focal"] == pytest.approx(float(clips[1]["focal"]), abs=1e-3)
    depth = (
        clips[1]["points"][0] @ clips[1]["camera"][0, :3, 2]
        - clips[1]["camera"][0, :3, 3] @ clips[1]["camera"][0, :3, 2]
    )
    assert said["scale"] == pytest.approx(np.median(depth), abs=1e-4)
    again = PointMaps(str(tmp_path / "000001.npz"), test_fraction=0).source("train")[0]
    for key, x in clips[1].items():
        np.testing.assert_allclose(again[key], x, atol=1e-5, err_msg=key)


def test_a_clip_without_cameras_is_asked_for_them(clips, tmp_path) -> None:
    drawn = {key: clips[0][key] for key in ("frames", "points")}
    Clips().save(tmp_path, 0, drawn, {})
    assert not (tmp_path / "000000.cameras.json").exists()
    camera = clips[0]["camera"].copy()
    camera[1] = np.nan
    Clips(lambda points, seen: (camera, 20.0, ("", "flat", ""))).save(tmp_path, 1, drawn, {})
    told, said = read_cameras(tmp_path / "000001.cameras.json")
    np.testing.assert_allclose(told, camera[[0, 2]], atol=1e-5)
    assert [frame["frame"] for frame in said["frames"]] == [0, 2]
    assert Clips().show(tmp_path, 2)


def test_a_strip_has_frames_above_points(clips) -> None:
    found = strip(clips[0])
    assert found.shape == (48, 72, 3)
    assert np.array_equal(found[:24, 24:48], np.rint((clips[0]["frames"][1] + 1) * 127.5))
    assert np.abs(found[24:, 24:48] - (clips[0]["points"][1] + 1) * 127.5).max() <= 0.51
    frames = Image.open(io.BytesIO(gif(clips[0], "about")))
    assert (frames.n_frames, frames.size, frames.info["comment"]) == (3, (144, 288), b"about")


def test_points_between_two_surfaces_are_left_out() -> None:
    points = np.stack(np.meshgrid(np.arange(8.0), np.arange(8.0)), -1)
    points = np.concatenate([points, np.where(np.arange(8) < 4, 0.0, 60.0)[None, :, None].repeat(8, 0)], -1)[None]
    seen = np.ones((1, 8, 8), bool)
    assert steady(points, seen).all(), "an edge is none"
    points[0, :, 4, 2] = 30
    assert np.array_equal(steady(points, seen)[0], np.arange(64).reshape(8, 8) % 8 != 4)
    seen[0, 2, 2], points[0, 5, 6] = False, np.nan
    assert (~steady(points, seen)).sum() == 8 + 2


def test_other_programs_read_the_points(clips) -> None:
    head, _, rest = ply(clips[0]).partition(b"end_header\n")
    count = int(re.search(rb"element vertex (\d+)", head)[1])
    kinds = re.findall(rb"property (\w+) (\w+)", head)
    assert [(a.decode(), b.decode()) for a, b in kinds] == [("float", "x"), ("float", "y"), ("float", "z")] + [
        ("uchar", name) for name in ("red", "green", "blue")
    ]
    table = np.frombuffer(rest, [(name.decode(), {b"float": "<f4", b"uchar": "u1"}[kind]) for kind, name in kinds])
    assert len(table) == count > 1_600
    mask = steady(clips[0]["points"], clips[0]["seen"])
    np.testing.assert_array_equal(np.stack([table[a] for a in "xyz"], -1), clips[0]["points"][mask])
    np.testing.assert_array_equal(table["red"], np.rint((clips[0]["frames"][mask][:, 0] + 1) * 127.5))


def test_the_page_holds_everything_and_asks_for_nothing(clips) -> None:
    broken = {**clips[1], "points": np.where(RNG_MASK, np.nan, clips[1]["points"])}
    text = page({"a</script>": clips[0], "b": broken})
    addresses = re.findall(
        r"""(?:src|href|url|action|fetch|import|http)[^a-z]{1,3}[^"'\s]*""", text.partition("const CLIPS")[0]
    )
    assert not [a for a in addresses if "//" in a]
    assert "default-src 'none'" in text
    assert text.count("</script>") == 1, "no name ends the script"
    told = json.loads(re.search(r"const CLIPS = (\[.*?\]);\n", text)[1])
    assert [one["name"] for one in told] == ["a</script>", "b"]
    one, kept = told[0], steady(clips[0]["points"], clips[0]["seen"])
    places = np.frombuffer(base64.b64decode(one["points"]), "<i2").reshape(-1, 3) / 32767 * one["unit"] + one["centre"]
    np.testing.assert_allclose(places, clips[0]["points"][kept], atol=one["unit"] / 32767)
    assert one["counts"] == kept.sum((1, 2)).tolist()
    assert len(base64.b64decode(one["colours"])) == 3 * kept.sum()
    assert len(one["cameras"]) == 3
    assert one["strip"].startswith("data:image/png;base64,")
    assert np.isfinite(told[1]["middle"]).all()


RNG_MASK = np.random.default_rng(0).random((3, 24, 24, 1)) < 0.3
