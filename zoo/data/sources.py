"""What `zoo prepare` reads: folders of images by class, images with captions, .npz, tar and parquet files, prepared sets.

A caption lies beside its image: `a/7.txt` beside `a/7.jpg`, in a folder or in a tar file (there also `a/7.json` with
"caption"); or in another column of the same row of a parquet file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.images import (
    SPLITS,
    SUFFIXES,
    TESTS,
    BadImage,
    checked_arrays,
    divide,
    list_folder,
    open_npz,
)
from zoo.data.records import Info, Record, format_of, open_shards, read_info
from zoo.errors import UserError, suggest


def _nothing(i: int) -> str:
    return ""


@dataclass(frozen=True)
class Items:
    """One split of a source. What cannot be read raises BadImage."""

    count: int
    read: Callable[[int], bytes | np.ndarray]  # an encoded image, or uint8 [H, W, C]
    label: Callable[[int], int]  # -1: unlabelled
    name: Callable[[int], str]
    caption: Callable[[int], str] = _nothing

    def part(self, members: Sequence[int]) -> Items:
        """These of them, in this order."""

        def of(f: Callable[[int], Any]) -> Callable[[int], Any]:
            return lambda i: f(members[i])

        return Items(len(members), of(self.read), of(self.label), of(self.name), of(self.caption))


@dataclass(frozen=True)
class Source:
    """Both splits of a source, its class names, and a hash of what it is made of."""

    splits: dict[str, Items]
    labels: tuple[str, ...]
    fingerprint: str
    captioned: bool = False


def open_source(
    origin: Path,
    test_fraction: float,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    prepared: bool = False,
) -> Source:
    """The images of a folder or file, found by what lies there: images before tar files before parquet files.

    Args:
      image_column, caption_column: of parquet files; None: told by their names.
      prepared: whether a set made by `zoo prepare` is taken too.

    Raises:
      UserError: there is nothing to read, or not in a layout that is known.
    """
    made = format_of(origin)
    if made == Info.FORMAT and not prepared:
        raise UserError(f"{origin} is already a prepared set; train on it with data=Images({str(origin)!r}, size=...)")
    kind, files = ("prepared", []) if made else _kind(origin)
    if kind != "parquet" and (image_column is not None or caption_column is not None):
        flag = "--image-column" if image_column is not None else "--caption-column"
        raise UserError(f"{flag} names a column of parquet files, and {origin} is none; leave it out")
    if kind == "parquet":
        return _parquet(origin, files, test_fraction, image_column, caption_column)
    if kind == "tar":
        return _tar(origin, files, test_fraction)
    if kind == "captions":
        return _captions(origin, files, test_fraction)
    return {"prepared": _prepared, "npz": _npz, "folder": _folder}[kind](origin, test_fraction)


def _kind(origin: Path) -> tuple[str, list[str]]:
    """What lies in a place, and the paths below it of the files that matter; () where they are listed elsewhere."""
    if not origin.is_dir():
        suffix = origin.suffix.lower()
        if suffix in (".tar", ".parquet"):
            return suffix[1:], [""]
        if origin.name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
            raise UserError(
                f"{origin} is compressed and cannot be read at random; unpack it to a plain .tar file first"
            )
        return "npz", []
    names = _walk(origin)
    images = [name for name in names if name.lower().endswith(SUFFIXES)]
    if images:
        texts = {name[:-4] for name in names if name.endswith(".txt")}
        if texts and any(os.path.splitext(name)[0] in texts for name in images):
            return "captions", names
        return "folder", []
    for kind in ("tar", "parquet"):
        if found := [name for name in names if name.lower().endswith(f".{kind}")]:
            return kind, found
    return "folder", []


def _walk(root: Path) -> list[str]:
    """All files below a folder by path, sorted; hidden ones and what cannot be listed are passed over."""
    found, seen = [], set()
    for here, folders, files in os.walk(root, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:  # a link back to a folder above
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = os.path.relpath(here, root)
        found += [os.path.normpath(os.path.join(below, name)) for name in files if not name.startswith(".")]
    return sorted(found)


def _split(members: Sequence[Any], words: Sequence[str | None], test_fraction: float) -> dict[str, list[int]]:
    """Members of both splits, in ascending order, by a word for each of them; without both words a share is held out."""
    tests = [test for test in TESTS if test in words]
    if not tests or "train" not in words:
        return divide(len(members), test_fraction)
    return {
        "train": [i for i, word in enumerate(words) if word not in TESTS],
        "test": [i for i, word in enumerate(words) if word == tests[0]],
    }


def _word(name: str) -> str | None:
    """The split that the path of a tar or parquet file names: `test/0.tar`, `data/test-00000-of-00001.parquet`."""
    *folders, last = name.split(os.sep)
    words = [*folders, re.split(r"[-_.]", last, maxsplit=1)[0]]
    return next((word for word in words if word in ("train", *TESTS)), None)


def _hash(parts: Iterable[tuple[str, int]]) -> str:
    digest = hashlib.sha256()
    for name, size in parts:
        digest.update(os.fsencode(name) + f"\0{size}\0".encode())
    return digest.hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1  # a broken link


def _shown(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "replace")  # a name may be bytes that are no UTF-8


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadImage(f"cannot be read ({error.strerror})", "restore it, or remove it") from None


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise BadImage(f"has a caption that is no UTF-8 ({where})", "write it again as UTF-8") from None


# Folders


def _folder(root: Path, test_fraction: float) -> Source:
    splits, classes = list_folder(root, test_fraction)

    def items(split: str) -> Items:
        files = splits[split]
        label = (lambda i: -1) if files.labels is None else files.labels.__getitem__
        return Items(len(files.paths), lambda i: _bytes(root / files.paths[i]), label, lambda i: _shown(files.paths[i]))

    listed = [(path, _size(root / path)) for files in splits.values() for path in files.paths]
    return Source({split: items(split) for split in SPLITS}, classes, _hash(listed))


def _captions(root: Path, names: list[str], test_fraction: float) -> Source:
    texts = {name for name in names if name.endswith(".txt")}
    images = [name for name in names if name.lower().endswith(SUFFIXES)]
    parts = _split(images, [name.split(os.sep)[0] for name in images], test_fraction)
    beside = {name: os.path.splitext(name)[0] + ".txt" for name in images}

    def items(part: list[int]) -> Items:
        def caption(i: int) -> str:
            text = beside[images[part[i]]]
            if text not in texts:
                raise BadImage("has no caption", f"write it to {_shown(os.path.basename(text))} beside it")
            return _text(_bytes(root / text), _shown(text))

        return Items(
            len(part),
            lambda i: _bytes(root / images[part[i]]),
            lambda i: -1,
            lambda i: _shown(images[part[i]]),
            caption,
        )

    listed = [name for part in parts.values() for i in part for name in (images[i], beside[images[i]])]
    fingerprint = _hash((name, _size(root / name)) for name in listed)
    return Source({split: items(parts[split]) for split in SPLITS}, (), fingerprint, captioned=True)


def _prepared(root: Path, test_fraction: float) -> Source:
    info = read_info(root, Info)

    def items(split: str) -> Items:
        count, read = open_shards(root, info.splits[split], split, Record)
        return Items(
            count,
            lambda i: read(i).image,
            lambda i: read(i).label,
            lambda i: read(i).name,
            lambda i: read(i).caption,
        )

    digest = hashlib.sha256("".join(shard.sha256 for shard in info.shards()).encode()).hexdigest()
    return Source({split: items(split) for split in SPLITS}, tuple(info.labels), digest, info.captions)


# Tar files


@dataclass(frozen=True)
class _Member:
    """Where the bytes of a file in a tar file lie."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class _Pair:
    file: int
    image: _Member
    caption: _Member | None


