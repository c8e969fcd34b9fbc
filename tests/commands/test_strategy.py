"""Which way of inverting a flow `zoo sample` takes: what is kept with a run, what is picked up again, what is told."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from fresh import exported, noise
from PIL import Image

from zoo import cli, models
from zoo.commands import strategy
from zoo.data.synthetic import Synthetic
from zoo.errors import UserError
from zoo.flows.inverse import Guidance, Jacobi
from zoo.metrics.convergence import Convergence
from zoo.papers.tarflow import TarFlow

pytestmark = pytest.mark.devices8

TASK = TarFlow(
    image=6, channels=1, patch=2, width=8, depth=1, blocks=2, head_dim=8, noise_type="uniform", scan=False, classes=2
)
FILE = Convergence.saves
OPTIONS = TASK.Sampling
HERE = jax.devices()[0].device_kind


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> models.Model:
    """An export of weights whose every number matters."""
    folder = tmp_path_factory.mktemp("strategy") / "export"
    return models.open_model(exported(folder, TASK, noise(TASK, 0.2), Synthetic(), ("cat", "dog")))


@pytest.fixture(autouse=True)
def nothing_saved(model: models.Model) -> None:
    (model.folder / FILE).unlink(missing_ok=True)


def entry(modules: Any = (2, 0), batch: int = 1, guidance: float = 0.0, **fields: Any) -> dict[str, Any]:
    return {
        "device": HERE,
        "devices": 1,
        "batch": batch,
        "guidance": guidance,
        "tol": 1e-5,
        "modules": list(modules),
        "start": ["v", "zeros"],
        **fields,
    }


def plan(modules: Any) -> Jacobi:
    return Jacobi(tuple(modules), tol=1e-5, start=("v", "zeros"))


def keep(model: models.Model, *strategies: dict[str, Any], **about: Any) -> None:
    strategy.save(model.folder, {**about, "strategies": list(strategies)})


def saved(model: models.Model) -> dict[str, Any]:
    return json.loads((model.folder / FILE).read_text())


# what is kept


def test_strategies_of_other_devices_and_batches_are_kept(model: models.Model) -> None:
    old = [
        entry((1, 1)),
        entry((1, 1), batch=4),
        entry((1, 1), guidance=2.0),
        entry((1, 1), device="TPU v9"),
        entry((1, 1), devices=4),
    ]
    keep(model, *old, samples=1)
    keep(model, entry((3, 0)), entry((3, 3), batch=8), samples=2)
    assert saved(model)["strategies"] == [*old[1:], entry((3, 0)), entry((3, 3), batch=8)]
    assert saved(model)["samples"] == 2


def test_what_cannot_be_kept_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder")
    strategy.save(tmp_path / "file", {"strategies": [entry()]})
    (message,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert message.startswith("the strategies are not kept: ")
    assert f"{tmp_path}/file/{FILE}" in message


DAMAGED = {
    "cut": '{"strategies": [',
    "no tolerance": json.dumps({"strategies": [{k: v for k, v in entry().items() if k != "tol"}]}),
    "negative modules": json.dumps({"strategies": [entry([-1, 2])]}),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_told_and_may_be_measured_again(model: models.Model, name: str) -> None:
    path = model.folder / FILE
    path.write_text(DAMAGED[name])
    with pytest.raises(UserError) as told:
        strategy.chosen(model, OPTIONS(), 1)
    assert (
        str(told.value) == f"{path} is damaged; remove it, or measure again with `zoo eval {model.folder} convergence`"
    )
    keep(model, entry())
    assert strategy.chosen(model, OPTIONS(), 1) == plan((2, 0))


def test_a_file_that_cannot_be_read_is_told(model: models.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(model, entry())

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"convergence\.json cannot be read \(Permission denied\); remove it, or give"):
        strategy.chosen(model, OPTIONS(), 1)


# what is picked up


def test_the_smallest_batch_that_is_large_enough_is_chosen(model: models.Model) -> None:
    """For each device: 8 share a batch of 8, and 3 samples are drawn by one."""
    keep(model, entry(device="TPU v9"))
    assert strategy.chosen(model, OPTIONS(), 1) is None  # another device says nothing
    keep(
        model,
        entry((4, 0), batch=16),
        entry((1, 0), batch=1),
        entry((2, 0), batch=8, devices=2),
        entry((3, 0), batch=2),
    )
    assert jax.local_device_count() == 8
    for batch, modules in ((1, 1), (8, 1), (16, 3), (24, 2), (3, 2), (5, 4), (128, 4)):
        assert strategy.chosen(model, OPTIONS(), batch) == plan((modules, 0)), batch
    assert strategy.chosen(model, OPTIONS(), 136) is None  # 17 on each
    assert strategy.chosen(model, OPTIONS(), 17) is None


def test_guided_samples_have_strategies_of_their_own(model: models.Model) -> None:
    keep(model, entry((1, 1)), entry((2, 2), guidance=1.5))
    assert strategy.chosen(model, OPTIONS(guidance=0.0), 1) == plan((1, 1))
    assert strategy.chosen(model, OPTIONS(guidance=3.0), 1) == plan((2, 2))
    assert strategy.chosen(model, OPTIONS(guidance=Guidance(0.5)), 1) == plan((2, 2))
    assert strategy.chosen(model, OPTIONS(guidance=Guidance(0.0)), 1) == plan((1, 1))
    (model.folder / FILE).unlink()
    keep(model, entry((2, 2), guidance=1.5))
    assert strategy.chosen(model, OPTIONS(), 1) is None


def test_a_method_that_is_asked_for_stands(model: models.Model) -> None:
    keep(model, entry())
    for method in ("sequential", "jacobi", Jacobi(2)):
        assert strategy.resolve(model, OPTIONS(method=method), 1, measure=False) == OPTIONS(method=method)
    assert strategy.resolve(model, OPTIONS(), 1, measure=False) == OPTIONS(method=plan((2, 0)))
    mute = dataclasses.replace(model, task=object())
    assert strategy.resolve(mute, OPTIONS(), 1, measure=False) == OPTIONS()


def test_auto_without_data_to_measure_on_is_a_sentence(model: models.Model) -> None:
    undated = dataclasses.replace(model, data=None)
    with pytest.raises(UserError, match=r"method=auto: .* give method=sequential or method=jacobi"):
        strategy.resolve(undated, OPTIONS(), 1, measure=True)
    keep(model, entry())
    assert strategy.resolve(undated, OPTIONS(), 1, measure=True) == OPTIONS(method=plan((2, 0)))


# what is told


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("sequential", "token by token"),
        ("auto", "token by token"),
        (Jacobi((0, 0)), "token by token"),
        ("jacobi", "sweeps with modules=1, tol=1e-05"),
        (Jacobi((2, 0), tol=1e-4), "sweeps with modules=2,0, tol=0.0001"),
        (Jacobi((3,), tol=(1e-3, 0.1)), "sweeps with modules=3, tol=0.001,0.1"),
    ],
)
def test_a_method_is_described(method: Any, words: str) -> None:
    assert strategy.described(method) == words


@pytest.mark.parametrize(
    ("method", "ending"),
    [
        ("jacobi", "went token by token"),
        (Jacobi(unconverged="keep"), "were kept as they are: set method.unconverged=sequential for exact ones"),
    ],
)
def test_blocks_that_did_not_converge_are_told(caplog: pytest.LogCaptureFixture, method: Any, ending: str) -> None:
    bad = np.array([[True, False, True], [True, False, False]])
    strategy.tell({"unconverged": bad, "label": np.zeros(2)}, method)
    assert caplog.messages == [
        f"block {i}: {n} of 2 samples did not converge by sweeps and {ending}" for i, n in ((0, 2), (2, 1))
    ]
    caplog.clear()
    strategy.tell({"unconverged": ~bad & bad}, method)
    strategy.tell({}, method)
    assert caplog.messages == []


# zoo sample


@pytest.fixture
def sample(model: models.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture):
    """Draws two samples into a folder: what is said on the way and the images, or the mistake."""
    caplog.set_level(logging.INFO, logger="zoo")

    def run(name: str, *options: str, mistake: bool = False) -> Any:
        caplog.clear()
        capsys.readouterr()
        code = cli.main(["sample", str(model.folder), "n=2", "seed=3", "--out", str(tmp_path / name), *options])
        err = capsys.readouterr().err
        if mistake:
            assert code == 2
            return err
        assert code == 0, err
        images = []
        for i in range(2):
            with Image.open(tmp_path / name / f"{i:06d}.png") as image:
                images.append(np.asarray(image, int))
        return caplog.messages, np.stack(images)

    return run


def test_samples_are_the_same_by_whichever_method(model: models.Model, sample: Any) -> None:
    said, want = sample("sequential", "method=sequential")
    assert not any("method" in line for line in said)
    assert np.abs(want[0] - want[1]).max() > 20
    said, found = sample("asked", "method.modules=2,0", "method.tol=1e-5", "method.start=v,zeros")
    assert np.abs(found - want).max() <= 2
    assert not any("converge" in line for line in said)

    assert "method: token by token" in sample("auto")[0]
    keep(model, entry())
    said, found = sample("saved")
    assert "method: sweeps with modules=2,0, tol=1e-05" in said
    assert np.abs(found - want).max() <= 2
    keep(model, entry(tol=10.0))  # so rough that it would show: none to take unasked
    said, found = sample("rough")
    assert "method: token by token" in said
    assert np.abs(found - want).max() <= 2


def test_samples_that_are_kept_unfinished_are_told(sample: Any) -> None:
    want = sample("sequential", "method=sequential")[1]
    said, found = sample("kept", "method.sweeps=1", "method.unconverged=keep")
    assert np.abs(found - want).max() > 2
    for block in range(2):
        message = f"block {block}: 2 of 2 samples did not converge by sweeps and were kept as they are"
        assert any(line.startswith(message) for line in said)


def test_a_folder_is_filled_by_one_method(model: models.Model, sample: Any, tmp_path: Path) -> None:
    sample("out", "method=sequential")
    for other in ([], ["method=jacobi"], ["method.modules=2"]):
        assert "holds samples drawn with other settings (method: " in sample("out", *other, mistake=True)

    want = sample("auto")[1]
    assert "method" not in json.loads((tmp_path / "auto" / "settings.json").read_text())
    (tmp_path / "auto" / "000001.png").unlink()
    keep(model, entry())
    said, found = sample("auto")  # on another device another way may be the fastest
    assert "method: sweeps with modules=2,0, tol=1e-05" in said
    assert np.abs(found - want).max() <= 2


def test_auto_that_is_asked_for_measures_once(
    model: models.Model, sample: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def measure(metric: Convergence, task: Any, params: Any, data: Any, rng: Any) -> dict[str, Any]:
        assert (task, data) == (model.task, model.data)
        measured.append((metric.batches, metric.guidance))
        return {"strategies": [entry((2, 0), batch=metric.batches[0], devices=2, guidance=metric.guidance)]}

    monkeypatch.setattr(Convergence, "__call__", measure)
    said, _ = sample("measured", "method=auto")
    assert "method=auto: no strategy is saved for this device, batch and guidance; measuring" in said
    assert "method: sweeps with modules=2,0, tol=1e-05" in said
    said, _ = sample("measured", "method=auto")
    assert not any("measuring" in line for line in said)
    assert measured == [((2,), 0.0)]
    asked = OPTIONS(guidance=Guidance(1.5))
    wanted = dataclasses.replace(asked, method=plan((2, 0)))
    assert strategy.resolve(model, asked, 6, measure=True) == wanted
    assert measured[1:] == [((6,), 1.5)]
    assert len(saved(model)["strategies"]) == 2
