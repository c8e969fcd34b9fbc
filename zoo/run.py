"""A run: task, data, optimiser, mesh, and the schedule of saves, samples and evaluations. All of it frozen data."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from zoo.data.pipeline import batches
from zoo.dist import Mesh
from zoo.errors import UserError
from zoo.task import Options
from zoo.train.optim import AdamW, Optim


@dataclass(frozen=True)
class Checkpoint:
    """When training state is saved and how many of the saved ones stay."""

    every: int = 1_000  # steps; the last step is always saved
    keep: int = 2  # newest; at least 2, so that a damaged newest one leaves a good one

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"checkpoint.every={self.every} must be at least 1 step")
        if self.keep < 2:
            raise UserError(
                f"checkpoint.keep={self.keep} is too few: keep at least 2, so that a damaged newest checkpoint leaves a good one"
            )


@dataclass(frozen=True)
class Samples:
    """When a sheet of samples is drawn while training, and how."""

    every: int = 0  # steps; 0: none while training. The last step draws one wherever n > 0
    n: int = 64
    options: Options = field(default_factory=dict)  # of the task's `sample`

    def __post_init__(self) -> None:
        if self.every < 0 or self.n < 0:
            raise UserError(f"samples.every={self.every} and samples.n={self.n} must not be negative; 0 turns them off")


@dataclass(frozen=True)
class Run:
    """Everything that decides what a training run computes, and when it saves and looks."""

    task: Any
    data: Any
    steps: int
    batch: int
    optim: Optim = AdamW()
    ema: float = 0.0  # decay of the average of the weights, warmed up; 0: none is kept
    accumulate: int = 1  # micro-batches per step
    seed: int = 0
    mesh: Mesh = Mesh()
    rules: Mapping[str, Any] | None = None  # logical axis -> mesh axis, on top of dist.RULES
    weights: Mapping[str, str] | None = None  # top-level key (or "" for all) -> run or export, "RUN:key" for one key
    workdir: str | None = None  # default runs/<folder>-<file> of the config
    checkpoint: Checkpoint = Checkpoint()
    samples: Samples = Samples(n=0)
    evals: tuple[Any, ...] = ()  # metrics; each runs every `every` steps (0: at the end only)
    log_every: int = 50

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.ema < 1:
            raise UserError(f"ema={self.ema} is no decay; give a number below 1 such as 0.999, or 0 for no average")

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
