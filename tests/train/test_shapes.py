"""Shapes of examples: those held out must be of the shape that the task is shown, and every one must fit it."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from mistakes import told

from zoo.data.pipeline import Source
from zoo.errors import UserError
from zoo.run import Samples
from zoo.task import Batch, Metric, Params
from zoo.train.checks import check_looks, check_shapes


class Shapes(list, Source):
    """A source with one latent of each shape, each a group of its own."""

    def __init__(self, **shapes: tuple[int, int]) -> None:
        super().__init__({"latent": np.zeros((*shape, 1), np.float32)} for shape in shapes.values())
        self.aspects = tuple(shapes)
        self.groups = tuple(np.array([i]) for i in range(len(shapes))) if len(shapes) > 1 else ()


class Looks(Metric):
    """A metric of the test split; `path` and what `check_data` was asked are kept."""

    name = "bits"
    split = "test"

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def check_data(self, task: Any, data: Any) -> None:
        self.seen.append((task, data))

    def __call__(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Patched:
    """A task whose patches must fill its latents."""

    patch: int = 1

    def init(self, rng: jax.Array) -> Params:
        return {}

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        if batch["latent"].shape[1] % self.patch:
            raise UserError(f"task.patch={self.patch} does not divide {batch['latent'].shape[1]}")
        return batch["latent"].mean(), {}


def shaped(test: Shapes, train: Shapes, patch: int = 1) -> SimpleNamespace:
    spec = {"latent": jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32)}
    return SimpleNamespace(
        task=Patched(patch),
        data=SimpleNamespace(place="out"),
        source={"test": test, "train": train}.get,
        spec=lambda: spec,
        samples=Samples(n=0),
        evals=(Looks(),),
    )


def test_metrics_need_held_out_examples_of_the_shape_of_the_task() -> None:
    both = Shapes(square=(4, 4), wide=(2, 6))
    check_looks(shaped(both, both))
    check_looks(shaped(Shapes(square=(4, 4)), both))
    for test in (Shapes(wide=(2, 6)), Shapes(wide=(2, 6), tall=(6, 2))):
        run = shaped(test, both)
        with told("evals.0", "bits", "test", "data.path=out", "[2, 6, 1]"):
            check_looks(run)
        run.evals[0].path = "images"  # a metric that looks elsewhere
        check_looks(run)
    run = shaped(both, both)
    check_looks(run)
    assert run.evals[0].seen == [(run.task, run.data)]


def test_every_shape_of_the_data_must_fit_the_task() -> None:
    data = Shapes(square=(4, 4), wide=(3, 6))
    check_shapes(shaped(data, data))
    with told("wide", "data.path=out", "task.patch=2", "3"):
        check_shapes(shaped(data, data, patch=2))
