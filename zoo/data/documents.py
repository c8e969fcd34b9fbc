"""Text files as documents: .txt, .gz, .zip, JSON lines and parquet, read piece by piece.

A plain file (also within .gz or .zip) is one document; a line of a .jsonl file or a row of a parquet file is one each,
its text under "text". A long document comes in pieces, so that none has to fit into memory.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from zoo.data.sources import walk
from zoo.data.vocabulary import characters_only
from zoo.errors import UserError
from zoo.files import first_line

SPLITS = ("train", "valid", "test")
PIECE = 1 << 20  # characters of a document that are read at a time
_WORDS = {"validation": "valid", "val": "valid", "dev": "valid"}  # what files may call their splits
_KINDS = {".txt": "text", ".jsonl": "lines", ".ndjson": "lines", ".parquet": "parquet"}
_PACKED = (".gz", ".zip")


def list_texts(origin: Path) -> dict[str | None, list[Path]]:
    """The text files of a place by split where their names tell it (`train.txt`, `valid/0.txt`), else all under None.

    Raises:
      UserError: there is none, or files of several kinds, or one twice (packed and unpacked), or some name a split and some
        do not, or none names train where others name valid or test.
    """
    if not origin.is_dir():
        return {None: [origin]}
    names = [name for name in walk(origin) if _kind(name) is not None]
    if not names:
        raise UserError(
            f"{origin} holds no text; expected files that end in .txt, .jsonl or .parquet (or .txt.gz, .jsonl.gz, .zip)"
        )
    kinds = {_kind(name): name for name in reversed(names)}
    if len(kinds) > 1:
        raise UserError(
            f"{origin} holds files of several kinds ({' beside '.join(sorted(kinds.values()))}); give the folder of one kind, or "
            "move the others out"
        )
    _refuse_twins(origin, names)
    words = [_word(name) for name in names]
    if not any(words):
        return {None: [origin / name for name in names]}
    named, other = (
        next(name for name, word in zip(names, words) if word),
        next((name for name, word in zip(names, words) if not word), None),
    )
    if "train" not in words:
        raise UserError(
            f"{origin}: {named} names the split {_word(named)}, and no file names train"
            f"{'' if other is None else f' ({other} names none)'}; call the text to train on train.txt or put it into a folder "
            f"train, or give {named} another name where it is no such part"
        )
    if other is not None:
        raise UserError(
            f"{origin}: {named} names its split and {other} names none (train, valid or test); name it too, or move it out"
        )
    return {split: [origin / name for name, word in zip(names, words) if word == split] for split in SPLITS}


def _refuse_twins(origin: Path, names: list[str]) -> None:
    """UserError where two files differ in their packing alone: the same text would be in two splits."""
    seen: dict[str, str] = {}
    for name in names:
        stem, suffix = os.path.splitext(name)
        packed = suffix.lower() in _PACKED
        first, last = os.path.splitext(stem if packed else name)
        plain = first if last.lower() in _KINDS else stem  # a.txt, a.txt.gz and a.zip are all a
        twin = seen.setdefault(plain, name)
        if twin != name and (packed or twin.lower().endswith(_PACKED)):
            raise UserError(
                f"{origin} holds {twin} and {name}, which differ in their packing alone, so that one text would be read twice; "
                "remove one of them, or rename it where it is another text"
            )


def _kind(name: str) -> str | None:
    stem, suffix = os.path.splitext(name.lower())
    if suffix in _PACKED:
        return _KINDS.get(os.path.splitext(stem)[1], "text")
    return _KINDS.get(suffix)


def _word(name: str) -> str | None:
    """The split that the path of a file names: its folder, or the first or the last word of its own name."""
    *folders, last = Path(name.lower()).parts
    parts = re.split(r"[-_.]", os.path.splitext(last.removesuffix(".gz").removesuffix(".zip"))[0])
    words = (_WORDS.get(word, word) for word in (*folders, parts[0], parts[-1]))
    return next((word for word in words if word in SPLITS), None)


def pieces(path: Path) -> Iterator[tuple[str, bool]]:
    """The text of a file in pieces of about `PIECE` characters, each with whether a document ends with it.

    Line ends become newlines, a byte order mark is left out. Pieces end where a line does, or before a blank.

    Raises:
      UserError: it cannot be read, is no UTF-8, or has another layout.
    """
    if is_plain(path):
        with _readable(path), _open(path) as file:
            yield from _cut(_decoded(path, file))
        return
    for _, (text,) in rows(path, ("text",)):
        yield from _cut(iter([(text or "").replace("\r\n", "\n").replace("\r", "\n")]))


def is_plain(path: Path) -> bool:
    """Whether a file is one document, not one for each line or row."""
    return (_kind(path.name) or "text") == "text"


def rows(path: Path, keys: tuple[str, ...]) -> Iterator[tuple[int, tuple[str | None, ...]]]:
    """Number and texts of each line of a .jsonl file or row of a parquet file; None where a row of parquet has none.

    Raises:
      UserError: it cannot be read, or has no text under one of these keys.
    """
    with _readable(path):
        if _kind(path.name) == "parquet":
            yield from _rows(path, keys)
            return
        with _open(path) as file:
            yield from _lines(path, file, keys)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # among them what gzip says of a damaged file
        raise UserError(f"{path} cannot be read ({error.strerror or first_line(error)}); restore it") from None
    except (EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path} cannot be unpacked ({first_line(error)}); restore it, or unpack it first") from None


def _open(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if suffix != ".zip":
        return open(path, "rb")
    with zipfile.ZipFile(path) as packed:
        members = [info for info in packed.infolist() if not info.is_dir()]
        if len(members) != 1:
            raise UserError(f"{path} holds {len(members)} files in place of one; unpack it and give the folder")
        return packed.open(members[0])


def _decoded(path: Path, file: IO[bytes]) -> Iterator[str]:
    """Blocks of the text of a file."""
    inner = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(inner, translate=True)
    at = 0
    while True:
        block = file.read(PIECE)
        before = at - len(inner.getstate()[0])
        at += len(block)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is no text in UTF-8 (byte {before + error.start:,} is 0x{error.object[error.start]:02x}); if it is a "
                "text, write it again as UTF-8 (iconv -f latin1 -t utf-8), else give another file"
            ) from None
        if "\0" in text:
            raise UserError(f"{path} is no text but a binary file (it has bytes of value 0); give a text in UTF-8")
        if text:
            yield text
        if not block:
            return


def _cut(blocks: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """Blocks of one document to its pieces."""
    held = ""
    for block in blocks:
        held += block
        while len(held) > PIECE:
            line, blank = held.rfind("\n", 0, PIECE) + 1, held.rfind(" ", 1, PIECE)
            at = line or (blank if blank > 0 else PIECE)
            yield held[:at], False
            held = held[at:]
    if held:
        yield held, True


def _lines(path: Path, file: IO[bytes], keys: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number:,} is no JSON ({first_line(error)}); mend or remove it") from None
        except RecursionError:
            raise UserError(f"{path}, line {number:,} is JSON nested too deep to be read; mend or remove it") from None
        texts = []
        for key in keys:
            text = row.get(key) if isinstance(row, dict) else None
            if not isinstance(text, str):
                raise UserError(f'{path}, line {number:,} has no text under "{key}"; mend or remove it')
            texts.append(characters_only(text))  # JSON can spell half a character ("\ud800")
        yield number, tuple(texts)


def _rows(path: Path, keys: tuple[str, ...]) -> Iterator[tuple[int, tuple[str | None, ...]]]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            kinds = {field.name: field.type for field in file.schema_arrow}
            for key in keys:
                if key not in kinds:
                    raise UserError(
                        f"{path} has no column '{key}' (it has {', '.join(kinds)}); rename the one with the text"
                    )
                if not _is_text(kinds[key]):
                    raise UserError(f"{path}: its column '{key}' holds {kinds[key]} and no text; give other files")
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=list(keys)):
                for texts in zip(*(batch.column(key).to_pylist() for key in keys)):
                    number += 1
                    yield number, texts
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{path} is no parquet file that can be read ({first_line(error)}); restore or remove it"
        ) from None


def _is_text(kind: Any) -> bool:
    import pyarrow

    views = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    return any(is_such(kind) for is_such in views)


def cuts(ends: np.ndarray, valid_fraction: float, test_fraction: float) -> tuple[int, int]:
    """Where the validation and the test part of a text begin, which are its last parts.

    Both lie at the end of a document where that leaves each part between half and one and a half of its share.

    Args:
      ends: int [documents], the number of tokens up to the end of each.
    """
    total = int(ends[-1]) if len(ends) else 0
    valid, test = round(total * valid_fraction), round(total * test_fraction)
    exact = (total - test - valid, total - test)
    marks = np.concatenate([[0], ends])
    first, second = (int(marks[np.abs(marks - at).argmin()]) for at in exact)
    fits = abs(second - first - valid) <= valid / 2 and abs(total - second - test) <= test / 2
    return (first, second) if fits else exact


def check_fractions(valid: float, test: float) -> None:
    """UserError unless the shares leave something to train on."""
    for name, value in (("valid_fraction", valid), ("test_fraction", test)):
        if not 0 <= value < 1:
            raise UserError(f"{name}={value} is no share of the text; choose 0 <= {name} < 1")
    if valid + test >= 1:
        raise UserError(f"valid_fraction={valid} and test_fraction={test} leave nothing to train on; choose less")
