"""`zoo prepare text`: texts become one file of tokens per split, the vocabulary, and an `info.json`.

The text is read once from its beginning to its end and never held as a whole. What a killed run leaves is kept: a line
of `progress.jsonl` says how far the files were on disk, and the same command goes on from there, to the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tqdm import tqdm

from zoo import files
from zoo.data.documents import PACKED, SPLITS, check_fractions, cuts, list_texts
from zoo.data.folders import file_size, hashed
from zoo.data.prepare import places
from zoo.data.records import AGAIN, INFO, PROGRESS, entering, is_prepared, mending, noted, read_info, same
from zoo.data.text import vocabulary as vocabularies
from zoo.data.text.tokens import (
    TokenFile,
    TokenInfo,
    TokenSettings,
    characters_of,
    documents_of,
    encoded,
    narrowest,
    nothing,
    symbols_of,
    texts,
)
from zoo.data.text.vocabulary import Vocabulary
from zoo.errors import UserError

_ENDS = "documents.tmp"  # where the documents end, in tokens


@dataclass(frozen=True)
class TextReport:
    """What `prepare_text` made: tokens per split, of which vocabulary, from how many documents."""

    dest: Path
    counts: dict[str, int]
    vocabulary: str
    documents: int

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} {split}" for split, count in self.counts.items())
        documents = f"{self.documents:,} document{'s' if self.documents != 1 else ''}"
        return f"{self.dest}: tokens {counts}; {self.vocabulary}, {documents}"


class _Mark(msgspec.Struct):
    """How far a stream of tokens is on disk: a line of `progress.jsonl`."""

    stream: str
    units: int = 0  # pieces of text
    tokens: int = 0
    characters: int = 0
    documents: int = 0
    sha256: str = ""  # of these tokens


def prepare_text(
    source: str,
    dest: str,
    tokenizer: str,
    *,
    valid_fraction: float = 0.05,
    test_fraction: float = 0.05,
    keep: int = 1 << 24,
    progress: bool = True,
) -> TextReport:
    """Writes the texts of `source` to `dest` as tokens, resumably.

    Args:
      source: a .txt, .gz, .zip, .jsonl or parquet file, or a folder of files of one of these kinds.
      dest: a new folder, or one that the same call has begun or finished; a damaged set is made again.
      tokenizer: "text8", "chars", "bytes", or the path of a tokenizer.json or of a sentencepiece model.
      valid_fraction, test_fraction: the last parts of the text, where the files' names do not tell their splits.
      keep: tokens that a killed run loses at most.

    Raises:
      UserError: the source is missing, empty or no text, or `dest` holds something else.
    """
    check_fractions(valid_fraction, test_fraction)
    origin, target = places(source, dest)
    if origin.is_dir() and is_prepared(origin):
        raise UserError(f"SOURCE {origin} is a prepared set; give the texts it was made from")
    with entering(target, TokenInfo):
        listed = list_texts(origin)
        every = [file for some in listed.values() for file in some]
        symbols = symbols_of(every) if tokenizer == "chars" else ""
        if tokenizer == "chars" and not symbols:
            raise UserError(f"{origin} is empty; give a text")
        vocabulary = vocabularies.named(tokenizer, symbols)
        root = origin if origin.is_dir() else origin.parent
        made_of = origin.name, hashed(root, [os.path.relpath(file, root) for file in every])
        kind = tokenizer if tokenizer in vocabularies.KINDS else Path(tokenizer).name
        settings = TokenSettings(*made_of, kind, vocabulary.digest, valid_fraction, test_fraction)
        plain = all(file.suffix.lower() not in (*PACKED, ".parquet") for file in every)
        total = sum(map(file_size, every)) if plain else None
        # the bar shows itself late: mistakes are told before, in one line
        with tqdm(total=total, unit="B", unit_scale=True, disable=not progress, delay=1) as bar:
            begun = {
                split or "train": _peeked(texts(vocabulary, documents_of(some, bar.update)))
                for split, some in listed.items()
            }
            streams = {name: units for name, units in begun.items() if units is not None}
            if not streams:
                raise nothing(origin, vocabulary)
            with mending(target):
                if (info := _finished(target, settings, vocabulary)) is None:
                    marks = _enter(target, settings, vocabulary, streams)
                    with open(target / PROGRESS, "ab") as log:
                        for name, units in streams.items():
                            _write(target, vocabulary, units, marks[name], log, keep)
                    info = _finish(target, settings, vocabulary, marks, None in listed)
    counts = {split: info.splits[split].count for split in SPLITS}
    return TextReport(target, counts, str(vocabulary), info.documents)


def _peeked(units: Iterator[tuple[str, bool]]) -> Iterator[tuple[str, bool]] | None:
    """The same units, of which there is one; None where there is none."""
    first = next(units, None)
    return None if first is None else chain([first], units)


def _finished(target: Path, settings: TokenSettings, vocabulary: Vocabulary) -> TokenInfo | None:
    """The description of a set that is there, whole, and made in this way; what is damaged of it does not count."""
    if not (target / INFO).is_file():
        return None
    info = read_info(target, TokenInfo)
    same(target, msgspec.to_builtins(info.settings), settings)
    whole = all(files.sha256_of_file(target / about.file) == about.sha256 for about in info.splits.values())
    with contextlib.suppress(UserError):
        if whole and vocabularies.open_vocabulary(target) == vocabulary:
            for left in (target / PROGRESS, *target.glob("*.tmp")):  # by a run that was killed at its end
                left.unlink(missing_ok=True)
            return info
    return None


def _enter(target: Path, settings: TokenSettings, vocabulary: Vocabulary, streams: dict[str, Any]) -> dict[str, _Mark]:
    """Re-enters the folder; how far each stream is, its files cut to that."""
    marks = {name: _Mark(name) for name in streams}
    if (target / INFO).is_file():  # damaged, and made in the same way
        (target / PROGRESS).unlink(missing_ok=True)
        (target / INFO).unlink()
    for mark in reversed(noted(target, settings, _Mark)):  # the last one first
        if not marks.get(mark.stream, mark).tokens and _reaches(target, mark, vocabulary):
            marks[mark.stream] = mark
    files.write(target / PROGRESS, b"".join(msgspec.json.encode(x) + b"\n" for x in (settings, *marks.values())))
    for path, size in _sizes(target, marks.values(), vocabulary):
        with open(path, "ab") as file:
            file.truncate(size)
    return marks


def _sizes(target: Path, marks: Any, vocabulary: Vocabulary) -> Iterator[tuple[Path, int]]:
    """The files of streams and the bytes that they have at these marks."""
    for mark in marks:
        yield target / f"{mark.stream}.tmp", mark.tokens * narrowest(vocabulary.size).itemsize
        yield target / f"{mark.stream}.{_ENDS}", mark.documents * 8


def _reaches(target: Path, mark: _Mark, vocabulary: Vocabulary) -> bool:
    """Whether the files of a stream hold what was written up to a mark."""
    if not all(file_size(path) >= size for path, size in _sizes(target, [mark], vocabulary)):
        return False
    path, size = next(_sizes(target, [mark], vocabulary))
    return _digest(path, size).hexdigest() == mark.sha256


def _digest(path: Path, size: int) -> Any:
    """Of the first bytes of a file, to go on with."""
    part = np.memmap(path, np.uint8, "r", 0, size) if size else np.empty(0, np.uint8)
    return hashlib.sha256(part.data)


def _write(
    target: Path, vocabulary: Vocabulary, units: Iterator[tuple[str, bool]], mark: _Mark, log: Any, keep: int
) -> None:
    """Appends the tokens of a stream from `mark` on, which moves along."""
    due = mark.tokens + keep
    digest = _digest(*next(_sizes(target, [mark], vocabulary)))  # of what is written, whoever else may write there
    with open(target / f"{mark.stream}.tmp", "ab") as file, open(target / f"{mark.stream}.{_ENDS}", "ab") as ends:
        for ids, characters, last in encoded(vocabulary, islice(units, mark.units, None)):
            file.write(ids.tobytes())
            digest.update(ids.tobytes())
            mark.units += 1
            mark.tokens += len(ids)
            mark.characters += characters
            if last:
                ends.write(np.int64(mark.tokens).astype("<i8").tobytes())
                mark.documents += 1
            if mark.tokens >= due:
                mark.sha256 = digest.hexdigest()
                _note(mark, log, file, ends)
                due = mark.tokens + keep
        mark.sha256 = digest.hexdigest()
        _note(mark, log, file, ends)


def _note(mark: _Mark, log: Any, *written: Any) -> None:
    """A line about what is on disk by now."""
    for file in written:
        file.flush()
        os.fsync(file.fileno())
    log.write(msgspec.json.encode(mark) + b"\n")
    log.flush()
    os.fsync(log.fileno())


def _finish(
    target: Path, settings: TokenSettings, vocabulary: Vocabulary, marks: dict[str, _Mark], divided: bool
) -> TokenInfo:
    """Cuts the one stream into splits, where there is but one, gives the files their names and describes the set."""
    kept = narrowest(vocabulary.size)
    if not all(_reaches(target, mark, vocabulary) for mark in marks.values()):
        raise UserError(f"{target} was changed by another program while it was written; {AGAIN}")
    spans = {name: (name, 0, mark.tokens) for name, mark in marks.items()}
    if divided:
        ends = np.fromfile(target / f"train.{_ENDS}", "<i8")
        at, further = cuts(ends, settings.valid_fraction, settings.test_fraction)
        total = marks["train"].tokens
        spans = {"train": ("train", 0, at), "valid": ("train", at, further), "test": ("train", further, total)}
    splits: dict[str, TokenFile] = {}
    for split in reversed(SPLITS):  # the training part last: of it alone the stream itself is kept
        stream, first, last = spans.get(split, ("", 0, 0))
        path, begun = target / f"{split}.bin", target / f"{stream or split}.tmp"
        moved = stream == split
        digest = _copy(begun, None if moved else path, first * kept.itemsize, last * kept.itemsize)
        if not divided:
            characters = marks[split].characters if split in marks else 0
        elif moved:
            characters = max(marks[stream].characters - sum(about.characters for about in splits.values()), 0)
        else:
            tokens = np.memmap(path, kept, "r") if last > first else np.empty(0, kept)
            characters = characters_of(vocabulary, tokens)
        splits[split] = TokenFile(path.name, last - first, characters, digest)
    vocabulary.save(target)
    for split, (stream, _, last) in spans.items():
        if stream == split:
            os.truncate(target / f"{stream}.tmp", last * kept.itemsize)
            os.replace(target / f"{stream}.tmp", target / f"{split}.bin")
    documents = sum(mark.documents for mark in marks.values())
    info = TokenInfo(settings, kept.str, vocabulary.size, documents, {split: splits[split] for split in SPLITS})
    files.write(target / INFO, msgspec.json.format(msgspec.json.encode(info), indent=1) + b"\n")
    (target / PROGRESS).unlink()
    for name in marks:
        (target / f"{name}.{_ENDS}").unlink()
    return info


def _copy(source: Path, dest: Path | None, first: int, last: int) -> str:
    """Copies bytes [first, last) of a file where `dest` is given; their sha256."""
    part = np.memmap(source, np.uint8, "r", first, last - first) if first < last else np.empty(0, np.uint8)
    if dest is not None:
        with files.whole(dest) as path:
            part.tofile(path)
    return files.sha256(part.data)
