"""Weights & Biases, played by a module of this file: what goes there, and that nothing it does stops a run."""

from __future__ import annotations

import json
import logging
import sys
import threading
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from toy import TOYS

from zoo import cli
from zoo.data.synthetic import Synthetic
from zoo.errors import UserError
from zoo.run import Run, Samples
from zoo.train import tracking
from zoo.train.loop import train
from zoo.train.report import Report, read_metrics

SMOKE = "tarflow/digits:smoke"


class Service(types.ModuleType):
    """The module `wandb`. `away`: no run can be opened. `breaks`: logging fails."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.opened: list[dict[str, Any]] = []
        self.records: list[dict[str, Any]] = []
        self.ends: list[int] = []
        self.away = self.breaks = False
        self.hang: threading.Event | None = None

    def Settings(self, **fields: Any) -> dict[str, Any]:
        return fields

    def Image(self, image: Any) -> tuple[str, tuple[int, int]]:
        return "image", image.size

    def init(self, **about: Any) -> Any:
        if self.away:
            raise ConnectionError("nobody\nthere")
        self.opened.append(about)
        return types.SimpleNamespace(
            log=self.log, define_metric=lambda *_, **__: None, finish=self.finish, url="https://there/x"
        )

    def log(self, record: dict[str, Any]) -> None:
        if self.breaks:
            raise BrokenPipeError("gone")
        self.records.append(record)

    def finish(self, exit_code: int) -> None:
        if self.hang is not None:
            self.hang.wait(30)
        self.ends.append(exit_code)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    made = Service()
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


def report(folder: Path, **fields: Any) -> Report:
    made = Report(folder, total=4, start=0, batch=1, quiet=True, **fields)
    made.track("team/digits", {"steps": 4})
    return made


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "zoo" and r.levelno >= logging.WARNING]


def test_a_run_sends_all_its_records_and_sheets_and_goes_on_under_its_id(service: Service, tmp_path: Path) -> None:
    run = Run(
        TOYS["sample"](), Synthetic(), 4, 8, workdir=str(tmp_path / "run"), samples=Samples(every=2, n=4), log_every=2
    )
    train(run, quiet=True, wandb="team/digits")
    train(replace(run, steps=6), quiet=True, wandb="digits")
    first, second = service.opened
    assert (first["entity"], first["project"], first["resume"], first["name"]) == ("team", "digits", "allow", "run")
    assert (second["entity"], second["project"]) == (None, "digits")
    assert first["id"] == second["id"] == json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]
    assert first["config"]["task"]["class"] == "toy.Toy_sample"
    assert (first["config"]["steps"], second["config"]["steps"]) == (4, 6)
    assert first["dir"] == tmp_path / "run"
    kept = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [(r["step"], r["train/loss"]) for r in service.records if "train/loss" in r]
    assert losses == [(r["step"], r["loss"]) for r in kept if "loss" in r]
    sheets = [r for r in service.records if "samples" in r]
    assert [r["step"] for r in sheets] == [2, 4, 6]
    assert all(r["samples"][0] == "image" for r in sheets)
    assert service.ends == [0, 0]


def test_an_id_that_was_cut_short_is_made_anew(service: Service, tmp_path: Path) -> None:
    for cut in ("", '{"id": "ab', "{}", "[]", "null"):
        (tmp_path / "wandb.json").write_text(cut)
        with report(tmp_path):
            pass
    assert len({one["id"] for one in service.opened}) == 5


@pytest.mark.parametrize("fault", ["away", "breaks"])
def test_a_service_that_fails_is_one_warning_and_the_run_goes_on(
    service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    setattr(service, fault, True)
    with caplog.at_level(logging.WARNING, "zoo"), report(tmp_path) as made:
        for step in (1, 2, 3):
            made.log(step, {"loss": 1.0})
            made.picture("samples", Image.new("RGB", (8, 8)), step=step)
    (words,) = said(caplog)
    assert "gets no more of this session; the run goes on" in words
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert service.ends == ([] if fault == "away" else [0])


def test_a_service_that_never_ends_is_left_behind(
    service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_FINISH", 0.2)
    service.hang = threading.Event()
    with caplog.at_level(logging.WARNING, "zoo"), report(tmp_path):
        pass
    (words,) = said(caplog)
    assert "has not taken the last records" in words
    service.hang.set()


def test_without_the_package_the_sentence_names_the_extra_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert cli.main(["train", SMOKE, f"workdir={tmp_path}/run", "--wandb", "digits"]) == 2
    assert "pip install -e '.[wandb]'" in capsys.readouterr().err
    assert cli.main(["train", SMOKE, f"workdir={tmp_path}/run", "--wandb", ""]) == 2
    assert "needs the name of a project" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_id_that_cannot_be_kept_is_a_sentence(service: Service, tmp_path: Path) -> None:
    (tmp_path / "wandb.json").mkdir()
    made = Report(tmp_path, total=4, start=0, batch=1, quiet=True)
    with pytest.raises(UserError, match=r"cannot write .*wandb\.json"):
        made.track("digits", {})
    made.close()
