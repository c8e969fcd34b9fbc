"""The training loop: resume, step, log, sample, evaluate, save. The only file that touches clocks and disks while training."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo import config, dist, files, hosts, models, paths, weights
from zoo.data.pipeline import epoch, label_names
from zoo.data.text.tokens import check_vocabulary
from zoo.draws import Use, key_of
from zoo.errors import Retryable, UserError
from zoo.files import differences
from zoo.paths import Folder
from zoo.run import MAY_DIFFER, Run
from zoo.task import Params, Samples, check_needs, is_text, options_of, sampling
from zoo.train import averages, optim, tracking
from zoo.train.checkpoint import Checkpoints
from zoo.train.provenance import (
    ENCODERS,
    by_name,
    check_classes,
    check_data,
    check_encoders,
    check_numbers,
    check_vocabularies,
    vocabulary_of,
)
from zoo.train.report import Report, class_name, spelled
from zoo.train.step import Metrics, State, compile_step, make_sampler, sampler_spec, split

_log = logging.getLogger("zoo")
_PUSH = 10.0  # seconds that a save waits for the records of its steps to reach a bucket
_SAME = 1.0  # seconds in which two Ctrl-C are one: a shell and a launcher both pass it on
_PATIENCE = 20  # skipped steps in a row before a run gives up


class Diverged(UserError):
    """Loss or gradients have not been finite for too long."""


class _Stop:
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


def claim_folder(run: Run, labels: tuple[str, ...], held: ExitStack) -> Callable[[], dict[str, Any]]:
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


def _check_labels(run: Run, labels: tuple[str, ...]) -> None:
    classes = run.task.about.classes
    if classes and labels and len(labels) > classes:
        raise UserError(
            f"labels out of range: the data has {len(labels)} classes, task.classes={classes}; set task.classes={len(labels)}"
        )
    if 0 < len(labels) < classes:
        _log.warning(
            f"the data has {len(labels)} classes and task.classes={classes}: the others are never seen, yet drawn in samples; "
            f"set task.classes={len(labels)}"
        )


def _check_looks(run: Run) -> None:
    """UserError for samples and evaluations that could not be made; better now than after the first thousand steps."""
    if run.samples.n and sampling(run.task) is not None:
        options = options_of(run.task, run.samples.options, "samples.options")
        if run.samples.options:  # what the task alone knows its sampler says when it is traced
            n = run.samples.n
            drawn = weights.abstract(run.task), jax.random.key(0), sampler_spec(run.task, n)
            jax.eval_shape(make_sampler(run.task, n, options), *drawn)
    for i, metric in enumerate(run.evals):
        check_needs(run.task, metric.needs, f"evals.{i}: the metric {metric.name}")
        metric.check(run.task)
        if metric.split is not None:
            _check_evaluated(run, run.source(metric.split), f"evals.{i}", metric)
        metric.check_data(run.task, run.data)


def _check_evaluated(run: Run, source: Any, field: str, metric: Any) -> None:
    """UserError when data of several shapes have none of the task's own where a metric looks, which is the first group."""
    if metric.path is not None or not run.source("train").groups:
        return
    first = source[int(source.groups[0][0]) if source.groups else 0]
    for key, want in run.spec().items():
        if key in first and first[key].shape != tuple(want.shape[1:]):
            raise UserError(
                f"{field}: the metric {metric.name} goes through examples of the task's own "
                f"shape alone, and the {metric.split} split of data.path={run.data.place} has none: its first "
                f"{key} is {list(first[key].shape)}, the task's {list(want.shape[1:])}; prepare the data with square images for "
                "testing (a larger test_fraction), set data.aspect to one ratio, or leave the metric out"
            )


