"""Solvers are tables: golden values, orders, the number of calls, and one program for all."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import by_hand, gaussian

from zoo import dist
from zoo.diffusion.levels import Levels, LogNormal
from zoo.diffusion.sampling import draw, noises, start_from
from zoo.diffusion.solvers import DEIS, IPNDM, Ancestral, Churn, DPMSolver, Euler, Heun, Plan, Solver, UniPC, run
from zoo.errors import UserError
from zoo.papers.tada import Tada

EXACT = 0.3499903644  # of the flow from 56 at level 80 to 0.002
SETTINGS = [
    Euler(), Heun(), Ancestral(), Ancestral(0.5), Churn(6.0),
    *(DPMSolver(order, low) for order in (1, 2, 3) for low in (False, True)),
    *(UniPC(order, variant, low) for order in (1, 2, 3) for variant in ("bh1", "bh2") for low in (False, True)),
    *(kind(order) for kind in (DEIS, IPNDM) for order in (1, 2, 3, 4)),
    *(Tada(n, k, order) for n in (1, 2, 3, 4) for k in (0.5, 1.0, 2.0) for order in (1, 2, 3)),
]  # fmt: skip


def plan_of(solver: Solver, calls: int, kind: Any = "edm") -> Plan:
    return solver.plan(Levels(kind).grid(solver.nodes(calls)))


def from_56(solver: Solver, calls: int) -> float:
    plan = plan_of(solver, calls)
    return float(by_hand(plan, gaussian(), np.full((plan.start.shape[1], 1), 56 / 80))[0])


@pytest.mark.parametrize(
    ("solver", "calls", "value"),
    [
        (Euler(), 6, 0.19173113),
        (DPMSolver(2), 6, 0.35537872),
        (UniPC(2), 6, 0.27217523),
        (UniPC(3), 6, 0.2768542),
        (UniPC(2, lower_last=False), 6, 0.3631270355),
        (UniPC(3, lower_last=False), 6, 0.7729967406),
        (Heun(), 11, 0.59711792),
        (DEIS(3), 6, 0.2063569653),
    ],
)
def test_values_of_a_gaussian(solver: Solver, calls: int, value: float) -> None:
    assert from_56(solver, calls) == pytest.approx(value, abs=1e-8)


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (Euler(), 1), (Heun(), 2), (DPMSolver(2), 2), (DPMSolver(3), 3), (UniPC(2), 2), (UniPC(3), 3), (DEIS(2), 2),
        (DEIS(3), 3), (IPNDM(1), 1), (IPNDM(2), 2),
    ],
)  # fmt: skip
def test_halved_steps_divide_the_error_by_two_to_the_order(solver: Solver, order: int) -> None:
    errors = [abs(from_56(solver, calls) - EXACT) for calls in ((401, 801) if order < 3 else (101, 201))]
    assert np.log2(errors[0] / errors[1]) > order - 0.3


def test_one_program_runs_all_solvers_and_gives_what_they_give_by_hand() -> None:
    """On a denoiser that is not linear, at 11 calls."""

    def curved(x: Any, sigma: Any, numpy: Any = np) -> Any:
        return numpy.tanh(x / (0.6 + sigma**2)) * (0.6 + 0.1 * sigma) / (1 + sigma)

    @jax.jit
    def program(plan: Plan, noise: jax.Array, e: jax.Array) -> jax.Array:
        return run(plan, lambda x, sigma: curved(x, sigma, jnp), noise, lambda i: e[i])

    rng = np.random.default_rng(0)
    noise, e = rng.normal(size=(4, 16)).astype(np.float32), rng.normal(size=(11, 16)).astype(np.float32)
    kinds = {"edm", "log", "flow"}
    for kind in kinds:
        for solver in SETTINGS:
            plan = plan_of(solver, 11, kind)
            assert plan.random == (solver.name in ("ancestral", "churn"))
            wanted = by_hand(plan, curved, noise[: plan.start.shape[1]], e)
            found = program(plan.padded(6, 4, 4), noise, e)
            # float32 against float64: the parabola of UniPC and four variables cancel more
            off = {0: 3e-5, 4: 1e-4}.get(getattr(solver, "variables", 0), 1e-5)
            np.testing.assert_allclose(found, wanted, atol=off * np.abs(wanted).max(), err_msg=f"{solver}")
    assert len(SETTINGS) * len(kinds) >= 60
    assert program._cache_size() == 1


def test_the_denoiser_is_called_as_often_as_was_asked() -> None:
    for solver, calls in itertools.product(SETTINGS, (5, 8, 9)):
        if solver.name in ("heun", "churn") and calls % 2 == 0:
            with pytest.raises(UserError, match=rf"nfe=8: {solver.name} takes an odd number of calls; give 7 or 9"):
                solver.nodes(calls)
            continue
        sigma = plan_of(solver, calls).sigma
        assert len(sigma) == calls
        assert sigma[0] == pytest.approx(80, rel=1e-6) or solver.name == "churn"
        assert sigma[-1] == pytest.approx(0.002, rel=1e-6)


def test_solvers_go_on_from_a_sample_of_the_highest_level() -> None:
    """Their first call reads it, however many normal arrays they begin with, and these keep the law that they had."""
    x, keys = 0.7 * jax.random.normal(jax.random.key(1), (4000, 3)), jax.random.split(jax.random.key(2), 4000)
    for solver in (Euler(), Ancestral(), UniPC(), Tada(3)):
        plan = solver.plan(Levels().grid(solver.nodes(5), "edm", 0.02, 0.7))
        begin = start_from(plan, x, noises(keys, (3,)))
        np.testing.assert_allclose(jnp.tensordot(plan.read_x[0] @ plan.start, begin, 1), x, atol=1e-5)
        np.testing.assert_allclose(np.cov(begin[:, :, 0]), np.eye(len(begin)), atol=0.1)


def test_a_gaussian_keeps_its_variance_under_fresh_noise() -> None:
    """Random solvers have the right distribution in the limit: coefficients of all noises, squared and added up."""
    for solver in (Ancestral(), Ancestral(0.5), Churn(40.0, noise=1.0)):
        calls = 801
        plan = plan_of(solver, calls)
        parts = by_hand(plan, gaussian(), np.eye(1, calls + 1, 0)[:, None], np.eye(calls, calls + 1, 1)[:, None])
        assert np.square(parts).sum() == pytest.approx(0.25, rel=0.03)


def test_grids_of_levels() -> None:
    for kind in ("edm", "log", "flow"):
        grid = Levels(kind).grid(9)
        assert (np.diff(grid) < 0).all()
        np.testing.assert_allclose(grid[[0, -1]], (80, 0.002), rtol=1e-9)
    np.testing.assert_allclose(np.diff(1 / (1 + Levels("flow").grid(5)), 2), 0, atol=1e-12)
    np.testing.assert_array_equal(Levels(given=(3.0, 1.0)).grid(2), (3, 1))
    for make, field in (
        (lambda: Levels(low=2.0, high=1.0).grid(2), "levels.low=2 must be below levels.high=1"),
        (lambda: Levels(given=(1.0, 2.0)), "must decrease"),
        (lambda: Levels().grid(1), "a grid of 1 noise levels"),
        (lambda: Levels(given=(3.0, 1.0)).grid(3), r"the 2 that levels\.given lists"),
        (lambda: DPMSolver(3).nodes(2), "nfe=2 is too few for dpm"),
    ):
        with pytest.raises(UserError, match=field):
            make()


def test_levels_of_a_step_are_log_normal_and_cover_it_evenly() -> None:
    draw = jax.jit(jax.vmap(lambda key: LogNormal(-0.4, 1.0).draw(key, 64)))
    found = np.log(draw(jax.random.split(jax.random.key(0), 50)))
    assert found.mean() == pytest.approx(-0.4, abs=0.02)
    assert found.std() == pytest.approx(1.0, abs=0.03)
    assert found.mean(1).std() < 0.2 / np.sqrt(64)  # free draws: 1 / sqrt(64)
    assert abs(np.corrcoef(found[:, 0], found[:, 1])[0, 1]) < 0.5


def test_a_denoiser_of_ones_own_is_drawn_from_as_its_page_says_and_behind_a_callback() -> None:
    readme = (Path(__file__).parents[2] / "configs" / "edm" / "README.md").read_text()
    code = next(part for part in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "def denoise(" in part)
    made: dict[str, Any] = {}
    exec(code, made)
    images, plan, calls = made["images"], made["plan"], []
    assert images.shape == (16, 8, 8, 1)
    assert float(images.std()) == pytest.approx(0.5, rel=0.1)

    def there(x: np.ndarray, sigma: np.ndarray) -> np.ndarray:
        calls.append(float(sigma))
        return np.asarray(x * 0.25 / (0.25 + sigma**2), np.float32)

    def denoise(x: jax.Array, sigma: jax.Array) -> Any:
        return jax.pure_callback(there, jax.ShapeDtypeStruct(x.shape, x.dtype), x, sigma)

    keys = jax.random.split(jax.random.key(0), 16)
    found = jax.jit(lambda keys: draw(plan, denoise, keys, (8, 8, 1)))(keys)
    np.testing.assert_allclose(found, images, atol=1e-5)
    np.testing.assert_allclose(calls, plan.sigma, rtol=1e-5)


def test_solvers_draw_the_same_on_one_and_two_devices() -> None:
    keys, found = jax.random.split(jax.random.key(0), 8), []

    def one(keys: jax.Array, plan: Plan) -> jax.Array:
        return draw(plan, lambda x, sigma: jnp.tanh(x / (1 + sigma)), keys, (4, 4), random=True)

    for count in (1, 2):
        with dist.use(dist.Mesh(data=count).build(jax.devices()[:count])):
            program = jax.jit(one)
            found.append([np.asarray(program(keys, plan_of(solver, 9).padded(6, 4, 4))) for solver in SETTINGS])
    np.testing.assert_allclose(*found, atol=1e-6)
