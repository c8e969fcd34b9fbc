"""Text files as documents: plain text, JSON and parquet, packed or not, read piece by piece.

A plain file is one document; a line of a .jsonl file, an element of a JSON array or a row of a parquet file is one each, its
text under "text". A long document comes in pieces, so that none has to fit into memory. What a file is, its first bytes and
the name of what is packed in it say, not its own name alone: markup is never taken for text.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from zoo.data.folders import KINDS, some, tell, walk
from zoo.data.text.vocabulary import characters_only
from zoo.errors import UserError
from zoo.files import check_head, first_line

SPLITS = ("train", "valid", "test")
PIECE = 1 << 20  # characters of a document that are read at a time
# what files may call their splits
_WORDS = {word: kind if kind in ("train", "test") else "valid" for word, kind in KINDS.items()}
_KINDS = {
    ".txt": "text",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "lines",
    ".parquet": "parquet",
    ".csv": "table",
    ".tsv": "table",
}


def _zstd(file: Any) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(file, "zstd")


_PACKERS: dict[str, tuple[bytes, Callable[[Any], Any]]] = {  # by suffix: first bytes, and what unpacks
    ".gz": (b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file)),
    ".bz2": (b"BZh", bz2.BZ2File),
    ".xz": (b"\xfd7zXZ", lzma.LZMAFile),
    ".zst": (b"\x28\xb5\x2f\xfd", _zstd),
    ".zip": (b"PK\3\4", zipfile.ZipFile),
}
PACKED = tuple(_PACKERS)
_OTHERS = {b"PAR1": "parquet", b"%PDF": "PDF", b"\x89PNG": "image", b"\xff\xd8\xff": "image"}
_HEAD = 1 << 12  # bytes by which a file is known


def list_texts(origin: Path) -> dict[str | None, list[Path]]:
    """The text files of a place by split where their names tell it (`train.txt`, `valid/0.txt`), else all under None.

    Raises:
      UserError: there is none, or files of several kinds, or one twice (packed and unpacked), or some name a split and some
        do not, or none names train where others name valid or test.
    """
    if not origin.is_dir():
        return {None: [origin]}
    there = walk(origin)
    names = [name for name in there if _kind(name) not in (None, "table") and not name.lower().endswith(".json")]
    names = names or [name for name in there if name.lower().endswith(".json")]  # else they tell about the others
    if not names:
        raise UserError(
            f"{origin} holds no text; expected files that end in .txt, .jsonl, .json or .parquet (or .txt.gz, .jsonl.zst, .zip)"
        )
    over = Counter(os.path.splitext(name)[1].lower() or "without a suffix" for name in {*there} - {*names})
    if over:
        tell(f"{origin}: passed over: {some([f'{n} {end}' for end, n in over.most_common()])}, which are no texts")
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
    named = next(name for name, word in zip(names, words) if word)
    other = next((name for name, word in zip(names, words) if not word), None)
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
        packed = suffix.lower() in PACKED
        first, last = os.path.splitext(stem if packed else name)
        plain = first if last.lower() in _KINDS else stem  # a.txt, a.txt.gz and a.zip are all a
        twin = seen.setdefault(plain, name)
        if twin != name and (packed or twin.lower().endswith(PACKED)):
            raise UserError(
                f"{origin} holds {twin} and {name}, which differ in their packing alone, so that one text would be read twice; "
                "remove one of them, or rename it where it is another text"
            )


def _kind(name: str) -> str | None:
    stem, suffix = os.path.splitext(name.lower())
    if suffix in PACKED:
        return _KINDS.get(os.path.splitext(stem)[1], "text")
    return _KINDS.get(suffix)


def _word(name: str) -> str | None:
    """The split that the path of a file names: its folder, or the first or the last word of its own name."""
    *folders, last = Path(name.lower()).parts
    stem, suffix = os.path.splitext(last)
    parts = re.split(r"[-_.]", os.path.splitext(stem if suffix in PACKED else last)[0])
    # c4-train.00000-of-00001, wiki.test.tokens
    named = [part for part in parts if not part.isdigit() and part not in ("of", "tokens", "raw")] or parts
    words = (_WORDS.get(word, word) for word in (*folders, named[0], named[-1]))
    return next((word for word in words if word in SPLITS), None)


def pieces(path: Path) -> Iterator[tuple[str, bool]]:
    """The text of a file in pieces of about `PIECE` characters, each with whether a document ends with it.

    Line ends become newlines, a byte order mark is left out. Pieces end where a line does, or before a blank.

    Raises:
      UserError: it cannot be read, is no UTF-8, or has another layout.
    """
    if is_plain(path):
        with _opened(path) as (_, file):
            yield from _cut(_decoded(path, file))
        return
    for _, (text,) in rows(path, ("text",)):
        yield from _cut(iter([(text or "").replace("\r\n", "\n").replace("\r", "\n")]))


def is_plain(path: Path) -> bool:
    """Whether a file is one document, not one for each line, element or row. UserError where it is neither."""
    with _opened(path) as (kind, _):
        return kind == "text"


def rows(path: Path, keys: tuple[str, ...]) -> Iterator[tuple[int, tuple[str | None, ...]]]:
    """Number and texts of each line of a .jsonl file, element of a JSON array or row of a parquet file; None where a row of
    parquet has none.

    Raises:
      UserError: it cannot be read, or has no text under one of these keys.
    """
    with _opened(path) as (kind, file):
        yield from _rows(path, keys) if kind == "parquet" else _lines(path, file, keys)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[str, io.BufferedReader]]:
    """What a file holds ("text", "lines" or "parquet"), and its bytes, unpacked."""
    try:
        with contextlib.ExitStack() as held:
            file, name, inside = held.enter_context(open(path, "rb")), path.name, False
            while True:
                head = file.peek(_HEAD)[:_HEAD]
                suffix = next((end for end, (magic, _) in _PACKERS.items() if head.startswith(magic)), None)
                if suffix is None:
                    break
                inside = True
                stem, last = os.path.splitext(name)
                name, packed = stem if last.lower() == suffix else name, held.enter_context(_PACKERS[suffix][1](file))
                if suffix == ".zip":
                    name, packed = _member(path, packed)
                    held.enter_context(packed)
                file = held.enter_context(io.BufferedReader(packed, max(io.DEFAULT_BUFFER_SIZE, _HEAD)))
            if name.lower().endswith(PACKED):
                raise UserError(f"{path} cannot be read or unpacked (its first bytes are no packed file's); restore it")
            yield _told(path, name, head, inside), file
    except OSError as error:  # among them what gzip says of a damaged file
        raise UserError(f"{path} cannot be read ({error.strerror or first_line(error)}); restore it") from None
    except (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path} cannot be unpacked ({first_line(error)}); restore it, or unpack it first") from None


def _member(path: Path, packed: zipfile.ZipFile) -> tuple[str, Any]:
    """The name and the bytes of the one file in a .zip file; what macOS and others hide in it does not count."""
    found = [info for info in packed.infolist() if not info.is_dir()]
    members = [info for info in found if not re.search(r"(^|/)(\.|__MACOSX)", info.filename)]
    if len(members) != 1:
        raise UserError(f"{path} holds {len(members)} files in place of one; unpack it and give the folder")
    return members[0].filename, packed.open(members[0])


def _told(path: Path, name: str, head: bytes, inside: bool) -> str:
    """What bytes are that begin with `head`, in a file of that name (the last of what was packed). UserError for what is no text."""
    check_head(path, head)
    if packed := next((what for magic, what in _OTHERS.items() if head.startswith(magic)), None):
        if packed == "parquet" and not inside:
            return packed
        raise UserError(f"{path} holds a file of the kind {packed}; unpack it, or give a text")
    kind = _KINDS.get(os.path.splitext(name.lower())[1])
    if kind == "table":
        raise UserError(f"{path} holds a table, and its separators are no text; write its texts as .jsonl or parquet")
    if head[257:262] == b"ustar":
        raise UserError(f"{path} is a tar file; unpack it and give the folder")
    looks = re.match(rb"(\xef\xbb\xbf)?\s*(\{\s*\"|\[\s*\{\s*\")", head)
    return "lines" if looks else kind or "text"


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
            raise UserError(
                f"{path} is no text but a binary file, or UTF-16 (it has bytes of value 0); give a text in UTF-8"
            )
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


def _lines(path: Path, file: io.BufferedReader, keys: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    array = re.match(rb"(\xef\xbb\xbf)?\s*\[", file.peek(_HEAD))
    for number, line in enumerate([file.read()] if array else file, 1):
        if not line.strip():
            continue
        at = path if array else f"{path}, line {number:,}"
        try:
            found = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{at} is no JSON ({first_line(error)}); mend or remove it (one object a line, or one array of objects)"
            ) from None
        except RecursionError:
            raise UserError(f"{at} is JSON nested too deep to be read; mend or remove it") from None
        for element, row in enumerate(found if array and isinstance(found, list) else [found], number):
            texts = []
            for key in keys:
                text = row.get(key) if isinstance(row, dict) else None
                if not isinstance(text, str):
                    where = f"{path}, element {element:,}" if array else at
                    raise UserError(f'{where} has no text under "{key}"; mend or remove it')
                texts.append(characters_only(text))  # JSON can spell half a character ("\ud800")
            yield element, tuple(texts)


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
                if not is_text(kinds[key]):
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


def is_text(kind: Any) -> bool:
    """Whether a column of this Arrow type holds texts."""
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
    if valid + test >= 1:
        raise UserError(f"valid_fraction={valid} and test_fraction={test} leave nothing to train on; choose less")
