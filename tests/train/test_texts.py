"""Runs of language models: samples are texts, rates are of sequences, and the vocabulary is kept with the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import figures
import jax.numpy as jnp
import numpy as np
import pytest
from mistakes import told
from unigram import Unigram, Windows

from zoo.data.text.vocabulary import characters, open_vocabulary, text8
from zoo.errors import UserError
from zoo.metrics.text import Generation, LatentPasses, TextBound
from zoo.run import Run, Samples
from zoo.train import watch
from zoo.train.loop import train
from zoo.train.optim import AdamW
from zoo.train.provenance import check_vocabularies
from zoo.train.report import Report, read_metrics, spelled

RUN = Run(
    task=Unigram(),
    data=Windows(),
    steps=3,
    batch=8,
    optim=AdamW(lr=0.5),
    samples=Samples(n=3),
    evals=(TextBound(batch=8),),
    log_every=1,
)


def test_a_run_of_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(RUN, workdir=str(tmp_path / "run"))
    state, history = train(run)
    out = capsys.readouterr().out
    assert open_vocabulary(tmp_path / "run") == text8()
    (file,) = (tmp_path / "run" / "samples").iterdir()
    assert file.name == "samples-0000003.txt"
    written = file.read_text().split("\n")
    assert written[0::2] == ["--- 0", "--- 1", "--- 2", ""]
    assert [len(line) for line in written[1::2]] == [8, 8, 8]
    for i in range(2):
        assert f"step 3, sample {i}: {written[2 * i + 1]}\n" in out
    assert "sample 2" not in out
    assert " sequences/s" in out
    (found,) = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" not in r]
    assert found["bits_per_token"] == pytest.approx(found["bits_per_char"])
    assert found["bits_per_token"] < history[0]["bits"] + 0.5
    assert found["weights"] == "raw"
    assert np.abs(state.params["logits"]).max() > 0

    # A text that has changed its symbols would change what the tokens mean.
    monkeypatch.setattr(Windows, "vocabulary", lambda self: characters("".join(map(chr, range(97, 124)))))
    with pytest.raises(UserError, match=r"run of other tokens \(27 symbols \(text8\); the data now have 27 symbols"):
        train(run)
    assert open_vocabulary(tmp_path / "run") == text8()


def test_metrics_of_one_kind_have_a_record_and_a_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    lines: list[str] = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: (lines.append(str(k.get("label"))), plot(self, *a, **k))[1])
    bounds = (TextBound(split="train", batch=8, every=2), TextBound(batch=8))
    run = replace(RUN, workdir=str(tmp_path / "run"), evals=bounds, samples=Samples(n=0), steps=4)
    train(run)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    held = [r for r in records if "loss" not in r]
    assert [(r["step"], r["split"]) for r in held] == [(2, "train"), (4, "train"), (4, "test")]
    assert not any("eval" in r for r in held)
    assert held[1]["bits_per_token"] != held[2]["bits_per_token"]
    told = [line for line in capsys.readouterr().out.splitlines() if line.endswith("(weights of the last step)")]
    assert [f"split {split}" in line for line, split in zip(told, ("train", "test"), strict=True)] == [True, True]
    assert lines[-2:] == [f"held-out bits, {r['split']} (last: {r['bits_per_token']:.3f})" for r in held[:0:-1]]
    events = b"".join(path.read_bytes() for path in (tmp_path / "run" / "tensorboard").iterdir())
    assert b"eval/train/bits_per_token" in events
    assert b"eval/test/bits_per_token" in events
    # README's figures are those of the test split
    found = figures.of_run(tmp_path / "run")
    assert (found["bits_per_token"], found["split"], found["steps"]) == (held[2]["bits_per_token"], "test", 4)


def test_names_of_metrics() -> None:
    plain, valid, other = TextBound(), TextBound(split="valid"), Generation()
    assert watch.told_apart((plain, other)) == ["", ""]
    assert watch.told_apart((valid, plain, other)) == ["valid", "test", ""]
    assert watch.told_apart((plain, valid, TextBound(draws=4))) == ["evals.0", "valid", "evals.2"]


def test_what_does_not_fit_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    for change, words in (
        ({"task": Unigram(vocab=30)}, "the data has 27 symbols, task.vocab=30; set task.vocab=27"),
        ({"evals": (LatentPasses(),)}, "evals: the metric passes gives a list of layers; take it out"),
        ({"samples": Samples(n=1, options={"passes": True})}, "no option 'passes'"),
    ):
        with told(words):
            train(replace(RUN, workdir=str(tmp_path / "run"), **change))
    assert not (tmp_path / "run").exists()


def test_texts_are_in_the_events_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Report(tmp_path, total=9, start=0, batch=1, unit="sequences") as r:
        r.texts("samples", ["a *b*\nc", "d\x1b[31m", "e"], step=4)
    assert (tmp_path / "samples" / "samples-0000004.txt").read_text() == "--- 0\na *b*\nc\n--- 1\nd\x1b[31m\n--- 2\ne\n"
    shown = capsys.readouterr().out
    assert shown == "step 4, sample 0: a *b*\nc\nstep 4, sample 1: d\ufffd[31m\n"
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"    a *b*\n    c\n" in events.read_bytes()
    with Report(tmp_path / "other", total=9, start=0, batch=1, main=False) as r:  # another host
        r.texts("samples", ["a"], step=4)
        r.log(4, {"loss": 1.0})
        r.curve()
    assert not (tmp_path / "other").exists()


def test_tokens_without_a_vocabulary_are_numbers() -> None:
    assert spelled(np.array([3, 1]), None) == "3 1"
    assert spelled(np.array(jnp.array([3, 1])), text8()) == "ca"
    assert spelled(np.array([3, -1, 2]), None) == "3 \ufffd 2"  # it overflowed


def test_a_network_of_other_symbols_is_refused(tmp_path: Path) -> None:
    run = Run(task=Unigram(), data=Windows(), weights={"logits": f"{tmp_path}:logits"}, steps=1, batch=4)
    check_vocabularies(run)  # nobody knows its symbols
    text8().save(tmp_path)
    check_vocabularies(run)
    characters("".join(map(chr, range(97, 124)))).save(tmp_path)
    with pytest.raises(UserError, match=r"weights\.logits=.* other tokens \(27 symbols \(chars\)\) than the data"):
        check_vocabularies(run)
