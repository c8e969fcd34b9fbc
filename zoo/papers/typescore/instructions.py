"""Instruction sets: what text an image was asked to show. One JSON object a line, and the parser of quoted text."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo import files
from zoo.errors import UserError

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


def length_bin(text: str) -> str:
    """The name of the bin that a text's number of words falls into."""
    words = len(text.split())
    return next((f"{low}-{high}" for low, high in BINS if words <= high), f"{BINS[-1][1] + 1}+")


def read(path: str | os.PathLike[str]) -> list[Instruction]:
    """The instructions of a file of JSON lines.

    An object has "id" and "instruction", and may have "text", "pieces" (of the text, in any order), "style", "length_bin"
    and "domain". A given "text" wins over what is quoted in the instruction, and needs no instruction. Empty lines and
    other keys are passed over. UserError names the file, the line and what is wrong with it.
    """
    path = Path(path)
    with files.reading(f"list {path}", "name a file of JSON lines"):
        content = path.read_bytes().decode("utf-8-sig")
    found: list[Instruction] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(
        content.split("\n"), 1
    ):  # not splitlines: JSON may hold other line separators as they are
        if not line.strip():
            continue
        where = f"{path}:{number}"
        record = _parsed(line, where)
        instruction = _instruction(record, where)
        if instruction.id in lines:
            raise UserError(
                f"{where}: id {instruction.id!r} is that of line {lines[instruction.id]} too; give each its own"
            )
        lines[instruction.id] = number
        found.append(instruction)
    if not found:
        raise UserError(f"instructions {path} are empty; write one JSON object a line, with id and instruction")
    return found


def write(path: str | os.PathLike[str], instructions: Iterable[Instruction]) -> None:
    """A file that `read` reads as these instructions, in place of one that is there; pieces are left out where the
    quotes of the instruction give them."""
    lines = []
    for one in instructions:
        record: dict[str, Any] = {"id": one.id, "instruction": one.instruction, "text": one.text}
        if one.pieces != _pieces(one.instruction, one.text):
            record["pieces"] = list(one.pieces)
        record |= {"style": one.style, "length_bin": one.length_bin, "domain": one.domain}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    files.write(Path(path), "".join(lines))


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply or a number too long"
        raise UserError(f"{where}: not JSON ({reason}); write one object a line, with id and instruction") from None
    if not isinstance(record, dict):
        raise UserError(
            f"{where}: a JSON {type(record).__name__}, not an object; write one object a line, with id and instruction"
        )
    return record


def _string(record: dict[str, Any], name: str, where: str) -> str:
    """A field's text, "" where it is absent or null."""
    value = record.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} {value!r:.80} must be a text, in double quotes")
    _whole(value, name, where)
    return value


def _whole(value: str, name: str, where: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: {name} {value!r:.80} has half a character (a lone surrogate); write it whole"
        ) from None


def _instruction(record: dict[str, Any], where: str) -> Instruction:
    name = record.get("id")
    if isinstance(name, int) and not isinstance(name, bool):
        record = {**record, "id": str(name)}
    name = _string(record, "id", where)
    if not name.strip():
        raise UserError(f"{where}: no id; images are found by it ({{id}}_{{k}}.png)")
    if not name.isprintable() or set(name) & set('/\\:*?"<>|') or name != name.strip() or name.startswith("."):
        raise UserError(
            f"{where}: id {name!r:.80} cannot begin the name of an image file; use letters, digits, - and _"
        )
    instruction = _string(record, "instruction", where)
    text = _string(record, "text", where)
    if not text:
        text = " ".join(quoted(instruction))
        if not text and not instruction:
            raise UserError(f"{where}: id {name!r} has no instruction and no text; give one of them")
        if not text:
            raise UserError(
                f'{where}: the instruction of id {name!r} quotes no text; quote it as "...", or give it as text'
            )
    if not text.strip():
        raise UserError(f"{where}: the text of id {name!r} is blank; leave it out to take what the instruction quotes")
    given = record.get("pieces")
    if given is None:
        pieces = _pieces(instruction, text)
    elif isinstance(given, list) and all(isinstance(piece, str) for piece in given):
        pieces = tuple(given)
        for piece in pieces:
            _whole(piece, "pieces", where)
        if sorted(" ".join(pieces).split()) != sorted(text.split()):
            raise UserError(
                f"{where}: pieces {given!r:.80} do not hold the words of the text {text!r:.80}; cut the text into pieces, in "
                "any order, or leave them out"
            )
    else:
        raise UserError(f"{where}: pieces {given!r:.80} must be a list of texts")
    style = record.get("style")
    if style is None:
        style = {}
    if not isinstance(style, dict) or not all(isinstance(value, str) for value in style.values()):
        raise UserError(f'{where}: style {style!r:.80} must be an object of texts, such as {{"colour": "red"}}')
    for key, value in style.items():
        _whole(key + value, "style", where)
    binned = _string(record, "length_bin", where) or length_bin(text)
    return Instruction(name, instruction, text, pieces, style, binned, _string(record, "domain", where))


def _pieces(instruction: str, text: str) -> tuple[str, ...]:
    """The quoted texts, if it is they that make up the text; else the text as one piece."""
    pieces = tuple(quoted(instruction))
    return pieces if " ".join(" ".join(pieces).split()) == " ".join(text.split()) else (text,)
