"""Images with or without labels: the bundled digits, .npz arrays, folders, prepared sets, TFDS.

Every source here gives `image` float32 [S, S, C] in [-1, 1] (level k of 8 bits becomes 2k/255 - 1) and, where the
images are labelled, `label` int32 [].
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, TypeAlias

import jax
import numpy as np
from msgspec import Meta
from PIL import Image, ImageOps

from zoo.data.arrays import array_name, checked_arrays, class_names, picture_array, tell_classes
from zoo.data.folders import SPLITS, TESTS, divide, existing, hashed, list_folder, word_of
from zoo.data.pipeline import Data, Source
from zoo.data.records import Info, Record, is_prepared, open_shards, read_info
from zoo.errors import UserError
from zoo.fields import Below1, NotEmpty, Side
from zoo.files import digests, first_line, reading, sha256_of_json

LEVELS = (np.arange(256) / 127.5 - 1).astype(np.float32)
# what Pillow reads by itself, the usual ones first
# fmt: off
SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jfif", ".jpe", ".ppm", ".pgm", ".pbm",
    ".pnm", ".pfm", ".apng", ".avifs", ".blp", ".bw", ".cur", ".dcx", ".dds", ".dib", ".fit", ".fits", ".flc", ".fli",
    ".ftc", ".ftu", ".icb", ".icns", ".ico", ".im", ".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx", ".msp", ".pcd",
    ".pcx", ".psd", ".pxr", ".qoi", ".ras", ".rgb", ".rgba", ".sgi", ".tga", ".vda", ".vst", ".xbm", ".xpm",
)
# fmt: on
LOOKED_AT = 64  # files of a folder whose sizes are compared
SpecOf = Mapping[str, jax.ShapeDtypeStruct]
_log = logging.getLogger("zoo")


Channels: TypeAlias = Literal[1, 3]  # grey or colour


@dataclass(frozen=True)
class Digits(Data):
    """1,797 scans of handwritten digits, 8x8x1, bundled with scikit-learn: 1,500 to train on, 297 to test.

    The scans have 17 grey levels k in 0..16; `image` is 2k/16 - 1, `label` is 0..9.
    """

    only: tuple[Annotated[int, Meta(ge=0, le=9)], ...] = ()  # digits that there are; (): all
    size: Side = 8  # to which they are enlarged (bicubic)

    def __repr__(self) -> str:
        said = [f"only={self.only}"] * bool(self.only) + [f"size={self.size}"] * (self.size != 8)
        return f"Digits({', '.join(said)})"  # statistics that are kept name all of them so

    def source(self, split: str, spec: SpecOf | None = None) -> ImageSource:
        """The examples of a split; the order of the split is fixed."""
        check_split(split)
        images, labels = _digits()
        order = np.random.default_rng(0).permutation(len(images))
        part = order[:1500] if split == "train" else order[1500:]
        part = part[np.isin(labels[part], self.only)] if self.only else part
        names = tuple(map(str, range(10)))
        if self.size != images.shape[1]:
            images = _enlarged(self.size)
        return ImageSource(len(part), lambda i: (images[part[i]], labels[part[i]]), names)


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    # The file itself: importing scikit-learn takes a second, which is much of what a short run takes to start.
    package = importlib.util.find_spec("sklearn")
    place = Path((package.submodule_search_locations or ["."])[0] if package else ".") / "datasets/data/digits.csv.gz"
    if place.is_file():
        rows = np.loadtxt(io.StringIO(gzip.decompress(place.read_bytes()).decode()), delimiter=",")
        images, labels = rows[:, :64].reshape(-1, 8, 8), rows[:, 64].astype(np.int64)
    else:
        from sklearn.datasets import load_digits

        images, labels = load_digits().images, load_digits().target
    return (2 * images[..., None] / 16 - 1).astype(np.float32), labels


@lru_cache(maxsize=2)
def _enlarged(size: int) -> np.ndarray:
    scans = (Image.fromarray(scan[..., 0]).resize((size, size), Image.Resampling.BICUBIC) for scan in _digits()[0])
    return np.clip(np.stack([np.asarray(scan)[..., None] for scan in scans]), -1, 1)


@dataclass(frozen=True)
class Arrays(Data):
    """Images in an .npz file: uint8, or floats already in [-1, 1]; [N, H, W] or [N, H, W, C], labels int [N].

    `{split}` in a name becomes "train" or "test". A name without it holds everything, and a fixed part `test_fraction`
    of it is the test split.
    """

    path: NotEmpty
    images: str = "{split}_images"
    labels: str = "{split}_labels"  # "": unlabelled
    size: Side | None = None  # shorter side, then centre crop; None: as it is
    channels: Channels | None = None  # 1 or 3, converting what differs; None: as it is
    flip: bool = False  # mirror half of the training images
    classes: tuple[str, ...] = ()  # label names; (): "0", "1", ...
    test_fraction: Below1 = 0.1

    def fingerprint(self, split: str) -> str:
        """What the images of a split are: the bytes of the file, and which of its arrays."""
        check_split(split)
        path = existing(self.path)
        part = None if "{split}" in self.images else [split, self.test_fraction]
        name = array_name(self.images, split, "data.images")
        return sha256_of_json([digests(path.parent, [path.name]), name, part])

    def source(self, split: str, spec: SpecOf | None = None) -> ImageSource:
        """The examples of a split, read lazily from the file and kept in memory."""
        check_split(split)
        path = existing(self.path)
        version = str(path.stat().st_mtime_ns)
        images = picture_array(path, array_name(self.images, split, "data.images"), "data.images", version)
        labels = None
        if self.labels:
            labels = picture_array(path, array_name(self.labels, split, "data.labels"), "data.labels", version)
        images, labels = checked_arrays(path, images, labels)
        names = class_names(self.classes, labels)
        if labels is not None and split == "train":
            tell_classes(path, labels, names)
        part = np.arange(len(images))
        if "{split}" not in self.images:
            part = np.asarray(divide(len(images), self.test_fraction, labels, names)[split], np.int64)
        if not len(part):
            raise UserError(f"{path} leaves no image for the {split} split; change data.test_fraction")
        if images.dtype != np.uint8 and self.size is not None and images.shape[1:3] != (self.size, self.size):
            raise UserError(
                f"data.size={self.size} would resize {images.dtype} images of {list(images.shape[1:])} in {path}; "
                "only uint8 images are resized: store uint8, or resize before saving"
            )

        def read(i: int) -> tuple[np.ndarray, Any]:
            image = images[part[i]]
            if self.size is not None and image.shape[:2] != (self.size, self.size):
                image = to_array(square(from_array(image), self.size))
            if self.channels == 3 and image.shape[-1] == 1:
                image = np.repeat(image, 3, axis=-1)
            elif self.channels == 1 and image.shape[-1] == 3:
                luma = image @ np.array([[0.299], [0.587], [0.114]])
                image = (luma.round() if image.dtype == np.uint8 else luma).astype(image.dtype)
            return image, None if labels is None else labels[part[i]]

        return ImageSource(len(part), read, names, self.flip)


@dataclass(frozen=True)
class Images(Data):
    """Images by path: a folder, a set made by `zoo prepare`, an .npz file, or "tfds:name/config" prepared on this disk.

    An .npz file has the layout that `Arrays` expects by default. A folder holds images, or one folder of images per
    class, or `train` and `test` (or `val`) folders of either kind (`zoo/data/folders.py`). Without a test part a fixed share
    `test_fraction` of every class is held out. Images are turned upright, transparent ones laid on white, resized (bicubic, antialiased) to
    `size` on the shorter side and cropped at the centre.
    """

    path: NotEmpty
    size: Side
    channels: Channels = 3
    flip: bool = False  # mirror half of the training images
    convert: bool = False  # grey files to colour or colour files to grey; False: such a file is an error
    test_fraction: Below1 = 0.1
    data_dir: str | None = None  # where TFDS keeps its sets; None: its default

    def source(self, split: str, spec: SpecOf | None = None) -> ImageSource:
        """The examples of a split; images are decoded when they are read."""
        check_split(split)
        if self.path.startswith("tfds:"):
            encoded = _tfds(self, split)
        else:
            root = existing(self.path)
            if root.suffix == ".npz" and root.is_file():
                return self._arrays(root).source(split, spec)
            if root.is_file():
                raise UserError(f"data.path={root} is a file; give a folder of images, a prepared set or an .npz file")
            encoded = (_prepared if is_prepared(root) else _folder)(self, root, split)
        if not encoded.count:
            raise UserError(f"{self.path} has no image in its {split} split; change data.test_fraction or add images")

        def read(i: int) -> tuple[np.ndarray, int | None]:
            data, label, name = encoded.read(i)
            try:
                image, _ = open_image(data, self.channels, self.convert)
            except BadImage as error:
                raise UserError(f"{name} {error}; {error.advice}") from None
            return to_array(square(image, self.size)), label

        return ImageSource(encoded.count, read, encoded.labels, self.flip)

    def fingerprint(self, split: str) -> str:
        """What the images of a split are, wherever they lie: names and all bytes of files; for TFDS this description."""
        check_split(split)
        if self.path.startswith("tfds:"):
            return repr(self)
        root = existing(self.path)
        if root.suffix == ".npz" and root.is_file():
            return self._arrays(root).fingerprint(split)
        if is_prepared(root):
            return sha256_of_json([[shard.sha256, shard.count] for shard in read_info(root, Info).splits[split]])
        return hashed(root, list_folder(root, self.test_fraction, SUFFIXES)[0][split].paths)

    def _arrays(self, path: Path) -> Arrays:
        """The same images from an .npz file; channels that differ are left for the task to refuse unless converted."""
        channels = self.channels if self.convert else None
        return Arrays(str(path), size=self.size, channels=channels, flip=self.flip, test_fraction=self.test_fraction)


class ImageSource(Source):
    """A source from a function `read(i) -> (image uint8 or float32 [S, S, C], label or None)`."""

    def __init__(
        self, count: int, read: Callable[[int], tuple[np.ndarray, Any]], labels: tuple[str, ...], flip: bool = False
    ) -> None:
        self._count, self._read, self.labels = count, read, labels
        self.augment = _flip if flip else None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < self._count:
            raise IndexError(index)
        image, label = self._read(index)
        example = {"image": LEVELS[image] if image.dtype == np.uint8 else image}
        return example if label is None else {**example, "label": np.asarray(label, np.int32)}


def _flip(example: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {**example, "image": example["image"][:, ::-1]} if rng.random() < 0.5 else example


# Pictures


class BadImage(Exception):
    """Why one image cannot be used; `advice` says what to do about it."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(reason)
        self.advice = advice