def _index(path: Path, number: int) -> list[_Pair]:
    """The images of a tar file and the captions of the same key: the name up to the first dot of its last part."""
    members: dict[str, dict[str, _Member]] = {}
    try:
        with tarfile.open(path, "r:") as file:
            for member in file:
                folder, _, base = member.name.rpartition("/")
                if not member.isreg() or member.issparse() or base.startswith("."):
                    continue
                key, _, suffix = base.partition(".")
                inside = _Member(member.name, member.offset_data, member.size)
                members.setdefault(f"{folder}/{key}", {}).setdefault(f".{suffix.lower()}", inside)
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{path} is no tar file that can be read at random ({error}); give plain .tar files, uncompressed and whole"
        ) from None
    pairs = []
    for found in members.values():
        caption = found.get(".txt", found.get(".json"))
        pairs += [_Pair(number, member, caption) for suffix, member in found.items() if suffix.endswith(SUFFIXES)]
    return pairs


def _tar(root: Path, names: list[str], test_fraction: float) -> Source:
    files = [root / name if name else root for name in names]
    pairs = [pair for number, path in enumerate(files) for pair in _index(path, number)]
    captioned = any(pair.caption for pair in pairs)
    words = [_word(name) for name in names]
    parts = _split(pairs, [words[pair.file] for pair in pairs], test_fraction)

    def content(file: int, member: _Member) -> bytes:
        try:
            with open(files[file], "rb") as opened:
                opened.seek(member.offset)
                data = opened.read(member.size)
        except OSError as error:
            raise BadImage(f"cannot be read ({error.strerror})", "restore the tar file") from None
        if len(data) < member.size:
            raise BadImage("is cut off with its tar file", "restore the tar file")
        return data

    def items(part: list[int]) -> Items:
        def caption(i: int) -> str:
            pair = pairs[part[i]]
            if not captioned:
                return ""
            if pair.caption is None:
                raise BadImage("has no caption", "add a .txt file, or a .json file with one, of the same name")
            data = content(pair.file, pair.caption)
            if not pair.caption.name.lower().endswith(".json"):
                return _text(data, pair.caption.name)
            try:
                said = json.loads(data)["caption"]
            except (ValueError, KeyError, TypeError):
                said = None
            if not isinstance(said, str):
                raise BadImage('has no caption: its .json file has no "caption"', "add it, or a .txt file")
            return said.strip()

        def name(i: int) -> str:
            pair = pairs[part[i]]
            return _shown(f"{names[pair.file] or root.name}:{pair.image.name}")

        def read(i: int) -> bytes:
            return content(pairs[part[i]].file, pairs[part[i]].image)

        return Items(len(part), read, lambda i: -1, name, caption)

    listed = [(name or root.name, path.stat().st_size) for name, path in zip(names, files)]
    return Source({split: items(parts[split]) for split in SPLITS}, (), _hash(listed), captioned)


