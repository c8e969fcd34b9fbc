"""Latents on disk: images and captions seen once through frozen networks, so that training need not run these.

A set is made by `zoo prepare latents` and resumed like any other (`records.py`). Of every image it keeps the mean and
the standard deviation of the latent's distribution, so that training may draw from it, and of every caption its tokens
or features. Images of different shapes lie in buckets of their own, one per aspect ratio.
h, w and c: height, width and channels of a latent; S tokens of a caption; E numbers per feature.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax
import msgspec
import numpy as np
from ml_dtypes import bfloat16
from tqdm import tqdm

from zoo import files
from zoo.data import pipeline
from zoo.data.folders import SPLITS, existing
from zoo.data.images import BadImage, check_split, fit, to_array, upright_size
from zoo.data.images.captions import ASPECTS, bucket, nearest, template
from zoo.data.images.sources import Items, Source, open_source
from zoo.data.prepare import Report, check_ranges, picture, places
from zoo.data.records import AGAIN, Lost, Settings, Shard, entering, open_shards, read_info, writing
from zoo.errors import UserError, suggest
from zoo.fields import NotEmpty

SQUARE = "1:1"
_BOUNDS = 0.3, 3.0  # of the root mean square of scaled latents, which should be about 1


class Encoder(Protocol):
    """The frozen networks. Both functions always get the same number of rows."""

    about: dict[str, str]  # digests of the networks by key ("vae", "text", ...), "vae_scale", ...

    def latents(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [N, H, W, C] -> scaled mean and standard deviation, float32 [N, h, w, c] each."""
        ...

    def text(self, captions: Sequence[str]) -> dict[str, np.ndarray] | None:
        """`tokens` int32 [N, S] and, where they are kept, `text` features [N, S, E]; None: captions are not encoded."""
        ...


class Latent(msgspec.Struct, array_like=True):
    """One example on disk: arrays in the machine's order, bfloat16 but for the tokens (int32)."""

    shape: tuple[int, int, int]
    mean: bytes
    std: bytes
    label: int  # -1: none
    name: str
    caption: str  # as in the source, without a template
    tokens: bytes = b""
    text: bytes = b""


class LatentSettings(Settings):
    """What a set of latents was made from and how."""

    aspects: bool
    multiple: int
    encoder: dict[str, str]


class Bucket(msgspec.Struct):
    """The examples of one aspect ratio, and the empty caption as they see it."""

    height: int  # of the images
    width: int
    splits: dict[str, list[Shard]]
    null_tokens: list[int] | None = None
    null_text: str | None = None  # a file of float32 [S, E]
    null_sha256: str | None = None


class LatentInfo(msgspec.Struct):
    """`info.json` of a set of latents."""

    FORMAT: ClassVar[str] = "zoo-latents"
    VERSION: ClassVar[int] = 1

    settings: LatentSettings
    labels: list[str]
    buckets: dict[str, Bucket]
    captions: bool = False
    format: str = FORMAT
    version: int = VERSION

    def shards(self) -> list[Shard]:
        """All files of the set."""
        return [s for inside in self.buckets.values() for shards in inside.splits.values() for s in shards]


# Reading


@dataclass(frozen=True)
class Latents(pipeline.Data):
    """A set made by `zoo prepare latents`: one of its aspect ratios, or all of them in batches of one each.

    Examples: `latent` (mean) and `latent_std` float32 [h, w, c]; `label` int32 [] where there are labels; `tokens` and
    `null_tokens` (those of the empty caption) int32 [S] where captions were encoded, and `text` and `null_text` float32
    [S, E] where their features were kept.
    """

    path: NotEmpty
    aspect: str | None = None  # such as "16:9"; None: square, or the only one there is; "mixed": all

    def source(self, split: str, spec: Mapping[str, jax.ShapeDtypeStruct] | None = None) -> LatentSource:
        """The examples of a split; with aspect="mixed" in groups, of which evaluation sees the first (square) alone."""
        check_split(split)
        root = existing(self.path)
        info = read_info(root, LatentInfo)
        there = {a: b for a, b in info.buckets.items() if any(s.count for s in b.splits[split])}
        names = self._chosen(info, root)
        opened = [_Bucket(root, info, name, split) for name in names if name in there]
        if not opened:
            raise UserError(
                f"{self.path} has no latents of aspect {' or '.join(names)} in its {split} split; it has "
                f"{', '.join(there) or 'none'}: set data.aspect to one of them"
            )
        return LatentSource(opened, tuple(info.labels))

    def fingerprint(self, split: str) -> str:
        """What the latents of a split are, wherever they lie."""
        info = read_info(existing(self.path), LatentInfo)
        chosen = {name: info.buckets[name] for name in self._chosen(info, Path(self.path))}
        return files.sha256_of_json({name: [s.sha256 for s in b.splits[split]] for name, b in chosen.items()})

    def made_with(self) -> dict[str, str]:
        """What the latents were made with.

        Digests of the networks by key, the autoencoder's scale as `vae_scale`, its fields as `vae_sizes`, and as `template`,
        where captions were encoded, "aspect" where these name the aspect ratio, else "plain".
        """
        info = read_info(existing(self.path), LatentInfo)
        made = dict(info.settings.encoder)
        if any(b.null_tokens is not None for b in info.buckets.values()):
            made["template"] = "aspect" if info.settings.aspects else "plain"
        return made

    def _chosen(self, info: LatentInfo, root: Path) -> list[str]:
        there = info.buckets
        if self.aspect == "mixed":
            return sorted(there, key=lambda a: (a != SQUARE, ASPECTS.index(a) if a in ASPECTS else len(ASPECTS)))
        if self.aspect is not None:
            if self.aspect not in there:
                raise UserError(
                    f"data.aspect={self.aspect!r} is not in {root}, which has {', '.join(there)}; "
                    f"{suggest(self.aspect, [*there, 'mixed'])}"
                )
            return [self.aspect]
        if SQUARE not in there and len(there) > 1:
            raise UserError(
                f"{root} has the aspect ratios {', '.join(there)} and none is square; set data.aspect to one of them, or "
                "to mixed"
            )
        return [SQUARE if SQUARE in there else next(iter(there))]


