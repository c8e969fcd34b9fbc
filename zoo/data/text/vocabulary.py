"""What the numbers of a text mean: 27 symbols as text8 has them, characters, bytes, or a tokenizer from a file.

A vocabulary is saved beside what was made with it: `vocabulary.json`, and of a tokenizer its own file.
"""

from __future__ import annotations

import importlib
import logging
import re
import string
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
from etils import epath

from zoo import files
from zoo.errors import UserError, suggest
from zoo.files import first_line, sha256

FILE = "vocabulary.json"
KINDS = ("text8", "chars", "bytes")
_FILES = {".json": "tokenizer.json", ".model": "tokenizer.model"}  # what a tokenizer is called beside `vocabulary.json`
_TEXT8 = " " + string.ascii_lowercase
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")  # in this order
SHOWN = 5  # characters that a sentence about unknown ones names
_PIECE = 1 << 20  # symbols looked up at a time, so that a long text needs little memory beside itself

Folder: TypeAlias = Path | epath.Path


# The rule of text8

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_BLANKED = bytes(
    ord(chr(c).lower()) if chr(c) in string.ascii_letters else c if chr(c) in string.digits else 32 for c in range(256)
)


def normalise(text: str) -> str:
    """A text in the 27 symbols of text8: lower case, digits spelled out, all else blanks, of which no two in a row.

    Letters with accents are blanks as well; there is no blank at either end.
    """
    plain = text.encode("ascii", "replace").translate(_BLANKED).decode("ascii")
    return " ".join(re.sub("[0-9]", lambda found: f" {WORDS[int(found[0])]} ", plain).split())


_HALF = re.compile("[\ud800-\udfff]")
UNKNOWN = "\ufffd"  # the replacement character


def characters_only(text: str) -> str:
    """The text with the replacement character for halves of characters (lone surrogates), which UTF-8 cannot spell."""
    return _HALF.sub(UNKNOWN, text) if _HALF.search(text) else text


class Vocabulary(ABC):
    """Texts to ids in [0, size) and back.

    A text is plain text: what spells the end of a document (`<|endoftext|>`) in it is encoded as its characters are.
    """

    name: str  # "text8", "chars", "bytes" or "tokenizer"
    size: int
    digest: str  # of all that says which id means what
    end: int | None = None  # the id that ends a document
    between: str = ""  # what stands between two documents where there is no such id

    def normalise(self, text: str) -> str:
        """The text as this vocabulary wants it: by the rule of text8, or as it is."""
        return text

    @abstractmethod
    def encode(self, text: str, name: str = "the text") -> np.ndarray:
        """int32 [tokens]. UserError for characters that it does not know; `name` is what the sentence calls the text."""

    def encode_all(self, texts: Sequence[str], names: Sequence[str] | None = None) -> list[np.ndarray]:
        """`encode` of several texts, by several threads where the tokenizer has them."""
        return [self.encode(text, *([] if names is None else [names[i]])) for i, text in enumerate(texts)]

    def foreign(self, text: str) -> np.ndarray:
        """The places of the characters that it does not know; a tokenizer has some token for all."""
        return np.empty(0, np.int64)

    def refusal(self, name: str, count: int, some: Sequence[tuple[str, int]]) -> str:
        """The sentence for a text with `count` characters that it does not know, of which `some` are the first."""
        return f"{name} has {count:,} characters that are none of {self}"

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids [tokens].

        Bytes that make no character become the replacement character, and so does each negative id, which models give where
        they found no token.
        """
        ids = np.asarray(ids, np.int64)
        first, *others = np.split(ids, np.flatnonzero(ids < 0))
        return UNKNOWN.join(self._decode(run) if len(run) else "" for run in (first, *(some[1:] for some in others)))

    @abstractmethod
    def _decode(self, ids: np.ndarray) -> str:
        """The text of ids int64 [tokens], at least one and none negative."""

    def save(self, folder: Folder) -> None:
        """Writes `vocabulary.json`, and a tokenizer's own file, into a folder here or in a bucket."""
        about, file = self._saved()
        if file is not None:
            _write(folder / str(about["file"]), file)
        head = {"format": "zoo-vocabulary", "version": 1, "name": self.name, "size": self.size, **about}
        _write(folder / FILE, msgspec.json.format(msgspec.json.encode(head), indent=1) + b"\n")

    def _saved(self) -> tuple[dict[str, str], bytes | None]:
        """What `vocabulary.json` says of it, and the bytes of its own file."""
        return {}, None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        return f"{self.size:,} {'tokens' if self.name == 'tokenizer' else 'symbols'} ({self.name})"