def _check_shapes(run: Run) -> None:
    """UserError when examples of one of the shapes of data that have several do not fit the task.

    It traces the loss for each: the task knows best.
    """
    source, spec = run.source("train"), run.spec()
    names = source.aspects or tuple(map(str, range(len(source.groups or ()))))
    params = weights.abstract(run.task)
    for name, group in zip(names, source.groups or ()):
        example = source[int(group[0])]
        batch = {
            key: jax.ShapeDtypeStruct((leaf.shape[0], *example[key].shape), leaf.dtype)
            for key, leaf in spec.items()
            if key in example
        }
        if len(batch) < len(spec):  # what else is missing the feed says
            continue
        try:
            jax.eval_shape(run.task.loss, params, batch, jax.random.key(0))
        except UserError as error:
            raise UserError(f"the bucket {name} of data.path={run.data.place}: {error}") from None


def _first(run: Run, state: State, given: Mapping[str, Params], where: Any) -> State:
    """Fill a fresh state from the trees of `Run.weights`."""
    if not given:
        _log.info("parameters: fresh")
        return state
    params, report = weights.fill(hosts.fetch(state.params), given)
    for line in report:
        _log.info("parameters: %s", line)
    params = jax.device_put(params, where.params)
    ema = jax.tree.map(jnp.copy, averages.begin(run.ema, split(run.task, params)[0]))  # each has arrays of its own
    return state.replace(params=params, ema=ema)


def _held_out(run: Run, n: int) -> dict[str, np.ndarray] | None:
    """Captions and the like for n samples: those of the first held-out examples, in turn; None where a task has none."""
    spec = sampler_spec(run.task, n)
    if spec is None:
        return None
    batch, count = next(epoch(run.data, n, split="test", spec=spec, limit=n))
    return {key: array[np.arange(n) % count] for key, array in batch.items()}


class _Watch:
    """Looks at the model while it trains: sheets or texts, metrics and what they draw, and says which weights it saw.

    These are the average's where there is one.
    """

    def __init__(self, run: Run, report: Report, labels: tuple[str, ...]) -> None:
        self.run, self.report, self.labels = run, report, labels
        self.kind = "ema" if run.ema else "raw"
        homes = models.homes(None, run.weights)
        self.loaded = [models.loaded_for(m, task=run.task, places=homes, data=run.data) for m in run.evals]
        self.series = _told_apart(run.evals)
        self.vocabulary = vocabulary_of(run)
        n = run.samples.n
        self.draw = None
        self.captions: list[str] | None = None
        if n and isinstance(run.task, Samples):
            self.draw = jax.jit(make_sampler(run.task, n, run.samples.options))
            self.conditions = _held_out(run, n)
            if self.conditions and self.vocabulary:  # letters
                self.captions = [spelled(ids, self.vocabulary).rstrip() for ids in self.conditions["tokens"]]

    def due(self, step: int, every: int) -> bool:
        return step == self.run.steps or (every > 0 and step % every == 0)

    def look(self, step: int, state: State) -> list[dict[str, Any]]:
        """Whatever is due at `step`; returns what each metric measured."""
        run, found = self.run, []
        about = {"step": str(step), "weights": self.kind}
        sheet = self.draw is not None and self.due(step, run.samples.every)
        evals = [(i, m) for i, m in enumerate(run.evals) if self.due(step, m.every)]
        if not sheet and not evals:
            return []
        params: Params = {**state.params, **averages.chosen(run.ema, state.ema)}
        with self.report.away():
            if sheet and self.draw is not None:
                drawn = hosts.fetch(self.draw(params, key_of(run.seed, Use.LOOKS), self.conditions))
                if "image" in drawn:
                    names = [class_name(self.labels, i) for i in drawn["label"]] if "label" in drawn else self.captions
                    self.report.sheet("samples", drawn["image"], names, step=step, metadata=about)
                elif is_text(run.task):
                    texts = [spelled(ids, self.vocabulary) for ids in drawn["tokens"]]
                    self.report.texts("samples", texts, step=step)
            for i, metric in evals:
                measured = dict(metric(run.task, params, run.data, key_of(run.seed, Use.LOOKS), **self.loaded[i]))
                for name, picture in measured.pop("pictures", {}).items():
                    told = f"{name}-{self.series[i]}" if self.series[i] else name
                    self.report.picture(told, picture, step=step, metadata=about)
                found.append(measured | self._place(i))
                self.report.log(step, {**found[-1], "weights": self.kind}, self.series[i])
            self.report.curve()
        return found

    def _place(self, i: int) -> dict[str, str]:
        return {"eval": self.series[i]} if self.series[i].startswith("evals.") else {}


