"""Models compared by their results: ranking, paired intervals, win rates, how many pairs a metric tells apart, and who agrees.

`results.py` opens results and tells models apart, `coarse.py` has other metrics to compare with, `agreement.py` people and extractors.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from zoo.errors import UserError
from zoo.fields import Count, NotEmpty, Seed, check_fields
from zoo.files import write
from zoo.papers.typescore import synth
from zoo.papers.typescore.agreement import agreement, mean_of, of_extractors
from zoo.papers.typescore.coarse import Clip, Coarse, ImageTextScorer, scored
from zoo.papers.typescore.evaluate import NOTE
from zoo.papers.typescore.files import NAMED, as_json, as_png, relative, writing
from zoo.papers.typescore.results import (
    OWN,
    Pair,
    Resolution,
    Result,
    Scores,
    check_truth,
    load_all,
    pairs,
    resolution,
)

COMPARISON, TABLE, PLOT = "comparison.json", "comparison.md", "comparison.png"
_log = logging.getLogger("zoo")


@dataclass(frozen=True)
class Compare:
    """Several models' results on one list: who is better, and how surely; or several extractors' on the same models."""

    results: tuple[str, ...] = ()  # folders that TypeScore wrote; one is enough with `human`
    out: NotEmpty = "typescore-comparison"  # a folder for the comparison
    truth: tuple[str, ...] = ()  # the models, best first, where that is known: which pairs are told apart rightly
    surrogate: bool = False  # whether the coarse surrogate's resolution is given beside; needs the pictures
    clip: str = ""  # a CLIP model whose resolution is given beside; needs the pictures and the extra vlm
    wanted: str = "typeinst_synth"  # the list of instructions, for these two
    human: str = ""  # a CSV file of ratings or preferences
    extractors: bool = (
        False  # whether extractors are compared, each on the same models; models are then named by their pictures
    )
    resamples: Count = 1000  # of the bootstrap
    seed: Seed = 0  # of the bootstrap

    standalone: ClassVar[bool] = True  # `zoo eval` runs it without a model

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("truth", "surrogate", "clip", "human"):
            if self.extractors and getattr(self, name):
                raise UserError(
                    f"extractors=true compares extractors, and {name} is for models; leave one of the two out"
                )
        if len(self.results) == 1 and (self.surrogate or self.clip):
            name = "surrogate" if self.surrogate else "clip"
            raise UserError(
                f"{name} is compared by the pairs of models that it tells apart, and results={self.results[0]} is one model; "
                f"name two results, or leave {name} out"
            )

    def run(self) -> dict[str, Any]:
        """Writes comparison.json, comparison.png and comparison.md into `out`, in place of older ones; returns the first.

        UserError for results that do not compare or are too few, and where `out` holds a comparison of other results.
        """
        if len(self.results) < 2 and not (self.results and self.human):
            raise UserError(
                f"results={','.join(self.results)} is no two results; name them as results=a-typescore,b-typescore (one is enough "
                "with human=FILE, to be compared with people)"
            )
        results = load_all(self.results, self.extractors)
        out = Path(self.out)
        _claim(out, results)
        head = {
            "metric": "typescore comparison" + (" of extractors" if self.extractors else ""),
            "note": NOTE,
            "results": [{"label": one.label, "folder": relative(one.folder, out)} for one in results],
            **{k: v for k, v in results[0].setting.items() if k not in OWN},
        }
        if self.extractors:
            del head["extractor"]
            figures = {**head, **of_extractors(results, self.resamples, self.seed)}
            text = extractor_table(figures)
            rows = [
                {**one, "label": f"{one['label']}, by {extractor['label']}"}
                for extractor in figures["extractors"]
                for one in extractor["order"]
            ]
            drawn = plot(rows, {})
        else:
            found, scores = self._of_models(results)
            figures = {**head, **found}
            text, drawn = table(figures), plot(figures["ranking"], scores)
        with writing(out):
            write(out / COMPARISON, as_json(figures, indent=1))
            write(out / TABLE, text.encode())
            write(out / PLOT, drawn)
        _log.info("typescore: see %s", out / TABLE)
        return {**figures, "out": str(out)}

    def _of_models(self, results: Sequence[Result]) -> tuple[dict[str, Any], dict[str, Scores]]:
        """The figures of models, and their scores by instruction, best model first."""
        if self.truth:
            check_truth(self.truth, [result.label for result in results])
        scorers: list[ImageTextScorer] = [Coarse()] if self.surrogate else []
        scorers += [Clip(self.clip)] if self.clip else []
        for scorer in scorers:
            scorer.check()
        every = {result.label: result.scores() for result in results}
        common = sorted(set.intersection(*(set(one) for one in every.values())))
        if len(common) < 2:
            raise UserError(
                f"results: {len(common)} instructions are in all {len(results)} of them, and comparing needs two at least; "
                "evaluate all with one list"
            )
        lost = {label: len(one) - len(common) for label, one in every.items()}
        for label, n in lost.items():
            if n:
                _log.warning("typescore: %d instructions of %s are not in all results and left out", n, label)
        worse = results[0].setting["kind"] == "dissimilarity"
        means = {label: float(np.mean([one[name] for name in common])) for label, one in every.items()}
        order = sorted(means, key=lambda label: (means[label] if worse else -means[label], label))
        scores: dict[str, Scores] = {label: {name: every[label][name] for name in common} for label in order}
        found = pairs(scores, self.resamples, self.seed, worse)
        between = {(one.a, one.b): one for one in found}
        by_label = {result.label: result for result in results}
        ranking = []
        for place, label in enumerate(order):
            behind = between.get((label, order[place + 1])) if place + 1 < len(order) else None
            ranking.append(
                {
                    "place": place + 1,
                    "label": label,
                    **mean_of(np.array(list(scores[label].values())), self.resamples, self.seed),
                    "failed": len(by_label[label].records) - len(by_label[label].read),
                    "left_out": lost[label],
                    "told_apart_from_next": None if behind is None else behind.told_apart,
                }
            )
        figures: dict[str, Any] = {
            "instructions": len(common),
            "ranking": ranking,
            "pairs": [_figures(one) for one in found],
            "truth": list(self.truth) or None,
            "resolution": {},
        }
        truth = self.truth or None
        if found:
            figures["resolution"]["TypeScore"] = _figures(resolution(found, truth, worse))
        if scorers:
            known = {one.id: one for one in synth.listed(self.wanted)}
            for scorer in scorers:
                other = {label: scored(by_label[label], scorer, known) for label in order}
                other = {label: {name: one[name] for name in common} for label, one in other.items()}
                figures["resolution"][scorer.name] = _figures(resolution(pairs(other, 1, self.seed), truth))
        if self.human:
            figures["human"] = agreement(self.human, results, self.resamples, self.seed)
        return figures, scores


def _claim(out: Path, results: Sequence[Result]) -> None:
    """UserError where `out` holds a comparison of other results than these, or is no folder. The same ones may be replaced."""
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"out={out} is no folder; name another with out=FOLDER")
        theirs = {one["folder"] for one in json.loads((out / COMPARISON).read_bytes())["results"]}
    except UserError:
        raise
    except FileNotFoundError:
        if not any((out / name).exists() for name in (TABLE, PLOT)):
            return
        theirs = set()
    except OSError as error:
        raise UserError(
            f"{out / COMPARISON} cannot be read ({error.strerror}); name another folder with out=FOLDER"
        ) from None
    except (ValueError, KeyError, TypeError):
        theirs = set()
    if theirs != {relative(one.folder, out) for one in results}:
        of = (
            f"of other results ({', '.join(sorted(theirs)[:NAMED])})"
            if theirs
            else "that does not say of which results"
        )
        raise UserError(
            f"out={out} holds a comparison {of}, which is not overwritten; name another folder with out=FOLDER, or remove this one"
        )


def _figures(one: Pair | Resolution) -> dict[str, Any]:
    """JSON values: an infinite z is "inf" or "-inf", which float() reads, and what is undefined None."""
    found = {
        k: v if not isinstance(v, float) else round(v, 6) if math.isfinite(v) else None if math.isnan(v) else str(v)
        for k, v in asdict(one).items()
    }
    return {**found, "told_apart": one.told_apart} if isinstance(one, Pair) else found


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _z(value: float | str | None) -> str:
    return "" if value is None else f"{float(value):.1f}".replace("inf", "∞")


def _share(right: float | None) -> str:
    return "" if right is None else f"{right:.0%} | "


def _setting(figures: Mapping[str, Any]) -> str:
    """What the scores were made with: without it they say nothing."""
    normalisation = ", ".join(f"{name}={json.dumps(value)}" for name, value in figures["normalisation"].items())
    weights = ", ".join(
        f"{name} {value:g}" for name, value in zip(("NED", "NLCS", "SW"), figures["weights"], strict=True)
    )
    return (
        f"Setting: {normalisation}, piece_mode={figures['piece_mode']}, kind={figures['kind']}, weights {weights}, "
        f"spec_version {figures['spec_version']}. Scores are {figures['note']}."
    )


def table(figures: Mapping[str, Any]) -> str:
    """The comparison of models as Markdown."""
    ranking, extractor = figures["ranking"], figures["extractor"]
    lines = [
        f"TypeScore of {len(ranking)} model{'s' * (len(ranking) > 1)} on {figures['instructions']} instructions, read by "
        f"{extractor['name']} {extractor['version']}.",
        "",
        _setting(figures),
        "",
        "| | model | TypeScore (95 %) | told apart from the next | failed |",
        "|---|---|---|---|---|",
    ]
    words = {True: "yes", False: "no", None: ""}
    lines += [
        f"| {one['place']} | {_cell(one['label'])} | {one['score']:.1f} ({one['low']:.1f} to {one['high']:.1f}) | "
        f"{words[one['told_apart_from_next']]} | {one['failed']} |"
        for one in ranking
    ]
    if figures["pairs"]:
        lines += ["", "| pair | difference (95 %) | win rate | z |", "|---|---|---|---|"]
    lines += [
        f"| {_cell(one['a'])} over {_cell(one['b'])} | {one['difference']:.2f} ({one['low']:.2f} to {one['high']:.2f}) | "
        f"{one['win_rate']:.0%} | {_z(one['z'])} |"
        for one in figures["pairs"]
    ]
    if figures["resolution"]:
        known = figures["truth"] is not None
        lines += ["", f"| metric | pairs told apart |{' rightly |' if known else ''} median of \\|z\\| |"]
        lines += ["|---|---|---|" + "---|" * known]
        lines += [
            f"| {name} | {one['told_apart']:.0%} of {one['pairs']} | {_share(one['right'])}{_z(one['median_z'])} |"
            for name, one in figures["resolution"].items()
        ]
        if known:
            lines += ["", f"True order, best first: {', '.join(map(_cell, figures['truth']))}."]
    if "human" in figures:
        lines += ["", *_human_table(figures["human"])]
    return "\n".join(lines) + "\n"


def _human_table(found: Mapping[str, Any]) -> list[str]:
    said = (
        f"{found['ratings']} ratings"
        if "ratings" in found
        else f"{found['preferences']} preferences and {found['ties']} ties"
    )
    names = {
        "spearman": "Spearman's rho",
        "kendall_tau_b": "Kendall's tau-b",
        "pair_accuracy": "accuracy on pairs",
        "pair_accuracy_within_instructions": "accuracy on pairs of one instruction",
    }
    pairs_of = {
        "pair_accuracy": found.get("pairs", found.get("preferences")),
        "pair_accuracy_within_instructions": found.get("pairs_within_instructions"),
    }
    models = found.get("models", {})
    lines = [
        f"Agreement with people: {said} on {found['instructions']} instructions; {found['left_out']} lines of pictures that were "
        "not read are left out. Intervals resample instructions.",
        "",
        "| agreement | value (95 %) | pairs |",
        "|---|---|---|",
    ]
    lines += [
        f"| by picture: {words} | {_with_range(found[name])} | {pairs_of.get(name, '')} |"
        for name, words in names.items()
        if name in found
    ]
    lines += [
        f"| by model ({len(models['of'])}): {words} | {_with_range(models[name])} | "
        f"{models['pairs'] if name == 'pair_accuracy' else ''} |"
        for name, words in names.items()
        if name in models
    ]
    return lines


def _with_range(values: Sequence[float | None]) -> str:
    value, low, high = ("undefined" if v is None else f"{v:.2f}" for v in values)
    return value if values[1] is None else f"{value} ({low} to {high})"


def extractor_table(figures: Mapping[str, Any]) -> str:
    """The comparison of extractors as Markdown."""
    lines = [
        f"{len(figures['extractors'])} extractors on {figures['models']} models: {figures['pictures']} pictures of "
        f"{figures['instructions']} instructions that all of them read; {figures['left_out']} are left out.",
        "",
        _setting(figures),
        "",
        "| extractor | models, best first: TypeScore (95 %) | failed |",
        "|---|---|---|",
    ]
    for one in figures["extractors"]:
        order = "; ".join(
            f"{_cell(m['label'])} {m['score']:.1f} ({m['low']:.1f} to {m['high']:.1f})" for m in one["order"]
        )
        lines.append(f"| {_cell(one['label'])} | {order} | {one['failed']} |")
    lines += [
        "",
        "| extractors | Spearman of models | Kendall's tau-b of models | Pearson of pictures | difference (95 %) |",
        "|---|---|---|---|---|",
    ]
    for one in figures["agreement"]:
        values = (one[name] for name in ("spearman", "kendall_tau_b", "pearson_by_picture"))
        cells = " | ".join("undefined" if v is None else f"{v:.3f}" for v in values)
        lines.append(
            f"| {_cell(one['a'])} and {_cell(one['b'])} | {cells} | {one['difference']:+.2f} "
            f"({one['low']:+.2f} to {one['high']:+.2f}) |"
        )
    return "\n".join(lines) + "\n"


def plot(ranking: Sequence[Mapping[str, Any]], scores: Mapping[str, Scores]) -> bytes:
    """A PNG: means with their intervals in the order given, over the scores by instruction where there are some."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.4 + 0.5 * len(ranking)), dpi=110, layout="constrained")
    axes = figure.subplots()
    for row, one in enumerate(ranking):
        values = list(scores.get(one["label"], {}).values())
        axes.plot(values, [row] * len(values), "|", color="#9ec5e8", ms=12)
        axes.errorbar(
            one["score"],
            row,
            xerr=[[max(one["score"] - one["low"], 0)], [max(one["high"] - one["score"], 0)]],
            fmt="o",
            color="#1f6fb4",
            capsize=4,
        )
    names = [one["label"] if len(one["label"]) < 40 else "..." + one["label"][-37:] for one in ranking]
    axes.set_yticks(range(len(ranking)), [name.replace("$", r"\$") for name in names])
    axes.set(
        xlabel="TypeScore: mean with its interval" + (", and every instruction" if scores else ""),
        ylim=(len(ranking) - 0.5, -0.5),
    )
    axes.grid(color="#e4e4e4", axis="x")
    axes.set_axisbelow(True)
    return as_png(figure)
