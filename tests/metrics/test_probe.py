"""Probes of features: of features that hold the answer, of noise, and of fresh parameters; mistakes are sentences."""

import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.data.images import Digits
from zoo.errors import UserError
from zoo.metrics import named
from zoo.metrics.probe import Accuracy, Localise, Neighbours, Probe, explained, offsets

RNG = jax.random.key(0)


@dataclass(frozen=True)
class Rows:
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
        return rows


@dataclass(frozen=True)
class Toy:
    """Features that are the class (`kind="told"`) or pixels that know nothing of it; patches that tell their place, or don't."""

    kind: str = "told"
    axes: int = 2
    patches: int = 6
    held = ("frozen",)

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


def test_all_examples_are_used_where_more_are_asked_for_and_no_warning_is_heard() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Probe(batch=64, iterations=1)(Toy("noise"), PARAMS, Rows(), RNG)
    assert (found["probe_train"], found["probe_test"], found["probe_converged"]) == (90, 60, False)


def test_pixels_of_digits_are_told_apart() -> None:
    """A figure that is known: neighbours of pixels are right on nearly all of scikit-learn's digits."""

    class Pixels(Toy):
        def features(self, params: Any, batch: Any) -> jax.Array:
            return batch["image"].reshape(len(batch["image"]), -1)

    assert Neighbours(train=1000, k=5)(Pixels(), PARAMS, Digits(), RNG)["knn_accuracy"] > 0.93
    assert Probe(train=200)(Pixels(), PARAMS, Digits(), RNG)["probe_accuracy"] > 0.85


def test_other_data_by_path() -> None:
    found = Probe(**SMALL, path=Rows())(Toy(), PARAMS, Rows(label=False), RNG)
    assert found["probe_accuracy"] == 1
    with pytest.raises(UserError, match=r"path='digits' .* no data description"):
        Probe(path="digits").check_data(Toy(), Rows())


def test_labels_that_are_missing_or_all_the_same_are_sentences() -> None:
    for metric in (Probe(), Neighbours(), Accuracy()):
        with pytest.raises(UserError, match=rf"{metric.name} needs labels, and data=Rows gives image alone in its t"):
            metric.check_data(Toy(), Rows(label=False))
        with pytest.raises(UserError, match="needs labels"):
            metric(Toy(), PARAMS, Rows(label=False), RNG)
    with pytest.raises(UserError, match="the 60 training images are all of class 0"):
        Probe(**SMALL)(Toy(), PARAMS, Rows(kinds=1), RNG)
    with pytest.raises(UserError, match="no test examples"):
        Probe().check_data(Toy(), Rows(test=0))
    with pytest.raises(UserError, match=r"k=91 .* more than the 90 training images"):
        Neighbours(k=91)(Toy(), PARAMS, Rows(), RNG)


def test_fields_out_of_range_are_sentences() -> None:
    for make, words in (
        (lambda: Probe(train=0), "train=0 of the metric probe"),
        (lambda: Probe(inverse_penalty=0), "inverse_penalty=0"),
        (lambda: Neighbours(k=0), "k=0 of the metric knn"),
        (lambda: Neighbours(k=11, train=10), "k=11 .* more than train=10"),
        (lambda: Localise(pairs=0), "pairs=0 of the metric localise"),
        (lambda: Localise(ridge=-1.0), "ridge=-1.0"),
        (lambda: Accuracy(limit=0), "limit=0 of the metric accuracy"),
    ):
        with pytest.raises(UserError, match=words):
            make()


def test_weights_that_diverged_are_told() -> None:
    with pytest.raises(UserError, match=r"Toy\.features gives numbers that are not finite"):
        Probe(**SMALL)(Toy(), PARAMS | {"gain": jnp.array(jnp.nan)}, Rows(), RNG)


def test_accuracy_and_cross_entropy_of_a_classifier() -> None:
    found = Accuracy(batch=16)(Toy(), PARAMS, Rows(), RNG)
    assert (found["accuracy"], found["examples"], found["split"]) == (1, 60, "test")
    assert found["nll"] == pytest.approx(np.log(1 + 2 * np.exp(-5)), rel=1e-5)
    assert found["nll_std_error"] == pytest.approx(0, abs=1e-6)
    part = Accuracy(batch=16, limit=10, split="train")(Toy(), {**PARAMS, "gain": jnp.zeros(())}, Rows(), RNG)
    assert part["examples"] == 10
    assert 0 < part["accuracy"] < 1  # all get class 0; the choice is of several classes
    assert part["nll"] == pytest.approx(np.log(3))
    with pytest.raises(UserError, match=r"labels out of range: .* has 0 to 3, the classifier 0 to 2"):
        Accuracy(batch=16)(Toy(), PARAMS, Rows(kinds=4), RNG)


def test_offsets_of_the_spec_by_hand() -> None:
    boxes = np.array([[[0, 0], [8, 4]], [[8, 4], [4, 8]]], float)  # (0, 0, 8, 4) and (8, 4, 12, 12)
    assert offsets(boxes, np.array([0]), np.array([1])).tolist() == [[0.75, 1.5]]
    assert explained(np.zeros((4, 1)), np.array([[-1.0], [1], [-1], [1]])).tolist() == [0]


def test_tokens_that_tell_the_place_localise_and_noise_does_not() -> None:
    metric = Localise(train=60, test=30, pairs=8, batch=32, baseline=True)
    found = metric(Toy(), PARAMS, Rows(), RNG)
    assert found["localise_r2"] == pytest.approx(1, abs=0.01)
    assert found["localise_r2"] == pytest.approx((found["localise_r2_dx"] + found["localise_r2_dy"]) / 2)
    assert abs(found["localise_r2_random"]) < 0.1  # gain 0
    assert (found["localise_train"], found["localise_test"], found["localise_pairs"]) == (60, 30, 8)
    noise = Localise(train=60, test=30, pairs=8, batch=32)(Toy("noise"), PARAMS, Rows(label=False), RNG)
    assert noise["localise_r2"] < 0.1


def test_series_have_one_axis_and_a_single_patch_has_no_pairs() -> None:
    found = Localise(train=20, test=20, batch=20)(Toy(axes=1), PARAMS, Rows(), RNG)
    assert found["localise_r2_dt"] == found["localise_r2"] == pytest.approx(1, abs=0.01)
    with pytest.raises(UserError, match="cuts 1 from an image"):
        Localise(train=20, test=20, batch=20)(Toy(patches=1), PARAMS, Rows(), RNG)


def test_they_are_found_by_name() -> None:
    assert {"probe", "knn", "accuracy", "localise", "relations"} <= set(named())
