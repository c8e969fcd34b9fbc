"""`zoo prepare KIND SOURCE DEST field=value`: images, latents of images, tokens of texts, or statistics of images, made once."""

from __future__ import annotations

import argparse
import shlex
import warnings
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


# --- the spelling of versions before, which works for one more ------------------------------------

_SWITCHES = ("allow_unreadable", "aspects", "convert", "features", "flip")
_NAMES = {"encode": "latents", "statistics": "statistics", "text": "text"}  # flags that chose what was made


def modern(given: Sequence[str]) -> list[str]:
    """The words as they are written now; those of `zoo prepare SOURCE DEST --flag ...` with a note of the new command line."""
    if {*given[:1]} & {*KINDS, "-h", "--help"} or not (len(given) == 2 or any(w.startswith("--") for w in given)):
        return list(given)
    kind, places, fields, rest = "images", [], [], iter(given)
    for word in rest:
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        if not word.startswith("--"):
            places.append(word)
        elif name in _SWITCHES:
            fields.append(f"{name}=true")
        elif name == "raw":
            fields.append(word)
        else:
            value = value if equals else next(rest, "")
            kind = _NAMES.get(name, kind)
            new = {"encode": "", "text": "tokenizer=", "statistics": "features=", "allow": "--allow="}
            fields.append(f"{new.get(name, f'{name}=')}{value}")
    kept = [field for field in fields if field[0] == "-" or field.partition("=")[0] in kinds(KINDS[kind])]
    new_words = [kind, *places, *kept]
    warnings.warn(f"written {shlex.join(['zoo', 'prepare', *new_words])} now; the older way will go", stacklevel=2)
    return new_words
