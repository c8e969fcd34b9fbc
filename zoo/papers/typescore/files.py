"""What the commands of TypeScore share of files: whole or not at all, told apart, and where they lie."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zoo.errors import UserError
from zoo.papers.typescore.extractors.base import shorten

SETTING = "setting.json"  # of a folder of results: what they were made with
NAMED = 5  # of a long list, how many are named


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Fields in which two settings differ, as `extractor.version: "1" -> "2"`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{where}.{k}" if where else k)]
    return [] if old == new else [f"{where}: {json.dumps(old)} -> {json.dumps(new)}"]


def relative(folder: Path, out: Path) -> str:
    """Where the pictures are, as seen from the results: both may be moved together."""
    try:
        return Path(os.path.relpath(folder.resolve(), out.resolve())).as_posix()
    except ValueError:  # another drive
        return folder.resolve().as_posix()


def seen() -> bool:
    """Whether a bar on stderr can be seen."""
    return bool(sys.stderr and sys.stderr.isatty())


def as_json(value: Any, indent: int | None = None) -> bytes:
    """JSON and the end of its line, as UTF-8; halves of characters that readers hand back become question marks."""
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def as_png(figure: Any) -> bytes:
    """A figure of matplotlib's as the bytes of a PNG."""
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """UserError where what is written within, to `path` or beside it, cannot be."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or path} ({error.strerror or error}); free some space, or name another folder with "
            "out=FOLDER"
        ) from error


def write(path: Path, data: bytes) -> None:
    """Puts a file in place whole or not at all."""
    part = path.with_name(f".{path.name}.part{os.getpid()}")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def claim(out: Path, setting: Mapping[str, Any], what: str) -> None:
    """Makes `out` the folder of `what` with this setting, which it remembers. UserError where it is another's."""
    setting = json.loads(json.dumps(setting))
    file = out / SETTING
    try:
        taken = not file.exists() and out.exists() and (not out.is_dir() or any(out.iterdir()))
        if not taken and not file.exists():
            out.mkdir(parents=True, exist_ok=True)
            write(file, (json.dumps(setting, indent=1) + "\n").encode())
        old = {} if taken else json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"out={out} cannot be written ({error.strerror}); name another with out=FOLDER") from None
    except ValueError:
        old = None
    if taken:
        raise UserError(f"out={out} is no folder of {what}; name a new or an empty one with out=FOLDER")
    if not isinstance(old, dict):
        raise UserError(f"{file} is damaged; name another folder with out=FOLDER, or remove this one")
    apart = differences(old, setting)
    if apart:
        raise UserError(
            f"out={out} holds {what} of another setting ({'; '.join(map(shorten, apart[:3]))}); name another folder with "
            "out=FOLDER, or remove this one"
        )
