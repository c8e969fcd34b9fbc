"""Instruction sets of TypeScore: which text is quoted, and files of them with every fault."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from zoo.errors import UserError
from zoo.papers.typescore.instructions import Instruction, length_bin, quoted, read, write


@pytest.mark.parametrize(
    "text, pieces",
    [
        ('a sign that says "OPEN daily"', ["OPEN daily"]),
        ('"OPEN"', ["OPEN"]),
        ('"first" above "second", then "third"', ["first", "second", "third"]),
        ('"a""b"', ["a", "b"]),
        ("a sign with no quotes", []),
        ("", []),
        ('says""and " " only', []),
        ('says "" and "OPEN"', ["OPEN"]),
        ('"""OPEN"""', ["OPEN"]),
        ('the words" OPEN "', ["OPEN"]),
        ('"two\nlines"', ["two\nlines"]),
        ('it reads "Stop," and no more', ["Stop,"]),
        # curly, German, French
        ("a “curly” sign", ["curly"]),
        ("“outer “inner” end” and “next”", ["outer “inner” end", "next"]),
        ("ein Schild „Heute geschlossen“ an der Tür", ["Heute geschlossen"]),
        ("ein „deutsches” und ein “english” one", ["deutsches", "english"]),
        ("une enseigne « Chez Léon » et «Tabac»", ["Chez Léon", "Tabac"]),
        ("une enseigne «\u00a0Chez Léon\u202f»", ["Chez Léon"]),
        ("ein Schild ‚Bitte klopfen‘ und ‹Tabac›", ["Bitte klopfen", "Tabac"]),
        # apostrophes
        ("the baker's sign says it's 'OPEN'", ["OPEN"]),
        ("'don't stop' on the boxer's shirt", ["don't stop"]),
        ("the dogs' park and the cats' house", []),
        ("the dogs' park has a sign 'NO BALLS'.", ["NO BALLS"]),
        ("the baker’s ‘It’s open’ sign", ["It’s open"]),
        ("rock 'n' roll in the '90s, give 'em a sign: 'LOUD'", ["LOUD"]),
        ("rock ’n’ roll", []),
        ("'Rock 'n' Roll' in neon", ["Rock 'n' Roll"]),
        ("'give 'em hell'", ["give 'em hell"]),
        ("'Tis the season' on a card", ["Tis the season"]),
        ("5'10\" tall, and a sign 'UP'", ["UP"]),
        ("open 24'7", []),
        ("('OPEN'), ['CLOSED']; 'A'/'B'", ["OPEN", "CLOSED", "A", "B"]),
        ("says'OPEN'", []),
        ("'OPEN'now", []),
        ("the 'first of 'two' marks", ["first of 'two"]),  # a mark before a word does not close
        ("a lone ' mark ' here", []),
        # inches
        ('a 12" disc with "HITS of 66" on it', ["HITS of 66"]),
        ('a 12" by 9" frame, "HI"', ["HI"]),
        ('a 24"x36" poster that reads "SALE"', ["SALE"]),
        ('a 6"x4" card, "HI"', ["HI"]),
        ('a 6"x4", "HI"', ["HI"]),
        ('24" x 36", "HI"', ["HI"]),
        ('24"X 36" or 24"×36" or 24" × 36" or 2"x4"x8", "HI"', ["HI"]),
        ('bus 24"x-ray ward"', ["x-ray ward"]),
        ('a 24"x36" poster', []),
        # one in another
        ("\"she said 'go' and 'stop'\"", ["she said 'go' and 'stop'"]),
        ("'a \"b\" c'", ['a "b" c']),
        ('“a "b" c” and "d “e” f"', ['a "b" c', "d “e” f"]),
        ("“it’s the dogs’ park”", ["it’s the dogs’ park"]),
        ('"l\'été « chaud »"', ["l'été « chaud »"]),
        # partners missing
        ('an open " quote', []),
        ('"OPEN" and an open " quote', ["OPEN"]),
        ("“never closed, but 'this' is", ["this"]),
        ("closed only” and “OPEN”", ["OPEN"]),
        ("“mixed\" and 'OK'", ["OK"]),
        ("“one “two” three", ["two"]),
        ("„", []),
        ("'", []),
        ('"', []),
        # other alphabets
        ('a sign "営業中 😀"', ["営業中 😀"]),
        ("знак 'ОТКРЫТО'", ["ОТКРЫТО"]),
    ],
)
def test_quoted_text(text: str, pieces: list[str]) -> None:
    assert quoted(text) == pieces


@pytest.mark.parametrize(
    "words, name",
    [
        (1, "1-3"),
        (3, "1-3"),
        (4, "4-8"),
        (8, "4-8"),
        (9, "9-16"),
        (16, "9-16"),
        (17, "17-30"),
        (30, "17-30"),
        (31, "31+"),
    ],
)
def test_length_bins(words: int, name: str) -> None:
    assert length_bin("word " * words) == name


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), "utf-8")
    return path


def test_a_file_is_read(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "set.jsonl",
        {
            "id": "a",
            "instruction": 'A sign "OPEN" above "daily, from 9 to 5"',
            "style": {"colour": "red"},
            "domain": "shop",
            "more": 1,
        },
        "",
        {"id": 7, "instruction": 'A sign "x"', "text": "Given wins"},
        {"id": "c", "text": "No  instruction"},
        {
            "id": "d",
            "instruction": '"a" "b"',
            "text": "a b",
            "pieces": ["b", "a"],
            "length_bin": "short",
            "style": None,
        },
        {"id": "f", "text": "a b  a", "pieces": ["", "a\na", "b"]},
        {"id": "e", "instruction": '"a"  "b"', "text": "a  b"},
    )
    assert read(path) == [
        Instruction(
            "a",
            'A sign "OPEN" above "daily, from 9 to 5"',
            "OPEN daily, from 9 to 5",
            ("OPEN", "daily, from 9 to 5"),
            {"colour": "red"},
            "4-8",
            "shop",
        ),
        Instruction("7", 'A sign "x"', "Given wins", ("Given wins",), {}, "1-3", ""),
        Instruction("c", "", "No  instruction", ("No  instruction",), {}, "1-3", ""),
        Instruction("d", '"a" "b"', "a b", ("b", "a"), {}, "short", ""),
        Instruction("f", "", "a b  a", ("", "a\na", "b"), {}, "1-3", ""),
        Instruction("e", '"a"  "b"', "a  b", ("a", "b"), {}, "1-3", ""),
    ]
    assert read(str(path)) == read(path)


def test_files_of_other_systems(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes('\ufeff{"id": "a", "text": "x\u2028y"}\r\n{"id": "b", "text": "é"}'.encode())
    assert [(one.id, one.text) for one in read(path)] == [("a", "x\u2028y"), ("b", "é")]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    made = [
        Instruction(
            "a", 'A sign "OPEN" and "9 to 5"', "OPEN 9 to 5", ("OPEN", "9 to 5"), {"colour": "red"}, "4-8", "shop"
        ),
        Instruction("b", "", "“é” 😀\nline", ("“é” 😀\nline",), {}, "1-3", ""),
        Instruction("c", '"a" "b"', "b a", ("b", "a"), {}, "1-3", ""),
    ]
    path.write_text("an older file")
    write(path, made)
    assert read(path) == made
    assert ["pieces" in json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]] == [False, False, True]
    assert [entry.name for entry in tmp_path.iterdir()] == ["set.jsonl"]


def test_an_instruction_is_a_value() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Instruction("a", "", "x").text = "y"  # type: ignore[misc]


GOOD = {"id": "a", "text": "x"}


@pytest.mark.parametrize(
    "record, said",
    [
        ("{'id': 1}", "not JSON"),
        ('{"id": "b", "text": "x"', "not JSON"),
        ("[" * 200_000, "not JSON"),
        ('{"id": ' + "1" * 5000 + "}", "not JSON"),
        ([1], "a JSON list, not an object"),
        ("null", "a JSON NoneType, not an object"),
        ({"text": "x"}, "no id"),
        ({"id": None, "text": "x"}, "no id"),
        ({"id": " ", "text": "x"}, "no id"),
        ({"id": True, "text": "x"}, "id True must be a text"),
        ({"id": "a", "text": "y"}, "id 'a' is that of line 1 too"),
        ({"id": "b/c", "text": "x"}, "id 'b/c' cannot begin the name"),
        ({"id": "../b", "text": "x"}, "cannot begin the name"),
        ({"id": "b\u0000", "text": "x"}, "cannot begin the name"),
        ({"id": "b "}, "cannot begin the name"),
        ({"id": "b"}, "no instruction and no text"),
        ({"id": "b", "instruction": "A sign that says OPEN"}, "the instruction of id 'b' quotes no text"),
        ({"id": "b", "instruction": 'A sign "OPEN'}, "quotes no text"),
        ({"id": "b", "text": " \n"}, "is blank"),
        ({"id": "b", "instruction": 5}, "instruction 5 must be a text"),
        ({"id": "b", "text": ["x"]}, r"text \['x'\] must be a text"),
        ({"id": "b", "text": "x", "domain": 1}, "domain 1 must be a text"),
        ({"id": "b", "text": "x", "pieces": "x"}, "pieces 'x' must be a list"),
        ({"id": "b", "text": "x", "pieces": [1]}, r"pieces \[1\] must be a list"),
        ({"id": "b", "text": "x", "pieces": []}, r"pieces \[\] do not hold the words of the text 'x'"),
        ({"id": "b", "text": "x", "pieces": ["", " "]}, "do not hold the words"),
        ({"id": "b", "text": "x y", "pieces": ["x"]}, "do not hold the words"),
        ({"id": "b", "text": "x y", "pieces": ["y", "x x"]}, "do not hold the words"),
        ({"id": "b", "instruction": 'says "x y"', "pieces": ["z"]}, "do not hold the words of the text 'x y'"),
        ({"id": "b", "text": "x " * 999, "pieces": ["y"] * 999}, "do not hold the words"),
        ({"id": "b", "text": "x", "style": "red"}, "style 'red' must be an object"),
        ({"id": "b", "text": "x", "style": {"bold": True}}, "style {'bold': True} must be an object"),
        ({"id": "b", "text": "x\ud800"}, "half a character"),
    ],
)
def test_faulty_lines_are_named(tmp_path: Path, record: Any, said: str) -> None:
    path = lines(tmp_path / "set.jsonl", GOOD, "", record)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}:3: .*{said}") as caught:
        read(path)
    assert len(str(caught.value)) < 400


def test_files_that_hold_no_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl cannot be read"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "a", "text": "\xe9"}')
    with pytest.raises(UserError, match="no UTF-8 text"):
        read(tmp_path / "latin.jsonl")
    with pytest.raises(UserError, match="are empty"):
        read(lines(tmp_path / "empty.jsonl", "", " "))
