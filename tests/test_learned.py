"""What is learned: the weights that come with the package, and (slow) the runs whose figures the README shows."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import figures
import jax
import numpy as np
import pytest

import zoo
from zoo import config, paths, weights
from zoo.data.images import Digits
from zoo.metrics import denoising
from zoo.metrics.text import Generation
from zoo.models import Model
from zoo.run import Run
from zoo.train.loop import train

SHIPPED = paths.shipped()


def opened(name: str) -> tuple[Run, Model, dict[str, Any]]:
    """The run, what it ships, and what its card says; with layers scanned, which compiles faster."""
    folder, run, model = SHIPPED[name], config.load(name.replace("-", "/")), zoo.load(name)
    assert sum(p.stat().st_size for p in folder.iterdir()) < 10**6
    about = json.loads((folder / "config.json").read_text())
    if name == "energy-digits":  # ships without its teacher, by a config that has no steps of its own
        assert model.task == config.load("energy/digits:student").task
    else:
        assert (model.task, about["step"]) == (run.task, run.steps), "train and export the shipped weights anew"
    if hasattr(model.task, "scan"):
        task = dataclasses.replace(model.task, scan=True)
        model = dataclasses.replace(model, task=task, params=weights.matching(model.params, weights.abstract(task)))
    return run, model, about["metrics"]


@pytest.mark.parametrize(
    ("name", "figure", "options"),
    [
        ("tarflow-digits", "bpd", {}),
        ("edm-digits", "denoising", {"nfe": 9}),
        ("energy-digits", "denoising", {"nfe": 9}),
        ("dart-digits", "mse_6", {}),
        ("itarflow-digits", "denoising", {"level": 0.7, "nfe": 1}),
    ],
)
def test_the_shipped_weights_of_images_are_what_their_card_says(
    name: str, figure: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And their samples have ink where digits have it."""
    monkeypatch.setattr(denoising, "check_denoiser", lambda *_: None)  # the figure shows that it is sound
    run, model, told = opened(name)
    kept = figures.read(name.partition("-")[0])["learned"]["digits"]["figures"]
    if name == "energy-digits":
        assert kept["steps"] == run.steps
    else:
        assert told[figure] == kept[figure], "keep the figures of the run that ships"
    fields = {"bpd": {"draws": 2, "baselines": False}, "mse_6": {"draws": 1, "limit": 198}}.get(figure, {})
    metric = dataclasses.replace(run.evals[0], batch=99, **fields)
    found = metric(model.task, model.params, Digits(), jax.random.key(1))
    assert found[figure] == pytest.approx(kept[figure], abs=0.01)
    if figure == "bpd":
        assert found["bpd"] < 2.30 < told["histogram_bpd"]
    elif figure == "mse_6":
        errors, rises = ([found[f"{key}_{i}"] for i in range(1, 7)] for key in ("mse", "rise"))
        assert (np.diff(errors) < 0).all()
        assert min(rises[3:]) > 0.15  # it uses the copies before
    else:
        bars = {"denoising_0.1": 0.61, "denoising_0.2": 0.55, "denoising_0.5": 0.49, "denoising_1": 0.60}
        assert {key: found[key] for key in bars.keys() & found.keys() if found[key] > bars[key]} == {}

    asked = model.task.Sampling(**options)
    draw = jax.jit(lambda p: model.task.sample(p, jax.random.key(0), 64, None, asked)["image"])
    images, source = np.asarray(draw(model.params)), Digits().source("train")
    real = np.stack([source[i]["image"] for i in range(len(source))])
    assert np.isfinite(images).all()
    assert np.sqrt(np.square(images.mean(0) - real.mean(0)).mean()) < 0.13
    assert np.corrcoef(np.ravel(images.std(0)), real.std(0).ravel())[0, 1] > 0.95


@pytest.mark.parametrize(
    ("name", "figure", "bars", "few"),
    [
        ("part-digits", "r2_dx", (0.5, 0.75), {}),  # the mean of the relations: 0
        ("tarflow_lm-stdlib", "bits_per_token", (1.9, 2.2), {}),  # the entropy of single characters: 4.1
        ("tcsm-stdlib", "bits_per_char", (2.8, 3.1), {"limit": 320, "draws": 1}),
    ],
)
def test_the_shipped_weights_without_a_sampler_of_images_are_what_their_card_says(
    name: str, figure: str, bars: tuple[float, float], few: dict[str, int]
) -> None:
    run, model, told = opened(name)
    metric = dataclasses.replace(run.evals[0], **few)
    found = metric(model.task, model.params, run.data, jax.random.key(1))
    assert found[figure] == pytest.approx(told[figure], abs=0.05)  # docstrings vary with Python
    assert bars[0] < found[figure] < bars[1]
    if name == "tcsm-stdlib":
        texts = Generation(samples=64, options={"steps": 16})
        drawn = texts(model.task, model.params, run.data, jax.random.key(0))
        assert drawn["unigram_kl"] < 0.02
        assert drawn["bigram_log_likelihood"] > -2.65
        assert abs(drawn["token_entropy"] - drawn["data_token_entropy"]) < 0.1


@pytest.mark.slow
def test_digits_reach_their_bits(tmp_path: Path) -> None:
    run = dataclasses.replace(config.load("tarflow/digits"), workdir=str(tmp_path / "run"))
    train(run, quiet=True)
    reached = figures.of_run(tmp_path / "run")
    assert reached["bpd"] < 2.30
    assert reached["bpd"] < reached["histogram_bpd"] < reached["gaussian_bpd"]
    assert abs(reached["bpd"] - figures.read("tarflow")["learned"]["digits"]["figures"]["bpd"]) < 0.02
