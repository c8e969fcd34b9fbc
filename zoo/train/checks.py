"""Whatever can be known to go wrong before the first step: better now than after the first thousand."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import jax

from zoo import weights
from zoo.data.text.tokens import check_vocabulary
from zoo.errors import UserError
from zoo.run import Run
from zoo.task import check_needs, options_of, sampling
from zoo.train import tracking
from zoo.train.step import make_sampler, sampler_spec

_log = logging.getLogger("zoo")


def check_command(run: Run, wandb: str | None) -> None:
    """UserError for what needs no data to be refused: nothing to train, no project to send to."""
    if not weights.abstract(run.task).keys() - {*run.task.about.held}:
        raise UserError(f"{type(run.task).__name__} has nothing to train, all is held; draw with `zoo sample CONFIG`")
    if wandb is not None:
        if run.workdir is None or not wandb.rpartition("/")[2]:
            raise UserError(f"--wandb {wandb} needs the name of a project, and a run folder (workdir=FOLDER)")
        tracking.library()


def check_data(run: Run, labels: Sequence[str]) -> None:
    """UserError for data that the task cannot read; for samples and evaluations that could not be made."""
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
    if run.task.about.vocabulary and not run.data.made_up:
        check_vocabulary(run.task, run.source("train"))
    check_shapes(run)
    check_looks(run)
    run.batches(0).close()  # compares the first example with what the task wants


def check_shapes(run: Run) -> None:
    """UserError when examples of one of the shapes of data that have several do not fit the task.

    It traces the loss for each: the task knows best.
    """
    source, spec = run.source("train"), run.spec()
    names = source.aspects or tuple(map(str, range(len(source.groups or ()))))
    params = weights.abstract(run.task)
    for name, group in zip(names, source.groups or ()):
        example = source[int(group[0])]
        if spec.keys() - example.keys():  # what is missing the feed says
            continue
        batch = {k: jax.ShapeDtypeStruct((leaf.shape[0], *example[k].shape), leaf.dtype) for k, leaf in spec.items()}
        try:
            jax.eval_shape(run.task.loss, params, batch, jax.random.key(0))
        except UserError as error:
            raise UserError(f"the bucket {name} of data.path={run.data.place}: {error}") from None


def check_looks(run: Run) -> None:
    """UserError for samples and evaluations that could not be made."""
    if run.samples.n and sampling(run.task) is not None:
        options = options_of(run.task, run.samples.options, "samples.options")
        if run.samples.options:  # what the task alone knows its sampler says when it is traced
            n = run.samples.n
            drawn = weights.abstract(run.task), jax.random.key(0), sampler_spec(run.task, n)
            jax.eval_shape(make_sampler(run.task, n, options), *drawn)
    for i, metric in enumerate(run.evals):
        check_needs(run.task, metric.needs, f"evals.{i}: the metric {metric.name}")
        metric.check(run.task)
        if metric.split is not None and metric.path is None and run.source("train").groups:
            source = run.source(metric.split)  # of which a metric sees the first group alone
            first = source[int(source.groups[0][0]) if source.groups else 0]
            for key, want in run.spec().items():
                if key in first and first[key].shape != tuple(want.shape[1:]):
                    raise UserError(
                        f"evals.{i}: the metric {metric.name} goes through examples of the task's own shape alone, and the "
                        f"{metric.split} split of data.path={run.data.place} has none: its first {key} is "
                        f"{list(first[key].shape)}, the task's {list(want.shape[1:])}; prepare the data with square images for "
                        "testing (a larger test_fraction), set data.aspect to one ratio, or leave the metric out"
                    )
        metric.check_data(run.task, run.data)