class _Symbols(Vocabulary):
    """One id per character, in the order of their code points."""

    def __init__(self, name: str, symbols: str) -> None:
        self.name, self.symbols, self.size = name, "".join(sorted(set(symbols))), len(set(symbols))
        self.digest = sha256("symbols\0", self.symbols.encode())
        self.between = " " if name == "text8" else "\n"
        self._points = _points(self.symbols)

    def normalise(self, text: str) -> str:
        return normalise(text) if self.name == "text8" else text

    def encode(self, text: str, name: str = "the text") -> np.ndarray:
        ids = self._look_up(text)
        places = np.flatnonzero(ids < 0)
        if len(places):
            raise UserError(self.refusal(name, len(places), [(text[i], i) for i in places[: SHOWN + 1].tolist()]))
        return ids

    def foreign(self, text: str) -> np.ndarray:
        return np.flatnonzero(self._look_up(text) < 0)

    def _look_up(self, text: str) -> np.ndarray:
        """int32 [characters]: ids, and -1 for what has none."""
        ids = np.empty(len(text), np.int32)
        for first in range(0, len(text), _PIECE):
            points = _points(text[first : first + _PIECE])
            found = np.minimum(np.searchsorted(self._points, points), self.size - 1)
            ids[first : first + len(points)] = np.where(self._points[found] == points, found, -1)
        return ids

    def refusal(self, name: str, count: int, some: Sequence[tuple[str, int]]) -> str:
        shown = ", ".join(f"{character!r} at {i:,}" for character, i in some[:SHOWN])
        more = ", ..." if len(some) > SHOWN else ""
        many = f"{count:,} characters that are" if count > 1 else "a character that is"
        if self.name == "text8":
            known, way = "space and a to z", "normalise it (data.normalise=True), or choose tokenizer=bytes"
        else:
            known, way = "those of the text it was made from", "leave them out, or choose tokenizer=bytes"
        return f"{name} has {many} none of the {self.size} symbols ({known}): {shown}{more}; {way}"

    def _decode(self, ids: np.ndarray) -> str:
        return self._points[ids].astype("<u4").tobytes().decode("utf-32-le")

    def _saved(self) -> tuple[dict[str, str], bytes | None]:
        return {"symbols": self.symbols}, None


class _Bytes(Vocabulary):
    """The 256 bytes of UTF-8."""

    name, size, between = "bytes", 256, "\n"
    digest = sha256(b"bytes")

    def encode(self, text: str, name: str = "the text") -> np.ndarray:
        # what a terminal could not decode comes back as the bytes it was
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8).astype(np.int32)

    def _decode(self, ids: np.ndarray) -> str:
        return ids.astype(np.uint8).tobytes().decode("utf-8", "replace")


class _Filed(Vocabulary):
    """Base of those that a package opens from a file."""

    name = "tokenizer"
    suffix: str  # of the file
    _data: bytes
    _model: Any

    def encode(self, text: str, name: str = "the text") -> np.ndarray:
        return self.encode_all([text])[0]

    def _saved(self) -> tuple[dict[str, str], bytes | None]:
        return {"file": _FILES[self.suffix], "sha256": sha256(self._data)}, self._data


class _Tokenizer(_Filed):
    """A `tokenizer.json` of the package tokenizers."""

    suffix = ".json"

    def __init__(self, data: bytes, where: str) -> None:
        package = _package("tokenizers")
        try:
            self._model = package.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # what the package raises has no name of its own
            raise UserError(
                f"{where} is no tokenizer of the package tokenizers ({first_line(error)}); give the file tokenizer.json that "
                "is published with a model"
            ) from None
        self._model.no_truncation()
        self._model.no_padding()
        self._data, self.digest = data, sha256("tokenizer.json\0", data)
        self.size = 1 + max(self._model.get_vocab(with_added_tokens=True).values(), default=-1)
        if not self.size:
            raise UserError(f"{where} knows no token; give a tokenizer that was trained")
        end = next((word for word in _ENDS if self._model.token_to_id(word) is not None), None)
        self.end = None if end is None else self._model.token_to_id(end)
        if end is not None:  # in some files it is no special token
            self._model.add_special_tokens([package.AddedToken(end, special=True, normalized=False)])
        self._model.encode_special_tokens = True  # as the text that spells them: documents cannot hold special tokens

    def encode_all(self, texts: Sequence[str], names: Sequence[str] | None = None) -> list[np.ndarray]:
        found = self._model.encode_batch_fast([characters_only(text) for text in texts], add_special_tokens=False)
        return [np.asarray(one.ids, np.int32) for one in found]

    def _decode(self, ids: np.ndarray) -> str:
        return str(self._model.decode(ids.tolist(), skip_special_tokens=False))


