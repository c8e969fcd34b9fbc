"""`zoo show`."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import re
import typing
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params

from zoo import config, dist, models, weights
from zoo.commands import chips
from zoo.commands.arguments import allows, as_run, takes
from zoo.commands.tables import Rows, comments, table
from zoo.errors import UserError
from zoo.fields import kinds, required, words
from zoo.run import Run
from zoo.task import Cached, Samples, Task, check_needs, sampling
from zoo.train import optim
from zoo.train.step import abstract_state


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    takes(parser, "CONFIG", fields="override fields")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shardings", action="store_true", help="where every parameter of a run lies on its mesh")
    what.add_argument("--sampler", action="store_true", help="what `zoo sample` and samples.options take")
    allows(parser)
    parser.add_argument(
        "--devices", default=None, metavar="N", help="a mesh of so many devices, or of a topology: v5e:4x4"
    )


def run(args: argparse.Namespace) -> int:
    """Print a config in full, the options of its sampler, or where its parameters lie."""
    if args.devices and not args.shardings:
        raise UserError("--devices says nothing without --shardings; add it, or leave --devices out")
    value = opened(args.config, args.fields, args.allow)
    if args.shardings:
        print(shardings(as_run(value, args.config), count_devices(args.devices)))
    else:
        print((sampler if args.sampler else show)(value, args.config))
    return 0


def opened(name: str, fields: Sequence[str] = (), allow: Sequence[str] = ()) -> Any:
    """The value of a config, the run of a run folder or the task of an export or a shipped name, with `field=value` applied.

    Args:
        allow: packages besides zoo whose classes a run or an export may name.
    """
    if models.is_config(name):
        return config.load(name, fields)
    about = models.read_config(models.locate(name))
    return config.override(config.undump(about.get("run", about.get("task")), allow), fields)


def _kind(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Union:
        return " | ".join(map(_kind, typing.get_args(annotation)))
    if annotation is type(None):
        return "None"
    name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return re.sub(r"\b(typing|collections\.abc|zoo\.[\w.]+)\.", "", name)


def _title(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _rows(value: Any, prefix: str = "", ranges: bool = False) -> Rows:
    """(field, value, type, comment) of a tree of dataclasses, depth first.

    `ranges`: types are told in words with their ranges, and objects that may stand for a plain value are listed too.
    """
    rows: Rows = []
    cls: Any = type(value)
    hints, own, said = typing.get_type_hints(cls), kinds(cls), comments(cls)
    for f in dataclasses.fields(value):
        inner, name = getattr(value, f.name), f"{prefix}{f.name}"
        parts = dict(enumerate(inner)) if isinstance(inner, tuple) else inner if isinstance(inner, dict) else {}
        if dataclasses.is_dataclass(inner):
            rows.append((name, type(inner).__name__, "", _title(type(inner))))
            rows += _rows(inner, f"{name}.", ranges)
            choice: Any = own[f.name]
            for word, cls in choice.named().items() if ranges and hasattr(choice, "named") else ():
                rows.append((f"{name}={word}", "", "", _title(cls)))
                rows += _rows(cls(), f"{name}.", ranges) if cls is not type(inner) and not required(cls) else []
        elif parts and all(dataclasses.is_dataclass(v) for v in parts.values()):
            for key, part in parts.items():
                rows.append((f"{name}.{key}", type(part).__name__, "", _title(type(part))))
                rows += _rows(part, f"{name}.{key}.", ranges)
        else:
            kind = own[f.name]
            rows.append((name, repr(inner), words(kind) if ranges else _kind(hints[f.name]), said.get(f.name, "")))
            objects = [part for part in typing.get_args(kind) if dataclasses.is_dataclass(part)] if ranges else []
            for part in objects:
                rows += _rows(typing.cast(Any, part)(), f"{name}.", ranges)
    return rows


def sampler(value: Any, name: str) -> str:
    """Every option of a sampler: its name, what it is where it is not set, type with range, and comment."""
    task = value.task if isinstance(value, Run) else value
    if not isinstance(task, Task):
        raise UserError(f"{name} holds a {type(value).__name__}, which has no sampler; name a run, an export or a task")
    check_needs(task, (Samples,), "--sampler")
    kind = sampling(task)
    rows = _rows(kind(), ranges=True) if kind is not None else []
    head = f"{name}: options of the sampler of {type(task).__name__}"
    return "\n".join([head, "", *table(rows, widest=54)] if rows else [f"{head}: none"])


def show(value: Any, name: str) -> str:
    """Every field, value, type and comment of a config; for a run also its size and which precision computes what."""
    cls = type(value.task if isinstance(value, Run) else value)
    title = config.describe(name) if models.is_config(name) else _title(cls)
    lines = [f"{name}: {title}", "", *table(_rows(value))]
    if isinstance(value, Run):
        lines += ["", *_facts(value)]
    return "\n".join(lines)


def _facts(run: Run) -> list[str]:
    shapes = weights.flatten(weights.abstract(run.task))
    count = sum(int(np.prod(x.shape)) for x in shapes.values())
    held = list(run.task.about.held)
    lines = [
        f"{count:,} parameters in {len(shapes)} arrays"
        + (f", held without gradient: {', '.join(held)}" if held else "")
    ]
    lines.append(f"one batch: {', '.join(f'{k} {v.dtype}{list(v.shape)}' for k, v in run.spec().items())}")
    if isinstance(run.task, Cached):
        n = run.samples.n or 16
        sizes = run.task.cache_bytes(n)
        blocks = len(sizes) > 1
        told = [f"{size / 2**30:.3g} GiB" + blocks * f" for the {name} block" for name, size in sizes.items()]
        lines.append(
            f"key/value caches while {n} samples are drawn with guidance{blocks * ', one block at a time'}: {', '.join(told)}"
        )
    lines += ["", "Precision"]
    dtypes = ", ".join(sorted({str(x.dtype) for x in shapes.values()})).ljust(8)
    lines.append(
        f"  {dtypes}  parameters, gradients, optimiser state" + (", average of the weights" if run.ema else "")
    )
    lines += [f"  {dtype:<9} {what}" for dtype, what in _activations(run)]
    return lines


def _activations(run: Run) -> list[tuple[str, str]]:
    """Which kinds of operation run in which float type, read off the traced loss."""
    spec = run.task.spec(1)
    params = weights.abstract(run.task)
    traced = jax.make_jaxpr(run.task.loss)(params, spec, jax.eval_shape(lambda: jax.random.key(0)))
    kinds: dict[str, set[str]] = {}
    names = {
        "dot_general": "matrix products",
        "exp": "exponentials",
        "reduce_sum": "sums",
        "erf": "GELU",
        "rsqrt": "norms",
        "tanh": "tanh",
    }

    def walk(jaxpr: Any) -> None:
        for eqn in jaxpr.eqns:
            for inner in jaxprs_in_params(eqn.params):
                walk(inner)
            if eqn.primitive.name in names:
                dtypes = {str(v.aval.dtype) for v in eqn.invars if hasattr(v.aval, "dtype")}
                if dtypes & {"float32", "bfloat16", "float16"}:
                    dtype = "float32" if dtypes & {"float32", "float16"} else "bfloat16"
                    kinds.setdefault(dtype, set()).add(names[eqn.primitive.name])

    walk(traced.jaxpr)
    return [(dtype, ", ".join(sorted(what))) for dtype, what in sorted(kinds.items())]


def shardings(run: Run, devices: int) -> str:
    """Where every parameter lies on a mesh of so many devices, what it takes there, and what stayed whole."""
    mesh = run.mesh.abstract(devices)
    with dist.use(mesh, run.rules):
        state = abstract_state(run.task, optim.build(run.optim, run.steps), mesh, run.ema)
    rows, whole = [("parameter", "shape", "cut along", "KiB per device")], []
    for name, leaf in weights.flatten(state.params).items():
        spec = ["+".join((p,) if isinstance(p, str) else p or ("-",)) for p in leaf.sharding.spec]
        here = dist.shard_bytes(leaf)
        size = dist.whole_bytes(leaf)
        cut = here < size
        shape, lies = "x".join(map(str, leaf.shape)) or "scalar", ", ".join(spec) if cut else "whole"
        rows.append((name, shape, lies, f"{here / 1024:,.1f}"))
        whole += [] if cut else [(size, name)]
    widths = [max(len(r[i]) for r in rows) for i in range(4)]
    lines = ["  ".join((*(t.ljust(w) for t, w in zip(r[:3], widths)), r[3].rjust(widths[3]))) for r in rows]
    total = sum(map(dist.whole_bytes, jax.tree.leaves(state)))
    here = sum(map(dist.shard_bytes, jax.tree.leaves(state)))
    shape = " x ".join(f"{k}={v}" for k, v in mesh.shape.items() if v > 1) or "one device"
    kept = "parameters, optimiser state" + (", average of the weights" if run.ema else "")
    lines += [
        "",
        f"mesh {shape} ({devices} devices)",
        f"state ({kept}): {total / 2**30:.3f} GiB, {here / 2**30:.3f} GiB per device",
        f"whole on every device: {sum(s for s, _ in whole) / 2**20:.2f} MiB of parameters"
        + (f", the largest: {max(whole)[1]}" if whole else ""),
    ]
    return "\n".join(lines)


def count_devices(text: str | None) -> int:
    """What `--devices` means: a number, the devices of a topology, or those here. UserError for anything else."""
    if text is None:
        return jax.device_count()
    if text.isdecimal() and int(text):
        return int(text)
    found = chips.read_topology(text)
    if found is None:
        raise UserError(f"--devices {text} is neither a number nor a topology; write 64, or v5p:4x4x4")
    chip, sizes = found
    each = 1 if "v4" in chip.prefixes else chip.devices  # a TPU VM joins the cores of a v4 chip
    return math.prod(sizes) * each
