"""Commands on tasks that draw nothing and give features: exports, files of features, how fast crops are, what is listed."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fresh import exported, noise
from jax import export as jax_export

from zoo import cli, weights
from zoo.commands import bench, clocks, tables
from zoo.data.images import Digits
from zoo.data.synthetic import Synthetic
from zoo.errors import UserError
from zoo.metrics.features import Features
from zoo.papers.part import Part, PartClassifier
from zoo.papers.tarflow import TarFlow
from zoo.run import Run

TASK = Part(image=8, channels=1, patch=4, width=8, depth=2, head_dim=4, pairs=4, scan=True)
CLASSIFIER = PartClassifier(image=8, channels=1, patch=4, width=8, depth=1, head_dim=4)


@pytest.fixture(scope="module")
def params() -> Any:
    return noise(TASK, 0.3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, params: Any) -> str:
    """An export of random weights."""
    return str(exported(tmp_path_factory.mktemp("part") / "model", TASK, params, Digits()))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, model: str) -> SimpleNamespace:
    """What `zoo eval MODEL features` wrote."""
    file = tmp_path_factory.mktemp("features") / "digits.npz"
    assert cli.main(["eval", model, "features", f"out={file}", "maps=true", "limit=20", "batch=8"]) == 0
    with np.load(file) as arrays:
        return SimpleNamespace(file=file, arrays=dict(arrays))


def digits(count: int) -> dict[str, np.ndarray]:
    source = Digits().source("test")
    return {key: np.stack([source[i][key] for i in range(count)]) for key in ("image", "label")}


# --- exports --------------------------------------------------------------------------------------


def test_a_program_of_features_is_the_tasks_own(
    tmp_path: Path, model: str, params: Any, found: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["export", model, str(out), "--format", "stablehlo", "--samples", "5"]) == 0
    said = capsys.readouterr().out
    assert "stablehlo/ with a program for the features of 5 images a call" in said
    assert sorted(p.name for p in (out / "stablehlo").iterdir()) == ["features.bin", "features.json"]

    stored, _ = weights.load(out)
    image = digits(5)["image"]
    # as another library would, by jax alone
    program = jax_export.deserialize(bytearray((out / "stablehlo" / "features.bin").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    given = program.call(stored, {"image": image})
    assert {name: value.shape for name, value in given.items()} == {"features": (5, 8), "feature_map": (5, 2, 2, 8)}
    for name, value in given.items():
        np.testing.assert_allclose(value, found.arrays[name][:5], atol=1e-5)
    again = weights.load_stablehlo(out)(stored, {"image": image})
    jax.tree.map(np.testing.assert_array_equal, again, given)

    about = json.loads((out / "stablehlo" / "features.json").read_text())
    assert about["program"] == "features.bin"
    assert about["arguments"][1] == {"image": {"shape": [5, 8, 8, 1], "dtype": "float32"}}
    assert about["results"]["features"] == {"shape": [5, 8], "dtype": "float32"}

    # a program of another name takes its place
    other = {"sampler": weights.Program(lambda p: {"x": jnp.zeros(())})}
    weights.export_stablehlo(out, other, stored, platforms=("cpu",))
    assert sorted(p.name for p in (out / "stablehlo").iterdir()) == ["sampler.bin", "sampler.json"]
    assert set(weights.load_stablehlo(out)(stored)) == {"x"}


@pytest.mark.parametrize("task", [TASK, CLASSIFIER], ids=lambda task: type(task).__name__)
def test_the_published_layout_and_back(tmp_path: Path, task: Any, capsys: pytest.CaptureFixture[str]) -> None:
    params = noise(task, 0.3)
    file = tmp_path / "vit.safetensors"
    name = str(exported(tmp_path / "model", task, params))
    assert cli.main(["export", name, str(file), "--format", "official"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [task.import_note()]
    state = weights.read_state_dict(file)
    assert state["pos_embed"].shape == (1, 5, 8)
    head = {"head": params["head"]} if "head" in params else {}  # no part of that layout
    back = {**weights.from_official(task, state, head), **head}
    jax.tree.map(np.testing.assert_array_equal, back, params)


# --- files of features ----------------------------------------------------------------------------


def test_a_file_of_features_is_the_split_in_its_order(found: SimpleNamespace, params: Any) -> None:
    batch = digits(20)
    assert set(found.arrays) == {"features", "label", "feature_map"}
    np.testing.assert_array_equal(found.arrays["label"], batch["label"])
    assert found.arrays["features"].dtype == found.arrays["feature_map"].dtype == np.float32
    wanted = jax.jit(TASK.feature_map)(params, {"image": batch["image"][:8]})
    np.testing.assert_allclose(found.arrays["feature_map"][:8], wanted, atol=1e-5)
    np.testing.assert_allclose(found.arrays["features"], found.arrays["feature_map"].mean((1, 2)), atol=1e-5)
    assert len(np.unique(found.arrays["features"], axis=0)) > 15
    assert found.file.parent.exists()
    assert [p.name for p in found.file.parent.iterdir()] == ["digits.npz"]


def test_features_without_maps_or_labels(tmp_path: Path, params: Any) -> None:
    out = str(tmp_path / "noise.npz")
    metric = Features(out=out, limit=300, batch=8, split="train")
    told = metric(TASK, params, Synthetic(examples=9), jax.random.key(0))
    assert told == {"path": out, "count": 9, "dims": 8, "split": "train"}
    with np.load(out) as arrays:
        assert {k: v.shape for k, v in arrays.items()} == {"features": (9, 8)}


def test_what_goes_wrong_leaves_no_file(tmp_path: Path, params: Any) -> None:
    metric = Features(out=str(tmp_path / "x.npz"), batch=8, maps=True)
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    with pytest.raises(UserError, match="not finite"):
        metric(TASK, broken, Synthetic(examples=8), jax.random.key(0))
    assert not list(tmp_path.iterdir())
    plain = SimpleNamespace(features=TASK.features, spec=TASK.spec)
    with pytest.raises(UserError, match="features needs 'feature_map', which SimpleNamespace has not"):
        metric(plain, params, Synthetic(), jax.random.key(0))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ("", "has no file to write; add out=FILE.npz"),
        ("out=x.txt", "out=x.txt of the metric features ends in '.txt'; give a name in .npz"),
        ("out=gs://a/x.npz", "out=gs://a/x.npz of the metric features: it is written here; give a local file"),
        ("out=no/x.npz", "out=no/x.npz of the metric features: its folder does not exist; make it"),
        ("out=there.npz", "out=there.npz of the metric features exists; remove it first, or give another file"),
        ("out=x.npz limit=0", "limit=0 must be a whole number from 1"),
        ("out=x.npz map=true", "no field map in Features; did you mean 'maps'?"),
    ],
)
def test_a_mistake_is_found_before_any_work(
    tmp_path: Path,
    model: str,
    fields: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.npz").write_text("mine")
    assert cli.main(["eval", model, "features", *fields.split()]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["there.npz"]
    assert (tmp_path / "there.npz").read_text() == "mine"


def test_a_run_measures_no_features_while_it_trains(tmp_path: Path) -> None:
    from zoo.train.loop import train

    run = Run(TASK, Synthetic(), steps=1, batch=8, evals=(Features(out=str(tmp_path / "x.npz")),))
    with pytest.raises(UserError, match="gives no figure; leave it out and use `zoo eval RUN features"):
        train(run, quiet=True)


# --- how fast crops are ---------------------------------------------------------------------------


def test_crops_are_timed_beside_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "ROUND", 0.01)
    run = Run(TASK, Synthetic(), steps=2, batch=8)
    step = bench._Stepper(None, None, {"image": jnp.zeros((8, 8, 8, 1))})
    step.median = 0.25
    figures = bench.time_crops(run, step, 2)
    times = figures["sampler and crops ms, ours"]
    assert 0 < times["min"] <= times["median"] <= times["max"]
    rate = figures["sampler and crops images/s, ours"]
    assert rate == pytest.approx(8e3 / times["median"])
    assert figures["sampler and crops / train images/s"] == pytest.approx(rate / (8 / 0.25))


@pytest.mark.parametrize("task", [TASK, TarFlow(image=8, channels=1, patch=4, width=8, depth=1, blocks=1, head_dim=8)])
def test_bench_times_the_crops_of_a_task_that_has_some(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "compile_twice", lambda *_: (SimpleNamespace(memory_analysis=lambda: None), {}))
    monkeypatch.setattr(bench, "time_step", lambda *_: {})
    monkeypatch.setattr(bench, "time_crops", lambda run, step, rounds: {"crops of": (run, rounds)})
    monkeypatch.setattr(bench, "compile_step", lambda *_, **__: (lambda _: SimpleNamespace(params={}), None, None))
    run = Run(task, Synthetic(), steps=2, batch=8)
    figures = bench.bench(run, what="train", rounds=3)
    assert figures.get("crops of") == ((run, 3) if task is TASK else None)


# --- what is listed -------------------------------------------------------------------------------


def test_inherited_fields_are_shown_with_their_comments() -> None:
    @dataclasses.dataclass(frozen=True)
    class Base:
        one: int = 1  # of the base
        two: int = 2  # also of the base

    @dataclasses.dataclass(frozen=True)
    class Own(Base):
        two: int = 3  # its own
        three: int = 4
        # fmt: off
        four: int = (
            5  # in brackets
        )
        # fmt: on

    assert tables.comments(Own) == {"one": "of the base", "two": "its own", "four": "in brackets"}
    comments = tables.comments(Part)
    assert comments["patch"].startswith("pixels or samples a side")  # of what the tasks share
    assert comments["pairs"].startswith("in a step")
