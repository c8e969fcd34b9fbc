"""Guided denoisers: the closed form, the main network alone at weight 0, and a guide without classes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fresh import randomised
from mistakes import told

from zoo.diffusion.guidance import Guidance
from zoo.diffusion.sampling import clipped, draw
from zoo.diffusion.solvers import Euler
from zoo.papers import edm
from zoo.papers.autoguidance import Guided, GuidedSampling

MAIN = edm.Edm(image=4, channels=1, classes=3, network=edm.Transformer(width=8, depth=2, head_dim=4, patch=2))
TASK = Guided(
    MAIN, dataclasses.replace(MAIN, network=edm.Transformer(width=8, depth=1, head_dim=4, patch=2), classes=0)
)


def test_a_guide_leads_away_and_weight_0_is_the_main_network_to_the_bit() -> None:
    params, keys, label = randomised(TASK, out=0.3), jax.random.split(jax.random.key(0), 3), {"label": jnp.arange(3)}

    def program(task: Any, guidance: Any) -> Any:
        options = task.Sampling(Euler(), 6, guidance)
        return jax.jit(lambda own: task.sample(own, keys, 3, label, options)["image"])

    def by_hand(x: jax.Array, sigma: jax.Array) -> jax.Array:
        return 2 * MAIN.denoise(params["main"], x, sigma, label) - TASK.guide.denoise(params["guide"], x, sigma)

    alone = program(MAIN, 0.0)(params["main"])
    np.testing.assert_array_equal(program(TASK, 0.0)(params), alone)
    np.testing.assert_array_equal(program(TASK, Guidance(1.0, low=90.0))(params), alone)
    guided = program(TASK, 1.0)(params)
    assert float(jnp.abs(guided - alone).max()) > 1e-3
    plan = GuidedSampling(Euler(), 6).plan(TASK.sigmas)
    np.testing.assert_allclose(guided, clipped(draw(plan, by_hand, keys, (4, 4, 1))), atol=1e-5)
    products = [
        program(*one).lower(own).as_text().count("dot_general")
        for one, own in (((MAIN, 0.0), params["main"]), ((TASK, 0.0), params), ((TASK, 1.0), params))
    ]
    assert products[0] == products[1] < products[2]  # one network runs, and two


def test_networks_that_do_not_go_together_are_told() -> None:
    with told("task.guide reads image [8, 8, 1]", "image of [4, 4, 1]"):
        Guided(MAIN, dataclasses.replace(MAIN, image=8))
    with told("task.guide knows levels from 0.1 to 80"):
        Guided(MAIN, dataclasses.replace(MAIN, low=0.1))
    with told("nothing to train"):
        TASK.loss({}, {}, jax.random.key(0))
