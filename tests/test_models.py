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
from fresh import exported, noise
from PIL import Image

import zoo
from zoo import cli, config, dist, models, paths, weights
from zoo.data.synthetic import Synthetic
from zoo.draws import Use, keys
from zoo.errors import UserError
from zoo.papers.tarflow import TarFlow
from zoo.run import Run
from zoo.task import About
from zoo.train import optim
from zoo.train.checkpoint import Checkpoints
from zoo.train.pictures import grid
from zoo.train.step import State, abstract_state

TASK = TarFlow(image=4, channels=1, patch=2, width=8, depth=1, blocks=2, head_dim=8, classes=2)
ONE = replace(TASK, blocks=1)
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

    def draw(x: Any) -> Any:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(step)
        return jnp.asarray(rng.normal(size=x.shape).astype(x.dtype))

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
        task, params = model = zoo.load(str(run), raw=raw)
        assert (model[0], model[1]) == (task, params)
        assert task == TASK
        same(params, models.open_model(run, raw=raw).params)


# what a model can do


@dataclass(frozen=True)
class Denoiser(Square):
    """The best guess for a standard normal."""

    sigmas = (0.5, 2.0)

    def denoise(self, params: Any, x: jax.Array, sigma: jax.Array, conditions: Any = None) -> jax.Array:
        return x / (1 + jnp.reshape(sigma, (-1, 1)) ** 2)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of weights whose every number matters."""
    folder = tmp_path_factory.mktemp("models") / "small"
    return exported(folder, ONE, noise(ONE, 0.2), Synthetic(), ("cat", "dog"))


def test_a_model_draws_what_the_command_draws_and_compiles_once_a_shape(small: Path, tmp_path: Path):
    model = zoo.load(str(small))
    drawn = model.sample(3, seed=5, label=["dog", 0], guidance=0.5)["image"]
    fields = ["n=2", "seed=5", "label=dog,0", "guidance=0.5"]
    assert cli.main(["sample", str(small), *fields, "--out", str(tmp_path / "out")]) == 0
    for i, image in enumerate(drawn[:2]):  # whatever is drawn beside it
        with Image.open(tmp_path / "out" / f"{i:06d}.png") as file:
            np.testing.assert_allclose((image + 1) * 127.5, np.asarray(file)[..., :1], atol=1)
    again = model.sample(3, seed=5, conditions={"label": [1, 0, 1]}, guidance=0.5)["image"]
    np.testing.assert_array_equal(again, drawn)
    others = model.sample(3, seed=6, label=["dog", 0], guidance=0.5), model.sample(3, seed=5, label=0, guidance=0.5)
    assert all(np.abs(other["image"][0] - drawn[0]).max() > 1e-3 for other in others)
    assert model._programs["sample"]._cache_size() == 1
    sheet = model.sheet({"image": drawn, "label": np.array([1, 0, -1])})
    assert sheet.tobytes() == grid(drawn, ["dog", "cat", "none"]).tobytes()


def test_a_model_gives_what_its_task_gives(small: Path):
    model = zoo.load(str(small))
    batch = {
        "image": np.random.default_rng(0).normal(size=(3, 4, 4, 1)).astype(np.float32),
        "label": np.array([0, 1, 1]),
    }
    label, drawn = {"label": batch["label"]}, keys(3, np.arange(3), use=Use.LIKELIHOOD)
    nll, features, denoised = jax.jit(
        lambda p: (ONE.nll(p, batch, drawn), ONE.features(p, batch), ONE.denoise(p, batch["image"], 0.05, label))
    )(model.params)
    np.testing.assert_allclose(model.nll(batch, seed=3), nll, rtol=1e-5)
    np.testing.assert_allclose(model.features(batch), features, rtol=1e-4, atol=1e-5)
    for sigma in (0.05, np.full(3, 0.05, np.float32)):  # the one level of a flow
        np.testing.assert_allclose(model.denoise(batch["image"], sigma, label), denoised, rtol=1e-4, atol=1e-5)
    other = models.Model(Denoiser(), {"square": np.ones((2, 2))}, "raw", None, None, (), small)
    np.testing.assert_allclose(other.denoise(np.ones((2, 2)), np.array([1.0, 2.0])), [[0.5] * 2, [0.2] * 2])


def test_a_model_is_told_in_five_lines(small: Path):
    assert repr(zoo.load(str(small))).splitlines() == [
        "TarFlow, of TarFlow: Normalizing Flows are Capable Generative Models (arXiv:2412.06329)",
        f"size: {sum(x.size for x in jax.tree.leaves(weights.abstract(ONE))):,} parameters; images as image [4, 4, 1], label []",
        "can: sample, nll, denoise, chain, features, after_step, import_names, import_state",
        "weights: of the last step, step 5",
        f"from: {small}",
    ]


def test_mistakes_are_told_before_anything_is_computed(small: Path):
    model = zoo.load(str(small))
    bare = models.Model(Denoiser(), {}, "raw", None, None, (), small)
    square, uniform = replace(bare, task=Square()), replace(model, task=replace(ONE, noise_type="uniform"))
    image = np.zeros((2, 4, 4, 1), np.float32)
    wrong = {
        r"Model.denoise needs 'denoise', which Square has not; it can: train alone": lambda: square.denoise(image, 1.0),
        r"'denoise', which TarFlow has not \(task.noise_type='uniform'.*\); it can: sample, nll, chain": lambda: (
            uniform.denoise(image, 0.05)
        ),
        r"sigma=1.0 is out of range; TarFlow was made for 0.05 alone": lambda: model.denoise(image, 1.0),
        r"Model.sample needs 'sample', which Denoiser has not; it can: denoise": lambda: bare.sample(1),
        r"Model.nll needs 'nll'": lambda: bare.nll({}),
        r"Model.features needs 'features'": lambda: bare.features({}),
        r"sigma=3.0 is out of range; Denoiser was made for 0.5 to 2.0": lambda: bare.denoise(image, 3.0),
        r"no option 'guidnace'; did you mean 'guidance'\?": lambda: model.sample(2, guidnace=1),
        r"temperature='hot' must be a finite number": lambda: model.sample(2, temperature="hot"),
        r"is an array, and options are parts of the program": lambda: model.sample(2, guidance=jnp.ones(())),
        r"n=0 must be a whole number from 1": lambda: model.sample(0),
        r"seed=-1 must be a whole number from 0": lambda: model.sample(1, -1),
        r"label='cow' is no class; known: cat, dog": lambda: model.sample(1, label="cow"),
        r"prompt='a cat': this model is not conditioned on captions": lambda: model.sample(1, prompt="a cat"),
        r"leave these out": lambda: model.sample(1, conditions={"label": [0]}, label=0),
        r"label has the shape \[3\]; give an array of the shape \[2\]": lambda: model.sample(
            2, conditions={"label": [0] * 3}
        ),
        r"TarFlow takes no 'lable' here; did you mean 'label'\?": lambda: model.sample(1, conditions={"lable": [0]}),
        r"nll: image is missing; give an array of the shape \[N, 4, 4, 1\]": lambda: model.nll({"label": [0]}),
        r"features: image has the shape \[4, 4, 1\]; give": lambda: model.features({"image": image[0]}),
        r"these samples are no images; they hold tokens": lambda: model.sheet({"tokens": image}),
    }
    for message, call in wrong.items():
        with pytest.raises(UserError, match=message):
            call()
    assert not any(program._cache_size() for program in model._programs.values())


def test_a_run_opens_under_its_own_rules(tmp_path: Path):
    own = replace(RUN, task=Square(), rules={"heads": None})
    model = models.open_model(write_run(tmp_path / "run", own, 1), allow=(Square.__module__,))
    same(model.params, state_of(own, 1).ema)


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
        UserError,
        match=r"tiny-flo is neither a folder nor a shipped model, and no config either; did you mean 'tiny-flow'\?",
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
        ('{"task": {"width": 3}}', r"config.json is not a config written by zoo"),
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
    given = models.given_weights({"block0": f"{run}:block1", "": str(tmp_path / "export")}, TASK)
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
        models.given_weights({"block0": f"{run}:blok1"}, TASK)
    with pytest.raises(UserError, match="is neither a folder nor a shipped model"):
        models.given_weights({"": "nowhere:block0"}, TASK)