class _Pieces(_Filed):
    """A sentencepiece model.

    Most put a blank before a text (`add_dummy_prefix`). A document comes in pieces of a million characters, and each of them
    gets it: where the model also keeps blanks as they are (`remove_extra_whitespaces=false`, as Llama's does), a long
    document has one blank more between two pieces than in the file.
    """

    suffix = ".model"

    def __init__(self, data: bytes, where: str) -> None:
        self._model = _package("sentencepiece").SentencePieceProcessor()
        try:
            if data:
                self._model.load_from_serialized_proto(data)
            self.size = int(self._model.get_piece_size()) if data else 0
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{where} is no sentencepiece model ({first_line(error)}); give the .model file that is published with a model"
            ) from None
        if not self.size:
            raise UserError(f"{where} is no sentencepiece model (it is empty); give the .model file of one")
        self._data, self.digest = data, sha256("tokenizer.model\0", data)
        self.end = int(self._model.eos_id()) if self._model.eos_id() >= 0 else None

    def encode_all(self, texts: Sequence[str], names: Sequence[str] | None = None) -> list[np.ndarray]:
        return [np.asarray(ids, np.int32) for ids in self._model.encode([characters_only(text) for text in texts])]

    def _decode(self, ids: np.ndarray) -> str:
        return str(self._model.decode(ids.tolist()))


# Opening


def text8() -> Vocabulary:
    """The 27 symbols of text8: space is 0, a is 1, z is 26."""
    return _Symbols("text8", _TEXT8)


def raw_bytes() -> Vocabulary:
    """The 256 bytes of UTF-8."""
    return _Bytes()


def characters(symbols: str) -> Vocabulary:
    """The distinct characters of a text, in the order of their code points."""
    return _Symbols("chars", symbols)


def named(tokenizer: str, symbols: str = "", field: str = "tokenizer=") -> Vocabulary:
    """The vocabulary of a kind ("text8", "chars", "bytes") or of a tokenizer's file, or the folder that holds it.

    Args:
      symbols: the text (or its characters) of which "chars" takes the distinct ones.
      field: what stands before `tokenizer` in the sentence of an error.

    Raises:
      UserError: neither a kind nor a file, a file of another kind, or its package is not installed.
    """
    if tokenizer in KINDS:
        return {"text8": text8, "bytes": raw_bytes, "chars": lambda: characters(symbols)}[tokenizer]()
    path = Path(tokenizer).expanduser()
    if path.is_dir():
        path = next((file for name in _FILES.values() if (file := path / name).is_file()), path / _FILES[".json"])
    if not path.is_file():
        guess = suggest(tokenizer, KINDS)
        near = f"{guess} " if guess.startswith("did") else ""
        raise UserError(
            f"{field}{tokenizer}: there is no file {path}, and it is none of {', '.join(KINDS)}; {near}give one of these, a "
            "tokenizer.json or a sentencepiece .model"
        )
    if path.suffix.lower() not in _FILES:
        raise UserError(
            f"{field}{tokenizer} ends neither in .json (the package tokenizers) nor in .model (sentencepiece), so that its kind "
            "cannot be told; give such a file"
        )
    with files.reading(path, "mend its rights, or give another file"):
        return _of_file(path, path.read_bytes())


def open_vocabulary(folder: Folder) -> Vocabulary | None:
    """The vocabulary that `save` wrote into a folder; None where there is none.

    Raises:
      UserError: it is damaged, or the tokenizer's own file is missing or another one.
    """
    path = folder / FILE
    try:
        head = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise UserError(f"{path} is damaged ({error}); restore it from where the model was trained") from None
    name, symbols = head.get("name"), head.get("symbols")
    if head.get("format") != "zoo-vocabulary" or head.get("version") != 1:
        raise UserError(f"{path} was not written by this program; restore it from where the model was trained")
    if name == "bytes":
        return raw_bytes()
    if name in ("text8", "chars") and isinstance(symbols, str) and symbols:
        return _Symbols(name, symbols)
    if name != "tokenizer" or head.get("file") not in _FILES.values():
        raise UserError(f"{path} is damaged (name={name!r}); restore it from where the model was trained")
    file = folder / str(head["file"])
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{file} is missing, which {path} needs; restore it") from None
    if sha256(data) != head.get("sha256"):
        raise UserError(f"{file} is not the tokenizer that {path} names (its sha256 differs); restore it")
    return _of_file(file, data)


def _of_file(path: Folder, data: bytes) -> Vocabulary:
    return (_Tokenizer if path.suffix.lower() == ".json" else _Pieces)(data, str(path))


def _package(name: str) -> Any:
    logging.getLogger("sentencepiece").setLevel(logging.ERROR)
    try:
        return importlib.import_module(name)
    except ImportError:
        way = 'install the extra `text` (pip install -e ".[text]")'
        raise UserError(f"this tokenizer needs the package {name}, which is not installed; {way}") from None


def _points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _write(path: Folder, data: bytes) -> None:
    if isinstance(path, Path):
        files.write(path, data)
    else:
        path.write_bytes(data)  # an object of a bucket appears whole
