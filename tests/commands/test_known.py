"""What clips are completed from: data, folders, images, paths; and what `zoo sample` writes of them."""

import json
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
import pytest
from clips import posed
from PIL import Image

from zoo import models
from zoo.cameras import read_cameras
from zoo.commands import known
from zoo.commands.draw import draw
from zoo.data.scenes import Scenes
from zoo.errors import UserError
from zoo.papers.wvd import Mixture, Wvd, WvdSampling

DATA = Scenes("open", 3, 16, train=2, test=2)


@dataclass(frozen=True)
class Knows(Wvd):
    """Draws the clips that its parameters are."""

    def init(self, rng):
        return {key: jnp.zeros((2, 3, 16, 16, 3)) for key in ("frames", "points")}

    def sample(self, params, rng, n, conditions=None, options=None):
        rows = jnp.arange(n) % len(params["points"])
        clips = {key: params[key][rows] for key in ("frames", "points")}
        return {**clips, "image": jnp.concatenate([clips["frames"][:, 0], clips["points"][:, 0]], 1)}


def model(tmp_path, task=Wvd(frames=3, image=16, width=16, depth=2, head_dim=8), params=None, data=DATA):
    return models.Model(task, params or {}, "ema", 5, data, (), tmp_path)


def start(made, task, source, path=None, n=2):
    return known.start(made, WvdSampling(task=task), source, path, n, 0, 2)


def test_clips_of_the_data_and_a_path_from_their_first_camera(tmp_path):
    made, rows = model(tmp_path), DATA.source("test")
    given = start(made, "stereo", "test", n=3)
    for i in range(3):
        for key, x in rows[i % 2].items():
            np.testing.assert_array_equal(given[key][i], x)
    for path in ("orbit", "pan"):
        walked = start(made, "camera", "test", path)
        assert {key for key in given if not np.array_equal(given[key][:2], walked[key])} == {"camera"}
        np.testing.assert_allclose(walked["camera"][:, 0], given["camera"][:2, 0], atol=1e-6)
    assert start(made, "joint", None) is None


def test_folders_of_posed_images_and_of_images(tmp_path):
    folder = tmp_path / "posed"
    posed(folder, frames=4, size=32)
    given = start(model(tmp_path), "stereo", str(folder))
    assert {key: x.shape for key, x in given.items()} == {
        "frames": (2, 3, 16, 16, 3), "points": (2, 3, 16, 16, 3), "seen": (2, 3, 16, 16), "camera": (2, 3, 4, 4), "focal": (2,),
    }  # fmt: skip
    images = tmp_path / "images"
    images.mkdir()
    for i in range(4):
        Image.new("RGB", (20, 24), (60 * i, 0, 0)).save(images / f"{i}.png")
    first, stereo = start(model(tmp_path), "image", str(images), n=5), start(model(tmp_path), "stereo", str(images))
    red = [2 * 60 * i / 255 - 1 for i in range(4)]
    np.testing.assert_allclose(first["frames"][:, 0, 0, 0, 0], [*red, red[0]], atol=1e-6)
    np.testing.assert_allclose(stereo["frames"][0, :, 0, 0, 0], red[:3], atol=1e-6)


def test_a_single_image_is_given_points_before_a_camera_goes_anywhere(tmp_path):
    rows = [DATA.source("test")[i] for i in range(2)]
    true = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    made = model(tmp_path, Knows(frames=3, image=16), {key: jnp.asarray(true[key]) for key in ("frames", "points")})
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (16, 16)).save(images / "0.png")
    given = start(made, "camera", str(images), "orbit")
    np.testing.assert_allclose(given["camera"][:, 0], true["camera"][:, 0], atol=1e-2)
    np.testing.assert_allclose(given["focal"], true["focal"], rtol=1e-2)
    assert np.isfinite(given["camera"]).all()


def test_points_that_overflow_are_told_where_images_are_not(tmp_path, caplog):
    params = {"frames": jnp.zeros((2, 3, 16, 16, 3)), "points": jnp.full((2, 3, 16, 16, 3), jnp.nan)}
    made = model(tmp_path, Knows(frames=3, image=16), params)
    draw(made, tmp_path / "out", n=2, seed=0, conditions=None, captions=None, asked={}, batch=2,
         options=WvdSampling(), form=known.form(made.task))  # fmt: skip
    assert "samples 0, 1 are not finite" in caplog.text
    assert (tmp_path / "out/viewer.html").exists()


def test_what_is_written(tmp_path):
    """Points that a camera is read off: the files of a clip tell of the clip."""
    rows = [DATA.source("test")[i] for i in range(2)]
    params = {key: jnp.asarray(np.stack([row[key] for row in rows])) for key in ("frames", "points")}
    made, out = model(tmp_path, Knows(frames=3, image=16), params), tmp_path / "out"
    draw(made, out, n=2, seed=0, conditions=None, captions=None, asked={"from": None, "path": None}, batch=2,
         options=WvdSampling(), form=known.form(made.task))  # fmt: skip
    names = {path.name for path in out.iterdir()}
    assert names == {
        *(f"00000{i}{end}" for i in range(2) for end in (".npz", ".gif", ".ply", ".cameras.json")),
        "viewer.html", "sheet.png", "settings.json",
    }  # fmt: skip
    assert json.loads((out / "settings.json").read_text())["task"] == "joint"
    camera, _ = read_cameras(out / "000001.cameras.json")
    np.testing.assert_allclose(camera, rows[1]["camera"], atol=1e-2)


def test_mistakes(tmp_path):
    made, images = model(tmp_path), tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (16, 16)).save(images / "0.png")
    for words, *asked in (
        ("task=stereo completes clips; say of which", "stereo", None),
        ("from=nowhere is neither train, test nor", "image", "nowhere"),
        ("has 1 images, and task=stereo takes 3", "stereo", str(images)),
        ("task=render takes the points of all frames", "render", str(images)),
        ("path=orbit says where the camera goes, and task=image", "image", "test", "orbit"),
        ("from=test: the task joint draws clips out of nothing", "joint", "test"),
        ("path=orbti is no path; did you mean 'orbit'", "camera", "test", "orbti"),
        ("a folder of images says none", "camera", str(images)),
    ):
        with pytest.raises(UserError, match=words):
            start(made, *asked)
    with pytest.raises(UserError, match=r"has frames of \[3, 16, 16, 3\], and this model takes \[2, 16, 16, 3\]"):
        start(model(tmp_path, Wvd(frames=2, image=16)), "stereo", "test")
    twin = replace(made.task, modalities="rgb", tasks=Mixture(1, 1, 0, 0, 0))
    assert known.form(twin).suffix == ".png"
    with pytest.raises(UserError, match="task=camera goes by points, and this model draws images alone"):
        start(model(tmp_path, twin), "camera", "test", "orbit")