# Parquet files

_IMAGES = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "picture", "pixels", "bytes")
_CAPTIONS = ("caption", "text", "prompt", "txt", "captions", "description", "sentence", "alt_text")
_KEPT = 2**29  # bytes of row groups that stay in memory: examples are read in nearly ascending order


def _parquet(
    root: Path, names: list[str], test_fraction: float, image_column: str | None, caption_column: str | None
) -> Source:
    import pyarrow
    import pyarrow.parquet

    files = [root / name if name else root for name in names]
    groups: list[tuple[int, int, int]] = []  # file, row group in it, rows
    columns: tuple[str, str | None] = ("", None)
    for number, path in enumerate(files):
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                schema = file.schema_arrow
                groups += [
                    (number, g, file.metadata.row_group(g).num_rows) for g in range(file.metadata.num_row_groups)
                ]
        except (pyarrow.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path} is no parquet file that can be read ({reason}); restore or remove it") from None
        found = _columns(path, schema, image_column, caption_column)
        if number and found != columns:
            raise UserError(
                f"{path} has its images and captions in other columns {found} than {files[0]} {columns}; prepare them apart"
            )
        columns = found
    starts = np.cumsum([0, *(rows for _, _, rows in groups)])
    words = [_word(name) for name in names]
    parts = _split(range(starts[-1]), [words[file] for file, _, rows in groups for _ in range(rows)], test_fraction)
    begins = {file: int(start) for (file, _, _), start in reversed([*zip(groups, starts)])}  # first row of each file
    image, text = columns
    table = _Groups(files, [c for c in columns if c is not None])

    def cell(row: int, column: str) -> Any:
        group = int(np.searchsorted(starts, row, "right")) - 1
        file, inside, _ = groups[group]
        return table.rows(file, inside)[column][row - int(starts[group])].as_py()

    def items(part: list[int]) -> Items:
        def read(i: int) -> bytes:
            value = cell(part[i], image)
            value = value.get("bytes") if isinstance(value, dict) else value
            if value is None:
                raise BadImage(f"has no bytes in the column {image!r}", "store the image itself in it, not its path")
            return value

        def caption(i: int) -> str:
            said = cell(part[i], text) if text is not None else ""
            if said is None:
                raise BadImage(f"has no caption in the column {text!r}", "fill it in, or remove the row")
            return said.strip()

        def name(i: int) -> str:
            file = groups[int(np.searchsorted(starts, part[i], "right")) - 1][0]
            return f"{_shown(names[file] or root.name)} row {part[i] - begins[file]}"

        return Items(len(part), read, lambda i: -1, name, caption)

    listed = [(name or root.name, path.stat().st_size) for name, path in zip(names, files)]
    fingerprint = _hash([*listed, (image, 0), (text or "", 0)])
    return Source({split: items(parts[split]) for split in SPLITS}, (), fingerprint, text is not None)


