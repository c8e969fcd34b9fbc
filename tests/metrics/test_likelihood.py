"""Bits per dimension and Bayes accuracy against models whose answers are known in closed form."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fresh import noise
from mistakes import told
from unigram import Listed

from zoo import dist
from zoo.data.images import Digits
from zoo.data.pipeline import Data
from zoo.data.synthetic import Synthetic
from zoo.metrics.frechet import moments
from zoo.metrics.likelihood import (
    BayesAccuracy,
    Bits,
    _grey_levels,
    gaussian_bits,
    gaussian_nats,
    histogram_bits,
)
from zoo.papers.tarflow import TarFlow
from zoo.task import About, Likelihood

RNG = jax.random.key(0)


@dataclass(frozen=True)
class Template:
    """nll is the squared distance of the image with noise to params["mean"], plus 100 where a label is given."""

    noise: float = 0.1
    classes: int = 0

    uniform: bool = False

    @property
    def about(self) -> About:
        noisy = Likelihood((8, 8, 1), "noisy", "noisy_bits_per_dim", 1.0, self.noise, replace(self, noise=0.0))
        return About(
            classes=self.classes, likelihood=Likelihood((8, 8, 1), "bound", bins=17 / 2) if self.uniform else noisy
        )

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        spec = {"image": jax.ShapeDtypeStruct((batch, 8, 8, 1), jnp.float32)}
        return {**spec, "label": jax.ShapeDtypeStruct((batch,), jnp.int32)} if self.classes else spec

    def nll(self, params: Any, batch: Mapping[str, jax.Array], keys: jax.Array) -> jax.Array:
        shape = batch["image"].shape[1:]
        image = batch["image"] + self.noise * jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        return jnp.square(image - params["mean"]).sum((1, 2, 3)) + (100.0 if "label" in batch else 0.0)


def held_out() -> tuple[np.ndarray, np.ndarray]:
    source = Digits().source("test")
    rows = [source[i] for i in range(len(source))]
    return np.stack([r["image"] for r in rows]), np.stack([r["label"] for r in rows])


def test_bits_are_the_mean_over_held_out_images() -> None:
    images, _ = held_out()
    found = Bits(batch=128)(Template(noise=0.0), {"mean": 0.5}, Digits(), RNG)
    bits = np.square(images - 0.5).sum((1, 2, 3)) / 64 / math.log(2)
    assert found["noisy_bits_per_dim"] == pytest.approx(bits.mean(), rel=1e-5)
    assert found["noisy_bits_per_dim_std_error"] == pytest.approx(bits.std(ddof=1) / math.sqrt(297), rel=1e-4)
    assert (found["images"], found["draws"], found["split"]) == (297, 1, "test")
    assert "bpd" not in found


def test_bits_do_not_depend_on_the_batch_size_but_on_the_key() -> None:
    def bits(batch: int, rng: jax.Array = RNG) -> float:
        found = Bits(draws=3, batch=batch, limit=20)(Template(noise=1.0), {"mean": 0.0}, Digits(), rng)
        assert found["images"] == 20
        return found["noisy_bits_per_dim"]

    assert bits(7) == pytest.approx(bits(64), rel=1e-6)
    assert bits(7) != pytest.approx(bits(7, jax.random.key(1)), rel=1e-4)


def test_draws_differ_from_each_other_and_from_image_to_image() -> None:
    """The mean of n draws of chi-squared noise has the standard error that independent draws have."""

    class Still(Data):  # the same black image n times
        def source(self, split: str, spec: Any = None) -> Any:
            return Listed([{"image": np.zeros((8, 8, 1), np.float32)}] * 200)

    for draws in (1, 16):
        found = Bits(draws=draws, batch=100)(Template(noise=1.0), {"mean": 0.0}, Still(), RNG)
        error = math.sqrt(2 * 64 / draws) / 64 / math.log(2) / math.sqrt(200)
        assert found["noisy_bits_per_dim_std_error"] == pytest.approx(error, rel=0.2)
        assert found["noisy_bits_per_dim"] == pytest.approx(1 / math.log(2), abs=5 * error)


@dataclass(frozen=True)
class Told(Template):
    """nll is 1, plus 10 where captions are given, plus 100 where what stands for none is not."""

    given: tuple[str, ...] = ("tokens", "null_tokens")

    @property
    def about(self) -> About:
        return replace(super().about, conditions=self.given)

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {**super().spec(batch), **{k: jax.ShapeDtypeStruct((batch, 3), jnp.int32) for k in self.given}}

    def nll(self, params: Any, batch: Mapping[str, jax.Array], keys: jax.Array) -> jax.Array:
        nats = 1.0 + 10.0 * (self.given[0] in batch) + 100.0 * (self.given[1] not in batch)
        return jnp.full(len(batch["image"]), 64 * nats * math.log(2))


@pytest.mark.parametrize("key", ["tokens", "text"])
def test_captions_go_in_only_when_asked_for(key: str) -> None:
    task, data = Told(given=(key, f"null_{key}")), Synthetic(examples=5)
    for label, want in ((False, 1.0), (True, 11.0)):
        found = Bits(batch=4, label=label)(task, {}, data, RNG)
        assert found["noisy_bits_per_dim"] == pytest.approx(want)
        assert found["conditioned"] is label
    assert Bits(batch=4, label=True)(Template(noise=0.0), {"mean": 0.0}, data, RNG)["conditioned"] is False
    without, given = (
        Bits(batch=64, limit=9, label=label)(Template(noise=0.0, classes=10), {"mean": 0.0}, Digits(), RNG)
        for label in (False, True)
    )
    added = given["noisy_bits_per_dim"] - without["noisy_bits_per_dim"]
    assert added == pytest.approx(100 / 64 / math.log(2), rel=1e-5)


def test_an_identity_flow_has_the_bits_of_a_standard_normal() -> None:
    task = TarFlow(
        image=8, channels=1, patch=4, width=8, depth=1, blocks=1, head_dim=8, noise_type="uniform", levels=17
    )
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), dist.unbox(jax.eval_shape(task.init, RNG)))
    found = Bits(draws=8, batch=64, limit=64)(task, params, Digits(), RNG)
    k = np.rint((held_out()[0][:64] + 1) * 8)
    square = np.square(2 * (k + 0.5) / 17 - 1).mean() + (2 / 17) ** 2 / 12
    want = (0.5 * square + 0.5 * math.log(2 * math.pi)) / math.log(2) + math.log2(17 / 2)
    assert found["bpd"] == pytest.approx(want, abs=2e-3)
    assert found["draws"] == 8


def test_baselines_on_the_digits() -> None:
    task = Template(uniform=True)
    found = Bits(batch=297, limit=3, baselines=True)(task, {"mean": 0.0}, Digits(), RNG)
    assert {"histogram_bpd", "gaussian_bpd"} <= set(found)
    train, test = (_grey_levels(Digits(), split, 17, None) for split in ("train", "test"))
    assert (train.shape, test.shape, train.min(), train.max()) == ((1500, 64), (297, 64), 0, 16)
    assert histogram_bits(train, test, 17) == pytest.approx(2.42, abs=0.005)
    assert gaussian_bits(train, test, 17) == pytest.approx(2.94, abs=0.005)


def test_the_histogram_baseline_adds_one() -> None:
    train, test = np.array([[0], [0], [1]]), np.array([[0], [2]])
    assert histogram_bits(train, test, 3) == pytest.approx(-(math.log2(3 / 6) + math.log2(1 / 6)) / 2)


def test_the_gaussian_of_noisy_data_is_that_of_drawn_noise() -> None:
    """Closed form against noise drawn many times, with a variance of its own per example."""
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(50, 2)) @ np.array([[1.0, 0.6], [0.0, 0.5]]), rng.normal(size=(20, 2))
    spread, test_spread = rng.uniform(0.1, 0.5, train.shape), rng.uniform(0.1, 0.5, test.shape)
    x = np.concatenate([train + np.sqrt(spread) * rng.normal(size=train.shape) for _ in range(4_000)])
    y = np.concatenate([test + np.sqrt(test_spread) * rng.normal(size=test.shape) for _ in range(4_000)]) - x.mean(0)
    covariance = np.cov(x, rowvar=False, bias=True)
    nats = 0.5 * np.einsum("nd,de,ne->n", y, np.linalg.inv(covariance), y).mean()
    nats += 0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]
    found = gaussian_nats(moments([train]), spread.mean(0), moments([test]), test_spread.mean(0))
    assert found == pytest.approx(nats, rel=0.02)


def noisy_nats(train: np.ndarray, variance: np.ndarray, test: np.ndarray, test_variance: np.ndarray) -> float:
    """The same from all examples at once, [N, dims] each."""
    covariance = np.cov(train, rowvar=False, bias=True) + np.diag(variance.mean(0))
    off, precision = test - train.mean(0), np.linalg.inv(covariance)
    quadratic = np.einsum("nd,de,ne->n", off, precision, off) + test_variance @ np.diag(precision)
    return 0.5 * (quadratic.mean() + np.linalg.slogdet(2 * np.pi * covariance)[1])


def test_the_gaussian_of_latents_knows_the_spread_of_each() -> None:
    """More examples than are held at once, each with a spread of its own."""
    rng = np.random.default_rng(0)
    mean, std = (rng.normal(size=(1_500, 2, 2, 2)).astype(np.float32) for _ in range(2))

    class Spread(Data):
        def source(self, split: str, spec: Any = None) -> Any:
            part = slice(0, 1_200) if split == "train" else slice(1_200, None)
            return Listed({"latent": m, "latent_std": abs(s)} for m, s in zip(mean[part], std[part]))

    class Latent(Template):
        about = About(likelihood=Likelihood((2, 2, 2), "noisy", "noisy_bits_per_dim", noise=0.1))

        def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
            return {k: jax.ShapeDtypeStruct((batch, 2, 2, 2), jnp.float32) for k in ("latent", "latent_std")}

        def nll(self, params: Any, batch: Mapping[str, jax.Array], keys: jax.Array) -> jax.Array:
            return batch["latent"].sum((1, 2, 3))

    found = Bits(baselines=True)(Latent(), {}, Spread(), RNG)
    rows, variance = (
        mean.reshape(1_500, 8).astype(np.float64),
        np.square(std.astype(np.float64)).reshape(1_500, 8) + 0.01,
    )
    nats = noisy_nats(rows[:1_200], variance[:1_200], rows[1_200:], variance[1_200:]) / 8
    assert found["gaussian_noisy_bits_per_dim"] == pytest.approx(nats / math.log(2), rel=1e-9)


def test_what_says_nothing_is_refused() -> None:
    with told("at most 4096 dimensions; here are 12288", "set baselines=False"):
        Bits(baselines=True).check(TarFlow(image=64, channels=3, width=16, head_dim=16, depth=1, blocks=1))
    with told("unconditional", "use bpd"):
        BayesAccuracy()(Template(), {"mean": 0.0}, Digits(), RNG)


@dataclass(frozen=True)
class Nearest(Template):
    """nll of a class is the squared distance to its template; with any noise left the image drowns in it."""

    classes: int = 10
    noise: float = 1e3

    def nll(self, params: Any, batch: Mapping[str, jax.Array], keys: jax.Array) -> jax.Array:
        shape = batch["image"].shape[1:]
        image = batch["image"] + self.noise * jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        return jnp.square(image - params["mean"][batch["label"]]).sum((1, 2, 3))


def templates() -> np.ndarray:
    source = Digits().source("train")
    rows = [source[i] for i in range(len(source))]
    return np.stack([np.mean([r["image"] for r in rows if r["label"] == c], 0) for c in range(10)])


def test_bayes_accuracy_of_a_nearest_mean_classifier() -> None:
    images, labels = held_out()
    means = templates()
    right = np.square(images[:, None] - means).sum((2, 3, 4)).argmin(1) == labels
    found = BayesAccuracy(batch=64)(Nearest(), {"mean": jnp.asarray(means)}, Digits(), RNG)
    assert found["accuracy"] == pytest.approx(right.mean())
    assert 0.8 < right.mean() < 1
    assert found["accuracy_std_error"] == pytest.approx(right.std() / math.sqrt(297))
    assert (found["accuracy_images"], found["accuracy_draws"], found["accuracy_split"]) == (297, 1, "test")


def test_a_class_that_overflows_is_not_chosen() -> None:
    means = templates()
    means[3] = np.nan
    found = BayesAccuracy(batch=64)(Nearest(), {"mean": jnp.asarray(means)}, Digits(), RNG)
    assert found["accuracy"] > 0.7


def test_dequantised_models_average_draws() -> None:
    task = Nearest(noise=0.01, uniform=True)
    found = BayesAccuracy(batch=64, limit=64, draws=2)(task, {"mean": jnp.asarray(templates())}, Digits(), RNG)
    assert found["accuracy"] > 0.8
    assert found["accuracy_draws"] == 2


def test_two_devices_measure_what_one_does() -> None:
    task = TarFlow(image=8, channels=1, patch=4, width=8, depth=1, blocks=1, head_dim=8)
    params = noise(task)
    bits = Bits(batch=16, limit=24)
    alone = bits(task, params, Digits(), RNG)["noisy_bits_per_dim"]
    mesh = dist.Mesh(fsdp=2).build()
    spread = jax.device_put(params, dist.shardings(jax.eval_shape(task.init, RNG), mesh))
    with dist.use(mesh):
        assert bits(task, spread, Digits(), RNG)["noisy_bits_per_dim"] == pytest.approx(alone, rel=1e-5)
