"""Folders of pictures scored and calibrated: means, resuming, refusals, the page, the command line."""

import contextlib
import dataclasses
import html.parser
import json
import os
import re
import shutil
import string
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image
from typescore_list import LIST, TEXTS, drawn, score

from zoo import cli, config
from zoo.errors import UserError
from zoo.papers.typescore import instructions as lists
from zoo.papers.typescore import render as drawing
from zoo.papers.typescore import report, style, synth
from zoo.papers.typescore.calibrate import Calibrate
from zoo.papers.typescore.evaluate import TypeScore, find
from zoo.papers.typescore.extractors import Extraction, Line, Oracle
from zoo.papers.typescore.instructions import Instruction
from zoo.papers.typescore.pictures import Render
from zoo.papers.typescore.render import plain, save, save_all
from zoo.papers.typescore.results import load_all
from zoo.papers.typescore.score import parts, typescore


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What `drawn` leaves."""
    return drawn(tmp_path)


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


def line(text: str, box: Sequence[float]) -> Line:
    left, top, right, bottom = map(float, box)
    return Line(text, ((left, top), (right, top), (right, bottom), (left, bottom)), 1.0)


@dataclasses.dataclass(frozen=True)
class Fake:
    """Reads what the renderer drew, with a box around the ink; answers every question with `answer`; notes its calls."""

    answer: str = "Yes."
    fails: tuple[str, ...] = ()
    stops_after: int = 0
    calls: list[Any] = dataclasses.field(default_factory=list, compare=False)

    name: ClassVar[str] = "fake"
    batch: ClassVar[int] = 2

    def __deepcopy__(self, memo: Any) -> "Fake":
        return self

    def version(self) -> str:
        return "1"

    def check(self) -> None: ...

    @property
    def described(self) -> dict[str, Any]:
        return {"name": "fake", "version": "1", "config": {}}

    def extract(self, images: Sequence[Image.Image]) -> list[Extraction]:
        if self.stops_after and len(self.calls) >= self.stops_after:
            raise KeyboardInterrupt
        self.calls.append(len(images))
        found = []
        for image in images:
            text = image.info[drawing.TEXT]
            pixels = np.asarray(image.convert("RGB"), float)
            far = np.linalg.norm(pixels - np.median(pixels, (0, 1)), axis=-1)
            y, x = np.nonzero(far > 0.5 * far.max())
            box = (x.min() - 3, y.min() - 3, x.max() + 4, y.max() + 4)
            failed = any(word in text for word in self.fails)
            found.append(Extraction("", error="no answer") if failed else Extraction(text, (line(text, box),)))
        return found


@dataclasses.dataclass(frozen=True)
class Asked(Fake):
    """One that answers questions as well."""

    def ask(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[Extraction]:
        self.calls.append(list(questions))
        return [Extraction(self.answer) for _ in questions]


# --- one folder -----------------------------------------------------------------------------------


def test_the_mean_is_over_pictures_then_instructions_and_every_record_says_how_it_was_made(folder: Path) -> None:
    (folder / "a" / "t-0_1.png").unlink()  # so that the two kinds of mean differ
    found = score(folder).run()
    expected = []
    for i, one in enumerate(LIST):
        own = [
            typescore(parts(one.text.lower(), t.lower()))
            for t in (one.text, one.text.replace("e", "a"))[: 1 if i == 0 else 2]
        ]
        expected.append(np.mean(own))
    assert found["score"] == pytest.approx(np.mean(expected), abs=1e-3)
    assert found["low"] <= found["score"] <= found["high"]
    assert (found["read"], found["failed"], found["instructions"], found["of"]) == (11, 0, 6, 6)
    assert found["missing"] == {"count": 0, "ids": []}
    assert sum(found["error_types"].values()) == 11
    assert set(found["by"]["length_bin"]) == {"1-3", "4-8"}
    assert set(found["by"]["content"]) == {"words", "digits", "punctuation"}
    out = folder / "a-typescore"
    assert json.loads((out / "summary.json").read_text())["score"] == found["score"]
    assert [record["image"] for record in records(out)][:3] == ["t-0_0.png", "t-1_0.png", "t-1_1.png"]
    for record in records(out):
        assert record["extractor"] == {"name": "oracle", "version": "1", "config": {}}
        assert record["spec_version"] == "1"
        assert record["normalisation"] == {"case_sensitive": False, "ignore_punct": False}
        assert set(record["parts"]) == {"ned", "nlcs", "sw"}
        assert record["style"]["font"]["followed"] is None
    with Image.open(out / "plot.png") as plotted:
        assert plotted.width > 600


def test_a_failed_extraction_is_counted_and_in_no_mean_and_no_text_scores_0(folder: Path) -> None:
    (folder / "a" / "t-2_0.png").write_bytes(b"no picture")
    Image.new("RGB", (8, 8)).save(folder / "a" / "t-3_0.png")  # without the renderer's note
    blank = Image.new("RGB", (8, 8))
    blank.info[drawing.TEXT] = ""
    save(blank, folder / "a" / "t-4_0.png")
    found = score(folder).run()
    assert (found["read"], found["failed"]) == (10, 2)
    rows = {record["image"]: record for record in records(folder / "a-typescore")}
    assert "t-2_0.png cannot be opened" in rows["t-2_0.png"]["error"]
    assert rows["t-2_0.png"]["score"] is None
    assert "no text chunk" in rows["t-3_0.png"]["error"]
    assert rows["t-4_0.png"]["score"] == 0
    assert rows["t-4_0.png"]["error_type"] == "missing"
    by = {"t-2": [rows["t-2_1.png"]["score"]]}
    assert by["t-2"][0] > 0
    means = [
        np.mean([r["score"] for r in rows.values() if r["id"] == one.id and r["score"] is not None]) for one in LIST
    ]
    assert found["score"] == pytest.approx(np.mean(means), abs=1e-3)


def test_where_nothing_is_read_there_is_no_score(folder: Path) -> None:
    for path in (folder / "a").iterdir():
        path.write_bytes(b"no picture")
    found = score(folder).run()
    assert found["score"] is None
    assert found["failed"] == 12
    assert "12 not read" in (folder / "a-typescore" / "report.html").read_text()


def test_a_stopped_run_goes_on_where_it_stopped_and_failed_pictures_are_tried_again(folder: Path) -> None:
    stopped = dataclasses.replace(score(folder), extractor=Fake(stops_after=2))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    out = folder / "a-typescore"
    assert len(records(out)) == 4
    with open(out / "records.jsonl", "a") as file:
        file.write('{"image": "t-2_0.png", "id": "t-')  # killed within a line
    once = Fake(fails=("entry",))
    found = dataclasses.replace(stopped, extractor=once).run()  # type: ignore[arg-type]
    assert sum(once.calls) == 8
    assert (found["read"], found["failed"]) == (11, 1)
    assert len(records(out)) == 12
    again = Fake()
    whole = dataclasses.replace(stopped, extractor=again).run()  # type: ignore[arg-type]
    assert again.calls == [1]
    assert whole["failed"] == 0
    save(plain("Something else", size=64, points=8), folder / "a" / "t-0_0.png")
    changed = Fake()
    assert dataclasses.replace(stopped, extractor=changed).run()["score"] < whole["score"]  # type: ignore[arg-type]
    assert changed.calls == [1]
    assert len(records(out)) == 12


def test_a_second_run_that_is_stopped_leaves_nothing_that_looks_finished(folder: Path) -> None:
    first = dataclasses.replace(score(folder), extractor=Fake())  # type: ignore[arg-type]
    first.run()
    out = folder / "a-typescore"
    made = ("summary.json", "plot.png", "report.html")
    before = {name: (out / name).stat().st_mtime_ns for name in made}
    first.run()  # nothing is left to read
    assert all((out / name).exists() for name in made)
    for one in LIST:
        save(plain("Something else", size=64, points=8), folder / "a" / f"{one.id}_0.png")
    with pytest.raises(KeyboardInterrupt):
        dataclasses.replace(first, extractor=Fake(stops_after=1)).run()  # type: ignore[arg-type]
    assert not any((out / name).exists() for name in made)
    with pytest.raises(UserError, match="has not come to its end"):
        load_all([str(out)])
    first.run()
    assert all((out / name).stat().st_mtime_ns > before[name] for name in made)
    assert load_all([str(out)])[0].scores()["t-0"] < 100


def test_results_of_another_setting_are_never_overwritten(folder: Path) -> None:
    score(folder).run()
    out = str(folder / "a-typescore")
    before = (folder / "a-typescore" / "records.jsonl").read_bytes()
    for fields, what in (
        ({"case_sensitive": True}, "normalisation.case_sensitive: false -> true"),
        ({"piece_mode": "set"}, "piece_mode"),
        ({"weights": (1.0, 0.0, 0.0)}, "weights"),
        ({"limit": 3, "out": out}, "wanted_sha256"),
    ):
        with pytest.raises(UserError, match=f"another setting .*{what}.*out=FOLDER"):
            score(folder, **fields).run()
    (folder / "b").mkdir()
    save_all(LIST[:2], folder / "b", size=64)
    with pytest.raises(UserError, match=r'images: "\.\./a" -> "\.\./b"'):
        score(folder, "b", out=out).run()
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("dear to me")
    with pytest.raises(UserError, match="no folder of results"):
        score(folder, out=str(folder / "mine")).run()
    assert (folder / "a-typescore" / "records.jsonl").read_bytes() == before
    os.rename(folder, folder.with_name("moved"))  # pictures and results together
    moved = folder.with_name("moved")
    assert score(moved).run()["read"] == 12
    os.rename(moved, folder)


@pytest.mark.parametrize(
    "break_, message",
    [
        (lambda f: {"images": str(f / "nowhere")}, "images=.*nowhere does not exist"),
        (lambda f: {"images": str(f / "wanted.jsonl")}, "is no folder"),
        (lambda f: {"images": ""}, "images is empty"),
        (lambda f: {"images": str(f)}, r"no picture of the 6 instructions; .* t-0_0.png"),
        (lambda f: {"wanted": ""}, "wanted is empty"),
        (lambda f: {"wanted": str(f / "lost.jsonl")}, "cannot be read"),
    ],
)
def test_what_is_not_there_is_told_before_anything_is_read(folder: Path, break_: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(score(folder, extractor=Fake(stops_after=-1)), **break_(folder)).run()
    assert not (folder / "a-typescore").exists()


@pytest.mark.parametrize(
    "lines, message",
    [
        ([{"id": "t-0", "instruction": "a sign"}], "quotes no text"),
        ([{"id": "t-0", "text": "x"}, {"id": "t-0", "text": "y"}], "line 1 too"),
        ([{"id": "t-0", "text": "?!"}], "nothing without its punctuation"),
    ],
)
def test_mistakes_of_the_list_are_told(folder: Path, lines: list[Any], message: str) -> None:
    (folder / "wanted.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    with pytest.raises(UserError, match=message):
        score(folder, ignore_punct=True).run()


def test_weights_that_make_no_evaluation_are_refused() -> None:
    with pytest.raises(UserError, match="weights"):
        TypeScore(weights=(0.0, 0.0, 0.0))


def test_pictures_are_found_by_id_and_number(tmp_path: Path) -> None:
    some = [dataclasses.replace(LIST[0], id=name) for name in ("b", "a", "a_x")]
    for name in ("a_10.png", "a_2.JPG", "a.webp", "a_x_0.jpeg", "b.png", "c_1.png", "a_1.txt", ".a_3.png", "a_y.png"):
        (tmp_path / name).touch()
    (tmp_path / "a_7.png").mkdir()
    found = find(tmp_path, some)
    assert [(one.path.name, one.instruction.id, one.k) for one in found] == [
        ("b.png", "b", None),
        ("a.webp", "a", None),
        ("a_2.JPG", "a", 2),
        ("a_10.png", "a", 10),
        ("a_x_0.jpeg", "a_x", 0),
    ]
    (tmp_path / "a_02.png").touch()
    with pytest.raises(UserError, match="one picture of 'a'"):
        find(tmp_path, some)
    (tmp_path / "a_02.png").unlink()
    with pytest.raises(UserError, match=r"a_2\.JPG is a picture of 'a_2' and number 2 of 'a'"):
        find(tmp_path, [*some, dataclasses.replace(LIST[0], id="a_2")])


def test_instructions_without_a_picture_are_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for k in (0, 1):
        (folder / "a" / f"t-1_{k}.png").unlink()
    found = score(folder).run()
    assert found["missing"] == {"count": 1, "ids": ["t-1"]}
    assert found["instructions"] == 5
    assert "1 of 6 instructions have no picture" in caplog.text


def test_case_punctuation_order_and_direction_are_as_set(tmp_path: Path) -> None:
    one = Instruction("x", 'Two signs, "Open" and "Mind the step".', "Open Mind the step", ("Open", "Mind the step"))

    def of(text: str, lines: tuple[Line, ...] = (), **fields: Any) -> float:
        made = TypeScore(extractor=Oracle(), **fields).judge(one, None, Extraction(text, lines, {"content": text}))
        return float(made["score"])

    assert of("OPEN MIND THE STEP") == 100
    assert of("OPEN MIND THE STEP", case_sensitive=True) < 60
    assert of("Open! Mind the step") < 100
    assert of("Open! Mind the step", ignore_punct=True) == 100
    boxes = (line("Mind the step", (0, 0, 50, 10)), line("Open", (0, 40, 20, 50)))
    assert of("Mind the step Open", boxes) < 80
    assert of("Mind the step Open", boxes, piece_mode="set") == 100
    assert of("Mind the step\nOpen", piece_mode="set") == 100  # rows of a model's answer
    assert of("OPEN MIND THE STEP", kind="dissimilarity") == 0
    assert of("x" * 18, weights=(0.0, 0.0, 1.0)) == 0


def test_pictures_in_memory_are_measured_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures = {one.id: [plain(one.text, size=64, points=8)] for one in LIST[:3]}
    summary, made = TypeScore(extractor=Oracle(), resamples=20).measure(LIST, pictures)
    assert summary["score"] == 100
    assert [record["image"] for record in made] == ["t-0_0", "t-1_0", "t-2_0"]
    assert not list(tmp_path.iterdir())


# --- style ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", drawing.COLOURS)
def test_the_colour_of_the_ink_is_seen_in_the_box(colour: str) -> None:
    ground = "cloth" if colour in ("red", "purple") else "stone"
    picture = plain(
        "Open daily", colour=colour, size=256, points=28, rotation=4, noise=8, texture=True, material=ground
    )
    found = Fake().extract([picture])[0]
    for other in drawing.COLOURS:
        verdict = style.measured({"colour": other}, picture, found.lines)["colour"]
        assert verdict.followed is (other == colour), (other, verdict)


def test_case_and_place_are_seen_and_what_boxes_do_not_tell_is_not_evaluated() -> None:
    picture = Image.new("RGB", (300, 300), "white")

    def followed(attribute: str, value: str, text: str = "OPEN DAILY", box: Sequence[float] = (10, 10, 90, 30)) -> Any:
        return style.measured({attribute: value}, picture, [line(text, box)])[attribute].followed

    assert followed("case", "capitals")
    assert not followed("case", "lowercase")
    assert followed("case", "lowercase", "sSsing it daily")  # S and s look alike
    assert not followed("case", "lowercase", "The bread is here")
    assert followed("case", "capitals", "12") is None
    assert followed("case", "sarcastic") is None
    assert followed("placement", "top")
    assert followed("placement", "left")
    assert not followed("placement", "centre")
    assert not followed("placement", "bottom")
    assert followed("placement", "centre", box=(110, 110, 190, 190))
    assert followed("placement", "right", box=(210, 110, 290, 190))
    assert followed("placement", "nowhere") is None
    assert followed("font", "serif") is None
    assert followed("colour", "mauvish") is None
    assert followed("colour", "red") is None  # no ink on plain white
    assert style.measured({"case": "capitals"}, picture, [])["case"].followed is None


@pytest.mark.parametrize(
    "text, capitals, lowercase",
    [
        ("Stay Curious", False, False),
        ("Open Special Week", False, False),
        ("stay curious and open every week for all that come by", False, True),
        ("Come early and bring a blanket for the show", False, False),  # one capital among 34 letters
        ("the Plover sails", False, False),
        ("LP", True, False),
        ("Lp", False, False),
        ("Dj", False, False),
        ("So", False, False),
        ("C", True, False),
        # as readers err
        ("oPen Xylophone cOncerts", False, False),
        ("all yOu Vegans knoW", False, False),
        ("all yOu kNow of Bread", False, False),
        ("all yOu kNow of the bread", False, True),  # N once
        ("all yOu kNow of thE bread", False, False),
        ("send an sOs, aII of you, 2O times", False, True),
        ("vitamin C for all", False, True),  # the letter alone does not tell
        ("all that I know", False, False),
        ("for 5O crowns or O5", False, True),
        ("cOME EARLY", True, False),
        ("MlND THE sTEP AT 1o", True, False),
        ("don't go past Nora's", False, False),
        ("cafe\u0301s open daily", False, True),
        ("DON’T GO", True, False),
    ],
)
def test_case_is_told_by_the_letters_that_tell(text: str, capitals: bool, lowercase: bool) -> None:
    assert style._case("capitals", text).followed is capitals
    assert style._case("lowercase", text).followed is lowercase


@pytest.mark.parametrize("drawn", [str, str.upper, str.lower, str.title, string.capwords, str.capitalize])
def test_the_case_of_all_shipped_texts_is_told_however_they_are_drawn(drawn: Callable[[str], str]) -> None:
    for one in synth.generate():
        text = drawn(one.text)
        cased = text.upper() != text.lower()
        for value, right in (("capitals", text.upper()), ("lowercase", text.lower())):
            assert style._case(value, text).followed is ((text == right) if cased else None), (value, text)


def test_boxes_and_ink_are_of_the_picture_as_it_is_seen(tmp_path: Path) -> None:
    seen = plain("Open", colour="red", placement="top", size=240).crop((0, 0, 240, 150))
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned by a quarter
    seen.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        turned.load()
    assert turned.size == (150, 240)
    x, y = 120, 40  # of the ink's middle, by the renderer
    lines = [line("Open", (x - 60, y - 25, x + 60, y + 25))]
    for picture in (seen, turned):
        found = style.measured({"placement": "top", "colour": "red"}, picture, lines)
        assert found["placement"] == style.Verdict(True, "centre at 50%, 27%")
        assert found["colour"].followed


def test_a_model_that_sees_is_asked_for_the_rest_without_a_word_of_the_text(folder: Path) -> None:
    for answer, followed in (("Yes.", True), ("no", False), ("**No**, it is not", False), ("It may be", None)):
        asked = Asked(answer=answer)
        made = dataclasses.replace(score(folder, out=str(folder / f"out{followed}{len(answer)}")), extractor=asked)  # type: ignore[arg-type]
        found = made.run()
        questions = [call for call in asked.calls if isinstance(call, list)]
        assert len(questions) == 12
        assert questions[0] == ["Is the text in this image drawn in a serif typeface? Answer yes or no."]
        by = found["style"]["by"]
        assert by["colour"]["followed"] == 0  # measured: they are drawn in black
        assert (by["font"]["evaluated"], by["font"]["not_evaluated"]) == ((12, 0) if followed is not None else (0, 12))
        assert found["style"]["score"] == (50 if followed else 0)
        assert found["score"] > 80  # of another matter
    without = Asked()
    found = dataclasses.replace(score(folder, out=str(folder / "bare"), style=False), extractor=without).run()  # type: ignore[arg-type]
    assert found["style"] is None
    assert not [call for call in without.calls if isinstance(call, list)]
    assert style.answered(Extraction("", error="HTTP 500")).followed is None
    silent = Asked()
    assert style.evaluate({"font": "serif"}, Image.new("RGB", (9, 9)), Extraction(""), silent)["font"].followed is None
    assert not silent.calls


def test_questions_that_were_not_answered_are_counted_and_asked_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = Asked()
    made = dataclasses.replace(score(folder), extractor=asked)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(Asked, "ask", lambda self, images, questions: [Extraction("", error="HTTP 500")] * len(questions))
        found = made.run()
    assert (found["failed"], found["unanswered"], found["style"]["by"]["font"]["evaluated"]) == (0, 12, 0)
    assert "12 questions of style were not answered" in caplog.text
    found = made.run()
    assert (found["unanswered"], found["style"]["by"]["font"]["evaluated"]) == (0, 12)
    asked.calls.clear()
    made.run()
    assert not asked.calls


def test_a_scorer_of_a_run_is_checked_before_the_first_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = str(folder / "wanted.jsonl")
    made = TypeScore(wanted, extractor=Oracle(), limit=2)
    made.check()
    assert made.prompts() == {one.id: one.instruction for one in LIST[:2]}
    for fields, message in (
        ({"images": "somewhere"}, "images=somewhere is for a folder of pictures"),
        ({"out": "here"}, "out=here is for a folder of pictures"),
        ({"wanted": "none.jsonl"}, "none.jsonl"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(made, **fields).check()  # type: ignore[arg-type]
    monkeypatch.setattr(Oracle, "check", lambda self: (_ for _ in ()).throw(UserError("no package")))
    with pytest.raises(UserError, match="no package"):
        made.check()


def test_records_that_do_not_know_of_questions_are_whole(folder: Path) -> None:
    fake = Fake()
    made = dataclasses.replace(score(folder, cache=str(folder / "a-typescore" / "cache")), extractor=fake)  # type: ignore[arg-type]
    made.run()
    file = folder / "a-typescore" / "records.jsonl"
    file.write_text(file.read_text().replace(', "failed": false', ""))
    assert '"failed"' not in file.read_text()
    fake.calls.clear()
    assert made.run()["unanswered"] == 0
    assert not fake.calls


def test_style_shares() -> None:
    yes, no, open_ = (style.Verdict(value, "") for value in (True, False, None))
    assert style.share({"a": yes, "b": no, "c": open_}) == 50
    assert style.share({"c": open_}) is None
    np.testing.assert_allclose(style.lab([255, 255, 255]), [100, 0, 0], atol=0.02)
    np.testing.assert_allclose(style.lab([255, 0, 0]), [53.24, 80.09, 67.2], atol=0.05)


# --- the page -------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Tags that are open and ids, sources and links of a page; fails on tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value) for key, value in attrs]
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            self.text += data


def test_the_page_stands_alone_and_lets_nothing_through(folder: Path) -> None:
    evil = "<script>alert(1)</script> \"&'\u202e"
    lists.write(folder / "wanted.jsonl", [dataclasses.replace(one, domain=evil) for one in LIST])
    picture = Image.new("RGB", (30, 20))
    picture.info[drawing.TEXT] = evil
    save(picture, folder / "a" / "t-0_0.png")
    (folder / "a" / "t-1_0.png").write_bytes(b"")
    score(folder).run()
    text = (folder / "a-typescore" / "report.html").read_text()
    page = Page(text)
    assert text.count("<script") == 1
    assert "\u202e" not in text
    assert "<script>alert(1)" in page.text  # escaped, it is shown
    sources = [value or "" for _, key, value in page.attributes if key in ("src", "href", "action")]
    assert len(sources) == 11  # one is no picture
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "http" not in text.replace("http-equiv", "")
    assert not [key for _, key, _ in page.attributes if key.startswith("on") or key == "style"]
    assert "default-src 'none'" in text
    kinds = [value for tag, key, value in page.attributes if tag == "article" and key == "data-kind"]
    assert len(kinds) == 12
    assert kinds.count("failed") == 1
    assert "Not read: t-1_0.png cannot be opened" in page.text
    assert ("div", "class", "controls") in page.attributes
    assert ("div", "hidden", None) in page.attributes  # controls are of use only with JavaScript


def test_bins_with_names_of_ones_own_are_plotted_and_weights_are_told(folder: Path) -> None:
    names = ("$5", "$\\frac$", "a $b$ c", r"\$", "5$ and more", "")
    lists.write(folder / "wanted.jsonl", [dataclasses.replace(one, length_bin=name) for one, name in zip(LIST, names)])
    found = score(folder, weights=(2.0, 0.5, 0.0)).run()
    assert set(names) - {""} <= set(found["by"]["length_bin"])
    page = Page((folder / "a-typescore" / "report.html").read_text())
    assert "similarity, weights NED 2, NLCS 0.5, SW 0." in page.text
    with Image.open(folder / "a-typescore" / "plot.png") as plotted:
        assert plotted.width > 600


BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="the page is opened in a headless Chromium where there is one")
def test_the_page_works_in_a_browser(folder: Path, tmp_path: Path) -> None:
    (folder / "a" / "t-1_0.png").write_bytes(b"")  # the first of the list, never to be read
    score(folder).run()
    page = folder / "a-typescore" / "report.html"
    assert BROWSER is not None
    run = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    run += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=900,1400"]

    def opened(*flags: str) -> str:
        done = subprocess.run([*run, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
        assert "CONSOLE" not in done.stderr, done.stderr  # no script fails, nothing is kept back by the page's policy
        return done.stdout

    def rows(text: str) -> list[dict[str, str | None]]:
        tags = re.findall(r"<article [^>]*>", text)
        return [dict(re.findall(r'([\w-]+)="([^"]*)"', tag)) | {"hidden": " hidden" in tag or None} for tag in tags]

    text = opened("--dump-dom")
    assert '<div class="controls">' in text  # shown by the script
    assert "12 of 12 pictures" in text
    assert [row["data-place"] for row in rows(text)] == [str(i) for i in range(12)]
    opened(f"--screenshot={tmp_path / 'seen.png'}")
    with Image.open(tmp_path / "seen.png") as seen:
        assert seen.size == (900, 1400)
        assert len(seen.convert("RGB").getcolors(1 << 20) or ()) > 100  # of pictures, not of text alone

    # what a reader chooses is what the script reads when the page opens
    whole = page.read_text()
    page.write_text(whole.replace('value="score"', 'value="score" selected').replace('"failed">', '"failed" selected>'))
    found = rows(opened("--dump-dom"))
    assert [row["data-kind"] for row in found if not row["hidden"]] == ["failed"]
    page.write_text(whole.replace('value="score down"', 'value="score down" selected'))
    values = [float(row["data-score"] or -1) for row in rows(opened("--dump-dom"))]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-2] > values[-1] == -1


def test_wanted_and_read_are_aligned() -> None:
    assert report.aligned("open daily", "opn daily <b>") == ("op<del>e</del>n daily", "opn daily<ins> &lt;b&gt;</ins>")
    assert report.aligned("open", "oven") == ("o<mark>p</mark>en", "o<mark>v</mark>en")


# --- calibration ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Repairs(Fake):
    """Gives back the whole list's text whose letters are most like those drawn: what a language model does to misspelt words."""

    texts: tuple[str, ...] = ()

    def extract(self, images: Sequence[Image.Image]) -> list[Extraction]:
        drawn = [image.info[drawing.TEXT] for image in images]
        return [Extraction(max(self.texts, key=lambda text, d=d: parts(text, d).ned)) for d in drawn]  # type: ignore[misc]


