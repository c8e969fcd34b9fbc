"""Samples drawn into a folder: one file each, in resumable batches; PNG files and a sheet of images, or texts."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from PIL import Image

from zoo import config, dist, paths
from zoo.commands import strategy
from zoo.draws import KEYS, finite, keys, rows_of
from zoo.encoders.vae import HOW
from zoo.errors import UserError
from zoo.files import differences
from zoo.models import Model
from zoo.paths import Folder
from zoo.task import Counting, trace_of
from zoo.train.pictures import grid, save_png

_log = logging.getLogger("zoo")
_SHEET = 256  # images on a sheet at most
_TRACE = "trace.json"  # how each sample came about, where its sampler says so


class Form(Protocol):
    """What samples are: how one is kept, and what is shown of all."""

    @property
    def key(self) -> str:
        """What the sampler calls them."""

    @property
    def suffix(self) -> str:
        """Of the file of one, `000000` and this."""

    def save(self, out: Folder, i: int, drawn: Mapping[str, np.ndarray], about: Mapping[str, str]) -> None:
        """Write sample i of what the sampler gave for it, with what is known about it."""

    def show(self, out: Folder, n: int) -> str:
        """Show n samples that are there; what the user is told of where to look."""


@dataclass(frozen=True)
class Images:
    """Samples that are images, as PNG files and a sheet."""

    captions: Sequence[str] | None = None

    key = "image"
    suffix = ".png"

    def save(self, out: Folder, i: int, drawn: Mapping[str, np.ndarray], about: Mapping[str, str]) -> None:
        """Write image i, with its settings in the file."""
        save_png(out / f"{i:06d}.png", drawn["image"], about)

    def show(self, out: Folder, n: int) -> str:
        """Write the sheet."""
        _sheet(out, n, self.captions)
        return "sheet.png"


def _plain(options: Any) -> dict[str, Any]:
    """Options as JSON has them, without a method that is left open."""
    found = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    return {k: config.dump(v) for k, v in found.items() if (k, v) != ("method", "auto")}


def draw(
    model: Model,
    out: Folder,
    *,
    n: int,
    seed: int,
    conditions: Mapping[str, np.ndarray] | None,
    captions: Sequence[str] | None,
    asked: Mapping[str, Any],
    batch: int,
    options: Any,
    resolved: Any = None,
    form: Form | None = None,
) -> None:
    """Draw n samples into `out`: `000000.png` ..., `sheet.png`, `settings.json` and where the sampler says how they came about
    `trace.json`. Files already there are kept.

    Args:
        conditions: arrays that lead with n, for the task's `sample`; None: none.
        captions: n texts, for the sheet and the images' metadata; None: none.
        asked: what the user wrote for `conditions`, kept in `settings.json`: with it, sample i has the same condition
            whatever n.
        options: of the task's sampler, an instance of its `Sampling`.
        resolved: what stands in their place where they leave the choice to zoo; not part of the settings, so that a folder
            can be filled on another device.
        form: what samples are; None: images.

    Raises:
        UserError: a model that draws no images, or a sample that is lost for good; the folder holds samples with other
            settings, or cannot be written.
    """
    form = form or Images(captions)
    settings = {
        "model": str(model.folder),
        "step": model.step,
        "weights": model.kind,
        **({"task": config.digest(model.task)} if model.untrained else {}),  # its overrides
        "seed": seed,
        "keys": KEYS,
        **asked,
        **_plain(options),
        **({"network calls": options.network_calls} if isinstance(options, Counting) else {}),
    }
    taken = options if resolved is None else resolved
    method = getattr(taken, "method", None)
    sampler = jax.jit(lambda params, rng, given: model.task.sample(params, rng, batch, given, taken))
    boxed = jax.eval_shape(model.task.init, jax.random.key(0))
    mesh, params = dist.spread(model.params, batch, boxed)
    with dist.use(mesh):
        first = np.zeros(batch, int)
        if form.key not in sampler.eval_shape(params, keys(seed, first), rows_of(conditions, first)):
            raise UserError(
                f"{model.folder}: this model draws latents and names no autoencoder: set task.vae and weights.vae ({HOW}), or "
                "bring its weights into a config that does (`zoo export "
                "MODEL FILE --format official`, then `zoo import CONFIG FILE OUT weights.vae=...`)"
            )
    _claim(out, settings, form.suffix)
    word = "label" if "label" in asked else "prompt"
    there = set(paths.names(out))
    missing = [i for i in range(n) if f"{i:06d}{form.suffix}" not in there]
    for begin in range(0, len(missing), batch):
        rows = np.array(missing[begin : begin + batch])
        with dist.use(mesh):
            drawn, trace = trace_of(finite(sampler, params, seed, rows, conditions, batch, form.key))
        strategy.tell(drawn, method)
        if trace is not None:
            _keep(out, rows, trace.figures())
        for k, i in enumerate(rows):
            about = {**{k: str(v) for k, v in settings.items()}, "index": str(i)}
            if method is not None:
                about["method"] = strategy.described(method)
            if captions is not None:
                about[word] = captions[i]
            form.save(out, i, {key: x[k] for key, x in drawn.items()}, about)
        _log.info("%d of %d samples", n - len(missing) + begin + len(rows), n)
    shown = form.show(out, n)
    print(f"{n} samples in {out} ({shown}; {'average' if model.kind == 'ema' else model.kind} weights, seed {seed})")
    if kept := _kept(out):
        each = {name: np.array([kept[str(i)][name] for i in range(n) if str(i) in kept]) for name in kept[min(kept)]}
        means = ", ".join(f"{name} {x.mean():.3g} ({x.std():.2g})" for name, x in each.items())
        print(f"on the way, mean and spread of {len(next(iter(each.values())))} samples: {means} ({_TRACE})")


def _kept(out: Folder) -> dict[str, dict[str, float]]:
    """How samples came about, by their numbers; {} where nobody said."""
    path = out / _TRACE
    if _TRACE not in paths.names(out):
        return {}
    with paths.sentence(path):
        text = path.read_text()
    try:
        found: dict[str, dict[str, float]] = json.loads(text)
    except json.JSONDecodeError:
        raise UserError(f"{path} cannot be read; remove it or choose another --out") from None
    return found


def _keep(out: Folder, rows: np.ndarray, figures: Mapping[str, np.ndarray]) -> None:
    """How these samples came about, beside what is known of others."""
    new = {str(i): {name: x[k].item() for name, x in figures.items()} for k, i in enumerate(rows)}
    paths.write(out / _TRACE, json.dumps(_kept(out) | new, indent=1) + "\n")


def save_pictures(model: Model, pictures: Mapping[str, Image.Image]) -> dict[str, str]:
    """Write what a metric drew as `NAME-STEP.png` into `samples/` of the run folder; returns the path of each.

    Of an export, or a run folder that cannot be written, into `samples/` here. Nothing is overwritten: where that name is
    taken, as it is by the picture of training, it is `NAME-STEP-2.png`, and so on.

    Raises:
        UserError: neither can be written.
    """
    about = {"model": str(model.folder), "step": str(model.step), "weights": model.kind}
    here = paths.parse_path("samples")
    out, saved = model.samples_folder, {}
    for name, picture in pictures.items():
        file = f"{name}.png" if model.step is None else f"{name}-{model.step:07d}.png"
        try:
            path = _free(out, file)
            save_png(path, picture, about)
        except UserError as error:
            if out == here:
                raise
            _log.warning("%s; the pictures go to %s", error, here)
            out = here
            path = _free(out, file)
            save_png(path, picture, about)
        saved[name] = str(path)
    return saved


def _free(folder: Folder, file: str) -> Folder:
    """The path of a file that is not there yet: FILE, or its name with the first free number from 2 behind."""
    try:
        taken = set(paths.names(folder))
    except OSError as error:
        raise UserError(f"cannot write pictures to {folder} ({error.strerror or error})") from None
    stem, dot, suffix = file.rpartition(".")
    names = itertools.chain([file], (f"{stem}-{k}{dot}{suffix}" for k in itertools.count(2)))
    return folder / next(name for name in names if name not in taken)


def _claim(out: Folder, settings: dict[str, Any], suffix: str) -> None:
    """Make the folder, or make sure that what it holds was drawn the same way."""
    path = out / "settings.json"
    try:
        if not paths.in_bucket(out):  # where there are no folders
            out.mkdir(parents=True, exist_ok=True)
        inside = paths.names(out)
        filled = {Path(name).suffix for name in inside if name[:1].isdigit()}
        if path.name in inside and filled & {".png", ".txt", ".npz"}:  # whichever the model draws this time
            with paths.sentence(path):
                text = path.read_text()
            differ = differences(json.loads(text), json.loads(json.dumps(settings)))
            if differ:
                raise UserError(
                    f"{out} holds samples drawn with other settings ({'; '.join(differ[:3])}); choose another --out"
                )
        elif suffix in filled:
            kind = {".png": "images", ".txt": "texts"}.get(suffix, "clips")
            raise UserError(f"{out} holds {kind} that zoo did not draw; choose another --out")
        else:
            paths.write(path, json.dumps(settings, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write samples to {out}: {error.strerror}; choose another --out") from None
    except json.JSONDecodeError:
        raise UserError(f"{path} cannot be read; remove it or choose another --out") from None


def _sheet(out: Folder, n: int, captions: Sequence[str] | None) -> None:
    count = min(n, _SHEET)
    images = []
    for i in range(count):
        path = out / f"{i:06d}.png"
        with paths.sentence(path), path.open("rb") as opened, Image.open(opened) as file:
            images.append(np.asarray(file, np.float32) / 127.5 - 1)
    stack = np.stack(images)
    stack = stack[..., None] if stack.ndim == 3 else stack
    save_png(out / "sheet.png", grid(stack, None if captions is None else list(captions[:count])))
