"""Texts as samples: resumable files, what the terminal shows, passes, rewriting, and models without a vocabulary."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from unigram import Editor, Filler, Lossy, Unigram, Windows

from zoo import cli, models, weights
from zoo.commands import conditions, text
from zoo.commands import weights as exports
from zoo.commands.draw import draw, keys
from zoo.data.synthetic import Synthetic
from zoo.data.text.vocabulary import characters, open_vocabulary, raw_bytes, text8
from zoo.errors import UserError
from zoo.paths import Folder
from zoo.run import Run


def model(task: Any, folder: Folder, data: Any = None) -> models.Model:
    params = {"logits": jnp.linspace(0, 2, task.vocab)}
    return models.Model(task, params, "ema", 5, data, (), folder)


def sampled(made: models.Model, out: Path, n: int, texts: list[str] | None = None, **options: Any) -> None:
    vocabulary = made.vocabulary
    given, starts = text.rewritten(made, vocabulary, texts, n)
    form = text.Texts(vocabulary, starts)
    draw(made, out, n=n, seed=3, conditions=given, captions=starts, asked={"prompt": None}, batch=3,
         options=made.task.Sampling(**options), form=form)  # fmt: skip


def test_a_config_has_the_vocabulary_of_its_weights(tmp_path: Path) -> None:
    text8().save(tmp_path)
    run = Run(Unigram(), Synthetic(), steps=1, batch=8, weights={"": str(tmp_path)})
    made = models.Model(run.task, {}, str(tmp_path), None, None, (), tmp_path / "config.py", run)
    assert made.vocabulary == text8()


def lines(out: Path, name: str) -> str:
    return (out / name).read_text()


def test_texts_are_files_that_a_second_call_adds_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, out = model(Unigram(), tmp_path, Windows()), tmp_path / "out"
    sampled(made, out, 3)
    first = [lines(out, f"{i:06d}.txt") for i in range(3)]
    assert sorted(p.name for p in out.iterdir()) == ["000000.txt", "000001.txt", "000002.txt", "settings.json"]
    assert len(set(first)) == 3
    assert all(len(t) == 9 and t.endswith("\n") and set(t[:-1]) <= set(" abcdefghijklmnopqrstuvwxyz") for t in first)
    shown = capsys.readouterr().out.split("\n")
    assert shown[:6] == [part for i in range(3) for part in (f"--- {i:06d}.txt", first[i][:-1])]
    assert shown[6] == f"3 samples in {out} (000000.txt to 000002.txt; average weights, seed 3)"
    (out / "000001.txt").unlink()
    (out / "000002.txt").write_text("kept\n")
    sampled(made, out, 10)
    assert lines(out, "000001.txt") == first[1]
    assert lines(out, "000002.txt") == "kept\n"
    shown = capsys.readouterr().out
    assert shown.count("--- 00000") == 8
    assert "--- and 2 more\n" in shown
    with pytest.raises(UserError, match="drawn with other settings"):
        sampled(made, out, 3, temperature=0.5)
    other = tmp_path / "other"
    other.mkdir()
    (other / "1 of mine.txt").write_text("")
    with pytest.raises(UserError, match="other holds texts that zoo did not draw"):
        sampled(made, other, 1)


def test_texts_that_overflow_are_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, out = model(Lossy(), tmp_path, Windows()), tmp_path / "out"
    kept: list[Any] = []
    monkeypatch.setattr(text.Texts, "save", lambda self, out, i, drawn, about: kept.append(drawn))
    monkeypatch.setattr(text.Texts, "show", lambda *_: "")
    sampled(made, out, 9)
    assert "overflowed and are drawn again" in caplog.text
    first = made.task.sample(made.params, keys(3, np.arange(9)), 9)
    assert bool(first["lost"].any())
    for i, drawn in enumerate(kept):
        assert drawn["lost"] == (drawn["tokens"].min() < 0)  # all that the sampler gives is of the same draw
        if not first["lost"][i]:
            np.testing.assert_array_equal(drawn["tokens"], first["tokens"][i])
    assert sum(bool(drawn["lost"]) for drawn in kept) < int(first["lost"].sum())

    hopeless = dataclasses.replace(made, params={"logits": jnp.zeros(27).at[0].set(1e9)})
    sampled(hopeless, tmp_path / "lost", 2)
    assert "samples 0, 1 are not finite after 4 tries; their missing tokens are marked" in caplog.text


def test_passes_lie_beside_a_text_and_are_shown_with_what_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, out = model(Editor(), tmp_path, Windows()), tmp_path / "out"
    sampled(made, out, 2, passes=True)
    drawn = made.task.sample(made.params, keys(3, np.arange(2)), 2, None, made.task.Sampling(passes=True))
    assert lines(out, "000000.txt") == text8().decode(drawn["tokens"][0]) + "\n"
    passes = lines(out, "000000.passes.txt")
    assert passes == text.told_passes(np.array(drawn["passes"][0]), text8()) + "\n"
    assert [part.partition(":")[0] for part in passes.split("\n\n")] == [f"pass {k} of 2" for k in range(3)]
    assert passes.rstrip("\n") in capsys.readouterr().out
    (out / "000001.txt").unlink()  # as a call that was killed leaves it
    (out / "000001.passes.txt").write_text("torn")
    sampled(made, out, 2, passes=True)
    assert lines(out, "000001.passes.txt").startswith("pass 0 of 2: noise\n")


def test_marks_are_those_of_wdiff() -> None:
    assert text.marked("the cat sat on a mat", "the cat sat on the mat") == "the cat sat on [-a-]{+the+} mat"
    assert text.marked("a b c", "a b b c") == "a b {+b+} c"
    assert text.marked("a b  c d", "a b d") == "a b  [-c-] d"
    assert text.marked("one two", "three four") == "three four"  # nothing has stayed
    assert text.marked("same", "same") == "same"
    assert text.marked("", "") == ""
    assert text.marked("the cat", "thy  ot", aligned=True) == "th[-e-]{+y+} [-ca-]{+ o+}t"
    assert text.marked("abc", "abd") == "abd"
    told = text.told_passes(np.array([[1, 0, 2], [1, 0, 3]]), text8())
    assert told == "pass 0 of 1: noise\na b\n\npass 1 of 1: 1 of 3 tokens changed\na [-b-]{+c+}"
    numbers = text.told_passes(np.array([[1, 0, 22], [1, 0, 3]]), None)
    assert numbers.endswith("1 of 3 tokens changed\n1 0 [-22-]{+3+}")


def test_marks_are_colours_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert text._coloured("a [-b-]{+c+}") == "a [-b-]{+c+}"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert text._coloured("a [-b-]{+c\nd+}") == "a \x1b[9;31mb\x1b[0m\x1b[32mc\nd\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert text._coloured("a [-b-]") == "a [-b-]"


def test_a_model_without_a_vocabulary_writes_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    class Gone(Windows):
        def vocabulary(self) -> Any:
            raise UserError("data.path=x does not exist")

    for i, data in enumerate((None, Gone())):
        made, out = model(Unigram(vocab=300), tmp_path, data), tmp_path / f"out{i}"
        with caplog.at_level(logging.INFO, "zoo"):
            sampled(made, out, 1)
        numbers = lines(out, "000000.txt").split()
        assert len(numbers) == 8
        assert all(0 <= int(k) < 300 for k in numbers)
        assert "has no vocabulary.json" in caplog.text
    assert "(data.path=x does not exist): tokens are told by their numbers" in caplog.text
    with pytest.raises(UserError, match=r"has no vocabulary.json, so that no text can be given to it; copy it there"):
        sampled(model(Editor(), tmp_path), tmp_path / "new", 1, ["abcdefgh"])


def test_what_would_steer_a_terminal_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw_bytes().save(tmp_path)
    sampled(model(Unigram(vocab=256, length=40), tmp_path), tmp_path / "out", 4)
    shown = capsys.readouterr().out
    assert all(c.isprintable() or c in "\n\t" for c in shown)
    assert "\ufffd" in shown


# --- rewriting ------------------------------------------------------------------------------------


def test_texts_are_rewritten_in_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    made = model(Editor(), tmp_path, Windows())
    with caplog.at_level(logging.INFO, "zoo"):
        given, starts = text.rewritten(made, text8(), ["abcdefgh", "Hi there, you"], 3)
    assert given is not None
    assert starts == ["abcdefgh", "hi there", "abcdefgh"]
    assert given["tokens"].tolist()[0] == list(range(1, 9)) == given["tokens"].tolist()[2]
    assert "text 2 of prompts= is read as hi there you" in caplog.text
    assert "text 2 of prompts= has 12 tokens; the first 8 are rewritten" in caplog.text
    assert text.rewritten(made, text8(), None, 3) == (None, None)
    sampled(made, tmp_path / "out", 2, ["abcdefgh"])
    assert lines(tmp_path / "out", "000001.txt") == " acaeaga\n"
    assert "--- 000000.txt, made from: abcdefgh\n acaeaga\n" in capsys.readouterr().out


def test_texts_that_cannot_be_rewritten_are_sentences(tmp_path: Path) -> None:
    made = model(Editor(), tmp_path)
    with pytest.raises(UserError, match=r"prompt= has 3 tokens, and this model rewrites texts of 8; give 5 more"):
        text.rewritten(made, text8(), ["abc"], 1)
    with pytest.raises(UserError, match=r"prompt= has .*none of the 3 symbols"):
        text.rewritten(made, characters("abc"), ["abcabcxa"], 1)
    with pytest.raises(UserError, match="prompt=abc: Unigram draws texts and rewrites none; leave it out"):
        conditions.read(Unigram(), "abc", None)
    (tmp_path / "none.txt").write_text("\n\n")
    with pytest.raises(UserError, match=r"none.txt holds no text in 2 lines; give a text file, one text per line"):
        conditions.read(Editor(), None, str(tmp_path / "none.txt"))
    assert conditions.read(Editor(), "abc", None) == (["abc"], {"prompt": "abc"})
    with pytest.raises(UserError, match="aspect=16:9: all sequences of Editor have one shape"):
        conditions.shaped(Editor(), "16:9", {})


def test_holes_are_filled_in_and_what_is_given_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, out = model(Filler(), tmp_path, Windows()), tmp_path / "out"
    cases = {
        "the __ a": "the __ a",
        "a_": "a_______",  # what is missing behind is to be filled in too
        "_ _9": "_ _ nine",  # blanks beside a hole stay
        "The fox!": "the fox_",
        "_" * 8: "_" * 8,
    }
    for given, read in cases.items():
        found, starts = text.rewritten(made, text8(), [given], 1)
        assert found is not None
        assert starts == [read]
        assert [" abcdefghijklmnopqrstuvwxyz"[i] if i >= 0 else "_" for i in found["tokens"][0]] == list(read)
    sampled(made, out, 1, ["the __ a"])
    assert lines(out, "000000.txt") == "the aa a\n"
    assert json.loads(lines(out, "settings.json"))["network calls"] == 7
    assert "made from: the __ a" in capsys.readouterr().out


def test_holes_that_cannot_be_filled_in_are_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = model(Filler(), tmp_path, Windows())
    for vocabulary in (raw_bytes(), characters("ab_")):
        with pytest.raises(
            UserError, match=r"prompt= has _, which marks a token to fill in, and .* has it for a symbol"
        ):
            text.rewritten(made, vocabulary, ["a_b"], 1)
    with pytest.raises(UserError, match="prompt= has 10 tokens, and this model fills in texts of 8; take 2 out"):
        text.rewritten(made, text8(), ["abcd_fghij"], 1)
    with pytest.raises(UserError, match=r"prompt= has .*none of the 3 symbols"):
        text.rewritten(made, characters("abc"), ["a_x"], 1)
    monkeypatch.setattr(models, "open_model", lambda *args, **options: made)
    for fields, words in ((["prompt=the __ a"], "holes say which tokens are"), ([], "none is given; add prompt=TEXT")):
        assert cli.main(["sample", "RUN", *fields, "strength=0.3", "--out", str(tmp_path / "out")]) == 2
        assert words in capsys.readouterr().err


# --- vocabularies ---------------------------------------------------------------------------------


def test_the_vocabulary_of_the_folder_comes_before_that_of_the_data(tmp_path: Path) -> None:
    made = model(Unigram(), tmp_path, Windows())
    assert made.vocabulary == text8()
    characters("abc").save(tmp_path)
    assert made.vocabulary == characters("abc")


def test_an_export_has_the_vocabulary_of_its_model(tmp_path: Path) -> None:
    for name, data in (("saved", None), ("of_data", Windows())):
        folder = tmp_path / name
        made = model(Unigram(), folder, data)
        weights.save(folder, made.params, models.export_config(dataclasses.replace(made, data=None)), "a card")
        if data is None:
            characters("".join(map(chr, range(97, 124)))).save(folder)
        exports.export(made, tmp_path / "out", "zoo", 1)
        assert open_vocabulary(tmp_path / "out") == made.vocabulary
    assert json.loads((tmp_path / "out" / "vocabulary.json").read_text())["name"] == "text8"
    assert weights.load(tmp_path / "out")[1]["step"] == 5
