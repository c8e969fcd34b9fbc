"""Folders of pictures scored and calibrated: means, resuming, refusals, the page, the command line."""

import base64
import dataclasses
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mistakes import told
from PIL import Image
from typescore_stub import LIST, TEXT_CHUNK, TEXTS, Fake, client, listed, says, score, status

from zoo import cli, config
from zoo.papers.typescore.calibrate import Calibrate
from zoo.papers.typescore.compare import Compare
from zoo.papers.typescore.evaluate import TypeScore, find
from zoo.papers.typescore.extractors import Extraction, Oracle
from zoo.papers.typescore.instructions import Instruction
from zoo.papers.typescore.metric import parts, typescore
from zoo.papers.typescore.render import plain, save


def test_the_mean_is_over_pictures_then_instructions_of_what_was_read(folder, caplog):
    pictures = folder / "a"
    (pictures / "t-2_0.png").write_bytes(b"no picture")
    Image.new("RGB", (8, 8)).save(pictures / "t-3_0.png")  # without the renderer's note
    save(plain("", size=64), pictures / "t-4_0.png")
    for name in ("t-0_1", "t-5_0", "t-5_1"):  # so that the two kinds of mean differ
        (pictures / f"{name}.png").unlink()
    found = score(folder).run()
    right, wrong = ([(one.text, text(one.text)) for one in LIST] for text in (str, lambda t: t.replace("e", "a")))
    read = [[right[0]], [right[1], wrong[1]], [wrong[2]], [wrong[3]], [(TEXTS[4], ""), wrong[4]]]
    means = [np.mean([typescore(parts(a.lower(), b.lower())) for a, b in some]) for some in read]
    assert found["score"] == pytest.approx(np.mean(means), abs=1e-3)
    assert found["low"] <= found["score"] <= found["high"]
    assert (found["read"], found["failed"], found["instructions"], found["of"]) == (7, 2, 5, 6)
    assert "1 instructions have no picture and are in no mean: t-5" in caplog.text
    assert sum(found["error_types"].values()) == 7
    assert set(found["by"]["length_bin"]) == {"1-3", "4-8"}
    assert found["extractor"] == {"name": "oracle", "version": "1", "config": {}}
    out = folder / "a-typescore"
    assert json.loads((out / "summary.json").read_text())["score"] == found["score"]
    rows = {one["image"]: one for one in map(json.loads, (out / "records.jsonl").open())}
    assert list(rows)[:3] == ["t-0_0.png", "t-1_0.png", "t-1_1.png"]
    assert "t-2_0.png cannot be opened" in rows["t-2_0.png"]["error"]
    assert "no text chunk" in rows["t-3_0.png"]["error"]
    assert (rows["t-4_0.png"]["score"], rows["t-4_0.png"]["error_type"]) == (0, "missing")


def test_a_stopped_run_goes_on_where_it_stopped_and_pays_for_nothing_twice(folder: Path) -> None:
    """Wherever it is stopped, the result is that of a run that was not stopped; what failed or has changed is read again."""
    whole = score(folder, extractor=Fake(), out=str(folder / "whole")).run()
    out = folder / "a-typescore"
    read = [Fake(stops_after=n) for n in (1, 3, 7)]
    for fake in read:
        with pytest.raises(KeyboardInterrupt):
            score(folder, extractor=fake).run()
        assert not (out / "summary.json").exists()
    read.append(Fake())
    found = score(folder, extractor=read[-1]).run()
    assert sum(len(fake.read) for fake in read) == 12
    assert {**found, "out": 0} == {**whole, "out": 0}
    (out / "readings.jsonl").unlink()
    assert score(folder, extractor=Fake(fails=("entry",))).run()["failed"] == 1
    save(plain("Something else", size=64, points=8), folder / "a" / "t-0_0.png")
    with pytest.raises(KeyboardInterrupt):
        score(folder, extractor=Fake(stops_after=0)).run()
    assert not (out / "summary.json").exists()  # a stopped rerun looks unfinished
    again = Fake()
    assert score(folder, extractor=again).run()["failed"] == 0
    assert again.read == ["Something else", TEXTS[4]]  # what failed comes last


