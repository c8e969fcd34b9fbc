"""The command line. One grammar: what a run or metric is = `field=value`, what a command does = `--flag`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo import process
from zoo.errors import UserError, suggest


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zoo", description="Train, sample, evaluate and export the models of the zoo."
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error arose")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    def verb(name: str, text: str, *positional: str, fields: str | None = None) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        for word in positional:
            sub.add_argument(
                word.lower().rstrip("?"), metavar=word.rstrip("?"), nargs="?" if word.endswith("?") else None
            )
        if fields:
            sub.add_argument("fields", nargs="*", metavar="field=value", help=fields)
        return sub

    def allows(sub: argparse.ArgumentParser) -> None:
        words = "trust the classes of this package in the config"
        sub.add_argument("--allow", action="append", default=[], metavar="PACKAGE", help=words)

    def opens(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--raw", action="store_true", help="the last weights, even where the run keeps an average")
        allows(sub)

    sub = verb("train", "Start or resume a run.", "CONFIG", fields="override fields, e.g. optim.lr=3e-4 mesh.fsdp=8")
    sub.add_argument("--quiet", action="store_true", help="no progress bar")
    sub.add_argument(
        "--profile", default=None, metavar="FIRST:LAST", help="trace these steps into profile/ of the run folder"
    )
    sub.add_argument(
        "--wandb",
        default=None,
        metavar="PROJECT",
        help="send the records to Weights & Biases as well (the wandb extra)",
    )
    allows(sub)
    sub = verb(
        "sample",
        "Draw samples from a run, an export, a shipped model, or a config whose weights are all given.",
        "MODEL",
        fields="n, seed, label, prompt or prompts=FILE, form=text from=test, of clips from and path, aspect and the sampler's "
        "options, e.g. n=64 guidance=2.0, or passes=true",
    )
    sub.add_argument(
        "--out", default=None, metavar="FOLDER", help="default: samples/ in the run folder, or samples/ here"
    )
    sub.add_argument("--batch", type=int, default=64, help="samples per batch")
    sub.add_argument("--tokenizer", default=None, metavar="FILE", help="default: spiece.model beside the model")
    opens(sub)
    sub = verb(
        "eval",
        "Measure a run, an export, or a config whose weights are all given; or CONFIG alone, which says what it measures, "
        "such as those that `zoo list` marks with zoo eval CONFIG.",
        "MODEL",
        "METRIC?",
        fields="fields of the metric, e.g. draws=16; data=PATH for other data, data.FIELD=value for fields of the run's data; ema=WIDTH "
        "for another average of its weights",
    )
    opens(sub)
    sub = verb(
        "export",
        "Write the weights of a run, or of a config that are all given, for others.",
        "MODEL",
        "OUT",
        fields="options of the sampler that --format stablehlo writes, e.g. solver=tada nfe=8 guidance=1; ema=WIDTH for another "
        "average of the run's weights",
    )
    sub.add_argument("--format", choices=("zoo", "official", "stablehlo"), default="zoo")
    sub.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the numbers in --format zoo; bfloat16: half the size",
    )
    sub.add_argument(
        "--samples",
        type=int,
        default=16,
        help="batch size of stablehlo programs: the sampler (or the features where there is none), the denoiser and the energy",
    )
    opens(sub)
    sub = verb(
        "import",
        "Bring in a published checkpoint.",
        "CONFIG",
        "FILE",
        "OUT",
        fields="override fields of the config, e.g. task.head_dim=64",
    )
    sub.add_argument(
        "--weights", choices=("raw", "ema"), help="of a file that holds the weights and their average; default: raw"
    )
    sub = verb(
        "bench", "Time the train step, the sampler and the data of a config.", "CONFIG", fields="override fields"
    )
    sub.add_argument(
        "--peer", default=None, metavar="FILE", help="a Python file with build(task), timed in turn with ours"
    )
    sub.add_argument(
        "--against",
        default=None,
        metavar="CONFIG",
        help="another config, whose step and sampler are timed in turn with ours, with as many examples",
    )
    sub.add_argument(
        "--what",
        choices=("train", "sample", "data", "energy", "both", "all"),
        default="both",
        help="both: train and sample, on synthetic data; data reads the run's own; energy: that of a task that has one, with and without "
        "its score",
    )
    sub.add_argument(
        "--samples",
        default="16",
        metavar="N[,N...]",
        help="batch sizes of the sampler, which is timed with 1 as well",
    )
    sub.add_argument(
        "--model",
        default=None,
        metavar="MODEL",
        help="a run or export of a flow: time its sampler with these weights, by each way to invert a block",
    )
    sub.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="FIELDS",
        help="one more way beside sequential, jacobi and gs_jacobi, e.g. 'modules=0,1,1,8 tol=1e-3'; may be repeated",
    )
    sub.add_argument(
        "--with",
        action="append",
        default=[],
        dest="options",
        metavar="FIELDS",
        help="options of the sampler, e.g. 'solver=heun nfe=35'; repeated, each set is timed in turn with the first",
    )
    allows(sub)
    sub.add_argument("--rounds", type=int, default=5, help="timed rounds of each side, in turn")
    sub.add_argument("--json", default=None, metavar="FILE", help="write the figures here as well")
    sub = verb(
        "compile",
        "Compile a config for chips that are not here: does it fit, and how fast can it be.",
        "CONFIG",
        fields="override fields, e.g. mesh.fsdp=16 accumulate=2",
    )
    sub.add_argument("--topology", required=True, metavar="NAME", help="a TPU slice, e.g. v5e:4x4 or v5p:4x4x4")
    sub.add_argument("--slices", type=int, default=1, help="how many such slices")
    sub.add_argument("--what", choices=("train", "sample"), default="train")
    sub.add_argument("--samples", type=int, default=None, help="batch size of the sampler; default: samples.n")
    sub.add_argument("--no-search", action="store_true", help="do not look for what fits when this does not")
    sub.add_argument("--json", default=None, metavar="FILE", help="write the figures here as well")
    sub = verb(
        "prepare",
        "Turn images, with or without captions, into an ArrayRecord data set; with --encode into one of latents; with --text "
        "texts into one of tokens.",
        "SOURCE",
        "DEST",
    )
    sub.add_argument(
        "--size", type=int, default=None, help="resize the shorter side and crop the centre to this many pixels"
    )
    sub.add_argument("--channels", type=int, default=None, choices=(1, 3), help="default: 3, or the autoencoder's")
    sub.add_argument(
        "--convert", action="store_true", help="turn grey images to colour or colour ones to grey as needed"
    )
    sub.add_argument(
        "--test-fraction",
        type=float,
        default=None,
        help="held out where the source has no test part; default: 0.1, of texts 0.05",
    )
    sub.add_argument(
        "--text",
        default=None,
        metavar="TOKENS",
        help="write the tokens of texts: text8, chars, bytes, or the file of a tokenizer (tokenizer.json, or sentencepiece's "
        ".model)",
    )
    sub.add_argument(
        "--valid-fraction", type=float, default=None, help="of a text, before the test part; default: 0.05"
    )
    sub.add_argument("--allow-unreadable", action="store_true", help="exit 0 although some files could not be read")
    sub.add_argument("--image-column", default=None, metavar="NAME", help="of parquet files")
    sub.add_argument("--caption-column", default=None, metavar="NAME", help="of parquet files; empty: no captions")
    sub.add_argument(
        "--encode",
        action="append",
        default=[],
        metavar="KIND=MODEL",
        help="vae=MODEL writes latents of the images, text=MODEL as well tokens of their captions",
    )
    sub.add_argument("--features", action="store_true", help="keep features of captions too, not tokens alone")
    sub.add_argument("--aspects", action="store_true", help="keep images near their aspect ratio, in nine buckets")
    sub.add_argument(
        "--multiple",
        type=int,
        default=None,
        metavar="N",
        help="what divides the sides of the images; default: the autoencoder's factor (times task.patch for patches)",
    )
    sub.add_argument("--tokenizer", default=None, metavar="FILE", help="default: spiece.model beside the text encoder")
    sub.add_argument(
        "--batch", type=int, default=None, help="images encoded at a time; default: 64, fewer of more than 256 pixels"
    )
    sub.add_argument(
        "--statistics",
        default=None,
        metavar="FEATURES",
        help="write Frechet statistics of the training images to DEST.npz instead; pixels, or a run or export with features",
    )
    sub.add_argument("--flip", action="store_true", help="mirror a random half of the images of --statistics")
    opens(sub)
    sub = verb(
        "check",
        "Read images, captions, texts, series, latents or weights once and say what is wrong with them.",
        "SOURCE",
    )
    sub.add_argument(
        "--tokenizer",
        default=None,
        metavar="TOKENS",
        help="count tokens of captions and texts: bytes, or a tokenizer's file",
    )
    sub.add_argument("--tokens", type=int, default=128, metavar="N", help="tokens that a caption may have")
    sub.add_argument("--delimiter", default=",", help="of CSV files")
    sub.add_argument("--json", action="store_true", help="print what was found as JSON")
    verb("list", "Papers, their abilities, shipped configs and weights.")
    sub = verb(
        "show",
        "One config in full, or that of a run, an export or a shipped model; or the options of its sampler.",
        "CONFIG",
        fields="override fields",
    )
    what = sub.add_mutually_exclusive_group()
    what.add_argument("--shardings", action="store_true", help="where every parameter of a run lies on its mesh")
    what.add_argument("--sampler", action="store_true", help="what `zoo sample` and samples.options take")
    allows(sub)
    sub.add_argument(
        "--devices", default=None, metavar="N", help="a mesh of so many devices, or of a topology: v5e:4x4"
    )
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments with fields and flags in any order; argparse alone takes no field behind a flag."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.verb == "eval":  # METRIC may be left out: it is the first word that is no field, wherever it stands
        words = [w for w in (args.metric, *args.fields, *rest) if w is not None and not w.startswith("-")]
        args.metric = next((w for w in words if "=" not in w), None)
        args.fields = [w for w in words if w is not args.metric]
        rest = [w for w in rest if w.startswith("-")]
    late = [a for a in rest if "=" in a and not a.startswith("-")] if hasattr(args, "fields") else []
    if unknown := [a for a in rest if a not in late]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if late:
        args.fields = [*args.fields, *late]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `zoo`; returns the exit code: 0 done, 1 done with losses, 2 a mistake to mend, 3 try again."""
    args = _parse(argv)
    process.begin()
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    log = logging.getLogger("zoo")
    log.setLevel(logging.INFO)
    warnings.showwarning = lambda message, *_, **__: print(
        f"note: {' '.join(str(message).split())[:300]}", file=sys.stderr
    )
    try:
        code = process.end(_run_verb(args), args.verb)
    except BaseException:
        if (hosts := sys.modules.get("zoo.hosts")) is not None and hosts.several():
            traceback.print_exc()
            hosts.stop(1)  # ends this process: a lost one would be waited for
        raise
    if (hosts := sys.modules.get("zoo.hosts")) is not None:
        hosts.stop(code)
    return code


