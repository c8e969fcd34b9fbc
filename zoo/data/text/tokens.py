"""Texts as tokens: a file or a folder of texts, a set made by `zoo prepare text`, the standard library's docstrings.

Every source here gives `tokens` int32 [T], windows at fixed offsets of one long row: `train` is its first part, `valid`
the next, `test` the last, unless the files' names say what they are.
"""

from __future__ import annotations

import ast
import gc
import re
import sysconfig
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import jax
import msgspec
import numpy as np

from zoo.data.documents import SPLITS, check_fractions, cuts, list_texts, pieces
from zoo.data.folders import existing
from zoo.data.pipeline import Data, Source
from zoo.data.records import AGAIN, is_prepared, read_info
from zoo.data.text import vocabulary as vocabularies
from zoo.data.text.vocabulary import Vocabulary, normalise
from zoo.errors import UserError
from zoo.fields import Below1, NotEmpty
from zoo.files import sha256

SpecOf = Mapping[str, jax.ShapeDtypeStruct]
_LOCK = threading.Lock()  # several threads open a source at once, and one of them encodes the text


class TokenFile(msgspec.Struct):
    """One split on disk: numbers of the set's dtype, one after the other."""

    file: str
    count: int
    characters: int
    sha256: str


class TokenSettings(msgspec.Struct):
    """What a set was made from and how."""

    source: str  # name only, for people
    fingerprint: str  # of the names and contents of its files
    vocabulary: str  # the kind, or the name of the tokenizer's file
    digest: str  # of the vocabulary
    valid_fraction: float
    test_fraction: float


class TokenInfo(msgspec.Struct):
    """`info.json` of a set of tokens; the vocabulary lies beside it."""

    FORMAT: ClassVar[str] = "zoo-tokens"
    VERSION: ClassVar[int] = 1

    settings: TokenSettings
    dtype: str
    size: int  # of the vocabulary
    documents: int
    splits: dict[str, TokenFile]
    format: str = FORMAT
    version: int = VERSION


@dataclass(frozen=True)
class Text(Data):
    """A text by path: a file (.txt, .gz, .zip, .jsonl, .parquet), a folder of such, or a set made by `zoo prepare text`.

    `tokenizer` is "text8" (27 symbols), "chars" (the characters that the text has), "bytes", or the path of a
    tokenizer.json or of a sentencepiece model; None: what a prepared set was made with, else text8. A text that is not
    prepared is encoded when it is first opened and kept in memory.
    """

    path: NotEmpty
    tokenizer: str | None = None
    normalise: bool = True  # to the 27 symbols of text8; False: it has to consist of them
    valid_fraction: Below1 = 0.05  # of the tokens, where neither the files nor a prepared set say it
    test_fraction: Below1 = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fractions(self.valid_fraction, self.test_fraction)

    def source(self, split: str, spec: SpecOf | None = None) -> TokenSource:
        """The windows of a split; their length is that of the task's `tokens`."""
        return _windows(self._corpus(), self, split, spec)

    def vocabulary(self) -> Vocabulary:
        """What the tokens mean."""
        return self._corpus().vocabulary

    def fingerprint(self, split: str) -> str:
        """What the tokens of a split are, wherever the text lies."""
        return self._corpus().fingerprint(split)

    def _corpus(self) -> Corpus:
        root = existing(self.path)
        if root.is_dir() and is_prepared(root):
            return _prepared(root, self.tokenizer)
        files = list_texts(root)
        stamps = tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for some in files.values() for file in some)
        how = self.tokenizer or "text8", self.normalise, self.valid_fraction, self.test_fraction
        with _LOCK:
            return _encoded(root, *how, stamps)


@dataclass(frozen=True)
class Docstrings(Data):
    """What the Python standard library says of itself: docstrings and the texts of `help()`, in the 27 symbols of text8.

    About a million characters that every machine has; they differ a little between versions of Python, so that a run goes
    on with the Python that began it. No module is imported for them.
    """

    def source(self, split: str, spec: SpecOf | None = None) -> TokenSource:
        """The windows of a split; their length is that of the task's `tokens`."""
        return _windows(self._corpus(), self, split, spec)

    def vocabulary(self) -> Vocabulary:
        """The 27 symbols of text8."""
        return vocabularies.text8()

    def fingerprint(self, split: str) -> str:
        """What the tokens of a split are."""
        return self._corpus().fingerprint(split)

    def _corpus(self) -> Corpus:
        with _LOCK:
            return _docstrings()


