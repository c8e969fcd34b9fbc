"""Class agreement: a sampler that copies real images scores as the judge does on them, one that ignores classes by chance."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.data.images import Digits
from zoo.data.synthetic import Synthetic
from zoo.errors import UserError
from zoo.metrics.agreement import Agreement

RNG = jax.random.key(0)


@dataclass(frozen=True)
class Copies:
    """Draws a real digit of the class it is asked for, `shift` classes further on; sample 0 is lost where `lose`."""

    shift: int = 0
    lose: bool = False
    classes: int = 10

    def sample(self, params: Any, rng: Any, n: int, conditions: Any = None, *, noise: float = 0.0) -> dict[str, Any]:
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
    assert found["agreement_std_error"] == pytest.approx(np.sqrt(found["agreement"] * (1 - found["agreement"]) / 40))
    assert (found["judge_train_images"], found["judge_test_images"]) == (1500, 297)
    assert metric(Copies(shift=1), params, Digits(), RNG)["agreement"] < 0.1


def test_lost_samples_count_as_wrong_and_options_reach_the_sampler(params: Any) -> None:
    found = Agreement(samples=40, batch=16)(Copies(lose=True), params, Digits(), RNG)
    assert found["agreement_not_finite"] == 4
    assert found["agreement"] <= 0.9
    noisy = Agreement(samples=40, batch=16, options={"noise": 5.0})(Copies(), params, Digits(), RNG)
    assert noisy["agreement"] < 0.7


def test_mistakes_are_sentences(params: Any) -> None:
    with pytest.raises(UserError, match="samples=0"):
        Agreement(samples=0)
    with pytest.raises(UserError, match="unconditional"):
        Agreement().check(Copies(classes=0))
    with pytest.raises(UserError, match="no option 'nois'"):
        Agreement(options={"nois": 1}).check(Copies())
    with pytest.raises(UserError, match="needs real images with labels"):
        Agreement(samples=8, path=_Bare())(Copies(), params, Digits(), RNG)


class _Bare:
    """Images without labels."""

    def source(self, split: str, spec: Any = None) -> Any:
        return Synthetic(examples=8).source(split, {"image": jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)})