class _Groups:
    """Row groups of parquet files, decoded once and kept while they are read."""

    def __init__(self, files: list[Path], columns: list[str]) -> None:
        self._files, self._columns = files, columns
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def rows(self, file: int, group: int) -> Any:
        import pyarrow.parquet

        with self._lock:
            if (file, group) in self._kept:
                self._kept.move_to_end((file, group))
                return self._kept[file, group]
            try:
                with pyarrow.parquet.ParquetFile(self._files[file]) as opened:
                    table = opened.read_row_group(group, columns=self._columns)
            except (pyarrow.ArrowException, OSError) as error:
                raise BadImage(
                    f"cannot be read ({' '.join(str(error).split())})", f"restore {self._files[file]}"
                ) from None
            self._kept[file, group] = table
            while len(self._kept) > 2 and sum(kept.nbytes for kept in self._kept.values()) > _KEPT:
                self._kept.popitem(last=False)
            return table


def _columns(path: Path, schema: Any, image: str | None, caption: str | None) -> tuple[str, str | None]:
    """The names of the columns of images and of captions (None: there is no text at all)."""
    import pyarrow

    def is_bytes(kind: Any) -> bool:
        return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))

    def is_image(kind: Any) -> bool:
        if pyarrow.types.is_struct(kind):
            return any(kind.field(i).name == "bytes" and is_bytes(kind.field(i).type) for i in range(kind.num_fields))
        return is_bytes(kind)

    def is_text(kind: Any) -> bool:
        return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))

    listed = ", ".join(f"{field.name} ({field.type})" for field in schema)

    def choose(
        fits: Callable[[Any], bool], named: str | None, usual: tuple[str, ...], what: str, flag: str
    ) -> str | None:
        fields = [field.name for field in schema if fits(field.type)]
        if named == "" and what == "captions":
            return None
        if named is not None:
            if named not in schema.names:
                raise UserError(f"{path} has no column {named!r} ({flag}); {suggest(named, schema.names)}")
            if named not in fields:
                raise UserError(f"{path}: the column {named!r} ({flag}) holds no {what}; its columns: {listed}")
            return named
        for word in usual:
            if close := [name for name in fields if name.lower() == word]:
                return close[0]
        if fields and (len(fields) > 1 or what == "captions"):  # a lone text may be a file's name or a key
            none = f', or {flag}="" where none does' if what == "captions" else ""
            raise UserError(f"{path} does not tell which column holds the {what}: {listed}; say {flag} NAME{none}")
        return fields[0] if fields else None

    found = choose(is_image, image, _IMAGES, "images", "--image-column")
    if found is None:
        raise UserError(
            f"{path} has no column of images (bytes, or a struct with bytes), it has {listed}; give other files"
        )
    return found, choose(is_text, caption, _CAPTIONS, "captions", "--caption-column")


# Arrays


def _npz(path: Path, test_fraction: float) -> Source:
    with open(path, "rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
    with open_npz(path) as file:
        keys = file.files
        if "train_images" in keys:
            wanted = {split: (f"{split}_images", f"{split}_labels") for split in SPLITS if f"{split}_images" in keys}
        elif "images" in keys:
            wanted = {"train": ("images", "labels")}
        else:
            raise UserError(
                f"{path} has the arrays {', '.join(keys) or 'none'}; "
                "expected train_images (and train_labels, test_images, test_labels), or images (and labels)"
            )
        arrays = {}
        try:
            for split, (images, labels) in wanted.items():
                pixels = file[images]
                if pixels.dtype != np.uint8:
                    raise UserError(
                        f"{path}: {images} is {pixels.dtype}, prepared sets hold 8-bit images; "
                        "store uint8, or train on the file itself with data=Arrays(...)"
                    )
                arrays[split] = checked_arrays(path, pixels, file[labels] if labels in keys else None)
        except (ValueError, OSError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} cannot be read ({error}); save plain arrays with numpy.savez") from None
    if len({labels is None for _, labels in arrays.values()}) > 1:
        raise UserError(f"{path} has labels for one split only; add the other's, or remove them")
    parts = {split: list(range(len(images))) for split, (images, _) in arrays.items()}
    if "test" not in arrays:
        parts = divide(len(arrays["train"][0]), test_fraction)

    def items(split: str) -> Items:
        (images, labels), part = arrays.get(split, arrays["train"]), parts[split]
        label = (lambda i: -1) if labels is None else (lambda i: int(labels[part[i]]))
        return Items(len(part), lambda i: images[part[i]], label, lambda i: f"{split} row {part[i]}")

    classes = max(
        (1 + int(labels.max()) for _, labels in arrays.values() if labels is not None and labels.size), default=0
    )
    return Source({split: items(split) for split in SPLITS}, tuple(map(str, range(classes))), fingerprint)
