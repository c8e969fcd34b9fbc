"""Reference statistics made ahead: the metric takes those of the same images, wherever these lie, and no others."""

import shutil
from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest
from fresh import exported, noise
from PIL import Image

from zoo import cli, models, weights
from zoo.data.images import Arrays, Digits, Images
from zoo.data.pipeline import Data
from zoo.errors import UserError
from zoo.metrics import frechet
from zoo.metrics.frechet import Frechet
from zoo.papers.tarflow import TarFlow
from zoo.task import About

TASK = TarFlow(image=8, channels=3, patch=4, width=8, depth=1, blocks=1, head_dim=8)


def pictures(folder, count=12, size=8, seed=0):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of images, a prepared set and an .npz file of others, two networks with features."""
    root = tmp_path_factory.mktemp("statistics")
    pictures(root / "folder")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert cli.main(["prepare", "images", "folder", "set"]) == 0
    images = np.random.default_rng(1).integers(0, 256, (9, 8, 8, 3), np.uint8)
    np.savez(root / "arrays.npz", train_images=images, train_labels=np.zeros(9, int), test_images=images)
    exported(root / "net", TASK)
    exported(root / "other", TASK, noise(TASK, seed=1))
    return root


@pytest.fixture(autouse=True)
def here(root, monkeypatch):
    monkeypatch.chdir(root)


def made(capsys, source, file, features="pixels", *fields):
    capsys.readouterr()
    code = cli.main(["prepare", "statistics", source, str(file), f"features={features}", "size=8", *fields])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


@dataclass(frozen=True)
class Nothing:
    """No options."""


class Noise:
    """A sampler of noise; the metric asks it for nothing else."""

    about = About()
    Sampling = Nothing

    def __init__(self, size=8):
        self.size = size

    def spec(self, batch):
        return {"image": jax.ShapeDtypeStruct((batch, self.size, self.size, 3), "float32")}

    def sample(self, params, rng, n, conditions=None, options=None):
        shape = (self.size, self.size, 3)
        return {"image": jax.vmap(lambda key: jax.random.uniform(key, shape, minval=-1, maxval=1))(rng)}


def measured(metric, data, task=None, net=None):
    opened = {} if net is None else {"network": models.open_model(net)}
    return metric(task or Noise(), {}, data, jax.random.key(0), **opened)["frechet"]


@pytest.mark.parametrize(
    ("source", "features"), [("folder", "net"), ("folder", "pixels"), ("set", "pixels"), ("arrays.npz", "pixels")]
)
def test_statistics_made_ahead_are_those_of_the_metric(root, tmp_path, capsys, monkeypatch, source, features):
    count = 9 if source == "arrays.npz" else 11
    said = made(capsys, source, tmp_path / "s.npz", features)
    dims = 8 * 8 * 3 if features == "pixels" else 8
    assert f"{count} images, {dims} features each; the metric frechet takes it as reference={tmp_path}/s.npz" in said
    assert "(there already)" in made(capsys, source, tmp_path / "s.npz", features)
    data = Images(str(root / source), 8)  # by another path
    metric = Frechet(features, samples=6, batch=4)
    net = None if features == "pixels" else "net"
    alone = measured(metric, data, net=net)
    monkeypatch.setattr(frechet, "epoch", lambda *_, **__: pytest.fail("the images were read again"))
    assert measured(replace(metric, reference=str(tmp_path / "s.npz")), data, net=net) == pytest.approx(alone, rel=1e-5)


def test_a_run_on_the_same_set_takes_them(root, tmp_path, capsys):
    made(capsys, "set", tmp_path / "s.npz", "pixels", "flip=true")
    params = weights.load(root / "net")[0]
    data = Images("set", 8, flip=True)
    exported(tmp_path / "run", TASK, params, data)
    shutil.copytree(root / "set", tmp_path / "moved")
    fields = ["features=pixels", f"reference={tmp_path}/s.npz", "samples=4", "batch=4"]
    assert cli.main(["eval", str(tmp_path / "run"), "frechet", *fields, f"data.path={tmp_path}/moved"]) == 0
    assert cli.main(["eval", str(tmp_path / "run"), "frechet", *fields, "data.flip=False"]) == 2
    assert "was made with other settings (flip: True -> False)" in capsys.readouterr().err


def test_others_are_refused(root, tmp_path, capsys):
    file = tmp_path / "s.npz"
    made(capsys, "folder", file, "net")
    metric = Frechet("net", samples=4, batch=4, reference=str(file))
    data = Images("folder", 8)

    def refused(metric, data, task=None, net="net"):
        with pytest.raises(UserError) as caught:
            measured(metric, data, task, net)
        assert "was made with other settings (" in str(caught.value)
        return str(caught.value).partition("(")[2].partition(":")[0]

    assert refused(replace(metric, flip=True), data) == "flip"
    assert refused(replace(metric, features="other"), data, net="other") == "features"
    assert refused(replace(metric, features="pixels"), data, net=None) == "features"
    assert refused(replace(metric, split="test"), data) == "data"
    assert refused(replace(metric, limit=5), data) == "images"
    assert refused(metric, Images(str(pictures(tmp_path / "more", seed=3)), 8)) == "data"
    assert refused(metric, Images("folder", 8, test_fraction=0.3)) == "data"
    assert refused(metric, Images("set", 8)) == "data"
    with_pixels = replace(metric, features="pixels", reference=str(tmp_path / "p.npz"))
    made(capsys, "folder", tmp_path / "p.npz")
    assert refused(with_pixels, Images("folder", 4), Noise(4), net=None) == "shape"
    before = file.read_bytes()
    assert cli.main(["prepare", "statistics", "folder", str(file), "features=net", "size=8", "flip=true"]) == 2
    assert "was made with other settings (flip: False -> True); remove it" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_fingerprints_know_the_images_and_not_the_place(root, tmp_path):
    def same(a, b):
        return a.fingerprint("train") == b.fingerprint("train")

    shutil.copytree(root / "folder", tmp_path / "copy")
    shutil.copytree(root / "set", tmp_path / "set")
    shutil.copy(root / "arrays.npz", tmp_path / "moved.npz")
    assert same(Images("folder", 8), Images(str(tmp_path / "copy"), 16, flip=True))
    assert same(Images("set", 8), Images(str(tmp_path / "set"), 8))
    assert same(Images("arrays.npz", 8), Images(str(tmp_path / "moved.npz"), 8))
    assert same(Images("arrays.npz", 8), Arrays("arrays.npz", labels="", flip=True))
    assert not same(Arrays("arrays.npz"), Arrays("arrays.npz", images="test_images"))
    assert not same(Arrays("arrays.npz", images="test_images"), Arrays("arrays.npz", "test_images", test_fraction=0.3))
    (tmp_path / "copy" / "00.png").unlink()
    assert not same(Images("folder", 8), Images(str(tmp_path / "copy"), 8))
    with np.load("arrays.npz") as file:
        np.savez(tmp_path / "moved.npz", **{**file, "train_images": file["train_images"][::-1]})
    assert not same(Images("arrays.npz", 8), Images(str(tmp_path / "moved.npz"), 8))
    for data in (Images("folder", 8), Images("set", 8), Images("arrays.npz", 8)):
        assert data.fingerprint("train") != data.fingerprint("test")


class Untold(Data):
    """The digits, without a word of what they are."""

    source = Digits().source

    def __repr__(self):
        return "Untold()"


def test_data_that_cannot_tell_are_compared_by_their_fields(tmp_path):
    metric = Frechet("pixels", samples=4, limit=20, batch=4, reference=str(tmp_path / "s.npz"))
    spec = {"image": jax.ShapeDtypeStruct((1, 8, 8, 1), "float32")}
    assert metric.statistics(Digits(), spec).count == 20
    shape = Untold()
    with pytest.raises(UserError, match=r"other settings \(data: Digits\(\) -> Untold"):
        metric.statistics(shape, spec)


def refused(capsys, source, *fields):
    capsys.readouterr()
    assert cli.main(["prepare", "statistics", str(source), "s.npz", "size=8", *fields]) == 2
    said = capsys.readouterr().err
    assert "data." not in said
    return said


def test_mistakes_are_told_in_the_words_of_the_command_line(tmp_path, capsys):
    assert "but channels=1; set channels=3, or convert=True to convert them" in refused(capsys, "set", "channels=1")
    (tmp_path / "a.jpg").touch()
    assert f"SOURCE {tmp_path}/a.jpg is a file; give a folder" in refused(capsys, tmp_path / "a.jpg")
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    first = f"run `zoo prepare images {tmp_path}/a.npz DIR` first, and give DIR in place of SOURCE"
    assert f"has no array 'train_images', which statistics need; {first}" in refused(capsys, tmp_path / "a.npz")


def test_what_has_to_be_prepared_first(tmp_path, capsys):
    (tmp_path / "tar").mkdir()
    (tmp_path / "tar" / "0.tar").touch()
    assert "is of tar files, of which" in refused(capsys, tmp_path / "tar")
    (tmp_path / "a.parquet").touch()
    assert "is of parquet files, of which" in refused(capsys, tmp_path / "a.parquet")
    flat = pictures(tmp_path / "flat")
    for path in flat.glob("*.png"):
        path.with_suffix(".txt").write_text("noise")
    assert "11 images" in made(capsys, str(flat), tmp_path / "flat.npz")
    shutil.copytree(flat, tmp_path / "nested" / "a" / "b")
    shutil.copytree(flat, tmp_path / "nested" / "c")
    assert "22 images" in made(capsys, str(tmp_path / "nested"), tmp_path / "nested.npz")
    shutil.copytree(flat, tmp_path / "nested", dirs_exist_ok=True)
    assert "images with captions in folders of their own" in refused(capsys, tmp_path / "nested")


def test_a_broken_link_is_named(tmp_path, capsys):
    pictures(tmp_path / "p")
    (tmp_path / "p" / "0.png").symlink_to("nowhere.png")
    said = refused(capsys, tmp_path / "p", "test_fraction=0")
    assert f"{tmp_path}/p/0.png cannot be read (No such file or directory)" in said