def _told_apart(metrics: Sequence[Any]) -> list[str]:
    """Names for what metrics measure: none for the only one of its kind, else its split, or its place where that is shared."""
    kinds = [type(metric) for metric in metrics]
    splits = [metric.split for metric in metrics]
    pairs, names = list(zip(kinds, splits)), []
    for i, (kind, part) in enumerate(pairs):
        alone = part is not None and pairs.count((kind, part)) == 1
        names.append("" if kinds.count(kind) == 1 else str(part) if alone else f"evals.{i}")
    return names


def _keep(keep: Callable[[], dict[str, Any]] | None, folder: Folder) -> dict[str, Any]:
    """Process 0 writes what the run folder keeps; then the others must see it."""
    about = hosts.run_on_main(keep or dict)
    if about is None:
        try:
            about = models.read_config(folder)
        except UserError:
            raise UserError(
                f"workdir={folder} was made by process 0 and cannot be seen here; give a folder that all hosts share, or "
                "one in a bucket (gs://BUCKET/FOLDER)"
            ) from None
    return about


def _versions() -> dict[str, str]:
    """What all processes of a run must have in common besides its config."""
    return {"jax": jax.__version__, "zoo": importlib.metadata.version("zoo")}


class _Trace:
    """Records what host and devices do in the steps `first` to `last`; waits for the devices at these borders alone."""

    def __init__(self, span: tuple[int, int] | None, report: Report, home: Folder | None) -> None:
        self._first, self._last = span if span is not None and report.main else (0, 0)
        self._report, self._home = report, home
        self._on = False

    def before(self, step: int, state: State) -> None:
        if step == self._first:
            with self._report.away(), self._failures():
                jax.block_until_ready(state)
                jax.profiler.start_trace(self._report.folder / "profile", create_perfetto_trace=True)
                self._on = True

    def after(self, step: int, state: State) -> None:
        if step == self._last and self._on:
            with self._report.away():
                jax.block_until_ready(state)
                self.close()

    def close(self) -> None:
        """Write what was recorded, where recording was on."""
        if self._on:
            self._on = False
            with self._failures():
                jax.profiler.stop_trace()
                self._report.push()
                self._report.note(
                    f"profile: {self._home}/profile (TensorBoard, or its perfetto_trace.json.gz in Perfetto)"
                )

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a figure costs no step
            _log.warning("the profile could not be made (%s: %s); the run goes on", type(error).__name__, error)


def _check_profile(span: tuple[int, int] | None, run: Run, start: int = 0) -> None:
    if span is None:
        return
    first, last = span
    if run.workdir is None:
        raise UserError(f"--profile {first}:{last} needs a run folder; set workdir=FOLDER")
    if not 1 <= first <= last:
        raise UserError(f"--profile {first}:{last} is no range of steps; give two from 1, the first not above the last")
    if not start < first <= last <= run.steps:
        now = f"{start + 1} to {run.steps}" if start < run.steps else f"none: it is finished at {start}"
        raise UserError(f"--profile {first}:{last} is not among the steps that this run takes now ({now}); give others")


