"""`zoo prepare`: a folder or an .npz file of images becomes ArrayRecord shards and an `info.json`.

Every image is decoded once, so training never meets a broken one. A shard is written under a temporary name and
renamed when it is on disk; then a line about it goes into `progress.jsonl`. A killed run started again keeps the
shards that have their line and ends with the same bytes as an undisturbed one.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tqdm import tqdm

from zoo.data.images import (
    INFO,
    PROGRESS,
    SPLITS,
    BadImage,
    Info,
    Record,
    Settings,
    Shard,
    check_channels,
    check_kind,
    checked_arrays,
    divide,
    existing,
    from_array,
    list_folder,
    open_image,
    open_npz,
    read_info,
    square,
)
from zoo.errors import UserError

UNREADABLE = "unreadable.txt"


@dataclass(frozen=True)
class Report:
    """What `prepare` made: images per split, class names, and (name, reason) of every image it had to skip."""

    dest: Path
    counts: dict[str, int]
    labels: tuple[str, ...]
    unreadable: tuple[tuple[str, str], ...] = ()
    allowed: bool = False

    @property
    def ok(self) -> bool:
        """Whether the command succeeded: nothing was skipped, or skipping was allowed."""
        return self.allowed or not self.unreadable

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} {split}" for split, count in self.counts.items())
        lines = [f"{self.dest}: {counts}, {len(self.labels) or 'no'} classes"]
        if self.unreadable:
            lines.append(f"skipped {len(self.unreadable):,} (all in {self.dest / UNREADABLE}):")
            lines += [f"  {name} {reason}" for name, reason in self.unreadable[:20]]
            lines += ["  ..."] if len(self.unreadable) > 20 else []
        return "\n".join(lines)


@dataclass(frozen=True)
class _Items:
    """One split of the source."""

    count: int
    read: Callable[[int], bytes | np.ndarray]  # an encoded image, or uint8 [H, W, C]
    label: Callable[[int], int]  # -1: unlabelled
    name: Callable[[int], str]


def prepare(
    source: str,
    dest: str,
    *,
    size: int | None = None,
    channels: int = 3,
    allow_unreadable: bool = False,
    shard_examples: int = 8192,
    convert: bool = False,
    test_fraction: float = 0.1,
    progress: bool = True,
) -> Report:
    """Writes the images of `source` to `dest`, resumably; what cannot be used is skipped and reported.

    Args:
      source: a folder of images (as `Images` reads it), or an .npz file with `{train,test}_images` and `_labels`, or
        with `images` and `labels` alone.
      dest: a new folder, or one that the same call has begun or finished; damaged shards of it are made again.
      size: shorter side after resizing, then centre crop; None keeps every image as it is.
      channels: 1 or 3. An image of the other kind is skipped unless `convert` is set.
      allow_unreadable: whether the report counts as success although images were skipped.
      shard_examples: images per shard, the unit that a killed run keeps.
      test_fraction: the share held out for testing where the source has no test part of its own.

    Raises:
      UserError: the source is missing or has no usable image, or `dest` holds something else.
    """
    check_channels(channels)
    for name, value in (("size", size), ("shard_examples", shard_examples)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value} is too small; choose 1 or more")
    origin, target = existing(source), Path(dest).expanduser().absolute()
    if origin.is_dir() and (origin.resolve() in (target.resolve(), *target.resolve().parents)):
        raise UserError(f"DEST {target} lies inside SOURCE {origin}; choose a folder outside of it")
    items, labels, fingerprint = (_folder_items if origin.is_dir() else _npz_items)(origin, test_fraction)
    settings = Settings(origin.name, fingerprint, size, channels, convert, test_fraction, shard_examples)
    encode = _encoder(size, channels, convert)
    _probe(origin, list(items.values()), encode)
    try:
        done = _open_dest(target, settings)
        with (
            open(target / PROGRESS, "ab") as log,
            ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool,
            tqdm(total=sum(s.count for s in items.values()), unit=" images", disable=not progress) as bar,
        ):
            splits: dict[str, list[Shard]] = {}
            for split in SPLITS:
                splits[split] = []
                for number, first in enumerate(range(0, items[split].count, shard_examples)):
                    part = range(first, min(first + shard_examples, items[split].count))
                    file = f"{split}-{number:05d}.array_record"
                    if file not in done:
                        done[file] = _write_shard(target / file, items[split], part, encode, pool, bar)
                        log.write(msgspec.json.encode(done[file]) + b"\n")
                        log.flush()
                        os.fsync(log.fileno())
                    else:
                        bar.update(len(part))
                    splits[split].append(done[file])
        info = Info(settings, list(labels), splits)
        unreadable = tuple((name, reason) for s in splits.values() for shard in s for name, reason in shard.unreadable)
        (target / UNREADABLE).unlink(missing_ok=True)
        if unreadable:
            _replace(target / UNREADABLE, "".join(f"{name}\t{reason}\n" for name, reason in unreadable).encode())
        _replace(target / INFO, msgspec.json.format(msgspec.json.encode(info), indent=1) + b"\n")
        (target / PROGRESS).unlink()
    except (OSError, RuntimeError) as error:  # RuntimeError: the shard writer's
        reason = (isinstance(error, OSError) and error.strerror) or str(error).splitlines()[0]
        raise UserError(
            f"cannot write {target} ({reason}); mend that and run the same command again, finished shards are kept"
        ) from None
    counts = {split: sum(shard.count for shard in shards) for split, shards in splits.items()}
    return Report(target, counts, tuple(labels), unreadable, allow_unreadable)


def _probe(origin: Path, splits: list[_Items], encode: Callable[[bytes | np.ndarray], bytes]) -> None:
    """Refuses a source of which no image can be used (say, all grey for colour) before anything is written."""
    reasons = []
    for items in splits:
        for i in range(0, items.count, max(1, items.count // 64)):
            try:
                encode(items.read(i))
                return
            except BadImage as error:
                reasons.append(f"{items.name(i)} {error}; {error.advice}")
    if not reasons:
        raise UserError(f"{origin} holds no image; give a folder or an .npz file with images")
    raise UserError(f"not one of {len(reasons)} images tried in {origin} can be used; the first: {reasons[0]}")


# Sources


def _folder_items(root: Path, test_fraction: float) -> tuple[dict[str, _Items], tuple[str, ...], str]:
    if (root / INFO).is_file() and b'"zoo-images"' in (root / INFO).read_bytes():
        raise UserError(f"{root} is already a prepared set; train on it with data=Images({str(root)!r}, size=...)")
    splits, classes = list_folder(root, test_fraction)
    digest = hashlib.sha256()
    for files in splits.values():
        for path in files.paths:
            size = (root / path).stat().st_size if (root / path).is_file() else -1  # a broken link
            digest.update(os.fsencode(path) + f"\0{size}\0".encode())

    def items(split: str) -> _Items:
        files = splits[split]

        def read(i: int) -> bytes:
            try:
                return (root / files.paths[i]).read_bytes()
            except OSError as error:
                raise BadImage(f"cannot be read ({error.strerror})", "restore it, or remove it") from None

        label = (lambda i: -1) if files.labels is None else files.labels.__getitem__
        # a name may be bytes that are no UTF-8
        return _Items(len(files.paths), read, label, lambda i: os.fsencode(files.paths[i]).decode("utf-8", "replace"))

    return {split: items(split) for split in SPLITS}, classes, digest.hexdigest()


def _npz_items(path: Path, test_fraction: float) -> tuple[dict[str, _Items], tuple[str, ...], str]:
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

    def items(split: str) -> _Items:
        (images, labels), part = arrays.get(split, arrays["train"]), parts[split]
        label = (lambda i: -1) if labels is None else (lambda i: int(labels[part[i]]))
        return _Items(len(part), lambda i: images[part[i]], label, lambda i: f"{split} row {part[i]}")

    classes = max(
        (1 + int(labels.max()) for _, labels in arrays.values() if labels is not None and labels.size), default=0
    )
    return {split: items(split) for split in SPLITS}, tuple(map(str, range(classes))), fingerprint


def _encoder(size: int | None, channels: int, convert: bool) -> Callable[[bytes | np.ndarray], bytes]:
    """What goes into a record: the file's own bytes where nothing has to change, else a PNG."""

    def encode(data: bytes | np.ndarray) -> bytes:
        if isinstance(data, bytes):
            image, as_stored = open_image(data, channels, convert)
            if as_stored and size in (None, image.width) and size in (None, image.height):
                return data
        else:
            check_kind(data.shape[-1] == 1, channels, convert)
            image = from_array(data).convert("L" if channels == 1 else "RGB")
        buffer = io.BytesIO()
        (image if size is None else square(image, size)).save(buffer, "PNG")
        return buffer.getvalue()

    return encode


