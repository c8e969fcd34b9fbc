"""Metrics of denoisers, on a Gaussian by class whose denoiser is exact: their figures are known."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import by_hand, gaussian
from mistakes import told
from unigram import Listed

from zoo import config
from zoo.data.pipeline import Data
from zoo.diffusion.guidance import Guidance
from zoo.diffusion.levels import Levels
from zoo.diffusion.solvers import Ancestral, Churn, DPMSolver, Euler, Heun, UniPC
from zoo.metrics.denoising import Denoising, modelled
from zoo.metrics.solvers import Solvers, _program, branched
from zoo.papers.tada import Tada
from zoo.task import About

RNG = jax.random.key(0)
SHAPE = (4, 4, 1)


@dataclass(frozen=True)
class Cloud:
    """Numbers of variance 0.25 around `label`; `wrong`: what its x0 is not."""

    classes: int = 0
    wrong: str = ""
    sigmas: tuple[float, float] = (0.002, 80.0)

    @property
    def about(self) -> About:
        return About(classes=self.classes)

    def spec(self, batch: int) -> dict[str, Any]:
        label = {"label": jax.ShapeDtypeStruct((batch,), jnp.int32)} if self.classes else {}
        return {"image": jax.ShapeDtypeStruct((batch, *SHAPE), jnp.float32), **label}

    def denoise(self, params: Any, x: Any, sigma: Any, conditions: Any = None) -> Any:
        middle = conditions["label"][:, None, None, None] if conditions else 0.0
        x0 = middle + (x - middle) * 0.25 / (0.25 + sigma**2)
        x0 = x0 / ((sigma < 1) | (sigma > 50)) if self.wrong == "middle" else x0
        return x0[:, :2] if self.wrong == "shape" else x0 / (sigma > 0.01) if self.wrong == "finite" else x0


@dataclass(frozen=True)
class Drawn(Data):
    """Such numbers, of classes 0 and 1 in turn or all of class 0."""

    classes: int = 0

    def source(self, split: str, spec: Any = None) -> Any:
        rng = np.random.default_rng(0)
        label = [i % 2 if self.classes else 0 for i in range(400)]
        return Listed(
            {"image": (k + 0.5 * rng.normal(size=SHAPE)).astype(np.float32), "label": np.int32(k)} for k in label
        )


@dataclass(frozen=True)
class Latent(Cloud):
    """The same of latents, of which examples are mean and spread."""

    def spec(self, batch: int) -> dict[str, Any]:
        (x,) = super().spec(batch).values()
        return {"latent": x, "latent_std": x}


@dataclass(frozen=True)
class Spread(Data):
    """Latents of variance 0.16 whose means have variance 0.09."""

    def source(self, split: str, spec: Any = None) -> Any:
        rng, std = np.random.default_rng(0), np.full(SHAPE, 0.4, np.float32)
        return Listed(
            {"latent": (0.3 * rng.normal(size=SHAPE)).astype(np.float32), "latent_std": std} for _ in range(400)
        )


def test_the_best_guess_of_a_gaussian_has_the_error_that_is_known() -> None:
    for classes in (0, 2):
        found = Denoising(batch=128)(Cloud(classes), {}, Drawn(classes), RNG)
        for sigma in (0.05, 0.2, 1.0, 5.0):
            assert found[f"denoising_{sigma:g}"] == pytest.approx(1, abs=4 * found[f"denoising_{sigma:g}_std_error"])
            assert found[f"denoising_{sigma:g}_std_error"] < 0.03
        assert found["examples"] == 400
    found = Denoising(batch=128)(Latent(), {}, Spread(), RNG)
    for sigma in (0.05, 0.2, 1.0, 5.0):
        assert found[f"denoising_{sigma:g}"] == pytest.approx(1, abs=4 * found[f"denoising_{sigma:g}_std_error"])
    blind = Denoising(batch=128, sigmas=(1.0,))(
        Cloud(), {}, Drawn(2), RNG
    )  # its posterior has the prior's mean for ever
    assert blind["denoising"] > 1.5
    one, other = (Denoising(batch=batch, limit=200)(Cloud(), {}, Drawn(), RNG)["denoising_1"] for batch in (128, 64))
    assert one == pytest.approx(other, rel=1e-5)


def test_solvers_of_a_gaussian_stand_where_they_stand_by_hand() -> None:
    solvers = (Euler(), DPMSolver(2), Tada(), Tada(detail=2.0), Ancestral(), Heun())
    metric = Solvers(solvers, (6, 40), samples=400, sets=2, batch=200, converged=200)
    found = metric(Cloud(), {}, Drawn(), RNG)
    rows = {row["solver"]: row for row in found["solvers"]}
    assert list(rows) == ["euler", "dpm++", "tada", "tada detail=2.0", "ancestral", "heun"]

    def factors(solver: Any, calls: int) -> np.ndarray:
        """What a sample is of each array of noise."""
        plan = solver.plan(Levels().grid(solver.nodes(calls), solver.grid))
        return by_hand(plan, gaussian(), np.eye(plan.start.shape[1]))

    for solver in solvers[:4]:
        limit = factors(Heun(), 201) if isinstance(solver, Euler | DPMSolver) else factors(solver, 200)
        wanted = [np.linalg.norm(factors(solver, n) - limit) / 0.5 for n in (6, 40)]
        assert rows[str(solver)]["error"] == pytest.approx(wanted, rel=0.06)
    assert rows["heun"]["error"] == [None, None]  # takes an odd number of calls
    assert rows["ancestral"]["error"] == [None, None]
    assert found["data_rms"] == pytest.approx(0.5, rel=0.05)
    # distances: those of standard deviations, in units of 2, but for the spread of 400 samples
    for name in ("tada", "dpm++"):
        assert rows[name]["frechet"][1] < 0.1 < rows["euler"]["frechet"][0]
    assert rows["ancestral"]["frechet"][1] < rows["ancestral"]["frechet"][0]
    assert {name: value for name, value in found["pictures"].items() if value.width < 100} == {}


def test_what_a_fixed_first_input_leaves_open_grows_with_the_detail() -> None:
    solvers = (Euler(), UniPC(), *(Tada(detail=k) for k in (0.5, 1.0, 2.0, 4.0)))
    found = Solvers(solvers, (20,), samples=400, sets=1, batch=400, features="")(Cloud(), {}, Drawn(), RNG)
    shares = [row["open"][0] for row in found["solvers"]]
    assert shares[:2] == [0, 0]
    assert (np.diff(shares[1:]) > 0).all()
    for solver, share in zip(solvers[2:], shares[2:]):
        plan = solver.plan(Levels().grid(20, "flow"))
        parts, first = by_hand(plan, gaussian(), np.eye(2)), plan.read_x[0] @ plan.start
        wanted = 1 - (parts @ first) ** 2 / (first @ first) / (parts @ parts)
        assert share == pytest.approx(wanted, rel=0.1, abs=1e-3)
        other = branched(plan)
        np.testing.assert_allclose(other.read_x[0] @ other.start, [*first, 0, 0], atol=1e-9)
    assert "pictures" in found
    assert not any("frechet" in name for name in found["pictures"])


def test_all_solvers_of_so_many_calls_are_one_program_and_classes_guide() -> None:
    task, by = Cloud(2), Guidance(0.5, low=0.1)
    metric = Solvers(
        (Euler(), Heun(), UniPC(3), Tada(3), Churn()), (7,), samples=8, sets=1, batch=8, features="", guidance=by
    )
    found = metric(task, {}, Drawn(2), RNG)
    assert _program(task, by, False)._cache_size() == 2  # at 7 calls and at 251, where they have converged
    assert _program(task, by, True)._cache_size() == 1
    assert all(np.isfinite([row["error"][0] for row in found["solvers"][:4]]))


@dataclass(frozen=True)
class InOrder(Drawn):
    """The second half is of class 1."""

    def source(self, split: str, spec: Any = None) -> Any:
        return Listed(sorted(super().source(split, spec), key=lambda row: int(row["label"])))


def test_a_part_of_data_in_the_order_of_its_classes_is_of_all_classes() -> None:
    wrong = Denoising(sigmas=(5.0,), limit=100, batch=50)(Cloud(), {}, InOrder(2), RNG)  # knows one class
    assert wrong["denoising"] > 1.5


def test_samples_that_are_lost_and_levels_one_by_one_have_a_table_too() -> None:
    found = Solvers((Euler(),), (4,), levels=Levels(given=(80.0, 10.0, 1.0, 0.01)), samples=8, batch=8)(
        Cloud(), {}, Drawn(), RNG
    )
    assert 0 < found["solvers"][0]["error"][0] < 1
    lost = Solvers((Euler(),), (4,), samples=8, batch=8)(Cloud(wrong="middle"), {}, Drawn(), RNG)
    assert lost["solvers"][0] == {
        "solver": "euler",
        **{k: [None] for k in ("error", "error_std", "frechet", "frechet_std")},
    } | {k: lost["solvers"][0][k] for k in ("open", "open_std")}


def test_what_is_no_denoiser_for_a_metric_is_told() -> None:
    def solvers(task: Any = Cloud(), **fields: Any) -> None:
        Solvers((Heun(),), **{"nfe": (3,), "samples": 4, "batch": 4, **fields})(task, {}, Drawn(), RNG)

    with told("solvers", "heun twice"):
        Solvers((Heun(), Heun()))
    with told("converged=9", "nfe=18"):
        Solvers(converged=9)
    with told("StarFlow denoises what it makes of"):
        modelled(config.load("starflow/imagenet256:smoke").task)
    for name in ("edm2/imagenet512", "starflow/imagenet256"):  # whose looks are the first to ask, at step 20,000
        run = config.load(name)
        assert [metric.check(run.task) for metric in run.evals] == [None] * len(run.evals)
    for run in (solvers, lambda task: Denoising()(task, {}, Drawn(), RNG)):
        with told("Cloud.denoise", "[1, 2, 4, 1]", "shape"):
            run(Cloud(wrong="shape"))
        with told("Cloud.denoise", "not finite at sigma=0.002"):
            run(Cloud(wrong="finite"))
    with told("knows one, 0.3"):
        solvers(Cloud(sigmas=(0.3, 0.3)))
    with told("nfe=8", "heun", "7 or 9"):
        solvers(nfe=(8,))
    with told("levels.high", "0.002 to 80"):
        solvers(levels=Levels(high=90.0))
    with told("guidance", "no class"):
        solvers(guidance=1.0)
    with told("sigmas=100", "0.002 to 80"):
        Denoising((100.0,)).check(Cloud())
    with told("evals", "zoo eval RUN solvers"):
        Solvers().check(Cloud())