def check_kind(grey: bool, channels: int, convert: bool) -> None:
    """Refuses a grey image where colour is wanted and the other way round, unless it may be converted."""
    if grey != (channels == 1) and not convert:
        raise BadImage(
            f"is {'grey' if grey else 'in colour'}, but channels={channels}",
            f"set channels={1 if grey else 3}, or convert such images (convert=True)",
        )


def open_image(data: bytes, channels: int, convert: bool) -> tuple[Image.Image, bool]:
    """An encoded image as an upright 8-bit picture of mode L or RGB, and whether the file was exactly that already.

    Raises:
      BadImage: it cannot be decoded, has more than 8 bits, or has the other number of channels without `convert`.
    """
    try:
        raw = Image.open(io.BytesIO(data))
        raw.load()
        if raw.mode.startswith(("I", "F")):
            raise BadImage(f"has 16-bit or floating-point pixels (mode {raw.mode})", "store it with 8 bits per channel")
        # of 16 bits grey with alpha Pillow makes colour of 8
        if raw.format == "PNG" and raw.mode == "RGBA" and data[24:26] == b"\x10\x04":
            raise BadImage("has 16-bit grey pixels with alpha", "store it with 8 bits per channel")
        grey = raw.mode in ("1", "L", "LA", "La")
        if raw.mode == "P":
            palette = np.asarray((raw.getpalette() or [])[: 3 * 256]).reshape(-1, 3)
            grey = bool((palette == palette[:, :1]).all())
        check_kind(grey, channels, convert)
        mode = "L" if channels == 1 else "RGB"
        turned = raw.getexif().get(0x0112, 1) in range(2, 9)
        if raw.mode == mode and not raw.has_transparency_data and not turned:
            return raw, True
        image = ImageOps.exif_transpose(raw)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert(mode), False
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "not an image file that Pillow knows"
        raise BadImage(f"cannot be decoded ({reason})", "restore or delete it (`zoo check` names all such)") from None


