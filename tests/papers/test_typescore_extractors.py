"""Extractors of TypeScore: reading order, cleaning, which packages they call and how."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from typescore_stub import (
    grey,
    picture,
)

from zoo.errors import UserError
from zoo.papers.typescore.extractors import (
    PROMPT,
    TEXT_CHUNK,
    Cached,
    Extraction,
    Http,
    Line,
    RapidOcr,
    Transformers,
    clean,
    describe,
    get_extractor,
    join,
    reading_order,
    text_of,
)
from zoo.papers.typescore.extractors.base import flat
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


def test_without_turning_back_the_rows_would_mix() -> None:
    """The case above tells something: by height alone, the words of a page turned by 15 degrees come in another order."""
    lines = sorted(spread(PAGE, 15), key=lambda line: np.mean([y for _, y in line.box]))
    assert [line.text for line in lines] != [text for row in PAGE for text in row]


def test_one_odd_box_does_not_turn_the_page() -> None:
    odd = Line("!", ((300.0, 0.0), (300.0, 9.0), (291.0, 9.0), (291.0, 0.0)), 1.0)  # turned by 90 degrees, and narrow
    rows = reading_order([*spread(PAGE, 8), odd])
    assert [line.text for row in rows for line in row if line.text != "!"] == [text for row in PAGE for text in row]


def test_angles_on_both_sides_of_half_a_turn_are_one_direction() -> None:
    """Two rows upside down, one a degree less than half a turn and one a degree more; a narrow odd box lies between."""

    def box(text: str, x: float, y: float, degrees: float, wide: float) -> Line:
        turn = np.deg2rad(degrees)
        across, down = wide * np.array([np.cos(turn), np.sin(turn)]), 20 * np.array([-np.sin(turn), np.cos(turn)])
        corners = np.array([x, y]) + np.array([-across - down, across - down, across + down, down - across]) / 2
        return Line(text, tuple(map(tuple, corners)), 1.0)

    lines = [box("second", 100, 50, 181, 80), box("first", 100, 100, 179, 80), box("third", 100, 0, 0, 4)]
    assert text_of(lines) == "first second third"


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
        (["an exam\u2010", "ple of"], "an example of"),
        (["AN EXAM-", "PLE"], "AN EXAMPLE"),
        (["Coca-", "Cola"], "Coca-Cola"),
        (["an X-", "RAY"], "an X-RAY"),
        (["open 24-", "hour"], "open 24-hour"),
        (["555-", "0199"], "555-0199"),
        (["open -", "closed"], "open - closed"),
        (["well-", "- known"], "well- - known"),
        (["soft\u00ad", "Ware"], "softWare"),
        (["-", "a"], "- a"),
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


# ------------------------------------------------------------------------------------------------- extractors by name, oracle


def test_extractors_come_by_name_with_typed_fields() -> None:
    made = get_extractor("http", base_url="http://127.0.0.1:1/v1", model="m", threads="2", temperature=None)
    assert made == Http(base_url="http://127.0.0.1:1/v1", model="m", threads=2, temperature=None)
    assert hash(made)
    assert dataclasses.replace(made, threads=3).threads == 3
    assert get_extractor("rapidocr").name == "rapidocr"


@pytest.mark.parametrize(
    "name, fields, said",
    [
        ("rapidorc", {}, "did you mean 'rapidocr'"),
        ("http", {"modle": "m"}, "did you mean 'model'"),
        ("http", {"threads": "many"}, "threads"),
        ("http", {"base_url": "localhost:8000"}, "base_url is 'localhost:8000'"),
        ("http", {"base_url": "file:///etc/passwd"}, "give http:// or https://"),
        ("http", {"base_url": "http://h/v1/chat/completions"}, "leave /chat/completions off"),
        ("http", {"base_url": "http://h:99999/v1"}, "no address"),
    ],
)
def test_wrong_names_and_values_are_sentences(name: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=".*" + said.replace("(", r"\(")):
        get_extractor(name, **fields)


def test_oracle_reads_the_text_chunk_and_nothing_else() -> None:
    plain = Image.new("RGB", (4, 4))
    first, second = get_extractor("oracle").extract([picture("Open daily – 9 to 5"), plain])
    assert first == dataclasses.replace(first, text="Open daily – 9 to 5", error=None)
    assert second.error
    assert TEXT_CHUNK in second.error
    assert second.text == ""


def test_oracle_and_renderer_mean_the_same_chunk() -> None:
    from zoo.papers.typescore import render

    assert render.TEXT == TEXT_CHUNK


def test_a_broken_image_is_an_error_and_stops_no_other(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.effect_noise((64, 64), 50).save(file)
    file.write_bytes(file.read_bytes()[:2000])
    for extractor in (get_extractor("oracle"), Cached(get_extractor("oracle"), tmp_path / "cache")):
        first, second = extractor.extract([Image.open(file), picture("fine")])
        assert first.error
        assert second.text == "fine"


def test_what_is_described_leaves_out_what_does_not_change_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Http(base_url="http://127.0.0.1:1/v1", model="m", threads=2, timeout_s=1, api_key_env="A")
    assert describe(one) == describe(dataclasses.replace(one, threads=8, timeout_s=9, api_key_env="B"))
    assert describe(one) != describe(dataclasses.replace(one, model="n"))
    assert describe(one)["prompt"] == PROMPT
    assert describe(one)["name"] == "http"
    assert describe(one)["version"]
    json.dumps(describe(one))


@pytest.mark.parametrize(
    "name, fields, absent, extra",
    [
        ("rapidocr", {}, "rapidocr", "typescore"),
        ("rapidocr", {}, "onnxruntime", "typescore"),
        ("tesseract", {}, "pytesseract", "typescore"),
        ("transformers", {"model": "m"}, "transformers", "vlm"),
    ],
)
def test_missing_packages_name_their_extra(
    name: str, fields: dict[str, Any], absent: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("rapidocr", "onnxruntime", "transformers", "torch"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setitem(sys.modules, absent, None)
    for call in (lambda e: e.check(), lambda e: e.extract([Image.new("RGB", (4, 4))]), lambda e: e.version()):
        with pytest.raises(UserError, match=rf"needs the package {absent}.*extra `{extra}`"):
            call(get_extractor(name, **fields))


# --------------------------------------------------------------------------------------------- rapidocr, tesseract, transformers


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
    assert Extraction.of(json.loads(json.dumps(found.record()))) == found
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


@pytest.mark.parametrize("file", ["", "png", "tiff"])
def test_grey_of_16_bits_keeps_its_shades(file: str) -> None:
    """White lettering on light grey must not become white on white, which would be read as no text and score 0."""
    seen = flat(grey([[0, 128, 129, 60395, 65535]], np.uint16, file))
    assert (seen.mode, np.asarray(seen)[0, :, 1].tolist()) == ("RGB", [0, 0, 1, 235, 255])


@pytest.mark.parametrize(
    "dtype, shades, want",
    [
        (np.int32, [0, 100, 255], [0, 100, 255]),
        (np.int32, [0, 25700, 65535], [0, 100, 255]),
        (np.float32, [0, 99.6, 255], [0, 100, 255]),
        (np.float32, [0, 25700, 65535], [0, 100, 255]),
    ],
)
def test_grey_of_32_bits_is_scaled_where_its_range_is_clear(dtype: Any, shades: list[float], want: list[int]) -> None:
    assert np.asarray(flat(grey([shades], dtype)))[0, :, 0].tolist() == want


@pytest.mark.parametrize(
    "dtype, shades",
    [
        (np.float32, [0, 0.5, 1]),
        (np.int32, [0, 1, 1]),
        (np.int32, [0, 100, 4095]),
        (np.int32, [-5, 0, 200]),
        (np.int32, [0, 1, 70000]),
        (np.float32, [0, np.nan, 200]),
    ],
)
def test_grey_of_an_unknown_range_is_an_error(dtype: Any, shades: list[float], tmp_path: Path) -> None:
    image = grey([shades], dtype)
    for extractor in (get_extractor("oracle"), Cached(get_extractor("oracle"), tmp_path)):
        found = extractor.extract([image])[0]
        assert f"has mode {image.mode} with shades from" in (found.error or "")
        assert "as RGB or as L" in (found.error or "")


def test_a_png_of_mode_i_has_16_bits_however_dark() -> None:
    """Older versions of Pillow open 16-bit PNG files so."""
    image = grey([[0, 257, 2570]], np.int32)
    image.format = "PNG"
    assert np.asarray(flat(image))[0, :, 0].tolist() == [0, 1, 10]


def test_grey_of_16_bits_keeps_its_info_and_its_transparency() -> None:
    image = grey([[0, 30000, 30001]], np.uint16)
    image.info |= {"transparency": 30000, TEXT_CHUNK: "kept"}
    seen = flat(image)
    assert np.asarray(seen)[0, :, 0].tolist() == [0, 255, 117]
    assert seen.info == {TEXT_CHUNK: "kept"}
    assert flat(Image.new("I;16", (0, 0))).size == (0, 0)


def test_tesseract_words_become_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["", "open", "exam-", " ", "ple"]
    table = {
        "text": words,
        "block_num": [1] * 5,
        "par_num": [1] * 5,
        "line_num": [0, 1, 1, 2, 2],
        "left": [0, 10, 60, 0, 12],
        "top": [0, 5, 4, 0, 30],
        "width": [99, 40, 30, 0, 20],
        "height": [99, 10, 12, 0, 9],
        "conf": [-1, 90, 80, -1, 70.0],
    }
    asked: dict[str, Any] = {}

    def image_to_data(image: Image.Image, **given: Any) -> dict[str, list[Any]]:
        asked.update(given)
        if image.size == (1, 1):
            raise RuntimeError("Tesseract process timeout")
        return table

    module = types.ModuleType("pytesseract")
    module.image_to_data, module.Output = image_to_data, types.SimpleNamespace(DICT="dict")  # type: ignore[attr-defined]
    module.get_languages = lambda: ["eng", "osd"]  # type: ignore[attr-defined]
    module.get_tesseract_version = lambda: "5.3.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pytesseract", module)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    extractor = get_extractor("tesseract")
    found, late = extractor.extract([Image.new("L", (99, 99)), Image.new("L", (1, 1))])
    assert found.text == "open example"
    assert asked["config"] == "--psm 6"
    assert asked["timeout"] == 60
    assert found.lines[0] == Line("open exam-", ((10.0, 4.0), (90.0, 4.0), (90.0, 16.0), (10.0, 16.0)), 0.85)
    assert late.error == "RuntimeError: Tesseract process timeout"
    assert extractor.version().startswith("5.3.0+")
    with pytest.raises(UserError, match=r"lang is 'eng\+deu'.*tesseract-ocr-deu"):
        get_extractor("tesseract", lang="eng+deu").check()
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match=r"program `tesseract`.*apt-get"):
        extractor.extract([Image.new("L", (9, 9))])


def test_transformers_are_asked_the_pinned_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.papers.typescore.extractors import chat

    asked: list[Any] = []

    def pipeline(task: str, model: str, **given: Any) -> Callable[..., Any]:
        if model == "nowhere":
            raise OSError("nowhere is not a local folder\nand more")
        asked.append((task, model, given))

        def run(text: Any, **given: Any) -> Any:
            asked.append((text, given))
            content = text[0]["content"]
            if content[0]["image"].size == (1, 1):
                raise RuntimeError("out of memory")
            answer = '"open"' if content[1]["text"] == PROMPT else " Yes. "
            return [{"generated_text": answer if model == "plain" else [{"role": "assistant", "content": answer}]}]

        return run

    module = types.ModuleType("transformers")
    module.pipeline = pipeline  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", module)
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    chat._pipeline.cache_clear()
    for model in ("plain", "turns"):
        good, bad = Transformers(model=model).extract([Image.new("RGB", (4, 4)), Image.new("RGB", (1, 1))])
        assert (good.text, good.error) == ("open", None)
        assert bad.error == "RuntimeError: out of memory"
        assert asked[-1][1]["generate_kwargs"] == {"max_new_tokens": 512, "do_sample": False}
        assert Transformers(model=model).ask([Image.new("RGB", (4, 4))], ["Is it red?"])[0].text == "Yes."
    with pytest.raises(UserError, match="model is 'nowhere'"):
        Transformers(model="nowhere").extract([Image.new("RGB", (4, 4))])
    with pytest.raises(UserError, match="model is ''"):
        Transformers().check()
    chat._pipeline.cache_clear()


@pytest.mark.slow
def test_rapidocr_reads_clean_renders_exactly() -> None:
    """The real package: level, turned by 15 and 180 degrees, without text."""
    pytest.importorskip("rapidocr", reason="needs the typescore extra")
    pytest.importorskip("onnxruntime", reason="needs the typescore extra")
    page = Image.new("RGB", (512, 512), "white")
    for i, row in enumerate(("Grand opening today,", "half price until 9 pm:", "bread, tea & cake")):
        ImageDraw.Draw(page).text((60, 140 + 54 * i), row, fill="black", font=ImageFont.load_default(size=36))
    pages = [page.rotate(a, fillcolor="white", resample=Image.Resampling.BICUBIC) for a in (0, 15, 180, 90)]
    *read, empty = get_extractor("rapidocr").extract([*pages, Image.new("RGB", (64, 64), "white")])
    assert {one.text for one in read} == {"Grand opening today, half price until 9 pm: bread, tea & cake"}
    assert (empty.text, empty.error) == ("", None)


# ------------------------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize(
    "answer, text",
    [
        ("open daily", "open daily"),
        ("  open\n daily \n", "open daily"),
        ('"open daily"', "open daily"),
        ("“open daily”", "open daily"),
        ("'it's open'", "it's open"),
        ('"open" and "closed"', '"open" and "closed"'),
        ('""open""', '""open""'),
        ("'open", "'open"),
        ('"', '"'),
        ("```\nopen\ndaily\n```", "open daily"),
        ("```text\n'open daily'\n```", "open daily"),
        ("```open```", "open"),
        ("```", "```"),
        ("NO TEXT", ""),
        ('"No text."', ""),
        ("```\nNO TEXT\n```", ""),
        ("NO TEXT HERE", "NO TEXT HERE"),
        ("", ""),
        ("an exam-\nple", "an example"),
    ],
)
def test_answers_are_cleaned_of_their_wrapping(answer: str, text: str) -> None:
    assert clean(answer) == text


def test_the_prompt_forbids_correction() -> None:
    assert "misspellings" in PROMPT
    assert "Do not correct" in PROMPT
    assert "NO TEXT" in PROMPT