class _Bucket:
    """One aspect ratio of one split."""

    def __init__(self, root: Path, info: LatentInfo, name: str, split: str) -> None:
        about, self.name = info.buckets[name], name
        self.count, self._record = open_shards(root, about.splits[split], split, Latent)
        self._labelled = bool(info.labels)
        self._null: dict[str, np.ndarray] = {}
        if about.null_tokens is not None:
            self._null["null_tokens"] = np.array(about.null_tokens, np.int32)
        if about.null_text is not None:
            path = root / about.null_text
            if files.sha256_of_file(path) != about.null_sha256:
                raise UserError(f"{path} is missing or damaged; {AGAIN}")
            self._null["null_text"] = np.load(path, allow_pickle=False)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        found = self._record(i)
        example: dict[str, np.ndarray] = {
            "latent": _array(found.mean, bfloat16).reshape(found.shape),
            "latent_std": _array(found.std, bfloat16).reshape(found.shape),
        }
        if self._labelled:
            example["label"] = np.asarray(found.label, np.int32)
        if "null_tokens" in self._null:
            example["tokens"] = np.frombuffer(found.tokens, np.int32)
        if "null_text" in self._null:
            example["text"] = _array(found.text, bfloat16).reshape(self._null["null_text"].shape)
        return {**example, **self._null}


class LatentSource(pipeline.Source):
    """The examples of one or several aspect ratios, one after the other; of several, each is a group."""

    def __init__(self, parts: list[_Bucket], labels: tuple[str, ...]) -> None:
        self.labels = labels
        self._parts = parts
        self._ends = np.cumsum([part.count for part in parts])
        self.aspects = tuple(part.name for part in parts)  # in the order of `groups`
        self.groups: tuple[np.ndarray, ...] = ()
        if len(parts) > 1:
            self.groups = tuple(np.arange(end - part.count, end) for part, end in zip(parts, self._ends))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        at = int(np.searchsorted(self._ends, index, "right"))
        return self._parts[at][index - int(self._ends[at]) + self._parts[at].count]


def _array(data: bytes, dtype: Any) -> np.ndarray:
    return np.frombuffer(data, dtype).astype(np.float32)


# Writing


@dataclass(frozen=True)
class _Example:
    image: np.ndarray
    label: int
    name: str
    caption: str


