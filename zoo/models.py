"""A run folder, an export or a shipped name, opened: its task, its parameters and where they come from."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from zoo import config, dist, paths, weights
from zoo.encoders.tokenizer import NAME as TOKENIZER
from zoo.encoders.tokenizer import Tokenizer
from zoo.errors import UserError, suggest
from zoo.files import sha256
from zoo.paths import Folder, shipped
from zoo.task import Network, Params
from zoo.train import optim
from zoo.train.checkpoint import Checkpoints
from zoo.train.step import abstract_state


@dataclass(frozen=True)
class Model:
    """A task with parameters, and what is known of them."""

    task: Any
    params: Params
    kind: str  # "ema" or "raw": which weights a run gave; "imported" for a published checkpoint
    step: int | None
    data: Any  # data description it was trained on, None for an import
    labels: tuple[str, ...]  # class names
    folder: Folder
    run: Any = None  # the whole Run, where the folder is one

    @property
    def homes(self) -> list[Folder]:
        """Where its tokeniser may lie."""
        return homes(self.folder, self.run.weights if self.run is not None else None)


def read_config(folder: Folder) -> dict[str, Any]:
    """config.json of a run folder or an export; UserError when it is damaged."""
    path = folder / "config.json"
    try:
        with paths.sentence(path):
            text = path.read_text()
        data = json.loads(text)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{folder} holds no config.json: it is neither a run folder nor an export") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it from a copy") from None
    described = data.get("run", data.get("task")) if isinstance(data, dict) else None
    if not isinstance(described, dict) or "class" not in described:
        raise UserError(f"{path} is not a config written by zoo")
    return data


def locate(name: str | Folder) -> Folder:
    """The folder of a run, an export or a shipped name."""
    folder = paths.reach(name)
    if paths.in_bucket(folder):
        return folder
    if folder.is_dir():
        return folder
    known = shipped()
    if str(name) in known:
        return known[str(name)]
    here = [str(p) for p in Path("runs").glob("*") if p.is_dir()]
    raise UserError(f"{name} is neither a folder nor a shipped model; {suggest(str(name), [*known, *here])}")


def open_task(name: str | Folder, allow: Sequence[str] = ()) -> tuple[Any, Folder]:
    """The task of a run, an export or a shipped name, without its parameters, and its folder."""
    folder = locate(name)
    about = read_config(folder)
    described = about["run"]["task"] if "run" in about else about["task"]
    return config.undump(described, allow, "task"), folder


def _one_device(on_host: bool) -> list[jax.Device]:
    if on_host:
        with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS may leave the host out
            return jax.local_devices(backend="cpu")[:1]
    return jax.local_devices()[:1]


def open_model(name: str | Folder, *, raw: bool = False, allow: Sequence[str] = (), on_host: bool = False) -> Model:
    """Open a run folder (its newest checkpoint), an export, or a shipped name such as `tarflow-digits`.

    Args:
        raw: the last weights even where the run keeps an average.
        allow: packages besides zoo whose classes the config may name.
        on_host: leave the parameters in the host's memory, for who shares them out among devices himself.

    Raises:
        UserError: not a run or export, damaged, or naming foreign classes (nothing is imported then).
    """
    folder = locate(name)
    about = read_config(folder)
    labels = tuple(about.get("labels", ()))
    if "run" not in about:
        task = config.undump(about["task"], allow, "task")
        data = config.undump(about.get("data"), allow, "data")
        with paths.here(folder, ("config.json", "model.safetensors")) as near:
            flat, _ = weights.load(near)
        params = weights.matching(flat, weights.abstract(task))
        params = params if on_host else jax.tree.map(jax.numpy.asarray, params)
        return Model(task, params, about.get("weights", "raw"), about.get("step"), data, labels, folder)
    run = config.undump(about["run"], allow, "run")
    mesh = dist.Mesh(data=1).build(_one_device(on_host))
    checkpoints = Checkpoints(folder, create=False)
    if not checkpoints.steps():
        raise UserError(
            f"{folder} holds no checkpoint yet; let the run reach its first save (checkpoint.every={run.checkpoint.every} steps)"
        )
    with dist.use(mesh, run.rules):  # not that of a run which opens this one
        abstract = abstract_state(run.task, optim.build(run.optim, run.steps), mesh, run.ema)
        found = checkpoints.restore_weights(abstract)
    checkpoints.close()
    assert found is not None
    step, params, ema = found
    average = bool(run.ema) and not raw
    params = {**params, **ema} if average else params
    return Model(run.task, params, "ema" if average else "raw", step, run.data, labels, folder, run)


def export_config(model: Model, metrics: dict[str, Any] | None = None) -> dict[str, Any]:
    """What config.json of an export says: enough to rebuild the task, and where the weights come from."""
    return {
        "format": 1,
        "task": config.dump(model.task),
        "data": config.dump(model.data),
        "labels": list(model.labels),
        "step": model.step,
        "weights": model.kind,
        "metrics": metrics or {},
    }


def _hint(task: Any, key: str) -> tuple[str, str]:
    """How to come by the network that a task takes from `Run.weights` under `key`, "" where it does not say, and the entry."""
    network = task.about.networks.get(key, Network())
    return network.how, network.entry or _entry(key)


def _entry(key: str) -> str:
    return f"weights.{key}=OUT (or weights={{'{key}': 'OUT'}} where the config has none)"


def given_weights(wanted: Mapping[str, str], task: Any, allow: Sequence[str] = ()) -> dict[str, Params]:
    """Parameter trees for `Run.weights`: {"vae": EXPORT} a whole one, {"flow0": "RUN:flow0"} one key of it.

    Args:
        task: the networks that it holds tell what "" most likely is, and how to come by that.

    Raises:
        UserError: a model that is missing, with the way to get it where the task knows one, and what `open_model` raises.
    """
    found = {}
    for key, where in wanted.items():
        try:
            locate(weights.parts_of(where)[0])
        except UserError as error:
            known = task.about.networks
            name = key or next((k for k in known if known[k].entry.startswith("weights={'': ")), "")
            hint, _ = _hint(task, name)
            field = f"weights.{key}" if key else "weights['']"
            raise UserError(f"{field}: {error}{f'; {hint}' if hint else ''}") from None
        found[key] = weights.resolve(where, lambda name: open_model(name, allow=allow).params)
    return found


def must_add(key: str, task: Any) -> str:
    """The end of a sentence on `weights.KEY` that is missing: how to come by such a network, and where a config names it."""
    how, entry = _hint(task, key)
    return f"{how}; then add {entry}" if how else f"add {entry}, OUT being a run or an export"


def homes(folder: Folder | None, given: Mapping[str, str] | None) -> list[Folder]:
    """Where the tokeniser of a model may lie: its own folder, then that of its text encoder (`Run.weights`)."""
    found = [] if folder is None else [folder]
    for key in ("text", ""):
        if given and key in given:
            name, _ = weights.parts_of(given[key])
            try:
                found.append(locate(name))
            except UserError:
                found.append(paths.where(name))
    return found


def has_tokenizer(folder: Folder) -> bool:
    """Whether a folder holds the file of a tokeniser."""
    with paths.sentence(folder):
        return (folder / TOKENIZER).is_file()


def tokenizer_digest(file: Folder) -> str:
    """What tells one tokeniser from another: 16 digits of the digest of its file, or of the one in this folder."""
    with paths.sentence(file):
        file = file / TOKENIZER if file.is_dir() else file
        return sha256(file.read_bytes())[:16]


def open_tokenizer(
    task: Any, places: Sequence[Folder], file: str | None = None, way: str = "with --tokenizer FILE"
) -> tuple[Tokenizer, str]:
    """The tokeniser of a task's captions, and the digest of its file.

    Args:
        places: folders in which it may lie, as of `homes`.
        file: where it lies; None: in the first of `places` that has one.
        way: how the user says where it lies.

    Raises:
        UserError: there is none, or it has more pieces than the task's text encoder knows.
    """
    if file is not None:
        found, digest = Tokenizer(file), tokenizer_digest(Path(file))
    else:
        folder = next((place for place in places if has_tokenizer(place)), None)
        if folder is None:
            where = f"there is none in {' or '.join(map(str, places))}" if places else "none is known"
            raise UserError(
                f"captions need the tokeniser {TOKENIZER}, and {where}; copy it there from "
                f"where the text encoder is published, or give it {way}"
            )
        with paths.here(folder, (TOKENIZER,)) as near:
            found, digest = Tokenizer(near), tokenizer_digest(near)
    captions = task.about.captions
    if captions is not None and captions.vocabulary is not None:
        found.check(captions.vocabulary)
    return found, digest


def loaded_for(
    metric: Any, allow: Sequence[str] = (), task: Any = None, places: Sequence[Folder] = ()
) -> dict[str, Any]:
    """What a metric asks for besides the task: the network that its `network()` names, opened, and for one with
    `captions` the tokeniser of `task`, looked for in `places` unless its field `tokenizer` names a file."""
    name = metric.network()
    found: dict[str, Any] = {"network": open_model(name, allow=allow)} if name else {}
    if metric.captions:
        found["encode"], _ = open_tokenizer(
            task, places, metric.tokenizer or None, f"in the field tokenizer of the metric {metric.name}"
        )
    return found