def _run_verb(args: argparse.Namespace) -> int:
    try:
        return int(_VERBS[args.verb](args) or 0)
    except Exception as error:
        if args.traceback or (code := process.explained(args.verb, error)) is None:
            raise
        return code
    except KeyboardInterrupt:
        print(f"zoo {args.verb}: interrupted", file=sys.stderr)
        return 130


# --- training -------------------------------------------------------------------------------------


def _train(args: argparse.Namespace) -> int:
    from zoo import config, dist, hosts

    profile = None if args.profile is None else _span(args.profile)
    hosts.start()
    if not hosts.main():
        logging.getLogger("zoo").setLevel(logging.WARNING)
    with hosts.guarded():  # a config may be missing on one host
        run = _run(config.load(args.config, args.fields, args.allow), args.config)
        from zoo.train.loop import train

        dist.start(batch=run.batch // run.accumulate, mesh=run.mesh)
        train(run, quiet=args.quiet, profile=profile, wandb=args.wandb)
    return 0


def _span(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    if match is None:
        raise UserError(f"--profile {text} is no range of steps; write FIRST:LAST, such as 10:15")
    return int(match[1]), int(match[2])


def _run(run: Any, name: str) -> Any:
    from zoo.run import Run

    if not isinstance(run, Run):
        raise UserError(f"{name} holds a {type(run).__name__}, not a Run; only runs are trained")
    return run


# --- sampling -------------------------------------------------------------------------------------


def _of_config(name: str, fields: Sequence[str]) -> tuple[list[str], list[str]]:
    """Where a model is a config, the overrides of its task and weights; and the other fields."""
    from zoo import models

    own = [f for f in fields if re.match(r"(task\.|weights[.=])", f)]
    own = own if own and models.is_config(name) else []
    return own, [f for f in fields if f not in own]


def _width(fields: Sequence[str]) -> tuple[float | None, list[str]]:
    """The width of a run's average by `ema=WIDTH`, None where none is asked for; and the other fields."""
    from zoo import config

    given = [field.removeprefix("ema=") for field in fields if field.startswith("ema=")]
    ema = config.parse(given[-1], float, "ema") if given else None
    return ema, [field for field in fields if not field.startswith("ema=")]


def _options(model: Any, fields: Sequence[str], allow: Sequence[str]) -> tuple[dict[str, Any], Any]:
    """What samples are asked for, and the sampler's own options, from `field=value`."""
    from zoo import config
    from zoo.fields import Count, Seed
    from zoo.task import abilities, option_names, sampling

    kind = sampling(model.task)
    if kind is None:
        can = ", ".join(abilities(model.task)) or "train alone"
        raise UserError(f"{type(model.task).__name__} has no sampler; it can: {can} (try `zoo eval`)")
    asked: dict[str, Any] = {
        "n": None,
        "seed": 0,
        **dict.fromkeys(("label", "prompt", "prompts", "aspect", "form", "from", "path")),
    }
    kinds: dict[str, Any] = {"n": Count, "seed": Seed}
    options, own = option_names(model.task), []
    known = {*asked, *options}
    for text in fields:
        key, equals, value = text.partition("=")
        head = key.partition(".")[0]
        if not equals:
            raise UserError(f"{text!r} is no option; write n=64")
        if head not in known:
            raise UserError(f"no option {head!r} of this sampler; {suggest(head, known)}")
        if key in asked and key not in options:  # a sampler with weights has a `form` of its own
            asked[key] = config.parse(value, kinds[key], key) if key in kinds else value
        else:
            own.append(text)
    return asked, config.override(kind(), own, allow=allow)


def _sample(args: argparse.Namespace) -> int:
    from zoo import dist, models, paths

    dist.start(batch=max(args.batch, 1))
    ema, fields = _width(args.fields)
    own, fields = _of_config(args.model, fields)
    model = models.open_model(args.model, own, raw=args.raw, ema=ema, allow=args.allow, on_host=True)
    words, options = _options(model, fields, args.allow)
    n, seed, label, prompt, prompts, aspect, kind, split, path = words.values()
    if args.batch < 1:
        raise UserError(f"--batch {args.batch}; draw at least one sample at a time")
    from zoo.commands import conditions, known, strategy, text
    from zoo.commands.sample import Form, Images, draw
    from zoo.draws import label_numbers
    from zoo.task import is_text
    from zoo.train.provenance import check_kept

    texts, asked = conditions.read(model.task, prompt, prompts)
    clips = "frames" in model.task.spec(1)
    writes = is_text(model.task)
    about = model.task.about
    if texts is None and about.completes:
        _no_strength(args.fields, "none is given; add prompt=TEXT or prompts=FILE")
    if path is not None and not clips:
        raise UserError(f"path={path}: {type(model.task).__name__} draws no clips; leave it out")
    writes = conditions.check_form(model.task, kind, None if clips else split, texts) or writes
    n = n or (len(texts) if texts and prompts is not None else text.SHOWN if writes else 8 if clips else 64)
    labels = label_numbers(label, about.classes, model.labels, n)
    options, shape = conditions.shaped(model.task, aspect, options)
    form: Form
    given: Any
    tokeniser: dict[str, str] = {}
    if split is not None and model.run is not None:
        check_kept(model.folder, model.data, splits=[split])
    if clips:
        given, form = known.start(model, options, split, path, n, seed, min(args.batch, n)), known.form(model.task)
        captions, asked = None, {"from": split, "path": path}
    elif split is not None:
        given, captions, asked = conditions.pictures(model, split, n), None, {"from": split}
        form = text.Texts(model.vocabulary)
    elif writes:
        given, captions = text.rewritten(model, model.vocabulary, texts, n)
        if given and all((row < 0).any() for row in given["tokens"]):
            _no_strength(args.fields, "here holes say which tokens are; give all of a text")
        form = text.Texts(model.vocabulary, captions)
    else:
        given, captions, tokeniser = model.conditions(labels, texts, n, options, aspect, args.tokenizer)
        form = Images(captions)
        if not about.conditions:
            asked = {"label": None if labels is None else label or "balanced"}
    out = paths.require_bucket(args.out, "--out ") if args.out else model.samples_folder
    batch = min(args.batch, n)
    resolved = strategy.resolve(model, options, batch, measure="method=auto" in args.fields)
    if resolved is not options:
        logging.getLogger("zoo").info("method: %s", strategy.described(resolved.method))

    draw(
        model,
        out,
        n=n,
        seed=seed,
        conditions=given,
        captions=captions,
        asked={**asked, **shape, **tokeniser},
        batch=batch,
        options=options,
        resolved=resolved,
        form=form,
    )
    return 0


def _no_strength(fields: Sequence[str], why: str) -> None:
    """UserError for a strength of rewriting where there is no text to rewrite."""
    for text in fields:
        if text.startswith("strength="):
            raise UserError(f"{text} says how much of a given text shall be new, and {why}, or leave strength= out")


# --- evaluation -----------------------------------------------------------------------------------


def _eval(args: argparse.Namespace) -> int:
    if args.metric is None:
        from zoo.commands import alone

        for flag in ("raw", "allow"):
            if getattr(args, flag):
                raise UserError(
                    f"--{flag} is for models, and a config that measures by itself opens none; leave it out"
                )
        found = alone.run(args.model, args.fields)
        print(_json(found))
        return 1 if found.get("failed") or found.get("unanswered") else 0
    from zoo import config, dist, metrics, models
    from zoo.data.folders import SPLITS
    from zoo.draws import Use, key_of
    from zoo.task import Measures, Metric, check_needs, sampling
    from zoo.train.provenance import by_name, check_kept

    known = metrics.named()
    if args.metric in known:
        metric: Any = known[args.metric]()
    elif args.metric.partition(":")[0].endswith(".py") or args.metric.partition(":")[0] in config.shipped():
        metric = config.load(args.metric)
        if not isinstance(metric, Metric):
            way = f"; write zoo eval {args.metric}" if isinstance(metric, Measures) else ""
            raise UserError(f"{args.metric} holds a {type(metric).__name__}, which is no metric of models{way}")
    else:
        raise UserError(f"no metric {args.metric!r}, nor a config file that defines one; {suggest(args.metric, known)}")
    ema, fields = _width(args.fields)
    overrides, fields = _of_config(args.model, fields)
    own = [f for f in fields if not f.startswith(("data.", "data="))]
    task, _ = models.open_task(args.model, args.allow, overrides)
    metric = config.override(metric, own, sampling(task), args.allow)
    dist.start(batch=metric.shares)
    model = models.open_model(args.model, overrides, raw=args.raw, ema=ema, allow=args.allow)
    check_needs(model.task, metric.needs, args.metric)
    if metric.captions:
        metric.check(model.task)  # what is wrong with it is told before a tokeniser is asked for
    others = [f for f in fields if f not in own]
    data = _measured(model, args.model, others) if others or metric.uses_data else model.data
    if metric.uses_data and not others and model.run is not None and metric.path is None:
        check_kept(model.folder, data, splits=[metric.split] if metric.split else SPLITS)
    metric, data = by_name(metric, data, model.labels)
    loaded = models.loaded_for(metric, args.allow, model.task, model.homes, model.data)
    found = metric(model.task, model.params, data, key_of(0, Use.LOOKS), **loaded)
    if metric.saves:
        from zoo.commands import strategy

        strategy.save(model.folder, found)
    if "pictures" in found:
        from zoo.commands.sample import save_pictures

        found = {**found, "pictures": save_pictures(model, found["pictures"])}
    line = {
        **found,
        "weights": model.kind,
        "step": model.step,
        "metric": config.dump(metric),
        "data": config.dump(data),
    }
    print(_json(line))
    return 1 if found.get("failed") else 0


def _json(found: Mapping[str, Any]) -> str:
    """Figures as one line of JSON, which has no word for what is not finite: null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()}
    return json.dumps(finite)


def _measured(model: Any, name: str, fields: Sequence[str]) -> Any:
    """The data to measure on: those of the model with `data.FIELD=value`, or others by `data=PATH`.

    Where the model's own data have a path, PATH stands in its place. Elsewhere they are a description of what the task reads,
    images or series.
    """
    from zoo import config
    from zoo.data.images import Arrays

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
    from zoo.data.images import Images
    from zoo.data.series import Series

    spec = task.spec(1)
    if "image" in spec:
        return Images(path, size=spec["image"].shape[1], channels=spec["image"].shape[-1])
    if "series" in spec:
        return Series(path, length=spec["series"].shape[1])
    raise UserError(
        f"data={path}: {type(task).__name__} reads {', '.join(spec)}, and a path is for images or series; "
        + (way or "import the model with a config that describes its data")
    )


# --- weights --------------------------------------------------------------------------------------


def _export(args: argparse.Namespace) -> int:
    from zoo import dist, models
    from zoo.commands.weights import export

    dist.start()
    if "://" in args.out:
        raise UserError(
            f"{args.out}: exports are written here; give a local folder and copy it with `gcloud storage cp -r`"
        )
    ema, fields = _width(args.fields)
    model = models.open_model(args.model, raw=args.raw, ema=ema, allow=args.allow)
    print(export(model, Path(args.out), args.format, args.samples, fields, args.allow, args.dtype))
    return 0


def _import(args: argparse.Namespace) -> int:
    from zoo import config
    from zoo.commands.weights import import_checkpoint
    from zoo.task import Published

    value = config.load(args.config, args.fields)
    if not isinstance(value, Published):
        value = _run(value, args.config)
    print(import_checkpoint(value, Path(args.file), Path(args.out), args.weights))
    return 0


# --- the rest -------------------------------------------------------------------------------------


def _bench(args: argparse.Namespace) -> int:
    from zoo import config, dist, hosts
    from zoo.commands.bench import bench

    if hosts.expected():
        raise UserError(
            "zoo bench measures one process, but the environment names several (JAX_NUM_PROCESSES, Slurm or a TPU pod); run "
            "it on one host, outside of the others"
        )
    run = config.load(args.config, args.fields)
    run = _run(run, args.config)
    against = None if args.against is None else _run(config.load(args.against), args.against)
    _check_json(args.json)
    if not re.fullmatch(r"-?[0-9]+(,-?[0-9]+)*", args.samples):
        raise UserError(f"--samples {args.samples} is no batch size and no list of them; write 16, or 16,64")
    samples = tuple(map(int, args.samples.split(",")))
    dist.start(batch=run.batch // run.accumulate, mesh=run.mesh)
    names = ("what", "samples", "rounds", "peer", "against", "model")
    flags = [f"--{k} {getattr(args, k)}" for k in names if getattr(args, k) is not None]
    flags += [f"--method {shlex.quote(text)}" for text in args.method]
    flags += [f"--with {shlex.quote(text)}" for text in args.options]
    about = {"command": " ".join(["zoo bench", args.config, *args.fields, *flags])}
    result = bench(
        run,
        peer=args.peer,
        against=against,
        what=args.what,
        samples=samples,
        rounds=args.rounds,
        model=args.model,
        methods=args.method,
        options=args.options,
        allow=args.allow,
        about=about,
    )
    print(result.table())
    _write_json(args.json, result.figures)
    return 0


def _compile(args: argparse.Namespace) -> int:
    # Before jax is imported: the TPU compiler shall not look for chips, nor refuse to be loaded twice.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_STDERR_LOG_LEVEL": "3"}
    for name, value in {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", **quiet}.items():
        os.environ.setdefault(name, value)
    from zoo import config
    from zoo.commands import compile as aot

    run = _run(config.load(args.config, args.fields), args.config)
    _check_json(args.json)
    to = aot.target(args.topology, args.slices)
    found = aot.compile_run(run, to, args.what, args.samples)
    print(found.table())
    _write_json(args.json, found.figures | {"fits": found.fits})
    if found.fits:
        return 0
    needs = found.figures.get("peak GiB", found.figures.get("needs GiB"))
    amount = "more" if needs is None else f"{needs:.2f} GiB"
    print(f"does not fit: it needs {amount} of {found.figures['memory GiB']:.2f} GiB a device", file=sys.stderr)
    if not args.no_search:
        print(aot.nearest_fit(run, to, found, args.what, args.samples), file=sys.stderr)
    return 1


def _check_json(path: str | None) -> None:
    if path and not Path(path).absolute().parent.is_dir():  # better now than after minutes
        raise UserError(f"cannot write {path}: its folder does not exist; make it, or give --json another file")


def _write_json(path: str | None, figures: dict[str, Any]) -> None:
    if path:
        try:
            Path(path).write_text(json.dumps(figures, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None


def _prepare(args: argparse.Namespace) -> int:
    if args.text is not None:
        return _prepare_text(args)
    if args.valid_fraction is not None:
        raise UserError("--valid-fraction is of texts; add --text, or leave it out")
    args.test_fraction = 0.1 if args.test_fraction is None else args.test_fraction
    if args.statistics is not None or args.flip:
        from zoo.commands import statistics

        args.batch = 64 if args.batch is None else args.batch
        return statistics.prepare(args)
    options = {
        "size": args.size,
        "allow_unreadable": args.allow_unreadable,
        "convert": args.convert,
        "test_fraction": args.test_fraction,
        "image_column": args.image_column,
        "caption_column": args.caption_column,
    }
    if args.encode:
        from zoo import dist
        from zoo.commands import encode

        encoders = encode.chosen(args.encode)
        batch = encode.batch_for(args.size) if args.batch is None else args.batch
        dist.start(batch=max(batch, 1))
        report = encode.encode(
            args.source,
            args.dest,
            encoders,
            channels=args.channels,
            aspects=args.aspects,
            features=args.features,
            tokenizer=args.tokenizer,
            batch=batch,
            multiple=args.multiple,
            raw=args.raw,
            allow=args.allow,
            **options,
        )
    else:
        from zoo.data.images.prepare import prepare

        for flag in ("features", "aspects", "multiple", "tokenizer"):
            if getattr(args, flag) not in (None, False):
                raise UserError(f"--{flag} says how images and captions are encoded; add --encode vae=MODEL")
        report = prepare(args.source, args.dest, channels=args.channels or 3, **options)
    print(report)
    return 1 if report.unreadable and not args.allow_unreadable else 0


def _prepare_text(args: argparse.Namespace) -> int:
    from zoo.data.text.prepare import prepare_text

    shares = ("valid_fraction", "test_fraction")
    unset = vars(_parser().parse_args(["prepare", "SOURCE", "DEST"]))
    for name, value in unset.items():
        if name not in ("traceback", "source", "dest", "text", *shares) and getattr(args, name) != value:
            raise UserError(f"--{name.replace('_', '-')} is of images and says nothing of --text; leave it out")
    fractions = {name: getattr(args, name) for name in shares if getattr(args, name) is not None}
    print(prepare_text(args.source, args.dest, args.text, **fractions))
    return 0


def _check(args: argparse.Namespace) -> int:
    from zoo.commands import check

    return check.run(args)


def _list(args: argparse.Namespace) -> int:
    from zoo.commands import listing

    print(listing.listing())
    return 0


def _show(args: argparse.Namespace) -> int:
    from zoo.commands import show

    if args.devices and not args.shardings:
        raise UserError("--devices says nothing without --shardings; add it, or leave --devices out")
    value = show.opened(args.config, args.fields, args.allow)
    if args.shardings:
        print(show.shardings(_run(value, args.config), show.count_devices(args.devices)))
    else:
        print((show.sampler if args.sampler else show.show)(value, args.config))
    return 0


_VERBS = {
    "train": _train,
    "sample": _sample,
    "eval": _eval,
    "export": _export,
    "import": _import,
    "bench": _bench,
    "compile": _compile,
    "prepare": _prepare,
    "check": _check,
    "list": _list,
    "show": _show,
}

if __name__ == "__main__":
    sys.exit(main())
