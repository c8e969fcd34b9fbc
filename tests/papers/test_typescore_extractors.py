"""Extractors of TypeScore: reading order, cleaning, the HTTP client against an endpoint of every fault, the cache."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import email.utils
import hashlib
import html
import http.server
import io
import json
import logging
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

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
    digest,
    get_extractor,
    join,
    reading_order,
    text_of,
)
from zoo.papers.typescore.extractors.base import flat
from zoo.papers.typescore.extractors.cache import Journal
from zoo.papers.typescore.extractors.endpoint import Secret
from zoo.papers.typescore.extractors.ocr import as_read

KEY = "sk-Very+Secret/Key=0123456789"


RENDERS: dict[bytes, bytes] = {}  # PNG files by their pixels


def picture(text: str, shade: int = 255) -> Image.Image:
    """A tiny image with pixels of its own, read from a PNG file that carries `text` the way a render does."""
    info = PngImagePlugin.PngInfo()
    info.add_text(TEXT_CHUNK, text)
    pixels = hashlib.shake_256(f"{shade} {text}".encode()).digest(8 * 8 * 3)
    data = io.BytesIO()
    Image.frombytes("RGB", (8, 8), pixels).save(data, "png", pnginfo=info)
    RENDERS[pixels] = data.getvalue()
    return Image.open(io.BytesIO(data.getvalue()))


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


@pytest.fixture
def rapid(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A package in place of rapidocr that finds what `found` says and notes what it is given."""
    from zoo.papers.typescore.extractors import ocr

    # of lines: what the classifier says, and how surely they are read as they stand and turned by 180 degrees
    seen: dict[str, Any] = {"found": None, "labels": [], "sure": {}}

    class RapidOCR:
        def __init__(self, params: dict[str, Any]) -> None:
            seen["params"] = params

        def cls_and_rotate(self, crops: list[np.ndarray]) -> tuple[list[np.ndarray], Any]:
            flipped = [c[::-1, ::-1] if "180" in label else c for c, (label, _) in zip(crops, seen["labels"])]
            return flipped, types.SimpleNamespace(cls_res=seen["labels"])

        def recognize_txt(self, crops: list[np.ndarray]) -> Any:
            way = {1: "upright", 2: "turned"}[int(crops[0][0, 0])]  # the corners of a crop tell which way it stands
            assert all(crop[0, 0] == crops[0][0, 0] for crop in crops)
            seen["read"] = [*seen.get("read", ()), way]
            return types.SimpleNamespace(scores=seen["sure"].get(way, (0.9,) * len(crops)), way=way)

        def __call__(self, image: np.ndarray) -> Any:
            seen["image"] = image
            boxes, txts, scores = seen["found"] or (None, None, None)
            if boxes is not None:
                crops = [np.array([[1, 0], [0, 2]]) for _ in boxes]
                crops, _ = self.cls_and_rotate(crops)
                seen["way"] = self.recognize_txt(crops).way
            return types.SimpleNamespace(boxes=boxes, txts=txts, scores=scores)

    module = types.ModuleType("rapidocr")
    module.RapidOCR = RapidOCR  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rapidocr", module)
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    ocr._rapidocr.cache_clear()
    yield seen
    ocr._rapidocr.cache_clear()


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


def grey(shades: Any, dtype: Any, file: str = "") -> Image.Image:
    """A grey image of these shades, through a file of the kind `file`."""
    image = Image.fromarray(np.asarray(shades, dtype))
    if not file:
        return image
    data = io.BytesIO()
    image.save(data, file)
    return Image.open(io.BytesIO(data.getvalue()))


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


# ------------------------------------------------------------------------------------------------------------------ endpoint


def completion(content: Any, **more: Any) -> bytes:
    return json.dumps({"model": "stub-1", "choices": [{"message": {"content": content}, **more}]}).encode()


