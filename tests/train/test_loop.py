"""Runs: they go on where they stopped, refuse what would mix two runs, and stop when nothing is learned any more."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import logging
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mistakes import told
from processes import contents
from processes import leaves as plain

from zoo import config, dist, models, weights
from zoo.data import synthetic
from zoo.data.pipeline import Data, Source
from zoo.data.synthetic import Synthetic
from zoo.draws import Use, key_of
from zoo.errors import Retryable, UserError
from zoo.metrics.likelihood import BayesAccuracy
from zoo.papers.tarflow import TarFlow
from zoo.run import Checkpoint, Run, Samples
from zoo.task import About, Batch, Metric, Network, Params
from zoo.train import loop
from zoo.train.loop import Diverged, train
from zoo.train.optim import AdamW
from zoo.train.report import Report, read_metrics
from zoo.train.step import State


@dataclass(frozen=True)
class Plain:
    """A sampler without options."""


@dataclass(frozen=True)
class Wide:
    """Two dense layers under `net`, shaped as the input of a small TarFlow, and noise from the step's key."""

    scan: bool = True  # may differ between a run and its resumption
    height: int = 8

    Sampling = Plain
    about = About(networks={"teacher": Network(required=False)})

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {"x": jax.ShapeDtypeStruct((batch, 4), jnp.float32)}

    def init(self, rng: jax.Array) -> Params:
        one, two = jax.random.split(rng)
        return {
            "net": {
                "in": {"kernel": jax.random.normal(one, (4, self.height)), "bias": jnp.zeros(self.height)},
                "last": {"kernel": jax.random.normal(two, (self.height, 1))},
            },
            "teacher": {"bias": jnp.zeros(3)},
        }

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        net = params["net"]
        x = batch["x"] + 0.1 * jax.random.normal(rng, batch["x"].shape)
        hidden = jnp.tanh(x @ net["in"]["kernel"] + net["in"]["bias"])
        return jnp.square(hidden @ net["last"]["kernel"] - x[:, :1]).mean(), {"bits": jnp.float32(1.5)}

    def sample(self, params: Params, rng: jax.Array, n: int, conditions: Any = None, options: Any = None) -> Any:
        return {"image": jnp.tanh(jax.random.normal(rng, (n, 4, 4, 1)) + params["net"]["in"]["bias"].sum())}


@dataclass(frozen=True)
class AllHeld(Wide):
    """The same with nothing that learns."""

    about = About(networks={"teacher": Network(required=False), "net": Network(required=False)})


@dataclass(frozen=True)
class Bad(Data):
    """Examples that are NaN from the first of batch `since` on (0-based), for `lasting` batches of `batch` examples."""

    since: int
    lasting: int = 10**6
    batch: int = 8
    numbers: int = 4  # of an example

    def source(self, split: str, spec: Any = None) -> Any:
        return _BadSource(self)


@dataclass
class _BadSource(Source):
    data: Bad

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"x": np.full(self.data.numbers, index / 64, np.float32)}

    def augment(self, example: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        # the stream of (seed, position) tells positions apart, which an index in a shuffled epoch does not
        bad = range(self.data.since, min(self.data.since + self.data.lasting, 60))
        first = [np.random.default_rng((0, k * self.data.batch, 1)).random() for k in bad]
        return {"x": np.full(4, np.nan, np.float32)} if rng.random() in first else example


@dataclass(frozen=True)
class Held(Metric):
    """A metric that counts what it is shown; `kill` sends a signal to this process at that step's look, and `full` fails."""

    every: int = 0
    kill: bool = False
    by: int = signal.SIGTERM
    full: bool = False
    name = "held"

    def __call__(self, task: Any, params: Params, data: Any, rng: jax.Array) -> dict[str, Any]:
        if self.kill:
            os.kill(os.getpid(), self.by)
        if self.full:
            raise UserError("no room for the statistics")
        drawn = float(jax.random.uniform(rng))
        return {"bpd": float(np.abs(params["net"]["in"]["kernel"]).sum()), "bpd_examples": 3, "drawn": drawn}


RUN = Run(
    task=Wide(),
    data=Synthetic(examples=64),
    steps=6,
    batch=8,
    optim=AdamW(lr=0.1, schedule="constant", clip=1.0),
    ema=0.9,
    mesh=dist.Mesh(data=1, fsdp=1, tensor=1),
    checkpoint=Checkpoint(every=3),
    log_every=1,
)


@pytest.fixture(scope="module", autouse=True)
def _one_device() -> Iterator[None]:
    """These are tests of the loop: one device compiles fastest, and runs of equal tasks share a step.

    So a task whose class is patched, or a run of other axis rules, must not be trained here.
    """
    with pytest.MonkeyPatch.context() as patch:
        one = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *_: one)
        patch.setattr(loop.optim, "build", functools.cache(loop.optim.build))
        patch.setattr(loop, "compile_step", functools.cache(loop.compile_step))
        yield


