"""What vision transformers share: a trunk that gives each layer its own values, and fixed codes of positions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from zoo import weights
from zoo.nn.embed import sincos
from zoo.nn.transformer import Trunk


class Affine(nn.Module):
    """h times a learned number, plus two numbers it is given: what a layer gets can be read off what it gives."""

    @nn.compact
    def __call__(
        self, h: jax.Array, cache: Any, index: Any, layer: Any, shift: jax.Array = jnp.zeros(()), own: Any = 0.0
    ) -> tuple[jax.Array, Any]:
        by: Any = self.param("by", nn.initializers.ones, (h.shape[-1],), jnp.float32)
        return h * by + shift + own, cache


@pytest.mark.parametrize(("scan", "remat"), [(True, "none"), (False, "full"), (True, "full")])
def test_each_layer_gets_its_own_row_and_all_get_the_rest(scan: bool, remat: str) -> None:
    rng = np.random.default_rng(0)
    h, by, own, shift = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 4, 3), (3, 3), (3, 2, 1, 1), ()))
    params = {"block": {"by": by}} if scan else {f"layer{i}": {"by": row} for i, row in enumerate(by)}
    trunk = Trunk(3, Affine(parent=None), scan, remat)

    @functools.partial(jax.jit, static_argnums=0)
    def run(given: bool, params: Any) -> jax.Array:
        return trunk.apply({"params": params}, h, each={"own": own} if given else None, shift=shift)[0]

    for given in (True, False):
        expected = h
        for l in range(3):
            expected = expected * by[l] + shift + (own[l] if given else 0)
        np.testing.assert_allclose(run(given, params), expected, atol=1e-5)
    assert weights.flatten(weights.matching(params, {"block": {"by": by}}))["block/by"].shape == (3, 3)


def test_codes_are_sines_then_cosines_of_each_axis() -> None:
    places = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 7.5]])
    found = sincos(places, 16, base=100.0)
    assert found.dtype == np.float32
    assert found.shape == (3, 16)
    for t, k in np.ndindex(3, 16):
        axis, part, rate = k // 8, k // 4 % 2, k % 4
        angle = places[t, axis] * 100.0 ** (-rate / 4)
        assert found[t, k] == pytest.approx((np.sin, np.cos)[part](angle), abs=1e-6), (t, k)
    np.testing.assert_array_equal(sincos(places[:, :1], 8, base=100.0), found[:, :8])


@pytest.mark.parametrize(("axes", "width"), [(2, 10), (2, 6), (1, 5)])
def test_codes_of_a_width_that_cannot_be_shared_out_are_refused(axes: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"codes of {width} numbers cannot be shared out among {axes} axes"):
        sincos(np.zeros((3, axes)), width)
