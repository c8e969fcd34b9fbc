"""What `zoo prepare` reads: folders of images by class, images with captions, .npz, tar and parquet files, prepared sets.

A caption lies beside its image: `a/7.txt` beside `a/7.jpg`, in a folder or in a tar file (there also `a/7.json` with
"caption"); or in another column of the same row of a parquet file. A label is the class folder of an image without a
caption, `a/7.cls` in a tar file, or an integer column `label` of a parquet file.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.arrays import checked_arrays, class_names, open_npz, tell_classes
from zoo.data.folders import SPLITS, TESTS, divide, hashed, list_folder, shown, some, tell, walk, word_in, word_of
from zoo.data.images import SUFFIXES, BadImage
from zoo.data.images.tables import class_names_of, columns_of, groups, numbers
from zoo.data.records import Info, Record, format_of, open_shards, read_info
from zoo.errors import UserError
from zoo.files import UTF16, sha256, text_of, tidied


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
    """The images of a folder or file, found by what lies there: images, tar files or parquet files, of one kind only.

    A folder is captioned where a text lies beside any image, and then folders are no classes. Where they look like
    classes and fewer than half of the images have a text, it is refused.

    Args:
      image_column, caption_column: of parquet files; None: told by their names.
      prepared: whether a set made by `zoo prepare` is taken too.

    Raises:
      UserError: there is nothing to read, or not in a layout that is known.
    """
    made = format_of(origin)
    if made == Info.FORMAT and not prepared:
        raise UserError(f"{origin} is already a prepared set; train on it with data=Images({str(origin)!r}, size=...)")
    kind, files = ("prepared", []) if made else kind_of(origin)
    if kind != "parquet" and (image_column is not None or caption_column is not None):
        flag = "image_column" if image_column is not None else "caption_column"
        raise UserError(f"{flag} names a column of parquet files, and {origin} is none; leave it out")
    if kind == "parquet":
        return _parquet(origin, files, test_fraction, image_column, caption_column)
    if kind == "tar":
        return _tar(origin, files, test_fraction)
    if kind == "captions":
        return _captions(origin, files, test_fraction)
    return {"prepared": _prepared, "npz": _npz, "folder": _folder}[kind](origin, test_fraction)


def kind_of(origin: Path) -> tuple[str, list[str]]:
    """What lies in a place ("captions", "folder", "tar", "parquet" or "npz"), and the paths below it of the files that matter;
    [] where they are listed elsewhere.

    Raises:
      UserError: a folder with files of several kinds, or one of classes with a few captions.
    """
    if not origin.is_dir():
        suffix = origin.suffix.lower()
        if suffix in (".tar", ".parquet"):
            return suffix[1:], [""]
        if origin.name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
            raise UserError(
                f"{origin} is compressed and cannot be read at random; unpack it to a plain .tar file first"
            )
        return "npz", []
    names = walk(origin)
    found = {kind: [name for name in names if name.lower().endswith(f".{kind}")] for kind in ("tar", "parquet")}
    found["images"] = images = [name for name in names if name.lower().endswith(SUFFIXES)]
    there = [shown(some[0]) for some in found.values() if some]
    if len(there) > 1:
        raise UserError(
            f"{origin} holds files of several kinds ({' beside '.join(there)}), and one kind would hide the other; "
            "give the folder of one kind, or move the others out"
        )
    if images:
        texts = _texts(names)
        told = [name for name in images if os.path.splitext(name)[0] in texts]
        if told and 2 * len(told) < len(images) and _in_classes(images):
            text = texts[os.path.splitext(told[0])[0]]
            raise UserError(
                f"{origin} holds class folders, and {len(told)} of {len(images)} images have a caption ({shown(text)}, "
                "...): remove the texts to take the folders as labels, or write one beside every image to take captions"
            )
        return ("captions", names) if told else ("folder", [])
    return next(((kind, some) for kind, some in found.items() if some), ("folder", []))


def _texts(names: Iterable[str]) -> dict[str, str]:
    """Texts by their path without the suffix, `.txt` or `.TXT`; of both the first is meant."""
    return {name[:-4]: name for name in sorted(names) if name.lower().endswith(".txt")}


def _in_classes(images: Sequence[str]) -> bool:
    """Whether all images lie in two or more folders, themselves perhaps in `train`, `test`, ..."""
    paths = [name.split(os.sep) for name in images]
    inside = [path[1:] if word_of(path[0]) else path for path in paths]
    return all(len(path) == 2 for path in inside) and len({path[0] for path in inside}) > 1


def _split(
    root: Path,
    words: Sequence[str | None],
    test_fraction: float,
    blind: Sequence[str] = (),
    labels: Sequence[int] | np.ndarray | None = None,
    names: Sequence[str] = (),
) -> dict[str, list[int]]:
    """Members of both splits, in ascending order, by a word for each of them; without both parts a share is held out.

    Of several words for the held-out part the first of `TESTS` that is not `blind` (published without its labels) is meant,
    and a warning tells of the others.
    """
    tests = [test for test in TESTS if test in words]
    if not tests or {*words} <= {*TESTS}:
        return divide(len(words), test_fraction, labels, names)
    test = next((test for test in tests if test not in blind), None)
    for other in tests:
        if other != test:
            what = f"{other} has no labels" if other in blind else f"{test} is the test split"
            tell(f"{root}: {what}, and the {words.count(other):,} images of {other} are left out")
    train = [i for i, word in enumerate(words) if word not in TESTS]
    if test is None:
        parts = divide(len(train), test_fraction, None if labels is None else np.asarray(labels)[train], names)
        return {split: [train[i] for i in part] for split, part in parts.items()}
    return {"train": train, "test": [i for i, word in enumerate(words) if word == test]}


def _digest(root: Path, names: Sequence[str], *about: str) -> str:
    """Of a file, or of those of these names in a folder."""
    return hashed(root, names, *about) if root.is_dir() else hashed(root.parent, [root.name], *about)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadImage(f"cannot be read ({error.strerror})", "restore it, or remove it") from None


def _text(data: bytes, where: str) -> str:
    try:
        return text_of(data).strip()
    except UnicodeDecodeError:
        what = "UTF-16 and no UTF-8" if data.startswith(UTF16) else "no UTF-8"
        raise BadImage(f"has a caption that is {what} ({shown(where)})", "write it again as UTF-8") from None


# Folders


def _folder(root: Path, test_fraction: float) -> Source:
    splits, classes = list_folder(root, test_fraction, SUFFIXES)

    def items(split: str) -> Items:
        files = splits[split]
        label = (lambda i: -1) if files.labels is None else files.labels.__getitem__
        return Items(len(files.paths), lambda i: _bytes(root / files.paths[i]), label, lambda i: shown(files.paths[i]))

    listed = [path for split in SPLITS for path in splits[split].paths]
    return Source({split: items(split) for split in SPLITS}, classes, hashed(root, listed, repr(classes)))


def _captions(root: Path, names: list[str], test_fraction: float) -> Source:
    texts = _texts(names)
    images = [name for name in names if name.lower().endswith(SUFFIXES)]
    words = [word_of(name.partition(os.sep)[0]) if os.sep in name else None for name in images]
    parts = _split(root, words, test_fraction)
    stems = [os.path.splitext(name)[0] for name in images]

    def items(part: list[int]) -> Items:
        def caption(i: int) -> str:
            stem = stems[part[i]]
            if stem not in texts:
                raise BadImage("has no caption", f"write it to {shown(os.path.basename(stem))}.txt beside it")
            return _text(_bytes(root / texts[stem]), texts[stem])

        names = [images[i] for i in part]
        return Items(len(part), lambda i: _bytes(root / names[i]), lambda i: -1, lambda i: shown(names[i]), caption)

    listed = [images[i] for part in parts.values() for i in part]
    told = sorted({texts[stem] for stem in stems if stem in texts})
    others = len(names) - len(images) - len(told)
    if others:
        tell(f"{root}: passed over: {others} files that are neither images nor captions of any")
    digest = hashed(root, listed + told)
    return Source({split: items(parts[split]) for split in SPLITS}, (), digest, captioned=True)


def _prepared(root: Path, test_fraction: float) -> Source:
    info = read_info(root, Info)

    def items(split: str) -> Items:
        count, read = open_shards(root, info.splits[split], split, Record)

        def of(field: str) -> Callable[[int], Any]:
            return lambda i: getattr(read(i), field)

        return Items(count, of("image"), of("label"), of("name"), of("caption"))

    digest = sha256(*(shard.sha256 for shard in info.shards()))
    return Source({split: items(split) for split in SPLITS}, tuple(info.labels), digest, info.captions)


# Tar files


_NONE, _LINK = -1, -2  # offsets of what is not there, and of what holds no bytes of its own
_UNLABELLED, _NO_LABEL = -1, -2  # labels: none there, or one that is no number
_MOST_CLASSES = 100_000
_READ = {*SUFFIXES, ".txt", ".json", ".cls"}


# an image in a tar file and its caption: where they lie (offset and size) and its label; there may be millions
_PAIR = np.dtype([("image", np.int64, 2), ("caption", np.int64, 2), ("label", np.int64)])


def _index(path: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """The images of a tar file, each with the caption and the label that share the most of its name.

    Beside `7.left.png` lies `7.left.txt` or, for all images of the key `7`, `7.txt`. Of members of one name the last is
    meant, as where they are unpacked.

    Returns:
      `_PAIR` [N], the names of images and captions as bytes [N, 2], and how many files are none of these.
    """
    members: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    others = 0
    try:
        with tarfile.open(path, "r:") as file:
            while (member := file.next()) is not None:
                file.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all that it has seen
                base = member.name.rpartition("/")[2]
                suffix = os.path.splitext(base)[1].lower()
                if base.startswith(".") or suffix not in _READ:
                    others += member.isreg() and not base.startswith(".")
                    continue
                whole = member.isreg() and not member.issparse()
                if not whole and not (member.islnk() or member.issym() or member.isreg()):
                    continue  # a folder, a device
                key = member.name if suffix in SUFFIXES else member.name[: -len(suffix)] + suffix
                members.pop(key, None)
                members[key] = (member.name, member.offset_data if whole else _LINK, member.size)
                if suffix == ".cls":
                    opened = file.extractfile(member) if whole else None
                    text = opened.read(64).removeprefix(b"\xef\xbb\xbf").strip() if opened is not None else b""
                    labels[key] = int(text) if text.isdigit() and len(text) < 10 else _NO_LABEL
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{path} is no tar file that can be read at random ({error}); give plain .tar files, uncompressed and whole"
        ) from None
    pairs, names = [], []
    for key, (name, *image) in members.items():
        if key.lower().endswith(SUFFIXES):
            stems = list(_stems(key))
            told = (members.get(stem + suffix) for stem in stems for suffix in (".txt", ".json"))
            called, *caption = next(filter(None, told), ("", _NONE, 0))
            label = next((labels[f"{stem}.cls"] for stem in stems if f"{stem}.cls" in labels), _UNLABELLED)
            pairs.append((image, caption, label))
            names.append((os.fsencode(name), os.fsencode(called)))
    return np.array(pairs, _PAIR), np.array(names, np.bytes_).reshape(-1, 2), others


def _stems(name: str) -> Iterator[str]:
    """A name without its suffix, then without more of them, up to the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    while (base := base.rpartition(".")[0]) != "":
        yield folder + slash + base


