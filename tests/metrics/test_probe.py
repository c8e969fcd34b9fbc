"""Probes of features: of features that hold the answer, of noise, and of fresh parameters; mistakes are sentences."""

import json
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mistakes import told
from unigram import Listed

from zoo import cli, models
from zoo.data.images import Arrays, Digits, Images
from zoo.data.pipeline import Data
from zoo.data.series import Series
from zoo.metrics.probe import Accuracy, Neighbours, Probe, explained
from zoo.papers.part.metrics import Localise
from zoo.task import About, Metric

RNG = jax.random.key(0)


@dataclass(frozen=True)
class Rows(Data):
    """Images 8x8x1 whose first pixel says the class k of three, 0.4 k - 0.5; in the order of their classes, as folders are."""

    train: int = 90
    test: int = 60
    label: bool = True
    kinds: int = 3

    def source(self, split: str, spec: Any = None) -> Any:
        count = {"train": self.train, "test": self.test}[split]
        rng = np.random.default_rng(len(split))
        rows = []
        for label in np.sort(np.arange(count) % self.kinds):
            image = rng.uniform(-1, 1, (8, 8, 1)).astype(np.float32)
            image[0, 0] = 0.4 * label - 0.5
            rows.append({"image": image} | ({"label": np.asarray(label, np.int32)} if self.label else {}))
        return Listed(rows)


@dataclass(frozen=True)
class Toy:
    """Features that are the class (`kind="told"`) or pixels that know nothing of it; patches that tell their place, or don't."""

    kind: str = "told"
    axes: int = 2
    patches: int = 6
    about = About(buffers=("frozen",))

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {"image": jax.ShapeDtypeStruct((batch, 8, 8, 1), jnp.float32)}

    def init(self, rng: Any) -> Any:
        return {"gain": jnp.zeros(()), "frozen": jnp.zeros(())}

    def features(self, params: Any, batch: Any) -> jax.Array:
        assert set(batch) == {"image"}  # no label
        if self.kind == "noise":
            return batch["image"][:, 1:].reshape(len(batch["image"]), -1)
        told = jnp.rint((batch["image"][:, 0, 0, 0] + 0.5) / 0.4).astype(int)
        return params["gain"] * params["frozen"] * jax.nn.one_hot(told, 3)

    def logits(self, params: Any, batch: Any) -> jax.Array:
        return 5 * self.features(params, batch)

    def off_grid(self, params: Any, batch: Any, rng: Any) -> Any:
        place, scale, noise = jax.random.split(rng, 3)
        shape = (len(batch["image"]), self.patches, self.axes)
        start = jax.random.uniform(place, shape, minval=0, maxval=4)
        size = jnp.full(shape, 3.0) + (0 if self.kind == "told" else jax.random.uniform(scale, shape))
        tokens = start if self.kind == "told" else jax.random.normal(noise, shape)
        return params["gain"] * tokens, jnp.stack([start, size], -2)


PARAMS = {"gain": jnp.ones(()), "frozen": jnp.ones(())}
SMALL = {"train": 60, "test": 30, "batch": 16}


def test_features_that_are_the_label_score_one_and_fresh_ones_chance() -> None:
    found = Probe(**SMALL, baseline=True)(Toy(), PARAMS, Rows(), RNG)
    assert (found["probe_accuracy"], found["probe_converged"], found["probe_classes"]) == (1, True, 3)
    assert (found["probe_train"], found["probe_test"]) == (60, 30)  # a batch does not divide them
    assert 0.2 < found["probe_accuracy_random"] < 0.5  # gain 0: all the same
    assert found["probe_std_error"] == pytest.approx(np.sqrt(32 / 34 * 2 / 34 / 34))
    near = Neighbours(**SMALL, k=3, baseline=True)(Toy(), PARAMS, Rows(), RNG)
    assert (near["knn_accuracy"], near["knn_k"]) == (1, 3)
    assert 0.2 < near["knn_accuracy_random"] < 0.5


def test_noise_is_at_chance_and_the_choice_is_fixed() -> None:
    found = Probe(**SMALL)(Toy("noise"), PARAMS, Rows(), RNG)
    assert 0.05 < found["probe_accuracy"] < 0.65
    assert Probe(**SMALL)(Toy("noise"), PARAMS, Rows(), jax.random.key(1)) == found
    assert Neighbours(**SMALL)(Toy("noise"), PARAMS, Rows(), RNG)["knn_accuracy"] < 0.65
    assert "probe_accuracy_random" not in found


