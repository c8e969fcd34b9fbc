"""Energies that are learned: of a mixture beside the exact one, and (slow) of digits and their product."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from mistakes import told

from zoo import config, models, weights
from zoo.data.images import Digits
from zoo.diffusion.smc import Particles
from zoo.metrics.agreement import Classes
from zoo.papers import edm, energy
from zoo.papers.energy import learned, mixtures
from zoo.train.loop import train

NETWORK = edm.Transformer(width=8, depth=1, head_dim=8, patch=1)


def test_points_of_a_mixture_are_its() -> None:
    """Weights of modes, and within a mode mean and covariance; the kernel distance against its definition."""
    wide = energy.Mode(3.0, (20.0, 0.0), (2.0, 0.5), 0.8)
    points = np.asarray(energy.Mixture((energy.Mode(), wide)).points(jax.random.key(0), 40_000))
    own = points[points[:, 0] > 8]
    np.testing.assert_allclose(len(own) / len(points), 0.75, atol=0.01)
    np.testing.assert_allclose(own.mean(0), wide.mean, atol=0.05)
    np.testing.assert_allclose(np.cov(own.T), [[4.0, 0.8], [0.8, 0.25]], atol=0.06)

    corners = mixtures.CORNERS
    cold, true = learned.tempered(corners, 2.0, 4_000), mixtures.truth((corners,), (2.0,))[0]
    assert mixtures.distance(mixtures.share(corners.modes, cold, np.ones(len(cold))), true) < 0.02
    x, y = points[:5], points[5:10]
    values = [[np.exp(-np.square(a - b).sum() / (2 * 3.0**2)) for b in (*x, *y)] for a in (*x, *y)]
    kernel = np.asarray(values) - np.eye(10)
    wanted = (kernel[:5, :5].sum() + kernel[5:, 5:].sum()) / 20 - 2 * kernel[:5, 5:].mean()
    np.testing.assert_allclose(learned.mmd2(x, y, (3.0,)), wanted, rtol=1e-6)
    assert abs(learned.mmd2(cold[:1000], cold[1000:2000])) < 0.005 < learned.mmd2(cold[:1000], cold[:1000] + 1)


def test_energies_of_a_mixture_are_trained_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "_TESTED", 1024)
    with told("task takes images [4, 4, 1]", "image=1"):
        energy.Learned(energy.EnergyDistill(edm.Edm(image=4, channels=1, network=NETWORK), target="data"))
    point = energy.EnergyDistill(edm.Edm(image=1, channels=2, network=NETWORK), target="data")
    few = {"steps": 30, "batch": 32, "islands": 2, "count": 16, "levels": 5, "stops": (1.0,)}
    made = energy.Learned(point, out=str(tmp_path / "out"), **few)
    figures = made.run()
    assert {row["energy"] for row in figures["rows"]} == {"exact", "distilled", "from points"}
    fresh = made.score_errors(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), weights.abstract(point)))  # f is 0
    assert all(0 < e < start for errors in figures["score_error"].values() for e, start in zip(errors[2:], fresh[2:]))
    assert (tmp_path / "out" / "learned.md").read_text().count("hybrid, stop 1") == 3


@pytest.mark.slow
def test_distilled_energies_of_a_mixture_are_nearer_to_the_exact_one(tmp_path: Path) -> None:
    """Two minutes on two cores. The exact energy is the control of what particles lose."""
    made = dataclasses.replace(config.load("energy/mixtures:learned"), steps=500, out=str(tmp_path / "learned"))
    figures = made.run()
    distilled, points = (figures["score_error"][kind][made.sigmas.index(0.5)] for kind in ("distilled", "from points"))
    assert distilled < 0.35 * points
    tv = {(row["energy"], row["method"]): row["tv"] for row in figures["rows"]}
    assert tv["distilled", "hybrid, stop 1"] < 0.06
    assert {row["mmd2"] < 0.005 for row in figures["rows"] if row["method"] == "hybrid, stop 1"} == {True}
    assert min(value for (_, method), value in tv.items() if method == "naive") > 0.18
    assert tv["exact", "hybrid, stop 0.3"] < 0.06


@pytest.mark.slow
def test_the_product_of_learned_energies_has_the_digits_of_both(tmp_path: Path) -> None:
    """Five minutes on two cores. Summed scores, the control, do not."""
    given = {}
    for i, half in enumerate(("low", "high")):
        run = dataclasses.replace(config.load(f"energy/digits:{half}"), workdir=str(tmp_path / half))
        train(run, quiet=True)
        given[f"weights.part{i}"] = str(tmp_path / half)
    task, params = models.open_model("energy/digits_product", [f"{key}={value}" for key, value in given.items()])

    def wanted(samples: int, batch: int, **options: Any) -> float:
        metric = Classes(samples, options, batch=batch, wanted=(2, 3))
        return float(metric(task, params, Digits(), jax.random.key(0))["wanted"])

    assert wanted(256, 256, rho=0.0, particles=Particles(2)) < 0.93
    assert wanted(48, 4, form="score") > 0.97
    assert wanted(48, 4, form="ratio") > 0.97
