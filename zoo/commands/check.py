"""`zoo check`: reads images, captions, texts, series, latents or weights once, says what is there and what is wrong with it."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import logging.handlers
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from zoo.commands.arguments import takes
from zoo.data.arrays import open_npz
from zoo.data.documents import is_plain, list_texts, pieces
from zoo.data.folders import existing, some, walk
from zoo.data.images import SUFFIXES, BadImage
from zoo.data.images.latents import LatentInfo, Latents
from zoo.data.images.sources import Items, open_source
from zoo.data.prepare import picture
from zoo.data.records import Info, format_of, is_prepared, read_info
from zoo.data.series import SUFFIXES as RECORDINGS
from zoo.data.series import Series
from zoo.data.text import vocabulary as vocabularies
from zoo.data.text.tokens import Text, TokenInfo
from zoo.errors import UserError
from zoo.files import sha256, sha256_of_file

_NEAR = 3  # bits of 64 in which the perceptual hashes of two near-duplicates differ at most
_LEVELS = 6.0  # and mean grey levels, of 255, in which they do at 16 x 16
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_SHOWN = 5  # examples that a line names


@dataclass
class Found:
    """What was found: counts, what is left out when it is read, what is wrong."""

    kind: str
    counts: dict[str, Any] = field(default_factory=dict)  # examples by split, and by class where there are some
    figures: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def blame(self, names: Iterable[str], what: str) -> None:
        """Something is wrong with these, if there are any."""
        if names := list(names):
            self.wrong.append(f"{len(names):,} {what}: {some(names, _SHOWN)}")

    def __str__(self) -> str:
        def line(value: Any) -> str:
            return ", ".join(f"{k} {line(v)}" for k, v in value.items()) if isinstance(value, dict) else f"{value}"

        lines = [self.kind, *(f"  {k}: {line(v)}" for k, v in {**self.counts, **self.figures}.items())]
        lines += [f"left out: {text}" for text in self.left_out] + [f"WRONG: {text}" for text in self.wrong]
        return "\n".join([*lines, "" if self.wrong else "nothing wrong was found"]).rstrip()


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    takes(parser, "SOURCE")
    parser.add_argument(
        "--tokenizer",
        default=None,
        metavar="TOKENS",
        help="count tokens of captions and texts: bytes, or a tokenizer's file",
    )
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="tokens that a caption may have")
    parser.add_argument("--delimiter", default=",", help="of CSV files")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def run(args: argparse.Namespace) -> int:
    """The exit code: 1 where something is wrong."""
    said = logging.handlers.BufferingHandler(10**9)  # what readers tell of what they pass over
    said.setLevel(logging.WARNING)
    log = logging.getLogger("zoo")
    handlers, log.propagate = log.handlers[:], False
    log.handlers = [said]
    try:
        found = check(existing(args.source), args.tokenizer, args.tokens, args.delimiter)
    finally:
        log.handlers, log.propagate = handlers, True
    found.left_out += [record.getMessage() for record in said.buffer]
    print(json.dumps(asdict(found), indent=1) if args.json else found)
    return 1 if found.wrong else 0


def check(path: Path, tokenizer: str | None = None, tokens: int = 128, delimiter: str = ",") -> Found:
    """Reads everything in a place once. What a reader refuses as a whole is wrong, not an error.

    Args:
        tokenizer, tokens: of captions, which may be so long.

    Raises:
        UserError: nothing that is known lies there.
    """
    kind = _kind(path)
    found = Found(kind)
    vocabulary = None if tokenizer is None else vocabularies.named(tokenizer, field="--tokenizer ")
    look: dict[str, Callable[[], object]] = {
        "images": lambda: _images(path, found, vocabulary, tokens),
        "series": lambda: _series(path, found, delimiter),
        "texts": lambda: _texts(path, found, vocabulary),
        "tokens": lambda: _tokens(path, found),
        "latents": lambda: _latents(path, found),
        "weights": lambda: _weights(path, found),
        "set": lambda: read_info(path, Info),  # which says what is wrong with it
    }
    try:
        look[kind]()
    except UserError as error:
        found.wrong.append(" ".join(str(error).split()))
    return found


def _kind(path: Path) -> str:
    """What lies in a place."""
    if path.is_file():
        if path.suffix.lower() == ".npz":
            with open_npz(path) as file:
                arrays = file.files
            kinds = {"images": "images", "series": "series"}
            return next((kind for word, kind in kinds.items() if any(word in name for name in arrays)), "weights")
        if path.suffix.lower() in _WEIGHTS:
            return "weights"
        if path.suffix.lower() in RECORDINGS:
            return "series"
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet

            kinds_of = [str(kind) for kind in pyarrow.parquet.read_schema(path).types]
            return "images" if any("binary" in kind for kind in kinds_of) else "texts"
        return "images" if ".tar" in path.name or path.suffix == ".tgz" else "texts"
    made = format_of(path)
    if made is not None:
        return made.removeprefix("zoo-")
    if _of_zoo(path):
        return "weights"
    names = [name.lower() for name in walk(path)]
    if any(name.endswith((*SUFFIXES, ".tar")) for name in names):
        return "images"
    if is_prepared(path):
        return "set"
    if any(name.endswith(_WEIGHTS) for name in names):
        return "weights"
    if any(name.endswith(RECORDINGS) for name in names):
        return "series"
    if first := next((name for name in walk(path) if name.endswith(".parquet")), None):
        return _kind(path / first)
    return "texts"


def _of_zoo(folder: Path) -> bool:
    """Whether a folder is a run or an export, as its config.json says; a damaged one counts, that of other libraries does not."""
    try:
        about = json.loads((folder / "config.json").read_text())
        return isinstance(about, dict) and "format" in about
    except (OSError, ValueError) as error:
        return isinstance(error, ValueError)


def _shards(path: Path, info: Info | LatentInfo, found: Found) -> None:
    """Damaged files of a set."""
    damaged = [shard.file for shard in info.shards() if sha256_of_file(path / shard.file) != shard.sha256]
    found.blame(damaged, "files are missing or damaged (the same `zoo prepare` makes them again)")


# Images


@dataclass(frozen=True)
class _Look:
    name: str
    label: int
    caption: str
    size: tuple[int, int]
    mode: str
    digest: str
    flat: bool  # of one colour
    hashes: tuple[int, ...]  # perceptual, 64 bits each: one is firm where grounds are flat, the other for small images
    small: np.ndarray  # uint8 [16, 16]


def _looker(items: Items) -> Callable[[int], _Look | tuple[str, str]]:
    imagehash = importlib.import_module("imagehash") if importlib.util.find_spec("imagehash") else None

    def look(i: int) -> _Look | tuple[str, str]:
        try:
            caption, data, label = items.caption(i), items.read(i), items.label(i)
            image, _ = picture(data, 3, True)
        except BadImage as error:
            return items.name(i), f"{error}; {error.advice}"
        stored = _mode(data)
        grey = image.convert("L")
        kinds = () if imagehash is None else (imagehash.phash, imagehash.dhash)
        hashed = tuple(int(str(kind(grey)), 16) for kind in kinds)
        small = np.asarray(grey.resize((16, 16), Image.Resampling.BOX))
        pixels = np.asarray(image)
        flat = bool((pixels == pixels[0, 0]).all())
        digest = sha256(data if isinstance(data, bytes) else data.tobytes())
        return _Look(items.name(i), label, caption, image.size, stored, digest, flat, hashed, small)

    return look


def _mode(data: bytes | np.ndarray) -> str:
    if isinstance(data, np.ndarray):
        return "L" if data.shape[-1] == 1 else "RGB"
    with Image.open(io.BytesIO(data)) as raw:
        return raw.mode


def _images(path: Path, found: Found, vocabulary: Any, tokens: int) -> None:
    if format_of(path):
        _shards(path, read_info(path, Info), found)
    source = open_source(path, 0.1, prepared=True)
    looks: dict[str, list[_Look]] = {}
    lost: list[tuple[str, str]] = []
    total = sum(items.count for items in source.splits.values())
    with tqdm(total=total, unit="image", delay=1) as bar, ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for split, items in source.splits.items():
            kept = looks[split] = []
            for first in range(0, items.count, 256):
                part = range(first, min(first + 256, items.count))
                for one in pool.map(_looker(items), part):
                    kept.append(one) if isinstance(one, _Look) else lost.append(one)
                bar.update(len(part))
    everything = [look for some_of_it in looks.values() for look in some_of_it]
    found.counts = {split: _counts([look.label for look in kept], source.labels) for split, kept in looks.items()}
    for what, values in (
        ("sizes", [f"{look.size[0]}x{look.size[1]}" for look in everything]),
        ("modes", [look.mode for look in everything]),
    ):
        counted = Counter(values).most_common()
        found.figures[what] = dict(counted[:_SHOWN]) | ({"others": len(counted) - _SHOWN} if counted[_SHOWN:] else {})
    found.blame([f"{name} {reason}" for name, reason in lost], "cannot be used")
    grey = [look.name for look in everything if look.mode in ("1", "L", "LA", "La")]
    colour = [look.name for look in everything if look.mode not in ("1", "L", "LA", "La", "P")]
    if grey and colour:
        fewer = min(grey, colour, key=len)
        found.blame(
            fewer, f"{'grey among colour' if fewer is grey else 'in colour among grey'} ones (convert=true takes both)"
        )
    found.blame([look.name for look in everything if look.flat], "of one colour alone")
    labels: dict[str, set[int]] = defaultdict(set)
    for look in everything:
        labels[look.digest].add(look.label)
    found.blame([look.name for look in everything if len(labels[look.digest]) > 1], "same image in several classes")
    _duplicates({split: [(look.name, look.digest) for look in kept] for split, kept in looks.items()}, found)
    _near(looks.get("train", []), looks.get("test", []), found)
    if source.captioned:
        _captions(everything, found, vocabulary, tokens)


def _counts(labels: Sequence[int], names: Sequence[str]) -> Any:
    counted = Counter(labels)
    by_class = {
        names[k] if 0 <= k < len(names) else "unlabelled": counted[k] for k in sorted({*counted, *range(len(names))})
    }
    return {"all": len(labels), **by_class} if names else len(labels)


def _duplicates(digests: Mapping[str, Sequence[tuple[str, str]]], found: Found) -> None:
    """Equal ones within a split are counted, those in two splits are wrong."""
    within = sum(len(some_of_it) - len({digest for _, digest in some_of_it}) for some_of_it in digests.values())
    found.figures["duplicates within a split"] = within
    train = {digest: name for name, digest in digests.get("train", ())}
    for split, those in digests.items():
        if split != "train":
            same = [f"{name} = {train[digest]}" for name, digest in those if digest in train]
            found.blame(same, f"in {split} and in train")


def _near(train: list[_Look], test: list[_Look], found: Found) -> None:
    """Images of both splits that look the same: hashes (of which, differing in three bits, one of four parts is equal), and grey levels."""
    if not all(look.hashes for look in test):
        found.left_out.append("near-duplicates were not looked for (pip install -e '.[check]')")
        return
    pairs: dict[int, int] = {}
    for ours, theirs in zip(
        *(np.array([look.hashes for look in one], np.uint64).reshape(-1, 2).T for one in (train, test))
    ):
        for shift in np.arange(0, 64, 16, dtype=np.uint64):
            keys, wanted = (ours >> shift) & np.uint64(0xFFFF), (theirs >> shift) & np.uint64(0xFFFF)
            order = np.argsort(keys, kind="stable")
            first, last = (np.searchsorted(keys[order], wanted, side) for side in ("left", "right"))
            for i in np.flatnonzero(last > first).tolist():
                near = order[first[i] : last[i]]
                near = near[np.bitwise_count(ours[near] ^ theirs[i]) <= _NEAR]
                for j in near[:64].tolist():
                    apart = np.abs(train[j].small.astype(np.float32) - test[i].small).mean()
                    if apart <= _LEVELS and train[j].digest != test[i].digest:
                        pairs.setdefault(i, j)
    found.blame([f"{test[i].name} ~ {train[j].name}" for i, j in pairs.items()], "in test look as one in train does")


def _captions(looks: Sequence[_Look], found: Found, vocabulary: Any, tokens: int) -> None:
    lengths = [len(look.caption) for look in looks]
    found.figures["captions"] = {
        "longest": max(lengths, default=0),
        "characters on average": round(float(np.mean(lengths or 0)), 1),
    }
    found.blame([look.name for look in looks if not look.caption], "empty captions")
    if vocabulary is not None:
        encoded = vocabulary.encode_all([look.caption for look in looks])
        sizes = [len(ids) + (vocabulary.end is not None) for ids in encoded]
        found.figures["captions"]["most tokens"] = max(sizes, default=0)
        long = [look.name for look, size in zip(looks, sizes) if size > tokens]
        found.blame(long, f"captions of more than {tokens} tokens")


# The others


def _texts(path: Path, found: Found, vocabulary: Any) -> None:
    digests: dict[str, list[tuple[str, str]]] = {}
    characters = count = 0
    listed = list_texts(path)
    with tqdm(total=sum(map(len, listed.values())), unit="file", delay=1) as bar:
        for split, files in listed.items():
            kept = digests[split or "train"] = []
            for file in files:
                name, plain = os.path.relpath(file, path) if file != path else path.name, is_plain(file)
                for number, text in enumerate(_documents(file), 1):
                    kept.append((name if plain else f"{name} {number}", sha256(text)))
                    characters += len(text)
                    count += 0 if vocabulary is None else len(vocabulary.encode(vocabulary.normalise(text), name))
                bar.update()
    found.counts = {split: len(kept) for split, kept in digests.items()}
    if not characters:
        found.wrong.append("there is no text in it")
    found.figures = {"characters": characters} | ({} if vocabulary is None else {"tokens": count})
    _duplicates(digests, found)


def _documents(file: Path) -> Iterator[str]:
    text: list[str] = []
    for piece, last in pieces(file):
        text.append(piece)
        if last:
            yield "".join(text)
            text = []
    if text:
        yield "".join(text)


def _series(path: Path, found: Found, delimiter: str) -> None:
    options: dict[str, Any] = {"delimiter": delimiter, "length": 1, "standardise": False}
    if path.suffix.lower() == ".npz":
        with open_npz(path) as file:
            arrays = file.files
        name = next(name for name in arrays if "series" in name)
        split = "{split}_series" if re.match("(train|test)_", name) else name
        labels = split.replace("series", "labels")
        options |= {"series": split, "labels": labels if labels.replace("{split}", "train") in arrays else ""}
    data = Series(str(path), **options)
    digests: dict[str, list[tuple[str, str]]] = {}
    for split in ("train", "test"):
        try:
            part = data.part(split)
        except UserError:
            if split == "test":  # there is none
                continue
            raise
        kept = digests[split] = []
        constant: Counter[int] = Counter()
        for n, (member, first, last) in enumerate(tqdm(list(zip(part.members, part.first, part.last)), delay=1)):
            values = np.asarray(part.series[member][first:last], np.float64)
            kept.append((f"{split} {n}", sha256(values.tobytes())))
            constant.update(np.flatnonzero(values.min(0) == values.max(0)).tolist())
        labels_of = [] if part.labels is None else part.labels.tolist()
        found.counts[split] = _counts(labels_of, part.names) if labels_of else len(kept)
        steps = part.last - part.first
        found.figures[split] = {"channels": part.channels, "steps": f"{steps.min(initial=0)} to {steps.max(initial=0)}"}
        found.blame([f"channel {c} of {n}" for c, n in constant.items()], f"channels are constant in series of {split}")
    _duplicates(digests, found)


def _latents(path: Path, found: Found) -> None:
    info = read_info(path, LatentInfo)
    _shards(path, info, found)
    bad: list[str] = []
    digests: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for split in ("train", "test"):
        for aspect, bucket in info.buckets.items():
            if not any(shard.count for shard in bucket.splits[split]):
                continue
            source = Latents(str(path), aspect=aspect).source(split)
            low, high = np.array(np.inf), np.array(-np.inf)
            labels: list[int] = []
            for i in tqdm(range(len(source)), unit="latent", delay=1):
                example = source[i]
                if not all(np.isfinite(example[key]).all() for key in ("latent", "latent_std")):
                    bad.append(f"{split} {aspect} {i}")
                low = np.minimum(low, example["latent"].min((0, 1)))
                high = np.maximum(high, example["latent"].max((0, 1)))
                labels.append(int(example.get("label", -1)))
                digests[split].append((f"{split} {aspect} {i}", sha256(example["latent"].tobytes())))
            found.counts[f"{split} {aspect}"] = _counts(labels, info.labels)
            place = f"{split} {aspect}"
            found.figures[place] = {"channels": len(high), "from": f"{low.min():.3g}", "to": f"{high.max():.3g}"}
            found.blame([f"channel {c}" for c in np.flatnonzero(low == high)], f"channels are constant in {place}")
    found.blame(bad, "latents are not finite")
    _duplicates(digests, found)


def _tokens(path: Path, found: Found) -> None:
    info = read_info(path, TokenInfo)
    found.figures = {"vocabulary": info.size, "documents": info.documents}
    Text(str(path)).vocabulary()  # which looks at the files' sizes and at what the tokens mean
    for split, about in info.splits.items():
        found.counts[split] = about.count
        if sha256_of_file(path / about.file) != about.sha256:
            found.wrong.append(f"{about.file} is damaged: its bytes are not those that were written")
        elif about.count and (most := int(np.memmap(path / about.file, info.dtype, "r").max())) >= info.size:
            found.wrong.append(f"{about.file} has the token {most}, and the vocabulary {info.size}")


def _weights(path: Path, found: Found) -> None:
    from zoo import models, weights

    if _of_zoo(path):
        model = models.open_model(str(path))
        state = weights.flatten(model.params)
        if model.run is not None and model.kind != "raw":
            last = weights.flatten(models.open_model(str(path), raw=True).params)
            state |= {f"{name} (without average)": x for name, x in last.items()}
    else:
        state = weights.read_state_dict(path)
    arrays = {name: np.asarray(x) for name, x in state.items()}
    found.counts = {"tensors": len(arrays), "parameters": sum(x.size for x in arrays.values())}
    found.figures["types"] = dict(Counter(str(x.dtype) for x in arrays.values()))
    real = {name: x.astype(np.float32) for name, x in arrays.items() if x.dtype.kind not in "iub"}
    found.blame([name for name, x in real.items() if not np.isfinite(x).all()], "tensors are not finite")
