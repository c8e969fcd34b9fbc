"""Several averages of one run: each is kept, goes on and is taken by its width."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import chex
import numpy as np
import pytest
from mistakes import told
from toy import TOYS

from zoo import models
from zoo.data.images import Arrays
from zoo.run import Checkpoint, Run
from zoo.train.averages import Power
from zoo.train.loop import train
from zoo.train.optim import AdamW


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
