"""The training loop: step, log, look, save. What surrounds it (checks, the folder, what it begins with) has rooms of its own."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import jax

from zoo import config, dist, hosts, paths
from zoo.errors import Retryable, UserError
from zoo.run import Run
from zoo.train import checks, optim
from zoo.train.begin import begin
from zoo.train.folder import RunFolder
from zoo.train.profile import Profile
from zoo.train.provenance import by_name
from zoo.train.report import Report
from zoo.train.step import Metrics, State, compile_step
from zoo.train.watch import Watch

_PUSH = 10.0  # seconds that a save waits for the records of its steps to reach a bucket
_SAME = 1.0  # seconds in which two Ctrl-C are one: a shell and a launcher both pass it on
_PATIENCE = 20  # skipped steps in a row before a run gives up


class Diverged(UserError):
    """Loss or gradients have not been finite for too long."""


class Stop:
    """Whether somebody asked to stop: a SIGTERM (a pod's preemption, a scheduler's time limit), or a Ctrl-C while steps are taken.

    The loop saves first. A second Ctrl-C stops at once, but for a save that has begun. Among several processes JAX listens
    instead, so that all of them stop after the same step (`hosts.asked_to_stop`).
    """

    asked = saving = again = by_hand = False
    since = 0.0

    def terminate(self, *_: Any) -> None:
        """What SIGTERM does."""
        self.asked = True

    def interrupt(self, *_: Any) -> None:
        """What Ctrl-C does."""
        if self.by_hand and time.monotonic() < self.since + _SAME:
            return
        self.again = self.by_hand
        self.asked = self.by_hand = True
        self.since = time.monotonic()
        if self.again and not self.saving:
            raise KeyboardInterrupt
        said = "the save is finished first" if self.again else "saving after this step; Ctrl-C again stops at once"
        with suppress(OSError):
            os.write(2, f"\ninterrupted: {said}\n".encode())  # print() cannot be entered twice

    @contextmanager
    def listening(self, number: int, action: Callable[..., None]) -> Iterator[None]:
        """While this holds, a signal does that."""
        if hosts.several() or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(number, action)
        try:
            yield
        finally:
            signal.signal(number, before)


def train(
    run: Run, *, quiet: bool = False, profile: tuple[int, int] | None = None, wandb: str | None = None
) -> tuple[State, list[dict[str, float]]]:
    """Start or resume a run and bring it to its last step.

    With `workdir=None` nothing is written. SIGTERM saves and returns early; `state.step` tells. Ctrl-C saves and raises
    KeyboardInterrupt. `profile` traces these steps, both included, into `profile/` of the run folder; `wandb` is a project
    that gets all records as well.

    Returns:
        the last state, and the logged training metrics of this session.

    Raises:
        UserError: anything that can be known before the first step, a folder that cannot be written, or a run whose
            loss has not been finite for 20 steps.
        Retryable: data or a metric that fail later; what was trained is saved.
    """
    with hosts.guarded(), ExitStack() as held:
        profiler = Profile(profile, run)
        checks.check_command(run, wandb)
        if run.workdir is not None:
            paths.require_bucket(run.workdir, "workdir=")
        mesh = run.mesh.build()
        held.enter_context(dist.use(mesh, run.rules))
        asked = Stop()
        held.enter_context(asked.listening(signal.SIGTERM, asked.terminate))
        dist.check_batch(run.batch, run.accumulate, mesh)
        source = run.source("train")
        labels = tuple(source.labels)
        about = {"run": config.dump(run), "jax": jax.__version__, "zoo": importlib.metadata.version("zoo")}
        # with other data on one of them, they would shuffle differently
        hosts.same({**about, "data": {"examples": len(source), "labels": [*labels]}})
        folder = RunFolder(run, labels, held)
        run = dataclasses.replace(run, evals=tuple(by_name(metric, None, labels)[0] for metric in run.evals))
        checks.check_data(run, labels)
        optimizer = optim.build(run.optim, run.steps)
        init, step_fn, abstract = compile_step(run.task, optimizer, mesh, ema=run.ema, accumulate=run.accumulate)
        state = begin(run, folder, labels, init, abstract)
        start = int(state.step)
        profiler.check(start)
        folder.keep()  # what is refused changes nothing
        report = Report(
            folder.path or ".",
            total=run.steps,
            start=start,
            batch=run.batch,
            quiet=quiet,
            main=folder.path is not None and hosts.main(),
            unit=run.task.about.unit,
        )
        try:
            with report:
                if wandb is not None:
                    report.track(wandb, config.dump(run))
                watch = Watch(run, report, labels)
                if start >= run.steps:
                    report.note(f"this run is finished: step {start} of {run.steps} (a larger steps= goes on)")
                try:
                    # until now Ctrl-C ended at once: nothing was lost; the others hear of a failure before this process tidies up
                    with asked.listening(signal.SIGINT, asked.interrupt), hosts.guarded():
                        state, history = _steps(run, state, step_fn, mesh, folder, watch, profiler, asked)
                finally:
                    profiler.close()
                    folder.wait()
        finally:
            folder.close()
    if asked.by_hand and int(state.step) < run.steps:
        raise KeyboardInterrupt
    return state, history


def _steps(
    run: Run,
    state: State,
    step_fn: Any,
    mesh: jax.sharding.Mesh,
    folder: RunFolder,
    watch: Watch,
    profiler: Profile,
    asked: Stop,
) -> tuple[State, list[dict[str, float]]]:
    report, start = watch.report, int(state.step)
    history: list[dict[str, float]] = []
    feed = run.batches(start, dist.batch_sharding(mesh))

    @contextmanager
    def rescuing(at: int) -> Iterator[None]:
        """What fails in here costs no step: that of `at` is saved. Of several processes one alone cannot."""
        try:
            yield
        except Exception as error:
            if folder.path is None or at <= start or hosts.several():
                if isinstance(error, OSError) and not isinstance(error, UserError):
                    kind = Retryable if hosts.several() else UserError  # a launcher starts all hosts again
                    raise kind(f"step {step} cannot be taken ({error}); mend that and start again") from error
                raise
            folder.save(at, state)
            folder.wait()
            if not isinstance(error, (UserError, OSError)):
                report.note(f"step {at} is saved")
                raise
            look = f"; `zoo check {run.data.place}` looks through all of it" if run.data.place and at < step else ""
            raise Retryable(
                f"{' '.join(str(error).split()).rstrip('.')}. Step {at} is saved: the same command goes on from there{look}"
            ) from error

    try:
        for step in range(start + 1, run.steps + 1):
            # before a step, so that one lost to a kill is made up for; of the last step the checkpoint has them
            with report.away():
                folder.snapshot(step - 1, state.ema)
            profiler.before(step, state, report)
            with rescuing(step - 1):
                batch = next(feed)
            state, metrics = step_fn(state, batch)
            profiler.after(step, state)
            report.tick(step)
            last, stop = step == run.steps, asked.asked or hosts.asked_to_stop(step)
            if last or stop or step % run.log_every == 0 or step == start + 1:
                history.append({"step": step, **_check(step, metrics)})
                report.log(step, {k: v for k, v in history[-1].items() if k not in ("step", "streak")})
            saved = folder.path is not None and (last or stop or step % run.checkpoint.every == 0)
            if saved:
                report.push(wait=0 if stop else _PUSH)  # a saved step is not run again: its records must be there
            if saved and stop:
                # who asked may not wait for the look; a saved step is not run again, so look all the same
                asked.saving = True
                folder.save(step, state)
                folder.wait()
                asked.saving = False
            with rescuing(step):
                seen = watch.look(step, state) if not asked.again else []
            if saved and not stop:
                with report.away():
                    folder.save(step, state)
            for found in seen if last else ():
                report.note(watch.summary(found))
            if stop and not last:
                report.note(f"asked to stop: step {step} is saved" if saved else f"asked to stop at step {step}")
                break
    finally:
        feed.close()
    return state, history


def _check(step: int, metrics: Metrics) -> dict[str, float]:
    """Metrics as numbers; UserError when the run has not taken a step for long."""
    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
    if values["streak"] >= _PATIENCE:
        first = step - int(values["streak"]) + 1
        raise Diverged(
            f"loss or gradients have not been finite since step {first} ({int(values['streak'])} steps skipped in a row, "
            f"loss={values['loss']}); lower optim.lr, set optim.clip=1, or look at the data of that step"
        )
    return values
