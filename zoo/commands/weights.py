"""`zoo export` and `zoo import`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo import config, dist, models, paths, weights
from zoo.commands.text import files
from zoo.diffusion.energies import scored
from zoo.encoders import tokenizer
from zoo.errors import UserError
from zoo.models import Model, homes
from zoo.paths import Folder
from zoo.run import Run
from zoo.task import Noted, Published, Samples, abilities, call, is_text, paper, sampling, speed, trace_of
from zoo.train.report import read_metrics


def _last_eval(model: Model) -> dict[str, Any]:
    """Held-out figures of a run, measured on just these weights: same step, same kind (average or raw)."""
    if not (model.folder / "metrics.jsonl").exists():
        return {}
    found: dict[str, Any] = {}
    for record in read_metrics(model.folder / "metrics.jsonl"):
        if "loss" not in record and (record["step"], record.get("weights")) == (model.step, model.kind):
            found |= {k: v for k, v in record.items() if k not in ("time", "step", "weights")}
    return found


def _licence(model: Model) -> str | None:
    """Terms of the published weights of a task, where these parameters are or come from such."""
    own = model.run is not None and any(key not in model.task.about.held for key in model.run.weights or {})
    return model.task.about.licence or None if model.kind == "imported" or own else None


def _tokenizer(places: Iterable[Folder]) -> dict[str, bytes]:
    """The file of the tokeniser in the first of these folders that has it."""
    for folder in places:
        if tokenizer.held(folder):
            with paths.sentence(folder / tokenizer.NAME):
                return {tokenizer.NAME: (folder / tokenizer.NAME).read_bytes()}
    return {}


def _write(model: Model, out: Path, metrics: dict[str, Any], files: Mapping[str, bytes]) -> None:
    count = sum(np.size(x) for x in jax.tree.leaves(model.params))
    card = weights.card(
        task=type(model.task).__name__,
        paper=paper(model.task),
        data=repr(model.data),
        steps=model.step,
        metrics=metrics,
        kind=model.kind,
        parameters=count,
        precision=", ".join(sorted({x.dtype.name for x in jax.tree.leaves(model.params)})),
        licence=_licence(model),
    )
    weights.save(out, model.params, models.export_config(model, metrics), card, files)


def export(
    model: Model,
    out: Path,
    form: str,
    samples: int,
    fields: Sequence[str] = (),
    allow: Sequence[str] = (),
    dtype: str = "float32",
) -> str:
    """Write an export in one of the forms; returns what to tell the user.

    zoo: safetensors, config and card. official: the published key layout, to the file `out` (.safetensors, .npz or
    .pth). stablehlo: a zoo export and beside it portable programs (cpu, cuda, tpu) of `samples` examples a call: the sampler,
    or for a task that has none its features; and the denoiser of a task that has one, and its energy.

    Args:
        fields: options of the sampler of a stablehlo program, `field=value`.
        allow: packages besides zoo whose classes they may name.
        dtype: of float32 parameters in a zoo export; a task computes in its own dtype whichever it is.
    """
    if dtype != "float32":
        if form != "zoo":
            raise UserError(f"--dtype {dtype} is of --format zoo, not of {form}; leave it out")
        rounded = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, model.params)
        model = dataclasses.replace(model, params=rounded)
    if fields and form != "stablehlo":
        raise UserError(
            f"{fields[0]}: options are those of a portable sampler, which --format {form} does not write; leave them out, or "
            "add --format stablehlo"
        )
    which = {"ema": "the average of the weights", "raw": "the weights of the last step"}.get(
        model.kind, f"{model.kind} weights"
    )
    if form == "official":
        if out.exists():
            raise UserError(f"{out} exists; remove it first, or give another file")
        state = weights.to_official(model.task, model.params)
        weights.write_state_dict(out, state)
        note = f"\n{model.task.import_note()}" if isinstance(model.task, Noted) else ""
        return f"{out}: {len(state)} tensors in the official layout ({which}){note}"
    metrics = _last_eval(model) if model.run is not None else models.read_config(model.folder).get("metrics", {})
    programs = _programs(model.task, samples, fields, allow) if form == "stablehlo" else {}
    with dist.portable():
        for program in programs.values():  # what does not fit is told before anything is written
            jax.eval_shape(program.call, model.params, *program.arguments)
    beside = _tokenizer(model.homes)
    worded = is_text(model.task) or ("tokens" in model.task.spec(1) and model.task.about.vocabulary)
    if worded and (vocabulary := model.vocabulary) is not None:
        beside |= files(vocabulary)
    _write(model, out, metrics, beside)
    if not programs:
        return f"{out}: model.safetensors, config.json, README.md ({which})"
    with dist.portable():
        weights.export_stablehlo(out, programs, model.params)
    unit = model.task.about.unit
    names = {
        "sampler": "a sampler",
        "features": "a program for the features",
        "denoiser": "a denoiser",
        "energy": "an energy",
    }
    *first, last = [names[name] for name in programs]
    what = f"{', '.join(first)} and {last}" if first else last
    return f"{out}: as a zoo export, and stablehlo/ with {what} of {samples} {unit} a call ({which})"


def _programs(task: Any, samples: int, fields: Sequence[str], allow: Sequence[str]) -> dict[str, weights.Program]:
    """What a task does in portable programs, N = samples.

    sampler: (params, key uint32 [2], label int32 [N] where there are classes) -> what it draws. features, of a task that has
    no sampler: (params, batch) -> `features` [N, D] and where the task has one a `feature_map`. denoiser: (params, x [N, ...],
    sigma [N], label) -> `x0` [N, ...]. energy, of a denoiser that has one: of the same ->
    `energy` [N] in nats and `score` [N, ...], -grad E.

    UserError where there is none of them, for no samples, for options that the sampler has not, and for captions.
    """
    kind = type(task).__name__
    if samples < 1:
        raise UserError(f"--samples {samples} leaves a portable program nothing to do; give 1 or more")
    can = abilities(task)
    if not {"sample", "features", "denoise"} & set(can):
        raise UserError(f"{kind} has no sampler, features or denoiser to export; use --format zoo")
    if fields and "sample" not in can:
        raise UserError(f"{fields[0]}: {kind} has no sampler, so it takes no options; leave them out")
    if {"sample", "denoise"} & set(can) and task.about.conditions:
        raise UserError(
            f"--format stablehlo: this {kind} takes captions, which a portable program has no place for "
            "yet; use --format zoo"
        )
    if "attention" in speed(task):  # a kernel of this machine would not run on the others
        task = dataclasses.replace(task, attention="xla")

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def told(label: jax.Array | None) -> dict[str, jax.Array] | None:
        return None if label is None else {"label": label}

    def sampler(params: Any, key: jax.Array, label: jax.Array | None = None) -> dict[str, jax.Array]:
        return trace_of(task.sample(params, jax.random.wrap_key_data(key), samples, told(label), options))[0]

    def denoiser(params: Any, x: jax.Array, sigma: jax.Array, label: jax.Array | None = None) -> dict[str, jax.Array]:
        return {"x0": task.denoise(params, x, sigma, told(label))}

    def energy(params: Any, x: jax.Array, sigma: jax.Array, label: jax.Array | None = None) -> dict[str, jax.Array]:
        each, score = scored(lambda x, sigma: task.energy(params, x, sigma, told(label)))(x, sigma)
        return {"energy": each, "score": score}

    def features(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {
            name: call(task, name, params, batch) for name in abilities(task) if name in ("features", "feature_map")
        }

    batch = {key: leaf for key, leaf in task.spec(samples).items() if key != "label"}
    label = (array(samples, dtype=jnp.int32),) if task.about.classes else ()
    found = {}
    if (chosen := sampling(task)) is not None:
        options = config.override(chosen(), fields, allow=allow)
        key = array(2, dtype=jnp.uint32)
        found["sampler"] = weights.Program(sampler, (key, *label), {"options": config.dump(options)})
    elif "features" in can:
        found["features"] = weights.Program(features, (batch,))
    if "denoise" in can:
        known = task.about.likelihood  # what is modelled, which need not be what a batch holds
        x = array(samples, *known.event) if known else next(iter(batch.values()))
        for name, program in (("denoiser", denoiser), *((("energy", energy),) if "energy" in can else ())):
            found[name] = weights.Program(program, (x, array(samples), *label), {"sigmas": task.sigmas})
    return found


def import_checkpoint(config: Any, file: Path, out: Path, which: weights.Which | None = None) -> str:
    """Bring a published checkpoint into an export; returns what to tell the user.

    The config, a run or a bare task, gives what shapes can't tell (head size, patch, noise); networks that the task holds
    and the checkpoint has not are those of `Run.weights`. A tokeniser beside the file, or beside the text encoder, is kept.

    Args:
        file: a file of tensors, or a folder of its parts.
        which: the weights or their average, of a file that holds both.

    Raises:
        UserError: every tensor that is missing, left over or of another shape, or a held network that is not given;
            nothing is written then.
    """
    task, given = (config.task, config.weights) if isinstance(config, Run) else (config, None)
    params = weights.from_official(task, weights.read_state_dict(file, which), _held(task, given or {}))
    model = Model(task, params, "imported", None, config.data if isinstance(config, Run) else None, (), out)
    _write(model, out, {}, _tokenizer(homes(file if file.is_dir() else file.parent, given)))
    count = sum(np.size(x) for x in jax.tree.leaves(params))
    use = f"`zoo sample {out}` draws from it" if isinstance(task, Samples) else "a run names it in its weights"
    note = f"\n{terms}" if (terms := _licence(model)) else ""
    return f"{out}: {count:,} parameters of {type(task).__name__}, every tensor used ({use}){note}"


def _held(task: Any, given: Mapping[str, str]) -> dict[str, Any]:
    """Parameters of the networks that a task holds and that its published layout leaves out."""
    held = task.about.held
    names = task.import_names() if held and isinstance(task, Published) else []
    there = {name.target.split("/")[0] for name in names if name.target}
    wanted = [key for key in held if key not in there] if names else []
    for key in wanted:
        if key not in given:
            raise UserError(
                f"weights.{key} is missing: {type(task).__name__} holds this network, and the checkpoint has it not; "
                f"{models.must_add(key, task)}"
            )
    return models.given_weights({key: given[key] for key in wanted}, task)
