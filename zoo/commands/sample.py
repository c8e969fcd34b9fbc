"""`zoo sample`: what is asked for, and from what samples begin."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from zoo import config, dist, models, paths
from zoo.captions import conditions as conditions_of
from zoo.commands import conditions, known, strategy, text
from zoo.commands.arguments import of_config, opens, takes, width
from zoo.commands.draw import Form, Images, draw
from zoo.draws import label_numbers
from zoo.errors import UserError, suggest
from zoo.fields import Count, Seed
from zoo.task import abilities, is_text, option_names, sampling
from zoo.train.provenance import check_kept

_log = logging.getLogger("zoo")


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    takes(
        parser,
        "MODEL",
        fields="n, seed, label, prompt or prompts=FILE, form=text from=test, of clips from and path, aspect and the sampler's "
        "options, e.g. n=64 guidance=2.0, or passes=true",
    )
    parser.add_argument(
        "--out", default=None, metavar="FOLDER", help="default: samples/ in the run folder, or samples/ here"
    )
    parser.add_argument("--batch", type=int, default=64, help="samples per batch")
    parser.add_argument("--tokenizer", default=None, metavar="FILE", help="default: spiece.model beside the model")
    opens(parser)


def run(args: argparse.Namespace) -> int:
    """Draw samples of a model."""
    dist.start(batch=max(args.batch, 1))
    ema, fields = width(args.fields)
    own, fields = of_config(args.model, fields)
    model = models.open_model(args.model, own, raw=args.raw, ema=ema, allow=args.allow, on_host=True)
    words, options = _options(model, fields, args.allow)
    n, seed, label, prompt, prompts, aspect, kind, split, path = words.values()
    if args.batch < 1:
        raise UserError(f"--batch {args.batch}; draw at least one sample at a time")
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
        given, captions, tokeniser = conditions_of(model, labels, texts, n, options, aspect, args.tokenizer)
        form = Images(captions)
        if not about.conditions:
            asked = {"label": None if labels is None else label or "balanced"}
    out = paths.require_bucket(args.out, "--out ") if args.out else model.samples_folder
    batch = min(args.batch, n)
    resolved = strategy.resolve(model, options, batch, measure="method=auto" in args.fields)
    if resolved is not options:
        _log.info("method: %s", strategy.described(resolved.method))
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


def _options(model: Any, fields: Sequence[str], allow: Sequence[str]) -> tuple[dict[str, Any], Any]:
    """What samples are asked for, and the sampler's own options, from `field=value`."""
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
    for field in fields:
        key, equals, value = field.partition("=")
        head = key.partition(".")[0]
        if not equals:
            raise UserError(f"{field!r} is no option; write n=64")
        if head not in (*asked, *options):
            raise UserError(f"no option {head!r} of this sampler; {suggest(head, {*asked, *options})}")
        if key in asked and key not in options:  # a sampler with weights has a `form` of its own
            asked[key] = config.parse(value, kinds[key], key) if key in kinds else value
        else:
            own.append(field)
    return asked, config.override(kind(), own, allow=allow)


def _no_strength(fields: Sequence[str], why: str) -> None:
    """UserError for a strength of rewriting where there is no text to rewrite."""
    for field in fields:
        if field.startswith("strength="):
            raise UserError(f"{field} says how much of a given text shall be new, and {why}, or leave strength= out")