class Stub(http.server.ThreadingHTTPServer):
    """Answers each request by the next of `script`, the last over and over; without any, as `oracle` does."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Callable[[Handler], None]] = []
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.over = threading.Event()
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what is tested."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Stub

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.times.append(time.monotonic())
            self.asked = json.loads(body) | {"path": self.path}
            self.server.seen.append(self.asked)
            self.server.headers.append(dict(self.headers))
            script = self.server.script
            act = oracle if not script else script.pop(0) if len(script) > 1 else script[0]
        act(self)

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.headers.append(dict(self.headers))
        self.send(200, completion("followed"))

    def send(self, status: int, body: bytes, kind: str | None = "application/json", **headers: str) -> None:
        self.send_response(status)
        if kind is not None:
            self.send_header("Content-Type", kind)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def sent_image(asked: dict[str, Any]) -> Image.Image:
    url = asked["messages"][0]["content"][1]["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))


def oracle(handler: Handler) -> None:
    """Decodes the image, and answers with the text chunk of the render that has its pixels: the chunk itself never comes."""
    image = sent_image(handler.asked)
    assert image.format == "PNG"
    render = Image.open(io.BytesIO(RENDERS[image.tobytes()]))
    handler.send(200, completion(render.info[TEXT_CHUNK] or "NO TEXT", finish_reason="stop"))


def status(code: int, body: bytes = b'{"error": {"message": "not now"}}', **headers: str) -> Callable[[Handler], None]:
    return lambda handler: handler.send(code, body, **headers)


def body(data: bytes, kind: str | None = "application/json") -> Callable[[Handler], None]:
    return lambda handler: handler.send(200, data, kind)


def says(content: Any, **more: Any) -> Callable[[Handler], None]:
    return body(completion(content, **more))


def hang(handler: Handler) -> None:
    handler.server.over.wait(20)


def trickle_headers(handler: Handler) -> None:
    _drip(handler, b"HTTP/1.1 200 OK\r\nX-Padding: " + b"a" * 5000)


def trickle_body(handler: Handler) -> None:
    _drip(handler, b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n" + b" " * 5000, 55)


def trickle_error(handler: Handler) -> None:
    _drip(handler, b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\n\r\n" + b" " * 5000, 62)


def _drip(handler: Handler, data: bytes, at_once: int = 1) -> None:
    handler.wfile.write(data[:at_once])
    for byte in data[at_once:]:
        if handler.server.over.wait(0.02):
            return
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()


def huge(handler: Handler) -> None:
    """50 MB, without saying so before."""
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{"choices": "')
    for _ in range(50):
        handler.wfile.write(b"a" * 1_000_000)


def huge_error(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\n\r\n")
    for _ in range(50):
        handler.wfile.write(b"a" * 1_000_000)


def raw(data: bytes) -> Callable[[Handler], None]:
    return lambda handler: handler.wfile.write(data) and None


def reset(handler: Handler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Stub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


def client(stub: Stub, **fields: Any) -> Http:
    tiny = {"timeout_s": 5.0, "total_s": 10.0, "backoff_s": 0.005, "longest_wait_s": 0.02}
    return Http(**{"base_url": stub.url, "model": "seer", **tiny, **fields})


def test_oracle_through_the_wire(stub: Stub) -> None:
    """Every image comes back with its own text, whichever thread it went through, and the request is the pinned one."""
    texts = [f"text number {i} – ünïcode" for i in range(9)] + [""]
    found = client(stub, threads=1).extract([picture(text, i) for i, text in enumerate(texts)])
    assert [one.text for one in found] == texts
    assert all(one.error is None for one in found)
    asked = stub.seen[0]
    assert asked["path"] == "/v1/chat/completions"
    assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("seer", 0, 512)
    assert asked["messages"][0]["role"] == "user"
    assert asked["messages"][0]["content"][0] == {"type": "text", "text": PROMPT}
    assert set(asked) == {"model", "temperature", "max_tokens", "messages", "path"}
    assert found[0].raw == {"tries": 1, "model": "stub-1", "finish_reason": "stop", "content": texts[0]}
    assert "Authorization" not in stub.headers[0]
    json.dumps(found[0].record())


def test_what_a_render_carries_does_not_go_to_the_endpoint(stub: Stub) -> None:
    image = picture("the wanted words")
    assert image.info[TEXT_CHUNK] == "the wanted words"
    client(stub).extract([image])
    sent = sent_image(stub.seen[0])
    assert TEXT_CHUNK not in sent.info
    assert "wanted" not in json.dumps(stub.seen[0])
    assert sent.tobytes() == image.tobytes()


def test_images_go_out_side_by_side_and_come_back_in_order(stub: Stub) -> None:
    together = threading.Barrier(4, timeout=5)  # broken unless four requests are under way at once

    def act(handler: Handler) -> None:
        together.wait()
        oracle(handler)

    stub.script = [act]
    found = client(stub, threads=4).extract([picture(str(i)) for i in range(8)])
    assert [one.text for one in found] == list("01234567")


@pytest.mark.parametrize(
    "act, text",
    [
        (says(""), ""),
        (says("NO TEXT"), ""),
        (says('"open daily"'), "open daily"),
        (says("```\nopen daily\n```"), "open daily"),
        (says([{"type": "text", "text": "open "}, {"type": "text", "text": "daily"}]), "open daily"),
        (says("open daily", finish_reason="length"), "open daily"),
        (says("half \ud800 a character"), "half ? a character"),
        (body(completion("open"), None), "open"),
        (body(completion("open"), "application/problem+json; charset=utf-8"), "open"),
    ],
)
def test_good_answers(act: Callable[[Handler], None], text: str, stub: Stub) -> None:
    stub.script = [act]
    found = client(stub).extract([picture("x")])[0]
    assert (found.text, found.error) == (text, None)
    json.dumps(found.record()).encode()
    found.text.encode()


@pytest.mark.parametrize(
    "act, said, tries",
    [
        (status(500), "HTTP 500 Internal Server Error: not now (5 tries)", 5),
        (status(503, b"busy"), "HTTP 503 Service Unavailable: busy (5 tries)", 5),
        (status(429), "HTTP 429 Too Many Requests: not now (5 tries)", 5),
        (status(400), "HTTP 400 Bad Request: not now", 1),
        (status(401, b'{"error": "no such key"}'), "HTTP 401 Unauthorized: no such key", 1),
        (status(422, b'{"detail": "\\u00fcber"}'), "HTTP 422 Unprocessable Entity: \u00fcber", 1),
        (status(400, b'{"error": {"message": "\\ud800"}}'), "HTTP 400 Bad Request: ?", 1),
        (status(400, b'{"error": {"code": "a\\/b"}}'), 'HTTP 400 Bad Request: {"code": "a/b"}', 1),
        (status(404, b""), "HTTP 404 Not Found", 1),
        (status(302, b"", Location="/v1/elsewhere"), "the endpoint lies elsewhere", 1),
        (status(307, b"", Location="http://127.0.0.1:9/"), "the endpoint lies elsewhere", 1),
        (body(b'{"choices": [{"message": '), "no JSON", 1),
        (body(b""), "no JSON", 1),
        (body(b"\xff\xfe\x00"), "no JSON", 1),
        (body(b"[" * 100_000), "no JSON", 1),
        (body(b"1" * 10_000), "no JSON", 1),
        (body(b"<html>hello</html>", "text/html"), "'text/html', not application/json", 1),
        (body(b"data: {}", "text/event-stream"), "'text/event-stream'", 1),
        (body(b"[]"), "choices[0].message.content", 1),
        (body(b'{"choices": []}'), "choices[0].message.content", 1),
        (body(b'{"choices": [{"message": "hi"}]}'), "choices[0].message.content", 1),
        (body(b'{"error": {"message": "model not loaded"}}'), "reports an error: model not loaded", 1),
        (says(None), "NoneType, not text", 1),
        (says(7), "int, not text", 1),
        (says("", finish_reason="length"), "raise max_tokens", 1),
        (says("a", finish_reason="content_filter"), "content filter", 1),
        (body(b'{"choices": [{"message": {"content": null, "refusal": "I must not"}}]}'), "refuses: I must not", 1),
        (body(b'"' + b"a" * 5_000_000 + b'"'), "more than 4000000 bytes", 1),
        (huge, "more than 4000000 bytes", 1),
        (huge_error, "HTTP 400 Bad Request: aaaa", 1),
        (reset, "the connection broke", 5),
        (raw(b"SSH-2.0-server\r\n"), "is no HTTP", 1),
        (raw(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n"), "is no HTTP", 1),
        (
            raw(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"choices"'),
            "broke off within the answer",
            5,
        ),
        (
            raw(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{"),
            "the connection broke",
            5,
        ),
    ],
)
def test_every_fault_ends_as_an_error_record_in_time(
    act: Callable[[Handler], None], said: str, tries: int, stub: Stub
) -> None:
    stub.script = [act]
    start = time.monotonic()
    found = client(stub).extract([picture("x")])[0]
    assert time.monotonic() - start < 20
    assert said in (found.error or ""), found.error
    assert found.text == ""
    assert len(found.error) <= 300
    assert len(stub.seen) == tries == found.raw["tries"]
    json.dumps(found.record())


@pytest.mark.parametrize("act", [hang, trickle_headers, trickle_body])
def test_an_endpoint_that_hangs_or_trickles_is_left_in_time(act: Callable[[Handler], None], stub: Stub) -> None:
    stub.script = [act]
    start = time.monotonic()
    found = client(stub, timeout_s=0.15, total_s=0.4, retries=9, threads=2).extract([picture("x"), picture("y")])
    assert time.monotonic() - start < 8
    assert all(one.error and "no whole answer within" in one.error for one in found)
    assert 1 <= found[0].raw["tries"] <= 4


def test_an_error_whose_words_trickle_keeps_its_status(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.papers.typescore.extractors.endpoint._ERROR_S", 0.1)
    stub.script = [trickle_error]
    found = client(stub).extract([picture("x")])[0]
    assert found.error == "HTTP 400 Bad Request"
    assert found.seconds < 8


def test_a_server_that_takes_bytes_a_few_at_a_time_is_left_in_time() -> None:
    """Every single send goes through before long, and sending as a whole must end too."""
    over = threading.Event()

    def sip(server: socket.socket) -> None:
        taken = server.accept()[0]
        while not over.wait(0.02):
            taken.recv(4096)
        taken.close()

    noise = Image.frombytes("RGB", (1500, 1500), np.random.default_rng(0).bytes(1500 * 1500 * 3))
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        server.bind(("127.0.0.1", 0))
        server.listen()
        thread = threading.Thread(target=sip, args=(server,), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        start = time.monotonic()
        found = Http(base_url=url, model="m", timeout_s=0.5, total_s=10, retries=0).extract([noise])[0]
        over.set()
        thread.join()
    assert re.match(r"no whole answer within 0\.[45]", found.error or ""), found.error
    assert time.monotonic() - start < 20  # most of it the making of the PNG


@contextlib.contextmanager
def deaf() -> Iterator[int]:
    """A port at which connections are neither taken nor refused: its queue is full."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        yield server.getsockname()[1]


