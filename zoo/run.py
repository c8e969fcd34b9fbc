"""A run: task, data, optimiser, mesh, and the schedule of saves, samples and evaluations. All of it frozen data."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from zoo.data.pipeline import Data, batches
from zoo.dist import Mesh
from zoo.fields import AtLeast2, Count, Seed, Whole, check_fields
from zoo.task import Metric, Options, Task
from zoo.train import averages
from zoo.train.optim import AdamW, Optim


@dataclass(frozen=True)
class Checkpoint:
    """When training state is saved and how many of the saved ones stay."""

    every: Count = 1_000  # steps; the last step is always saved
    keep: AtLeast2 = 2  # newest; at least 2: a damaged newest one leaves a good one
    snapshots: Whole = 0  # steps between snapshots of the averages (`Power`), which all stay: `ema=WIDTH`. 0: none

    def __post_init__(self) -> None:
        check_fields(self, "checkpoint.")


@dataclass(frozen=True)
class Samples:
    """When a sheet of samples is drawn while training, and how."""

    every: Whole = 0  # steps; 0: none while training. The last step draws one wherever n > 0
    n: Whole = 64
    options: Options = field(default_factory=dict)  # of the task's `sample`

    def __post_init__(self) -> None:
        check_fields(self, "samples.")


@dataclass(frozen=True)
class Run:
    """Everything that decides what a training run computes, and when it saves and looks."""

    task: Annotated[Any, Task]
    data: Data
    steps: Count
    batch: Count
    optim: Optim = AdamW()
    ema: averages.Average = 0.0  # decay of the average of the weights, warmed up, or its `Power`, or several; 0: none
    accumulate: Count = 1  # micro-batches per step
    seed: Seed = 0
    mesh: Mesh = Mesh()
    rules: Mapping[str, Any] | None = None  # logical axis -> mesh axis, on top of dist.RULES
    weights: Mapping[str, str] | None = None  # top-level key (or "" for all) -> run or export, "RUN:key" for one key
    workdir: str | None = None  # default runs/<folder>-<file> of the config
    checkpoint: Checkpoint = Checkpoint()
    samples: Samples = Samples(n=0)
    evals: tuple[Metric, ...] = ()  # each runs every `every` steps (0: at the end only)
    log_every: Count = 50

    def __post_init__(self) -> None:
        check_fields(self)
        averages.check(self.ema, self.checkpoint.snapshots)

    def spec(self, batch: int | None = None) -> dict[str, Any]:
        """What the task expects of one batch."""
        return self.task.spec(self.batch if batch is None else batch)

    def source(self, split: str) -> Any:
        """Examples of one split, as the task expects them."""
        return self.data.source(split, self.spec())

    def labels(self) -> tuple[str, ...]:
        """Names of the classes, where the data has them."""
        return tuple(self.source("train").labels)

    def batches(self, start: int = 0, sharding: Any = None) -> Generator[dict[str, Any], None, None]:
        """Training batches from position `start` on: batch k is a function of (seed, k)."""
        return batches(self.data, self.batch, start, self.seed, spec=self.spec(), sharding=sharding)


# What may differ between a run and its resumption: where it lives, how long it is, how it is spread and reported.
# Everything else changes the numbers.
MAY_DIFFER = (
    "workdir",
    "steps",
    "mesh",
    "rules",
    "evals",
    "checkpoint",
    "samples",
    "log_every",
    "task.scan",
    "task.remat",
    "task.attention",
)
