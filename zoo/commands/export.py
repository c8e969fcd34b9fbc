"""`zoo export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from zoo import dist, models
from zoo.commands.arguments import opens, takes, width
from zoo.commands.weights import export
from zoo.errors import UserError


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    takes(
        parser,
        "MODEL",
        "OUT",
        fields="options of the sampler that --format stablehlo writes, e.g. solver=tada nfe=8 guidance=1; ema=WIDTH for another "
        "average of the run's weights",
    )
    parser.add_argument("--format", choices=("zoo", "official", "stablehlo"), default="zoo")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the numbers in --format zoo; bfloat16: half the size",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=16,
        help="batch size of stablehlo programs: the sampler (or the features where there is none), the denoiser and the energy",
    )
    opens(parser)


def run(args: argparse.Namespace) -> int:
    """Write the weights of a model for others."""
    dist.start()
    if "://" in args.out:
        raise UserError(
            f"{args.out}: exports are written here; give a local folder and copy it with `gcloud storage cp -r`"
        )
    ema, fields = width(args.fields)
    model = models.open_model(args.model, raw=args.raw, ema=ema, allow=args.allow)
    print(export(model, Path(args.out), args.format, args.samples, fields, args.allow, args.dtype))
    return 0
