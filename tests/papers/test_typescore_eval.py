"""Folders of pictures scored and calibrated: means, resuming, refusals, the page, the command line."""

import dataclasses
import html.parser
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mistakes import told
from PIL import Image
from typescore_list import LIST, TEXTS, Fake, line, score

from zoo import cli, config
from zoo.errors import UserError
from zoo.papers.typescore import instructions as lists
from zoo.papers.typescore import render as drawing
from zoo.papers.typescore import report
from zoo.papers.typescore.calibrate import Calibrate
from zoo.papers.typescore.evaluate import TypeScore, find
from zoo.papers.typescore.extractors import Extraction, Line, Oracle
from zoo.papers.typescore.instructions import Instruction
from zoo.papers.typescore.pictures import Render
from zoo.papers.typescore.render import plain, save, save_all
from zoo.papers.typescore.results import load_all
from zoo.papers.typescore.score import parts, typescore


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


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
    stopped = score(folder, extractor=Fake(stops_after=2))
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    out = folder / "a-typescore"
    assert len(records(out)) == 4
    with open(out / "records.jsonl", "a") as file:
        file.write('{"image": "t-2_0.png", "id": "t-')  # killed within a line
    once = Fake(fails=("entry",))
    found = dataclasses.replace(stopped, extractor=once).run()
    assert sum(once.calls) == 8
    assert (found["read"], found["failed"]) == (11, 1)
    assert len(records(out)) == 12
    again = Fake()
    whole = dataclasses.replace(stopped, extractor=again).run()
    assert again.calls == [1]
    assert whole["failed"] == 0
    save(plain("Something else", size=64, points=8), folder / "a" / "t-0_0.png")
    changed = Fake()
    assert dataclasses.replace(stopped, extractor=changed).run()["score"] < whole["score"]
    assert changed.calls == [1]
    assert len(records(out)) == 12


def test_a_second_run_that_is_stopped_leaves_nothing_that_looks_finished(folder: Path) -> None:
    first = score(folder, extractor=Fake())
    first.run()
    out = folder / "a-typescore"
    made = ("summary.json", "plot.png", "report.html")
    before = {name: (out / name).stat().st_mtime_ns for name in made}
    first.run()  # nothing is left to read
    assert all((out / name).exists() for name in made)
    for one in LIST:
        save(plain("Something else", size=64, points=8), folder / "a" / f"{one.id}_0.png")
    with pytest.raises(KeyboardInterrupt):
        dataclasses.replace(first, extractor=Fake(stops_after=1)).run()
    assert not any((out / name).exists() for name in made)
    with told("end"):
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
        ({"limit": 3, "out": out}, "wanted_sha256"),
    ):
        with told(what, "out=FOLDER"):
            score(folder, **fields).run()
    (folder / "b").mkdir()
    save_all(LIST[:2], folder / "b", size=64)
    with told('images: "../a" -> "../b"'):
        score(folder, "b", out=out).run()
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("dear to me")
    with told("mine", "no folder of results"):
        score(folder, out=str(folder / "mine")).run()
    assert (folder / "a-typescore" / "records.jsonl").read_bytes() == before
    os.rename(folder, folder.with_name("moved"))  # pictures and results together
    moved = folder.with_name("moved")
    assert score(moved).run()["read"] == 12
    os.rename(moved, folder)


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"images": "nowhere"}, "images= nowhere"),
        ({"images": "wanted.jsonl"}, "wanted.jsonl folder"),
        ({"images": ""}, "images"),
        ({"images": "."}, "6 t-0_0.png"),
        ({"wanted": ""}, "wanted"),
        ({"wanted": "lost.jsonl"}, "lost.jsonl"),
        ({"wanted": "odd.jsonl", "ignore_punct": True}, "'t-0' '?!' ignore_punct"),
        ({"weights": (0.0, 0.0, 0.0)}, "weights"),
    ],
)
def test_a_mistake_is_named_before_anything_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], named: str
) -> None:
    monkeypatch.chdir(folder)
    (folder / "odd.jsonl").write_text('{"id": "t-0", "text": "?!"}\n')
    with told(*named.split()):
        dataclasses.replace(score(folder, extractor=Fake(stops_after=-1)), **fields).run()
    assert not (folder / "a-typescore").exists()


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
    with told("one picture of 'a'"):
        find(tmp_path, some)
    (tmp_path / "a_02.png").unlink()
    with told("a_2.JPG", "'a_2'", "2 of 'a'"):
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


