"""The folder of a run: claimed for one process and one config, then its checkpoints, snapshots and what it says of itself."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from zoo import config, files, hosts, models, paths
from zoo.errors import UserError
from zoo.files import differences
from zoo.run import MAY_DIFFER, Run
from zoo.train.checkpoint import Checkpoints
from zoo.train.provenance import check_classes, check_data
from zoo.train.step import State

_log = logging.getLogger("zoo")


def claim_folder(run: Run, labels: Sequence[str], held: ExitStack) -> Callable[[], dict[str, Any]]:
    """Make or re-enter the run folder, which `held` holds for this process from now on (a bucket has no locks).

    Nothing is written yet but by what is returned: it says in config.json which run the folder belongs to, and returns that.

    Raises:
        UserError: in use, not writable, not empty and no run, or a run whose numbers would differ.
    """
    assert run.workdir is not None
    folder = paths.parse_path(run.workdir)
    about = {"format": 1, "run": config.dump(run), "labels": list(labels)}
    with files.writing(f"the run folder {folder}", "choose another workdir="):
        if isinstance(folder, Path):  # a bucket has no folders
            held.enter_context(files.held(folder, f"workdir={folder}", "choose another workdir="))
        inside = paths.names(folder)
        if "config.json" in inside:
            old = models.read_config(folder)
            if "run" not in old:
                raise UserError(f"workdir={folder} is an export, not a run; choose another workdir=")
            changed = [
                d
                for d in differences(config.completed(old["run"], about["run"]), about["run"])
                if not d.startswith(tuple(f"{m}{e}" for m in MAY_DIFFER for e in (":", ".")))
            ]
            if changed:
                raise UserError(
                    f"workdir={folder} belongs to a run with another config: {'; '.join(changed[:5])}"
                    f"{f' and {len(changed) - 5} more' if len(changed) > 5 else ''}. Choose another workdir=, or the old values"
                )
            check_classes(folder, old.get("labels", labels), labels)
            steps = old["run"].get("steps")
            if steps != run.steps:
                _log.warning(
                    f"this run was made for {steps} steps and now has {run.steps}: schedules that end with the run stretch"
                )
        elif inside:
            raise UserError(f"workdir={folder} is not empty and is no run ({inside[0]} ...); choose another workdir=")
    keep_data = check_data(run, folder)

    def keep() -> dict[str, Any]:
        with files.writing(f"the run folder {folder}", "choose another workdir="):
            paths.write(folder / "config.json", json.dumps(about, indent=1))
        keep_data()
        return about

    return keep


class RunFolder:
    """What a run keeps; of one without a folder (`path` is None) that is nothing. Nothing is written before `keep`."""

    def __init__(self, run: Run, labels: Sequence[str], held: ExitStack) -> None:
        self.path = path = None if run.workdir is None else paths.parse_path(run.workdir)
        self._plan = run.checkpoint
        self._about: Mapping[str, Any] = {}
        self._checkpoints: Checkpoints | None = None
        self._snapshots: Checkpoints | None = None
        self._taken: list[int] = []
        self._begun = False
        if path is not None:
            self._keep = hosts.run_on_main(lambda: claim_folder(run, labels, held))
            self._begun = hosts.broadcast_from_main(lambda: bool(Checkpoints(path, create=False).steps()))

    def restore(self, abstract: State) -> State | None:
        """The newest readable state; None for a run that has none yet."""
        if self.path is None or not self._begun:
            return None
        self._checkpoints = Checkpoints(self.path, self._plan.keep)
        return self._checkpoints.restore(abstract)

    def keep(self) -> None:
        """Process 0 writes whose folder it is; then the others must see it. From now on states are saved."""
        if self.path is None:
            return
        about = hosts.run_on_main(self._keep or dict)
        if about is None:
            try:
                about = models.read_config(self.path)
            except UserError:
                raise UserError(
                    f"workdir={self.path} was made by process 0 and cannot be seen here; give a folder that all hosts share, or "
                    "one in a bucket (gs://BUCKET/FOLDER)"
                ) from None
        self._about = about
        self._checkpoints = self._checkpoints or Checkpoints(self.path, self._plan.keep)
        if self._plan.snapshots:
            self._snapshots = Checkpoints(self.path, None, inside="snapshots")
            self._taken = [
                0,
                *hosts.broadcast_from_main(self._snapshots.steps),
            ]  # also after a step that is taken again

    def save(self, step: int, state: State) -> None:
        """Start saving the state of `step`."""
        self._save(self._checkpoints, step, state)

    def snapshot(self, step: int, averages: Any) -> None:
        """Start saving the averages of `step`, where they are due and not there yet."""
        if self._snapshots and step % self._plan.snapshots == 0 and step not in self._taken:
            self._save(self._snapshots, step, {"ema": averages})

    def _save(self, to: Checkpoints | None, step: int, what: State | Mapping[str, Any]) -> None:
        self.wait()  # several processes cannot write both at once, and no checkpoint is there without snapshots before it
        if to is not None:
            to.save(step, what, self._about)

    def wait(self) -> None:
        """Until the last save is there."""
        for one in filter(None, (self._snapshots, self._checkpoints)):
            one.wait()

    def close(self) -> None:
        """Wait for the last save and let go of the folder."""
        for one in filter(None, (self._snapshots, self._checkpoints)):
            one.close()
