"""`zoo export --format stablehlo`: programs that jax alone runs are what the model draws and denoises."""

import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from fresh import exported, randomised
from jax import export as jax_export

import zoo
from zoo import cli, weights
from zoo.commands import weights as exports
from zoo.diffusion.solvers import Euler
from zoo.draws import Use, key_of
from zoo.papers.edm import Edm, Transformer
from zoo.papers.energy import EnergyDistill
from zoo.papers.starflow import StarFlow
from zoo.papers.tada import Tada
from zoo.papers.tarflow import TarFlow

EDM = Edm(image=4, channels=1, classes=3, network=Transformer(width=8, depth=1, head_dim=4, patch=2))
N, LABEL = 3, np.array([0, 2, -1], np.int32)


@dataclass(frozen=True)
class Mine(Euler):
    """A solver of one's own."""

    name = "mine"


def noise_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def export_of(folder: Path, task: Any) -> str:
    return str(exported(folder, task, randomised(task)))


def program(out: Path, name: str) -> Any:
    """As another library would read it."""
    return jax_export.deserialize(bytearray((out / "stablehlo" / f"{name}.bin").read_bytes())).call


def described(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / "stablehlo" / f"{name}.json").read_text())


def test_a_sampler_with_options_and_a_denoiser_are_the_models_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, out = export_of(tmp_path / "model", EDM), tmp_path / "out"
    fields = ["solver=tada", "solver.detail=2", "nfe=5", "guidance=1"]
    assert cli.main(["export", name, str(out), "--format", "stablehlo", "--samples", str(N), *fields]) == 0
    assert f"stablehlo/ with a sampler and a denoiser of {N} images a call" in capsys.readouterr().out
    model, (stored, _) = zoo.load(name), weights.load(out)

    key = jax.random.key_data(jax.random.fold_in(key_of(4, Use.SAMPLES), 0))  # those of samples on their first attempt
    drawn = program(out, "sampler")(stored, key, LABEL)["image"]
    asked: dict[str, Any] = {"nfe": 5, "guidance": 1.0, "conditions": {"label": LABEL}}
    np.testing.assert_allclose(drawn, model.sample(N, 4, solver=Tada(detail=2.0), **asked)["image"], atol=1e-4)
    assert np.abs(drawn).max((1, 2, 3)).min() > 1e-2
    options = described(out, "sampler")["options"]
    assert (options["nfe"], options["solver"]["detail"], options["guidance"]) == (5, 2.0, 1.0)

    x, sigma = noise_of(N, 4, 4, 1), np.array([0.1, 1.0, 10.0], np.float32)
    denoise = weights.load_stablehlo(out, "denoiser")
    found = denoise(stored, x, sigma, LABEL)
    assert set(found) == {"x0"}
    np.testing.assert_allclose(found["x0"], model.denoise(x, sigma, {"label": LABEL}), atol=1e-5)
    assert np.abs(found["x0"] - denoise(stored, x, sigma, LABEL[::-1])["x0"])[0].max() > 1e-4  # the label is asked for
    about = described(out, "denoiser")
    assert about["sigmas"] == [EDM.low, EDM.high]
    shapes = [{"shape": [N, *x.shape[1:]], "dtype": "float32"}, {"shape": [N], "dtype": "float32"}]
    assert about["arguments"][1:] == [*shapes, {"shape": [N], "dtype": "int32"}]
    assert about["results"] == {"x0": shapes[0]}


def test_a_flow_of_latents_denoises_these_and_uniform_noise_has_no_denoiser(tmp_path: Path) -> None:
    task = StarFlow(latent=(4, 2), channels=2, width=8, depths=(1, 1), head_dim=8)
    name, out = export_of(tmp_path / "model", task), tmp_path / "out"
    assert cli.main(["export", name, str(out), "--format", "stablehlo", "--samples", "2"]) == 0
    x = noise_of(2, 4, 2, 2)
    found = program(out, "denoiser")(weights.load(out)[0], x, np.full(2, task.noise, np.float32))["x0"]
    np.testing.assert_allclose(found, zoo.load(name).denoise(x, task.noise), atol=1e-5)
    uniform = TarFlow(image=4, channels=1, patch=2, width=8, depth=1, blocks=1, head_dim=8, noise_type="uniform")
    assert set(exports._programs(uniform, 2, (), ())) == {"sampler"}


def test_an_energy_is_written_with_its_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = EnergyDistill(EDM, target="data")
    name, out = export_of(tmp_path / "model", task), tmp_path / "out"
    fields = ["nfe=3", "temper=2", "particles.count=2"]
    assert cli.main(["export", name, str(out), "--format", "stablehlo", "--samples", str(N), *fields]) == 0
    assert "a sampler, a denoiser and an energy of 3 images a call" in capsys.readouterr().out
    stored, _ = weights.load(out)
    x, sigma = noise_of(N, 4, 4, 1), np.array([0.1, 1.0, 10.0], np.float32)
    found = program(out, "energy")(stored, x, sigma, LABEL)
    own = functools.partial(task.energy, zoo.load(name).params, sigma=sigma, conditions={"label": LABEL})
    energies, slopes = jax.jit(lambda x: (own(x), jax.grad(lambda x: own(x).sum())(x)))(x)
    np.testing.assert_allclose(found["energy"], energies, rtol=1e-5)
    np.testing.assert_allclose(found["score"], -slopes, rtol=1e-4, atol=1e-4)
    assert set(described(out, "sampler")["results"]) == {"image", "label"}


def test_a_class_of_ones_own_is_named_and_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, out = export_of(tmp_path / "model", EDM), tmp_path / "out"
    command = ["export", name, str(out), "--format", "stablehlo", "--samples", "1", f"solver={__name__}.Mine", "nfe=3"]
    assert __name__ in sys.modules
    assert cli.main(command) == 2
    assert f"--allow {__name__}" in capsys.readouterr().err
    assert not out.exists()
    made = exports._programs(EDM, 1, command[-2:], [__name__])["sampler"].about
    assert made["options"]["solver"]["class"] == f"{__name__}.Mine"


def test_options_that_do_not_fit_the_task_are_told_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, out = export_of(tmp_path / "model", EDM), tmp_path / "out"
    for fields, says in (
        (["levels.high=100"], "reach beyond"),
        (["solver=heun", "nfe=4"], "odd"),
        (["n=4"], "no field n"),
    ):
        assert cli.main(["export", name, str(out), "--format", "stablehlo", *fields]) == 2
        assert says in capsys.readouterr().err
        assert not out.exists()