def test_pixels_of_digits_are_told_apart() -> None:
    """A figure that is known: neighbours of pixels are right on nearly all of scikit-learn's digits."""

    class Pixels(Toy):
        def features(self, params: Any, batch: Any) -> jax.Array:
            return batch["image"].reshape(len(batch["image"]), -1)

    assert Neighbours(train=1000, k=5)(Pixels(), PARAMS, Digits(), RNG)["knn_accuracy"] > 0.93
    assert Probe(train=200)(Pixels(), PARAMS, Digits(), RNG)["probe_accuracy"] > 0.85
    assert Probe(**SMALL, path=Rows())(Toy(), PARAMS, Rows(label=False), RNG)["probe_accuracy"] == 1  # other data


def test_labels_that_are_missing_or_all_the_same_are_sentences() -> None:
    for metric in (Probe(), Neighbours(), Accuracy()):
        with told(f"{metric.name} needs labels, and data=Rows gives image alone in its t"):
            metric.check_data(Toy(), Rows(label=False))
    with told("the 60 training images are all of class 0"):
        Probe(**SMALL)(Toy(), PARAMS, Rows(kinds=1), RNG)
    with told("k=91", "more than the 90 training examples"):
        Neighbours(k=91)(Toy(), PARAMS, Rows(), RNG)
    with told("k=11", "more than train=10"):
        Neighbours(k=11, train=10)
    with told("Toy.features gives numbers that are not finite"):
        Probe(**SMALL)(Toy(), PARAMS | {"gain": jnp.array(jnp.nan)}, Rows(), RNG)
    with told("path='digits'", "no data description; on the command line write data=digits,"):
        Probe(path="digits").check_data(Toy(), Rows())


def test_what_is_looked_at_is_opened_before_a_run(monkeypatch: Any) -> None:
    """Every split, its first example against the task, and how many patches there are; nothing is computed."""
    monkeypatch.setattr(Toy, "features", None)
    for metric in (Probe(), Localise(), Neighbours()):
        metric.check_data(Toy(), Rows())
        for split in ("train", "test"):
            with told(f"the metric {metric.name}: data=Rows has no {split} examples"):
                metric.check_data(Toy(), Rows(**{split: 0}))
    for metric, task, data, words in (
        (Localise(), Toy(), Wide(), "data=Wide does not fit the task: 'image'"),
        (Probe(path=Wide()), Toy(), Rows(), "data=Wide does not fit the task: 'image'"),
        (Localise(), Toy(patches=1), Rows(), "localise compares patches, and Toy cuts 1 from an image"),
    ):
        with told(words):
            metric.check_data(task, data)


@dataclass(frozen=True)
class Wide(Rows):
    """Its test images are of another size than its training images."""

    def source(self, split: str, spec: Any = None) -> Any:
        rows = super().source(split, spec)
        return rows if split == "train" else Listed({**row, "image": np.zeros((8, 9, 1), np.float32)} for row in rows)


def test_accuracy_and_cross_entropy_of_a_classifier() -> None:
    found = Accuracy(batch=16)(Toy(), PARAMS, Rows(), RNG)
    assert (found["accuracy"], found["examples"], found["split"]) == (1, 60, "test")
    assert found["nll"] == pytest.approx(np.log(1 + 2 * np.exp(-5)), rel=1e-5)
    assert found["nll_std_error"] == pytest.approx(0, abs=1e-6)
    part = Accuracy(batch=16, limit=10, split="train")(Toy(), {**PARAMS, "gain": jnp.zeros(())}, Rows(), RNG)
    assert part["examples"] == 10
    assert 0 < part["accuracy"] < 1  # all get class 0; the choice is of several classes
    assert part["nll"] == pytest.approx(np.log(3))
    with told("labels out of range: ", "has 0 to 3, the classifier 0 to 2"):
        Accuracy(batch=16)(Toy(), PARAMS, Rows(kinds=4), RNG)


def test_a_guess_of_the_mean_explains_nothing() -> None:
    assert explained(np.zeros((4, 1)), np.array([[-1.0], [1], [-1], [1]])).tolist() == [0]


def test_tokens_that_tell_the_place_localise_and_noise_does_not() -> None:
    metric = Localise(train=60, test=30, pairs=8, batch=32, baseline=True)
    found = metric(Toy(), PARAMS, Rows(), RNG)
    assert found["localise_r2"] == pytest.approx(1, abs=0.01)
    assert found["localise_r2"] == pytest.approx((found["localise_r2_dx"] + found["localise_r2_dy"]) / 2)
    assert abs(found["localise_r2_random"]) < 0.1  # gain 0
    assert (found["localise_train"], found["localise_test"], found["localise_pairs"]) == (60, 30, 8)
    series = Localise(train=20, test=20, batch=20)(Toy(axes=1), PARAMS, Rows(), RNG)  # they have one axis
    assert series["localise_r2_dt"] == series["localise_r2"] == pytest.approx(1, abs=0.01)
    noise = Localise(train=60, test=30, pairs=8, batch=32)(Toy("noise"), PARAMS, Rows(label=False), RNG)
    assert noise["localise_r2"] < 0.1


