"""`zoo prepare`: images of any source of `sources.py` become ArrayRecord shards and an `info.json`.

Every image is decoded once, so training never meets a broken one. What a killed run leaves is kept (`records.py`).
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image
from tqdm import tqdm

from zoo.data.folders import SPLITS, existing
from zoo.data.images import BadImage, check_kind, from_array, open_image, square
from zoo.data.images.sources import Items, open_source
from zoo.data.records import UNREADABLE, Info, Lost, Record, Settings, Shard, entering, writing
from zoo.errors import UserError


@dataclass(frozen=True)
class Report:
    """What `prepare` made: images per split, class names, and (name, reason) of every image it had to skip."""

    dest: Path
    counts: dict[str, int]
    labels: tuple[str, ...]
    unreadable: tuple[Lost, ...] = ()
    allowed: bool = False
    buckets: dict[str, int] = field(default_factory=dict)  # images by aspect ratio, where these are told apart
    captioned: bool = False

    @property
    def ok(self) -> bool:
        """Whether the command succeeded: nothing was skipped, or skipping was allowed."""
        return self.allowed or not self.unreadable

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} {split}" for split, count in self.counts.items())
        captions = "with captions" if self.captioned else "no captions"
        lines = [f"{self.dest}: {counts}, {len(self.labels) or 'no'} classes, {captions}"]
        if self.buckets:
            lines.append("aspect ratios: " + ", ".join(f"{name} {count:,}" for name, count in self.buckets.items()))
        if self.unreadable:
            lines.append(f"skipped {len(self.unreadable):,} (all in {self.dest / UNREADABLE}):")
            lines += [f"  {name} {reason}" for name, reason in self.unreadable[:20]]
            lines += ["  ..."] if len(self.unreadable) > 20 else []
        return "\n".join(lines)


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
    image_column: str | None = None,
    caption_column: str | None = None,
    progress: bool = True,
) -> Report:
    """Writes the images of `source` to `dest`, resumably; what cannot be used is skipped and reported.

    Args:
      source: a folder of images (as `Images` reads it), or an .npz file with `{train,test}_images` and `_labels`, or
        with `images` and `labels` alone; or images with captions: a folder with a .txt file beside each image, tar files
        of such pairs, parquet files.
      dest: a new folder, or one that the same call has begun or finished; damaged shards of it are made again.
      size: shorter side after resizing, then centre crop; None keeps every image as it is.
      channels: 1 or 3. An image of the other kind is skipped unless `convert` is set.
      allow_unreadable: whether the report counts as success although images were skipped.
      shard_examples: images per shard, the unit that a killed run keeps.
      test_fraction: the share held out for testing where the source has no test part of its own.
      image_column, caption_column: of parquet files, where their names do not tell.

    Raises:
      UserError: the source is missing or has no usable image, or `dest` holds something else.
    """
    check_ranges(channels, test_fraction, size=size, shard_examples=shard_examples)
    origin, target = places(source, dest)
    with entering(target, Info):
        found = open_source(origin, test_fraction, image_column=image_column, caption_column=caption_column)
        settings = Settings(origin.name, found.fingerprint, size, channels, convert, test_fraction, shard_examples)
        encode = _encoder(size, channels, convert)
        probe(origin, list(found.splits.values()), encode)
        with (
            writing(target, settings, Info) as out,
            ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool,
            tqdm(total=sum(s.count for s in found.splits.values()), unit=" images", disable=not progress) as bar,
        ):
            splits: dict[str, list[Shard]] = {}
            for split in SPLITS:
                items = found.splits[split]
                records = partial(_records, items, encode=encode, pool=pool, bar=bar)
                splits[split] = out.shards(split, items.count, shard_examples, records, bar)
            lost = out.finish(Info(settings, list(found.labels), splits, found.captioned))
    counts = {split: sum(shard.count for shard in shards) for split, shards in splits.items()}
    return Report(target, counts, found.labels, lost, allow_unreadable, captioned=found.captioned)


def check_ranges(channels: int, test_fraction: float, **counts: int | None) -> None:
    """UserError for what is out of range, before DEST is touched: an autoencoder's channels, or what Python gives."""
    if channels not in (1, 3):
        raise UserError(f"channels={channels} is neither grey nor colour; choose channels=1 or channels=3")
    if not 0 <= test_fraction < 1:
        raise UserError(f"test_fraction={test_fraction} is no share of the examples; choose 0 <= test_fraction < 1")
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"{name}={value} is too small; choose 1 or more")


def places(source: str, dest: str) -> tuple[Path, Path]:
    """SOURCE, which must exist, and DEST, which must lie outside of it."""
    origin, target = existing(source), Path(dest).expanduser().absolute()
    if origin.is_dir() and (origin.resolve() in (target.resolve(), *target.resolve().parents)):
        raise UserError(f"DEST {target} lies inside SOURCE {origin}; choose a folder outside of it")
    return origin, target


def probe(origin: Path, splits: list[Items], use: Callable[[bytes | np.ndarray], Any]) -> None:
    """Refuses a source of which no image can be used (say, all grey for colour) before anything is written."""
    reasons = []
    for items in splits:
        for i in range(0, items.count, max(1, items.count // 64)):
            try:
                items.caption(i)
                use(items.read(i))
                return
            except BadImage as error:
                reasons.append(f"{items.name(i)} {error}; {error.advice}")
    if not reasons:
        raise UserError(f"{origin} holds no image; give a folder, an .npz, a tar or a parquet file with images")
    raise UserError(f"not one of {len(reasons)} images tried in {origin} can be used; the first: {reasons[0]}")


def picture(data: bytes | np.ndarray, channels: int, convert: bool) -> tuple[Image.Image, bool]:
    """An upright picture of mode L or RGB of an encoded image or an array, and whether it was exactly that already."""
    if isinstance(data, bytes):
        return open_image(data, channels, convert)
    check_kind(data.shape[-1] == 1, channels, convert)
    image, mode = from_array(data), "L" if channels == 1 else "RGB"
    return image.convert(mode), image.mode == mode


def _encoder(size: int | None, channels: int, convert: bool) -> Callable[[bytes | np.ndarray], bytes]:
    """What goes into a record: the file's own bytes where nothing has to change, else a PNG."""

    def encode(data: bytes | np.ndarray) -> bytes:
        image, as_stored = picture(data, channels, convert)
        if isinstance(data, bytes) and as_stored and size in (None, image.width) and size in (None, image.height):
            return data
        buffer = io.BytesIO()
        (image if size is None else square(image, size)).save(buffer, "PNG")
        return buffer.getvalue()

    return encode


def _records(
    items: Items, part: range, encode: Callable[[bytes | np.ndarray], bytes], pool: ThreadPoolExecutor, bar: Any
) -> Iterator[bytes | Lost]:
    """The records of the images `part` in their order, or why there is none."""

    def record(i: int) -> bytes | Lost:
        try:
            caption = items.caption(i)
            return msgspec.msgpack.encode(Record(encode(items.read(i)), items.label(i), items.name(i), caption))
        except BadImage as error:
            return items.name(i), f"{error}; {error.advice}"

    for first in range(0, len(part), 256):  # no more than this many encoded images wait in memory
        window = part[first : first + 256]
        yield from pool.map(record, window)
        bar.update(len(window))
