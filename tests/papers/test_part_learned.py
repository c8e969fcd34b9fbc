"""What PART learns in minutes (slow): relations of held-out digits and chirps, layouts, and features better than untrained ones."""

import dataclasses

import jax
import pytest

from zoo import config
from zoo.papers.part.metrics import Localise
from zoo.train.loop import train

pytestmark = pytest.mark.slow


def reached(name, folder, seed=0):
    """The run, its parameters and what its metrics measured at the end, those of two probes by their labels."""
    run = dataclasses.replace(config.load(name), workdir=str(folder / f"{name.replace('/', '-')}-{seed}"), seed=seed)
    state, _ = train(run, quiet=True)
    found = {}
    for metric in run.evals:
        measured = metric(run.task, state.params, run.data, jax.random.key(seed))
        found |= {f"{k}_{measured['probe_train']}" if "probe_train" in measured else k: v for k, v in measured.items()}
    return run, state.params, found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("variant", ["config", "residual"])
def test_chirps(variant, seed, tmp_path):
    *_, found = reached(f"part/chirps:{variant}", tmp_path, seed)
    assert found["r2_dt"] > 0.3
    assert found["r2_shuffled_dt"] < 0
    assert found["probe_accuracy_2000"] > 0.95
    assert found["probe_accuracy_100"] > found["probe_accuracy_random_100"] + 0.2


@pytest.mark.parametrize("seed", [0, 1])
def test_digits(seed, tmp_path):
    run, params, found = reached("part/digits", tmp_path, seed)
    assert found["r2_dx"] > 0.4
    assert found["r2_dy"] > 0.1  # 1,500 images are few: it knows those by heart
    assert max(found["r2_shuffled_dx"], found["r2_shuffled_dy"]) < 0
    assert found["layout_ink"] > 0.5
    assert abs(found["layout_shuffled"]) < 0.1
    assert found["knn_accuracy"] > found["knn_accuracy_random"] + 0.05
    grid, weights, _ = reached("part/digits:absolute", tmp_path, seed)
    measure = Localise(train=1_500, test=297)
    ours = measure(run.task, params, run.data, jax.random.key(0))["localise_r2"]
    theirs = measure(grid.task, weights, grid.data, jax.random.key(0))["localise_r2"]
    assert ours > theirs