# --- other data by `zoo eval` ---------------------------------------------------------------------


@dataclass(frozen=True)
class Counted(Metric):
    """How many test examples there are."""

    name = "counted"

    def __call__(self, task: Any, params: Any, data: Any, rng: Any) -> dict[str, Any]:
        return {"count": len(data.source("test", task.spec(1)))}


@dataclass(frozen=True)
class Reads:
    """A task that reads one key."""

    key: str
    shape: tuple[int, ...]

    about = About()

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {self.key: jax.ShapeDtypeStruct((batch, *self.shape), jnp.float32)}


@pytest.fixture
def measured(tmp_path: Any, monkeypatch: Any, capsys: Any) -> Any:
    """`zoo eval` with these fields on a model of this task and data: the data it names and the count, or the error."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (6, 8, 8), np.uint8), np.arange(6) % 2
    np.savez(tmp_path / "part.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    np.savetxt(tmp_path / "wave.csv", rng.normal(size=(80, 1)), delimiter=",")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("zoo.metrics.named", lambda: {"counted": Counted, "probe": Probe, "localise": Localise})

    def run(task: Any, data: Any, *fields: str, metric: str = "counted") -> Any:
        model = models.Model(task, PARAMS, "raw", 8, data, (), tmp_path)
        monkeypatch.setattr(models, "open_model", lambda *a, **k: model)
        monkeypatch.setattr(models, "open_task", lambda *a, **k: (task, tmp_path))
        code = cli.main(["eval", "model", metric, *fields])
        out, err = capsys.readouterr()
        assert code == (2 if err else 0), err
        return err.strip() or json.loads(out)

    return run


IMAGE, SERIES = Reads("image", (8, 8, 1)), Reads("series", (16, 1))


def test_a_path_stands_for_images_or_series_that_fit_the_task(measured: Any) -> None:
    """Digits have no path: a description is made. Data with one keep their other fields."""
    found = measured(IMAGE, Digits(), "data=part.npz")
    assert found["count"] == 6
    assert (found["data"]["path"], found["data"]["size"], found["data"]["channels"]) == ("part.npz", 8, 1)
    assert measured(IMAGE, None, "data=part.npz", "data.flip=true")["data"]["flip"] is True
    found = measured(SERIES, Digits(), "data=wave.csv", "data.test_fraction=0.4", "data.hop=8")
    assert (found["count"], found["data"]["length"]) == (3, 16)  # 32 time steps
    found = measured(SERIES, Series("gone.csv", length=16, hop=4), "data=wave.csv")
    assert (found["data"]["path"], found["data"]["hop"]) == ("wave.csv", 4)
    found = measured(IMAGE, Images("gone", 8, channels=1, flip=True), "data=part.npz")
    assert (found["data"]["path"], found["data"]["flip"]) == ("part.npz", True)
    assert measured(IMAGE, Arrays("gone.npz", flip=True), "data=part.npz")["data"]["flip"] is True


def test_other_data_that_cannot_be_are_sentences(measured: Any) -> None:
    gone = "data=gone.npz is no path of a file or folder that exists; give one, or tfds:NAME"
    assert gone in measured(IMAGE, Digits(), "data=gone.npz")
    shown = measured(SERIES, Series("wave.csv", length=16), "data=16")
    assert "or set fields of the model's own data (Series): data.path, data.length, data.hop" in shown
    assert "data is set twice" in measured(IMAGE, Digits(), "data=part.npz", "data=wave.csv")
    assert "data.path is set twice" in measured(SERIES, Series("wave.csv", 16), "data=wave.csv", "data.path=wave.csv")
    assert "no field data.hop in Images" in measured(IMAGE, Digits(), "data=part.npz", "data.hop=2")
    assert "Reads reads tokens, and a path is for images" in measured(Reads("tokens", (4,)), Digits(), "data=part.npz")
    assert "tfds:nothing is not on disk" in measured(IMAGE, Digits(), "data=tfds:nothing", "data.data_dir=here")
    assert "does not say what data it was trained on; give data=PATH" in measured(IMAGE, None)
    shown = measured(Toy(), Digits(), "path=part.npz", metric="probe")
    assert "on the command line write data=part.npz" in shown
