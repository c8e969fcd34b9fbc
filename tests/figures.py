"""Measured figures: kept in figures/PAPER.json, shown in configs/PAPER/README.md and, those of `zoo compile`, in launch/README.md.

Beside them the table of the contract in CONTRIBUTING.md, which is made of the docstrings of `zoo/task.py`.

    python tests/figures.py add PAPER ID RUN_FOLDER_OR_JSON "COMMAND" ["HARDWARE"]
                # JSON of bench, compile or eval, or {"rows": {WHAT: FIGURES}}
    python tests/figures.py encoders PAPER ID "COMMAND" RUN[+JSON...] RUN[+JSON...]
                # the same run with seeds 0, 1, ...; JSON of `zoo eval`
    python tests/figures.py write        # builds the tables of all pages anew

Each record carries the command, the hardware and the date. A test compares the pages with what `write` would write.
"""

from __future__ import annotations

import datetime
import inspect
import json
import os
import re
import string
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from zoo.task import ABILITIES

FOLDER = Path(__file__).with_name("figures")
ROOT = Path(__file__).parent.parent
COMPILED = ROOT / "launch" / "README.md"
CONTRACT = ROOT / "CONTRIBUTING.md"
PAGES = [*sorted(ROOT.glob("configs/*/README.md")), COMPILED, CONTRACT]
WIDTH = 120  # columns of a page
# what a record may show, in this order; everything else stays in the file
HEADS = {
    "bpd": "bits per dimension",
    "noisy_bits_per_dim": "bits of noisy images",
    "noisy_latent_bits_per_dim": "bits of noisy latents",
    "gaussian_noisy_latent_bits_per_dim": "Gaussian on noisy latents",
    "bits_per_token": "bits per character",
    "denoising": "denoising error",
    "mse_6": "error at the sixth copy",
    "points": "error of points",
    "points_shuffled": "that of points of other images",
    "accuracy": "accuracy of Bayes' rule",
    "histogram_bpd": "histogram",
    "gaussian_bpd": "Gaussian",
    "steps": "steps",
    "minutes": "minutes",
}
# kinds of JSON by a key of theirs
KINDS = {
    "solvers": "solvers",
    "compile": "topology",
    "agreement": "agreement",
    "texts": "bits_per_token",
    "rows": "rows",
}
# what the table of encoders shows: column, keys of one figure each
ENCODERS = {
    "R2 of dx, dy, dw, dh": ("r2_dx", "r2_dy", "r2_dt", "r2_dw", "r2_dh"),
    "layout: ink, all": ("layout_ink", "layout_all"),
    "probe": ("probe_accuracy",),
    "fewer labels": ("few_accuracy",),
    "10-NN": ("knn_accuracy",),
    "shift R2": ("localise_r2",),
    "tuned": ("accuracy",),
}
Records = dict[str, dict[str, Any]]


def read(paper: str) -> dict[str, Records]:
    """Records of a paper by kind and id."""
    file = FOLDER / f"{paper}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def of_run(folder: Path) -> dict[str, Any]:
    """Last held-out figures of a run folder, its steps, and the minutes from its first log line to its last.

    The records of the metrics of that step are one; what was measured on the test split comes before the same of another.
    """
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held_out = [r for r in records if "loss" not in r]
    held_out = [r for r in held_out if r["step"] == held_out[-1]["step"]]
    tested = [r for r in held_out if r.get("split", "test") == "test"]
    measured = {key for r in tested for key in r if key in HEADS}
    others = [r for r in held_out if r not in tested and measured.isdisjoint(r)]
    found = {key: value for r in (*others, *tested) for key, value in r.items()}
    return {**found, "steps": found["step"], "minutes": (records[-1]["time"] - records[0]["time"]) / 60}


def hardware(figures: dict[str, Any] | None = None) -> str:
    """The processor, by the name it gives itself; of a bench's figures, what they were measured on."""
    if figures and "cpu" in figures:
        device = str(figures["device"])
        return f"{figures['cores']} cores of {figures['cpu']}" if device.startswith("cpu") else device
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return f"{os.cpu_count()} cores of {names[0] if names else 'an unnamed CPU'}"


