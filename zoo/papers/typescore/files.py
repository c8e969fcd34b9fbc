"""What the commands of TypeScore share of files: whose a folder is, how figures are encoded, and where pictures lie."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zoo import files
from zoo.errors import UserError
from zoo.papers.typescore.extractors.base import shorten

SETTING = "setting.json"  # of a folder of results: what they were made with
NAMED = 5  # of a long list, how many are named


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


writing = functools.partial(files.writing, way="free some space, or name another folder with out=FOLDER")


@contextlib.contextmanager
def claim(out: Path, setting: Mapping[str, Any], what: str) -> Iterator[None]:
    """Makes `out` the folder of `what` with this setting, which it remembers, and holds it for this process.

    UserError where it is another's or in use.
    """
    setting = json.loads(json.dumps(setting))
    file = out / SETTING
    with contextlib.ExitStack() as held:
        with writing(out):
            with contextlib.suppress(FileExistsError):
                out.mkdir(parents=True)
            held.enter_context(files.locked(out, f"out={out}", "name another folder with out=FOLDER"))
            if not file.exists():
                if not out.is_dir() or files.names(out):
                    raise UserError(f"out={out} is no folder of {what}; name a new or an empty one with out=FOLDER")
                files.write(file, json.dumps(setting, indent=1) + "\n")
            data = file.read_bytes()
        try:
            old = json.loads(data)
        except ValueError:
            old = None
        if not isinstance(old, dict):
            raise UserError(f"{file} is damaged; name another folder with out=FOLDER, or remove this one")
        apart = files.differences(old, setting)
        if apart:
            raise UserError(
                f"out={out} holds {what} of another setting ({'; '.join(map(shorten, apart[:3]))}); name another folder with "
                "out=FOLDER, or remove this one"
            )
        yield
