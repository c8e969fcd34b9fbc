"""Several averages of one run: each is kept, goes on and is taken by its width; others are made of snapshots."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import chex
import numpy as np
import pytest
from mistakes import told
from toy import TOYS

from zoo import cli, dist, models
from zoo.data.images import Arrays
from zoo.run import Checkpoint, Run
from zoo.train import optim
from zoo.train.averages import Power
from zoo.train.loop import train
from zoo.train.optim import AdamW
from zoo.train.step import compile_step


@pytest.fixture
def run(tmp_path: Path) -> Run:
    images, labels = np.random.default_rng(0).integers(0, 255, (64, 4, 4), np.uint8), np.arange(64) % 2
    np.savez(tmp_path / "data.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    return Run(
        TOYS[""](),
        Arrays(str(tmp_path / "data.npz")),
        steps=6,
        batch=8,
        optim=AdamW(lr=0.1, schedule="constant"),
        ema=(Power(0.05), Power(0.2)),
        checkpoint=Checkpoint(every=2),
        workdir=str(tmp_path / "run"),
    )


def test_several_averages_are_kept_go_on_and_are_taken_by_their_width(run: Run, tmp_path: Path) -> None:
    whole, _ = train(dataclasses.replace(run, workdir=str(tmp_path / "whole")), quiet=True)
    train(dataclasses.replace(run, steps=4), quiet=True)
    state, _ = train(run, quiet=True)
    chex.assert_trees_all_equal(state.ema, whole.ema)
    first, other, last = (
        models.open_model(run.workdir or "", allow=["toy"], **how) for how in ({}, {"ema": 0.2}, {"raw": True})
    )  # type: ignore[arg-type]
    assert (first.kind, other.kind, last.kind) == ("ema", "ema-0.2", "raw")
    for model, wanted in ((first, state.ema["0.05"]), (other, state.ema["0.2"]), (last, state.params)):
        chex.assert_trees_all_close(model.params, wanted)
    assert np.abs(first.params["mean"] - other.params["mean"]).max() > 1e-4
    for how, words in (({"ema": 0.3}, ("ema=0.3", "0.05, 0.2")), ({"ema": 0.2, "raw": True}, ("--raw", "ema=0.2"))):
        with told(*words):
            models.open_model(run.workdir or "", allow=["toy"], **how)  # type: ignore[arg-type]


def test_an_average_of_any_width_is_made_of_snapshots(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy, last = dataclasses.replace(run, task=TOYS["sample"]()), 64
    run = dataclasses.replace(toy, steps=last, log_every=64, checkpoint=Checkpoint(every=32, snapshots=4))
    mesh, built, history = run.mesh.build(), optim.build(run.optim, last), []
    with dist.use(mesh):
        init, step, _ = compile_step(run.task, built, mesh, ema=run.ema)
        state, feed = init(run.seed), run.batches(0, dist.batch_sharding(mesh))
        for _ in range(last):
            state, _ = step(state, next(feed))
            history.append(np.asarray(state.params["mean"], np.float64))
    train(dataclasses.replace(run, steps=40), quiet=True)
    folder, taken = tmp_path / "run", tmp_path / "run" / "snapshots"
    shutil.rmtree(
        folder / "checkpoints" / "40"
    )  # some steps are taken again, and one snapshot of these there is already
    shutil.rmtree(taken / "32")  # as a kill leaves it right after the save of this step
    train(run, quiet=True)
    assert sorted(int(p.name) for p in taken.iterdir()) == list(range(4, last, 4))
    assert len(list((folder / "checkpoints").iterdir())) == 2

    def off(width: float) -> float:
        """How far the reconstruction lies from the average of all steps, to that of the last step from it."""
        share = np.diff((np.arange(last + 1) / last) ** (Power(width).exponent + 1))
        wanted = np.tensordot(share, np.stack(history), 1)
        found = models.open_model(folder, ema=width, allow=["toy"])
        assert found.kind == f"ema-{width:g}"
        return float(np.linalg.norm(found.params["mean"] - wanted) / np.linalg.norm(history[-1] - wanted))

    many = [off(width) for width in (0.08, 0.15)]
    assert max(many) < 0.02
    assert cli.main(["sample", str(folder), "n=2", "ema=0.1", "--allow", "toy"]) == 0
    assert "ema-0.1 weights" in capsys.readouterr().out
    for step in taken.iterdir():
        if int(step.name) % 8:
            shutil.rmtree(step)
    few = [off(width) for width in (0.08, 0.15)]
    assert all(a < 0.5 * b for a, b in zip(many, few)), (many, few)
    with told("ema=0.01", "7 snapshots", "0.05, 0.2", "5%", "checkpoint.snapshots"):
        off(0.01)
    shutil.rmtree(taken)
    with told("ema=0.1", "no snapshots", "0.05, 0.2", "checkpoint.snapshots=STEPS"):
        off(0.1)
    with told("checkpoint.snapshots=4", "ema=0.9", "Power(0.05)"):
        dataclasses.replace(run, ema=0.9)


def test_the_average_of_a_power_weighs_steps_as_their_power() -> None:
    power, average, values = Power(0.1), 0.0, np.random.default_rng(0).normal(size=40)
    for step, value in enumerate(values):
        decay = float(power.decay(step))
        average = decay * average + (1 - decay) * value
    at, g = np.arange(41) / 40, power.exponent
    weights = np.diff(at ** (g + 1))  # the integral of each step's share
    assert average == pytest.approx(float(weights @ values), rel=1e-4)
    centre = np.sum(weights * at[1:])
    assert np.sqrt(np.sum(weights * (at[1:] - centre) ** 2)) == pytest.approx(0.1, abs=0.005)