# Destination


def _open_dest(target: Path, settings: Settings) -> dict[str, Shard]:
    """Makes or checks the folder and its log; the shards in it that are whole, by file name."""
    done: list[Shard] = []
    if (target / INFO).is_file():
        info = read_info(target)
        _same(target, info.settings, settings)
        done = [shard for shards in info.splits.values() for shard in shards]
    elif (target / PROGRESS).is_file():
        lines = (target / PROGRESS).read_bytes().split(b"\n")[:-1]  # what follows the last line end was torn off
        if lines:
            _same(target, msgspec.json.decode(lines[0], type=Settings), settings)
            done = [msgspec.json.decode(line, type=Shard) for line in lines[1:]]
    elif target.is_dir() and any(target.iterdir()):
        raise UserError(f"DEST {target} is not empty and no prepared set; choose a new folder")
    elif target.exists() and not target.is_dir():
        raise UserError(f"DEST {target} is a file; choose a new folder")
    target.mkdir(parents=True, exist_ok=True)
    whole = {shard.file: shard for shard in done if _whole(target / shard.file, shard)}
    # started anew: without the torn line, and with the shards of a finished set whose damaged ones are made again
    _replace(target / PROGRESS, b"".join(msgspec.json.encode(x) + b"\n" for x in (settings, *whole.values())))
    return whole


