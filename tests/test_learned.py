"""What is learned: the weights that come with the package, and (slow) the runs whose figures the README shows."""

import dataclasses
import json
from pathlib import Path

import figures
import jax
import numpy as np
import pytest

import zoo
from zoo import config, paths
from zoo.data.images import Digits
from zoo.metrics.likelihood import Bits
from zoo.train.loop import train

SHIPPED = paths.shipped()


def test_the_shipped_weights_are_what_their_card_says() -> None:
    folder = SHIPPED["tarflow-digits"]
    assert sum(p.stat().st_size for p in folder.iterdir()) < 2 * 2**20
    about = json.loads((folder / "config.json").read_text())
    run = config.load("tarflow/digits")
    task, params = zoo.load("tarflow-digits")
    assert (task, about["step"]) == (run.task, run.steps), "train and export the shipped weights anew"
    assert about["metrics"]["bpd"] == figures.read()["digits"]["figures"]["bpd"], (
        "keep the figures of the run that ships"
    )
    found = Bits(draws=2)(task, params, Digits(), jax.random.key(1))
    assert abs(found["bpd"] - about["metrics"]["bpd"]) < 0.01
    assert found["bpd"] < 2.30 < about["metrics"]["histogram_bpd"]


def test_the_shipped_weights_sample_images_with_ink_where_digits_have_it() -> None:
    task, params = zoo.load("tarflow-digits")
    images = jax.jit(lambda p: task.sample(p, jax.random.key(0), 256)["image"])(params)
    source = Digits().source("train")
    real = np.stack([source[i]["image"] for i in range(len(source))])
    assert np.isfinite(images).all()
    np.testing.assert_allclose(images.mean(0), real.mean(0), atol=0.25)
    assert np.corrcoef(np.ravel(images.std(0)), real.std(0).ravel())[0, 1] > 0.95


def test_the_readme_shows_the_measured_figures() -> None:
    text = figures.README.read_text()
    assert figures.rendered(text) == text, "run: python tests/figures.py write"
    assert all({"command", "hardware", "date"} <= set(r) for r in figures.read().values())


@pytest.mark.slow
def test_digits_reach_their_bits(tmp_path: Path) -> None:
    run = dataclasses.replace(config.load("tarflow/digits"), workdir=str(tmp_path / "run"))
    train(run, quiet=True)
    reached = figures.of_run(tmp_path / "run")
    assert reached["bpd"] < 2.30
    assert reached["bpd"] < reached["histogram_bpd"] < reached["gaussian_bpd"]
    assert abs(reached["bpd"] - figures.read()["digits"]["figures"]["bpd"]) < 0.02