def upright_size(data: bytes | Path | np.ndarray) -> tuple[int, int]:
    """(width, height) of an encoded image as it is seen, without decoding it; or of an array [H, W, C].

    Of a file no more is read than its header and the heads of its parts.

    Raises:
      BadImage: it is no image.
    """
    if isinstance(data, np.ndarray):
        return data.shape[1], data.shape[0]
    try:
        with (
            open(data, "rb", buffering=0) if isinstance(data, Path) else io.BytesIO(data) as file,
            Image.open(file) as raw,
        ):
            # to look for an orientation in a PNG file, Pillow decodes it; hardly one has any
            turned = (raw.format != "PNG" or _tells(file)) and raw.getexif().get(0x0112, 1) in range(5, 9)
            return (raw.height, raw.width) if turned else (raw.width, raw.height)
    except Exception as error:
        raise BadImage(f"cannot be read ({' '.join(str(error).split())})", "delete it") from None


def _tells(png: BinaryIO | io.RawIOBase) -> bool:
    """Whether a PNG file has a chunk that may hold an orientation; the position in the file is left as it was."""
    before, at, found = png.tell(), 8, False
    while not found and png.seek(at) == at and len(head := png.read(8) or b"") == 8:
        size, kind = int.from_bytes(head[:4]), head[4:]
        texts = kind in (b"tEXt", b"zTXt", b"iTXt")
        found = kind == b"eXIf" or (
            texts and (png.read(21) or b"").startswith((b"Raw profile type exif", b"XML:com.adobe.xmp"))
        )
        at += 12 + size
    png.seek(before)
    return found


