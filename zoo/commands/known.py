"""What clips are completed from: those of a data set, of folders of the user's, single images; and the cameras they shall be seen by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageOps

from zoo.cameras import project
from zoo.commands.clips import Clips
from zoo.commands.draw import Form, Images
from zoo.commands.trajectory import check_clear, trajectory
from zoo.data.images import LEVELS, SPLITS
from zoo.data.posed import PointMaps, Posed, picture
from zoo.draws import finite
from zoo.errors import UserError
from zoo.models import Model
from zoo.task import Locates

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
Given = dict[str, np.ndarray]


def form(task: Any) -> Form:
    """How clips are kept: with points and cameras where the task knows these, else as pictures of their frames."""
    return Clips(task.cameras) if "points" in task.spec(1) and isinstance(task, Locates) else Images()


def start(
    model: Model, options: Any, source: str | None, path: str | None, n: int, seed: int, batch: int
) -> Given | None:
    """What n clips are completed from, as the task's `sample` takes it; None where nothing is given.

    Args:
        source: train or test of the model's data, a folder of posed images, an .npz file of point maps, or a folder of images.
        path: where the camera shall go (`zoo.commands.trajectory`); None: where it went in what is given.
        batch: clips that are drawn at a time, where points are not given and have to be drawn first.

    Raises:
        UserError: a source or a path that does not exist or does not fit, or one that the task does not take.
    """
    if path is not None and options.task != "camera":
        raise UserError(
            f"path={path} says where the camera goes, and task={options.task} takes none; write task=camera"
        )
    if source is None:
        if options.task != "joint":
            raise UserError(f"task={options.task} completes clips; say of which, e.g. from=test or from=FOLDER")
        return None
    if options.task == "joint":
        raise UserError(
            f"from={source}: the task joint draws clips out of nothing; leave it out, or write e.g. task=stereo"
        )
    if options.task == "camera" and "points" not in model.task.spec(1):
        raise UserError("task=camera goes by points, and this model draws images alone; choose task=joint or image")
    if path is not None:
        trajectory(
            path, np.eye(4), 1.0, model.task.spec(1)["frames"].shape[1]
        )  # a mistake in it is told before anything is drawn
    given = _read(model, source, options.task, n)
    if options.task != "camera":
        return given
    if "points" not in given:
        if path is None:
            raise UserError("task=camera needs path=orbit, dolly, pan or FILE.json: a folder of images says none")
        given = _located(model, options, given, seed, batch)
    return given if path is None else {**given, "camera": _walked(path, given)}


def _read(model: Model, source: str, task: str, n: int) -> Given:
    spec = model.task.spec(1)
    frames, size = spec["frames"].shape[1:3]
    where = Path(source)
    if source in SPLITS:
        if model.data is None:
            raise UserError(f"from={source}: the data of {model.folder} are not known; give a folder")
        rows = model.data.source(source, spec)
    elif where.suffix == ".npz":
        rows = PointMaps(source, test_fraction=0.0).source("train")
    elif where.is_dir() and ((where / "cameras.json").is_file() or any(where.glob("*/cameras.json"))):
        rows = Posed(source, size=size, frames=frames, test_fraction=0.0).source("train")
    elif where.is_dir():
        return _images(where, task, n, frames, size)
    else:
        raise UserError(f"from={source} is neither train, test nor a folder of images; give one of them")
    found = [rows[i % len(rows)] for i in range(n)]
    for key, leaf in spec.items():
        if found[0][key].shape != leaf.shape[1:]:
            raise UserError(
                f"from={source} has {key} of {list(found[0][key].shape)}, and this model takes {list(leaf.shape[1:])}"
            )
    return {key: np.stack([row[key] for row in found]) for key in spec}


def _images(folder: Path, task: str, n: int, frames: int, size: int) -> Given:
    """Clips of the images of a folder by name, cut to squares: of the task stereo all frames, else one image each."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    if task == "render":
        raise UserError(f"task=render takes the points of all frames, and from={folder} has images; give posed images")
    each = frames if task == "stereo" else 1
    if len(files) < each:
        raise UserError(f"from={folder} has {len(files)} images, and task={task} takes {each} a clip; add some")
    clips = np.zeros((len(files) // each, frames, size, size, 3), np.float32)
    for i, path in enumerate(files[: len(clips) * each]):
        image = ImageOps.fit(picture(path), (size, size), Image.Resampling.BICUBIC)
        clips[i // each, i % each] = LEVELS[np.asarray(image)]
    return {"frames": clips[np.arange(n) % len(clips)]}


def _located(model: Model, options: Any, given: Given, seed: int, batch: int) -> Given:
    """Clips of single images with the points and cameras that the model draws for them (the task image)."""
    first, n = replace(options, task="image"), len(given["frames"])
    sampler = jax.jit(lambda params, rng, rows: model.task.sample(params, rng, batch, rows, first))
    parts = [
        finite(sampler, model.params, seed, np.arange(i, min(i + batch, n)), given, batch, "image")
        for i in range(0, n, batch)
    ]
    points = np.concatenate([part["points"] for part in parts])
    seen = np.isfinite(points).all(-1)
    cameras, focal, refused = zip(*(model.task.cameras(x, mask) for x, mask in zip(points, seen)))
    for i, why in enumerate(refused):
        if why[0]:
            raise UserError(
                f"the points drawn for the image of clip {i} show no camera: {why[0]}; or try another seed="
            )
    return {
        **given,
        "points": points,
        "seen": seen,
        "camera": np.asarray(cameras, np.float32),
        "focal": np.asarray(focal, np.float32),
    }


def _walked(path: str, given: Given) -> np.ndarray:
    """Cameras [n, F, 4, 4] of a path that begins at each clip's first one."""
    found = []
    for points, seen, camera, focal in zip(given["points"], given["seen"], given["camera"], given["focal"]):
        first, mask = camera[0].astype(np.float64), seen[0]
        if not mask.any():
            raise UserError(f"path={path}: the first frame of a clip knows no point; give another one with from=")
        _, depth = project(points[0].astype(np.float64), first, np.asarray(focal, np.float64), *mask.shape)
        walk = trajectory(path, first, float(np.median(depth[mask])), len(camera))
        check_clear(path, walk, points[0], mask, first, float(focal))
        found.append(walk)
    return np.stack(found).astype(np.float32)
