"""`zoo prepare --statistics`: what the metric frechet compares samples with, measured once."""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp

from zoo import dist, models
from zoo.data.images import Images, check_channels
from zoo.errors import UserError
from zoo.metrics.frechet import Frechet

_OTHERS = ("encode", "features", "aspects", "tokenizer", "image_column", "caption_column", "allow_unreadable", "raw")


def prepare(args: argparse.Namespace) -> int:
    """What the command line asks for; returns the exit code."""
    if not args.statistics:
        raise UserError("--flip mirrors images of which statistics are made; add --statistics pixels, or leave it out")
    for name in _OTHERS:
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} says nothing of --statistics; leave one of them out")
    if args.size is None:
        raise UserError("--statistics needs the side of the images that the model makes; add --size, e.g. --size 64")
    dist.start()
    data = Images(args.source, args.size, args.channels or 3, convert=args.convert, test_fraction=args.test_fraction)
    print(statistics(data, Path(args.dest), args.statistics, flip=args.flip, batch=args.batch, allow=args.allow))
    return 0


def statistics(
    data: Images, dest: Path, features: str, *, flip: bool = False, batch: int = 64, allow: list[str] | None = None
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
    check_channels(data.channels)
    metric = Frechet(features, flip=flip, reference=str(dest), batch=batch)
    shape = (1, data.size, data.size, data.channels)
    there = dest.exists()
    found = metric.statistics(
        data, {"image": jax.ShapeDtypeStruct(shape, jnp.float32)}, **models.loaded_for(metric, allow or ())
    )
    what = f"{found.count:,} images, {len(found.mean):,} features each" + (", half of them mirrored" if flip else "")
    return f"{dest}: {what}{' (there already)' if there else ''}; the metric frechet takes it as reference={dest}"
