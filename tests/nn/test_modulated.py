"""The modulated block: the identity when fresh, the same in a scan, with a cache and for each token, and no option without effect."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo import dist
from zoo.nn.attention import init_cache
from zoo.nn.embed import grid_positions, rope_angles
from zoo.nn.modulated import ModulatedBlock
from zoo.nn.transformer import Trunk

ALL: dict[str, Any] = {"norm": "rms", "gated": True, "qk_norm": True, "causal": True}
H = jax.random.normal(jax.random.key(0), (2, 6, 8))
MODULATION = jax.random.normal(jax.random.key(1), (2, 48))
ROPE = jnp.asarray(rope_angles(grid_positions(2, 3, 3.0), (1, 1)))


def block(**fields: Any) -> ModulatedBlock:
    return ModulatedBlock(4, parent=None, **fields)


def randomised(module: Any) -> Any:
    shapes = dist.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), H, modulation=MODULATION)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), shapes)


def test_a_fresh_block_is_the_identity() -> None:
    zeros = jnp.zeros_like(MODULATION)
    made = dist.unbox(block(**ALL).init(jax.random.key(0), H, modulation=zeros))
    np.testing.assert_array_equal(block(**ALL).apply(made, H, modulation=zeros)[0], H)


def test_scanned_layers_equal_blocks_one_after_the_other() -> None:
    trunk = Trunk(3, block(**ALL), remat="full")
    params = randomised(trunk)
    found, _ = jax.jit(trunk.apply)(params, H, modulation=MODULATION, rope=ROPE)
    h = H
    for i in range(3):
        own = {"params": jax.tree.map(lambda x, i=i: x[i], params["params"]["block"])}
        h, _ = block(**ALL).apply(own, h, modulation=MODULATION, rope=ROPE)
    np.testing.assert_allclose(found, h, atol=1e-4, rtol=1e-4)


def test_every_option_shows() -> None:
    params = randomised(block(qk_norm=True))
    choices = [({}, None), ({}, ROPE), *(({key: ALL[key]}, None) for key in ("norm", "qk_norm", "causal"))]
    found = [block(**fields).apply(params, H, modulation=MODULATION, rope=rope)[0] for fields, rope in choices]
    assert min(float(jnp.abs(a - b).max()) for a, b in itertools.combinations(found, 2)) > 1e-2

    def weights(**fields: Any) -> int:
        return sum(x.size for x in jax.tree.leaves(randomised(block(**fields))["params"]["mlp"]) if x.ndim == 2)

    assert (weights(), weights(expand=2), weights(gated=True, expand=6)) == (
        512,
        256,
        768,
    )  # 2 and 3 kernels of 8 by 32, 16, 32


def test_tokens_may_differ_and_a_cache_gives_the_same() -> None:
    made, params = block(**ALL), randomised(block(**ALL))
    same = jnp.repeat(MODULATION[:, None], 6, 1)
    whole = made.apply(params, H, modulation=MODULATION)[0]
    np.testing.assert_allclose(made.apply(params, H, modulation=same)[0], whole, atol=1e-6)
    rows = jax.random.normal(jax.random.key(3), (2, 4, 48))  # of one token, of two, two and one
    shared = block(**ALL, spans=(1, 2, 2, 1)).apply(params, H, modulation=rows)[0]
    wanted = made.apply(params, H, modulation=rows[:, [0, 1, 1, 2, 2, 3]])[0]
    np.testing.assert_allclose(shared, wanted, atol=1e-6)
    own = same + jax.random.normal(jax.random.key(2), same.shape)
    wanted = made.apply(params, H, modulation=own)[0]
    cache, step = init_cache(None, 2, 6, 2, 4, "float32"), jax.jit(made.apply)
    for i in range(6):
        h, cache = step(params, H[:, i : i + 1], cache, i, modulation=own[:, i : i + 1])
        np.testing.assert_allclose(h[:, 0], wanted[:, i], atol=1e-4, rtol=1e-4)
