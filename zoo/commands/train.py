"""`zoo train`."""

from __future__ import annotations

import argparse
import logging
import re

from zoo import config
from zoo.commands.arguments import allows, as_run, takes
from zoo.errors import UserError


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    takes(parser, "CONFIG", fields="override fields, e.g. optim.lr=3e-4 mesh.fsdp=8")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument(
        "--profile", default=None, metavar="FIRST:LAST", help="trace these steps into profile/ of the run folder"
    )
    parser.add_argument(
        "--wandb",
        default=None,
        metavar="PROJECT",
        help="send the records to Weights & Biases as well (the wandb extra)",
    )
    allows(parser)


def run(args: argparse.Namespace) -> int:
    """Start or resume a run; returns the exit code, as that of every command."""
    from zoo import dist, hosts  # not before: --help needs no JAX
    from zoo.train.loop import train

    profile = None if args.profile is None else _span(args.profile)
    hosts.start()
    if not hosts.main():
        logging.getLogger("zoo").setLevel(logging.WARNING)
    with hosts.guarded():  # a config may be missing on one host
        run = as_run(config.load(args.config, args.fields, args.allow), args.config)
        dist.start(batch=run.batch // run.accumulate, mesh=run.mesh)
        train(run, quiet=args.quiet, profile=profile, wandb=args.wandb)
    return 0


def _span(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    if match is None:
        raise UserError(f"--profile {text} is no range of steps; write FIRST:LAST, such as 10:15")
    return int(match[1]), int(match[2])
