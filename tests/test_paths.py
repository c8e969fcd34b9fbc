"""Run folders in a bucket, without a network: a file system in memory stands for it, and the refusals are played."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from mistakes import told
from PIL import Image

from zoo import cli, config, models, paths, weights
from zoo.commands import sample
from zoo.data.synthetic import Synthetic
from zoo.errors import UserError
from zoo.papers.tarflow import TarFlow
from zoo.run import Run
from zoo.train.checkpoint import Checkpoints
from zoo.train.folder import claim_folder
from zoo.train.report import Report, read_metrics

TASK = TarFlow(image=4, channels=1, patch=2, width=8, depth=1, blocks=2, head_dim=8)
ASK = paths._ask
HOME = "gs://bucket/runs/one"


class Bucket(MemoryFileSystem):
    """A bucket: no folders but those that files imply. `away` makes everything that touches it fail."""

    protocol = ("gs", "gcs")
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    away = False
    log: list[str] = []

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return MemoryFileSystem._strip_protocol(str(path).replace("gs://", "memory://"))

    def mkdir(self, *_: Any, **__: Any) -> None:
        raise AssertionError("a bucket has no folders to make")

    makedirs = mkdir

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if Bucket.away:
            raise OSError("Forbidden: b/bucket/o\nno access")
        Bucket.log.append(f"{mode} {path}")
        return super()._open(path, mode, **kwargs)

    def rm_file(self, path: str) -> None:
        Bucket.log.append(f"rm {path}")
        self.store.pop(self._strip_protocol(path))

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        Bucket.log.append(f"cp {path1}")
        self.pipe_file(path2, self.cat_file(path1))


@pytest.fixture(autouse=True)
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    known = sys.modules["fsspec.registry"]._registry
    for name in ("gs", "gcs"):
        monkeypatch.setitem(known, name, Bucket)
    forget = type(backend.fsspec_backend)._get_filesystem.cache_clear
    forget()
    Bucket.clear_instance_cache()
    Bucket.store.clear()
    Bucket.log.clear()
    Bucket.pseudo_dirs[:] = [""]
    Bucket.away = False
    monkeypatch.setattr(paths, "_ask", lambda name: None)
    monkeypatch.setattr(paths, "_settle", lambda: None)
    yield
    forget()


def put(name: str, data: bytes = b"x") -> None:
    Bucket().pipe_file(name, data)


def there() -> dict[str, bytes]:
    """Every file of the run folder."""
    root = paths.parse_path(HOME)
    files = Bucket()
    return {f.removeprefix("/bucket/runs/one/"): files.cat_file(f) for f in files.find(str(root))}


def scratches() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("zoo-*"))


# -------------------------------------------------------------------------------------------------------------- names


def test_a_name_means_a_folder_here_or_in_a_bucket_and_other_places_are_refused(tmp_path: Path) -> None:
    assert type(paths.parse_path("runs/x")) is type(Path("runs/x"))
    assert paths.parse_path(tmp_path) == tmp_path
    remote = paths.parse_path(f"{HOME}/")
    assert paths.in_bucket(remote)
    assert str(remote / "a") == f"{HOME}/a"
    assert paths.parse_path(remote) == remote
    assert not paths.in_bucket(paths.parse_path("gs/bucket"))
    for name, words in (
        ("s3://bucket/run", "workdir=s3://bucket/run: s3:// is no place for a run; give a local folder or gs://"),
        ("gs://bucket/", "names no folder in a bucket; write gs://BUCKET/FOLDER"),
        ("gs:///x", "names no folder"),
    ):
        with told(words):
            paths.require_bucket(name, "workdir=")


# ----------------------------------------------------------------------------------------------------------- refusals


class DefaultCredentialsError(Exception):
    pass


class Refused(Exception):
    def __init__(self, code: int, words: str) -> None:
        super().__init__(words)
        self.code = code


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets are asked as they are outside of these tests, with the packages there."""
    monkeypatch.setattr(paths, "_ask", ASK)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


