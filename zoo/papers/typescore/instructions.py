"""Instruction sets: what text an image was asked to show. One JSON object a line, and the parser of quoted text.

`typeinst_synth.jsonl` beside this file holds 118 instructions of our own with the published statistics of TYPEINST, whose list is not
available: means are 34 words per instruction and 12 quoted words (range 1 to 30), over strata of length, domain, content and style.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from zoo.errors import UserError
from zoo.files import reading

SHIPPED = "typeinst_synth"  # the name of the list that comes with this package
BINS = ((1, 3), (4, 8), (9, 16), (17, 30))  # words of the text; what is longer is "31+"

# Quoted text

_CLOSING = {'"': '"', "“": "”", "„": "“”", "«": "»", "'": "'", "‘": "’", "‚": "‘’", "‹": "›"}
_NESTING = "“„«"
_BY = re.compile(r"\s*[xX×]\s*\d")  # between the two sides of a size: 24"x36"
# within a word; the '90s, give 'em; rock 'n' roll
_APOSTROPHES = re.compile(r"(?<=\w)['’‘](?=\w)|(?<!\w)['’‘](?=\d0s\b|em\b)|(?<!\w)['’‘]n['’](?!\w)", re.IGNORECASE)


def quoted(text: str) -> list[str]:
    """The contents of the outermost matching quotes, in order of appearance, stripped and without empty ones.

    Quotes are "...", “...”, „...“, «...», and '...', ‘...’, ‚...‘, ‹...› where the single mark is no apostrophe: it
    opens after the start, a space or punctuation, and closes before the end, a space or punctuation. A mark whose
    partner is missing is no quote, nor is an inch sign (12", 24"x36").
    """
    marks = _APOSTROPHES.sub(lambda found: "_" * len(found[0]), text)  # places in it are places in the text
    pieces = []
    at = 0
    while at < len(marks):
        end = _end(marks, at)
        if end is None:
            at += 1
            continue
        pieces.append(text[at + 1 : end].strip())
        at = end + 1
    return [piece for piece in pieces if piece]


def _end(marks: str, start: int) -> int | None:
    """Where the quote ends that begins at `start`; None where none begins there or it never ends."""
    mark = marks[start]
    before, after = marks[start - 1 : start], marks[start + 1 : start + 2]
    if mark not in _CLOSING:
        return None
    if mark == '"' and before.isdigit() and (not after.isalnum() or _BY.match(marks, start + 1)):
        return None  # inches
    if mark in "'‘" and (before.isalnum() or not after.strip()):
        return None
    depth = 1
    for at in range(start + 1, len(marks)):
        if marks[at] in _CLOSING[mark]:
            if marks[at] in "'’‘" and marks[at + 1 : at + 2].isalnum():
                continue  # this one opens
            depth -= 1
            if not depth:
                return at
        elif marks[at] == mark and mark in _NESTING:
            depth += 1
    return None


# Records

_NAME = re.compile(
    r"[^\s./\\:*?\"<>|\x00-\x1f]([^/\\:*?\"<>|\x00-\x1f]*[^\s/\\:*?\"<>|\x00-\x1f])?"
)  # of an image file


@dataclass(frozen=True)
class Instruction:
    """One image's task: `text` is what it must show, `pieces` its quoted parts, `length_bin` its number of words."""

    id: str
    instruction: str
    text: str
    pieces: tuple[str, ...] = ()
    style: dict[str, str] = field(default_factory=dict)
    length_bin: str = ""
    domain: str = ""


class _Given(msgspec.Struct):
    """A line of a list. Other keys are passed over."""

    id: str | int
    instruction: str | None = None
    text: str | None = None
    pieces: tuple[str, ...] | None = None
    style: dict[str, str] | None = None
    length_bin: str | None = None
    domain: str | None = None


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

    An object has "id" and "instruction", and may have "text", "pieces" (of the text, in any order), "style", "length_bin"
    and "domain". A given "text" wins over what is quoted in the instruction, and needs no instruction. UserError names
    the file, the line and what is wrong with it.
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
        given = msgspec.json.decode(line.encode(), type=_Given)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UserError(f"{where}: {error}; write one JSON object a line, with id and instruction") from None
    name, instruction = str(given.id), given.instruction or ""
    if not _NAME.fullmatch(name):
        raise UserError(f"{where}: id {name!r:.80} cannot begin a file's name; use letters, digits, - and _")
    quotes = tuple(quoted(instruction))
    text = given.text or " ".join(quotes)
    if not text.strip():
        raise UserError(f'{where}: the instruction of {name!r} quotes no text; quote it as "...", or give it as text')
    # the quoted texts, if it is they that make up the text; else the text as one piece
    pieces = quotes if " ".join(quotes).split() == text.split() else (text,)
    if given.pieces is not None:
        pieces = given.pieces
        if sorted(" ".join(pieces).split()) != sorted(text.split()):
            raise UserError(
                f"{where}: pieces {list(pieces)!r:.80} do not hold the words of the text {text!r:.80}; leave them out, or cut it"
            )
    binned = given.length_bin or length_bin(text)
    return Instruction(name, instruction, text, pieces, given.style or {}, binned, given.domain or "")