def train(
    run: Run, *, quiet: bool = False, profile: tuple[int, int] | None = None, wandb: str | None = None
) -> tuple[State, list[dict[str, float]]]:
    """Start or resume a run and bring it to its last step.

    With `workdir=None` nothing is written. SIGTERM saves and returns early; `state.step` tells. Ctrl-C saves
    and raises KeyboardInterrupt. `profile` traces these
    steps, both included, into `profile/` of the run folder; `wandb` is a project that gets all records as well.

    Returns:
        the last state, and the logged training metrics of this session.

    Raises:
        UserError: anything that can be known before the first step, a folder that cannot be written, or a run whose
            loss has not been finite for 20 steps.
        Retryable: data or a metric that fail later; what was trained is saved.
    """
    with hosts.guarded(), ExitStack() as held:
        _check_profile(profile, run)
        if not weights.abstract(run.task).keys() - {*run.task.about.held}:
            raise UserError(
                f"{type(run.task).__name__} has nothing to train, all is held; draw with `zoo sample CONFIG`"
            )
        if wandb is not None:
            if run.workdir is None or not wandb.rpartition("/")[2]:
                raise UserError(f"--wandb {wandb} needs the name of a project, and a run folder (workdir=FOLDER)")
            tracking.library()
        folder = None if run.workdir is None else paths.require_bucket(run.workdir, "workdir=")
        mesh = run.mesh.build()
        held.enter_context(dist.use(mesh, run.rules))
        asked = _Stop()
        held.enter_context(asked.listening(signal.SIGTERM, asked.terminate))
        hosts.same({"run": config.dump(run), **_versions()})
        dist.check_batch(run.batch, run.accumulate, mesh)
        labels = label_names(run.data, run.spec())
        keep = None if folder is None else hosts.run_on_main(lambda: claim_folder(run, labels, held))
        run = dataclasses.replace(run, evals=tuple(by_name(metric, None, labels)[0] for metric in run.evals))
        _check_labels(run, labels)
        if run.task.about.vocabulary and not run.data.made_up:
            check_vocabulary(run.task, run.source("train"))
        _check_shapes(run)
        _check_looks(run)
        optimizer = optim.build(run.optim, run.steps)
        init, step_fn, abstract = compile_step(run.task, optimizer, mesh, ema=run.ema, accumulate=run.accumulate)
        feed = run.batches(0)  # compares the data with the task before anything is made
        feed.close()
        if hosts.several():  # with other data on one of them, they would shuffle differently
            length = len(run.source("train"))
            hosts.same({"data": {"examples": length, "labels": list(labels)}})
        begun = folder is not None and hosts.broadcast_from_main(
            lambda: bool(Checkpoints(folder, create=False).steps())
        )
        given = {} if begun else models.given_weights(run.weights or {}, run.task)
        # before the folder is claimed: it would belong to the wrong weights
        filled, _ = weights.fill(abstract.params, given, run.weights, run.task)
        if not begun:
            if not run.data.made_up:
                needed = [key for key, network in run.task.about.networks.items() if network.required]
                models.check_filled(run, filled, needed)
            check_encoders(run, given)
            check_vocabularies(run)
            check_numbers(run, labels)
        del filled
        checkpoints = snapshots = state = about = None
        if folder is not None:
            if not begun:
                about = _keep(keep, folder)
            checkpoints = Checkpoints(folder, run.checkpoint.keep)
            snapshots = Checkpoints(folder, None, inside="snapshots") if run.checkpoint.snapshots else None
            state = checkpoints.restore(abstract)
        if state is None:
            state = _first(run, init(run.seed), given, jax.tree.map(lambda x: x.sharding, abstract))
        else:
            _log.info("parameters: step %d of %s", int(state.step), run.workdir)
            made = run.data.made_with()  # large networks come off the devices for it
            check_encoders(run, {k: hosts.fetch(state.params[k]) for k in ENCODERS if k in made and k in state.params})
        start = int(state.step)
        _check_profile(profile, run, start)
        if folder is not None and begun:  # what is refused changes nothing
            about = _keep(keep, folder)
        report = Report(
            folder or ".",
            total=run.steps,
            start=start,
            batch=run.batch,
            quiet=quiet,
            main=folder is not None and hosts.main(),
            unit=run.task.about.unit,
        )
        try:
            with report:
                if wandb is not None:
                    report.track(wandb, config.dump(run))
                trace = _Trace(profile, report, folder)
                watch = _Watch(run, report, labels)
                if start >= run.steps:
                    report.note(f"this run is finished: step {start} of {run.steps} (a larger steps= goes on)")
                try:
                    # until now Ctrl-C ended at once: nothing was lost; the others hear of a failure before this process tidies up
                    with asked.listening(signal.SIGINT, asked.interrupt), hosts.guarded():
                        state, history = _steps(
                            run, state, step_fn, mesh, start, report, watch, trace, checkpoints, snapshots, about, asked
                        )
                finally:
                    trace.close()
                    for one in filter(None, (checkpoints, snapshots)):
                        one.wait()
        finally:
            for one in filter(None, (checkpoints, snapshots)):
                one.close()
    if asked.by_hand and int(state.step) < run.steps:
        raise KeyboardInterrupt
    return state, history