def _same(target: Path, there: Settings, here: Settings) -> None:
    old, new = msgspec.structs.asdict(there), msgspec.structs.asdict(here)
    if old["fingerprint"] == new["fingerprint"]:
        old["source"] = new["source"]  # a folder that was renamed is the same folder
    wrong = [f"{k}={old[k]!r} there, {new[k]!r} now" for k in old if old[k] != new[k] and k != "fingerprint"]
    if old["fingerprint"] != new["fingerprint"]:
        wrong.append("the source has other files")
    if wrong:
        raise UserError(f"DEST {target} was prepared differently: {', '.join(wrong)}; choose a new folder or remove it")


def _whole(path: Path, shard: Shard) -> bool:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
    except OSError:
        return False


def _replace(path: Path, data: bytes) -> None:
    """Puts a whole file in place at once, on disk before it has its name."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _write_shard(
    path: Path,
    items: _Items,
    part: range,
    encode: Callable[[Any], bytes],
    pool: ThreadPoolExecutor,
    bar: Any,
) -> Shard:
    """One shard of the images `part`, in their order; the bytes depend on nothing else."""
    from array_record.python.array_record_module import ArrayRecordWriter

    def record(i: int) -> bytes | tuple[str, str]:
        try:
            return msgspec.msgpack.encode(Record(encode(items.read(i)), items.label(i), items.name(i)))
        except BadImage as error:
            return items.name(i), f"{error}; {error.advice}"

    unreadable: list[tuple[str, str]] = []
    temporary = path.with_name(path.name + ".tmp")
    # group_size:1 is what random access needs; the images are compressed already
    writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
    try:
        for first in range(0, len(part), 256):  # no more than this many encoded images wait in memory
            window = part[first : first + 256]
            for result in pool.map(record, window):
                if isinstance(result, bytes):
                    writer.write(result)
                else:
                    unreadable.append(result)
            bar.update(len(window))
    finally:
        writer.close()
    count = len(part) - len(unreadable)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
        shard = Shard(path.name, count, os.fstat(file.fileno()).st_size, "", unreadable)
        shard.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    temporary.replace(path)
    return shard
