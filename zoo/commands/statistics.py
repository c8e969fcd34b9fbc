"""`zoo prepare --statistics`: what the metric frechet compares samples with, measured once."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import jax
import jax.numpy as jnp

from zoo import dist, models
from zoo.data.arrays import open_npz
from zoo.data.folders import SPLITS, existing, list_folder
from zoo.data.images import SUFFIXES, Images, check_channels
from zoo.data.images.sources import kind_of
from zoo.data.records import is_prepared
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
    for flag in ("size", "batch"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)} is too small; choose 1 or more")
    if not 0 <= args.test_fraction < 1:
        raise UserError(f"--test-fraction {args.test_fraction} is no share of the images; choose a number from 0 to 1")
    _check_source(args.source, args.test_fraction)
    dist.start()
    try:
        data = Images(
            args.source, args.size, args.channels or 3, convert=args.convert, test_fraction=args.test_fraction
        )
        print(statistics(data, Path(args.dest), args.statistics, flip=args.flip, batch=args.batch, allow=args.allow))
    except UserError as error:
        raise type(error)(_in_flags(str(error))) from None
    return 0


def _check_source(source: str, test_fraction: float) -> None:
    """Refuses what `zoo prepare` reads and `Images` does not."""
    if source.startswith("tfds:"):
        return
    root = existing(source)
    first = f"run `zoo prepare {source} DIR` first, and give DIR in place of SOURCE"
    if is_prepared(root):
        return
    kind, names = kind_of(root)
    if kind in ("tar", "parquet"):
        raise UserError(f"SOURCE {root} is of {kind} files, which --statistics does not read; {first}")
    if kind == "captions":
        images = sum(name.lower().endswith(SUFFIXES) for name in names)
        try:
            listed = sum(len(list_folder(root, test_fraction, SUFFIXES)[0][split].paths) for split in SPLITS)
        except UserError:
            listed = 0
        if listed != images:
            raise UserError(
                f"SOURCE {root} holds images with captions in folders of their own, which --statistics does not read; {first}"
            )
    if root.is_file():
        if root.suffix != ".npz":
            raise UserError(
                f"SOURCE {root} is a file; give a folder of images, a set made by `zoo prepare` or an .npz file"
            )
        with open_npz(root) as file:
            if missing := [name for name in ("train_images", "train_labels") if name not in file.files]:
                raise UserError(f"SOURCE {root} has no array {missing[0]!r}, which --statistics needs; {first}")


def _in_flags(text: str) -> str:
    """What is said of the data description, in the words of the command line."""
    return re.sub(
        r"\bdata\.(size|channels|test_fraction)(?:=(\w+))?",
        lambda found: f"--{found[1].replace('_', '-')}" + (f" {found[2]}" if found[2] else ""),
        text.replace("data.convert=True", "--convert"),
    )


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