def _steps(
    run: Run,
    state: State,
    step_fn: Any,
    mesh: jax.sharding.Mesh,
    start: int,
    report: Report,
    watch: _Watch,
    trace: _Trace,
    checkpoints: Checkpoints | None,
    snapshots: Checkpoints | None,
    about: Mapping[str, Any] | None,
    asked: _Stop,
) -> tuple[State, list[dict[str, float]]]:
    history: list[dict[str, float]] = []
    taken = (
        [0, *hosts.broadcast_from_main(snapshots.steps)] if snapshots else []
    )  # also after a step that is taken again
    feed = run.batches(start, dist.batch_sharding(mesh))

    def save(to: Checkpoints, at: int, what: State | Mapping[str, Any]) -> None:
        for one in filter(None, (snapshots, checkpoints)):
            one.wait()  # several processes cannot write both at once, and no checkpoint is there without snapshots before it
        to.save(at, what, about or {})

    @contextmanager
    def rescuing(at: int) -> Iterator[None]:
        """What fails in here costs no step: that of `at` is saved. Of several processes one alone cannot."""
        try:
            yield
        except Exception as error:
            if not checkpoints or at <= start or hosts.several():
                if isinstance(error, OSError) and not isinstance(error, UserError):
                    raise UserError(f"step {step} cannot be taken ({error}); mend that and start again") from error
                raise
            save(checkpoints, at, state)
            checkpoints.wait()
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
            if snapshots and (step - 1) % run.checkpoint.snapshots == 0 and step - 1 not in taken:
                with report.away():
                    save(snapshots, step - 1, {"ema": state.ema})
            trace.before(step, state)
            with rescuing(step - 1):
                batch = next(feed)
            state, metrics = step_fn(state, batch)
            trace.after(step, state)
            report.tick(step)
            last, stop = step == run.steps, asked.asked or hosts.asked_to_stop(step)
            if last or stop or step % run.log_every == 0 or step == start + 1:
                history.append({"step": step, **_check(step, metrics)})
                report.log(step, {k: v for k, v in history[-1].items() if k not in ("step", "streak")})
            here = checkpoints if last or stop or step % run.checkpoint.every == 0 else None
            if here:
                report.push(wait=0 if stop else _PUSH)  # a saved step is not run again: its records must be there
            if here and stop:
                # who asked may not wait for the look; a saved step is not run again, so look all the same
                asked.saving = True
                save(here, step, state)
                here.wait()
                asked.saving = False
            with rescuing(step):
                watch_now = watch.look(step, state) if not asked.again else []
            if here and not stop:
                with report.away():
                    save(here, step, state)
            for found in watch_now if last else ():
                report.note(_summary(found, watch.kind))
            if stop and not last:
                report.note(f"asked to stop: step {step} is saved" if checkpoints else f"asked to stop at step {step}")
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


def _summary(found: Mapping[str, Any], kind: str) -> str:
    shown = [f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()]
    return f"{', '.join(shown)} ({'average of the weights' if kind == 'ema' else 'weights of the last step'})"
