"""Looks at the model while it trains: sheets of samples or texts, metrics and what they draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from zoo import hosts, models
from zoo.data.pipeline import epoch
from zoo.draws import Use, key_of
from zoo.run import Run
from zoo.task import Params, Samples, is_text
from zoo.train import averages
from zoo.train.pictures import class_name, grid
from zoo.train.provenance import vocabulary_of
from zoo.train.report import Report, spelled
from zoo.train.step import State, make_sampler, sampler_spec


class Watch:
    """Says with what it saw which weights these were: the average's where there is one."""

    def __init__(self, run: Run, report: Report, labels: Sequence[str]) -> None:
        self.run, self.report, self.labels = run, report, labels
        self.kind = "ema" if run.ema else "raw"
        homes = models.homes(None, run.weights)
        self.loaded = [models.loaded_for(m, task=run.task, places=homes, data=run.data) for m in run.evals]
        self.series = told_apart(run.evals)
        self.vocabulary = vocabulary_of(run)
        self.draw = self.conditions = None
        self.captions: list[str] | None = None
        n = run.samples.n
        if n and isinstance(run.task, Samples):
            self.draw = jax.jit(make_sampler(run.task, n, run.samples.options))
            spec = sampler_spec(run.task, n)
            if spec is not None:  # captions and the like: those of the first held-out examples, in turn
                batch, count = next(epoch(run.data, n, split="test", spec=spec, limit=n))
                self.conditions = {key: array[np.arange(n) % count] for key, array in batch.items()}
            if self.conditions and self.vocabulary:  # letters
                self.captions = [spelled(ids, self.vocabulary).rstrip() for ids in self.conditions["tokens"]]

    def due(self, step: int, every: int) -> bool:
        """Whether something that is looked at every so many steps (0: at the end) is due."""
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
                    self.report.picture("samples", grid(drawn["image"], names), step=step, metadata=about)
                elif is_text(run.task):
                    texts = [spelled(ids, self.vocabulary) for ids in drawn["tokens"]]
                    self.report.texts("samples", texts, step=step)
            for i, metric in evals:
                series = self.series[i]
                measured = dict(metric(run.task, params, run.data, key_of(run.seed, Use.LOOKS), **self.loaded[i]))
                for name, picture in measured.pop("pictures", {}).items():
                    told = f"{name}-{series}" if series else name
                    self.report.picture(told, picture, step=step, metadata=about)
                found.append(measured | ({"eval": series} if series.startswith("evals.") else {}))
                self.report.log(step, {**found[-1], "weights": self.kind}, series)
            self.report.curve()
        return found

    def summary(self, found: Mapping[str, Any]) -> str:
        """What a metric measured, in a line."""
        shown = [f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()]
        return f"{', '.join(shown)} ({'average of the weights' if self.kind == 'ema' else 'weights of the last step'})"


def told_apart(metrics: Sequence[Any]) -> list[str]:
    """Names for what metrics measure: none for the only one of its kind, else its split, or its place where that is shared."""
    kinds = [type(metric) for metric in metrics]
    splits = [metric.split for metric in metrics]
    pairs, names = list(zip(kinds, splits)), []
    for i, (kind, part) in enumerate(pairs):
        alone = part is not None and pairs.count((kind, part)) == 1
        names.append("" if kinds.count(kind) == 1 else str(part) if alone else f"evals.{i}")
    return names