def go(folder: Path | None, **fields: Any) -> State:
    run = dataclasses.replace(RUN, workdir=str(folder) if folder else None, **fields)
    return train(run, quiet=True)[0]


def steps_of(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def records_of(folder: Path, key: str) -> list[dict[str, Any]]:
    """The records that have a key: `loss` those of training, `bpd` those of looks."""
    return [r for r in read_metrics(folder / "metrics.jsonl") if key in r]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "zoo"]


Finished = tuple[Path, dict[str, np.ndarray]]
Export = tuple[Path, Params]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run of six steps with everything on, and its state."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, plain(go(folder, evals=(Held(every=3),)))


def test_a_run_leaves_what_it_promises(finished: Finished) -> None:
    folder, state = finished
    assert state["step"] == 6
    names = {"config.json", "metrics.jsonl", "curve.png", "tensorboard", "checkpoints"}
    assert {p.name for p in folder.iterdir()} == names
    assert steps_of(folder) == ["3", "6"]
    about = json.loads((folder / "config.json").read_text())["run"]
    assert (about["batch"], about["task"]["class"].rpartition(".")[2]) == (8, "Wide")
    training, held = records_of(folder, "loss"), records_of(folder, "bpd")
    assert [r["step"] for r in training] == [1, 2, 3, 4, 5, 6]  # each once
    assert [r["step"] for r in held] == [3, 6]
    assert all(set(r) >= {"loss", "bits", "grad_norm", "skipped"} and "bpd" not in r for r in training)
    assert all(set(r) == {"step", "time", "bpd", "bpd_examples", "drawn", "weights"} for r in held)
    assert {r["drawn"] for r in held} == {float(jax.random.uniform(key_of(RUN.seed, Use.LOOKS)))}
    assert {r["weights"] for r in held} == {"ema"}


