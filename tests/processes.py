"""Runs in processes of their own: what they have said, reached, saved and learned."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from zoo import config, dist
from zoo.train import optim
from zoo.train.checkpoint import Checkpoints
from zoo.train.report import read_metrics
from zoo.train.step import State, abstract_state
from zoo.weights.layout import named_leaves


def leaves(state: State) -> dict[str, np.ndarray]:
    """Every leaf of a state by name, the key as its numbers."""
    fields = {k: getattr(state, k) for k in State.__dataclass_fields__}
    fields["rng"] = jax.random.key_data(state.rng)
    return {name: np.asarray(leaf) for name, leaf in named_leaves(fields).items()}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@dataclass
class Runs:
    """A folder of runs of one config, `config.py`, in `runs/NAME`."""

    root: Path
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def folder(self, name: str) -> Path:
        return self.root / "runs" / name

    def records(self, name: str) -> list[dict[str, Any]]:
        return read_metrics(self.folder(name) / "metrics.jsonl")

    def reached(self, name: str) -> int:
        """The last step in metrics.jsonl."""
        return max((r["step"] for r in self.records(name)), default=0)

    def saved(self, name: str) -> list[int]:
        return Checkpoints(self.folder(name), create=False).steps()

    def state(self, name: str, steps: int) -> dict[str, np.ndarray]:
        """Every leaf of the newest checkpoint, which must be that of the last step."""
        run = config.load(str(self.root / "config.py"), [f"steps={steps}"])
        mesh = dist.Mesh(data=1).build(jax.devices()[:1])
        assert self.saved(name)[-1] == steps
        with dist.use(mesh):
            abstract = abstract_state(run.task, optim.build(run.optim, run.steps), mesh, run.ema)
            state = Checkpoints(self.folder(name), create=False).restore(abstract)
        assert state is not None
        return leaves(state)
