"""A run folder, an export, a shipped name or a config that needs no training, opened: `Model`, and where it comes from."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from zoo import captions, config, dist, paths, weights
from zoo.data.text.tokens import check_ids
from zoo.data.text.vocabulary import Vocabulary
from zoo.draws import Use, finite, keys, label_numbers
from zoo.errors import UserError, suggest
from zoo.fields import Count, Seed, fits, sentence
from zoo.paths import Folder, shipped
from zoo.run import Run
from zoo.task import (
    Denoises,
    Encodes,
    Likely,
    Network,
    Params,
    Samples,
    abilities,
    call,
    check_needs,
    holds,
    is_text,
    options_of,
    paper,
)
from zoo.train import averages, optim
from zoo.train.checkpoint import Checkpoints
from zoo.train.pictures import class_name, grid
from zoo.train.step import abstract_state

_log = logging.getLogger("zoo")
_BATCH = 64  # samples drawn at a time


@dataclass(frozen=True, eq=False)
class Model:
    """A task with parameters, what is known of them, and what it can do, compiled once for each shape.

    `task, params = model` takes it apart.
    """

    task: Any
    params: Params
    kind: str  # "ema" or "raw": which weights a run gave; "imported"; of a config what its `weights` say
    step: int | None
    data: Any  # data description it was trained on, None for an import
    labels: tuple[str, ...]  # class names
    folder: Folder  # of a config its file
    run: Run | None = None  # the whole Run, where it is that of a run folder or a config

    def __iter__(self) -> Iterator[Any]:
        return iter((self.task, self.params))

    def __getitem__(self, index: int) -> Any:
        return (self.task, self.params)[index]

    def __len__(self) -> int:
        return 2

    def __repr__(self) -> str:
        """Five lines: what it is, its size, what it can do, which weights it has, where they are."""
        spec = ", ".join(f"{key} {list(leaf.shape[1:])}" for key, leaf in self.task.spec(1).items())
        kind = {"ema": "average", "raw": "of the last step"}.get(self.kind, self.kind)
        return "\n".join(
            (
                f"{type(self.task).__name__}, of {paper(self.task) or type(self.task).__module__}",
                f"size: {sum(np.size(x) for x in jax.tree.leaves(self.params)):,} parameters; {self.task.about.unit} as {spec}",
                f"can: {', '.join(abilities(self.task)) or 'train alone'}",
                f"weights: {kind}{'' if self.step is None else f', step {self.step:,}'}",
                f"from: {self.folder}",
            )
        )

    @property
    def untrained(self) -> bool:
        """Whether it is that of a config, and so has a file and no folder."""
        return self.run is not None and self.step is None

    @property
    def homes(self) -> list[Folder]:
        """Where its tokeniser or vocabulary may lie."""
        return homes(None if self.untrained else self.folder, self.run.weights if self.run is not None else None)

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The one in its folder, or in that of its weights, else that of its data; None, and a note, where none is."""
        found, why = captions.vocabulary(self.homes, self.data)
        if found is None:
            _log.info("%s has no vocabulary.json%s: tokens are told by their numbers", self.folder, why)
        return found

    @property
    def samples_folder(self) -> Folder:
        """Where samples go: `samples/` of a run folder, of others `samples/` here."""
        return paths.parse_path("samples") if self.run is None or self.untrained else self.folder / "samples"

    @cached_property
    def _programs(self) -> dict[str, Any]:
        """The task's abilities, each compiled when it is first asked for a shape."""
        static = {"sample": (2, 4)}  # how many, and the options
        return {
            name: jax.jit(partial(call, self.task, name), static_argnums=static.get(name, ()))
            for name in ("sample", "nll", "features", "denoise")
        }

    def sample(
        self,
        n: int,
        seed: int = 0,
        conditions: Mapping[str, Any] | None = None,
        *,
        label: Any = None,
        prompt: str | Sequence[str] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """What the task's sampler gives, such as `image` [n, H, W, C] in [-1, 1]; sample i is that of `zoo sample` with this seed.

        Args:
            conditions: arrays that lead with n; None: those that `label` and `prompt` make.
            label: a class, by name or number, or several in turn; "none": none; None: all of them in turn.
            prompt: a caption, or several in turn; None: none.
            options: fields of `task.Sampling`.

        Raises:
            UserError: no sampler, an option it has not, or a value that does not fit.
        """
        check_needs(self.task, (Samples,), "Model.sample")
        for name, value, kind in (("n", n, Count), ("seed", seed, Seed)):
            if not fits(value, kind):
                raise UserError(sentence(name, repr(value), kind))
        for name, value in options.items():
            if isinstance(value, jax.Array | np.ndarray | np.generic):
                raise UserError(
                    f"{name}={value!r} is an array, and options are parts of the program; give float({name})"
                )
        chosen, about = options_of(self.task, options, "Model.sample"), self.task.about
        if conditions is not None:
            if label is not None or prompt is not None:
                raise UserError("sample: conditions= stand in the place of label= and prompt=; leave these out")
            conditions = {key: np.asarray(array) for key, array in conditions.items()}
            self._check("sample", conditions, n)
        else:
            if prompt is not None and not {"tokens", "text"} & set(about.conditions):
                raise UserError(f"prompt={prompt!r}: this model is not conditioned on captions; leave it out")
            words = None if label is None else np.atleast_1d(np.asarray(label, object)).tolist()
            labels = label_numbers(words, about.classes, self.labels, n)
            texts = [prompt] if isinstance(prompt, str) else prompt or None
            conditions, _, _ = captions.conditions(self, labels, texts, n, chosen)
        size, parts = min(n, _BATCH), []

        def sampler(params: Params, rng: jax.Array, given: Any) -> Any:
            return self._programs["sample"](params, rng, size, given, chosen)

        for first in range(0, n, size):
            rows = np.arange(first, min(first + size, n))
            key = "tokens" if is_text(self.task) else "image"
            parts.append(finite(sampler, self.params, seed, rows, conditions, size, key))
        found: dict[str, Any] = jax.tree.map(lambda *each: np.concatenate(each), *parts)
        return found

    def nll(self, batch: Mapping[str, Any], seed: int = 0) -> jax.Array:
        """-log p [B] in nats; the noise of example i follows from (seed, i)."""
        check_needs(self.task, (Likely,), "Model.nll")
        count = self._check("nll", batch)
        return self._programs["nll"](self.params, dict(batch), keys(seed, np.arange(count), use=Use.LIKELIHOOD))

    def features(self, batch: Mapping[str, Any]) -> jax.Array:
        """Features [B, D]."""
        check_needs(self.task, (Encodes,), "Model.features")
        self._check("features", batch)
        return self._programs["features"](self.params, dict(batch))

    def denoise(self, x: Any, sigma: Any, conditions: Mapping[str, Any] | None = None) -> jax.Array:
        """E[x0 | x] of x = x0 + sigma n; sigma is a scalar or [B], between the two of `task.sigmas`."""
        check_needs(self.task, (Denoises,), "Model.denoise")
        low, high = self.task.sigmas
        if not np.all((low <= np.asarray(sigma)) & (np.asarray(sigma) <= high)):
            made = f"{low} alone" if low == high else f"{low} to {high}"
            raise UserError(f"sigma={sigma} is out of range; {type(self.task).__name__} was made for {made}")
        self._check("denoise", conditions or {}, np.shape(x)[0])
        return self._programs["denoise"](self.params, x, sigma, conditions)

    def sheet(self, images: Any, captions: Sequence[str] | None = None) -> Image.Image:
        """One picture of images [N, H, W, C] in [-1, 1], or of those that `sample` gave, above their classes."""
        if isinstance(images, Mapping):
            if "image" not in images:
                raise UserError(f"sheet: these samples are no images; they hold {', '.join(images)}")
            if captions is None and "label" in images:
                captions = [class_name(self.labels, int(i)) for i in images["label"]]
            images = images["image"]
        return grid(images, captions)

    def _check(self, what: str, batch: Mapping[str, Any], n: int | None = None) -> int:
        """How many examples a batch has, or n of whose conditions it consists.

        UserError for a key that is missing or unknown, another shape than the task's, or tokens that its texts cannot hold.
        """
        spec, about = self.task.spec(1), self.task.about
        if is_text(self.task) and "tokens" in batch:
            check_ids(batch["tokens"], -1 if about.holes and n is not None else 0, about.vocabulary, what)
        told = ("label", *about.conditions)
        needed = [key for key in spec if key not in told] if n is None else []
        known = {k: v for k, v in spec.items() if n is None or k in (*told, *about.completes)}
        for key in (*needed, *batch):
            if key not in known:
                raise UserError(f"{what}: {type(self.task).__name__} takes no {key!r} here; {suggest(key, known)}")
            shape, wanted = np.shape(batch[key]) if key in batch else (), spec[key].shape
            n = shape[0] if n is None and shape else n
            same = len(shape) == len(wanted) if about.grid else shape[1:] == wanted[1:]
            if not shape or not same or shape[0] != n:
                given = f"has the shape {list(shape)}" if key in batch else "is missing"
                wide = ", ".join(map(str, ("N" if n is None else n, *wanted[1:])))
                raise UserError(f"{what}: {key} {given}; give an array of the shape [{wide}]")
        return n or 0


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


def _folder(name: str | Folder) -> Folder | None:
    """The folder of a run, an export or a shipped name; None where there is none."""
    folder = paths.require_bucket(name)
    return folder if paths.in_bucket(folder) or folder.is_dir() else shipped().get(str(name))


def locate(name: str | Folder, configs: Iterable[str] = ()) -> Folder:
    """The folder of a run, an export or a shipped name.

    Args:
        configs: names of what would do as well, for the error.
    """
    folder = _folder(name)
    if folder is not None:
        return folder
    here = [str(p) for p in Path("runs").glob("*") if p.is_dir()]
    known = [*shipped(), *here, *configs]
    other = ", and no config either" if configs else ""
    raise UserError(f"{name} is neither a folder nor a shipped model{other}; {suggest(str(name), known)}")


def is_config(name: str | Folder) -> bool:
    """Whether a model is a config; a folder or a shipped name comes before it. UserError where it is neither."""
    if _folder(name) is not None:
        return False
    try:
        config.locate(str(name))
    except UserError:
        locate(name, config.shipped())
    return True


def _read_run(name: str | Folder, fields: Sequence[str]) -> tuple[Run, Folder]:
    """The run that a config describes, and its file."""
    run = config.load(str(name), fields)
    if not isinstance(run, Run):
        raise UserError(f"{name} holds a {type(run).__name__}, not a Run; name a run, an export, or a config of a Run")
    return run, config.locate(str(name))[0]


def open_task(name: str | Folder, allow: Sequence[str] = (), fields: Sequence[str] = ()) -> tuple[Any, Folder]:
    """The task of a model, without its parameters, and its folder, or its file where it is a config; as `open_model`."""
    if is_config(name):
        run, file = _read_run(name, fields)
        return run.task, file
    folder = locate(name)
    about = read_config(folder)
    described = about["run"]["task"] if "run" in about else about["task"]
    return config.undump(described, allow, "task"), folder


def _one_device(on_host: bool) -> list[jax.Device]:
    if on_host:
        with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS may leave the host out
            return jax.local_devices(backend="cpu")[:1]
    return jax.local_devices()[:1]


def open_model(
    name: str | Folder,
    fields: Sequence[str] = (),
    *,
    raw: bool = False,
    ema: float | None = None,
    allow: Sequence[str] = (),
    on_host: bool = False,
) -> Model:
    """Open a run folder (its newest checkpoint), an export, a shipped name such as `tarflow-digits`, or a config.

    A config, by its path or name, is opened without training where its `weights` give every parameter.

    Args:
        fields: overrides of a config, such as `weights.vae=OUT`.
        raw: the last weights even where the run keeps an average.
        ema: the width of the average, one that a run keeps or one made of its snapshots; None: the one named first.
        allow: packages besides zoo whose classes the config may name.
        on_host: leave the parameters in the host's memory, for who shares them out among devices himself.

    Raises:
        UserError: nothing of these, damaged, naming foreign classes (nothing is imported then), or a config some of whose
            parameters would stay random.
    """
    if raw and ema is not None:
        raise UserError(f"--raw takes the last weights and ema={ema:g} an average; leave one of them out")
    if is_config(name):
        if raw or ema is not None:
            given = "--raw" if raw else f"ema={ema:g}"
            raise UserError(f"{given} is for runs, and the weights of {name} are those that it names; leave it out")
        return _open_config(*_read_run(name, fields), allow, on_host)
    folder = locate(name)
    about = read_config(folder)
    labels = tuple(about.get("labels", ()))
    if "run" not in about:
        if ema is not None:
            raise UserError(f"ema={ema:g} is for runs, and {folder} is an export of one kind of weights; leave it out")
        task = config.undump(about["task"], allow, "task")
        data = config.undump(about.get("data"), allow, "data")
        with paths.local_copy(folder, ("config.json", "model.safetensors")) as near:
            flat, _ = weights.load(near)
        like = weights.abstract(task)
        params = jax.tree.map(lambda x, of: np.asarray(x, of.dtype), weights.matching(flat, like), like)
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
    step, params, average = found
    if raw or not (run.ema or ema):
        return Model(run.task, params, "raw", step, run.data, labels, folder, run)
    snapshots = Checkpoints(folder, create=False, inside="snapshots")
    others = snapshots.averages(abstract.ema) if ema else None  # which a bucket is asked for one by one
    params = {**params, **averages.chosen(run.ema, average, ema, step, others)}
    snapshots.close()
    # what was measured while training is of the first of several
    kind = "ema" if ema is None or f"{ema:g}" == next(iter(averages.named(run.ema))) else f"ema-{ema:g}"
    return Model(run.task, params, kind, step, run.data, labels, folder, run)


def _open_config(run: Run, file: Folder, allow: Sequence[str], on_host: bool) -> Model:
    """The model of a config whose every parameter comes from `Run.weights`."""
    given = run.weights or {}
    abstract = weights.abstract(run.task)
    params, _ = weights.fill(abstract, given_weights(given, run.task, allow, on_host), given, run.task)
    check_filled(run, params, dict.fromkeys([*(k for k in run.task.about.networks if k in params), *params]))
    params = params if on_host else jax.tree.map(jnp.asarray, params)
    labels: tuple[str, ...] = ()
    if run.task.about.classes:
        with contextlib.suppress(UserError, OSError, ImportError):  # the data need not be here
            labels = run.labels()
    kind = ", ".join(f"{key}={where}" if key else where for key, where in given.items())
    return Model(run.task, params, kind or "none", None, run.data, labels, file, run)


def check_filled(run: Run, filled: Params, keys: Iterable[str]) -> None:
    """UserError where parameters under one of these keys would stay random.

    Args:
        filled: abstract parameters with the trees of `Run.weights` put in, so that what stays fresh has no numbers.
    """
    task, name, given = run.task, type(run.task).__name__, run.weights or {}
    parts = {key: weights.flatten({key: filled[key]}) for key in keys}
    fresh = {k: [n for n, x in part.items() if isinstance(x, jax.ShapeDtypeStruct)] for k, part in parts.items()}
    key = next((key for key, names in fresh.items() if names), None)
    if key is None:
        return
    network, first = key in task.about.networks, fresh[key][0]
    without = _without(task, key) if network else ""
    if len(fresh[key]) < len(parts[key]):
        raise UserError(
            f"weights['']={given['']} leaves {len(fresh[key])} of the {len(parts[key])} tensors of {key} random ({first} ...); "
            f"give the task the sizes of that network, or another one{without}"
        )
    left = weights.grouped(n for names in fresh.values() for n in names)
    why = f"weights.{key} is missing: {name} holds this network"
    why = why if network else f"weights[''] is missing: this {name} is not trained here"
    raise UserError(f"{why}, and {left} would stay random; {must_add(key, task)}{without}")


def _without(task: Any, key: str) -> str:
    """The way out of a network that the task can do without."""
    try:
        dataclasses.replace(task, **{key: None})
    except (TypeError, UserError):
        return ""
    return f"; or set task.{key}=none"


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
    network = task.about.networks.get(key, Network(entry="weights={'': 'OUT'}"))
    return network.how, network.entry or f"weights.{key}=OUT"


def given_weights(
    wanted: Mapping[str, str], task: Any, allow: Sequence[str] = (), on_host: bool = False
) -> dict[str, Params]:
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
        network, whole = task.about.networks.get(key), not weights.parts_of(where)[1]

        def read(
            name: str, key: str = key, where: str = where, network: Network | None = network, whole: bool = whole
        ) -> Params:
            model = open_model(name, allow=allow, on_host=on_host)
            if network is not None and whole and network.can is not None and not holds(model.task, network.can):
                raise UserError(
                    f"weights.{key}={where}: {type(model.task).__name__} is not what {key!r} is; {_hint(task, key)[0]}"
                )
            if network is not None:
                config.check_alike(network.task, model.task, network.alike, f"weights.{key}={where}")
            return model.params

        found[key] = weights.resolve(where, read)
    return found


def must_add(key: str, task: Any) -> str:
    """The end of a sentence on `weights.KEY` that is missing: how to come by such a network, and where a config names it."""
    how, entry = _hint(task, key)
    if how:
        return f"{how}; then add {entry}"
    return f"add {entry}, {'OUT' if 'OUT' in entry else 'RUN'} being a run or an export"


def homes(folder: Folder | None, given: Mapping[str, str] | None) -> list[Folder]:
    """Where the tokeniser of a model may lie: its own folder, then that of its text encoder (`Run.weights`)."""
    found = [] if folder is None else [folder]
    for key in ("text", ""):
        if given and key in given:
            name, _ = weights.parts_of(given[key])
            try:
                found.append(locate(name))
            except UserError:
                found.append(paths.parse_path(name))
    return found


def loaded_for(
    metric: Any, allow: Sequence[str] = (), task: Any = None, places: Sequence[Folder] = (), data: Any = None
) -> dict[str, Any]:
    """What a metric asks for besides the task: the network that its `opens()` names, opened, and for one with
    `captions` what makes numbers of those of `task`, looked for in `places` and `data` unless its field `tokenizer` names a file.
    UserError also for captions that do not fit."""
    name = metric.opens()
    found: dict[str, Any] = {"network": open_model(name, allow=allow)} if name else {}
    if metric.captions:
        way = f"in the field tokenizer of the metric {metric.name}"
        found["encode"], _ = captions.encoder(task, places, data, metric.tokenizer or None, way)
        if task.about.vocabulary:  # which refuses where a tokeniser cuts
            metric.check_captions(task, found["encode"])
    return found
