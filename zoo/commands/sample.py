"""`zoo sample`: PNG files and a sheet, in resumable batches."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo import config, dist, paths
from zoo.errors import UserError
from zoo.models import Model
from zoo.paths import Folder
from zoo.train.report import class_name, grid, save_png

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
    labels: np.ndarray | None,
    asked: str | None,
    batch: int,
    options: Mapping[str, Any],
) -> None:
    """Draw n samples into `out`: `000000.png` ..., `sheet.png` and `settings.json`. Files already there are kept.

    `asked` is what the user wrote for `labels`: with it, sample i has the same label whatever n.

    Raises:
        UserError: the folder holds samples with other settings, or cannot be written.
    """
    captions: Sequence[str] | None = None
    if labels is not None:
        captions = [class_name(model.labels, i) for i in labels]
    settings = {
        "model": str(model.folder),
        "step": model.step,
        "weights": model.kind,
        "seed": seed,
        "label": None if captions is None else asked or "balanced",
        **_plain(options),
    }
    _claim(out, settings)
    sampler = jax.jit(lambda params, rng, label: model.task.sample(params, rng, batch, _conditions(label), **options))
    there = set(paths.names(out))
    missing = [i for i in range(n) if f"{i:06d}.png" not in there]
    mesh, params = dist.spread(model.params, batch)
    for begin in range(0, len(missing), batch):
        rows = np.array(missing[begin : begin + batch])
        with dist.use(mesh):
            images, lost = _finite(sampler, params, seed, rows, labels, batch)
        for i, image in zip(rows, images):
            about = {**{k: str(v) for k, v in settings.items()}, "index": str(i)}
            if captions is not None:
                about["label"] = captions[i]
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


def _conditions(label: jax.Array | None) -> dict[str, jax.Array] | None:
    return None if label is None else {"label": label}


def _finite(
    sampler: Any, params: Any, seed: int, rows: np.ndarray, labels: np.ndarray | None, batch: int
) -> tuple[np.ndarray, list[int]]:
    """Samples of these rows; those that overflow are drawn again one by one from new noise."""
    padded = np.resize(rows, batch)  # one compiled shape, whatever is left
    label = None if labels is None else jnp.asarray(labels[padded])
    images = np.array(sampler(params, keys(seed, padded), label)["image"])[: len(rows)]
    for attempt in range(1, _RETRIES + 1):
        bad = [k for k in range(len(rows)) if not np.isfinite(images[k]).all()]
        if not bad:
            return images, []
        _log.warning("samples %s overflowed and are drawn again", ", ".join(str(rows[k]) for k in bad))
        again = np.array(sampler(params, keys(seed, padded, attempt), label)["image"])
        for k in bad:
            images[k] = again[k]
    return images, [int(rows[k]) for k in range(len(rows)) if not np.isfinite(images[k]).all()]


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