def encode_set(
    source: str,
    dest: str,
    encoder: Encoder,
    *,
    size: int,
    batch: int = 64,
    aspects: bool = False,
    multiple: int = 8,
    channels: int = 3,
    convert: bool = False,
    allow_unreadable: bool = False,
    shard_examples: int | None = None,
    test_fraction: float = 0.1,
    image_column: str | None = None,
    caption_column: str | None = None,
    progress: bool = True,
) -> Report:
    """Writes the latents of the images of `source` to `dest`, resumably; what cannot be used is skipped and reported.

    Args:
      source: what `prepare` takes, or a set that it has made.
      dest: a new folder, or one that the same call has begun or finished; the encoder is part of what is compared.
      size: side of the square that images are cropped and resized to; with `aspects`, of the square of equal area.
      batch: images that the encoder gets at once; it does not change what is written but for rounding.
      aspects: every image goes to its nearest aspect ratio, which its caption then says; False: all are cropped square.
      multiple: what divides the sides of all images: the pixels a side of one number of the latent, or some times that.
      shard_examples: images per shard, the unit that a killed run keeps; None: 8192, with features of captions 1024.

    Raises:
      UserError: as `prepare`; also captions that are not there, or latents far from unit variance.
    """
    ranges = {"size": size, "batch": batch, "multiple": multiple, "shard_examples": shard_examples}
    check_ranges(channels, test_fraction, **ranges)
    if size % multiple and not aspects:
        best = max(1, round(size / multiple)) * multiple
        raise UserError(
            f"size={size} is no multiple of {multiple}, by which the encoder shrinks images (or multiple=); choose size={best}"
        )
    origin, target = places(source, dest)
    with entering(target, LatentInfo), ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        found = open_source(
            origin, test_fraction, image_column=image_column, caption_column=caption_column, prepared=True
        )
        buckets = _buckets(found, aspects, pool, progress)
        work = _Work(encoder, batch, channels, convert, aspects, pool)
        sizes = {name: bucket(size, name, multiple) for name in buckets}
        _check_scale(origin, encoder, work, buckets, sizes)
        nulls = {name: work.text([template("", aspect=name if aspects else None)])[0] for name in buckets}
        encoded = any(nulls.values())
        if encoded and not found.captioned:
            raise UserError(
                f"{origin} has no captions to encode; leave the text encoder out, or give images with captions"
            )
        many = shard_examples or (1024 if any("text" in null for null in nulls.values()) else 8192)
        how = size, channels, convert, test_fraction, many, aspects, multiple, encoder.about
        settings = LatentSettings(origin.name, found.fingerprint, *how)
        total = sum(items.count for items in found.splits.values())
        with (
            writing(target, settings, LatentInfo) as out,
            tqdm(total=total, unit=" images", disable=not progress) as bar,
        ):
            made: dict[str, Bucket] = {}
            for name, splits in buckets.items():
                made[name] = Bucket(*sizes[name], {})
                for split, items in splits.items():
                    records = partial(work.records, name, sizes[name], items, bar=bar)
                    stem = f"{split}-{name.replace(':', 'x')}"
                    made[name].splits[split] = out.shards(stem, items.count, many, records, bar)
                _keep_null(target, name, made[name], nulls[name])
            lost = out.finish(LatentInfo(settings, list(found.labels), made, found.captioned))
    counts = {split: sum(s.count for b in made.values() for s in b.splits[split]) for split in SPLITS}
    inside = {name: sum(s.count for shards in b.splits.values() for s in shards) for name, b in made.items()}
    return Report(target, counts, found.labels, lost, allow_unreadable, inside if aspects else {}, found.captioned)


def _keep_null(target: Path, name: str, made: Bucket, null: dict[str, np.ndarray]) -> None:
    """The empty caption of a bucket: its tokens in `info.json`, its features in a file."""
    if "tokens" in null:
        made.null_tokens = null["tokens"].tolist()
    if "text" in null:
        made.null_text = f"null-{name.replace(':', 'x')}.npy"
        buffer = io.BytesIO()
        np.save(buffer, null["text"].astype(np.float32))
        files.write(target / made.null_text, buffer.getvalue())
        made.null_sha256 = files.sha256(buffer.getvalue())


def _buckets(found: Source, aspects: bool, pool: ThreadPoolExecutor, progress: bool) -> dict[str, dict[str, Items]]:
    """The images of both splits by aspect ratio, in the order of `ASPECTS`; ratios of no image are left out."""
    if not aspects:
        return {SQUARE: found.splits}
    members: dict[str, dict[str, list[int]]] = {}
    total = sum(items.count for items in found.splits.values())
    with tqdm(total=total, unit=" sizes", disable=not progress) as bar:
        for split, items in found.splits.items():

            def aspect(i: int, items: Items = items) -> str:
                try:
                    return nearest(*upright_size(items.read(i)))
                except BadImage:
                    return SQUARE  # where it will be listed as unreadable

            for first in range(0, items.count, 256):
                window = range(first, min(first + 256, items.count))
                for i, name in zip(window, pool.map(aspect, window)):
                    members.setdefault(name, {s: [] for s in SPLITS})[split].append(i)
                bar.update(len(window))
    return {
        name: {split: found.splits[split].part(members[name][split]) for split in SPLITS}
        for name in ASPECTS
        if name in members
    }


