"""Class agreement: a sampler that copies real images scores as the judge does on them, one that ignores classes by chance."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mistakes import told
from unigram import Listed

from zoo.data.images import Digits
from zoo.data.pipeline import Data
from zoo.data.synthetic import Synthetic
from zoo.diffusion.traces import Trace
from zoo.metrics.agreement import Agreement, Classes
from zoo.task import About

RNG = jax.random.key(0)


@dataclass(frozen=True)
class Noise:
    noise: float = 0.0


@dataclass(frozen=True)
class Copies:
    """Draws a real digit of the class it is asked for, `shift` classes further on; sample 0 is lost where `lose`."""

    shift: int = 0
    lose: bool = False
    classes: int = 10

    Sampling = Noise

    @property
    def about(self) -> About:
        return About(classes=self.classes)

    def sample(self, params: Any, rng: Any, n: int, conditions: Any = None, options: Any = None) -> dict[str, Any]:
        noise = options.noise
        label = (conditions["label"] + self.shift) % 10
        image = params["images"][label] + noise * jax.vmap(lambda k: jax.random.normal(k, (8, 8, 1)))(rng)
        if self.lose:
            image = jnp.where((conditions["label"] == 0)[:, None, None, None], jnp.nan, image)
        return {"image": image}


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    source = Digits().source("test")
    rows = [source[i] for i in range(60)]
    return {"images": jnp.stack([next(r["image"] for r in rows if r["label"] == k) for k in range(10)])}


def test_real_images_agree_and_those_of_other_classes_do_not(params: Any) -> None:
    metric = Agreement(samples=40, batch=16)
    found = metric(Copies(), params, Digits(), RNG)
    assert found["judge_accuracy"] > 0.97
    assert found["agreement"] > 0.95
    share = (40 * found["agreement"] + 2) / 44
    assert found["agreement_std_error"] == pytest.approx(np.sqrt(share * (1 - share) / 44))
    assert (found["judge_train_images"], found["judge_test_images"]) == (1500, 297)
    others = metric(Copies(shift=1), params, Digits(), RNG)
    assert others["agreement"] < 0.1
    assert others["agreement_std_error"] > 0.02


@dataclass(frozen=True)
class InOrder(Data):
    """The digits of `classes` in the order of their classes, as folders of classes give them."""

    classes: tuple[int, ...] = tuple(range(10))

    def source(self, split: str, spec: Any = None) -> Any:
        source = Digits().source(split)
        rows = [source[i] for i in range(len(source))]
        return Listed(row for k in self.classes for row in rows if row["label"] == k)


def test_the_judge_sees_every_class_of_images_in_the_order_of_their_classes(params: Any) -> None:
    metric = Agreement(samples=40, batch=16, train=700, test=120)
    found = metric(Copies(), params, InOrder(), RNG)
    assert (found["judge_train_images"], found["judge_test_images"]) == (700, 120)
    assert found["judge_accuracy"] > 0.95
    assert found["agreement"] > 0.9
    assert metric(Copies(), params, InOrder(), RNG) == found  # the choice is fixed


def test_classes_that_the_judge_cannot_know_are_told(params: Any) -> None:
    with told("train=3", "3 images of the train split have none of", "set train to more, or path"):
        Agreement(samples=8, train=3)(Copies(), params, InOrder(), RNG)
    with told("have none of 2 of task.classes=10 classes (8, 9); set path to"):
        Agreement(samples=8)(Copies(), params, InOrder(tuple(range(8))), RNG)


def test_the_sampler_is_compiled_once(params: Any) -> None:
    traced = []

    class Counted(Copies):
        def sample(self, *args: Any) -> dict[str, Any]:
            traced.append(1)
            return super().sample(*args)

    metric = Agreement(samples=40, batch=16, options={"noise": 0.1})
    first = metric(Counted(), params, Digits(), RNG)
    assert metric(Counted(), params, Digits(), RNG) == first
    assert len(traced) == 1


def test_lost_samples_count_as_wrong_and_options_reach_the_sampler(params: Any) -> None:
    found = Agreement(samples=40, batch=16)(Copies(lose=True), params, Digits(), RNG)
    assert found["agreement_not_finite"] == 4
    assert found["agreement"] <= 0.9
    noisy = Agreement(samples=40, batch=16, options={"noise": 5.0})(Copies(), params, Digits(), RNG)
    assert noisy["agreement"] < 0.7


def test_mistakes_are_sentences(params: Any) -> None:
    with told("unconditional"):
        Agreement().check(Copies(classes=0))
    with told("no option 'nois'"):
        Agreement(options={"nois": 1}).check(Copies())
    for path, words in ((_Bare(), "needs real images with labels"), ("digits", "no data description")):
        with told(words):
            Agreement(samples=8, path=path)(Copies(), params, Digits(), RNG)


def test_what_the_task_and_path_cannot_do_is_known_before_a_step() -> None:
    class Fresh(Copies):
        def init(self, rng: Any) -> dict[str, Any]:
            return {"images": jnp.zeros((10, 8, 8, 1))}

    class Large(Fresh):
        def sample(self, params: Any, *args: Any) -> dict[str, Any]:
            return {"image": jnp.zeros((len(args[0]), 80, 80, 1))}

    class Latent(Fresh):
        def sample(self, *args: Any) -> dict[str, Any]:
            return {"latent": super().sample(*args)["image"]}

    Agreement().check(Fresh())
    Agreement(path=Digits()).check(Fresh())
    for metric, task, words in (
        (Agreement(), Large(), "at most 4,096 numbers, and Large draws some of [80, 80, 1]"),
        (Agreement(), Latent(), "and Latent draws none"),
        (Agreement(path=_Bare()), Fresh(), "gives image in its train split; set path"),
    ):
        with told(words):
            metric.check(task)


class _Bare(Data):
    """Images without labels."""

    def source(self, split: str, spec: Any = None) -> Any:
        return Synthetic(examples=8).source(split, {"image": jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)})


def test_the_share_of_classes_is_that_of_what_is_drawn(params: Any) -> None:
    found = Classes(samples=40, batch=16, wanted=(2, 3))(Copies(shift=1), params, Digits(), RNG)
    assert found["class_5"] == pytest.approx(0.1, abs=0.03)
    assert found["wanted"] == pytest.approx(0.2, abs=0.03)
    assert found["wanted_std_error"] == pytest.approx(np.sqrt(10 / 44 * 34 / 44 / 44), rel=0.2)
    lost = Classes(samples=40, batch=16, wanted=(0,))(Copies(lose=True), params, Digits(), RNG)
    assert (lost["not_finite"], lost["wanted"]) == (4, 0)


class Weighted(Copies):
    """Says that its samples came from islands whose effective share is as their class."""

    def sample(self, params: Any, rng: Any, n: int, conditions: Any = None, options: Any = None) -> dict[str, Any]:
        drawn, whole = super().sample(params, rng, n, conditions, options), jnp.ones((n, 4))
        ess = (conditions["label"] / 10)[:, None] * whole + jnp.asarray([0.5, 0.0, 0.1, 0.5])
        broken = jnp.where(self.lose & (conditions["label"] == 7), 3, -1)[:, None] * jnp.ones((n, 4), int)
        return {**drawn, "trace": Trace(whole, ess, whole > 0, 5 * whole, broken, 2 * whole[:, 0], (), 8)}


def test_how_samples_came_about_is_told_and_a_lost_one_ends_the_metric(params: Any) -> None:
    found = Classes(samples=20, batch=16)(Weighted(), params, Digits(), RNG)
    assert found["ess"] == pytest.approx(0.45)
    assert found["ess_std"] == pytest.approx(np.arange(10).std() / 10)
    assert (found["resampled"], found["roots"], found["log_normaliser"], found["roots_std"]) == (4, 5, 2, 0)
    assert min(found["pictures"]["trace"].size) > 100
    for metric in (Classes, Agreement):
        with told("the energies: the weight of particle 3", "of island 7"):
            metric(samples=20, batch=16)(Weighted(lose=True), params, Digits(), RNG)
