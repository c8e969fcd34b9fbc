"""`zoo compile`: its arguments, and what a process needs that compiles for chips that are not here (`zoo.commands.aot`)."""

from __future__ import annotations

import argparse
import os
import sys

from zoo.commands.arguments import as_run, check_json, takes, write_json, writes_json
from zoo.commands.tables import lines


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    takes(parser, "CONFIG", fields="override fields, e.g. mesh.fsdp=16 accumulate=2")
    parser.add_argument("--topology", required=True, metavar="NAME", help="a TPU slice, e.g. v5e:4x4 or v5p:4x4x4")
    parser.add_argument("--slices", type=int, default=1, help="how many such slices")
    parser.add_argument("--what", choices=("train", "sample"), default="train")
    parser.add_argument("--samples", type=int, default=None, help="batch size of the sampler; default: samples.n")
    parser.add_argument("--no-search", action="store_true", help="do not look for what fits when this does not")
    writes_json(parser)


def run(args: argparse.Namespace) -> int:
    """Compile a config for a topology: 0 where it fits, 1 where it does not."""
    # Before jax is imported: the TPU compiler shall not look for chips, nor refuse to be loaded twice.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_STDERR_LOG_LEVEL": "3"}
    for name, value in {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", **quiet}.items():
        os.environ.setdefault(name, value)
    from zoo import config
    from zoo.commands import aot

    run = as_run(config.load(args.config, args.fields), args.config)
    check_json(args.json)
    to = aot.target(args.topology, args.slices)
    found = aot.compile_run(run, to, args.what, args.samples)
    print(lines(found.figures))
    write_json(args.json, found.figures | {"fits": found.fits})
    if found.fits:
        return 0
    needs = found.figures.get("peak GiB", found.figures.get("needs GiB"))
    amount = "more" if needs is None else f"{needs:.2f} GiB"
    print(f"does not fit: it needs {amount} of {found.figures['memory GiB']:.2f} GiB a device", file=sys.stderr)
    if not args.no_search:
        print(aot.nearest_fit(run, to, found, args.what, args.samples), file=sys.stderr)
    return 1
