"""Digits, arrays, folders and TFDS: values, splits, pictures of every kind, and what is said about bad ones."""

from __future__ import annotations

import io
import os

import jax
import numpy as np
import pytest
from mistakes import told
from PIL import Image

from zoo.data.arrays import array_name
from zoo.data.images import LEVELS, Arrays, BadImage, Digits, Images, open_image, square, to_array, upright_size
from zoo.data.pipeline import batches, epoch


def encoded(image, kind="PNG", **kw):
    buffer = io.BytesIO()
    image.save(buffer, kind, **kw)
    return buffer.getvalue()


def colour(seed=0, size=(6, 6)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Two classes of ten colour PNG files each, no splits."""
    root = tmp_path / "photos"
    for c, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for i in range(10):
            colour(10 * c + i).save(root / name / f"{i}.png")
    return root


def test_digits_are_the_fixed_split():
    from sklearn.datasets import load_digits

    raw, order = load_digits(), np.random.default_rng(0).permutation(1797)
    train, test = Digits().source("train"), Digits().source("test")
    assert (len(train), len(test)) == (1500, 297)
    assert train.labels == tuple("0123456789")
    for source, at, row in ((train, 0, order[0]), (train, 1499, order[1499]), (test, 296, order[1796])):
        example = source[at]
        assert example["image"].dtype == np.float32
        assert example["image"].shape == (8, 8, 1)
        np.testing.assert_allclose(example["image"][..., 0], 2 * raw.images[row] / 16 - 1)
        assert example["label"] == raw.target[row]
        assert example["label"].dtype == np.int32
    with pytest.raises(IndexError):
        train[1500]
    with told("'train' or 'test'"):
        Digits().source("val")
    np.testing.assert_array_equal(LEVELS, (2 * np.arange(256) / 255 - 1).astype(np.float32))


# Arrays


def save(path, **arrays):
    np.savez_compressed(path, **arrays)
    return str(path)


def test_arrays_by_split(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 4), np.uint8)
    splits = {"train_images": images, "train_labels": np.uint8([0, 2, 1, 0, 2])}
    splits |= {"test_images": images[:2], "test_labels": np.uint8([0, 1])}
    path = save(tmp_path / "a.npz", **splits)
    source = Arrays(path).source("train")
    assert len(source) == 5
    assert source.labels == ("0", "1", "2")
    np.testing.assert_array_equal(source[1]["image"], LEVELS[images[1]][..., None])
    assert source[1]["label"] == 2
    assert len(Arrays(path).source("test")) == 2
    shaped = Arrays(path, size=4, channels=3).source("train")[0]["image"]
    assert shaped.shape == (4, 4, 3)
    np.testing.assert_array_equal(shaped[..., 0], LEVELS[images[0, 1:5]])  # centre crop, no resizing needed
    named = Arrays(path, labels="", images="test_images", test_fraction=0.5)
    assert [(len(named.source(s)), named.source(s).labels) for s in ("train", "test")] == [(1, ()), (1, ())]
    with told("names 2 classes, but the labels go up to 2"):
        Arrays(path, classes=("a", "b")).source("train")
    with told("'nothing', it has train_images, ", "set data.images"):
        Arrays(path, images="nothing").source("train")
    for name in ("{splt}_images", "{}", "{split", "{{split}}", "{0}", "{split!r}", "{split:>9}"):
        with told(f"data.images={name!r}: of braces only {{split}} is known"):
            array_name(name, "train", "data.images")
    ours, theirs = Images(path, size=4, channels=1), Arrays(path, size=4)  # as images they are the same
    assert ours.source("train").labels == theirs.source("train").labels
    np.testing.assert_array_equal(ours.source("train")[3]["image"], theirs.source("train")[3]["image"])
    assert Images(path, size=4).source("test")[0]["image"].shape == (4, 4, 1)  # never made colour
    assert Images(path, size=4, convert=True).source("test")[0]["image"].shape == (4, 4, 3)


def test_arrays_that_are_rewritten_are_read_again(tmp_path):
    path = save(tmp_path / "a.npz", images=np.zeros((4, 2, 2), np.uint8))
    data = Arrays(path, images="images", labels="")
    assert data.source("train")[0]["image"].max() == -1
    save(tmp_path / "a.npz", images=np.full((4, 2, 2), 255, np.uint8))
    os.utime(path, ns=(1, 1))
    assert data.source("train")[0]["image"].min() == 1


@pytest.mark.parametrize(
    "arrays, text",
    [
        ({"images": np.full((4, 2, 2), 2.0)}, "values in [2, 2]; floating-point images must lie in [-1, 1]"),
        ({"images": np.full((4, 2, 2), np.nan)}, "must lie in [-1, 1]"),
        ({"images": np.zeros((4, 2, 2), np.int32)}, "images are int32; store uint8"),
        ({"images": np.zeros((4, 2, 2, 5), np.uint8)}, "shape [4, 2, 2, 5]"),
        ({"images": np.zeros((4, 2, 2), np.uint8), "labels": np.zeros(3, int)}, "labels are int64[3]"),
        ({"images": np.zeros((4, 2, 2), np.uint8), "labels": np.full(4, -1)}, "number classes from 0"),
        ({"images": np.array([{}, {}])}, "'images' cannot be read"),
    ],
)
def test_bad_arrays_are_named(tmp_path, arrays, text):
    path = save(tmp_path / "a.npz", **arrays)
    with told(text):
        Arrays(path, images="images", labels="labels" if "labels" in arrays else "").source("train")


def test_float_arrays_pass_unchanged_and_are_not_resized(tmp_path):
    images = np.random.default_rng(0).uniform(-1, 1, (4, 2, 2, 3))
    data = Arrays(save(tmp_path / "a.npz", images=images), images="images", labels="", test_fraction=0)
    np.testing.assert_array_equal(data.source("train")[2]["image"], images[2].astype(np.float32))
    with told("data.size=4 would resize float32"):
        Arrays(data.path, images="images", labels="", size=4).source("train")
    for kind, name, said in ((Arrays, "b.npz", "is no .npz file"), (Images, "b.jpg", "b.jpg is a file")):
        (tmp_path / name).write_bytes(b"nothing")
        with told(said):
            kind(str(tmp_path / name), size=4).source("train")


# Pictures


def test_pictures_of_every_kind():
    rgb, grey = colour(), colour().convert("L")
    for image, channels, stored in (
        (rgb, 3, True),
        (grey, 1, True),
        (grey.convert("1"), 1, False),
        (rgb.convert("P"), 3, False),
        (grey.convert("P"), 1, False),
        (rgb.convert("RGBA"), 3, False),
        (grey.convert("LA"), 1, False),
    ):
        got, as_stored = open_image(encoded(image), channels, convert=False)
        assert (got.mode, as_stored) == ("RGB" if channels == 3 else "L", stored)
        with pytest.raises(BadImage, match="is grey" if channels == 1 else "is in colour"):
            open_image(encoded(image), 4 - channels, convert=False)
        assert open_image(encoded(image), 4 - channels, convert=True)[0].mode == ("L" if channels == 3 else "RGB")
    assert open_image(encoded(rgb.convert("CMYK"), "JPEG"), 3, False)[0].mode == "RGB"


def test_transparent_pixels_lie_on_white_and_photos_are_upright():
    clear = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    clear.putpixel((1, 0), (10, 20, 30, 255))
    assert to_array(open_image(encoded(clear), 3, False)[0]).tolist() == [[[255] * 3, [10, 20, 30]]]
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned, as_stored = open_image(encoded(colour(size=(4, 2)), exif=exif), 3, False)
    assert (turned.size, as_stored) == ((2, 4), False)


def test_the_size_of_a_picture_is_that_of_the_upright_one(tmp_path):
    from PIL.PngImagePlugin import PngInfo

    wide, exif = colour(size=(4, 2)), Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "JPEG", "WEBP"):
        assert upright_size(encoded(wide, kind, exif=exif)) == (2, 4)
        assert upright_size(encoded(wide, kind)) == (4, 2)
    plain, said = PngInfo(), PngInfo()
    plain.add_text("Comment", "a photo")
    said.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="8"/>')
    for info, size in ((plain, (4, 2)), (said, (2, 4))):
        data = encoded(wide, pnginfo=info)
        assert upright_size(data) == open_image(data, 3, False)[0].size == size
    late = encoded(wide, exif=exif)  # with the orientation behind the pixels
    at, end = late.index(b"eXIf") - 4, late.index(b"IDAT") - 4
    chunk = late[at : at + 12 + int.from_bytes(late[at : at + 4])]
    assert at < end
    moved = late.replace(chunk, b"").replace(late[-12:], chunk + late[-12:])
    assert upright_size(moved) == (2, 4)
    for i, data in enumerate(
        (encoded(wide, "JPEG", exif=exif), moved, encoded(wide, pnginfo=said), encoded(wide, "WEBP"))
    ):
        (tmp_path / str(i)).write_bytes(data)
        assert upright_size(tmp_path / str(i)) == upright_size(data)
    with pytest.raises(BadImage, match="cannot be read"):
        upright_size(b"")


def test_sixteen_bits_and_rubbish_are_refused_and_square_takes_the_centre():
    deep = encoded(Image.fromarray(np.full((4, 4), 40_000, np.uint16)))
    broken = encoded(colour(size=(64, 64)))[:3000]
    for data, said in ((deep, "16-bit"), (b"rubbish", "not an image file"), (broken, "cannot be decoded")):
        with pytest.raises(BadImage, match=said):
            open_image(data, 1, True)
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = 200
    assert (to_array(square(Image.fromarray(wide), 4)) == 200).all()
    fine = to_array(square(Image.fromarray(np.tile(np.uint8([0, 255]), (16, 8))), 4))  # stripes of one pixel
    assert 100 < fine.mean() < 155  # antialiasing makes them grey
    assert fine.std() < 20


# Folders


def test_folder_of_classes_is_split_once_and_for_all(folder):
    data = Images(str(folder), size=6)
    train, test = data.source("train"), data.source("test")
    assert (len(train), len(test)) == (18, 2)
    assert train.labels == ("cat", "dog")
    seen = {e["image"].tobytes(): int(e["label"]) for s in (train, test) for e in (s[i] for i in range(len(s)))}
    assert len(seen) == 20
    assert seen[LEVELS[np.asarray(colour(3))].tobytes()] == 0
    assert seen[LEVELS[np.asarray(colour(13))].tobytes()] == 1
    b = next(batches(Images(str(folder), size=4, flip=True), 4))
    assert b["image"].shape == (4, 4, 4, 3)


def test_a_folder_without_classes_has_no_labels(folder):
    flat = Images(str(folder / "cat"), size=6, test_fraction=0.2)
    assert [len(flat.source(s)) for s in ("train", "test")] == [8, 2]
    assert set(flat.source("train")[0]) == {"image"}
    spec = {"label": jax.ShapeDtypeStruct((2,), np.int32)}
    with told("wants 'label', the data gives 'image'; ", "task.classes=0"):
        batches(flat, 2, spec=spec)


def test_bad_folders_and_files_are_named(folder, tmp_path):
    def told_of(*words, path=folder, split="train", **fields):
        with told(*words):
            list(epoch(Images(str(path), size=6, **fields), 20, split=split))

    told_of(f"{tmp_path / 'fotos'} does not exist; did you mean {folder}?", path=tmp_path / "fotos")
    (tmp_path / "empty").mkdir()
    told_of("holds no images; expected image files", path=tmp_path / "empty")
    told_of("no image in its test split", split="test", test_fraction=0)
    bad, loose = folder / "cat" / "3.png", folder / "loose.png"
    colour().save(loose)
    told_of("beside folders of images")
    loose.unlink()
    bad.write_bytes(bad.read_bytes()[:60])
    told_of(f"{bad} cannot be decoded ", "`zoo check`", test_fraction=0)
    colour(3).convert("L").save(bad)
    told_of(f"{bad} is grey, but channels=3; set channels=1", test_fraction=0)
    ((b, _),) = epoch(Images(str(folder), size=6, test_fraction=0, convert=True), 20, split="train")
    assert (b["image"][3][..., 0] == b["image"][3][..., 1]).all()


def test_a_folder_that_is_resized_says_so_once(folder, caplog):
    caplog.set_level("INFO", "zoo")
    Images(str(folder), size=6).source("train")
    assert not caplog.records  # all are 6x6
    for split in ("train", "test", "train"):
        assert Images(str(folder), size=4).source(split)[0]["image"].shape == (4, 4, 3)
    said = f"{folder}: images of 6x6: each is resized to 4 on its shorter side and cropped at the centre"
    assert caplog.messages == [said]
    caplog.clear()
    (folder / "cat" / "2.png").write_bytes(b"rubbish")  # named when it is read, not here
    (folder / "cat" / "3.png").unlink()
    (folder / "cat" / "3.png").symlink_to("nowhere")
    exif = Image.Exif()
    exif[0x0112] = 6
    colour(size=(9, 5)).save(folder / "dog" / "4.png", exif=exif)
    for split in ("train", "test"):
        Images(str(folder), size=8).source(split)
    (said,) = caplog.messages
    assert said.startswith(f"{folder}: images of different sizes (e.g. 6x6, 5x9): each is resized to 8 on")


# TFDS


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A TFDS set made from PNG files; tensorflow is not needed for it."""
    import tensorflow_datasets as tfds

    source, out = tmp_path_factory.mktemp("png"), tmp_path_factory.mktemp("tfds")
    for split, count in (("train", 6), ("validation", 2)):
        for i in range(count):
            path = source / split / ("yes" if i % 2 else "no") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            colour(i).save(path)

    class Answers(tfds.core.GeneratorBasedBuilder):
        """Noise."""

        VERSION = tfds.core.Version("1.0.0")
        MANUAL_DOWNLOAD_INSTRUCTIONS = "none"

        def _info(self):
            picture, answer = tfds.features.Image(shape=(None, None, 3)), tfds.features.ClassLabel(names=["no", "yes"])
            features = tfds.features.FeaturesDict({"image": picture, "label": answer})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {s: self._generate_examples(dl_manager.manual_dir / s) for s in ("train", "validation")}

        def _generate_examples(self, root):
            for path in sorted(root.glob("*/*.png")):
                yield f"{path.parent.name}{path.name}", {"image": str(path), "label": path.parent.name}

    builder = Answers(data_dir=out, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=source))
    return out