def lead_to(monkeypatch: pytest.MonkeyPatch, *ports: int, after: float = 0.0) -> None:
    """Makes every host's addresses these ports here, told after so many seconds."""

    def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        time.sleep(after)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def test_several_addresses_that_do_not_answer_share_the_time(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    with deaf() as port:
        lead_to(monkeypatch, *[port] * 12)
        start = time.monotonic()
        found = client(stub, timeout_s=0.4, retries=0).extract([picture("x")])[0]
        assert re.match(r"no whole answer within 0\.[34]", found.error or ""), found.error
        assert time.monotonic() - start < 4
        lead_to(monkeypatch, port, stub.server_address[1])  # and the last still gets its turn
        assert client(stub, timeout_s=2, retries=0).extract([picture("x")])[0].text == "x"


def test_a_slow_resolver_is_left_in_time(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    lead_to(monkeypatch, stub.server_address[1], after=6.0)
    start = time.monotonic()
    found = client(stub, timeout_s=0.2, retries=0).extract([picture("x")])[0]
    assert re.match(r"no whole answer within 0\.[12]", found.error or ""), found.error
    assert time.monotonic() - start < 5


def test_hosts_that_are_not_found_are_said_at_once(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    found = client(stub).extract([picture("x")])[0]
    assert found.error == "the host of base_url is not found (Name or service not known)"
    assert found.raw == {"tries": 1}
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [])
    assert "no address" in (client(stub, retries=0).extract([picture("x")])[0].error or "")


# ------------------------------------------------------------------------------------------------------------------ giving up


@pytest.mark.parametrize(
    "act, said",
    [
        (hang, "no whole answer within 0.0"),
        (reset, "the connection broke"),
        (status(500), "HTTP 500"),
        (status(401), "HTTP 401"),
        (status(429), "HTTP 429"),
    ],
)
def test_an_endpoint_out_of_order_is_not_asked_on_and_on(act: Callable[[Handler], None], said: str, stub: Stub) -> None:
    stub.script = [act]
    extractor = client(stub, give_up=3, threads=2, retries=1, timeout_s=0.05)
    kept: list[int] = []
    found = extractor.extract([picture(str(i)) for i in range(30)], lambda i, _: kept.append(i))
    asked = [i for i, one in enumerate(found) if one.raw["tries"]]
    assert asked in ([0, 1, 2, 29], [0, 1, 2, 3, 29])  # one may have been under way
    assert found[29].raw["tries"] == 1
    assert sorted(kept) == list(range(30))
    left = [one.error for one in found if not one.raw["tries"]]
    assert len(set(left)) == 1
    assert left[0].startswith(f"not asked: the endpoint failed {len(asked)} times in a row; the last: ")
    assert said in left[0]
    sent = len(stub.seen)
    again = extractor.extract([picture(str(i)) for i in range(9)])  # the first and the last, one try each
    assert len(stub.seen) == sent + 2
    assert [one.raw["tries"] for one in again] == [1] + [0] * 7 + [1]
    assert f"failed {len(asked) + 2} times" in again[-2].error
    stub.script = [oracle]
    assert [one.text for one in extractor.extract([picture("a"), picture("b"), picture("c")])] == ["a", "b", "c"]


def sick(*texts: str) -> Callable[[Handler], None]:
    """Fails at these pictures, and reads all others."""

    def act(handler: Handler) -> None:
        render = Image.open(io.BytesIO(RENDERS[sent_image(handler.asked).tobytes()]))
        (status(500) if render.info[TEXT_CHUNK] in texts else oracle)(handler)

    return act


def test_pictures_that_fail_side_by_side_do_not_keep_the_others_from_being_asked(stub: Stub) -> None:
    """Left unasked they would be so in every rerun: the same ones stand first."""
    texts = [str(i) for i in range(16)]
    stub.script = [sick(*texts[:12])]
    found = client(stub, backoff_s=0.0).extract([picture(text) for text in texts])
    assert [one.text for one in found] == [""] * 12 + texts[12:]
    assert all("HTTP 500" in (one.error or "") for one in found[:12])


def test_each_time_an_endpoint_seems_out_of_order_one_more_picture_decides(stub: Stub) -> None:
    stub.script = [sick(*"abcdef")]
    extractor = client(stub, threads=1, give_up=2, retries=0)
    found = extractor.extract([picture(text) for text in "abcdefghi"])
    assert [one.text for one in found] == [""] * 6 + list("ghi")
    assert all(one.raw["tries"] == 1 for one in found)
    stub.script = [sick(*"abcz")]
    found = extractor.extract([picture(text) for text in "abcdefghz"])
    assert [one.raw["tries"] for one in found] == [1, 1, 0, 0, 0, 0, 0, 0, 1]


def test_a_last_picture_that_fails_by_itself_decides_nothing(stub: Stub) -> None:
    stub.script = [status(500), status(500), status(400), oracle]
    found = client(stub, threads=1, give_up=2, retries=0).extract([picture(text) for text in "abcdef"])
    assert [one.text for one in found] == ["", "", "c", "d", "e", ""]
    assert "HTTP 400" in (found[5].error or "")


def test_after_the_last_picture_is_read_the_others_have_their_retries(stub: Stub) -> None:
    stub.script = [status(500)] * 4 + [oracle, status(500), oracle]
    start = time.monotonic()
    found = client(stub, threads=1, give_up=2, retries=1, backoff_s=0.1, longest_wait_s=9).extract(
        [picture(text) for text in "abcd"]
    )
    assert [(one.text, one.raw["tries"]) for one in found] == [("", 2), ("", 2), ("c", 2), ("d", 1)]
    assert stub.times[6] - stub.times[5] >= 0.075
    assert time.monotonic() - start < 9


def test_an_endpoint_that_is_given_up_has_its_waits_ended(stub: Stub) -> None:
    stub.script = [status(503, Retry_After="30"), status(401)]
    start = time.monotonic()
    found = client(stub, give_up=2, threads=2, total_s=60).extract([picture(str(i)) for i in range(9)])
    assert time.monotonic() - start < 15
    assert all(one.error for one in found)
    assert len(stub.seen) <= 4


@pytest.mark.parametrize("act", [status(400), status(404), says(None), body(b"no JSON")])
def test_answers_that_are_about_the_image_give_nothing_up(act: Callable[[Handler], None], stub: Stub) -> None:
    stub.script = [act]
    client(stub, give_up=1).extract([picture(str(i)) for i in range(9)])
    assert len(stub.seen) == 9


def test_a_reading_in_between_clears_the_count_and_0_gives_nothing_up(stub: Stub) -> None:
    broken, good = status(500), oracle
    stub.script = [broken, broken, good, broken, broken, good]
    extractor = client(stub, give_up=3, threads=1, retries=0)
    found = extractor.extract([picture(str(i)) for i in range(8)])
    assert [one.error is None for one in found] == [False, False, True, False, False, True, True, True]
    stub.script = [broken]
    client(stub, give_up=0, threads=1, retries=0).extract([picture("x")] * 12)
    assert len(stub.seen) == 8 + 12


def test_what_is_remembered_of_an_endpoint_is_no_part_of_the_extractor(stub: Stub) -> None:
    stub.script = [status(401)]
    used = client(stub, give_up=1)
    used.extract([picture("x")])
    assert used == client(stub, give_up=1)
    assert pickle.loads(pickle.dumps(used)) == used
    assert dataclasses.asdict(used) == dataclasses.asdict(client(stub, give_up=1))
    assert describe(used) == describe(client(stub))


@contextlib.contextmanager
def refusing() -> Iterator[int]:
    """A port that refuses connections: bound, and not listening."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_refused_connections_are_tried_again_until_the_endpoint_is_given_up(stub: Stub) -> None:
    said = "the connection was refused: is the endpoint of base_url running?"
    with refusing() as port:
        extractor = client(stub, base_url=f"http://127.0.0.1:{port}/v1", threads=1, give_up=2, retries=2)
        found = extractor.extract([picture(text) for text in "abcd"])
        assert [one.raw["tries"] for one in found] == [3, 3, 0, 1]
        assert [found[0].error, found[3].error] == [f"{said} (3 tries)", said]
        again = extractor.extract([picture(text) for text in "abcd"])  # no waits any more
        assert [one.raw["tries"] for one in again] == [1, 0, 0, 1]


@pytest.mark.parametrize("gone", ["server", "names"])
def test_a_server_or_a_name_service_that_comes_back_costs_no_reading(
    gone: str, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    with refusing() as port:

        def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
            asked.append(time.monotonic())
            if gone == "names" and len(asked) < 4:
                raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
            to = port if len(asked) < 4 else stub.server_address[1]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", to))]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        found = client(stub, threads=1, backoff_s=0.02, longest_wait_s=9).extract([picture("x"), picture("y")])
    assert [(one.text, one.raw["tries"]) for one in found] == [("x", 4), ("y", 1)]
    waits = np.diff(asked)
    assert all(wait >= 0.015 * 2**i for i, wait in enumerate(waits[:3])), waits


def test_after_a_passing_fault_the_reading_comes(stub: Stub) -> None:
    stub.script = [status(429), status(502), reset, oracle]
    found = client(stub).extract([picture("at last")])[0]
    assert (found.text, found.error, found.raw["tries"]) == ("at last", None, 4)


def test_waits_grow(stub: Stub) -> None:
    stub.script = [status(500)]
    client(stub, retries=3, backoff_s=0.05, longest_wait_s=9).extract([picture("x")])
    waits = np.diff(stub.times)
    assert len(waits) == 3
    assert 0.037 <= waits[0] < 2
    assert waits[1] >= 0.075
    assert waits[2] >= 0.15


def test_retry_after_is_kept_to_whatever_the_longest_wait_of_ours(stub: Stub) -> None:
    """Without the header, or with the cap on our own waits, there would be no wait to speak of."""
    stub.script = [status(429, Retry_After="0.3"), oracle]
    found = client(stub, backoff_s=0.0, longest_wait_s=0.01).extract([picture("x")])[0]
    assert found.text == "x"
    assert 0.29 <= stub.times[1] - stub.times[0] < 5


def test_retry_after_may_be_a_date(stub: Stub) -> None:
    stub.script = [status(429, Retry_After=email.utils.formatdate(time.time() + 3600, usegmt=True))]
    found = client(stub).extract([picture("x")])[0]
    assert re.search(r"it asks for a wait of 3[56]\d\d s, more than is left of total_s=10$", found.error or "")


def test_our_own_waits_are_capped(stub: Stub) -> None:
    stub.script = [status(429), status(429, Retry_After="0"), oracle]
    assert client(stub, backoff_s=30.0, longest_wait_s=0.05, total_s=60).extract([picture("x")])[0].text == "x"
    assert 0.1 <= stub.times[2] - stub.times[0] < 15


@pytest.mark.parametrize(
    "value", ["0", "-5", "soon", "nan", "inf", "1e9", "", "9" * 40, "Wed, 99 Foo 2020 00:00:00 GMT"]
)
def test_a_nonsensical_retry_after_changes_nothing(value: str, stub: Stub) -> None:
    stub.script = [status(503, Retry_After=value), oracle]
    start = time.monotonic()
    assert client(stub, longest_wait_s=60).extract([picture("x")])[0].text == "x"
    assert time.monotonic() - start < 20


def test_a_wait_beyond_the_time_of_an_image_is_not_begun(stub: Stub) -> None:
    stub.script = [status(429, Retry_After="30")]
    start = time.monotonic()
    found = client(stub, total_s=5, longest_wait_s=60).extract([picture("x")])[0]
    assert time.monotonic() - start < 4.5
    assert len(stub.seen) == 1
    asks = "it asks for a wait of 30 s, more than is left of total_s=5"
    assert found.error == f"HTTP 429 Too Many Requests: not now; {asks}"
    stub.script = [status(500)]
    found = client(stub, total_s=5, backoff_s=60, longest_wait_s=60).extract([picture("x")])[0]
    assert found.error == "HTTP 500 Internal Server Error: not now; 5 s for this image are over"


def test_fields_of_the_request_follow_the_config(stub: Stub) -> None:
    client(stub, token_field="max_completion_tokens", max_tokens=9, temperature=None).extract([picture("x")])
    assert stub.seen[0]["max_completion_tokens"] == 9
    assert "temperature" not in stub.seen[0]
    assert "max_tokens" not in stub.seen[0]


def test_questions_are_asked_as_they_are(stub: Stub) -> None:
    stub.script = [says(' "Yes." ')]
    image = picture("x")
    found = client(stub).ask([image, image], ["Is it red?", "Is it blue?"])
    assert [one.text for one in found] == ['"Yes."', '"Yes."']
    assert sorted(asked["messages"][0]["content"][0]["text"] for asked in stub.seen) == ["Is it blue?", "Is it red?"]


# ---------------------------------------------------------------------------------------------------------------------- key


def echo(code: int, form: Callable[[str], str] = str) -> Callable[[Handler], None]:
    """Repeats the key in the body."""

    def act(handler: Handler) -> None:
        key = handler.headers["Authorization"].removeprefix("Bearer ")
        handler.send(code, json.dumps({"error": {"message": f"wrong key {form(key)} given"}}).encode())

    return act


def echo_plain(handler: Handler) -> None:
    """So much of it that what is shown, and what is read, ends within a key."""
    handler.send(403, ("x" * 262 + handler.headers["Authorization"] * 3000).encode(), "text/plain")


def echo_kind(handler: Handler) -> None:
    handler.send(200, b"", f"text/{handler.headers['Authorization'].removeprefix('Bearer ')}")


def echo_reading(handler: Handler) -> None:
    key = handler.headers["Authorization"]
    handler.send(200, json.dumps({"model": key, "choices": [{"message": {"content": f"open {key}"}}]}).encode())


def echo_escaped(handler: Handler) -> None:
    key = handler.headers["Authorization"]
    handler.send(400, ("oops " + "".join(f"\\u{ord(c):04x}" for c in key)).encode(), "text/plain")


def echo_as(form: Callable[[str], str], kind: str = "text/html") -> Callable[[Handler], None]:
    """Repeats the key as pages and other servers write it."""

    def act(handler: Handler) -> None:
        key = handler.headers["Authorization"].removeprefix("Bearer ")
        handler.send(401, f'{{"error": "wrong key {form(key)} given"}}'.encode(), kind)

    return act


def slashed(key: str) -> str:
    return key.replace("/", "\\/")


def entities(key: str) -> str:
    return key.replace("/", "&#x2F;").replace("=", "&#x3D;").replace("+", "&plus;")


def numbered(key: str) -> str:
    return "".join(f"&#{ord(c)};" for c in key)


def percented(key: str) -> str:
    return "".join(f"%{ord(c):02x}" for c in key)


def in_unicode(key: str) -> str:
    return "".join(f"\\u{ord(c):04X}" for c in key)


def echo_status_line(handler: Handler) -> None:
    handler.wfile.write(f"{handler.headers['Authorization']} is no status\r\n\r\n".encode())


@pytest.mark.parametrize(
    "act",
    [
        echo(401),
        echo(500),
        echo(200),
        echo(401, str.upper),
        echo(401, lambda key: base64.b64encode(key.encode()).decode()),
        echo(401, lambda key: urllib.parse.quote(key, safe="")),
        echo(401, lambda key: urllib.parse.quote(urllib.parse.quote(key, safe=""), safe="")),
        echo(401, entities),
        echo(401, lambda key: html.escape(entities(key))),
        echo(401, in_unicode),
        echo_as(slashed, "application/json"),
        echo_as(slashed),
        echo_as(lambda key: json.dumps(slashed(key))[1:-1]),
        echo_as(entities),
        echo_as(numbered),
        echo_as(percented),
        echo_as(in_unicode),
        echo_as(lambda key: "".join(f"\\x{ord(c):x}" for c in key)),
        echo_plain,
        echo_kind,
        echo_reading,
        echo_escaped,
        echo_status_line,
        status(401),
        says("fine"),
    ],
)
def test_the_key_is_nowhere_but_in_its_header(
    act: Callable[[Handler], None],
    stub: Stub,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("SEER_KEY", KEY + "\n")
    stub.script = [act]
    extractor = client(stub, api_key_env="SEER_KEY", retries=1)
    with caplog.at_level(logging.DEBUG):
        found = Cached(extractor, tmp_path).extract([picture("x")])[0]
    assert stub.headers[0]["Authorization"] == f"Bearer {KEY}"
    files = "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    out = "".join(capfd.readouterr())
    everything = (
        json.dumps(found.record()) + str(found) + repr(extractor) + str(describe(extractor)) + caplog.text + files + out
    )
    forms = [KEY, KEY[:7], base64.b64encode(KEY.encode()).decode()[:16], "sk-Very%2B", json.dumps(KEY)[1:-1]]
    forms += ["Secret/Key", "Key=0", "0123456789", "Key\\", "Key&", "Key%"]
    for text in (everything, html.unescape(html.unescape(everything)), urllib.parse.unquote(everything)):
        assert not [form for form in forms if form.lower() in text.lower()], text
    plain = re.sub(r"\\+(?:u00|x)([0-9a-fA-F]{2})", lambda found: chr(int(found[1], 16)), everything)
    assert not [form for form in forms if form.lower() in plain.lower()], plain


def test_a_text_that_was_cut_does_not_end_in_a_piece_of_the_key() -> None:
    secret = Secret(KEY)
    for end in range(1, len(KEY) + 1):
        assert KEY[:3] not in secret.out_of("a" * 500 + KEY + KEY[:end], cut=True)
    assert KEY not in repr(secret)


@pytest.mark.parametrize(
    "key, text",
    [
        ("EMPTY", "EMPTY shop"),
        ("password", "Forgot your PASSWORD?"),
        ("password", "Forgot your password?"),
        ("local-key-1234", "the local-key-1234"),
        ("Donaudampfschifffahrt", "Donaudampfschifffahrt"),
        (KEY, f"in other letters {KEY.upper()}"),
        (KEY, f"escaped {urllib.parse.quote(KEY, safe='')}"),
    ],
)
def test_a_key_spoils_no_reading(key: str, text: str, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Local servers are given keys such as EMPTY, and EMPTY may be what a sign says."""
    monkeypatch.setenv("SEER_KEY", key)
    found = client(stub, api_key_env="SEER_KEY").extract([picture(text)])[0]
    assert (found.text, found.error, found.raw["content"]) == (text, None, text)


@pytest.mark.parametrize("key", [KEY, "0123456789abcdef", "no-key-needed-here"])
def test_a_reading_that_holds_the_key_is_an_error_and_not_another_text(
    key: str, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEER_KEY", key)
    stub.script = [says(f"open {key} daily")]
    extractor = client(stub, api_key_env="SEER_KEY", give_up=1)
    for found in (*extractor.extract([picture("x"), picture("y")]), *extractor.ask([picture("x")], ["Is it red?"])):
        assert (found.error or "").startswith("the answer repeats the key of api_key_env; ")
        assert not (found.error or "").endswith("...")
        assert found.text == ""
        assert found.raw["tries"] == 1
        assert key not in json.dumps(found.record())


def test_a_key_changes_nothing_else_in_a_reading(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEER_KEY", KEY)
    said = r"C:\u0041 &amp; %41 &#47; \/ sk-Very"
    stub.script = [says(said)]
    assert client(stub, api_key_env="SEER_KEY").extract([picture("x")])[0].text == said


@pytest.mark.parametrize("piece", ["\\", "&amp;", "&#0", "%25", "\\u", "s", KEY[:-1]])
def test_an_answer_of_many_pieces_is_searched_in_no_time(piece: str) -> None:
    start = time.monotonic()
    Secret(KEY).out_of(piece * (60_000 // len(piece)))
    assert time.monotonic() - start < 6


@pytest.mark.parametrize("value", ["AKIA1234SECRET", "AKIA_SECRET_1", "SECRETKEY", "SECRETTOKEN"])
def test_a_key_in_place_of_its_name_is_not_shown(value: str, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(value, raising=False)
    with pytest.raises(
        UserError, match=r"api_key_env is a name not shown here, .* give the NAME of a variable"
    ) as caught:
        client(stub, api_key_env=value).check()
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("value", [None, "", "  "])
def test_without_the_key_nothing_is_sent(value: str | None, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEER_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("SEER_KEY", value)
    with pytest.raises(UserError, match="api_key_env is 'SEER_KEY', and no such environment variable is set"):
        client(stub, api_key_env="SEER_KEY").extract([picture("x")])
    assert not stub.seen


def test_errors_about_keys_do_not_show_them(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEER_KEY", "secret\nX-Evil: yes")
    cases: list[Callable[[], Any]] = [
        lambda: client(stub, api_key_env="SEER_KEY").extract([picture("x")]),
        lambda: get_extractor("http", api_key_env="sk-secret-itself"),
        lambda: get_extractor("http", base_url="https://me:secret@host/v1"),
        lambda: get_extractor("http", base_url="https://host/v1?key=secret"),
    ]
    for case in cases:
        with pytest.raises(UserError) as caught:
            case()
        assert "secret" not in str(caught.value)
        assert caught.value.__cause__ is None
    assert not stub.seen


def test_a_redirect_takes_the_key_nowhere(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEER_KEY", KEY)
    stub.script = [status(303, b"", Location=f"{stub.url}/elsewhere")]
    assert client(stub, api_key_env="SEER_KEY").extract([picture("x")])[0].error
    assert len(stub.headers) == 1


def test_nothing_is_sent_without_address_and_model() -> None:
    for fields in ({"model": "m"}, {"base_url": "http://127.0.0.1:1"}):
        with pytest.raises(UserError, match="is ''"):
            Http(**fields).extract([picture("x")])


def test_stopping_ends_waits_and_requests(stub: Stub) -> None:
    """Ctrl-C while one image waits for its answer and another for its next try: the program ends at once."""
    stub.script = [hang, status(500)]
    code = (
        "import os, signal, threading; from PIL import Image\n"
        "from zoo.papers.typescore.extractors import Http\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what runs in the background is not given one
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        f"Http(base_url={stub.url!r}, model='m', backoff_s=30, threads=2).extract([Image.new('RGB', (4, 4))] * 6)\n"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "KeyboardInterrupt" in done.stderr
    assert time.monotonic() - start < 18  # most of it the start of Python; the answer would take 20 s


@pytest.fixture
def interrupted() -> Iterator[Callable[[Handler], None]]:
    """An answer that never comes: instead, the main thread gets Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever runs the tests may have changed it
    main = threading.get_ident()

    def act(handler: Handler) -> None:
        signal.pthread_kill(main, signal.SIGINT)
        hang(handler)

    yield act
    signal.signal(signal.SIGINT, before)


def test_readings_that_are_done_are_kept_when_the_batch_is_stopped(
    stub: Stub, tmp_path: Path, interrupted: Callable[[Handler], None]
) -> None:
    stub.script = [hang, oracle, oracle, oracle, status(400), interrupted]
    texts = list("abcdefgh")
    kept: dict[int, str] = {}
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Cached(client(stub, threads=2), tmp_path).extract(
            [picture(text) for text in texts], lambda i, one: kept.update({i: one.error or one.text})
        )
    assert time.monotonic() - start < 10
    assert len(list(tmp_path.rglob("*.json"))) == 3
    assert sorted(kept) in ([0, 2, 3, 4], [1, 2, 3, 4])  # whichever of the first two came first hangs
    assert all("HTTP 400" in kept[i] if i == 4 else kept[i] == texts[i] for i in kept)
    deadline = time.monotonic() + 10
    while any(thread.name == "typescore" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "a request goes on"
        time.sleep(0.01)
    stub.script = [oracle]
    sent = len(stub.seen)
    assert [one.text for one in Cached(client(stub), tmp_path).extract([picture(text) for text in texts])] == texts
    assert len(stub.seen) == sent + 5


def test_a_reading_whose_keeping_is_stopped_is_kept_all_the_same(stub: Stub) -> None:
    kept: list[int] = []

    def keep(i: int, one: Extraction) -> None:
        kept.append(i)
        if len(kept) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client(stub, threads=1).extract([picture(text) for text in "abc"], keep)
    assert kept[:3] == [0, 1, 1]


@pytest.mark.parametrize("end", ["refused", "deaf", "slow names"])
def test_stopping_ends_what_has_no_connection_yet(
    end: str, stub: Stub, monkeypatch: pytest.MonkeyPatch, interrupted: Callable[[Handler], None]
) -> None:
    main = threading.get_ident()
    with deaf() as port:
        lead_to(monkeypatch, port, after=9.0 if end == "slow names" else 0.0)
        fields = {"backoff_s": 30.0, "longest_wait_s": 30.0} if end == "refused" else {}
        if end == "refused":
            stub.script = [status(500)]
            lead_to(monkeypatch, stub.server_address[1])
        start = time.monotonic()
        timer = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            client(stub, timeout_s=20, total_s=60, **fields).extract([picture("x")] * 3)
        assert time.monotonic() - start < 5
        while any(thread.name == "typescore" for thread in threading.enumerate()):
            assert time.monotonic() - start < 8, "a request goes on"
            time.sleep(0.01)


# -------------------------------------------------------------------------------------------------------------------- cache


def test_a_hit_makes_no_second_request(stub: Stub, tmp_path: Path) -> None:
    cached = Cached(client(stub), tmp_path)
    first = cached.extract([picture("one"), picture("two"), picture("one")])
    assert [one.text for one in first] == ["one", "two", "one"]
    assert len(stub.seen) == 2
    assert (cached.reads, cached.hits) == (2, 1)
    again = Cached(client(stub, threads=1, timeout_s=3.0), tmp_path)  # fields that do not change the reading
    assert again.extract([picture("two"), picture("one")]) == [first[1], first[0]]
    assert len(stub.seen) == 2
    assert (again.reads, again.hits) == (0, 2)
    assert describe(cached) == describe(client(stub))
    assert cached.name == "http"
    assert cached.batch == 16


def test_another_config_image_or_question_is_read_anew(stub: Stub, tmp_path: Path) -> None:
    Cached(client(stub), tmp_path).extract([picture("one")])
    Cached(client(stub, model="other"), tmp_path).extract([picture("one")])
    Cached(client(stub), tmp_path).extract([picture("one", shade=0)])
    cached = Cached(client(stub), tmp_path)
    for question in ("Is it red?", "Is it blue?", "Is it red?"):
        cached.ask([picture("one")], [question])
    assert len(stub.seen) == 5
    with pytest.raises(UserError, match="answers no questions"):
        Cached(get_extractor("oracle"), tmp_path).ask([picture("x")], ["?"])


def test_failed_readings_are_not_kept(stub: Stub, tmp_path: Path) -> None:
    stub.script = [status(400), says(""), status(400)]
    cached = Cached(client(stub), tmp_path)
    assert cached.extract([picture("x")])[0].error
    assert not list(tmp_path.rglob("*.json"))
    for _ in range(2):  # an empty reading is a reading, and kept
        found = cached.extract([picture("x")])[0]
        assert (found.text, found.error) == ("", None)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b'"text": "one"', b'"text": "two"'),
        lambda data: b"\x00\xff" * 99,
        lambda data: b"[]",
        lambda data: b"null",
        lambda data: b"[" * 100_000,
        lambda data: data.replace(b'"extraction"', b'"extractoin"'),
    ],
)
def test_damaged_entries_are_made_anew(
    damage: Callable[[bytes], bytes], stub: Stub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cached = Cached(client(stub), tmp_path)
    cached.extract([picture("one")])
    (file,) = tmp_path.rglob("*.json")
    whole = json.loads(file.read_bytes())
    file.write_bytes(damage(file.read_bytes()))
    assert cached.extract([picture("one")])[0].text == "one"
    assert len(stub.seen) == 2
    assert "damaged" in caplog.text
    assert json.loads(file.read_bytes())["extractor"] == whole["extractor"]
    cached.extract([picture("one")])
    assert len(stub.seen) == 2


def test_entries_are_written_whole_or_not(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    cached = Cached(client(stub), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        assert cached.extract([picture("one")])[0].text == "one"  # the reading is not lost with its copy
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_readings_are_kept_as_they_come(tmp_path: Path) -> None:
    """An extractor that is stopped in the third image has left two."""
    read: list[str] = []

    @dataclasses.dataclass(frozen=True)
    class Stopped:
        name = "stopped"
        batch = 1

        def version(self) -> str:
            return "1"

        def extract(self, images: list[Image.Image]) -> list[Extraction]:
            if len(read) == 2:
                raise KeyboardInterrupt
            read.append(images[0].info[TEXT_CHUNK])
            return [Extraction(read[-1])]

    with contextlib.suppress(KeyboardInterrupt):
        Cached(Stopped(), tmp_path).extract([picture(text) for text in "abc"])
    assert len(list(tmp_path.rglob("*.json"))) == 2


def test_readings_come_one_by_one_through_the_cache(stub: Stub, tmp_path: Path) -> None:
    """Those that are there, those that are read, one image twice, and one that is broken."""
    Cached(client(stub), tmp_path).extract([picture("old")])
    broken = grey([[0.0, 0.5]], np.float32)
    told: list[tuple[int, str]] = []
    found = Cached(client(stub, threads=1), tmp_path).extract(
        [picture("new"), picture("old"), broken, picture("new"), picture("last")],
        lambda i, one: told.append((i, one.text)),
    )
    assert told == [(1, "old"), (2, ""), (0, "new"), (3, "new"), (4, "last")]
    assert [one.text for one in found] == ["new", "old", "", "new", "last"]
    told.clear()
    Cached(client(stub), tmp_path).ask([picture("old")], ["Is it?"], lambda i, one: told.append((i, one.text)))
    assert told == [(0, "old")]


def test_every_extractor_tells_of_readings_as_they_come(rapid: dict[str, Any]) -> None:
    for extractor in (get_extractor("oracle"), RapidOcr()):
        told: list[int] = []
        extractor.extract([picture("a"), picture("b")], lambda i, _, told=told: told.append(i))
        assert told == [0, 1]


def test_a_journal_gives_back_whole_lines_of_the_same_picture(tmp_path: Path) -> None:
    path = tmp_path / "readings.jsonl"
    one = Extraction("open \u2013 daily", (Line("open", ((0.0, 0.0),) * 4, 0.5),), {"content": "open"}, 1.5)
    journal = Journal(path)
    assert journal.get("a.png", "1") is None
    journal.put("a.png", "1", Extraction("older"))
    with open(path, "ab") as file:
        file.write(b'\n{"image": "b.png", "sha')  # killed within a line
    journal.put("a.png", "1", one)
    again = Journal(path)
    assert again.get("a.png", "1") == one
    assert again.get("a.png", "2") is None
    assert again.get("b.png", "1") is None
    again.remove()
    again.remove()
    assert not path.exists()


def test_the_digest_is_of_what_is_seen(tmp_path: Path) -> None:
    image = Image.effect_noise((16, 16), 40).convert("RGB")
    image.save(tmp_path / "a.png", compress_level=0)
    image.save(tmp_path / "b.png", compress_level=9)
    assert digest(image) == digest(Image.open(tmp_path / "a.png")) == digest(Image.open(tmp_path / "b.png"))
    assert digest(image) != digest(image.transpose(Image.Transpose.ROTATE_90))
    assert digest(Image.new("RGB", (2, 8))) != digest(Image.new("RGB", (8, 2)))
    one, two = Image.new("RGB", (2, 2)), Image.new("RGB", (2, 2))
    two.info[TEXT_CHUNK] = "the oracle reads this"
    assert digest(one) != digest(two)


def test_a_folder_that_cannot_be_written_is_said_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache: .* cannot be written"):
        Cached(get_extractor("oracle"), tmp_path / "file")
