"""`zoo prepare statistics`: what the metric frechet compares samples with, measured once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from zoo import dist, models
from zoo.data.arrays import open_npz
from zoo.data.folders import SPLITS, existing, list_folder
from zoo.data.images import SUFFIXES, Channels, Images
from zoo.data.images.sources import kind_of
from zoo.data.records import is_prepared
from zoo.errors import UserError
from zoo.metrics.frechet import Frechet


def prepare(
    source: str,
    dest: str,
    *,
    size: int,
    features: str,
    channels: Channels = 3,
    convert: bool = False,
    flip: bool = False,
    test_fraction: float = 0.1,
    batch: int = 64,
    allow: Sequence[str] = (),
) -> str:
    """Statistics of the training images of a source; arguments and result as of `statistics`."""
    _check_source(source, test_fraction)
    dist.start()
    try:
        data = Images(source, size, channels, convert=convert, test_fraction=test_fraction)
        return statistics(data, Path(dest), features, flip=flip, batch=batch, allow=allow)
    except UserError as error:  # what is said of the data description is said of the command's own fields
        raise type(error)(re.sub(r"\bdata\.(?=size|channels|convert|test_fraction)", "", str(error))) from None


def _check_source(source: str, test_fraction: float) -> None:
    """Refuses what `zoo prepare` reads and `Images` does not."""
    if source.startswith("tfds:"):
        return
    root = existing(source)
    first = f"run `zoo prepare images {source} DIR` first, and give DIR in place of SOURCE"
    if is_prepared(root):
        return
    kind, names = kind_of(root)
    if kind in ("tar", "parquet"):
        raise UserError(f"SOURCE {root} is of {kind} files, of which no statistics are made; {first}")
    if kind == "captions":
        images = sum(name.lower().endswith(SUFFIXES) for name in names)
        try:
            listed = sum(len(list_folder(root, test_fraction, SUFFIXES)[0][split].paths) for split in SPLITS)
        except UserError:
            listed = 0
        if listed != images:
            raise UserError(
                f"SOURCE {root} holds images with captions in folders of their own, of which no statistics are made; {first}"
            )
    if root.is_file():
        if root.suffix != ".npz":
            raise UserError(
                f"SOURCE {root} is a file; give a folder of images, a set made by `zoo prepare` or an .npz file"
            )
        with open_npz(root) as file:
            if missing := [name for name in ("train_images", "train_labels") if name not in file.files]:
                raise UserError(f"SOURCE {root} has no array {missing[0]!r}, which statistics need; {first}")


def statistics(
    data: Images, dest: Path, features: str, *, flip: bool = False, batch: int = 64, allow: Sequence[str] = ()
) -> str:
    """Write the statistics of the training images to `dest`, for `Frechet(features, flip=..., reference=dest)`.

    Args:
        features: "pixels", or a run or export whose task has features.
        flip: mirror a random half of the images.

    Returns:
        what to tell the user.

    Raises:
        UserError: no such images or features, a file that cannot be written or that holds statistics of something else.
    """
    if dest.suffix != ".npz":
        raise UserError(f"DEST {dest} is no name for statistics; give a file that ends in .npz")
    metric = Frechet(features, flip=flip, reference=str(dest), batch=batch)
    shape = (1, data.size, data.size, data.channels)
    there = dest.exists()
    found = metric.statistics(
        data, {"image": jax.ShapeDtypeStruct(shape, jnp.float32)}, **models.loaded_for(metric, allow)
    )
    what = f"{found.count:,} images, {len(found.mean):,} features each" + (", half of them mirrored" if flip else "")
    return f"{dest}: {what}{' (there already)' if there else ''}; the metric frechet takes it as reference={dest}"
