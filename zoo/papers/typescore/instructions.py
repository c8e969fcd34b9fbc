"""Instruction sets: what text an image was asked to show. One JSON object a line, and the parser of quoted text.

`typeinst_synth.jsonl` beside this file holds 118 instructions of our own with the published statistics of TYPEINST, whose list is not
available: means are 34 words per instruction and 12 quoted words (range 1 to 30), over strata of length, domain, content and style.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from zoo.errors import UserError
from zoo.files import reading

SHIPPED = "typeinst_synth"  # the name of the list that comes with this package
BINS = ((1, 3), (4, 8), (9, 16), (17, 30))  # words of the text; what is longer is "31+"

# within a word; the '90s, give 'em; rock 'n' roll
_APOSTROPHES = re.compile(r"(?<=\w)['’‘](?=\w)|(?<!\w)['’‘](?=\d0s\b|em\b)|(?<!\w)['’‘]n['’](?!\w)", re.IGNORECASE)
_QUOTED = re.compile(
    r"""(?<=\d)"(?:(?![^\W_])|(?=\s*[xX×]\s*\d))  # inches, which quote nothing: 12", 24"x36"
    | "([^"]*)"
    | “((?:[^“”]|“[^“”]*”)*)”
    | „((?:[^„“”]|„[^„“”]*[“”])*)[“”]
    | «((?:[^«»]|«[^«»]*»)*)»
    | ‹([^›]*)›
    | ‚(.*?)[‘’](?![^\W_])
    | (?<![^\W_])‘(?=\S)(.*?)’(?![^\W_])
    | (?<![^\W_])'(?=\S)(.*?)'(?![^\W_])""",
    re.VERBOSE | re.DOTALL,
)


def quoted(text: str) -> list[str]:
    """The contents of the outermost matching quotes, in order of appearance, stripped and without empty ones.

    Quotes are "...", “...”, „...“, «...», and '...', ‘...’, ‚...‘, ‹...› where the single mark is no apostrophe: it
    opens after the start, a space or punctuation, and closes before the end, a space or punctuation. A mark whose
    partner is missing is no quote, nor is an inch sign (12", 24"x36").
    """
    marks = _APOSTROPHES.sub(lambda found: "_" * len(found[0]), text)  # places in it are places in the text
    found = [text[slice(*one.span(one.lastindex))].strip() for one in _QUOTED.finditer(marks) if one.lastindex]
    return [piece for piece in found if piece]


_NAME = re.compile(r"[\w-][^/\\\x00-\x1f]*")  # of an image file


@dataclass(frozen=True)
class Instruction:
    """One image's task: `text` is what it must show."""

    id: str
    instruction: str = ""
    text: str = ""
    style: dict[str, str] = field(default_factory=dict)
    domain: str = ""


def length_bin(text: str) -> str:
    """The name of the bin that a text's number of words falls into."""
    words = len(text.split())
    return next((f"{low}-{high}" for low, high in BINS if words <= high), f"{BINS[-1][1] + 1}+")


def content(text: str) -> str:
    """What a text shows first, of digits, acronym, punctuation; else "words"."""
    if re.search(r"\d", text):
        return "digits"
    if re.search(r"\b[A-Z]{2,}\b", text):
        return "acronym"
    return "punctuation" if re.search(r"[^\w\s]", text) else "words"


def listed(wanted: str, limit: int = 0) -> list[Instruction]:
    """The instructions of a file of JSON lines, or of `SHIPPED`; the first `limit` of them, or all for 0.

    An object has "id" and "instruction", and may have "text", "style" and "domain". A given "text" wins over what is quoted
    in the instruction, and needs no instruction. UserError names the file, the line and what is wrong with it.
    """
    path = Path(wanted)
    if wanted == SHIPPED and not path.is_file():
        path = Path(__file__).with_name(f"{SHIPPED}.jsonl")
    with reading(f"wanted={wanted}", f"name a file of JSON lines, or {SHIPPED}"):
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # JSON may hold other separators of lines as they are
    found: dict[str, Instruction] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            one = _instruction(line, f"{wanted}:{number}")
            if one.id in found:
                raise UserError(f"{wanted}:{number}: id {one.id!r} is that of an earlier line too; give each its own")
            found[one.id] = one
    if not found:
        raise UserError(f"wanted={wanted} is empty; write one JSON object a line, with id and instruction")
    return list(found.values())[: limit or None]


def _instruction(line: str, where: str) -> Instruction:
    try:
        given = msgspec.json.decode(line.encode(), type=dict[str, Any])
        said = {
            name: str(value) if name == "id" and type(value) is int else value
            for name, value in given.items()
            if value is not None
        }
        one = msgspec.convert(said, Instruction)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UserError(f"{where}: {error}; write one JSON object a line, with id and instruction") from None
    if not _NAME.fullmatch(one.id):
        raise UserError(f"{where}: id {one.id!r:.80} cannot begin a file's name; use letters, digits, - and _")
    one = replace(one, text=one.text or " ".join(quoted(one.instruction)))
    if not one.text.strip():
        raise UserError(f'{where}: the instruction of {one.id!r} quotes no text; quote it as "...", or give it as text')
    return one
