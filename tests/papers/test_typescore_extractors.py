"""Extractors of TypeScore: reading order, joining, readings on disk, which packages they call and how."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mistakes import told
from PIL import Image
from typescore_stub import TEXT_CHUNK, Fake, picture

from zoo.papers.typescore.extractors import Extraction, Line, Oracle, RapidOcr
from zoo.papers.typescore.extractors.base import Key, Readings, join, reading_order, text_of

PAGE = [["Grand", "opening", "today"], ["half price", "until 9 pm"], ["bread,", "tea", "& cake"]]


def spread(degrees: float) -> list[Line]:
    """Boxes of a page turned by `degrees` about its middle, shuffled."""
    lines, turn = [], np.deg2rad(degrees)
    matrix = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    for r, row in enumerate(PAGE):
        x = 40.0 + 10 * r
        for text in row:
            top, end = 32.0 * r + 3 * (len(text) % 3), x + 11 * len(text)  # a row's boxes are not quite level
            corners = np.array([[x, top], [end, top], [end, top + 20], [x, top + 20]])
            lines.append(Line(text, tuple(map(tuple, (corners - 256) @ matrix + 256))))
            x = end + 12
    return [lines[i] for i in np.random.default_rng(0).permutation(len(lines))]


@pytest.mark.parametrize("degrees", [0, 8, -8, 30, -30, 90, -90])
def test_rows_are_read_in_order_however_the_page_is_turned(degrees: float) -> None:
    assert [[line.text for line in row] for row in reading_order(spread(degrees))] == PAGE
    odd = Line("!", ((300.0, 0.0), (300.0, 9.0), (291.0, 9.0), (291.0, 0.0)))  # turned by 90 degrees, and narrow
    rows = [[line.text for line in row if line is not odd] for row in reading_order([*spread(8), odd])]
    assert [row for row in rows if row] == PAGE
    dot = ((5.0, 5.0),) * 4  # no width, no height
    assert (text_of([Line(" ", dot), Line("a", dot)]), text_of([])) == ("a", "")


@pytest.mark.parametrize(
    "rows, text",
    [
        (["an exam-", "ple"], "an example"),
        (["AN EXAM-", "PLE"], "AN EXAMPLE"),
        (["an X-", "RAY"], "an X-RAY"),
        (["open 24-", "hour"], "open 24-hour"),
        (["open -", "closed"], "open - closed"),
        (["ex-", "am-", "ple"], "example"),
        (["soft\u00ad", "Ware"], "softWare"),
        (["", "  a \t b ", "", "c"], "a b c"),
    ],
)
def test_rows_are_joined_by_spaces_and_broken_words_put_together(rows: list[str], text: str) -> None:
    assert join(rows) == text


def test_oracle_reads_the_text_chunk_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.effect_noise((64, 64), 50).save(file)
    file.write_bytes(file.read_bytes()[:2000])
    broken, first, second = Oracle().extract([Image.open(file), picture("Open – 9 to 5"), Image.new("RGB", (4, 4))])
    assert first == Extraction("Open – 9 to 5")
    assert TEXT_CHUNK in (second.error or "")
    assert broken.error


def test_readings_come_back_and_failures_and_damaged_lines_are_read_anew(tmp_path: Path) -> None:
    images = [picture(name) for name in ("Open", "Shut", "Sale")]
    path = tmp_path / "readings.jsonl"

    def through(extractor: Any, sha256: str = "x", path: Path = path) -> list[Extraction]:
        keys = [Key(name, sha256) for name in "abc"]
        return [
            one for *_, one in sorted(Readings(path).through(extractor, keys, images.__getitem__), key=lambda f: f[0])
        ]

    with pytest.raises(KeyboardInterrupt):
        through(Fake(stops_after=1))
    with open(path, "ab") as file:
        file.write(b'\n{"key": ["b", "x"], "extraction": {"text": "half')  # killed within a line
    fake, again, other = Fake(fails=("Shut",)), Fake(), Fake()
    found = through(fake)
    assert [one.text for one in found] == ["Open", "", "Sale"]
    assert through(again)[0] == found[0]  # with its boxes
    through(other, "y")
    assert (fake.read, again.read, len(other.read)) == (["Shut", "Sale"], ["Shut"], 3)
    with told("out=FOLDER"):
        through(Fake(), path=tmp_path / "none" / "r")


@pytest.mark.parametrize("absent", ["rapidocr", "onnxruntime"])
def test_missing_packages_name_their_extra(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("rapidocr", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setitem(sys.modules, absent, None)
    for call in (lambda e: e.check(), lambda e: e.extract([Image.new("RGB", (4, 4))]), lambda e: e.version()):
        with told(f"needs the package {absent}", "extra `typescore`"):
            call(RapidOcr())


def test_rapidocr_is_set_up_as_it_must_be_and_its_lines_are_put_in_order(rapid: dict[str, Any]) -> None:
    found = RapidOcr(threads=1).extract([Image.new("RGB", (3, 2), (10, 20, 30))])[0]
    assert found == Extraction("")  # None in every field: nothing was found
    assert rapid["image"].shape == (2, 3, 3)
    assert rapid["image"][0, 0].tolist() == [30, 20, 10]
    assert rapid["params"]["EngineConfig.onnxruntime.intra_op_num_threads"] == 1
    low, high = ([[0, y], [50, y], [50, y + 10], [0, y + 10]] for y in (40, 0))
    rapid["found"] = np.array([low, high], np.float32), ("second", "first")
    found = RapidOcr().extract([Image.new("RGB", (64, 64))])[0]
    assert found.text == "first second"
    assert [line.text for line in found.lines] == ["second", "first"]


def test_transparency_is_white_and_every_mode_becomes_rgb_but_for_shades_of_an_unknown_range(rapid: Any) -> None:
    """White lettering on light grey must not become white on white, which would be read as no text and score 0."""
    for mode, colour in (("RGBA", (0, 0, 0, 0)), ("LA", (0, 0)), ("1", 1), ("L", 255)):
        RapidOcr().extract([Image.new(mode, (2, 2), colour)])
        assert rapid["image"].tolist() == [[[255] * 3] * 2] * 2
    for kind in (np.uint16, np.int32, np.float32):
        found = Oracle().extract([Image.fromarray(np.array([[0, 100, 4095]], kind))])[0]
        assert "save it as RGB or as 8-bit grey" in (found.error or "")