def test_an_endpoint_that_is_down_ends_with_3_and_the_same_command_goes_on(folder, stub, capsys):
    stub.script = [status(500)]
    argv = ["eval", "typescore/http", f"images={folder / 'a'}", f"wanted={folder / 'wanted.jsonl'}"]
    argv += [f"extractor.base_url={stub.url}", "extractor.model=seer", "extractor.retries=0", "resamples=5"]
    assert cli.main(argv) == 3
    assert "the endpoint failed 8 images in a row, the last by: HTTP 500" in capsys.readouterr().err
    stub.script = [says("Open daily")]
    assert cli.main(argv) == 0
    assert json.loads(capsys.readouterr().out)["read"] == 12
    (folder / "a-typescore" / "readings.jsonl").unlink()
    stub.script = [status(400), says("Open daily")]
    assert cli.main(argv) == 1  # done, with losses
    assert json.loads(capsys.readouterr().out)["failed"] == 1
    stub.script = [status(500)]  # while a run trains, it goes on without the figures
    figures = TypeScore(extractor=client(stub, retries=0), resamples=5).score(
        {f"synth-{i:03}": [Image.new("RGB", (8, 8))] for i in range(1, 10)}
    )
    assert (figures["failed"], np.isnan(figures["typescore"])) == (9, True)


def test_results_of_another_setting_are_never_overwritten(folder: Path) -> None:
    score(folder).run()
    out = str(folder / "a-typescore")
    before = (folder / "a-typescore" / "records.jsonl").read_bytes()
    for name in ("b", "mine"):
        (folder / name).mkdir()
        shutil.copy(folder / "a" / "t-0_0.png", folder / name)
    for made, *words in (
        (score(folder, case_sensitive=True), "normalisation.case_sensitive: false -> true", "out=FOLDER"),
        (score(folder, limit=3, out=out), "wanted_sha256"),
        (score(folder, "b", out=out), 'images: "../a" -> "../b"'),
        (score(folder, out=str(folder / "mine")), "mine", "no folder of results"),
    ):
        with told(*words):
            made.run()
    assert (folder / "a-typescore" / "records.jsonl").read_bytes() == before
    os.rename(folder, folder.with_name("moved"))  # pictures and results together
    assert score(folder.with_name("moved")).run()["read"] == 12
    os.rename(folder.with_name("moved"), folder)