class TokenSource(Source):
    """Windows of T tokens, one after the other; what is left over at the end is not read."""

    labels: tuple[str, ...] = ()

    def __init__(self, tokens: np.ndarray, length: int, vocabulary: Vocabulary, characters: int, name: str) -> None:
        self.tokens = tokens  # [N] of an unsigned type, the whole split
        self.length = length
        self.vocabulary = vocabulary
        self.characters = characters  # of the text that the N tokens stand for
        self._name = name

    @property
    def characters_per_token(self) -> float:
        """How many characters of text a token stands for on average."""
        return self.characters / len(self.tokens)

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        window = np.asarray(self.tokens[index * self.length : (index + 1) * self.length], np.int32)
        if (most := int(window.max())) >= self.vocabulary.size:
            raise UserError(
                f"{self._name} is damaged: window {index} has the token {most}, and its vocabulary ends at "
                f"{self.vocabulary.size - 1}; {AGAIN}"
            )
        return {"tokens": window}


def check_vocabulary(task: Any, source: Source) -> None:
    """UserError when the task's vocabulary is not of as many symbols as the data have, or these have no letters for captions."""
    vocabulary, vocab = source.vocabulary, task.about.vocabulary
    if vocab is not None and task.about.captions is not None:
        if vocabulary is None:
            raise UserError(
                "task.captions='letters' takes captions of letters, and the data have none; give data such as "
                "Captioned(Digits()), or another task.captions"
            )
        if vocab != vocabulary.size:
            raise UserError(
                f"the captions of the data have {vocabulary.size} letters, and task.text_width={vocab + 1} is of {vocab} and one "
                f"for none; set task.text_width={vocabulary.size + 1}"
            )
    if vocabulary is not None and vocab is not None and vocab != vocabulary.size:
        raise UserError(f"the data has {vocabulary.size} symbols, task.vocab={vocab}; set task.vocab={vocabulary.size}")


def check_ids(tokens: Any, least: int, vocab: int | None, what: str) -> None:
    """UserError for tokens that are no whole numbers in [least, vocab)."""
    ids = np.asarray(tokens)
    if vocab is not None and (ids.dtype.kind not in "iu" or ((ids < least) | (ids >= vocab)).any()):
        raise UserError(f"{what}: tokens must be whole numbers from {least} to {vocab - 1}")


# From texts to tokens


@dataclass(frozen=True)
class Corpus:
    """All of a text: tokens of an unsigned type by split, and how many characters they stand for."""

    name: str
    vocabulary: Vocabulary
    splits: dict[str, np.ndarray]
    characters: dict[str, int]
    digests: tuple[tuple[str, str], ...] = ()  # of the files of a prepared set
    remedy: str = "give more text"  # what to do where it lacks a {split}

    def fingerprint(self, split: str) -> str:
        """A digest of the tokens of a split and of what they mean."""
        check_split(split)
        known = dict(self.digests).get(split)
        digest = known or sha256(np.ascontiguousarray(self.splits[split]).data)
        return sha256(f"{digest} {self.splits[split].dtype} {self.vocabulary.digest}")


def check_split(split: str) -> None:
    """UserError for a split of an unknown name."""
    if split not in SPLITS:
        raise UserError(f"split={split!r} is unknown; choose 'train', 'valid' or 'test'")


def _windows(corpus: Corpus, data: Text | Docstrings, split: str, spec: SpecOf | None) -> TokenSource:
    check_split(split)
    kind = type(data).__name__
    if spec is None:
        raise UserError(
            f"{kind} cuts a text into sequences of the task's length and got no spec; pass spec=task.spec(batch)"
        )
    if "tokens" not in spec:
        raise UserError(
            f"data={kind} gives 'tokens', and the task wants {', '.join(map(repr, spec))}; use a task of texts, or other data"
        )
    length, tokens = int(spec["tokens"].shape[1]), corpus.splits[split]
    if not len(tokens):
        way = "give more text" if split == "train" else corpus.remedy.format(split=split)
        raise UserError(f"{corpus.name} has no {split} part; {way}, or choose another split")
    if len(tokens) < length:
        raise UserError(
            f"{corpus.name} has {len(tokens):,} tokens in its {split} part, fewer than the {length:,} of one sequence; set "
            f"task.length={len(tokens)} or less, or give more text"
        )
    return TokenSource(tokens, length, corpus.vocabulary, corpus.characters[split], corpus.name)


def narrowest(size: int) -> np.dtype:
    """The type that tokens of a vocabulary of this size are kept as."""
    return np.dtype("<u2" if size <= 1 << 16 else "<u4")


def texts(
    vocabulary: Vocabulary, documents: Iterable[tuple[str, bool]], as_is: bool = False
) -> Iterator[tuple[str, bool]]:
    """Pieces of documents in the symbols of the vocabulary, with what stands between two of them put before the second.

    `as_is` leaves the pieces of a document as they are, where the rule of text8 puts a blank between any two.
    """
    begun, fresh = False, True  # whether there is any text yet, and none yet of this document
    words = vocabulary.name == "text8" and not as_is
    for text, last in documents:
        text = text if as_is else vocabulary.normalise(text)
        if text:
            yield (vocabulary.between if begun and (fresh or words) else "") + text, last
            begun, fresh = True, False
        elif last and not fresh:
            yield "", True
        fresh = fresh or last


