"""Extractors of TypeScore: reading order, cleaning, readings on disk, which packages they call and how."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from typescore_stub import TEXT_CHUNK, Fake, picture

from zoo.errors import UserError
from zoo.papers.typescore.extractors import Line, Oracle, RapidOcr, clean
from zoo.papers.typescore.extractors.base import Key, Readings, join, reading_order, text_of
from zoo.papers.typescore.extractors.ocr import as_read

# ------------------------------------------------------------------------------------------------------------------ order


def spread(rows: list[list[str]], degrees: float, height: float = 20.0) -> list[Line]:
    """Boxes of a page turned by `degrees` about its middle, shuffled."""
    lines = []
    turn = np.deg2rad(degrees)
    matrix = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    for r, row in enumerate(rows):
        x = 40.0 + 10 * r
        for text in row:
            wide = 11.0 * len(text)
            top = 1.6 * height * r + 3 * (len(text) % 3)  # a row's boxes are not quite level
            corners = np.array([[x, top], [x + wide, top], [x + wide, top + height], [x, top + height]])
            lines.append(Line(text, tuple(map(tuple, (corners - 256) @ matrix + 256)), 1.0))
            x += wide + 12
    return [lines[i] for i in np.random.default_rng(0).permutation(len(lines))]


PAGE = [["Grand", "opening", "today"], ["half price", "until 9 pm"], ["bread,", "tea", "& cake"]]


@pytest.mark.parametrize("degrees", [0, 8, -8, 15, 30, -30, 90, -90, 172, 180, -180])
def test_rows_are_read_in_order_however_the_page_is_turned(degrees: float) -> None:
    found = reading_order(spread(PAGE, degrees))
    assert [[line.text for line in row] for row in found] == PAGE


def test_one_odd_box_does_not_turn_the_page() -> None:
    odd = Line("!", ((300.0, 0.0), (300.0, 9.0), (291.0, 9.0), (291.0, 0.0)), 1.0)  # turned by 90 degrees, and narrow
    rows = reading_order([*spread(PAGE, 8), odd])
    assert [line.text for row in rows for line in row if line.text != "!"] == [text for row in PAGE for text in row]


def test_lines_without_text_and_pages_without_lines() -> None:
    assert reading_order([]) == []
    assert text_of([]) == ""
    dot = ((5.0, 5.0),) * 4  # no width, no height
    assert text_of([Line(" ", dot, 1.0), Line("a", dot, 1.0)]) == "a"


@pytest.mark.parametrize(
    "rows, text",
    [
        (["open daily", "from nine"], "open daily from nine"),
        (["an exam-", "ple"], "an example"),
        (["AN EXAM-", "PLE"], "AN EXAMPLE"),
        (["an X-", "RAY"], "an X-RAY"),
        (["open 24-", "hour"], "open 24-hour"),
        (["open -", "closed"], "open - closed"),
        (["soft\u00ad", "Ware"], "softWare"),
        (["", "  a \t b ", "", "c"], "a b c"),
        ([], ""),
    ],
)
def test_rows_are_joined_by_spaces_and_broken_words_put_together(rows: list[str], text: str) -> None:
    assert join(rows) == text


def test_boxes_of_tall_and_upside_down_crops_begin_where_the_text_does() -> None:
    wide = np.array([[0, 0], [90, 0], [90, 10], [0, 10]], float)
    tall = np.array([[0, 0], [10, 0], [10, 90], [0, 90]], float)
    letter = np.array([[0, 0], [10, 0], [10, 20], [0, 20]], float)
    np.testing.assert_array_equal(as_read(np.stack([wide, letter]), False), [wide, letter])
    np.testing.assert_array_equal(as_read(wide[None], True)[0][0], [90, 10])
    down, up = as_read(tall[None], False)[0], as_read(tall[None], True)[0]
    assert down[0].tolist() == [10, 0]
    assert down[1].tolist() == [10, 90]
    assert up[0].tolist() == [0, 90]
    assert up[1].tolist() == [0, 0]


# --- readings, packages -----------------------------------------------------------------------------


def test_oracle_reads_the_text_chunk_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.effect_noise((64, 64), 50).save(file)
    file.write_bytes(file.read_bytes()[:2000])
    broken, first, second = Oracle().extract([Image.open(file), picture("Open – 9 to 5"), Image.new("RGB", (4, 4))])
    assert first == dataclasses.replace(first, text="Open – 9 to 5", error=None)
    assert second.error is not None
    assert TEXT_CHUNK in second.error
    assert broken.error


def test_readings_come_back_and_failures_and_damaged_lines_are_read_anew(tmp_path: Path) -> None:
    keys = [Key(name, "x") for name in ("a", "b", "c")]
    images = [picture(name) for name in ("Open", "Shut", "Sale")]
    path, fake = tmp_path / "readings.jsonl", Fake(fails=("Shut",))
    with pytest.raises(KeyboardInterrupt):
        Readings(path).through(Fake(stops_after=1).extract, keys, images)
    with open(path, "ab") as file:
        file.write(b'\n{"key": ["b", "x", ""], "extraction": {"text": "half')  # killed within a line
    found = Readings(path).through(fake.extract, keys, images)
    assert fake.read == ["Shut", "Sale"]
    assert [one.text for one in found] == ["Open", "", "Sale"]
    again, fake = Readings(path), Fake()
    assert [again.good(key) for key in keys] == [True, False, True]
    assert again.failed(keys[1])
    assert again.through(fake.extract, keys, images)[0] == found[0]  # with its boxes
    assert fake.read == ["Shut"]
    others = [key._replace(sha256="y") for key in keys] + [keys[0]._replace(question="Is it red?")]
    assert not any(again.good(key) or again.failed(key) for key in others)
    with pytest.raises(UserError, match="out=FOLDER"):
        Readings(tmp_path / "none" / "r").through(Fake().extract, keys, images)


@pytest.mark.parametrize("absent", ["rapidocr", "onnxruntime"])
def test_missing_packages_name_their_extra(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("rapidocr", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setitem(sys.modules, absent, None)
    for call in (lambda e: e.check(), lambda e: e.extract([Image.new("RGB", (4, 4))]), lambda e: e.version()):
        with pytest.raises(UserError, match=rf"needs the package {absent}.*extra `typescore`"):
            call(RapidOcr())


def test_rapidocr_is_set_up_as_it_must_be(rapid: dict[str, Any]) -> None:
    found = RapidOcr(threads=1).extract([Image.new("RGB", (3, 2), (10, 20, 30))])[0]
    assert (found.text, found.lines, found.error) == ("", (), None)  # None in every field: nothing was found
    assert rapid["image"].shape == (2, 3, 3)
    assert rapid["image"][0, 0].tolist() == [30, 20, 10]
    assert rapid["params"]["EngineConfig.onnxruntime.intra_op_num_threads"] == 1
    assert rapid["params"]["Global.log_level"] == "error"
    assert rapid["params"]["Global.use_cls"] is True


def test_rapidocr_lines_become_text_in_reading_order(rapid: dict[str, Any]) -> None:
    low, high = ([[0, y], [50, y], [50, y + 10], [0, y + 10]] for y in (40, 0))
    rapid["found"] = np.array([low, high], np.float32), ("second", "first"), (0.9, np.float32(0.8))
    rapid["labels"] = [("0", 1.0), ("0", 0.9)]
    found = RapidOcr().extract([Image.new("RGB", (64, 64))])[0]
    assert found.text == "first second"
    assert [line.text for line in found.lines] == ["second", "first"]
    assert rapid["read"] == ["upright"]  # once


def test_rapidocr_turns_all_lines_or_none(rapid: dict[str, Any]) -> None:
    low, high = ([[0, y], [50, y], [50, y + 10], [0, y + 10]] for y in (40, 0))
    rapid["found"] = np.array([low, high], np.float32), ("second", "first"), (0.9, 0.8)
    rapid["labels"] = [("0", 1.0), ("180", 0.99)]
    for turned, way, text in ((0.3, "upright", "first second"), (0.95, "turned", "second first")):
        rapid["sure"], rapid["read"] = {"turned": (turned, turned)}, []
        assert RapidOcr().extract([Image.new("RGB", (64, 64))])[0].text == text
        assert (rapid["way"], rapid["read"]) == (way, ["upright", "turned"])


@pytest.mark.parametrize("mode, colour", [("RGBA", (0, 0, 0, 0)), ("LA", (0, 0)), ("1", 1), ("L", 255), ("P", 255)])
def test_transparency_is_white_and_every_mode_becomes_rgb(mode: str, colour: Any, rapid: dict[str, Any]) -> None:
    image = Image.new(mode, (2, 2), colour)
    if mode == "P":
        image.putpalette([255, 255, 255] * 256)
    RapidOcr().extract([image])
    assert rapid["image"].tolist() == [[[255] * 3] * 2] * 2


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_shades_of_an_unknown_range_are_an_error(kind: Any) -> None:
    """White lettering on light grey must not become white on white, which would be read as no text and score 0."""
    found = Oracle().extract([Image.fromarray(np.array([[0, 100, 4095]], kind))])[0]
    assert "save it as RGB or as 8-bit grey" in (found.error or "")


@pytest.mark.slow
def test_rapidocr_reads_clean_renders_exactly() -> None:
    """The real package: level, turned by 15 and 180 degrees, without text."""
    pytest.importorskip("rapidocr", reason="needs the typescore extra")
    pytest.importorskip("onnxruntime", reason="needs the typescore extra")
    page = Image.new("RGB", (512, 512), "white")
    for i, row in enumerate(("Grand opening today,", "half price until 9 pm:", "bread, tea & cake")):
        ImageDraw.Draw(page).text((60, 140 + 54 * i), row, fill="black", font=ImageFont.load_default(size=36))
    pages = [page.rotate(a, fillcolor="white", resample=Image.Resampling.BICUBIC) for a in (0, 15, 180, 90)]
    *read, empty = RapidOcr().extract([*pages, Image.new("RGB", (64, 64), "white")])
    assert {one.text for one in read} == {"Grand opening today, half price until 9 pm: bread, tea & cake"}
    assert (empty.text, empty.error) == ("", None)


# ------------------------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize(
    "answer, text",
    [
        ("open daily", "open daily"),
        ('"open daily"', "open daily"),
        ("“open daily”", "open daily"),
        ("'it's open'", "it's open"),
        ('"open" and "closed"', '"open" and "closed"'),
        ('""open""', '""open""'),
        ("```\nopen\ndaily\n```", "open daily"),
        ("```text\n'open daily'\n```", "open daily"),
        ("```open```", "open"),
        ("NO TEXT", ""),
        ("```\nNO TEXT\n```", ""),
        ("NO TEXT HERE", "NO TEXT HERE"),
    ],
)
def test_answers_are_cleaned_of_their_wrapping(answer: str, text: str) -> None:
    assert clean(answer) == text