def test_a_mistake_is_named_before_anything_is_read(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for fields, named in (
        ({"images": "nowhere"}, "images= nowhere"),
        ({"images": ""}, "images= t-0_0.png"),
        ({"images": "."}, "6 t-0_0.png"),
        ({"wanted": "lost.jsonl"}, "lost.jsonl"),
    ):
        with told(*named.split()):
            dataclasses.replace(score(folder, extractor=Fake(stops_after=0)), **fields).run()
    assert not (folder / "a-typescore").exists()


def test_pictures_are_found_by_id_and_number(tmp_path: Path) -> None:
    some = [dataclasses.replace(LIST[0], id=name) for name in ("b", "a", "a_x")]
    for name in ("a_10.png", "a_2.JPG", "a.webp", "a_x_0.jpeg", "b.png", "c_1.png", "a_1.txt", ".a_3.png", "a_y.png"):
        (tmp_path / name).touch()
    found = [(one.key.image, one.instruction.id) for one in find(tmp_path, some)]
    assert found == [("b.png", "b"), ("a.webp", "a"), ("a_2.JPG", "a"), ("a_10.png", "a"), ("a_x_0.jpeg", "a_x")]
    with told("a_2.JPG", "two instructions"):
        find(tmp_path, [*some, dataclasses.replace(LIST[0], id="a_2")])


def test_case_punctuation_and_weights_are_as_set() -> None:
    one = Instruction("x", "", "Open, mind the step")

    def of(text: str, **fields: Any) -> float:
        made = TypeScore(extractor=Oracle(), **fields)
        return float(made.judge(one, Image.new("RGB", (9, 9)), Extraction(text))["score"])

    assert of("OPEN, MIND THE STEP") == 100 > of("OPEN, MIND THE STEP", case_sensitive=True)
    assert of("Open! Mind the step") < 100 == of("Open! Mind the step", ignore_punct=True)
    turned = [
        of("Mind the step, open", weights=weights) for weights in ((1.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 0.0, 1.0))
    ]
    assert turned == sorted(turned)
    assert turned[0] < turned[2]


def test_a_scorer_of_a_run_is_checked_before_the_first_step(folder, monkeypatch):
    made = TypeScore(str(folder / "wanted.jsonl"), extractor=Oracle(), limit=2, resamples=5)
    made.check()
    assert made.prompts() == {one.id: one.instruction for one in LIST[:2]}
    for field, value in (("images", "somewhere"), ("out", "here"), ("wanted", "none.jsonl")):
        with told(value):
            dataclasses.replace(made, **{field: value}).check()
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    with told("needs the package rapidfuzz"):
        made.check()


def test_the_page_stands_alone_and_lets_nothing_through(folder: Path) -> None:
    evil = "<script>alert(1)</script> \"&'\u202e"
    listed(folder / "wanted.jsonl", [dataclasses.replace(one, domain=evil) for one in LIST])
    picture = Image.new("RGB", (30, 20))
    picture.info[TEXT_CHUNK] = evil
    save(picture, folder / "a" / "t-0_0.png")
    (folder / "a" / "t-1_0.png").write_bytes(b"")
    score(folder, weights=(2.0, 0.5, 0.0)).run()
    text = (folder / "a-typescore" / "report.html").read_text()
    shown = html.unescape(re.sub(r"<(script|style)>.*?</\1>|<[^>]+>", "", text, flags=re.DOTALL))
    assert text.count("<script") == 1
    assert "\u202e" not in text
    assert "<script>alert(1)" in shown  # escaped, it is shown
    sources = re.findall(r' (?:src|href|action)="([^"]*)"', text)
    assert len(sources) == 11  # one is no picture
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "http" not in text.replace("http-equiv", "")
    assert not re.findall(r"<[^>]* (?:on\w+|style)=", text)
    assert "default-src 'none'" in text
    for body in re.findall(r"<style>(.*?)</style>|<script>(.*?)</script>", text, re.DOTALL):  # none but these may run
        assert base64.b64encode(hashlib.sha256("".join(body).encode()).digest()).decode() in text
    kinds = re.findall(r'<article [^>]*data-kind="(\w+)"', text)
    assert (len(kinds), kinds.count("failed"), text.count("</article>")) == (12, 1, 12)
    for words in ("Not read: t-1_0.png cannot be opened", "weights NED 2, NLCS 0.5, SW 0."):
        assert words in shown
    assert "<span>fr</span><mark>e</mark><span>sh br</span>" in text  # fresh, read as frash
    assert '<div class="controls" hidden>' in text  # they are of use only with JavaScript


BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="the page is opened in a headless Chromium where there is one")
def test_the_page_works_in_a_browser(folder: Path, tmp_path: Path) -> None:
    (folder / "a" / "t-1_0.png").write_bytes(b"")  # the first of the list, never to be read
    score(folder).run()
    page = folder / "a-typescore" / "report.html"
    assert BROWSER is not None
    run = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    run += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=900,1400"]

    def rows() -> list[dict[str, str | None]]:
        done = subprocess.run([*run, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
        assert "CONSOLE" not in done.stderr, done.stderr  # no script fails, nothing is kept back by the page's policy
        assert '<div class="controls">' in done.stdout  # shown by the script
        tags = re.findall(r"<article [^>]*>", done.stdout)
        return [dict(re.findall(r'([\w-]+)="([^"]*)"', tag)) | {"hidden": " hidden" in tag or None} for tag in tags]

    assert [row["data-place"] for row in rows()] == [str(i) for i in range(12)]
    # what a reader chooses is what the script reads when the page opens
    whole = page.read_text()
    page.write_text(whole.replace('value="score"', 'value="score" selected').replace('"failed">', '"failed" selected>'))
    assert [row["data-kind"] for row in rows() if not row["hidden"]] == ["failed"]
    page.write_text(whole.replace('value="score down"', 'value="score down" selected'))
    values = [float(row["data-score"] or -1) for row in rows()]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-2] > values[-1] == -1


@dataclasses.dataclass(frozen=True)
class Repairs(Fake):
    """Gives back the whole list's text whose letters are most like those drawn: what a language model does to misspelt words."""

    texts: tuple[str, ...] = ()

    def one(self, image: Image.Image, text: str) -> Extraction:
        return Extraction(max(self.texts, key=lambda whole: parts(whole, text).ned))


def test_an_extractor_that_repairs_is_told_from_one_that_reads(tmp_path: Path) -> None:
    few = Calibrate(Oracle(), TEXTS[2:4], levels=(0.0, 0.2, 0.5), size=128, out=str(tmp_path / "oracle"))

    def of(name: str, extractor: Any) -> dict[str, Any]:
        return dataclasses.replace(few, extractor=extractor, out=str(tmp_path / name)).run()

    found = few.run()
    assert (found["verdict"], found["largest_difference"], len(found["levels"])) == ("faithful", 0, 6)
    clean = [one["score"] for one in found["levels"] if one["style"] == "clean"]
    assert clean[0] == 100 > clean[1] > clean[2]
    assert found["spearman"]["styled"] < -0.9
    assert len(json.loads((tmp_path / "oracle" / "calibration.json").read_text())["pictures"]) == 12
    mends = of("mends", Repairs(texts=few.texts))
    assert (mends["verdict"], mends["largest_difference"] > 20) == ("repairs", True)
    part = of("part", Fake(fails=("bread",)))
    assert (part["failed"], part["verdict"]) == (2, "faithful")
    with told("none of 12", "no answer"):
        of("none", Fake(fails=("",)))
    with told("calibration", "levels.1: 0.2 -> 0.25", "out=FOLDER"):
        dataclasses.replace(few, levels=(0.0, 0.25, 0.5)).run()


def test_configs_of_earlier_versions_open_and_fields_that_are_gone_say_what_came_in_their_place(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config._warn.cache_clear()
    reader = {"upside_down": False, "least_score": 0.5}
    for made, gone in (
        (TypeScore(limit=3), {"piece_mode": "set", "kind": "dissimilarity", "style": False, "cache": ""}),
        (Calibrate(), {"case_sensitive": True, "ignore_punct": False, "cache": "kept"}),
        (Compare(), {"surrogate": "", "clip": "a clip", "wanted": "list.jsonl", "extractors": True}),
    ):
        old = config.dump(made) | gone
        if "extractor" in old:
            old["extractor"] |= reader
        caplog.clear()
        assert config.undump(old) == config.undump(old) == made
        name, said = type(made).__name__, [record.message for record in caplog.records]
        for field, value in gone.items():  # once each, with the value that is not heeded
            assert sum(line.startswith(f"{name}.{field}={json.dumps(value)} ") for line in said) == 1
        assert len(said) == len(gone) + (len(reader) if name == "TypeScore" else 0)  # the reader's were told before
        for field in gone:
            with told(field, "is gone: "):
                config.override(made, [f"{field}=1"])
    with told("extractor.upside_down", "is gone", "leave it out"):
        config.override(TypeScore(), ["extractor.upside_down=false"])
