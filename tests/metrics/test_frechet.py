"""Laws of the Frechet distance, and the metric on samplers whose samples are known."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fresh import fresh
from mistakes import told
from unigram import Listed

from zoo import config, dist
from zoo.data.images import Digits
from zoo.data.pipeline import Data
from zoo.metrics.frechet import Frechet, Moments, frechet_distance, moments
from zoo.papers.tarflow import TarFlow
from zoo.task import About

RNG = jax.random.key(0)


def gaussian(seed: int, count: int = 200, dims: int = 5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, dims)) @ rng.normal(size=(dims, dims)) + rng.normal(size=dims)


def test_moments_are_those_of_all_rows_however_they_come() -> None:
    x = gaussian(0) + 1e3  # a large mean, where sums of squares would cancel
    for parts in ([x], np.split(x, [1, 50, 50, 199]), [x[::-1]]):
        found = moments(iter(parts))
        assert found.count == 200
        np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-13)
        np.testing.assert_allclose(found.covariance, np.cov(x, rowvar=False), rtol=1e-10)
    assert moments([]).count == 0


def test_the_distance_to_itself_is_zero() -> None:
    for count in (200, 4):  # 4 vectors of 5 numbers: a singular covariance
        x = moments([gaussian(0, count)])
        assert frechet_distance(x, x) == pytest.approx(0, abs=1e-12 * np.trace(x.covariance))


def test_the_distance_between_gaussians_in_closed_form() -> None:
    a = Moments(9, np.array([1.0, 2.0]), np.diag([4.0, 9.0]))
    b = Moments(9, np.array([4.0, 6.0]), np.diag([1.0, 0.0]))
    assert frechet_distance(a, b) == pytest.approx(25 + (2 - 1) ** 2 + (3 - 0) ** 2)
    # axes that do not agree: tr sqrt(M) = sqrt(tr M + 2 sqrt det M) for a 2 x 2 matrix M = A B
    c = Moments(9, np.zeros(2), np.array([[2.0, 1.0], [1.0, 3.0]]))
    m = a.covariance @ c.covariance
    want = 5 + 13 + 5 - 2 * math.sqrt(np.trace(m) + 2 * math.sqrt(np.linalg.det(m)))
    assert frechet_distance(a, c) == pytest.approx(want)
    assert frechet_distance(c, a) == pytest.approx(want)


@dataclass(frozen=True)
class Shift:
    shift: float = 0.0


@dataclass(frozen=True)
class Copies:
    """The sampler gives params["image"][label], or NaN where a coin thrown with its own key says so."""

    classes: int = 12
    broken: float = 0.0

    Sampling = Shift

    @property
    def about(self) -> About:
        return About(classes=self.classes)

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        image = jax.ShapeDtypeStruct((batch, 8, 8, 1), jnp.float32)
        return {"image": image, "label": jax.ShapeDtypeStruct((batch,), jnp.int32)}

    def sample(
        self, params: Any, rng: jax.Array, n: int, conditions: Any = None, options: Any = None
    ) -> dict[str, jax.Array]:
        assert rng.shape == (n,)
        bad = jax.vmap(lambda k: jax.random.bernoulli(k, self.broken))(rng)
        image = params["image"][conditions["label"]] + options.shift
        return {"image": jnp.where(bad[:, None, None, None], jnp.nan, image)}


def first(n: int) -> dict[str, jax.Array]:
    source = Digits().source("train")
    return {"image": jnp.stack([source[i]["image"] for i in range(n)])}


PIXELS = Frechet("pixels", samples=12, limit=12, batch=5)


def test_copies_of_the_data_are_at_distance_zero() -> None:
    found = PIXELS(Copies(), first(12), Digits(), RNG)
    assert found["frechet"] == pytest.approx(0, abs=1e-9)
    assert found == {
        **found,
        "frechet_features": "pixels",
        "frechet_samples": 12,
        "frechet_images": 12,
        "frechet_split": "train",
        "frechet_flip": 0,
        "frechet_labels": "balanced",
        "frechet_conditions": "balanced labels",
        "frechet_options": "{}",
        "frechet_resampled": 0,
        "frechet_left_out": 0,
    }
    assert replace(PIXELS, split="test")(Copies(), first(12), Digits(), RNG)["frechet"] > 0.1


def test_options_reach_the_sampler() -> None:
    found = replace(PIXELS, options={"shift": 5.0})(Copies(), first(12), Digits(), RNG)  # clipped: white images
    pixels = np.trunc((np.asarray(first(12)["image"]) + 1) / 2 * 255).reshape(12, -1) / 255
    want = np.square(1 - pixels.mean(0)).sum() + pixels.var(0, ddof=1).sum()
    assert found["frechet"] == pytest.approx(want, rel=1e-5)
    assert found["frechet_options"] == '{"shift": 5.0}'
    with told("no option 'shiftt'; did you mean 'shift'?"):
        replace(PIXELS, options={"shiftt": 5.0})(Copies(), first(12), Digits(), RNG)
    assert config.override(Frechet(), ["features=pixels", "options={'shift': 5.0}"]).options == {"shift": 5.0}


def test_samples_that_are_not_finite_are_drawn_again_and_counted() -> None:
    found = PIXELS(Copies(broken=0.3), first(12), Digits(), RNG)
    assert found["frechet_resampled"] > 0
    assert found["frechet_samples"] + found["frechet_left_out"] == 12
    again = replace(PIXELS, batch=12)(Copies(broken=0.3), first(12), Digits(), RNG)
    assert again["frechet"] == pytest.approx(found["frechet"], abs=1e-9)
    assert again["frechet_resampled"] == found["frechet_resampled"]
    none = PIXELS(Copies(broken=1.0), first(12), Digits(), RNG)
    assert math.isnan(none["frechet"])
    assert (none["frechet_resampled"], none["frechet_left_out"], none["frechet_samples"]) == (36, 12, 0)


def test_mirroring_is_a_setting_of_the_reference_and_follows_the_data() -> None:
    @dataclass(frozen=True)
    class Flipped(Digits):
        flip: bool = True

    plain = PIXELS(Copies(), first(12), Digits(), RNG)
    chosen = replace(PIXELS, flip=True)(Copies(), first(12), Digits(), RNG)
    assert chosen["frechet"] > plain["frechet"] + 0.1
    assert chosen["frechet_flip"] == 1
    other_batch = replace(PIXELS, flip=True, batch=12)(Copies(), first(12), Digits(), RNG)
    assert other_batch["frechet"] == pytest.approx(chosen["frechet"], rel=1e-6)
    assert PIXELS(Copies(), first(12), Flipped(), RNG)["frechet"] == pytest.approx(chosen["frechet"], rel=1e-6)
    assert replace(PIXELS, flip=False)(Copies(), first(12), Flipped(), RNG)["frechet"] == pytest.approx(0, abs=1e-9)


def test_statistics_are_kept_and_refused_for_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "deep" / "stats.npz"
    metric = replace(PIXELS, reference=str(file), options={"shift": 0.5})
    written = metric(Copies(), first(12), Digits(), RNG)
    assert [p.name for p in file.parent.iterdir()] == ["stats.npz"]
    with monkeypatch.context() as patch:
        patch.setattr("zoo.metrics.frechet.epoch", lambda *_, **__: pytest.fail("the statistics were measured again"))
        assert metric(Copies(), first(12), Digits(), RNG) == written
        assert replace(metric, batch=12)(Copies(), first(12), Digits(), RNG)["frechet"] == pytest.approx(
            written["frechet"]
        )
    for other in (replace(metric, flip=True), replace(metric, limit=11), replace(metric, split="test")):
        with told("stats.npz was made with other settings (", " -> ", "remove it"):
            other(Copies(), first(12), Digits(), RNG)
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(64), sigma=np.eye(64))
    file.write_bytes(file.read_bytes()[:-100])
    for place in (file, tmp_path / "foreign.npz", file / "below"):
        with told(place.name):
            replace(metric, reference=str(place))(Copies(), first(12), Digits(), RNG)


def test_features_of_a_network_on_one_device_and_eight(tmp_path: Path) -> None:
    flow = TarFlow(image=8, channels=1, patch=4, width=8, depth=1, blocks=1, head_dim=8)
    params = fresh(flow)
    params = jax.device_put(params, jax.sharding.NamedSharding(dist.Mesh(data=1).build(jax.devices()[:1]), jax.P()))
    network = SimpleNamespace(task=flow, params=params)
    metric = replace(PIXELS, features="runs/flow", reference=str(tmp_path / "stats.npz"), options={"shift": 0.3})
    assert metric.opens() == "runs/flow"
    alone = metric(Copies(), first(12), Digits(), RNG, network=network)
    assert alone["frechet"] > 0
    assert alone["frechet_features"].startswith("runs/flow (TarFlow, weights ")
    mesh = dist.Mesh().build()
    with dist.use(mesh):
        spread = jax.device_put(first(12), jax.sharding.NamedSharding(mesh, jax.P()))
        found = replace(metric, reference=None)(Copies(), spread, Digits(), RNG, network=network)
    assert found["frechet"] == pytest.approx(alone["frechet"], rel=1e-3)
    other = SimpleNamespace(task=flow, params=jax.tree.map(lambda x: x + 1, params))
    with told("made with other settings (features: "):
        metric(Copies(), first(12), Digits(), RNG, network=other)


def test_features_that_do_not_fit_are_refused() -> None:
    class Sick(TarFlow):
        def features(self, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
            return batch["image"].reshape(len(batch["image"]), -1) / 0

    sick = SimpleNamespace(task=Sick(image=8, channels=1, width=8, head_dim=8), params={})
    for features, network, words in (
        ("", None, "or features=RUN_OR_EXPORT"),
        ("runs/x", None, "not open; pass network=zoo.models.open_model('runs/x')"),
        ("runs/x", SimpleNamespace(task=Copies(), params={}), "Copies has no features, it can: sample"),
        ("runs/x", SimpleNamespace(task=TarFlow(), params={}), "takes [64, 64, 3], the model makes"),
        ("runs/x", sick, "features that are not finite"),
    ):
        with told(words):
            replace(PIXELS, features=features)(Copies(), first(12), Digits(), RNG, network=network)


def test_samples_that_are_no_small_images_are_told() -> None:
    class Big(Copies):
        def init(self, rng: Any) -> dict[str, jax.Array]:
            return {}

        def sample(self, params: Any, rng: Any, n: int, conditions: Any = None, options: Any = None) -> Any:
            return {"image": jnp.zeros((n, 64, 64, 3))}

    class Text(Big):
        def sample(self, params: Any, rng: Any, n: int, conditions: Any = None, options: Any = None) -> Any:
            return {"tokens": jnp.zeros((n, 64), jnp.int32)}

    for task, words in ((Big(), "12,288 numbers, and at most 4,096"), (Text(), "compares images, and Text draws none")):
        with told(words):
            PIXELS(task, {}, Digits(), RNG)
        with told(words):
            PIXELS.check(task)


@dataclass(frozen=True)
class Decoded:
    """A model of latents: its sampler gives images, those of params["image"] in the order of the captions."""

    text: bool = True

    Sampling = Shift

    @property
    def about(self) -> About:
        return About(conditions=("tokens", "null_tokens") if self.text else ())

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        latent = {"latent": jax.ShapeDtypeStruct((batch, 4, 4, 2), jnp.float32)}
        return {**latent, **{key: jax.ShapeDtypeStruct((batch, 3), jnp.int32) for key in self.about.conditions}}

    def init(self, rng: jax.Array) -> dict[str, jax.Array]:
        return {"image": jnp.zeros((12, 8, 8, 1))}

    def sample(
        self, params: Any, rng: Any, n: int, conditions: Any = None, options: Any = None
    ) -> dict[str, jax.Array]:
        assert (conditions is not None) == self.text
        which = conditions["tokens"][:, 0] - conditions["null_tokens"][:, 0] if self.text else jnp.zeros(n, jnp.int32)
        return {"latent": jnp.zeros((n, 4, 4, 2)), "image": params["image"][which]}


@dataclass(frozen=True)
class Captioned(Data):
    """Latents whose test split has `count` captions: the number of the example in each token, beside an empty one of 0."""

    count: int = 12

    def source(self, split: str, spec: Any = None) -> Any:
        null = np.zeros(3, np.int32)
        return Listed(
            {
                "latent": np.zeros((4, 4, 2), np.float32),
                "tokens": null + (i if split == "test" else 0),
                "null_tokens": null,
            }
            for i in range(self.count)
        )


def test_a_model_of_latents_is_compared_with_the_images_of_path_by_held_out_captions() -> None:
    metric = replace(PIXELS, path=Digits())
    metric.check(Decoded())
    found = metric(Decoded(), first(12), Captioned(), RNG)
    assert found["frechet"] == pytest.approx(0, abs=1e-9)
    assert (found["frechet_labels"], found["frechet_conditions"]) == ("none", "captions of the test split")
    # 5 captions in turn are the first 5 images, of each of which two or three are drawn, whatever the batch
    pixels = np.trunc((np.asarray(first(5)["image"]) + 1) / 2 * 255).reshape(5, -1) / 255
    reference = moments([np.trunc((np.asarray(first(12)["image"]) + 1) / 2 * 255).reshape(12, -1) / 255])
    want = frechet_distance(moments([pixels[np.arange(12) % 5]]), reference)
    for batch in (3, 5, 12, 32):
        few = replace(metric, batch=batch)(Decoded(), first(12), Captioned(5), RNG)
        assert few["frechet"] == pytest.approx(want, rel=1e-5)
    plain = metric(Decoded(text=False), first(12), Captioned(), RNG)
    assert (plain["frechet_labels"], plain["frechet_conditions"]) == ("none", "none")


def test_data_without_such_images_are_refused() -> None:
    with told("images of [8, 8, 1]", "data=Captioned gives latent, tokens,", "in its train split; set path to"):
        PIXELS(Decoded(), first(12), Captioned(), RNG)
    large = {"image": jnp.zeros((12, 16, 16, 1))}
    with told("images of [16, 16, 1]", "path=Digits gives images of [8, 8, 1], label"):
        replace(PIXELS, path=Digits())(Decoded(), large, Captioned(), RNG)
    with told("has no test examples"):
        replace(PIXELS, path=Digits())(Decoded(), first(12), _Untested(), RNG)


class _Untested(Captioned):
    def source(self, split: str, spec: Any = None) -> Any:
        return _NoRows(super().source(split, spec)) if split == "test" else super().source(split, spec)


class _NoRows(Listed):
    def __len__(self) -> int:
        return 0