def _keep(paper: str, kind: str, name: str, command: str, figures: dict[str, Any], machine: str) -> None:
    date = str(figures["date"])[:10] if "date" in figures else datetime.date.today().isoformat()
    record = {"command": command, "hardware": machine, "date": date, "figures": figures}
    kept = read(paper)
    kept.setdefault(kind, {})[name] = record
    (FOLDER / f"{paper}.json").write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def add(paper: str, name: str, source: Path, command: str, machine: str | None = None) -> None:
    """Keep the figures of a run folder, or of the JSON that `zoo bench` or `zoo compile --json` wrote, under an id."""
    figures = json.loads(source.read_text()) if source.is_file() else of_run(source)
    kind = "inverse" if any(" sweeps, " in key for key in figures) else "bench" if source.is_file() else "learned"
    if source.is_file():
        kind = next((k for k, key in KINDS.items() if key in figures), kind)
    _keep(paper, kind, name, command, figures, machine or hardware(figures))


def add_encoders(paper: str, name: str, command: str, sources: list[str]) -> None:
    """Keep the figures of a run with several seeds; of two probes that with fewer labels has a name of its own."""
    seeds = []
    for source in sources:
        folder, *others = map(Path, source.split("+"))
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        records = [r for r in map(json.loads, lines) if "loss" not in r]
        records = [r for r in records if r["step"] == records[-1]["step"]] + [json.loads(o.read_text()) for o in others]
        probes = sorted((r for r in records if "probe_train" in r), key=lambda r: -r["probe_train"])
        for r in probes[1:]:
            for key in [k for k in r if k.startswith("probe_")]:
                r[key.replace("probe_", "few_")] = r.pop(key)
        seeds.append({k: v for r in records for k, v in r.items() if isinstance(v, (int, float)) and k != "time"})
    _keep(paper, "encoders", name, command, {"seeds": seeds}, hardware())


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