def test_a_scorer_of_a_run_is_checked_before_the_first_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = str(folder / "wanted.jsonl")
    made = TypeScore(wanted, extractor=Oracle(), limit=2)
    made.check()
    assert made.prompts() == {one.id: one.instruction for one in LIST[:2]}
    for field, value in (("images", "somewhere"), ("out", "here"), ("wanted", "none.jsonl")):
        with told(value):
            dataclasses.replace(made, **{field: value}).check()
    monkeypatch.setattr(Oracle, "check", lambda self: (_ for _ in ()).throw(UserError("no package")))
    with told("no package"):
        made.check()


def test_records_that_do_not_know_of_questions_are_whole(folder: Path) -> None:
    fake = Fake()
    made = score(folder, cache=str(folder / "a-typescore" / "cache"), extractor=fake)
    made.run()
    file = folder / "a-typescore" / "records.jsonl"
    file.write_text(file.read_text().replace(', "failed": false', ""))
    assert '"failed"' not in file.read_text()
    fake.calls.clear()
    assert made.run()["unanswered"] == 0
    assert not fake.calls


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
    mends = dataclasses.replace(few, extractor=Repairs(texts=few.texts), out=str(tmp_path / "mends")).run()
    assert mends["verdict"] == "repairs"
    assert mends["largest_difference"] > 20
    part = dataclasses.replace(few, extractor=Fake(fails=("bread",)), out=str(tmp_path / "part")).run()
    assert part["failed"] == 2
    assert part["verdict"] == "faithful"
    with told("none of 24", "no answer"):
        dataclasses.replace(few, extractor=Fake(fails=("",)), out=str(tmp_path / "none")).run()


def test_a_calibration_of_another_setting_is_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = Calibrate(Oracle(), TEXTS[:2], levels=(0.0, 0.5), size=64)
    first.run()
    file = tmp_path / "typescore-calibration" / "calibration.json"
    before = file.read_bytes()
    unread = Fake(stops_after=-1)
    for fields, what in (
        ({"extractor": unread}, 'extractor.name: "oracle" -> "fake"'),
        ({"levels": (0.0, 0.25)}, "levels.1: 0.5 -> 0.25"),
        ({"case_sensitive": True}, "normalisation.case_sensitive: false -> true"),
        ({"texts": tuple("many words " * 9 + str(i) for i in range(99))}, "texts: "),
    ):
        with told("calibration", what, "out=FOLDER"):
            dataclasses.replace(first, **fields).run()
    assert file.read_bytes() == before
    dataclasses.replace(first, cache="kept").run()  # of the same setting, made anew
    assert json.loads(file.read_bytes())["setting"] == json.loads(before)["setting"]
    (file.parent / "setting.json").write_text("[]")
    with told("setting.json", "damaged", "out=FOLDER"):
        first.run()
    for _ in range(2):  # a cache within it is no stranger
        dataclasses.replace(first, out="cal", cache="cal/cache").run()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "calibration.md").write_text("dear to me")
    with told("out=mine", "calibration"):
        dataclasses.replace(first, extractor=unread, out="mine").run()


def test_a_text_of_punctuation_alone_calibrates_nothing_where_it_is_ignored() -> None:
    with told("'?!'", "ignore_punct"):
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
    for words, named in (
        ("typescore/oracle images=nowhere", "images=nowhere"),
        ("tarflow/digits", "a Run"),
        ("runs/none draws=3", "METRIC"),
        ("lost.py", "'lost.py'"),
        ("runs/none --raw bpdd", "'bpdd'"),  # a metric behind a flag is one still
    ):
        assert cli.main(["eval", *words.split()]) == 2
        assert named in capsys.readouterr().err


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
    assert cli.main(["eval", "typescore/render", f"out={out}"]) == 2
    assert "is there and not empty; name a new folder" in capsys.readouterr().err


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