def test_a_bucket_that_cannot_be_used_is_a_sentence(asked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, words in (
        (DefaultCredentialsError("were not found. To set up, see"), ("(were not found)", "gcloud auth application-default login")),
        (Refused(401, "Anonymous"), ("no valid Google Cloud credentials", "gcloud auth application-default login")),
        (Refused(403, "no storage.buckets.get"), ("no storage.buckets.get", "Storage Object User and Storage Legacy Bucket Reader")),
        (Refused(404, "GET"), ("there is no bucket b1", "gcloud storage buckets create gs://b1")),
        (TimeoutError("read timeout=15"), ("cannot be reached (TimeoutError: read timeout=15)", "network")),
        (OSError("Project was not passed and could not be determined"), ("GOOGLE_CLOUD_PROJECT=",)),
    ):  # fmt: skip

        def refuse(name: str, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(paths, "_get_bucket", refuse)
        with told("workdir=gs://b1/run: ", *words):
            paths.require_bucket("gs://b1/run", "workdir=")


def test_a_bucket_is_asked_once_and_waited_for_in_bounds(asked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    names, done = list[str](), threading.Event()
    monkeypatch.setattr(paths, "_get_bucket", names.append)
    for name in ("gs://b4/one", "gs://b4/two", "gs://b5/one"):
        paths.require_bucket(name)
    assert names == ["b4", "b5"]
    monkeypatch.setattr(paths, "_get_bucket", lambda name: done.wait(30))
    monkeypatch.setattr(paths, "_ANSWER", 0.2)
    with told("has not answered for 0.2 seconds"):
        paths.require_bucket("gs://b2/run")
    done.set()


def test_without_the_extra_the_sentence_names_it_and_nothing_is_asked(asked, monkeypatch, capsys) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gcsfs" else name)
    monkeypatch.setattr(paths, "_get_bucket", lambda name: pytest.fail("asked"))
    assert cli.main(["train", "tarflow/digits:smoke", "workdir=gs://b3/run"]) == 2
    said = capsys.readouterr().err
    assert "workdir=gs://b3/run: gs:// folders need the package gcsfs; install it with the `gcs` extra" in said
    assert "parameters" not in said


# ------------------------------------------------------------------------------------------------------------- reports


def test_a_report_in_a_bucket_is_whole_at_its_end_and_goes_on_there() -> None:
    before = scratches()
    with Report(HOME, total=4, start=0, batch=1, quiet=True) as report:
        report.log(1, {"loss": 3.0})
        report.picture("samples", Image.new("RGB", (8, 8)), step=1)
        report.log(2, {"loss": 2.0})
        report.log(3, {"loss": 9.0})
        assert "samples/samples-0000001.png" not in there()
        report.push(wait=10)
        assert there()["metrics.jsonl"].count(b"\n") == 3
        Bucket.log.clear()
        report.curve()
        report.push(wait=10)  # what has changed and nothing else
        assert not [line for line in Bucket.log if line.startswith("wb") and "samples" in line]
    files = there()
    assert {name.partition("/")[0] for name in files} == {"metrics.jsonl", "tensorboard", "samples", "curve.png"}
    assert [r["loss"] for r in read_metrics(f"{HOME}/metrics.jsonl")] == [3.0, 2.0, 9.0]
    assert scratches() == before
    with Report(HOME, total=4, start=2, batch=1, quiet=True) as report:
        report.log(3, {"loss": 1.5})
    after = there()
    assert [r["loss"] for r in read_metrics(f"{HOME}/metrics.jsonl")] == [3.0, 2.0, 1.5]
    assert len([name for name in after if name.startswith("tensorboard/")]) == 2
    assert after["samples/samples-0000001.png"] == files["samples/samples-0000001.png"]


def test_metrics_alone_are_sent_every_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(paths, "time", clock)
    with Report(HOME, total=9, start=0, batch=1, quiet=True) as report:
        report.push(wait=10)  # the clock of the first upload is set
        clock.now = 29.0
        report.log(1, {"loss": 3.0})
        time.sleep(0.2)
        assert there()["metrics.jsonl"] == b""
        clock.now = 31.0
        report.log(2, {"loss": 3.0})
        for _ in range(100):
            time.sleep(0.05 * (there()["metrics.jsonl"].count(b"\n") < 2))
        assert there()["metrics.jsonl"].count(b"\n") == 2


def test_event_files_in_a_bucket_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.train.report._EVENTS", 2000)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    with Report(HOME, total=9, start=0, batch=1, quiet=True) as report:
        for step in range(1, 4):
            report.picture("samples", noise, step=step)
    events = [data for name, data in sorted(there().items()) if name.startswith("tensorboard/")]
    assert len(events) == 4
    assert b"".join(events).count(b"samples") >= 3


def test_an_upload_that_fails_is_told_once_and_made_up_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "zoo"), Report(HOME, total=9, start=0, batch=1, quiet=True) as report:
        Bucket.away = True
        for step in (1, 2, 3):
            report.log(step, {"loss": 1.0})
            report.push(wait=10)
        Bucket.away = False
    (words,) = [r.getMessage() for r in caplog.records if r.name == "zoo"]
    assert f"could not be sent to {HOME} (OSError: Forbidden" in words
    assert "training goes on" in words
    assert [r["step"] for r in read_metrics(f"{HOME}/metrics.jsonl")] == [1, 2, 3]


def test_what_cannot_be_sent_to_the_end_stays_here_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    before = scratches()

    def log_while_away(failure: Exception | None) -> None:
        Bucket.away = False
        with Report(HOME, total=9, start=0, batch=1, quiet=True) as report:
            Bucket.away = True
            report.log(1, {"loss": 1.0})
            if failure:
                raise failure

    with pytest.raises(UserError, match=r"not all files of the run could be sent .* nothing is lost") as error:
        log_while_away(None)
    (kept,) = scratches() - before
    assert f"gcloud storage cp -r '{kept}/*' {HOME}/" in str(error.value)
    assert [r["step"] for r in read_metrics(kept / "metrics.jsonl")] == [1]
    with caplog.at_level(logging.WARNING, "zoo"), pytest.raises(KeyError):  # another failure is the one to see
        log_while_away(KeyError())
    assert any("nothing is lost" in r.getMessage() for r in caplog.records)
    for left in scratches() - before:
        shutil.rmtree(left)


def test_records_that_cannot_be_fetched_stop_a_run_before_they_are_overwritten() -> None:
    put(f"{HOME}/metrics.jsonl", b'{"step": 1, "loss": 2.0}\n')
    before = scratches()
    Bucket.away = True
    with pytest.raises(UserError, match=r"cannot read gs://bucket/runs/one/metrics.jsonl \(OSError: Forbidden"):
        Report(HOME, total=4, start=1, batch=1)
    Bucket.away = False
    assert there() == {"metrics.jsonl": b'{"step": 1, "loss": 2.0}\n'}
    assert scratches() == before


# ------------------------------------------------------------------------------------------------------------- folders


def test_a_folder_in_a_bucket_is_claimed_by_its_run_alone() -> None:
    def claim(place: str = HOME, batch: int = 8) -> dict[str, Any]:
        run = Run(task=TASK, data=Synthetic(), steps=4, batch=batch, workdir=place)
        return claim_folder(run, ("a",), ExitStack())()

    for _ in range(2):
        assert claim()["labels"] == ["a"]
    assert json.loads(there()["config.json"])["labels"] == ["a"]
    assert models.read_config(paths.parse_path(HOME))["run"]["batch"] == 8
    with told(f"workdir={HOME} belongs to a run with another config: batch: 8 -> 16"):
        claim(batch=16)
    put("gs://bucket/thesis/thesis.tex")
    with told("not empty and is no run (thesis.tex"):
        claim("gs://bucket/thesis")
    Bucket.away = True
    with told("cannot read gs://bucket/new (OSError: Forbidden", "Storage Object User"):
        claim("gs://bucket/new")


def test_only_finished_checkpoints_of_a_bucket_count() -> None:
    checkpoints = Checkpoints(paths.parse_path(HOME), create=False)
    assert checkpoints.steps() == []
    for step in (3, 6, 9):
        put(f"{HOME}/checkpoints/{step}/state/d/0")
    for step in (3, 6):
        put(f"{HOME}/checkpoints/{step}/commit_success.txt")
    put(f"{HOME}/checkpoints/12.broken/commit_success.txt")
    assert checkpoints.steps() == [3, 6]


def test_a_checkpoint_is_moved_aside_by_copying_all_before_anything_goes() -> None:
    for name in ("state/d/0", "state/d/1", "commit_success.txt", "config/metadata"):
        put(f"{HOME}/checkpoints/6/{name}", name.encode())
    root = paths.parse_path(HOME) / "checkpoints"
    Bucket.log.clear()
    paths.move(root / "6", root / "6.broken", last="commit_success.txt")
    changes = [line for line in Bucket.log if line[:2] in ("cp", "rm")]
    assert [line[:2] for line in changes] == ["cp"] * 4 + ["rm"] * 4
    assert changes[4] == "rm /bucket/runs/one/checkpoints/6/commit_success.txt"
    assert {k: v.decode() for k, v in there().items()} == {
        f"checkpoints/6.broken/{name}": name
        for name in ("state/d/0", "state/d/1", "commit_success.txt", "config/metadata")
    }


def test_an_export_in_a_bucket_is_opened_and_sampled_there(tmp_path: Path) -> None:
    params = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), weights.abstract(TASK))
    about = {"format": 1, "task": config.dump(TASK), "data": None, "labels": []}
    weights.save(tmp_path / "export", params, about, "")
    for file in (tmp_path / "export").iterdir():
        put(f"{HOME}/{file.name}", file.read_bytes())
    model = models.open_model(HOME)
    assert str(model.folder) == HOME
    out = paths.parse_path("gs://bucket/drawn")
    kept: dict[str, bytes] = {}

    def draw(n: int, seed: int = 0) -> None:
        options = TASK.Sampling()
        sample.draw(model, out, n=n, seed=seed, conditions=None, captions=None, asked={}, batch=2, options=options)

    for n in (2, 3):
        draw(n)
        images = {p: out.joinpath(p).read_bytes() for p in paths.names(out)}
        assert set(images) == {*(f"{i:06d}.png" for i in range(n)), "settings.json", "sheet.png"}
        assert all(images[name] == data for name, data in kept.items() if name != "sheet.png")
        kept = images
    with (out / "000002.png").open("rb") as file, Image.open(file) as image:
        assert image.size == (4, 4)
    with told("drawn with other settings"):
        draw(2, seed=1)
    put("gs://bucket/drawn/settings.json", b"{")
    with told("settings.json cannot be read"):
        draw(2)


def test_exports_are_not_written_to_a_bucket(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "tarflow-digits", "gs://bucket/out"]) == 2
    assert "gs://bucket/out: exports are written here" in capsys.readouterr().err