def _tar(root: Path, names: list[str], test_fraction: float) -> Source:
    files = [root / name if name else root for name in names]
    tables, called, others = zip(*map(_index, files))
    sizes = [len(table) for table in tables]
    pairs, owner, starts = np.concatenate(tables), np.repeat(np.arange(len(files)), sizes), np.cumsum([0, *sizes])
    if any(others):
        tell(f"{root}: passed over: {sum(others):,} files that are no images, captions or labels")
    captioned, labelled = bool((pairs["caption"][:, 0] != _NONE).any()), bool((pairs["label"] != _UNLABELLED).any())
    highest = int(pairs["label"].max(initial=-1))
    if highest >= _MOST_CLASSES:
        tell(f"{root}: labels go up to {highest}, which are no classes; they are left out")
        labelled = False
    words = [word_in(name) for name in names]
    classes = tuple(map(str, range(highest + 1))) if labelled else ()
    labels = pairs["label"] if labelled else None
    if labels is not None:
        tell_classes(root, labels, classes)
    parts = _split(root, [words[file] for file in owner.tolist()], test_fraction, (), labels)

    def inside(i: int, caption: bool = False) -> str:
        """The name in its tar file, of an image or of its caption."""
        return os.fsdecode(called[owner[i]][i - starts[owner[i]], int(caption)])

    def content(i: int, kind: str, what: str) -> bytes:
        offset, size = pairs[kind][i].tolist()
        if offset == _LINK:
            raise BadImage(f"{what} a link or sparse in its tar file", "store the file itself in it")
        try:
            with open(files[owner[i]], "rb") as opened:
                opened.seek(offset)
                data = opened.read(size)
        except OSError as error:
            raise BadImage(f"cannot be read ({error.strerror})", "restore the tar file") from None
        if len(data) < size:
            raise BadImage("is cut off with its tar file", "restore the tar file")
        return data

    def items(part: list[int]) -> Items:
        def caption(n: int) -> str:
            i = part[n]
            if not captioned:
                return ""
            if pairs["caption"][i, 0] == _NONE:
                raise BadImage("has no caption", "add a .txt file, or a .json file with one, of the same name")
            data = content(i, "caption", "has a caption that is")
            where = inside(i, caption=True)
            if not where.lower().endswith(".json"):
                return _text(data, where)
            try:
                said = json.loads(data)["caption"]
                said.encode()
            except UnicodeEncodeError:  # JSON may hold half of a character
                raise BadImage(f"has a caption that is no text ({shown(where)})", "write it again as UTF-8") from None
            except (ValueError, KeyError, TypeError, AttributeError):
                raise BadImage('has no caption: its .json file has no "caption"', "add it, or a .txt file") from None
            return tidied(said).strip()

        def label(n: int) -> int:
            found = int(pairs["label"][part[n]]) if labelled else _UNLABELLED
            if labelled and found < 0:
                no = "has no label" if found == _UNLABELLED else "has a label that is no class number"
                raise BadImage(no, "add a .cls file with a number from 0 on, of the same name")
            return found

        def name(n: int) -> str:
            return shown(f"{names[owner[part[n]]] or root.name}:{inside(part[n])}")

        return Items(len(part), lambda n: content(part[n], "image", "is"), label, name, caption)

    return Source({split: items(parts[split]) for split in SPLITS}, classes, _digest(root, names), captioned)