def test_an_extractor_that_repairs_is_told_from_one_that_reads(tmp_path: Path) -> None:
    few = Calibrate(Oracle(), TEXTS[1:5], levels=(0.0, 0.2, 0.5), size=128, out=str(tmp_path / "oracle"))
    found = few.run()
    assert found["verdict"] == "faithful"
    assert found["largest_difference"] == 0
    assert len(found["levels"]) == 6
    clean = [one["score"] for one in found["levels"] if one["style"] == "clean"]
    assert clean[0] == 100 > clean[1] > clean[2]
    assert found["spearman"]["styled"] < -0.9
    assert "| clean | 20% |" in (tmp_path / "oracle" / "calibration.md").read_text()
    assert Image.open(tmp_path / "oracle" / "calibration.png").width > 400
    assert len(json.loads((tmp_path / "oracle" / "calibration.json").read_text())["pictures"]) == 24
    mends = dataclasses.replace(few, extractor=Repairs(texts=few.texts), out=str(tmp_path / "mends")).run()  # type: ignore[arg-type]
    assert mends["verdict"] == "repairs"
    assert mends["largest_difference"] > 20
    part = dataclasses.replace(few, extractor=Fake(fails=("bread",)), out=str(tmp_path / "part")).run()  # type: ignore[arg-type]
    assert part["failed"] == 2
    assert part["verdict"] == "faithful"
    with pytest.raises(UserError, match="read none of 24 pictures; the first: no answer"):
        dataclasses.replace(few, extractor=Fake(fails=("",)), out=str(tmp_path / "none")).run()  # type: ignore[arg-type]


