"""`zoo import`."""

from __future__ import annotations

import argparse
from pathlib import Path

from zoo import config
from zoo.commands.arguments import as_run, takes
from zoo.commands.weights import import_checkpoint
from zoo.task import Published


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    takes(parser, "CONFIG", "FILE", "OUT", fields="override fields of the config, e.g. task.head_dim=64")
    parser.add_argument(
        "--weights", choices=("raw", "ema"), help="of a file that holds the weights and their average; default: raw"
    )


def run(args: argparse.Namespace) -> int:
    """Bring in a published checkpoint."""
    value = config.load(args.config, args.fields)
    if not isinstance(value, Published):
        value = as_run(value, args.config)
    print(import_checkpoint(value, Path(args.file), Path(args.out), args.weights))
    return 0
