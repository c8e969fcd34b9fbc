"""`zoo eval`: a metric of a model, or what a config measures without one."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo import config, dist, metrics, models
from zoo.commands import strategy
from zoo.commands.arguments import of_config, one_line, opens, takes, width
from zoo.commands.draw import save_pictures
from zoo.data.folders import SPLITS
from zoo.data.images import Arrays, Images
from zoo.data.series import Series
from zoo.draws import Use, key_of
from zoo.errors import UserError, suggest
from zoo.task import Measures, Metric, check_needs, sampling
from zoo.train.provenance import by_name, check_kept


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    takes(parser, "MODEL")
    parser.add_argument(
        "fields",
        nargs="*",
        default=[],
        metavar="[METRIC] field=value",
        help="fields of the metric, e.g. draws=16; data=PATH for other data, data.FIELD=value for fields of the run's data; ema=WIDTH "
        "for another average of its weights",
    )
    opens(parser)


def run(args: argparse.Namespace) -> int:
    """Print what a metric finds, as one line of JSON: 0, or 1 where some of it failed."""
    name = next((word for word in args.fields if "=" not in word), None)  # wherever it stands
    fields = [word for word in args.fields if word != name]
    if name is None and (args.raw or args.allow):
        flag = "--raw" if args.raw else "--allow"
        raise UserError(f"{flag} is for models, and a config that measures by itself opens none; leave it out")
    found = _alone(args.model, fields) if name is None else _measured(args, name, fields)
    print(one_line(found))
    return 1 if found.get("failed") or found.get("unanswered") else 0


def _alone(name: str, fields: Sequence[str]) -> dict[str, Any]:
    """The figures of a config whose value measures by itself. UserError where `name` is no such config."""
    try:
        config.locate(name)
    except UserError:
        if name.partition(":")[0].endswith(".py"):
            raise
        raise UserError(
            f"what of {name} shall be measured? Write zoo eval {name} METRIC; {suggest('', metrics.named())}; a config that "
            "measures by itself needs none"
        ) from None
    value = config.load(name)
    if isinstance(value, Metric):
        raise UserError(f"{name} holds the metric {value.name}, which measures models; write zoo eval MODEL {name}")
    if not isinstance(value, Measures):
        raise UserError(
            f"{name} holds a {type(value).__name__}, which measures nothing by itself; write zoo eval MODEL METRIC, or name "
            "a config of what `zoo list` marks with zoo eval CONFIG"
        )
    made: Measures = config.override(value, fields)
    return made.run()


def _metric(name: str) -> Any:
    """A metric by its name, or that of a config. UserError where there is none."""
    known = metrics.named()
    if name in known:
        return known[name]()
    if not name.partition(":")[0].endswith(".py") and name.partition(":")[0] not in config.shipped():
        raise UserError(f"no metric {name!r}, nor a config file that defines one; {suggest(name, known)}")
    metric = config.load(name)
    if not isinstance(metric, Metric):
        way = f"; write zoo eval {name}" if isinstance(metric, Measures) else ""
        raise UserError(f"{name} holds a {type(metric).__name__}, which is no metric of models{way}")
    return metric


def _measured(args: argparse.Namespace, name: str, fields: Sequence[str]) -> dict[str, Any]:
    """What a metric finds of a model."""
    metric = _metric(name)
    ema, fields = width(fields)
    overrides, fields = of_config(args.model, fields)
    others = [f for f in fields if f.startswith(("data.", "data="))]
    task, _ = models.open_task(args.model, args.allow, overrides)
    metric = config.override(metric, [f for f in fields if f not in others], sampling(task), args.allow)
    dist.start(batch=metric.shares)
    model = models.open_model(args.model, overrides, raw=args.raw, ema=ema, allow=args.allow)
    check_needs(model.task, metric.needs, name)
    if metric.captions:
        metric.check(model.task)  # what is wrong with it is told before a tokeniser is asked for
    data = _data(model, args.model, others) if others or metric.uses_data else model.data
    if metric.uses_data and not others and model.run is not None and metric.path is None:
        check_kept(model.folder, data, splits=[metric.split] if metric.split else SPLITS)
    metric, data = by_name(metric, data, model.labels)
    loaded = models.loaded_for(metric, args.allow, model.task, model.homes, model.data)
    found = metric(model.task, model.params, data, key_of(0, Use.LOOKS), **loaded)
    if metric.saves:
        strategy.save(model.folder, found)
    if "pictures" in found:
        found = {**found, "pictures": save_pictures(model, found["pictures"])}
    about = {"weights": model.kind, "step": model.step, "metric": config.dump(metric), "data": config.dump(data)}
    return {**found, **about}


def _data(model: Any, name: str, fields: Sequence[str]) -> Any:
    """The data to measure on: those of the model with `data.FIELD=value`, or others by `data=PATH`.

    Where the model's own data have a path, PATH stands in its place. Elsewhere they are a description of what the task reads,
    images or series.
    """
    data, parts = model.data, [f for f in fields if f.startswith("data.")]
    whole = [f.removeprefix("data=") for f in fields if f.startswith("data=")]
    if not whole:
        if data is None:
            raise UserError(
                f"{name} does not say what data it was trained on; give data=PATH, or import it with a config that does"
            )
        return config.override({"data": data}, parts)["data"]
    path = whole[0]
    if len(whole) > 1:
        raise UserError(f"data is set twice, to {path} and {whole[1]}; keep one of them")
    own = [f"data.{f.name}" for f in dataclasses.fields(data)] if data is not None else []
    way = f"set fields of the model's own data ({type(data).__name__}): {', '.join(own)}" if own else ""
    if not path or not (path.startswith("tfds:") or Path(path).expanduser().exists()):
        raise UserError(
            f"data={path} is no path of a file or folder that exists; give one, or tfds:NAME{', or ' if way else ''}{way}"
        )
    if "data.path" not in own or (isinstance(data, Arrays) and not path.endswith(".npz")):
        return config.override({"data": _described(model.task, path, way)}, parts)["data"]
    return config.override({"data": data}, [f"data.path={path}", *parts])["data"]


def _described(task: Any, path: str, way: str) -> Any:
    """Images or series by path, as a task reads them; `way` is what else can be done where it reads neither."""
    spec = task.spec(1)
    if "image" in spec:
        return Images(path, size=spec["image"].shape[1], channels=spec["image"].shape[-1])
    if "series" in spec:
        return Series(path, length=spec["series"].shape[1])
    raise UserError(
        f"data={path}: {type(task).__name__} reads {', '.join(spec)}, and a path is for images or series; "
        + (way or "import the model with a config that describes its data")
    )
