"""The command line. One grammar: what a run or metric is = `field=value`, what a command does = `--flag`.

Each command is a module of `zoo.commands` with `add(parser)`, its arguments, and `run(args)`, which returns the exit code; only that
of the command asked for is imported.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import traceback
import warnings
from collections.abc import Sequence

from zoo import process

VERBS = {  # command -> its module, and what it does
    "train": ("train", "Start or resume a run."),
    "sample": (
        "sample",
        "Draw samples from a run, an export, a shipped model, or a config whose weights are all given.",
    ),
    "eval": (
        "eval",
        "Measure a run, an export, or a config whose weights are all given; or CONFIG alone, which says what it measures, "
        "such as those that `zoo list` marks with zoo eval CONFIG.",
    ),
    "export": ("export", "Write the weights of a run, or of a config that are all given, for others."),
    "import": ("imports", "Bring in a published checkpoint."),
    "bench": ("bench", "Time the train step, the sampler and the data of a config."),
    "compile": ("compile", "Compile a config for chips that are not here: does it fit, and how fast can it be."),
    "prepare": (
        "prepare",
        "Turn images, with or without captions, into an ArrayRecord data set or one of latents, texts into tokens, images into "
        "statistics.",
    ),
    "check": (
        "check",
        "Read images, captions, texts, series, latents or weights once and say what is wrong with them.",
    ),
    "list": ("listing", "Papers, their abilities, shipped configs and weights."),
    "show": (
        "show",
        "One config in full, or that of a run, an export or a shipped model; or the options of its sampler.",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `zoo`; returns the exit code: 0 done, 1 done with losses, 2 a mistake to mend, 3 try again."""
    words = list(sys.argv[1:] if argv is None else argv)
    verb = next((word for word in words if not word.startswith("-")), "")
    process.begin()
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("zoo").setLevel(logging.INFO)
    warnings.showwarning = lambda message, *_, **__: print(
        f"note: {' '.join(str(message).split())[:300]}", file=sys.stderr
    )
    try:
        code = process.end(_run(words, verb), verb)
    except BaseException:
        if (hosts := sys.modules.get("zoo.hosts")) is not None and hosts.several():
            traceback.print_exc()
            hosts.stop(1)  # ends this process: a lost one would be waited for
        raise
    if (hosts := sys.modules.get("zoo.hosts")) is not None:
        hosts.stop(code)
    return code


def _run(words: list[str], verb: str) -> int:
    try:
        args = _parse(words, verb)
        return int(args.run(args))
    except Exception as error:
        if words[:1] == ["--traceback"] or (code := process.explained(verb, error)) is None:
            raise
        return code
    except KeyboardInterrupt:
        print(f"zoo {verb}: interrupted", file=sys.stderr)
        return 130


def _parse(words: list[str], verb: str) -> argparse.Namespace:
    """Arguments with fields and flags in any order; argparse alone takes no field behind a flag."""
    parser = argparse.ArgumentParser(
        prog="zoo", description="Train, sample, evaluate and export the models of the zoo."
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error arose")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    for name, (_, text) in VERBS.items():
        sub = verbs.add_parser(name, help=text, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == verb:
            module = importlib.import_module(f"zoo.commands.{VERBS[verb][0]}")
            if hasattr(module, "check_spelling"):
                module.check_spelling(words[words.index(verb) + 1 :])
            module.add(sub)
            sub.set_defaults(run=module.run)
    args, rest = parser.parse_known_args(words)
    takes_fields = "fields" in vars(args)
    late = [word for word in rest if takes_fields and not word.startswith("-")]
    if unknown := [word for word in rest if word not in late]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{'; a field is name=value' * takes_fields}")
    if late:
        args.fields = [*args.fields, *late]
    return args


if __name__ == "__main__":
    sys.exit(main())