def test_three_steps_and_three_more_equal_six(
    finished: Finished, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, straight = finished
    half = plain(go(tmp_path / "run", steps=3))
    assert (half["params/net/in/kernel"] != straight["params/net/in/kernel"]).all()
    caplog.clear()
    with caplog.at_level(logging.INFO, "zoo"):
        whole = plain(go(tmp_path / "run", steps=6))
    chex.assert_trees_all_equal(whole, straight)
    assert {k.split("/")[0] for k in straight} >= {"params", "ema", "opt", "rng", "skipped", "streak"}
    words = said(caplog)
    assert any("made for 3 steps and now has 6: schedules that end with the run stretch" in w for w in words)
    assert any("step 3 of" in w for w in words)
    assert not any("fresh" in w for w in words)
    assert [r["step"] for r in records_of(tmp_path / "run", "loss")] == [1, 2, 3, 4, 5, 6]


def test_without_a_folder_nothing_is_written(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chex.assert_trees_all_equal(plain(go(None)), finished[1])
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_says_so_and_changes_nothing(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    folder, state = finished
    before = {k: v for k, v in contents(folder).items() if not k.startswith("tensorboard")}
    again, history = train(dataclasses.replace(RUN, workdir=str(folder), evals=(Held(every=3),)), quiet=False)
    assert history == []
    chex.assert_trees_all_equal(plain(again), state)
    assert {k: v for k, v in contents(folder).items() if not k.startswith("tensorboard")} == before
    assert "finished: step 6 of 6" in capsys.readouterr().out


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_end(
    by: int, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = dataclasses.replace(RUN, workdir=str(tmp_path / "run"), evals=(Held(every=2, kill=True, by=by),))
    before = signal.getsignal(by)
    with pytest.raises(KeyboardInterrupt) if by == signal.SIGINT else contextlib.nullcontext():
        assert int(train(run)[0].step) == 3
    assert steps_of(tmp_path / "run") == ["3"]
    assert "asked to stop: step 3 is saved" in capsys.readouterr().out
    assert signal.getsignal(by) is before
    chex.assert_trees_all_equal(plain(go(tmp_path / "run")), finished[1])


def test_a_second_ctrl_c_stops_at_once_but_for_a_save() -> None:
    stop = loop.Stop()
    stop.interrupt()
    stop.interrupt()  # a shell and a launcher both pass it on
    assert (stop.asked, stop.again) == (True, False)
    stop.since, stop.saving = -2.0, True
    stop.interrupt()  # a save that has begun is finished
    assert stop.again
    stop.since, stop.saving = -2.0, False
    with pytest.raises(KeyboardInterrupt):
        stop.interrupt()


def test_an_error_of_the_input_costs_no_step(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, bad = tmp_path / "run", int(np.random.default_rng((0, 0)).permutation(64)[36])  # of the fifth step
    get = synthetic._Noise.__getitem__

    def fail(self: Any, index: int) -> Any:
        if index == bad:
            raise OSError(5, "Input/output error")
        return get(self, index)

    with monkeypatch.context() as within:
        within.setattr(synthetic._Noise, "__getitem__", fail)
        with pytest.raises(Retryable, match=r"output error.*Step [234] is saved"):
            go(folder, checkpoint=Checkpoint(every=100))
        saved = steps_of(folder)
        assert len(saved) == 1
        with pytest.raises(UserError) as again:  # nothing was trained: it is to be mended first
            go(folder, checkpoint=Checkpoint(every=100))
        assert not isinstance(again.value, Retryable)
    assert steps_of(folder) == saved
    chex.assert_trees_all_equal(plain(go(folder)), finished[1])


def test_sigterm_loses_no_evaluation(tmp_path: Path) -> None:
    """A step that is saved is not run again: what is due at it is looked at now or never."""
    evals = (Held(every=2, kill=True), Held(every=3))
    for _ in range(8):  # every look asks the run to stop
        state = go(tmp_path / "run", evals=evals)
        if int(state.step) == 6:
            break
    assert [r["step"] for r in records_of(tmp_path / "run", "loss")] == [1, 2, 3, 4, 5, 6]
    looks = [(2, "evals.0"), (3, "evals.1"), (4, "evals.0"), (6, "evals.0"), (6, "evals.1")]
    assert [(r["step"], r["eval"]) for r in records_of(tmp_path / "run", "bpd")] == looks


def test_a_folder_of_another_run_is_refused(finished: Finished) -> None:
    folder, _ = finished
    before = contents(folder)
    other = {"seed": 1, "optim": AdamW(lr=0.2, schedule="constant", clip=1.0), "task": Wide(height=9)}
    for fields, named in (
        (other, ["seed: 0 -> 1", "optim.lr: 0.1 -> 0.2", "task.height: 8 -> 9"]),
        ({"data": Synthetic(examples=65)}, ["data.examples: 64 -> 65"]),
    ):
        with told("another config", *named) as error:
            go(folder, **fields)
        assert str(error.value).count(" -> ") == len(named)
    assert contents(folder) == before


def test_what_changes_no_number_may_differ(finished: Finished, tmp_path: Path) -> None:
    go(tmp_path / "run", steps=3)
    state = go(
        tmp_path / "run",
        task=Wide(scan=False),
        mesh=dist.Mesh(),
        rules={"mlp": None},
        evals=(Held(),),
        checkpoint=Checkpoint(every=2, keep=3),
        samples=dataclasses.replace(RUN.samples, n=4, every=4),
        log_every=2,
    )
    chex.assert_trees_all_equal(plain(state), finished[1])
    assert steps_of(tmp_path / "run") == ["3", "4", "6"]
    sheets = {p.name for p in (tmp_path / "run" / "samples").iterdir()}
    assert sheets == {"samples-0000004.png", "samples-0000006.png"}
    assert [r["step"] for r in records_of(tmp_path / "run", "loss")] == [1, 2, 3, 4, 6]


def test_a_run_of_before_a_field_came_goes_on_and_what_has_nothing_to_train_leaves_no_folder(tmp_path: Path) -> None:
    go(tmp_path / "run", steps=3)
    path = tmp_path / "run" / "config.json"
    about = json.loads(path.read_text())
    del about["run"]["optim"]["hold"], about["run"]["task"]["height"]
    path.write_text(json.dumps(about))
    assert int(go(tmp_path / "run").step) == 6
    about["run"]["optim"]["lr"] = 0.3
    path.write_text(json.dumps(about))
    with told("another config", "optim.lr: 0.3 -> 0.1"):
        go(tmp_path / "run")
    with told("AllHeld", "nothing to train"):
        go(tmp_path / "none", task=AllHeld())
    assert not (tmp_path / "none").exists()


def test_a_folder_of_something_else_is_refused_and_stays(tmp_path: Path) -> None:
    for name, text, where in (
        ("thesis.tex", "words", ""),
        ("file", "mine", "file/run"),
        ("config.json", json.dumps({"task": {"class": "zoo.papers.tarflow.TarFlow"}}), ""),
        ("config.json", "{", ""),
        ("config.json", '{"a": 1}', ""),
    ):
        (tmp_path / name).write_text(text)
        with told(str(tmp_path), where or name if "class" not in text else "export"):
            go(tmp_path / where)
        assert contents(tmp_path) == {name: text.encode()}
        (tmp_path / name).unlink()


SMALL = TarFlow(image=4, channels=1, patch=2, width=8, depth=1, blocks=2, head_dim=8)
FLOW = dataclasses.replace(SMALL, blocks=1)


def test_what_cannot_be_run_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    for fields, words in (
        ({"data": Bad(0, numbers=3)}, "Bad 'x' float32[3]"),
        ({"accumulate": 3}, "batch=8 1 3"),
        ({"task": SMALL, "samples": Samples(n=4, options={"guidence": 2})}, "samples.options 'guidence' mean"),
        ({"task": SMALL, "evals": (BayesAccuracy(),)}, "unconditional"),
        ({"evals": (BayesAccuracy(),)}, "evals.0 bayes 'nll' Wide"),
    ):
        with told(*words.split()):
            go(tmp_path / "run", **fields)
    assert not (tmp_path / "run").exists()


def test_twenty_skipped_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(Diverged) as error:
        go(tmp_path / "run", data=Bad(since=4), steps=60, checkpoint=Checkpoint(every=7))
    assert "not been finite since step 5 (20 steps skipped in a row" in str(error.value)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, 24))
    assert [r["skipped"] for r in records[:6]] == [0, 0, 0, 0, 1, 2]
    assert steps_of(tmp_path / "run") == ["14", "21"]
    # fewer are lived through, and counted
    state = go(None, data=Bad(since=2, lasting=19), steps=24)
    assert (int(state.step), int(state.skipped), int(state.streak)) == (24, 19, 0)
    assert np.isfinite(plain(state)["params/net/in/kernel"]).all()


@dataclass(frozen=True)
class Taught(Wide):
    """Holds a block of a TarFlow."""

    def init(self, rng: jax.Array) -> Params:
        block = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), weights.abstract(FLOW)["block0"])
        return {**super().init(rng), "teacher": block}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """An export of a TarFlow whose first layer has the shapes of `Wide`."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), weights.abstract(FLOW))
    folder = tmp_path_factory.mktemp("export") / "model"
    weights.save(folder, params, {"format": 1, "task": config.dump(FLOW), "data": None, "labels": []}, "")
    return folder, params


def test_weights_of_another_model_fill_what_fits_and_are_reported(
    export: Export, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = export[1]["block0"]
    monkeypatch.setattr(models, "given_weights", lambda *_, **__: {"": {"net": block}})
    frozen = AdamW(lr=1e-30, final_lr=1e-30, weight_decay=0.0, schedule="constant")
    fields = {"weights": {"": "x"}, "optim": frozen, "steps": 1}
    with caplog.at_level(logging.INFO, "zoo"):
        state = go(tmp_path / "run", **fields)
    for tree in (state.params, state.ema):
        chex.assert_trees_all_equal(jax.device_get(tree["net"]["in"]), block["in"])
    monkeypatch.setattr(models, "given_weights", lambda *_, **__: {})
    fresh = go(None, **{**fields, "weights": None})
    chex.assert_trees_all_equal(state.params["net"]["last"], fresh.params["net"]["last"])
    words = said(caplog)
    assert "parameters: filled: net (2 tensors)" in words
    assert "parameters: left fresh: net (1 tensor), teacher (1 tensor)" in words
    assert any(w.startswith("parameters: not used: net (") for w in words)


def test_weights_are_read_at_the_start_only(export: Export, tmp_path: Path) -> None:
    gone = tmp_path / "moved"
    os.symlink(export[0], gone)
    fields = {"task": Taught(), "weights": {"teacher": f"{gone}:block0"}}
    go(tmp_path / "run", steps=3, **fields)
    gone.unlink()
    assert int(go(tmp_path / "run", steps=6, **fields).step) == 6


@dataclass(frozen=True)
class Pupil(Wide):
    """Learns nothing from a random teacher."""

    about = About(networks={"teacher": Network()})


def test_frozen_networks_that_would_stay_random_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: Params
    monkeypatch.setattr(models, "given_weights", lambda *_, **__: given)
    fields = {"task": Pupil(), "data": Bad(since=10**6), "steps": 1}
    for given in ({}, {"": {"net": Wide().init(jax.random.key(0))["net"]}}):  # noqa: B007
        with told("weights.teacher=OUT", "Pupil"):
            go(tmp_path / "run", **fields)
    assert not (tmp_path / "run").exists()
    go(None, task=Pupil(), steps=1)  # made-up data
    given = {"teacher": {"bias": jnp.ones(3)}}
    assert go(tmp_path / "run", **fields, weights={"teacher": "x"}).params["teacher"]["bias"].sum() == 3
    given = {}
    assert go(tmp_path / "run", **{**fields, "steps": 2}, weights={"teacher": "x"}).params["teacher"]["bias"].sum() == 3
    given = {"": {"net": {"last": {"kernel": np.ones((8, 1))}}}}  # a part
    monkeypatch.setattr(Pupil, "about", About(networks={"net": Network()}))
    with told("weights['']=x", "2 of the 3", "net/in/b"):
        go(None, task=Pupil(), data=Bad(since=10**6), weights={"": "x"})


def test_wrong_weights_leave_the_folder_to_the_right_ones(export: Export, tmp_path: Path) -> None:
    folder, params = export
    for part, reference, words in (
        ("teacher", "nowhere", "folder"),
        ("teacher", ":block9", "block9"),
        ("net", ":block0", "(1) net/last/kernel"),  # would be filled by half
    ):
        with told("weights", *words.split()):
            go(tmp_path / "run", task=Taught(), weights={part: f"{folder}{reference}"})
    state = go(tmp_path / "run", task=Taught(), weights={"teacher": f"{folder}:block0"}, steps=1)
    chex.assert_trees_all_equal(jax.device_get(state.params["teacher"]["in"]), params["block0"]["in"])


def test_an_evaluation_sees_the_average(finished: Finished) -> None:
    folder, state = finished
    sums = {k: float(np.abs(state[f"{k}/net/in/kernel"]).sum()) for k in ("ema", "params")}
    assert records_of(folder, "bpd")[-1]["bpd"] == pytest.approx(sums["ema"], rel=1e-6)
    assert sums["ema"] != pytest.approx(sums["params"], rel=1e-4)


def test_a_figure_that_fails_costs_no_step(tmp_path: Path) -> None:
    with told("no room"):
        go(tmp_path / "run", steps=2, evals=(Held(full=True),), checkpoint=Checkpoint(every=100))
    assert steps_of(tmp_path / "run") == ["2"]
    assert int(go(tmp_path / "run", steps=2, checkpoint=Checkpoint(every=100)).step) == 2


def test_a_folder_that_another_process_holds_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    go(folder, steps=1)
    before = contents(folder)
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with told(f"workdir={folder}", "another process"):
        go(folder, steps=1)
    assert contents(folder) == before
    os.close(handle)
    go(folder, steps=1)


def test_classes_that_the_data_has_not_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = dataclasses.replace(SMALL, classes=5)
    with caplog.at_level(logging.WARNING, "zoo"), pytest.raises(UserError, match=r"samples\.options"):
        go(None, task=task, samples=Samples(n=1, options={"x": 1}))
    assert any("2 classes and task.classes=5" in m and "set task.classes=2" in m for m in said(caplog))


def test_a_profile_covers_its_steps_and_changes_no_number(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks: list[str] = []
    start, stop = jax.profiler.start_trace, jax.profiler.stop_trace
    tick = Report.tick
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *a, **k: (marks.append("on"), start(*a, **k)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: (marks.append("off"), stop()))
    monkeypatch.setattr(Report, "tick", lambda self, step: (marks.append(str(step)), tick(self, step)))
    run = dataclasses.replace(RUN, workdir=str(tmp_path / "run"), log_every=100)
    state, _ = train(run, quiet=True, profile=(2, 3))
    chex.assert_trees_all_equal(plain(state), finished[1])
    assert [m for m in marks if m in ("on", "off") or m in "23"][:4] == ["on", "2", "off", "3"]
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert list((tmp_path / "run" / "profile").rglob("perfetto_trace.json.gz"))


def test_profiles_of_other_steps_are_refused(tmp_path: Path) -> None:
    for span in ((0, 2), (3, 2), (5, 7)):
        with told("--profile {}:{}".format(*span)):
            train(dataclasses.replace(RUN, workdir=str(tmp_path / "run")), quiet=True, profile=span)
    assert not (tmp_path / "run").exists()
    with told("--profile", "folder"):
        train(RUN, quiet=True, profile=(1, 2))
    go(tmp_path / "run", steps=3)
    for steps, span, words in ((6, (3, 5), "(4 to 6)"), (3, (2, 3), "finished at 3")):
        with told(words):
            train(dataclasses.replace(RUN, workdir=str(tmp_path / "run"), steps=steps), quiet=True, profile=span)


def test_a_run_that_ends_within_a_profile_keeps_it_and_one_that_cannot_be_made_costs_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    marks: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: marks.append("on"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: marks.append("off"))
    run = dataclasses.replace(RUN, workdir=str(tmp_path / "run"), evals=(Held(every=2, kill=True),))
    state, _ = train(run, quiet=True, profile=(2, 6))
    assert int(state.step) == 3
    assert marks == ["on", "off"]

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(jax.profiler, "start_trace", full)
    with caplog.at_level(logging.WARNING, "zoo"):
        state, _ = train(dataclasses.replace(run, evals=()), quiet=True, profile=(4, 5))
    assert int(state.step) == 6
    assert any("the profile could not be made (RuntimeError: No space left" in w for w in said(caplog))