def square(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square of an image, at `size` x `size` (bicubic, antialiased)."""
    return fit(image, size, size)


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """The largest centred part of an image with the shape of `width` x `height`, at that size (bicubic, antialiased)."""
    if image.size == (width, height):
        return image
    wide, high = image.size
    if wide * height >= high * width:
        across, down = high * width / height, float(high)
    else:
        across, down = float(wide), wide * height / width
    left, top = (wide - across) / 2, (high - down) / 2
    box = (left, top, left + across, top + down)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


def to_array(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, C] of a picture of mode L or RGB."""
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def from_array(array: np.ndarray) -> Image.Image:
    """The picture of a uint8 array [H, W, 1] or [H, W, 3]."""
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


# Reading


def check_split(split: str) -> None:
    """Refuses a split that is neither "train" nor "test"."""
    if split not in SPLITS:
        raise UserError(f"split={split!r} is unknown; choose 'train' or 'test'")


@dataclass(frozen=True)
class Encoded:
    """A split of encoded images: `read(i) -> (bytes, label or None, name for errors)`."""

    count: int
    read: Callable[[int], tuple[bytes, int | None, str]]
    labels: tuple[str, ...]


def _folder(data: Images, root: Path, split: str) -> Encoded:
    splits, classes = list_folder(root, data.test_fraction, SUFFIXES)
    files = splits[split]
    everything = [path for part in splits.values() for path in part.paths]
    _tell_sizes(root, data.size, tuple(everything[:: -(-len(everything) // LOOKED_AT) or 1]))

    def read(i: int) -> tuple[bytes, int | None, str]:
        path = root / files.paths[i]
        with reading(path, "restore it, or remove it and start again"):
            return path.read_bytes(), None if files.labels is None else files.labels[i], str(path)

    return Encoded(len(files.paths), read, classes)


@lru_cache(maxsize=64)  # a folder is opened several times in a run
def _tell_sizes(root: Path, size: int, some: tuple[str, ...]) -> None:
    """Says that images are resized where some of them are not `size` x `size`; a broken file is reported when it is read."""
    found = []
    for path in some:
        with suppress(BadImage):
            found.append(upright_size(root / path))
    sizes = list(dict.fromkeys(found))
    if not sizes or sizes == [(size, size)]:
        return
    shown = ", ".join(f"{width}x{height}" for width, height in sizes[:2])
    what = f"different sizes (e.g. {shown})" if len(sizes) > 1 else shown
    way = f"each is resized to {size} on its shorter side and cropped at the centre"
    _log.info("%s: images of %s: %s", root, what, way)


# Prepared sets


def _prepared(data: Images, root: Path, split: str) -> Encoded:
    info = read_info(root, Info)
    if info.settings.channels != data.channels and not data.convert:
        raise UserError(
            f"{root} holds images of {info.settings.channels} channel(s), but data.channels={data.channels}; "
            f"set data.channels={info.settings.channels}, or data.convert=True to convert them"
        )
    count, record = open_shards(root, info.splits[split], split, Record)

    def read(i: int) -> tuple[bytes, int | None, str]:
        found = record(i)
        return found.image, None if found.label < 0 else found.label, f"{root}, record {i} ({found.name})"

    return Encoded(count, read, tuple(info.labels) if count else ())


# TFDS


def _tfds(data: Images, split: str) -> Encoded:
    """A TFDS set that is already on disk; neither the network nor tensorflow is ever asked."""
    import tensorflow_datasets as tfds

    name = data.path.removeprefix("tfds:")
    data_dir = Path(data.data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser().absolute()
    builder = tfds.builder_from_directory(str(_tfds_folder(name, data_dir)))
    features = dict(builder.info.features.items()) if hasattr(builder.info.features, "items") else {}
    if not isinstance(features.get("image"), tfds.features.Image):
        raise UserError(f"{data.path} has no image called 'image', it has {', '.join(features)}; use another set")
    labelled = isinstance(features.get("label"), tfds.features.ClassLabel)
    names = tuple(features["label"].names) if labelled else ()

    def open_split(which: str) -> Any:
        try:
            return builder.as_data_source(which, decoders={"image": tfds.decode.SkipDecoding()})
        except (NotImplementedError, ValueError) as error:
            raise UserError(
                f"{data.path} in {data_dir} cannot be read at random ({first_line(error)}); "
                + _tfds_recipe(name, data_dir)
            ) from None

    words = {name: word_of(name) for name in builder.info.splits if builder.info.splits[name]}
    tests = sorted((name for name in words if words[name] in TESTS), key=lambda name: TESTS.index(str(words[name])))
    # some sets publish a test split without its labels (-1)
    blind = [test for test in tests if labelled and int(open_split(test)[0]["label"]) < 0]
    tests = [test for test in tests if test not in blind]
    if split == "test" and tests:
        records, part = open_split(tests[0]), None
    else:
        records = open_split("train")
        part = None if tests else divide(len(records), data.test_fraction)[split]

    def read(i: int) -> tuple[bytes, int | None, str]:
        example = records[i if part is None else part[i]]
        return example["image"], int(example["label"]) if labelled else None, f"{data.path}, {split} example {i}"

    return Encoded(len(records) if part is None else len(part), read, names)


def _tfds_recipe(name: str, data_dir: Path) -> str:
    code = f"tfds.builder({name!r}, data_dir={str(data_dir)!r}, file_format='array_record').download_and_prepare()"
    return f'prepare it once with: python -c "import tensorflow_datasets as tfds; {code}"'


def _tfds_folder(name: str, data_dir: Path) -> Path:
    """The newest version of "name", "name/config" or "name/config:1.0.0" below data_dir."""
    stem, _, version = name.partition(":")
    root = data_dir / stem
    found = [p.parent for p in root.glob(f"{version or '*'}/dataset_info.json")]
    if found:
        return max(found, key=lambda p: [int(n) if n.isdigit() else -1 for n in p.name.split(".")])
    configs = sorted({p.parent.parent.name for p in root.glob("*/*/dataset_info.json")})
    if configs:
        raise UserError(f"tfds:{name} needs one of its configs: " + ", ".join(f"tfds:{stem}/{c}" for c in configs))
    raise UserError(f"tfds:{name} is not on disk in {data_dir}; {_tfds_recipe(name, data_dir)}, or set data.data_dir")
