"""`zoo export` and `zoo import`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo import models, weights
from zoo.errors import UserError
from zoo.models import Model
from zoo.run import Run
from zoo.train.report import read_metrics


def _paper(task: Any) -> str:
    """Title line of the paper's file."""
    import importlib

    return (importlib.import_module(type(task).__module__).__doc__ or "").partition("\n")[0]


def _last_eval(model: Model) -> dict[str, Any]:
    """Held-out figures of a run, measured on just these weights: same step, same kind (average or raw)."""
    if not (model.folder / "metrics.jsonl").exists():
        return {}
    found: dict[str, Any] = {}
    for record in read_metrics(model.folder / "metrics.jsonl"):
        if "loss" not in record and (record["step"], record.get("weights")) == (model.step, model.kind):
            found |= {k: v for k, v in record.items() if k not in ("time", "step", "weights")}
    return found


def _write(model: Model, out: Path, metrics: dict[str, Any]) -> None:
    count = sum(np.size(x) for x in jax.tree.leaves(model.params))
    card = weights.card(
        task=type(model.task).__name__,
        paper=_paper(model.task),
        data=repr(model.data),
        steps=model.step,
        metrics=metrics,
        kind=model.kind,
        parameters=count,
    )
    weights.save(out, model.params, models.export_config(model, metrics), card)


def export(model: Model, out: Path, form: str, samples: int) -> str:
    """Write an export in one of the forms; returns what to tell the user.

    zoo: safetensors, config and card. official: the published key layout, to the file `out` (.safetensors, .npz or
    .pth). stablehlo: a zoo export with a portable sampler (cpu, cuda, tpu) of `samples` images a call beside it.
    """
    which = {"ema": "the average of the weights", "raw": "the weights of the last step"}.get(
        model.kind, f"{model.kind} weights"
    )
    if form == "official":
        if out.exists():
            raise UserError(f"{out} exists; remove it first, or give another file")
        state = weights.to_official(model.task, model.params)
        weights.write_state_dict(out, state)
        return f"{out}: {len(state)} tensors in the official layout ({which})"
    metrics = _last_eval(model) if model.run is not None else models.read_config(model.folder).get("metrics", {})
    if form == "stablehlo" and not hasattr(model.task, "sample"):
        raise UserError(f"{type(model.task).__name__} has no sampler to export; use --format zoo")
    _write(model, out, metrics)
    if form == "zoo":
        return f"{out}: model.safetensors, config.json, README.md ({which})"
    classes = getattr(model.task, "classes", 0)
    task = model.task
    if hasattr(task, "attention"):  # a kernel of this machine would not run on the others
        task = dataclasses.replace(task, attention="xla")

    def sampler(params: Any, key: jax.Array, label: jax.Array | None = None) -> dict[str, jax.Array]:
        rng = jax.random.wrap_key_data(key)
        return task.sample(params, rng, samples, None if label is None else {"label": label})

    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    label = (jax.ShapeDtypeStruct((samples,), jnp.int32),) if classes else ()
    weights.export_stablehlo(out, sampler, model.params, key, *label)
    return f"{out}: as a zoo export, and stablehlo/ with a sampler of {samples} images a call ({which})"


def import_checkpoint(run: Run, file: Path, out: Path) -> str:
    """Bring a published checkpoint of `run.task` into an export; returns what to tell the user.

    The config gives what shapes can't tell (head size, patch, noise). UserError listing every tensor that is missing,
    left over or of another shape; nothing is written then.
    """
    params = weights.from_official(run.task, weights.read_state_dict(file))
    model = Model(run.task, params, "imported", None, run.data, (), out)
    _write(model, out, {})
    count = sum(np.size(x) for x in jax.tree.leaves(params))
    return f"{out}: {count:,} parameters of {type(run.task).__name__}, every tensor used (`zoo sample {out}` draws from it)"