def encoded(vocabulary: Vocabulary, units: Iterable[tuple[str, bool]]) -> Iterator[tuple[np.ndarray, int, bool]]:
    """Tokens of what `texts` gives, the number of characters, and whether a document ends there; its end token included."""
    kept = narrowest(vocabulary.size)
    for some in _together(units):
        for ids, (text, last) in zip(vocabulary.encode_all([text for text, _ in some]), some):
            if last and vocabulary.end is not None:
                ids = np.append(ids, np.int32(vocabulary.end))
            yield ids.astype(kept), len(text), last


def _together(units: Iterable[tuple[str, bool]], most: int = 1 << 22) -> Iterator[list[tuple[str, bool]]]:
    """Units in lists of about so many characters: enough for threads, little for a tokenizer's memory."""
    some, size = [], 0
    for unit in units:
        some.append(unit)
        size += len(unit[0])
        if size >= most:
            yield some
            some, size = [], 0
    if some:
        yield some


def characters_of(vocabulary: Vocabulary, tokens: np.ndarray) -> int:
    """How many characters tokens stand for, end tokens not counted."""
    if vocabulary.name in ("text8", "chars"):
        return len(tokens)
    found = 0
    for first in range(0, len(tokens), 1 << 20):
        part = tokens[first : first + (1 << 20)]
        found += len(vocabulary.decode(part if vocabulary.end is None else part[part != vocabulary.end]))
    return found


def documents_of(files: Iterable[Path], read: Callable[[int], Any] = int) -> Iterator[tuple[str, bool]]:
    """The pieces of all documents of these files; `read` is told the bytes of each."""
    for file in files:
        for text, last in pieces(file):
            read(len(text.encode()))
            yield text, last


def symbols_of(files: Iterable[Path]) -> str:
    """The distinct characters of all documents of these files, and the newline that stands between two documents."""
    found: set[str] = set()
    documents = 0
    for text, last in documents_of(files):
        found.update(text)
        documents += last
    return "".join(sorted(found | {"\n"} if documents > 1 else found))


def nothing(root: Path, vocabulary: Vocabulary) -> UserError:
    """What to say of a text without a token."""
    if vocabulary.name == "text8":
        return UserError(
            f"{root} has no letter and no digit, so that nothing of it is left in the 27 symbols of text8; give a text"
        )
    return UserError(f"{root} is empty; give a text")


def _refuse_foreign(vocabulary: Vocabulary, file: Path) -> None:
    """UserError where a file has characters that the vocabulary has not: how many, and the first of them."""
    count, at = 0, 0
    some: list[tuple[str, int]] = []
    for text, _ in pieces(file):
        places = vocabulary.foreign(text)
        some += [(text[i], at + i) for i in places[: vocabularies.SHOWN + 1 - len(some)].tolist()]
        count, at = count + len(places), at + len(text)
    if count:
        raise UserError(vocabulary.refusal(str(file), count, some))


@lru_cache(maxsize=2)
def _encoded(
    root: Path, tokenizer: str, normalised: bool, valid_fraction: float, test_fraction: float, stamps: Any
) -> Corpus:
    """Of files with these `stamps`: a text that was written again is another one."""
    files = list_texts(root)
    every = [file for some in files.values() for file in some]
    symbols = symbols_of(every) if tokenizer == "chars" else ""
    if tokenizer == "chars" and not symbols:
        raise UserError(f"{root} is empty; give a text")
    vocabulary = vocabularies.named(tokenizer, symbols, "data.tokenizer=")
    as_is = vocabulary.name == "text8" and not normalised
    if as_is:
        for file in every:
            _refuse_foreign(vocabulary, file)
    found, characters, marks = {}, {}, {}
    for split, some in files.items():
        parts, total, ends, count = [np.empty(0, narrowest(vocabulary.size))], 0, array("q"), 0
        for ids, length, last in encoded(vocabulary, texts(vocabulary, documents_of(some), as_is)):
            parts.append(ids)
            total, count = total + length, count + len(ids)
            if last:
                ends.append(count)
        found[split], characters[split], marks[split] = np.concatenate(parts), total, np.asarray(ends)
    if not any(map(len, found.values())):
        raise nothing(root, vocabulary)
    if None in found:
        tokens, total = found[None], characters[None]
        at, further = cuts(marks[None], valid_fraction, test_fraction)
        splits = {"train": tokens[:at], "valid": tokens[at:further], "test": tokens[further:]}
        lengths = {split: characters_of(vocabulary, splits[split]) for split in ("valid", "test")}
        lengths = {"train": max(total - sum(lengths.values()), 0), **lengths}
        return Corpus(str(root), vocabulary, splits, lengths, remedy="set a larger data.{split}_fraction")
    splits, lengths = {str(k): v for k, v in found.items()}, {str(k): n for k, n in characters.items()}
    return Corpus(str(root), vocabulary, splits, lengths, remedy="add a file {split}.txt")


