"""Laws of zoo.models: what opens a run folder, an export, a shipped name, and which weights come out."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import zoo
from zoo import config, dist, models, paths, weights
from zoo.data.synthetic import Synthetic
from zoo.errors import UserError
from zoo.papers.tarflow import TarFlow
from zoo.run import Run
from zoo.task import About
from zoo.train import optim
from zoo.train.checkpoint import Checkpoints
from zoo.train.step import State, abstract_state

TASK = TarFlow(image=4, channels=1, patch=2, width=8, depth=1, blocks=2, head_dim=8, classes=2)
RUN = Run(TASK, Synthetic(), steps=9, batch=8, ema=0.9)


@dataclass(frozen=True)
class Square:
    """A task whose one parameter only fits a mesh under the rules of its run."""

    about = About()

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {"x": jax.ShapeDtypeStruct((batch, 2), jnp.float32)}

    def init(self, rng: jax.Array) -> dict[str, Any]:
        return {"square": nn.LogicallyPartitioned(jnp.ones((2, 2)), ("mlp", "heads"))}

    def loss(self, params: Any, batch: Any, rng: jax.Array) -> Any:
        return (batch["x"] @ params["square"]).mean(), {}


def state_of(run: Run, step: int) -> State:
    """A state of random numbers, its average another than its weights."""
    mesh = dist.Mesh(data=1).build(jax.devices()[:1])
    rng = np.random.default_rng(step)
    with dist.use(mesh, run.rules):
        abstract = abstract_state(run.task, optim.build(run.optim, run.steps), mesh, run.ema)

    def draw(x: Any) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(step)
        return jnp.asarray(rng.normal(size=x.shape), x.dtype)

    return jax.tree.map(draw, abstract).replace(step=jnp.int32(step))


def write_run(folder: Path, run: Run, *steps: int) -> Path:
    """A run folder with the checkpoints of `steps`, as training leaves it."""
    folder.mkdir()
    about = {"format": 1, "run": config.dump(run), "labels": ["cat", "dog"]}
    (folder / "config.json").write_text(json.dumps(about))
    if steps:
        checkpoints = Checkpoints(folder)
        for step in steps:
            checkpoints.save(step, state_of(run, step), about)
        checkpoints.close()
    return folder


def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Equal names and bits."""
    a, b = weights.flatten(a), weights.flatten(b)
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("models") / "run", RUN, 3, 7)


def test_a_run_gives_its_newest_average_by_default_and_its_weights_when_asked(run: Path):
    wanted = state_of(RUN, 7)
    average, raw = models.open_model(run), models.open_model(str(run), raw=True)
    same(average.params, {**wanted.ema, "prior": wanted.params["prior"]})  # what is held has no average
    same(raw.params, wanted.params)
    assert np.any(average.params["block0"]["in"]["kernel"] != raw.params["block0"]["in"]["kernel"])
    assert (average.kind, raw.kind) == ("ema", "raw")
    for model in (average, raw):
        assert (model.task, model.data, model.run, model.step) == (TASK, Synthetic(), RUN, 7)
        assert (model.labels, model.folder) == (("cat", "dog"), run)


def test_a_run_without_an_average_gives_its_weights(tmp_path: Path):
    plain = replace(RUN, ema=0.0)
    model = models.open_model(write_run(tmp_path / "run", plain, 2))
    assert model.kind == "raw"
    same(model.params, state_of(plain, 2).params)


def test_load_is_task_and_parameters(run: Path):
    for raw in (False, True):
        task, params = zoo.load(str(run), raw=raw)
        assert task == TASK
        same(params, models.open_model(run, raw=raw).params)


def test_a_run_opens_under_its_own_rules(tmp_path: Path):
    own = replace(RUN, task=Square(), rules={"heads": None})
    model = models.open_model(write_run(tmp_path / "run", own, 1), allow=(Square.__module__,))
    same(model.params, state_of(own, 1).ema)


@pytest.mark.parametrize("raw", [False, True])
def test_an_export_is_the_model_it_was_made_from(run: Path, tmp_path: Path, raw: bool):
    model = models.open_model(run, raw=raw)
    weights.save(tmp_path / "export", model.params, models.export_config(model, {"bpd": 2.5}), "a card")
    again = models.open_model(tmp_path / "export")
    same(again.params, model.params)
    for name in ("task", "kind", "step", "data", "labels"):
        assert getattr(again, name) == getattr(model, name), name
    assert again.run is None


