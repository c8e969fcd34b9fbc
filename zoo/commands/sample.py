"""`zoo sample`: PNG files and a sheet, in resumable batches."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo import config, dist, paths
from zoo.commands import strategy
from zoo.errors import UserError
from zoo.models import Model
from zoo.paths import Folder
from zoo.train.report import grid, save_png

_log = logging.getLogger("zoo")
_RETRIES = 3  # times that a sample which overflowed is drawn again, from new noise
_SHEET = 256  # images on a sheet at most


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: config.dump(v) for k, v in options.items()}


def keys(seed: int, indices: np.ndarray, attempt: int = 0) -> jax.Array:
    """One key per sample: sample i depends on (seed, i) and the attempt alone, whatever the batch."""
    base = jax.random.fold_in(jax.random.key(seed), attempt)
    return jax.vmap(lambda i: jax.random.fold_in(base, i))(jnp.asarray(indices))


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
    options: Mapping[str, Any],
    resolved: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Draw n samples into `out`: `000000.png` ..., `sheet.png` and `settings.json`. Files already there are kept.

    Args:
        conditions: arrays that lead with n, for the task's `sample`; None: none.
        captions: n texts, for the sheet and the images' metadata; None: none.
        asked: what the user wrote for `conditions`, kept in `settings.json`: with it, sample i has the same condition
            whatever n.
        resolved: what stands in the place of options that leave the choice to zoo; not part of the settings, so that a
            folder can be filled on another device.

    Raises:
        UserError: a model that draws no images; the folder holds samples with other settings, or cannot be written.
    """
    settings = {
        "model": str(model.folder),
        "step": model.step,
        "weights": model.kind,
        "seed": seed,
        **asked,
        **_plain({k: v for k, v in options.items() if (k, v) != ("method", "auto")}),
    }
    taken = {**options, **resolved}
    sampler = jax.jit(lambda params, rng, given: model.task.sample(params, rng, batch, given, **taken))
    boxed = jax.eval_shape(model.task.init, jax.random.key(0))
    mesh, params = dist.spread(model.params, batch, boxed)
    with dist.use(mesh):
        first = np.zeros(batch, int)
        if "image" not in sampler.eval_shape(params, keys(seed, first), _rows(conditions, first)):
            raise UserError(
                f"{model.folder}: this model draws latents and names no autoencoder: set task.vae and weights.vae "
                "(`zoo import starflow/sd_vae FILE OUT`), or bring its weights into a config that does (`zoo export "
                "MODEL FILE --format official`, then `zoo import CONFIG FILE OUT weights.vae=...`)"
            )
    _claim(out, settings)
    word = "label" if conditions is not None and "label" in conditions else "prompt"
    there = set(paths.names(out))
    missing = [i for i in range(n) if f"{i:06d}.png" not in there]
    for begin in range(0, len(missing), batch):
        rows = np.array(missing[begin : begin + batch])
        with dist.use(mesh):
            images, lost, told = _finite(sampler, params, seed, rows, conditions, batch)
        strategy.tell(told, taken.get("method", "sequential"))
        for i, image in zip(rows, images):
            about = {**{k: str(v) for k, v in settings.items()}, "index": str(i)}
            if "method" in taken:
                about["method"] = strategy.described(taken["method"])
            if captions is not None:
                about[word] = captions[i]
            save_png(out / f"{i:06d}.png", image, about)
        if lost:
            _log.warning(
                "samples %s are not finite after %d tries; their missing pixels are marked",
                ", ".join(map(str, lost)),
                _RETRIES + 1,
            )
        _log.info("%d of %d samples", n - len(missing) + begin + len(rows), n)
    _sheet(out, n, captions)
    print(f"{n} samples in {out} (sheet.png; {'average' if model.kind == 'ema' else model.kind} weights, seed {seed})")


def _rows(conditions: Mapping[str, np.ndarray] | None, rows: np.ndarray) -> dict[str, jax.Array] | None:
    return None if conditions is None else {key: jnp.asarray(array[rows]) for key, array in conditions.items()}


def _finite(
    sampler: Any,
    params: Any,
    seed: int,
    rows: np.ndarray,
    conditions: Mapping[str, np.ndarray] | None,
    batch: int,
) -> tuple[np.ndarray, list[int], dict[str, np.ndarray]]:
    """Samples of these rows, those that overflow drawn again from new noise; which overflowed to the last; what the sampler told."""
    padded = np.resize(rows, batch)  # one compiled shape, whatever is left
    given = _rows(conditions, padded)
    drawn = {k: np.array(x)[: len(rows)] for k, x in sampler(params, keys(seed, padded), given).items()}
    images, told = drawn.pop("image"), drawn
    for attempt in range(1, _RETRIES + 1):
        bad = [k for k in range(len(rows)) if not np.isfinite(images[k]).all()]
        if not bad:
            return images, [], told
        _log.warning("samples %s overflowed and are drawn again", ", ".join(str(rows[k]) for k in bad))
        again = np.array(sampler(params, keys(seed, padded, attempt), given)["image"])
        for k in bad:
            images[k] = again[k]
    return images, [int(rows[k]) for k in range(len(rows)) if not np.isfinite(images[k]).all()], told


def _claim(out: Folder, settings: dict[str, Any]) -> None:
    """Make the folder, or make sure that what it holds was drawn the same way."""
    path = out / "settings.json"
    try:
        if not paths.in_bucket(out):  # where there are no folders
            out.mkdir(parents=True, exist_ok=True)
        inside = paths.names(out)
        if path.name in inside:
            with paths.sentence(path):
                text = path.read_text()
            differ = config.differences(json.loads(text), json.loads(json.dumps(settings)))
            if differ:
                raise UserError(
                    f"{out} holds samples drawn with other settings ({'; '.join(differ[:3])}); choose another --out"
                )
        elif any(name[:1].isdigit() and name.endswith(".png") for name in inside):
            raise UserError(f"{out} holds images that zoo did not draw; choose another --out")
        else:
            with paths.sentence(path, "write"):
                path.write_text(json.dumps(settings, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write samples to {out}: {error.strerror}; choose another --out") from None
    except json.JSONDecodeError:
        raise UserError(f"{path} cannot be read; remove it or choose another --out") from None


def _sheet(out: Folder, n: int, captions: Sequence[str] | None) -> None:
    from PIL import Image

    count = min(n, _SHEET)
    images = []
    for i in range(count):
        path = out / f"{i:06d}.png"
        with paths.sentence(path), path.open("rb") as opened, Image.open(opened) as file:
            images.append(np.asarray(file, np.float32) / 127.5 - 1)
    stack = np.stack(images)
    stack = stack[..., None] if stack.ndim == 3 else stack
    save_png(out / "sheet.png", grid(stack, None if captions is None else list(captions[:count])))