def _prepared(root: Path, tokenizer: str | None) -> Corpus:
    """A set on disk, its tokens mapped into memory."""
    info = read_info(root, TokenInfo)
    vocabulary = vocabularies.open_vocabulary(root)
    if vocabulary is None or (vocabulary.digest, vocabulary.size) != (info.settings.digest, info.size):
        what = "is missing" if vocabulary is None else "is not the one that the set was made with"
        raise UserError(f"{root / vocabularies.FILE} {what}; {AGAIN}")
    if tokenizer is not None and tokenizer != vocabulary.name:
        other = None if tokenizer == "chars" else vocabularies.named(tokenizer, field="data.tokenizer=")
        if other != vocabulary:
            raise UserError(
                f"{root} was prepared with {info.settings.vocabulary} ({info.size:,} symbols), and data.tokenizer={tokenizer} is "
                "another one; leave data.tokenizer out, or prepare the text anew with it"
            )
    kept, splits = np.dtype(info.dtype), {}
    for split in SPLITS:
        about = info.splits[split]
        path = root / about.file
        there = path.stat().st_size if path.is_file() else 0
        if there != about.count * kept.itemsize:
            raise UserError(f"{path} has {there} bytes in place of {about.count * kept.itemsize}; {AGAIN}")
        splits[split] = np.memmap(path, kept, "r") if about.count else np.empty(0, kept)
    characters = {split: about.characters for split, about in info.splits.items()}
    digests = tuple((split, about.sha256) for split, about in info.splits.items())
    remedy = "prepare it anew from files of which one is {split}.txt, or from others with a larger --{split}-fraction"
    return Corpus(str(root), vocabulary, splits, characters, digests, remedy)


# The standard library

# Modules and packages rich in docstrings, of every Python that zoo runs on: to read all of the library takes too long.
_MODULES = (
    "_collections_abc _pydecimal _strptime _threading_local base64 bdb bz2 cmd code codecs compileall configparser contextlib "
    "copy difflib doctest email filecmp fileinput fractions getopt gzip heapq http inspect ipaddress json logging lzma numbers "
    "operator optparse os pkgutil queue random sched selectors shelve shutil smtplib socketserver statistics tempfile textwrap "
    "threading timeit tkinter traceback turtle typing urllib uuid wave weakref wsgiref xmlrpc"
)


@lru_cache(maxsize=1)
def _docstrings() -> Corpus:
    vocabulary = vocabularies.text8()
    # what is said twice is taken once, or the parts would share it
    said = (normalise(part) for text in _library() for part in re.split(r"\n\s*\n", text))
    text = " ".join(part for part in dict.fromkeys(said) if part)
    if not text:
        raise UserError(
            "the standard library of this Python has no docstrings beside it (no .py files); give a text of your own with "
            "data=Text(path)"
        )
    tokens = vocabulary.encode(text).astype(narrowest(vocabulary.size))
    at, further = cuts(np.array([len(tokens)]), 0.05, 0.05)
    splits = {"train": tokens[:at], "valid": tokens[at:further], "test": tokens[further:]}
    return Corpus("the standard library", vocabulary, splits, {split: len(some) for split, some in splits.items()})


def _library() -> list[str]:
    """What each module says, and each topic of `help()`, in a fixed order that mixes them."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, str] = {}
    collecting = gc.isenabled()
    gc.disable()  # it would go through the syntax trees again and again
    try:
        for module in _MODULES.split():
            for path in sorted((root / module).rglob("*.py")) if (root / module).is_dir() else [root / f"{module}.py"]:
                if not {"test", "tests"} & set(path.parts):
                    found[path.relative_to(root).as_posix()] = "\n\n".join(_said(_tree(path)))
        topics = _tree(root / "pydoc_data" / "topics.py")
        texts = [node.value for node in ast.walk(topics) if isinstance(node, ast.Constant)]
        found |= {f"topic {text[:80]}": text for text in texts if isinstance(text, str) and "\n" in text}
    finally:
        if collecting:
            gc.enable()
    return [found[name] for name in sorted(found, key=sha256)]


def _tree(path: Path) -> ast.Module:
    """The syntax of a file; nothing where this Python has not got it."""
    try:
        return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ast.Module([], [])


def _said(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """The docstrings of a module, and of the classes and functions in it, in their order."""
    if text := ast.get_docstring(node, clean=False):
        yield text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _said(child)