def test_an_export_opens_in_either_layout_of_layers(run: Path, tmp_path: Path):
    model = models.open_model(run)
    about = models.export_config(replace(model, task=replace(TASK, scan=False)))
    weights.save(tmp_path / "export", model.params, about, "a card")
    again = models.open_model(tmp_path / "export")
    assert "layer0" in again.params["block0"]["trunk"]
    same(weights.stacked(again.params), model.params)


def test_a_shipped_name_opens_from_anywhere(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = models.open_model(run)
    weights.save(tmp_path / "pretrained" / "tiny-flow", model.params, models.export_config(model), "a card")
    monkeypatch.setattr(paths, "_PRETRAINED", tmp_path / "pretrained")
    monkeypatch.chdir(run)
    assert list(paths.shipped()) == ["tiny-flow"]
    same(models.open_model("tiny-flow").params, model.params)
    with pytest.raises(
        UserError, match=r"tiny-flo is neither a folder nor a shipped model; did you mean 'tiny-flow'\?"
    ):
        models.open_model("tiny-flo")


def test_an_unknown_name_suggests_the_runs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "runs" / "tarflow-mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"did you mean 'runs/tarflow-mine'\?"):
        models.open_model("runs/tarflow-mini")


@pytest.mark.parametrize(
    "text, message",
    [
        (None, r"holds no config.json: it is neither a run folder nor an export"),
        ("{", r"config.json cannot be read .*restore it from a copy"),
        ("[1]", r"config.json is not a config written by zoo"),
        ('{"model": "bert"}', r"config.json is not a config written by zoo"),
        ('{"task": 3}', r"config.json is not a config written by zoo"),
        ('{"task": {"width": 3}}', r"config.json is not a config written by zoo"),
        ('{"run": {"steps": 3}}', r"config.json is not a config written by zoo"),
    ],
)
def test_a_folder_that_is_neither(tmp_path: Path, text: str | None, message: str):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        models.open_model(tmp_path)


def test_a_run_without_a_checkpoint_says_when_there_is_one(tmp_path: Path):
    folder = write_run(tmp_path / "run", RUN)
    with pytest.raises(UserError, match=r"holds no checkpoint yet.*checkpoint.every=1000 steps"):
        models.open_model(folder)
    assert [p.name for p in folder.iterdir()] == ["config.json"]  # looking leaves no trace


def test_a_run_opens_another_whatever_mesh_it_has_itself(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", RUN, 3)
    with dist.use(dist.Mesh().build()):
        inside = models.open_model(folder).params
    same(inside, models.open_model(folder).params)


def test_opening_never_moves_a_damaged_checkpoint(tmp_path: Path):
    folder = write_run(tmp_path / "run", RUN, 3)
    damaged = [p for p in (folder / "checkpoints" / "3").rglob("*") if p.is_file()]
    for path in damaged:
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"the checkpoint of step 3 in .* cannot be read"):
        models.open_model(folder)
    assert (folder / "checkpoints" / "3").is_dir()


# one model filled from another


def test_weights_are_given_whole_or_by_key(run: Path, tmp_path: Path):
    model = models.open_model(run)
    weights.save(tmp_path / "export", model.params, models.export_config(model), "a card")
    given = models.given_weights({"block0": f"{run}:block1", "": str(tmp_path / "export")})
    same(given["block0"], model.params["block1"])
    same(given[""], model.params)
    fresh = jax.tree.map(jnp.zeros_like, model.params)
    filled, report = weights.fill(fresh, given)
    same(filled["block0"], model.params["block1"])  # an explicit key wins over the whole
    same(filled["block1"], model.params["block1"])
    same(filled["prior"], model.params["prior"])
    assert any(line.startswith("filled: block0") for line in report)


def test_a_key_that_is_not_there(run: Path):
    with pytest.raises(UserError, match=r"has no parameters named 'blok1'; did you mean 'block1'\?"):
        models.given_weights({"block0": f"{run}:blok1"})
    with pytest.raises(UserError, match="is neither a folder nor a shipped model"):
        models.given_weights({"": "nowhere:block0"})
