"""Readings kept on disk, so that no image is read twice in the same way."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from zoo.errors import UserError
from zoo.papers.typescore.extractors.base import TEXT_CHUNK, Extraction, describe, failed, flat

_log = logging.getLogger("zoo")


def digest(image: Image.Image) -> str:
    """sha256 of what an extractor sees: size and pixels as RGB, and the renderer's record, which the oracle reads."""
    seen = flat(image)
    sha = hashlib.sha256(f"{seen.width} {seen.height} ".encode())
    sha.update(seen.tobytes())
    text = seen.info.get(TEXT_CHUNK)
    if isinstance(text, str):
        sha.update(b"\0" + text.encode("utf-8", "surrogatepass"))
    return sha.hexdigest()


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

    def extract(self, images: Sequence[Image.Image]) -> list[Extraction]:
        return self._through(images, [None] * len(images), lambda some, _: self.inner.extract(some))

    def ask(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[Extraction]:
        """As the extractor's `ask`, each answer kept. UserError when it answers no questions."""
        if not hasattr(self.inner, "ask"):
            raise UserError(f"extractor {self.name} reads text and answers no questions; take http or transformers")
        return self._through(images, questions, self.inner.ask)

    def _through(
        self,
        images: Sequence[Image.Image],
        questions: Sequence[Any],
        read: Callable[[list[Image.Image], list[Any]], list[Extraction]],
    ) -> list[Extraction]:
        found: list[Extraction | None] = [None] * len(images)
        wanted: dict[Path, list[int]] = {}  # the same image twice is read once
        for i, (image, question) in enumerate(zip(images, questions, strict=True)):
            try:
                key = [digest(image), self.described, question]
            except UserError:
                raise
            except Exception as error:  # a broken image
                found[i] = failed(error)
                continue
            file = self.path(hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest())
            if (one := self._get(file)) is not None:
                found[i] = one
                self.hits += 1
            else:
                wanted.setdefault(file, []).append(i)
        todo = list(wanted.items())
        for start in range(0, len(todo), max(self.batch, 1)):  # kept as they come: a stopped run has lost little
            some = todo[start : start + max(self.batch, 1)]
            first = [indices[0] for _, indices in some]
            fresh = read([images[i] for i in first], [questions[i] for i in first])
            for (file, indices), one in zip(some, fresh, strict=True):
                self.reads += 1
                self.hits += len(indices) - 1
                for i in indices:
                    found[i] = one
                if one.error is None:
                    self._put(file, one)
        return [one if one is not None else failed("not read") for one in found]

    def path(self, key: str) -> Path:
        """The file of a reading; two levels, since some systems are slow with many files in a folder."""
        return self.folder / key[:2] / f"{key}.json"

    def _get(self, file: Path) -> Extraction | None:
        try:
            entry = json.loads(file.read_bytes())
            record = entry["extraction"]
            if entry["sha256"] != _checksum(record):
                raise ValueError("its checksum differs")
            return Extraction.of(record)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            _log.warning("cache: %s is damaged (%s) and made anew", file, error)
            return None

    def _put(self, file: Path, one: Extraction) -> None:
        record = one.record()
        entry = {"sha256": _checksum(record), "extractor": self.described, "extraction": record}
        temporary = ""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=".", suffix=".part", dir=file.parent)
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                json.dump(entry, out)
            os.replace(temporary, file)
        except OSError as error:  # the reading itself is good
            _log.warning("cache: %s could not be written (%s)", file, error.strerror)
            if temporary:
                Path(temporary).unlink(missing_ok=True)


def _checksum(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
