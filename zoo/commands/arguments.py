"""What commands share: their words on the command line, and what these mean."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo import config
from zoo.errors import UserError


def takes(parser: argparse.ArgumentParser, *words: str, fields: str = "") -> None:
    """Words that are told by their place, and `field=value` where `fields` says what these are."""
    for word in words:
        parser.add_argument(word.lower(), metavar=word)
    if fields:
        parser.add_argument("fields", nargs="*", default=[], metavar="field=value", help=fields)


def allows(parser: argparse.ArgumentParser) -> None:
    """The flag --allow."""
    words = "trust the classes of this package in the config"
    parser.add_argument("--allow", action="append", default=[], metavar="PACKAGE", help=words)


def opens(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that opens a model."""
    parser.add_argument("--raw", action="store_true", help="the last weights, even where the run keeps an average")
    allows(parser)


def writes_json(parser: argparse.ArgumentParser) -> None:
    """The flag --json of a command that makes a table of figures."""
    parser.add_argument("--json", default=None, metavar="FILE", help="write the figures here as well")


def of_config(name: str, fields: Sequence[str]) -> tuple[list[str], list[str]]:
    """Where a model is a config, the overrides of its task and weights; and the other fields."""
    from zoo import models

    own = [f for f in fields if re.match(r"(task\.|weights[.=])", f)]
    own = own if own and models.is_config(name) else []
    return own, [f for f in fields if f not in own]


def width(fields: Sequence[str]) -> tuple[float | None, list[str]]:
    """The width of a run's average by `ema=WIDTH`, None where none is asked for; and the other fields."""
    given = [field.removeprefix("ema=") for field in fields if field.startswith("ema=")]
    ema = config.parse(given[-1], float, "ema") if given else None
    return ema, [field for field in fields if not field.startswith("ema=")]


def as_run(value: Any, name: str) -> Any:
    """The value of a config, which must be a run."""
    from zoo.run import Run

    if not isinstance(value, Run):
        raise UserError(f"{name} holds a {type(value).__name__}, not a Run; only runs are trained")
    return value


def one_line(found: Mapping[str, Any]) -> str:
    """Figures as one line of JSON, which has no word for what is not finite: null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()}
    return json.dumps(finite)


def check_json(path: str | None) -> None:
    """UserError for a file that cannot be written: better now than after minutes."""
    if path and not Path(path).absolute().parent.is_dir():
        raise UserError(f"cannot write {path}: its folder does not exist; make it, or give --json another file")


def write_json(path: str | None, figures: Mapping[str, Any]) -> None:
    """Write figures where --json asks for it."""
    if path:
        try:
            Path(path).write_text(json.dumps(figures, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
