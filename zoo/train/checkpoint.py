"""Orbax checkpoints of a train state: saved asynchronously, in the stacked layout, restored onto any mesh.

In a bucket, which cannot rename folders, Orbax marks a finished checkpoint with a file of its own: only those count.

A checkpoint that cannot be read is moved aside (`STEP.broken`), never deleted: Orbax skips a save whose step is not
above the newest folder, so a damaged newest one would otherwise swallow the run's last save.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from zoo import hosts, paths, weights
from zoo.errors import Retryable, UserError
from zoo.files import first_line
from zoo.paths import Folder
from zoo.task import Params
from zoo.train.step import State

_log = logging.getLogger("zoo")
_FINISHED = ocp.path.atomicity.COMMIT_SUCCESS_FILE  # lies in a bucket's finished checkpoints


def _tree(state: State | Mapping[str, Any]) -> dict[str, Any]:
    """A state, or some fields of one, as a plain dict in the layout of the disk."""
    fields = state if isinstance(state, Mapping) else {k: getattr(state, k) for k in State.__dataclass_fields__}
    return weights.stacked(dict(fields))


@functools.cache
def _quieten() -> None:
    """Keep to the one sentence that we make of a failure: of one save on a full disk the libraries print 300 lines more.

    Orbax logs the traceback in every thread before it raises, and its other writes fail unheard, of which asyncio tells at
    exit; TensorStore reports to an event loop that is closed by then.
    """
    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)  # writes given up half-way
    before = sys.unraisablehook

    def hook(found: Any) -> None:
        if not (isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"):
            before(found)

    sys.unraisablehook = hook


class Checkpoints:
    """The checkpoints of one run folder; those `inside` another folder of it may hold a part of the state."""

    def __init__(self, folder: Folder, keep: int | None = 2, create: bool = True, inside: str = "checkpoints") -> None:
        self._remote = paths.in_bucket(folder)
        self.folder = (folder if self._remote else folder.resolve()) / inside
        self._keep, self._create = keep, create
        self._manager: ocp.CheckpointManager | None = None
        self._saving: int | None = None  # the step that is being written
        if create and not self._remote:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"cannot write checkpoints to {self.folder}: {error.strerror}; choose another workdir="
                ) from None

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            _quieten()
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep, create=self._create, enable_async_checkpointing=True, read_only=not self._create
            )
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        return self._manager

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first."""
        if self._remote:
            found = [int(name) for name in paths.names(self.folder) if name.isdigit()]
            with paths.sentence(self.folder):
                return sorted(step for step in found if (self.folder / str(step) / _FINISHED).exists())
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if p.is_dir() and p.name.isdigit())

    def config(self, step: int) -> dict[str, Any]:
        """The run's config as it was saved with the checkpoint of `step`."""
        return self._open().restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]

    def save(self, step: int, state: State | Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Start saving; the state may be donated at once. UserError when an earlier save or this one cannot be written."""
        self.wait()
        self._saving = step
        try:
            self._open().save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_tree(state)), config=ocp.args.JsonSave(dict(config))
                ),
                force=True,
            )
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Until the last save is on disk."""
        if self._manager is not None:
            try:
                self._manager.wait_until_finished()
            except Exception as error:
                raise self._failed(error) from error

    def _failed(self, error: Exception) -> UserError:
        good = self.steps()
        left = f"step {good[-1]} is the newest good one" if good else "there is no earlier one"
        kind, mend = UserError, "make room or choose another workdir="
        if self._remote:  # a network mends itself, a full disk does not
            kind, mend = Retryable, "look at the network and the bucket's permissions"
        return kind(
            f"could not save the checkpoint of step {self._saving} in {self.folder} ({first_line(error)}); {left}: "
            f"{mend}, then start the same command again"
        )

    def close(self) -> None:
        """Wait for the last save and let go of the folder."""
        if self._manager is not None:
            manager, self._manager = self._manager, None
            manager.close()

    def restore(self, abstract: State) -> State | None:
        """The newest readable state in the layout, dtypes and shardings of `abstract`; None when there is none.

        Newer ones that cannot be read are moved aside with a warning, once an older one has been read. Among several
        processes, one that cannot read a step is enough for all to leave it.

        Raises:
            UserError: there are checkpoints and none can be read. Nothing is changed then: the reason may pass (no
                memory, a disk that is away), and a run never starts over by itself.
        """
        found = self._newest({k: getattr(abstract, k) for k in State.__dataclass_fields__})
        return None if found is None else State(**found)

    def restore_weights(self, abstract: State) -> tuple[int, Params, Params] | None:
        """(step, parameters, their average) of the newest readable state: without the optimiser, a third of it all."""
        found = self._newest({k: getattr(abstract, k) for k in ("step", "params", "ema")})
        return None if found is None else (int(found["step"]), found["params"], found["ema"])

    def averages(self, like: Params) -> dict[int, Callable[[], Params]]:
        """Of each snapshot, by its step, what reads the averages in the layout, dtypes and shardings of `like`."""

        def read(step: int) -> Params:
            try:
                found: Params = self._read(step, {"ema": like})["ema"]
            except Exception as error:
                raise UserError(
                    f"the snapshot of step {step} in {self.folder} cannot be read ({first_line(error)}); mend the cause, or move "
                    "it away: it may be made without"
                ) from error
            return found

        return {step: functools.partial(read, step) for step in self.steps()}

    def _newest(self, like: dict[str, Any]) -> dict[str, Any] | None:
        failed: list[tuple[int, Exception]] = []
        steps = hosts.broadcast_from_main(self.steps)  # a shared disk may show them to some later than to others
        for step in reversed(steps):
            tree, error = None, None
            try:
                tree = self._read(step, like)
            except Exception as found:
                error = found
            if not self._all_read(step, error, steps):
                self.close()
                failed.append((step, error or OSError("another process could not read it")))
                if not self._create:
                    break
                continue
            for broken, why in failed:
                self.close()
                hosts.run_on_main(functools.partial(self._set_aside, broken, why, step))
            return tree
        if failed:
            newest, why = failed[0]
            others = f", nor can the {len(failed) - 1} before it" if len(failed) > 1 else ""
            raise UserError(
                f"the checkpoint of step {newest} in {self.folder} cannot be read ({first_line(why)}){others}; nothing was "
                "changed: mend the cause and start the same command again, or choose another workdir="
            ) from why
        return None

    def _all_read(self, step: int, error: Exception | None, steps: list[int]) -> bool:
        """Whether every process could read a checkpoint.

        Those that can wait for all others inside of Orbax. So where all have failed they go on together; where only some
        have, this one moves the checkpoint aside and ends them all: started again, they read the one before.
        """
        try:
            return hosts.all_agree(error is None, "to read a checkpoint", 300 if error is None else 20)
        except Retryable:
            if error is None:
                raise
            older = [s for s in steps if s < step]
            if older and self._create:
                with contextlib.suppress(OSError):  # another did it
                    self._set_aside(step, error, older[-1])
            raise Retryable(
                f"the checkpoint of step {step} in {self.folder} could be read by others, but not here ({first_line(error)}); "
                "start the same command again"
            ) from error

    def _read(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Those fields of a state that `like` has, as it has them."""
        item = weights.stacked(like)
        if len(like) == len(State.__dataclass_fields__):
            args: Any = ocp.args.StandardRestore(item)
        else:
            arrays = ocp.checkpoint_utils.construct_restore_args(item)
            args = ocp.args.PyTreeRestore(item, restore_args=arrays, partial_restore=True)
        tree = self._open().restore(step, args=ocp.args.Composite(state=args))["state"]
        where = jax.tree.map(lambda x: x.sharding, like)
        # Through one program whose outputs lie as the step wants them. Slices of a stack cannot reuse its memory.
        structures: list[Any] = [jax.tree.structure(t) for t in (tree, like)]
        donate = (0,) if structures[0] == structures[1] else ()
        return jax.jit(lambda t: weights.matching(t, like), out_shardings=where, donate_argnums=donate)(tree)

    def _set_aside(self, step: int, error: Exception, good: int) -> None:
        broken = self.folder / f"{step}.broken"
        for number in range(1, 1000):
            if not broken.exists():
                break
            broken = self.folder / f"{step}.broken{number}"
        paths.move(self.folder / str(step), broken, last=_FINISHED)
        _log.warning(
            "the checkpoint of step %d cannot be read (%s); it was moved to %s and the run goes on from step %d",
            step,
            first_line(error),
            broken.name,
            good,
        )