def _folded(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _sources(records: Records) -> str:
    """Date, hardware and command of the rows: where several differ in their id alone the command stands once, with RUN for it."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for name, r in records.items():
        command = re.sub(rf"(?<=[/_.-]){re.escape(name)}(?![\w:.])", "RUN", r["command"])
        found.setdefault((r["date"], r["hardware"], command), []).append(name)
    lines = []
    for (date, machine, command), names in sorted(found.items(), key=lambda item: len(item[1])):
        shared = len(names) > 1
        whose = f"{', '.join(names)}: " if len(found) > 1 else ""
        if len(names) > 4 and whose and len(lines) == len(found) - 1:
            whose = "the others: "
        lines.append(_folded(f"- {whose}{date}, {machine}: `{command if shared else records[names[0]]['command']}`"))
    return "\n".join(lines)


def _with_sources(heads: Iterable[str], rows: Iterable[Iterable[str]], records: Records) -> str:
    return f"{_table(heads, rows)}\n\n{_sources(records)}"


def learned_table(records: Records) -> str:
    """What runs reached."""
    keys = [k for k in HEADS if any(k in r["figures"] for r in records.values())]
    rows = [
        [name, *(f"{r['figures'][k]:,.4g}" if k in r["figures"] else "" for k in keys)] for name, r in records.items()
    ]
    return _with_sources(["run", *(HEADS[k] for k in keys)], rows, records)


def bench_table(records: Records) -> str:
    """Speed beside the peer: medians, and the median of the ratios round by round."""
    rows = []
    for name, r in records.items():
        f = r["figures"]
        unit = "text" if any("sequences/s" in key for key in f) else "image"
        for key in (k for k in f if k.endswith(" ms, ours")):
            what = key.removesuffix(" ms, ours")
            other = "peer" if f"{what} ms, peer" in f else "against"
            ratio, peer = f.get(f"{what}, ours / {other}"), f.get(f"{what} ms, {other}")
            rows.append(
                [
                    name,
                    f"train step, batch {f['batch']}"
                    if what == "train"
                    else f"{what} {unit}{'s'[: what != 'sample 1']}",
                    f"{f[key]['median']:.4g} ms",
                    f"{peer['median']:.4g} ms" if peer else "",
                    f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else "",
                ]
            )
    return _with_sources(["model", "program", "zoo", "peer", "zoo / peer"], rows, records)


def texts_table(records: Records) -> str:
    """Language models: bits per character of held-out text, a column for each seed."""
    order = sorted(
        records.items(), key=lambda item: (item[1]["figures"]["steps"], item[1]["figures"]["bits_per_token"])
    )
    rows = [
        [name, *(f"{x:.3f}" for x in r["figures"]["bits_per_token"]), f"{r['figures']['steps']:,}"] for name, r in order
    ]
    return _with_sources(["run", "bits per character, seed 0", "seed 1", "steps"], rows, records)


def encoders_table(records: Records) -> str:
    """Encoders trained without labels: what they predict, and what their features are good for; a row for each seed."""
    rows = [
        [name, str(i), *(_figures(seed, keys) for keys in ENCODERS.values()), f"{seed['step']:,}"]
        for name, r in records.items()
        for i, seed in enumerate(r["figures"]["seeds"])
    ]
    return _with_sources(["run", "seed", *ENCODERS, "steps"], rows, records)


def _figures(figures: dict[str, Any], keys: tuple[str, ...]) -> str:
    """Figures of one seed in a cell; of a probe the figure of fresh parameters in brackets."""
    found = [f"{figures[k]:.3f}" for k in keys if k in figures]
    untrained = [f" ({figures[f'{k}_random']:.3f})" for k in keys if f"{k}_random" in figures]
    return ", ".join(found) + "".join(untrained)


def solvers_table(records: Records) -> str:
    """Solvers by calls: the Frechet distance to the data, and the difference to where each converges."""
    (record,) = records.values()
    rows = record["figures"]["solvers"]
    heads = ["solver", *map(str, record["figures"]["nfe"])]
    distances = [
        [r["solver"], *("" if d is None else f"{d:.3f} ({s:.3f})" for d, s in zip(r["frechet"], r["frechet_std"]))]
        for r in rows
    ]
    differences = [
        [
            r["solver"],
            *("" if e is None or d is None else f"{100 * e:.2g} %" for e, d in zip(r["error"], r["frechet"])),
        ]
        for r in rows
    ]
    parts = [
        "Frechet distance:",
        _table(heads, distances),
        "Difference:",
        _table(heads, differences),
        _sources(records),
    ]
    return "\n\n".join(parts)


def inverse_table(records: Records) -> str:
    """Samplers of trained flows by method of inversion: medians, and how far samples are from the sequential ones."""
    heads = ["model", "n", "token by token", "peer", "ratio", "method", "time", "ratio"]
    heads += ["most sweeps a block", "difference"]
    rows = []
    for name, r in records.items():
        f = r["figures"]
        for key in (k for k in f if re.fullmatch(r"sample \d+ sweeps, .*", k)):
            what, _, method = key.partition(" sweeps, ")
            ours, peer = f[f"{what} ms, ours"]["median"], f.get(f"{what} ms, peer")
            rows.append(
                [
                    name,
                    what.removeprefix("sample "),
                    f"{ours:.4g} ms",
                    f"{peer['median']:.4g} ms" if peer else "",
                    f"{peer['median'] / ours:.1f}" if peer else "",
                    method,
                    f"{f[f'{what} ms, {method}']['median']:.4g} ms",
                    f"{f[f'{what}, {method} / ours']['median']:.2f}",
                    ", ".join(map(str, f[key])) if isinstance(f[key], list) else f[key],
                    f"{f[f'{what} error, {method}']:.1e}",
                ]
            )
    return _with_sources(heads, rows, records)


def compile_table(records: Records) -> str:
    """What programs need on chips that are not here, and how fast they can be there; options stand once, under a letter."""
    heads = ["config", "chips", "with", "parameters", "state, GiB", "peak / memory, GiB", "bound", "step, at least"]
    extras = {name: r["command"].split(maxsplit=5)[5:] for name, r in records.items()}
    told = dict.fromkeys(text for texts in extras.values() for text in texts)
    letters = dict(zip(told, string.ascii_lowercase))
    rows = []
    for key, r in records.items():
        _, _, name, _, chips, *_ = r["command"].split()
        f = r["figures"]
        rows.append(
            [
                name,
                chips,
                *([letters[text] for text in extras[key]] or [""]),
                f"{f['parameters'] / 1e6:,.4g} M",
                f"{f['arguments GiB per device']:.3f}",
                f"{f['peak GiB']:.2f} / {f['memory GiB']:.2f}",
                f["bound"],
                f"{f['step s, at least']:.3g} s",
                f"{f['utilisation, at most']:.0%}",
                f"{f['compile s']:.0f} s",
            ]
        )
    lines = [f"- {letter}: `{text}`" for text, letter in letters.items()]
    head = "Each row is `zoo compile CONFIG --topology CHIPS`, with:"
    return "\n".join([_table([*heads, "use", "compiled"], rows), "", head, *lines])


def agreement_table(records: Records) -> str:
    """Whether samples are of the class that was asked for."""
    rows = []
    for r in records.values():
        f = r["figures"]
        share = f"{f['agreement']:.3f} (standard error {f['agreement_std_error']:.3f})"
        guidance = f"{f['metric']['options'].get('guidance', 0):g}"
        rows.append([guidance, share, f"{f['judge_accuracy']:.3f}", f"{f['agreement_samples']}"])
    heads = ["guidance", "samples of the class asked for", "the judge on real test images", "samples"]
    return _with_sources(heads, rows, {name.replace(" ", "="): r for name, r in records.items()})


def rows_list(records: Records) -> str:
    """What was measured, in words, and where from."""
    found = [f"- {what}: {value}" for r in records.values() for what, value in r["figures"]["rows"].items()]
    return "\n".join([*map(_folded, found), "", _sources(records)])


TABLES: dict[str, Callable[[Records], str]] = {
    "learned": learned_table,
    "agreement": agreement_table,
    "texts": texts_table,
    "encoders": encoders_table,
    "solvers": solvers_table,
    "rows": rows_list,
    "bench": bench_table,
    "inverse": inverse_table,
    "compile": compile_table,
}


def contract() -> str:
    """Abilities of tasks: method, protocol, and the first paragraph of its docstring."""
    rows = [
        [f"`{name}`", ability.__name__, " ".join((inspect.getdoc(ability) or "").split())]
        for name, ability in ABILITIES.items()
    ]
    return _table(["method", "protocol", ""], rows)


def shown(page: Path) -> dict[str, Records]:
    """What a page shows, by kind: all of its paper but what was compiled, which stands on one page for all papers."""
    if page != COMPILED:
        return {kind: r for kind, r in read(page.parent.name).items() if kind != "compile"}
    papers = sorted(file.stem for file in FOLDER.iterdir())
    return {"compile": {f"{p}/{name}": r for p in papers for name, r in read(p).get("compile", {}).items()}}


def rendered(page: Path) -> str:
    """The text of a page with its tables made anew."""
    text = page.read_text()
    tables = {f"figures: {kind}": TABLES[kind](records) for kind, records in shown(page).items()}
    for mark, table in tables.items() if page != CONTRACT else [("contract", contract())]:
        begin, end = f"<!-- {mark} -->", "<!-- end -->"
        head, _, rest = text.partition(begin)
        _, found, tail = rest.partition(end)
        assert found, f"{page} has no {begin} ... {end}"
        text = f"{head}{begin}\n{table}\n{end}{tail}"
    return text


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["add", paper, name, source, command, *rest]:
            add(paper, name, Path(source), command, *rest)
        case ["encoders", paper, name, command, *sources] if sources:
            add_encoders(paper, name, command, sources)
        case ["write"]:
            for page in PAGES:
                page.write_text(rendered(page))
        case _:
            sys.exit(__doc__)
