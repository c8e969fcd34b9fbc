"""Instruction sets of TypeScore: which text is quoted, and files of them with every fault."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mistakes import told

from zoo.papers.typescore.instructions import Instruction, content, length_bin, listed, quoted
from zoo.papers.typescore.render import STYLES


@pytest.mark.parametrize(
    "text, pieces",
    [
        ('a sign that says "OPEN daily"', ["OPEN daily"]),
        ('says""and " " only', []),
        ("“outer “inner” end” and “next”", ["outer “inner” end", "next"]),
        ("ein Schild „Heute geschlossen“ an der Tür", ["Heute geschlossen"]),
        ("une enseigne « Chez Léon » et «Tabac»", ["Chez Léon", "Tabac"]),
        ("ein Schild ‚Bitte klopfen‘ und ‹Tabac›", ["Bitte klopfen", "Tabac"]),
        ("'don't stop' on the boxer's shirt", ["don't stop"]),
        ("the baker’s ‘It’s open’ sign", ["It’s open"]),
        ("rock 'n' roll in the '90s, give 'em a sign: 'LOUD'", ["LOUD"]),
        ("5'10\" tall, and a sign 'UP'", ["UP"]),
        ("('OPEN'), ['CLOSED']; 'A'/'B'", ["OPEN", "CLOSED", "A", "B"]),
        ("says'OPEN'", []),
        ("the 'first of 'two' marks", ["first of 'two"]),  # a mark before a word does not close
        ('a 24"x36" poster that reads "SALE"', ["SALE"]),
        ('24"X 36" or 24"×36" or 24" × 36" or 2"x4"x8", "HI"', ["HI"]),
        ('“a "b" c” and "d “e” f"', ['a "b" c', "d “e” f"]),
        ('"OPEN" and an open " quote', ["OPEN"]),
        ("“mixed\" and 'OK'", ["OK"]),
        ('a sign "営業中 😀"', ["営業中 😀"]),
    ],
)
def test_quoted_text(text: str, pieces: list[str]) -> None:
    assert quoted(text) == pieces


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), "utf-8")
    return path


def test_a_file_is_read(tmp_path: Path) -> None:
    sign = 'A sign "OPEN" above "daily, from 9 to 5"'
    first = {"id": "a", "instruction": sign, "style": {"colour": "red"}, "domain": "shop", "more": 1}
    second = {"id": 7, "instruction": 'A sign "x"', "text": "Given wins", "style": None}
    path = lines(tmp_path / "set.jsonl", first, "", second, {"id": "c", "text": "No  instruction"})
    one, two = (
        Instruction("a", sign, "OPEN daily, from 9 to 5", {"colour": "red"}, "shop"),
        Instruction("7", 'A sign "x"', "Given wins"),
    )
    assert listed(str(path)) == [one, two, Instruction("c", "", "No  instruction")]
    assert listed(str(path), 2) == [one, two]
    path.write_bytes('\ufeff{"id": "a", "text": "x\u2028y"}\r\n{"id": "b", "text": "é"}'.encode())  # of other systems
    assert [(one.id, one.text) for one in listed(str(path))] == [("a", "x\u2028y"), ("b", "é")]


@pytest.mark.parametrize(
    "record, said",
    [
        ("{'id': 1}", "malformed"),
        ("[" * 200_000, ""),
        ([1], "got `array`"),
        ({"text": "x"}, "field `id`"),
        ({"id": "a", "text": "y"}, "id 'a' is that of an earlier line too"),
        ({"id": "../b", "text": "x"}, "id '../b' cannot begin a file's name"),
        ({"id": "b", "text": " \n"}, "quotes no text"),
        ({"id": True, "text": "x"}, "id"),
        ({"id": "b", "instruction": 5}, "instruction"),
        ({"id": "b", "text": "x", "style": {"bold": True}}, "style"),
        ({"id": "b", "text": "x\ud800"}, ""),  # half a character
    ],
)
def test_faulty_lines_are_named(tmp_path: Path, record: Any, said: str) -> None:
    path = lines(tmp_path / "set.jsonl", {"id": "a", "text": "x"}, "", record)
    with told(f"{path}:3: ", said):
        listed(str(path))


def test_files_that_hold_no_set(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "a", "text": "\xe9"}')
    lines(tmp_path / "empty.jsonl", "", " ")
    for name, said in (("none", "cannot be read"), ("latin", "no UTF-8 text"), ("empty", "is empty")):
        with told(f"{name}.jsonl", said):
            listed(str(tmp_path / f"{name}.jsonl"))


def test_the_shipped_list_has_the_published_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """118 records of 34 words with 12 quoted ones, over strata that are all filled; quotes hold the text."""
    made = listed("typeinst_synth")
    words = [len(one.text.split()) for one in made]
    assert (len(made), min(words), max(words)) == (118, 1, 30)
    assert abs(sum(len(one.instruction.split()) for one in made) / 118 - 34) <= 3
    assert abs(sum(words) / 118 - 12) <= 1.5
    assert [length_bin("word " * n) for n in (1, 3, 4, 31)] == ["1-3", "1-3", "4-8", "31+"]
    assert Counter(length_bin(one.text) for one in made) == {"1-3": 20, "4-8": 32, "9-16": 36, "17-30": 30}
    assert len({(one.domain, content(one.text)) for one in made}) == 24  # every domain meets every content
    assert len({one.text for one in made}) == len({one.instruction for one in made}) == 118
    for one in made:
        assert " ".join(quoted(one.instruction)) == one.text, one
        assert all(value in STYLES[attribute] for attribute, value in one.style.items()), one
        if "case" in one.style:  # whether it was followed can be told
            assert one.text != (one.text.upper() if one.style["case"] == "capitals" else one.text.lower()), one
    monkeypatch.chdir(tmp_path)
    (tmp_path / "typeinst_synth").mkdir()  # such as one with pictures of the list
    assert len(listed("typeinst_synth", 5)) == 5
