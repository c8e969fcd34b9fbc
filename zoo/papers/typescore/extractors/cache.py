"""Readings kept on disk: for good, so that no image is read twice in the same way, and until a run has judged them."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from zoo.errors import UserError
from zoo.files import sha256, sha256_of_json, write, writing
from zoo.papers.typescore.extractors.base import (
    TEXT_CHUNK,
    Extraction,
    Keep,
    describe,
    failed,
    flat,
    keeping,
    takes_keep,
)

_log = logging.getLogger("zoo")


def digest(image: Image.Image) -> str:
    """sha256 of what an extractor sees: size and pixels as RGB, and the renderer's record, which the oracle reads."""
    seen = flat(image)
    text = seen.info.get(TEXT_CHUNK)
    record = b"\0" + text.encode("utf-8", "surrogatepass") if isinstance(text, str) else b""
    return sha256(f"{seen.width} {seen.height} ", seen.tobytes(), record)


class Cached:
    """An extractor that looks into a folder first. A file per reading, named by image and extractor, written whole or not.

    Failed readings are not kept: the next run tries them again. A file that is damaged is made anew. Several processes may
    share the folder. `hits` and `reads` count images.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, extractor: Any, folder: str | Path) -> None:
        self.inner = extractor
        self.name: str = extractor.name
        self.folder = Path(folder)
        self.hits = self.reads = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise UserError(f"cache: {self.folder} cannot be written ({error.strerror}); name another folder") from None

    @property
    def batch(self) -> int:
        return int(self.inner.batch)

    def version(self) -> str:
        return str(self.described["version"])

    @functools.cached_property
    def described(self) -> dict[str, Any]:
        """`describe` of the extractor, asked once: its version may start a program."""
        return describe(self.inner)

    def check(self) -> None:
        self.inner.check()

    def extract(self, images: Sequence[Image.Image], keep: Keep | None = None) -> list[Extraction]:
        def read(some: list[Image.Image], _: list[Any], told: Keep) -> list[Extraction]:
            return keeping(self.inner.extract, told, some)

        return self._through(images, [None] * len(images), read, self._at_once(self.inner.extract), keep)

    def ask(
        self, images: Sequence[Image.Image], questions: Sequence[str], keep: Keep | None = None
    ) -> list[Extraction]:
        """As the extractor's `ask`, each answer kept. UserError when it answers no questions."""
        if not hasattr(self.inner, "ask"):
            raise UserError(f"extractor {self.name} reads text and answers no questions; take http or transformers")

        def read(some: list[Image.Image], asked: list[Any], told: Keep) -> list[Extraction]:
            return keeping(self.inner.ask, told, some, asked)

        return self._through(images, questions, read, self._at_once(self.inner.ask), keep)

    def _at_once(self, read: Callable[..., list[Extraction]]) -> int:
        """How many images are handed over in one call: few where readings come only at its end, and a stop would lose them."""
        return sys.maxsize if takes_keep(read) else max(self.batch, 1)

    def _through(
        self,
        images: Sequence[Image.Image],
        questions: Sequence[Any],
        read: Callable[[list[Image.Image], list[Any], Keep], list[Extraction]],
        at_once: int,
        keep: Keep | None,
    ) -> list[Extraction]:
        found: list[Extraction | None] = [None] * len(images)

        def note(i: int, one: Extraction) -> None:
            found[i] = one
            if keep is not None:
                keep(i, one)

        wanted: dict[Path, list[int]] = {}  # the same image twice is read once
        for i, (image, question) in enumerate(zip(images, questions, strict=True)):
            try:
                key = [digest(image), self.described, question]
            except UserError:
                raise
            except Exception as error:  # a broken image
                note(i, failed(error))
                continue
            file = self.path(sha256_of_json(key))
            if (one := self._get(file)) is not None:
                note(i, one)
                self.hits += 1
            else:
                wanted.setdefault(file, []).append(i)
        todo = list(wanted.items())
        for start in range(0, len(todo), at_once):
            some = todo[start : start + at_once]
            first = [indices[0] for _, indices in some]

            def fresh(k: int, one: Extraction, some: list[tuple[Path, list[int]]] = some) -> None:
                file, indices = some[k]
                self.reads += 1
                self.hits += len(indices) - 1
                if one.error is None:
                    self._put(file, one)
                for i in indices:
                    note(i, one)

            read([images[i] for i in first], [questions[i] for i in first], fresh)
        return [one if one is not None else failed("not read") for one in found]

    def path(self, key: str) -> Path:
        """The file of a reading; two levels, since some systems are slow with many files in a folder."""
        return self.folder / key[:2] / f"{key}.json"

    def _get(self, file: Path) -> Extraction | None:
        try:
            entry = json.loads(file.read_bytes())
            record = entry["extraction"]
            if entry["sha256"] != sha256_of_json(record):
                raise ValueError("its checksum differs")
            return Extraction.of(record)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            _log.warning("cache: %s is damaged (%s) and made anew", file, error)
            return None

    def _put(self, file: Path, one: Extraction) -> None:
        record = one.record()
        entry = {"sha256": sha256_of_json(record), "extractor": self.described, "extraction": record}
        try:
            write(file, json.dumps(entry), sync=False)  # a torn entry is made anew
        except OSError as error:  # the reading itself is good
            _log.warning("cache: %s could not be written (%s)", file, error.strerror)


class Journal:
    """A file of readings that a run has made and not yet judged, by name and sha256 of their pictures; a line each.

    A reading is there as soon as `put` returns. Damaged lines are passed over. UserError where the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: dict[tuple[str, str], Extraction] = {}
        with contextlib.suppress(OSError):
            for line in path.read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                    entry = json.loads(line)
                    self._read[entry["image"], entry["sha256"]] = Extraction.of(entry["extraction"])

    def get(self, image: str, sha256: str) -> Extraction | None:
        return self._read.get((image, sha256))

    def put(self, image: str, sha256: str, one: Extraction) -> None:
        entry = json.dumps({"image": image, "sha256": sha256, "extraction": one.record()})
        way = "free some space, or name another folder with out=FOLDER"
        with (
            writing(self.path, way),
            open(self.path, "ab", buffering=0) as file,
        ):  # in one piece, behind what may be half a line
            file.write(b"\n" + entry.encode())

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
