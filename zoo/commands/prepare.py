"""`zoo prepare KIND SOURCE DEST field=value`: images, latents of images, tokens of texts, or statistics of images, made once."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from zoo import config
from zoo.commands.arguments import allows, opens, takes
from zoo.commands.tables import comments, table
from zoo.errors import UserError
from zoo.fields import Below1, Count, NotEmpty, Side, check_fields, kinds, required, words


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What is said of all that is made."""

    test_fraction: Below1 = 0.1  # held out where the source has no test part

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class _Pictures(_Kind):
    """What is said of images wherever they are read one by one."""

    convert: bool = False  # turn grey images to colour or colour ones to grey as needed
    image_column: str | None = None  # of parquet files, where their names do not tell
    caption_column: str | None = None  # of parquet files; empty: no captions
    allow_unreadable: bool = False  # exit 0 although some files could not be read


@dataclass(frozen=True, kw_only=True)
class Images(_Pictures):
    """Images, with or without captions, become an ArrayRecord data set."""

    size: Side | None = None  # resize the shorter side and crop the centre to this many pixels; none: as they are
    channels: Literal[1, 3] = 3

    def make(self, source: str, dest: str, args: argparse.Namespace) -> Any:
        """Write the set."""
        from zoo.data.prepare import prepare

        return prepare(source, dest, **asdict(self))


@dataclass(frozen=True, kw_only=True)
class Latents(_Pictures):
    """Images, and captions where they have some, become a set of latents and tokens."""

    size: Side  # the side of images cropped square; with aspects, that of a square of as many pixels
    vae: NotEmpty  # the autoencoder: a run, an export or a config whose weights are given
    text: NotEmpty | None = None  # the text encoder, whose tokens of captions are kept; none: no captions
    features: bool = False  # keep what the text encoder makes of captions too, not tokens alone
    tokenizer: NotEmpty | None = None  # its file; none: spiece.model beside the text encoder
    aspects: bool = False  # keep images near their aspect ratio, in nine buckets
    multiple: Count | None = (
        None  # what divides the sides of images; none: the autoencoder's factor (times task.patch for patches)
    )
    batch: Count | None = None  # images encoded at a time; none: 64, fewer of more than 256 pixels

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("features", "tokenizer"):
            if getattr(self, name) and self.text is None:
                raise UserError(f"{name}= needs a text encoder; add text=MODEL, or leave it out")

    def make(self, source: str, dest: str, args: argparse.Namespace) -> Any:
        """Write the set."""
        from zoo import dist
        from zoo.commands import encode

        batch = self.batch or encode.batch_for(self.size)
        dist.start(batch=batch)
        return encode.encode(source, dest, **{**asdict(self), "batch": batch}, raw=args.raw, allow=args.allow)


@dataclass(frozen=True, kw_only=True)
class Text(_Kind):
    """Texts become tokens, and their vocabulary."""

    tokenizer: NotEmpty  # text8, chars, bytes or the file of a tokenizer (tokenizer.json, or sentencepiece's .model)
    valid_fraction: Below1 = 0.05  # before the test part, where the source has no such parts
    test_fraction: Below1 = 0.05  # likewise, at the end

    def make(self, source: str, dest: str, args: argparse.Namespace) -> Any:
        """Write the set."""
        from zoo.data.text.prepare import prepare_text

        return prepare_text(source, dest, **asdict(self))


@dataclass(frozen=True, kw_only=True)
class Statistics(_Kind):
    """Frechet statistics of the training images become DEST, an .npz file."""

    size: Side  # pixels a side of the images that the model makes
    features: NotEmpty = "pixels"  # pixels, or a run or export with features
    channels: Literal[1, 3] = 3
    convert: bool = False  # turn grey images to colour or colour ones to grey as needed
    flip: bool = False  # mirror a random half of the images
    batch: Count = 64  # images measured at a time

    def make(self, source: str, dest: str, args: argparse.Namespace) -> Any:
        """Write the file."""
        from zoo.commands import statistics

        return statistics.prepare(source, dest, **asdict(self), allow=args.allow)


KINDS: dict[str, type] = {"images": Images, "latents": Latents, "text": Text, "statistics": Statistics}


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    verbs = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, cls in KINDS.items():
        text = (cls.__doc__ or "").strip()
        style = argparse.RawDescriptionHelpFormatter
        sub = verbs.add_parser(kind, help=text, description=text, epilog=_fields(cls), formatter_class=style)
        takes(sub, "SOURCE", "DEST", fields="as below")
        {"latents": opens, "statistics": allows}.get(kind, lambda _: None)(sub)


def _fields(cls: type) -> str:
    """Every field: its default, type with range, and comment."""
    said, needed = comments(cls), required(cls)
    rows = [
        (name, "required" if name in needed else str(getattr(cls, name)), words(kind), said.get(name, ""))
        for name, kind in kinds(cls).items()
    ]
    rows.sort(key=lambda row: row[1] != "required")
    return "\n".join(["fields:", *(f"  {line}" for line in table(rows, widest=54))])


def run(args: argparse.Namespace) -> int:
    """Make what is asked for: 0, or 1 where images were left out and that is not allowed."""
    cls = KINDS[args.kind]
    for name in kinds(cls):
        if name in required(cls) and not any(field.startswith(f"{name}=") for field in args.fields):
            raise UserError(f"{name}= is missing; give {comments(cls)[name]}")
    report = config.make(cls, args.fields).make(args.source, args.dest, args)
    print(report)
    return 0 if getattr(report, "ok", True) else 1


# --- the spelling of versions before --------------------------------------------------------------

_SWITCHES = ("allow-unreadable", "aspects", "convert", "features", "flip", "raw")
_MADE = {"encode": "latents", "text": "text", "statistics": "statistics"}  # flags that said what was made
_RENAMED = {"text": "tokenizer", "statistics": "features"}


def check_spelling(given: Sequence[str]) -> None:
    """UserError with today's words where these are `zoo prepare SOURCE DEST --flag ...`, as versions before had it."""
    places = [word for word in given if not word.startswith("-")]
    if len(places) < 2 or places[0] in KINDS or {"-h", "--help"} & {*given}:
        return
    parser = argparse.ArgumentParser(prog="zoo prepare", argument_default=argparse.SUPPRESS)
    takes(parser, "SOURCE", "DEST")
    fields = {name for kind in KINDS.values() for name in kinds(kind)}
    for name in sorted({"allow", *_SWITCHES, *_MADE, *(field.replace("_", "-") for field in fields)}):
        kind = "store_true" if name in _SWITCHES else "append" if name in ("encode", "allow") else "store"
        parser.add_argument(f"--{name}", action=kind)
    found, rest = parser.parse_known_args(given)
    if rest:  # a third place, or another flag
        return
    about = vars(found)
    kind = next((made for flag, made in _MADE.items() if flag in about), "images")
    words = [kind, about.pop("source"), about.pop("dest"), *about.pop("encode", ())]
    words += ["--raw"] * about.pop("raw", False) + [f"--allow={package}" for package in about.pop("allow", ())]
    about = {_RENAMED.get(name, name): "true" if value is True else value for name, value in about.items()}
    words += [f"{name}={value}" for name, value in about.items() if name in kinds(KINDS[kind])]
    raise UserError(f"this is written `{shlex.join(['zoo', 'prepare', *words])}` now")