def test_tfds_on_disk(tfds_dir):
    data = Images("tfds:answers", size=6, data_dir=str(tfds_dir))
    train, test = data.source("train"), data.source("test")
    assert (len(train), len(test)) == (6, 2)
    assert train.labels == ("no", "yes")
    images = {train[i]["image"].tobytes(): int(train[i]["label"]) for i in range(6)}
    assert images == {LEVELS[np.asarray(colour(i))].tobytes(): i % 2 for i in range(6)}
    assert len(Images("tfds:answers:1.0.0", size=6, data_dir=str(tfds_dir)).source("test")) == 2
    with told("in colour, but channels=1"):
        Images("tfds:answers", size=6, channels=1, data_dir=str(tfds_dir)).source("train")[0]


def test_tfds_that_is_not_on_disk_says_how_to_get_it(tmp_path):
    with told("not on disk in ", "tfds.builder('mnist', ", "download_and_prepare"):
        Images("tfds:mnist", size=28, channels=1, data_dir=str(tmp_path)).source("train")
    config = tmp_path / "resized" / "64x64" / "1.0.0"
    config.mkdir(parents=True)
    (config / "dataset_info.json").write_text("{}")
    with told("needs one of its configs: tfds:resized/64x64"):
        Images("tfds:resized", size=64, data_dir=str(tmp_path)).source("train")