# Parquet files


def _parquet(
    root: Path, names: list[str], test_fraction: float, image_column: str | None, caption_column: str | None
) -> Source:
    import pyarrow
    import pyarrow.parquet

    files = [root / name if name else root for name in names]
    spans: list[tuple[int, int, int]] = []  # file, row group in it, rows
    columns: tuple[str, str | None, str | None] = ("", None, None)
    classes: tuple[str, ...] = ()
    numbered = [np.zeros(0, np.int64)]  # the labels of each file
    for number, path in enumerate(files):
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                schema = file.schema_arrow
                spans += [(number, g, file.metadata.row_group(g).num_rows) for g in range(file.metadata.num_row_groups)]
        except (pyarrow.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path} is no parquet file that can be read ({reason}); restore or remove it") from None
        found = columns_of(path, schema, image_column, caption_column)
        named = () if found[2] is None else class_names_of(schema, found[2])
        if found[2] is not None:
            numbered.append(numbers(path, found[2]))
        if number and (found, named) != (columns, classes):
            what = f"other columns {found} than {files[0]} {columns}" if found != columns else "other class names"
            raise UserError(f"{path} has its images, captions and labels in {what}; prepare them apart")
        columns, classes = found, named
    starts = np.cumsum([0, *(rows for _, _, rows in spans)])
    words = [word_in(name) for name in names]
    begins = {file: int(start) for (file, _, _), start in reversed([*zip(spans, starts)])}  # first row of each file
    image, text, column = columns
    table = groups(files, [c for c in (image, text) if c is not None])
    labels = np.concatenate(numbered)
    highest = int(labels.max(initial=-1))
    if highest >= _MOST_CLASSES:
        tell(f"{root}: the column {column!r} goes up to {highest}, which are no classes; labels are left out")
    blind = []  # test splits that were published without their labels
    if not 0 <= highest < _MOST_CLASSES:
        column, classes = None, ()
    else:
        classes = tuple(map(str, range(highest + 1))) if len(classes) <= highest else classes
        none = [word for word, found in zip(words, numbered[1:]) if (found < 0).all()]
        blind = [test for test in TESTS if test in words and none.count(test) == words.count(test)]
        tell_classes(root, labels, classes)
    members = [words[file] for file, _, rows in spans for _ in range(rows)]
    parts = _split(root, members, test_fraction, blind, labels if column is not None else None, classes)

    def cell(row: int, column: str) -> Any:
        group = int(np.searchsorted(starts, row, "right")) - 1
        file, inside, _ = spans[group]
        try:
            return table(file, inside)[column][row - int(starts[group])].as_py()
        except UnicodeDecodeError:
            raise BadImage(f"has text that is no UTF-8 in the column {column!r}", "write it again as UTF-8") from None

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
            return tidied(said).strip()

        def label(i: int) -> int:
            if column is None:
                return -1
            if labels[part[i]] < 0:
                raise BadImage(
                    f"has no label in the column {column!r}", "fill it in (classes count from 0), or remove the row"
                )
            return int(labels[part[i]])

        def name(i: int) -> str:
            file = spans[int(np.searchsorted(starts, part[i], "right")) - 1][0]
            return f"{shown(names[file] or root.name)} row {part[i] - begins[file]}"

        return Items(len(part), read, label, name, caption)

    digest = _digest(root, names, repr([image, text, column]))
    return Source({split: items(parts[split]) for split in SPLITS}, classes, digest, text is not None)


# Arrays


def _npz(path: Path, test_fraction: float) -> Source:
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
        if others := [key for key in keys if key not in {name for names in wanted.values() for name in names}]:
            tell(f"{path}: passed over: the arrays {some(others)}")
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
        parts = divide(len(arrays["train"][0]), test_fraction, arrays["train"][1])

    def items(split: str) -> Items:
        (images, labels), part = arrays.get(split, arrays["train"]), parts[split]
        label = (lambda i: -1) if labels is None else (lambda i: int(labels[part[i]]))
        return Items(len(part), lambda i: images[part[i]], label, lambda i: f"{split} row {part[i]}")

    every = [labels for _, labels in arrays.values() if labels is not None]
    classes = class_names((), np.concatenate(every)) if every else ()
    if classes:
        tell_classes(path, np.concatenate(every), classes)
    return Source({split: items(split) for split in SPLITS}, classes, hashed(path.parent, [path.name]))
