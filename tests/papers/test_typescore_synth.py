"""The instruction set that the zoo ships: what the generator gives, its statistics, and the parsing of its quotes.

`python tests/papers/test_typescore_synth.py` writes the shipped file anew.
"""

import re
from collections import Counter
from pathlib import Path

import pytest

from zoo.papers.typescore import instructions, synth
from zoo.papers.typescore.instructions import Instruction
from zoo.papers.typescore.render import STYLES


@pytest.fixture(scope="module")
def made() -> list[Instruction]:
    return synth.generate()


def words(text: str) -> int:
    return len(text.split())


def test_the_generator_reproduces_the_shipped_file(made: list[Instruction]) -> None:
    assert list(instructions.read(synth.FILE)) == made


def test_the_shipped_list_is_known_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (synth.SHIPPED, synth.FILE.name):
        (tmp_path / name).mkdir()  # such as one with pictures of the list
        assert len(synth.listed(name)) == synth.RECORDS
        (tmp_path / name).rmdir()
        (tmp_path / name).write_text('{"id": "a", "text": "Open"}')
        assert [one.id for one in synth.listed(name)] == ["a"]  # a file of one's own goes first


def test_another_seed_gives_another_list(made: list[Instruction]) -> None:
    assert {i.text for i in synth.generate(1)} != {i.text for i in made}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lengths_are_those_of_the_published_set(seed: int) -> None:
    found = synth.generate(seed)
    assert len(found) == synth.RECORDS == 118
    assert abs(sum(words(i.instruction) for i in found) / 118 - 34) <= 3
    assert abs(sum(words(i.text) for i in found) / 118 - 12) <= 1.5
    assert min(words(i.text) for i in found) == 1
    assert max(words(i.text) for i in found) == 30


def test_strata_are_filled_evenly(made: list[Instruction]) -> None:
    assert Counter(i.length_bin for i in made) == synth.LENGTH_BINS
    for i in made:
        low, high = map(int, i.length_bin.split("-"))
        assert low <= words(i.text) <= high, i
        assert instructions.length_bin(i.text) == i.length_bin
    domains, contents = Counter(i.domain for i in made), Counter(synth.content(i.text) for i in made)
    assert set(domains) == set(synth.DOMAINS)
    assert min(domains.values()) >= 19
    assert set(contents) == set(synth.CONTENTS)
    assert min(contents.values()) >= 29
    assert len({(i.domain, synth.content(i.text)) for i in made}) == 24  # every domain meets every content
    assert len({(i.length_bin, synth.content(i.text)) for i in made}) == 16


def test_records_are_told_apart(made: list[Instruction]) -> None:
    assert len({i.id for i in made}) == len({i.text for i in made}) == len({i.instruction for i in made}) == 118
    assert all(re.fullmatch(r"[\w-]+", i.id) and "_" not in i.id for i in made)  # pictures are {id}_{k}.png


def test_the_quotes_hold_the_text(made: list[Instruction]) -> None:
    for i in made:
        pieces = instructions.quoted(i.instruction)
        assert tuple(pieces) == tuple(i.pieces), i
        assert " ".join(pieces) == i.text, i
    marks = Counter(m for i in made for m in ('"', "“", "'") if f" {m}{i.pieces[0]}" in i.instruction)
    assert len(marks) == 3
    assert sum(marks.values()) == 118
    assert sum(len(i.pieces) == 2 for i in made) >= 8


def test_styles_are_asked_for_in_words(made: list[Instruction]) -> None:
    said = {
        "capitals": ("capital letters",),
        "lowercase": ("lowercase letters",),
        **synth._PLACES,
        **synth._CARRIERS,
    }
    for i in made:
        rest = i.instruction
        for piece in i.pieces:
            rest = rest.replace(piece, "")
        for attribute, value in i.style.items():
            assert value in STYLES[attribute], i
            assert any(phrase in rest or phrase.capitalize() in rest for phrase in said.get(value, (value,))), (
                i,
                value,
            )
    for attribute, values in STYLES.items():
        met = Counter(i.style.get(attribute) for i in made)
        assert all(met[value] >= 5 for value in values if value != "regular"), (attribute, met)


def test_a_case_asked_for_can_be_told_from_the_text(made: list[Instruction]) -> None:
    for i in made:
        if "case" in i.style:
            assert i.text != (i.text.upper() if i.style["case"] == "capitals" else i.text.lower()), i


def test_sentences_are_whole(made: list[Instruction]) -> None:
    for i in made:
        assert not re.search(r"[{}]|  |\b[Aa] [aeiou]|[.,;!?]{2}", i.instruction.replace('."', '"')), i
        assert i.instruction.endswith("."), i
        assert i.instruction[0].isupper(), i
        assert i.text == " ".join(i.text.split()), i


if __name__ == "__main__":
    instructions.write(synth.FILE, synth.generate())