def test_a_calibration_of_another_setting_is_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = Calibrate(Oracle(), TEXTS[:2], levels=(0.0, 0.5), size=64)
    first.run()
    file = tmp_path / "typescore-calibration" / "calibration.json"
    before = file.read_bytes()
    unread = Fake(stops_after=-1)
    for fields, what in (
        ({"extractor": unread}, 'extractor.name: "oracle" -> "fake"'),
        ({"texts": TEXTS[:3]}, "texts: "),
        ({"levels": (0.0, 0.25)}, "levels.1: 0.5 -> 0.25"),
        ({"case_sensitive": True}, "normalisation.case_sensitive: false -> true"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"size": 128}, "size: 64 -> 128"),
        ({"texts": tuple("many words " * 9 + str(i) for i in range(99))}, "texts: "),
    ):
        with pytest.raises(UserError, match=r"a calibration of another setting .*out=FOLDER") as caught:
            dataclasses.replace(first, **fields).run()  # type: ignore[arg-type]
        assert what in str(caught.value)
        assert len(str(caught.value)) < 1200
    assert file.read_bytes() == before
    dataclasses.replace(first, cache="kept").run()  # of the same setting, made anew
    assert json.loads(file.read_bytes())["setting"] == json.loads(before)["setting"]
    (file.parent / "setting.json").write_text("[]")
    with pytest.raises(UserError, match=r"setting\.json is damaged; name another folder with out=FOLDER"):
        first.run()
    for _ in range(2):  # a cache within it is no stranger
        dataclasses.replace(first, out="cal", cache="cal/cache").run()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "calibration.md").write_text("dear to me")
    with pytest.raises(UserError, match="out=mine is no folder of a calibration"):
        dataclasses.replace(first, extractor=unread, out="mine").run()  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"out=mine/calibration\.md is no folder of a calibration"):
        dataclasses.replace(first, extractor=unread, out="mine/calibration.md").run()  # type: ignore[arg-type]


