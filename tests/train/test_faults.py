"""Runs in processes of their own that are killed and deprived of room: the end is that of a calm run.

All children share one compile cache. The pause between examples, which decides no number, comes from the environment.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chex
import processes
import pytest
from processes import contents

from zoo import cli

CONFIG = '''
"""A regression whose state is large enough for a save to take a moment, on data that comes slowly."""

import os
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from zoo.data.pipeline import Data, Source
from zoo.dist import Mesh
from zoo.run import Checkpoint, Run
from zoo.task import About
from zoo.train.optim import AdamW


@dataclass(frozen=True)
class Task:
    about = About(buffers=("seen",))

    def spec(self, batch):
        return {"x": jax.ShapeDtypeStruct((batch, 64), jnp.float32)}

    def init(self, rng):
        return {"net": {"kernel": jax.random.normal(rng, (64, 512))}, "seen": {"mean": jnp.zeros(64)}}

    def loss(self, params, batch, rng):
        x = batch["x"] + 0.1 * jax.random.normal(rng, batch["x"].shape)
        return jnp.square(jnp.tanh(x @ params["net"]["kernel"]) - 0.5).mean(), {"mean": x.mean(0)}

    def after_step(self, params, metrics):
        return {**params, "seen": {"mean": 0.9 * params["seen"]["mean"] + 0.1 * metrics["mean"]}}


class Rows(Source):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        time.sleep(float(os.environ.get("PAUSE", 0)))
        return {"x": np.random.default_rng(index).normal(size=64).astype(np.float32)}


@dataclass(frozen=True)
class Numbers(Data):
    def source(self, split, spec=None):
        return Rows()


config = Run(
    task=Task(),
    data=Numbers(),
    steps=60,
    batch=4,
    optim=AdamW(lr=0.01, schedule="constant"),
    ema=0.99,
    mesh=Mesh(),
    checkpoint=Checkpoint(every=5),
    log_every=1,
)
'''
STEPS, LONG = 60, 120  # of the quick tests, and of the slow one
PAUSE = 0.02  # seconds an example: 4 examples a batch, 2 batches at once, so some 40 ms a step
LIMIT = 60  # seconds that no child may need


class Runs(processes.Runs):
    """The children that train them."""

    def start(self, name: str, *fields: str, pause: float = 0.0, cache: str = "cache") -> subprocess.Popen[bytes]:
        """`zoo train` of the config into `name`, on one device; what it says on stderr goes to `name.err`."""
        known = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        child = subprocess.Popen(
            [sys.executable, "-m", "zoo.cli", "train", "config.py", f"workdir=runs/{name}", *fields],
            cwd=self.root,
            env={**known, "JAX_PLATFORMS": "cpu", "ZOO_CACHE": str(self.root / cache), "PAUSE": str(pause)},
            stdout=subprocess.DEVNULL,
            stderr=(self.root / f"{name}.err").open("wb"),
        )
        self.children.append(child)
        return child

    def finish(self, name: str, *fields: str, cache: str = "cache") -> str:
        """The command, up to its end; returns what it said."""
        assert self.start(name, *fields, cache=cache).wait(LIMIT) == 0, self.said(name)
        return self.said(name)

    def said(self, name: str) -> str:
        return (self.root / f"{name}.err").read_text()

    def saving(self, name: str) -> list[Path]:
        """Folders of saves under way, or of such that were cut off."""
        return list((self.folder(name) / "checkpoints").glob("*orbax-checkpoint-tmp*"))

    def events(self, name: str) -> list[Path]:
        """A file for each session that got as far as its first step."""
        return list((self.folder(name) / "tensorboard").glob("*"))

    def assert_equal(self, name: str, calm: str, steps: int = STEPS) -> None:
        """State to the bit, and the same losses, each step once and nothing of a cut-off save left."""
        chex.assert_trees_all_equal(self.state(name, steps), self.state(calm, steps))
        lines = (self.folder(name) / "metrics.jsonl").read_text().splitlines()
        assert [r["step"] for r in self.records(name)] == list(range(1, steps + 1))
        assert len(lines) == steps, "no torn line is left"
        assert [r["loss"] for r in self.records(name)] == [r["loss"] for r in self.records(calm)]
        assert self.saving(name) == []


def until(true: Callable[[], Any], child: subprocess.Popen[bytes], every: float = 0.01) -> bool:
    """Waits until something is true; False when the child ended before."""
    end = time.monotonic() + LIMIT
    while not true():
        if child.poll() is not None:
            return False
        assert time.monotonic() < end, "the child does not get there"
        time.sleep(every)
    return True


def children_of(root: Path, steps: int) -> Runs:
    """A fresh folder of runs with a run `calm` that nothing disturbed."""
    (root / "config.py").write_text(CONFIG)
    runs = Runs(root)
    runs.finish("calm", f"steps={steps}")
    return runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = children_of(tmp_path_factory.mktemp("faults"), STEPS)
    before = contents(made.folder("calm"))
    yield made
    for child in made.children:
        child.kill()
    assert contents(made.folder("calm")) == before, "a run touched its neighbour"


# ---------------------------------------------------------------------------------------------------------------- kills


@dataclass
class Kills:
    """What happened to a run."""

    total: int = 0
    saving: int = 0  # of them in mid-save
    steps: list[int] = field(default_factory=list)  # the last step logged at each


def kill_often(runs: Runs, name: str, kills: int, saving: int, steps: int, seed: int) -> Kills:
    """Starts the run again and again; kill -9 after a random number of its steps, or in mid-save where some are due."""
    rng = random.Random(seed)
    done = Kills()
    while done.total < kills:
        start = runs.saved(name)[-1] if runs.folder(name).exists() and runs.saved(name) else 0
        stale, events = {p.name for p in runs.saving(name)}, runs.events(name)
        child = runs.start(name, f"steps={steps}", pause=PAUSE)
        mid_save = done.saving < saving and done.total % 2 == 0
        if mid_save:
            alive = until(lambda: [p for p in runs.saving(name) if p.name not in stale], child, every=0.0005)  # noqa: B023
        else:
            wanted = start + rng.randrange(1, 8)
            # the lines of the session before count until this one has cut them off and opened its own events
            alive = until(lambda: len(runs.events(name)) > len(events) and runs.reached(name) >= wanted, child)  # noqa: B023
            time.sleep(rng.uniform(0, PAUSE * 2))
        assert alive, f"the run ended by itself: {runs.said(name)}"
        child.send_signal(signal.SIGKILL)
        assert child.wait(LIMIT) == -signal.SIGKILL, "the kill came too late"
        said = runs.said(name)
        assert "Traceback" not in said
        assert (f"step {start} of" in said) is (start > 0), "the run did not go on where it had stopped"
        done.total += 1
        done.saving += any(p.name not in stale for p in runs.saving(name))
        done.steps.append(runs.reached(name))
    return done


def test_a_run_that_is_killed_and_then_has_no_room_ends_as_if_it_had_not_been_although_its_compile_cache_is_damaged(
    runs: Runs,
) -> None:
    done = kill_often(runs, "harmed", kills=1, saving=1, steps=STEPS, seed=0)
    assert (done.total, done.saving) == (1, 1)
    assert max(done.steps) < STEPS
    before = runs.saved("harmed")
    child = runs.start("harmed", pause=PAUSE)
    assert until(lambda: runs.saved("harmed") != before, child)
    # No file of the child may grow beyond 48 KiB any more: metrics stay below, the arrays of a checkpoint do not.
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (48 * 1024, resource.RLIM_INFINITY))
    assert child.wait(LIMIT) == 2
    said = runs.said("harmed").splitlines()
    assert len(said) == 2, "a sentence is lost among other lines"
    good = runs.saved("harmed")
    assert 5 <= good[-1] < STEPS
    assert said[-1].startswith("zoo train: ")
    assert f"could not save the checkpoint of step {good[-1] + 5} in" in said[-1]
    assert os.strerror(errno.EFBIG) in said[-1], "the system's own words are lost"
    assert f"step {good[-1]} is the newest good one" in said[-1]
    assert "make room" in said[-1]

    shutil.copytree(runs.root / "cache", runs.root / "damaged")
    entries = [p for p in (runs.root / "damaged").rglob("*") if p.is_file()]
    assert any("jit_step" in p.name for p in entries), "the cache does not hold the step"
    for path in entries:
        os.truncate(path, path.stat().st_size // 2)
    again = runs.finish("harmed", cache="damaged")
    assert f"step {good[-1]} of" in again
    assert "cannot be read" not in again
    assert "Traceback" not in again
    runs.assert_equal("harmed", "calm")


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_as_if_it_had_not_been(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = children_of(tmp_path, LONG)
    before = contents(runs.folder("calm"))
    done = kill_often(runs, "killed", kills=20, saving=10, steps=LONG, seed=1)
    assert done.total == 20
    assert done.saving >= 5
    runs.finish("killed", f"steps={LONG}")
    runs.assert_equal("killed", "calm", LONG)
    assert contents(runs.folder("calm")) == before
    with capsys.disabled():
        print(f"\n{done.total} kills, {done.saving} of them in mid-save, at steps {done.steps} of {LONG}")


def test_a_folder_that_cannot_be_written_ends_in_a_sentence(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZOO_CACHE", str(runs.root / "cache"))
    (tmp_path / "file").write_text("mine")
    for place in ("file/run", "/proc/self/run"):
        assert cli.main(["train", str(runs.root / "config.py"), f"workdir={place}", "mesh.data=2", "batch=8"]) == 2
        words = capsys.readouterr().err.splitlines()[-1]
        assert words.startswith("zoo train: cannot write the run folder")
        assert "choose another workdir=" in words
    assert contents(tmp_path) == {"file": b"mine"}
