"""`zoo export` and `zoo import`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo import dist, models, paths, weights
from zoo.commands.text import files, vocabulary_of
from zoo.errors import UserError
from zoo.models import TOKENIZER, Model, has_tokenizer, homes
from zoo.paths import Folder
from zoo.run import Run
from zoo.task import Noted, Published, Samples, abilities, call, is_text, speed
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
        if has_tokenizer(folder):
            with paths.sentence(folder / TOKENIZER):
                return {TOKENIZER: (folder / TOKENIZER).read_bytes()}
    return {}


def _write(model: Model, out: Path, metrics: dict[str, Any], files: Mapping[str, bytes]) -> None:
    count = sum(np.size(x) for x in jax.tree.leaves(model.params))
    card = weights.card(
        task=type(model.task).__name__,
        paper=models.paper(model.task),
        data=repr(model.data),
        steps=model.step,
        metrics=metrics,
        kind=model.kind,
        parameters=count,
        licence=_licence(model),
    )
    weights.save(out, model.params, models.export_config(model, metrics), card, files)


def export(model: Model, out: Path, form: str, samples: int) -> str:
    """Write an export in one of the forms; returns what to tell the user.

    zoo: safetensors, config and card. official: the published key layout, to the file `out` (.safetensors, .npz or
    .pth). stablehlo: a zoo export and beside it a portable program (cpu, cuda, tpu): the sampler, or for a task that has
    none its features, of `samples` examples a call.
    """
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
    program = _program(model.task, samples) if form == "stablehlo" else None
    beside = _tokenizer(model.homes)
    if is_text(model.task) and (vocabulary := vocabulary_of(model)) is not None:
        beside |= files(vocabulary)
    _write(model, out, metrics, beside)
    if program is None:
        return f"{out}: model.safetensors, config.json, README.md ({which})"
    with dist.portable():
        weights.export_stablehlo(out, program.call, model.params, *program.arguments, name=program.name)
    unit = model.task.about.unit
    what = {"sampler": "a sampler", "features": "a program for the features"}[program.name]
    return f"{out}: as a zoo export, and stablehlo/ with {what} of {samples} {unit} a call ({which})"


@dataclasses.dataclass(frozen=True)
class _Program:
    """What a task does in a portable program, as `weights.export_stablehlo` takes it."""

    name: str
    call: Callable[..., dict[str, jax.Array]]
    arguments: tuple[Any, ...]  # shapes of what follows the parameters


def _program(task: Any, samples: int) -> _Program:
    """The sampler, (params, key uint32 [2], labels [samples] where there are classes) -> what it draws; of a task that has
    none the features, (params, batch) -> `features` [samples, D] and where the task has one a `feature_map`.

    UserError where there is neither, for no samples, and for a sampler that needs captions.
    """
    kind = type(task).__name__
    if samples < 1:
        raise UserError(f"--samples {samples} leaves a portable program nothing to do; give 1 or more")
    can = abilities(task)
    if not {"sample", "features"} & set(can):
        raise UserError(f"{kind} has neither a sampler nor features to export; use --format zoo")
    if "sample" in can and task.about.conditions:
        raise UserError(
            f"--format stablehlo: the sampler of this {kind} takes captions, which a portable program has no place for "
            "yet; use --format zoo"
        )
    if "attention" in speed(task):  # a kernel of this machine would not run on the others
        task = dataclasses.replace(task, attention="xla")

    def sampler(params: Any, key: jax.Array, label: jax.Array | None = None) -> dict[str, jax.Array]:
        rng = jax.random.wrap_key_data(key)
        return task.sample(params, rng, samples, None if label is None else {"label": label})

    def features(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {
            name: call(task, name, params, batch) for name in abilities(task) if name in ("features", "feature_map")
        }

    if "sample" not in can:
        batch = {key: leaf for key, leaf in task.spec(samples).items() if key != "label"}
        return _Program("features", features, (batch,))
    label = (jax.ShapeDtypeStruct((samples,), jnp.int32),) if task.about.classes else ()
    return _Program("sampler", sampler, (jax.ShapeDtypeStruct((2,), jnp.uint32), *label))


def import_checkpoint(config: Any, file: Path, out: Path) -> str:
    """Bring a published checkpoint into an export; returns what to tell the user.

    The config, a run or a bare task, gives what shapes can't tell (head size, patch, noise); networks that the task holds
    and the checkpoint has not are those of `Run.weights`. A tokeniser beside the file, or beside the text encoder, is kept.

    Args:
        file: a file of tensors, or a folder of its parts.

    Raises:
        UserError: every tensor that is missing, left over or of another shape, or a held network that is not given;
            nothing is written then.
    """
    task, given = (config.task, config.weights) if isinstance(config, Run) else (config, None)
    params = weights.from_official(task, weights.read_state_dict(file), _held(task, given or {}))
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