def test_a_text_of_punctuation_alone_calibrates_nothing_where_it_is_ignored() -> None:
    with pytest.raises(UserError, match=r"texts: '\?!' is nothing without its punctuation; leave ignore_punct out"):
        Calibrate(texts=("Open daily", "?!"), ignore_punct=True)
    assert Calibrate(texts=("Open daily", "?!")).texts[1] == "?!"


# --- the command line -----------------------------------------------------------------------------


def test_eval_runs_a_config_without_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = [f"wanted={folder / 'wanted.jsonl'}", f"images={folder / 'a'}", "resamples=20"]
    assert cli.main(["eval", "configs/typescore/oracle.py", *fields]) == 0
    assert json.loads(capsys.readouterr().out)["read"] == 12
    (folder / "a" / "t-0_0.png").write_bytes(b"")
    assert cli.main(["eval", "typescore/oracle", *fields]) == 1  # done, with losses
    assert json.loads(capsys.readouterr().out)["failed"] == 1
    with contextlib.suppress(SystemExit):
        assert cli.main(["eval", "typescore/oracle", "images=nowhere"]) == 2
    assert "images=nowhere does not exist" in capsys.readouterr().err
    for words, message in (
        (["tarflow/digits"], "holds a Run, which measures nothing by itself"),
        (["runs/none"], "zoo eval runs/none METRIC"),
        (["runs/none", "draws=3"], "zoo eval runs/none METRIC"),
        (["lost.py"], "no config file 'lost.py'"),
        (["runs/none", "bpdd"], "no metric 'bpdd'; did you mean 'bpd'"),
        (["runs/none", "--raw", "bpdd"], "no metric 'bpdd'"),  # a metric behind a flag is one still
        (["runs/none", "draws=3", "bpdd"], "no metric 'bpdd'"),
        (["typescore/oracle", "image=x"], "no field image in TypeScore; did you mean 'images'?"),
    ):
        assert cli.main(["eval", *words]) == 2
        assert message in capsys.readouterr().err