class _Work:
    """Decoding in threads ahead of an encoder that gets full batches of one shape per bucket."""

    def __init__(
        self, encoder: Encoder, batch: int, channels: int, convert: bool, aspects: bool, pool: ThreadPoolExecutor
    ) -> None:
        self._encoder, self.batch, self._pool = encoder, batch, pool
        self._channels, self._convert, self._aspects = channels, convert, aspects

    def decode(self, items: Items, size: tuple[int, int], i: int) -> _Example | Lost:
        """One image at `size` (height, width), or why there is none."""
        try:
            caption = items.caption(i)
            image, _ = picture(items.read(i), self._channels, self._convert)
            pixels = to_array(fit(image, size[1], size[0]))
            return _Example(pixels, items.label(i), items.name(i), caption)
        except BadImage as error:
            return items.name(i), f"{error}; {error.advice}"

    def latents(self, images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of at most `batch` images; filled up with copies of the last one."""
        full = np.stack([*images, *[images[-1]] * (self.batch - len(images))])
        mean, std = self._encoder.latents(full)
        return np.asarray(mean)[: len(images)], np.asarray(std)[: len(images)]

    def text(self, captions: Sequence[str]) -> list[dict[str, np.ndarray]]:
        """`tokens` [S] and perhaps `text` [S, E] of at most `batch` captions; nothing where there is no text encoder."""
        found = self._encoder.text([*captions, *[captions[-1]] * (self.batch - len(captions))])
        rows = {}
        for key, value in (found or {}).items():
            rows[key] = np.asarray(value).astype(bfloat16 if key == "text" else np.int32)
        return [{key: value[i] for key, value in rows.items()} for i in range(len(captions))]

    def records(
        self, aspect: str, size: tuple[int, int], items: Items, part: range, bar: Any
    ) -> Iterator[bytes | Lost]:
        """The records of the images `part` in their order, or why there is none."""
        ahead: deque[Future[_Example | Lost]] = deque()
        waiting: list[_Example] = []
        left = iter(part)
        while True:
            while len(ahead) < 2 * self.batch and (i := next(left, None)) is not None:
                ahead.append(self._pool.submit(self.decode, items, size, i))
            if ahead:
                found = ahead.popleft().result()
                if isinstance(found, _Example):
                    waiting.append(found)
                else:
                    bar.update(1)
                    yield found
            if waiting and (len(waiting) == self.batch or not ahead):
                yield from self._encoded(aspect, waiting)
                bar.update(len(waiting))
                waiting = []
            if not ahead:
                return

    def _encoded(self, aspect: str, examples: list[_Example]) -> Iterator[bytes | Lost]:
        mean, std = self.latents([e.image for e in examples])
        around = aspect if self._aspects else None
        texts = self.text([template(e.caption, aspect=around) for e in examples])
        for e, m, s, text in zip(examples, mean, std, texts):
            if not (np.isfinite(m).all() and np.isfinite(s).all()):
                yield e.name, "is encoded to numbers that are not finite; remove it"
                continue
            one = Latent(
                m.shape, m.astype(bfloat16).tobytes(), s.astype(bfloat16).tobytes(), e.label, e.name, e.caption
            )
            if "tokens" in text:
                one.tokens = text["tokens"].tobytes()
            if "text" in text:
                one.text = text["text"].tobytes()
            yield msgspec.msgpack.encode(one)


def _check_scale(
    origin: Path,
    encoder: Encoder,
    work: _Work,
    buckets: Mapping[str, Mapping[str, Items]],
    sizes: Mapping[str, tuple[int, int]],
) -> None:
    """Encodes some images before anything is written: refuses a source without any, and latents far from unit variance."""
    every = [(name, items) for name, splits in buckets.items() for items in splits.values()]
    name, items = max(every, key=lambda found: found[1].count, default=("", None))
    if items is None or not items.count:
        raise UserError(f"{origin} holds no image; give a folder, an .npz, a tar or a parquet file with images")
    tried = np.unique(np.linspace(0, items.count - 1, 2 * work.batch).round().astype(int))
    found = [work.decode(items, sizes[name], int(i)) for i in tried]
    images = [e.image for e in found if isinstance(e, _Example)][: work.batch]
    if not images:
        lost = " ".join(found[0]) if isinstance(found[0], tuple) else ""
        raise UserError(f"not one of {len(found)} images tried in {origin} can be used; the first: {lost}")
    mean, std = work.latents(images)
    root = float(np.sqrt(np.mean(np.square(mean, dtype=np.float64) + np.square(std, dtype=np.float64))))
    if _BOUNDS[0] <= root <= _BOUNDS[1]:
        return
    if not np.isfinite(root) or root == 0:
        raise UserError(
            f"the latents of {origin} have the root mean square {root}; give an autoencoder that was trained"
        )
    now = encoder.about.get("vae_scale", "")
    try:
        better = f"task.scale={float(now) / root:.5g} in place of {now} makes it 1"
    except ValueError:
        better = f"a scale {1 / root:.5g} times as large makes it 1"
    raise UserError(
        f"the latents of {origin} have the standard deviation {root:.4g} and should have about 1: the autoencoder's scale is "
        f"likely wrong; {better}"
    )