def test_every_config_of_typescore_opens_and_stands_alone() -> None:
    names = [name for name in config.shipped() if name.startswith("typescore/")]
    assert names == [
        f"typescore/{name}"
        for name in ("calibrate", "compare", "http", "model", "oracle", "rapidocr", "render", "tesseract")
    ]
    for name in names:
        value = config.load(name)
        assert getattr(value, "standalone", False) is (name != "typescore/model")
        assert config.describe(name)
        if name not in ("typescore/compare",):
            assert config.undump(config.dump(value)) == value
    changed = config.load(
        "typescore/http", ["extractor.base_url=http://127.0.0.1:1/v1", "extractor.model=m", "piece_mode=set"]
    )
    assert (changed.extractor.model, changed.piece_mode) == ("m", "set")


def test_bench_times_the_metric_and_the_extractor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "typescore/oracle", "--rounds", "1", "--json", str(tmp_path / "bench.json")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "bench.json").read_text()) == found
    assert found["extractor"]["name"] == "oracle"
    assert found["pairs_per_second"] > 0
    assert found["images_per_second"] > 0
    assert found["seconds_per_image"] > 0


def test_pictures_with_known_faults_are_rendered_and_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "made")
    argv = ["eval", "typescore/render", f"out={out}", "limit=2", "each=2", "size=128", "corruption.p_char=0.5"]
    assert cli.main(argv) == 0
    assert json.loads(capsys.readouterr().out) == {"pictures": 4, "instructions": 2, "out": out}
    assert len(list((tmp_path / "made").glob("*_[01].png"))) == 4
    assert cli.main(["eval", "typescore/oracle", f"images={out}", "limit=2"]) == 0
    assert 20 < json.loads(capsys.readouterr().out)["score"] < 80
    for fields, message in (
        ([f"out={out}"], "is there and not empty; name a new folder"),
        ([f"out={out}2", "each=0"], "each=0 must be a whole number from 1"),
        ([f"out={out}2", "wanted=none.jsonl"], "none.jsonl"),
    ):
        assert cli.main(["eval", "typescore/render", *fields]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("there", [False, True])
def test_a_render_that_fails_leaves_nothing_and_may_be_corrected(
    tmp_path: Path, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "deep" / "made"
    if there:
        out.mkdir(parents=True)
    bad = dataclasses.replace(LIST[1], text="茶", pieces=("茶",))
    lists.write(tmp_path / "wanted.jsonl", [LIST[0], bad])
    made = Render(str(out), str(tmp_path / "wanted.jsonl"), size=64)
    with pytest.raises(UserError, match="no font at hand shows '茶'"):
        made.run()
    assert out.exists() is there
    assert not [path for path in (tmp_path / "deep").rglob("*") if path != out]
    lists.write(tmp_path / "wanted.jsonl", LIST[:2])
    assert made.run()["pictures"] == 2
    assert sorted(path.name for path in out.iterdir()) == ["t-0_0.png", "t-1_0.png"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["made"]
    empty = tmp_path / "here"
    empty.mkdir()
    monkeypatch.chdir(empty)
    assert dataclasses.replace(made, out=".").run()["pictures"] == 2
    assert len(list(empty.iterdir())) == 2
