"""Measured figures: kept in figures.json, shown in README.md.

    python tests/figures.py add NAME RUN_FOLDER_OR_JSON "COMMAND" ["HARDWARE"]
                # JSON of bench, compile or eval, or {"rows": {WHAT: FIGURES}}
    python tests/figures.py encoders NAME "COMMAND" RUN[+JSON...] RUN[+JSON...]    # the same run with seeds 0, 1, ...; JSON of `zoo eval`
    python tests/figures.py write        # builds the README's tables anew

Each record carries the command, the hardware and the date. A test compares the README with what `write` would write.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("figures.json")
README = Path(__file__).parent.parent / "README.md"
# what a record may show, in this order; everything else stays in the file
HEADS = {
    "bpd": "bits per dimension, held out",
    "noisy_bits_per_dim": "bits of noisy images, held out",
    "noisy_latent_bits_per_dim": "bits of noisy latents, held out",
    "gaussian_noisy_latent_bits_per_dim": "Gaussian on noisy latents",
    "denoising": "denoising error, held out",
    "mse_6": "error at the sixth copy, held out",
    "points": "error of points, held out",
    "points_shuffled": "that of points of other images",
    "accuracy": "accuracy of Bayes' rule",
    "histogram_bpd": "histogram",
    "gaussian_bpd": "Gaussian",
    "steps": "steps",
    "minutes": "minutes",
}

FIGURES = {*HEADS, "bits_per_token"}  # that a metric is told by
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
    "rebuilt layout: ink, all": ("layout_ink", "layout_all"),
    "probe (labels)": ("probe_accuracy",),
    "probe, fewer labels": ("few_accuracy",),
    "10-NN": ("knn_accuracy",),
    "localisation R2": ("localise_r2",),
    "fine-tuned": ("accuracy",),
}


def read() -> dict[str, dict[str, Any]]:
    """Records by name."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def of_run(folder: Path) -> dict[str, Any]:
    """Last held-out figures of a run folder, its steps, and the minutes from its first log line to its last.

    The records of the metrics of that step are one; what was measured on the test split comes before the same of another.
    """
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held_out = [r for r in records if "loss" not in r]
    held_out = [r for r in held_out if r["step"] == held_out[-1]["step"]]
    tested = [r for r in held_out if r.get("split", "test") == "test"]
    measured = {key for r in tested for key in r if key in FIGURES}
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


def add(name: str, source: Path, command: str, machine: str | None = None) -> None:
    """Keep the figures of a run folder, or of the JSON that `zoo bench` or `zoo compile --json` wrote, under a name."""
    figures = json.loads(source.read_text()) if source.is_file() else of_run(source)
    record = {
        "kind": next((k for k, key in KINDS.items() if key in figures), "bench" if source.is_file() else "learned"),
        "command": command,
        "hardware": machine or hardware(figures),
        "date": str(figures["date"])[:10] if "date" in figures else datetime.date.today().isoformat(),
        "figures": figures,
    }
    FILE.write_text(json.dumps({**read(), name: record}, indent=1, sort_keys=True) + "\n")


def add_encoders(name: str, command: str, sources: list[str]) -> None:
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
    record = {
        "kind": "encoders",
        "command": command,
        "hardware": "2 cores of AMD EPYC",
        "date": datetime.date.today().isoformat(),
        "figures": {"seeds": seeds},
    }
    FILE.write_text(json.dumps({**read(), name: record}, indent=1, sort_keys=True) + "\n")


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def learned_table(records: dict[str, dict[str, Any]]) -> str:
    """What runs reached."""
    chosen = {name: r for name, r in records.items() if r["kind"] == "learned"}
    keys = [k for k in HEADS if any(k in r["figures"] for r in chosen.values())]
    lines = [_row(["run", *(HEADS[k] for k in keys), "measured"]), _row(["---"] * (len(keys) + 2))]
    for name, r in chosen.items():
        cells = [f"{r['figures'][k]:,.4g}" if k in r["figures"] else "" for k in keys]
        lines.append(_row([name, *cells, f"{r['date']}, {r['hardware']}: `{r['command']}`"]))
    return "\n".join(lines)


def bench_table(records: dict[str, dict[str, Any]]) -> str:
    """Speed beside the peer: medians, and the median of the ratios round by round."""
    lines = [
        _row(["model", "program", "zoo", "peer", "zoo / peer", "measured"]),
        _row(["---"] * 6),
    ]
    for name, r in records.items():
        if r["kind"] != "bench" or _swept(r):
            continue
        f = r["figures"]
        for key in (k for k in f if k.endswith(" ms, ours")):
            what = key.removesuffix(" ms, ours")
            other = "peer" if f"{what} ms, peer" in f else "against"
            ratio, peer = f.get(f"{what}, ours / {other}"), f.get(f"{what} ms, {other}")
            lines.append(
                _row(
                    [
                        name,
                        f"train step, batch {f['batch']}"
                        if what == "train"
                        else f"{what} {_unit(f)}{'s'[: what != 'sample 1']}",
                        f"{f[key]['median']:.4g} ms",
                        f"{peer['median']:.4g} ms" if peer else "",
                        f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else "",
                        f"{r['date']}, {r['hardware']}: `{r['command']}`",
                    ]
                )
            )
    return "\n".join(lines)


def _unit(figures: dict[str, Any]) -> str:
    return "text" if any("sequences/s" in key for key in figures) else "image"


def texts_table(records: dict[str, dict[str, Any]]) -> str:
    """Language models: bits per character of held-out text, a column for each seed."""
    chosen = {name: r for name, r in records.items() if r["kind"] == "texts"}
    lines = [_row(["run", "bits per character, seed 0", "seed 1", "steps"]), _row(["---"] * 4)]
    places: dict[str, list[str]] = {}
    order = sorted(chosen.items(), key=lambda item: (item[1]["figures"]["steps"], item[1]["figures"]["bits_per_token"]))
    for name, r in order:
        f = r["figures"]
        lines.append(_row([name, *(f"{x:.3f}" for x in f["bits_per_token"]), f"{f['steps']:,}"]))
        places.setdefault(f"{r['date']}, {r['hardware']}", []).append(f"`{r['command']}`")
    notes = [f"- {where}: {', '.join(commands)} (and seed=1)" for where, commands in places.items()]
    return "\n".join([*lines, "", *notes])


def encoders_table(records: dict[str, dict[str, Any]]) -> str:
    """Encoders trained without labels: what they predict, and what their features are good for; seeds side by side."""
    chosen = {name: r for name, r in records.items() if r["kind"] == "encoders"}
    heads = ["run", *ENCODERS, "steps", "seeds"]
    lines = [_row(heads), _row(["---"] * len(heads))]
    commands: dict[str, list[str]] = {}
    for name, r in chosen.items():
        seeds = r["figures"]["seeds"]
        cells = [" / ".join(filter(None, (_figures(f, keys) for f in seeds))) for keys in ENCODERS.values()]
        lines.append(_row([name, *cells, f"{seeds[0]['step']:,}", str(len(seeds))]))
        commands.setdefault(f"{r['date']}, {r['hardware']}", []).append(f"`{r['command']}`")
    return "\n".join([*lines, "", *(f"- {where}: {', '.join(found)}" for where, found in commands.items())])


def _figures(figures: dict[str, Any], keys: tuple[str, ...]) -> str:
    """Figures of one seed in a cell; of a probe the figure of fresh parameters in brackets."""
    found = [f"{figures[k]:.3f}" for k in keys if k in figures]
    untrained = [f" ({figures[f'{k}_random']:.3f})" for k in keys if f"{k}_random" in figures]
    return ", ".join(found) + "".join(untrained)


def solvers_table(records: dict[str, dict[str, Any]]) -> str:
    """Solvers by calls: the difference to where each converges, and the Frechet distance to the data."""
    chosen = {name: r for name, r in records.items() if r["kind"] == "solvers"}
    calls = next(iter(chosen.values()))["figures"]["nfe"]
    lines = [_row(["solver", *map(str, calls)]), _row(["---"] * (len(calls) + 1))]
    for r in chosen.values():
        for row in r["figures"]["solvers"]:
            cells = []
            for error, distance, spread in zip(row["error"], row["frechet"], row["frechet_std"]):
                near = "" if error is None else f"{100 * error:.2g} %, "
                cells.append("" if distance is None else f"{near}{distance:.3f} ({spread:.3f})")
            lines.append(_row([row["solver"], *cells]))
    notes = [f"- {r['date']}, {r['hardware']}: `{r['command']}`" for r in chosen.values()]
    return "\n".join([*lines, "", *notes])


def inverse_table(records: dict[str, dict[str, Any]]) -> str:
    """Samplers of trained flows by method of inversion: medians, and how far samples are from the sequential ones."""
    heads = ["model", "samples", "token by token", "peer", "peer / token by token", "method", "time"]
    heads += ["method / token by token", "most sweeps a block", "largest difference"]
    lines = [_row(heads), _row(["---"] * len(heads))]
    for name, r in records.items():
        f = r["figures"]
        for key in (k for k in f if r["kind"] == "bench" and re.fullmatch(r"sample \d+ sweeps, .*", k)):
            what, _, method = key.partition(" sweeps, ")
            ours, peer = f[f"{what} ms, ours"]["median"], f.get(f"{what} ms, peer")
            cells = [
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
            lines.append(_row(cells))
    commands = [f"{n}: {r['date']}, {r['hardware']}: `{r['command']}`" for n, r in records.items() if _swept(r)]
    return "\n".join([*lines, "", *(f"- {c}" for c in commands)])


def _swept(record: dict[str, Any]) -> bool:
    return any(" sweeps, " in key for key in record["figures"])


def compile_table(records: dict[str, dict[str, Any]]) -> str:
    """What programs need on chips that are not here, and how fast they can be there."""
    heads = [
        "command",
        "parameters",
        "state a chip",
        "peak / memory",
        "bound",
        "step, at least",
        "utilisation, at most",
    ]
    lines = [_row([*heads, "compiled in"]), _row(["---"] * (len(heads) + 1))]
    for r in records.values():
        if r["kind"] == "compile":
            f = r["figures"]
            cells = [
                f"`{r['command']}`",
                f"{f['parameters'] / 1e6:,.4g} M",
                f"{f['arguments GiB per device']:.3f} GiB",
                f"{f['peak GiB']:.2f} / {f['memory GiB']:.2f} GiB",
                f["bound"],
                f"{f['step s, at least']:.3g} s",
                f"{f['utilisation, at most']:.0%}",
                f"{f['compile s']:.0f} s",
            ]
            lines.append(_row(cells))
    return "\n".join(lines)


def agreement_table(records: dict[str, dict[str, Any]]) -> str:
    """Whether samples are of the class that was asked for."""
    heads = [
        "run",
        "guidance",
        "samples of the class asked for",
        "the judge on real test images",
        "samples",
        "measured",
    ]
    lines = [_row(heads), _row(["---"] * len(heads))]
    for name, r in records.items():
        if r["kind"] == "agreement":
            f = r["figures"]
            cells = [
                name.partition(" ")[0],
                f"{f['metric']['options'].get('guidance', 0):g}",
                f"{f['agreement']:.3f} (standard error {f['agreement_std_error']:.3f})",
                f"{f['judge_accuracy']:.3f}",
                f"{f['agreement_samples']}",
                f"{r['date']}, {r['hardware']}: `{r['command']}`",
            ]
            lines.append(_row(cells))
    return "\n".join(lines)


def rows_table(records: dict[str, dict[str, Any]]) -> str:
    """What was measured, in words, and where from."""
    chosen = [r for r in records.values() if r["kind"] == "rows"]
    lines = [_row(["measured", "figures", "date, hardware, command"]), _row(["---"] * 3)]
    for r in chosen:
        source = f"{r['date']}, {r['hardware']}: `{r['command']}`"
        for what, value in r["figures"]["rows"].items():
            lines.append(_row([what, value, source]))
            source = ""
    return "\n".join(lines)


def rendered(text: str) -> str:
    """README text with its tables made anew."""
    records = read()
    tables = {
        "learned": learned_table(records),
        "agreement": agreement_table(records),
        "texts": texts_table(records),
        "encoders": encoders_table(records),
        "solvers": solvers_table(records),
        "rows": rows_table(records),
        "bench": bench_table(records),
        "inverse": inverse_table(records),
        "compile": compile_table(records),
    }
    for mark, table in tables.items():
        begin, end = f"<!-- figures: {mark} -->", "<!-- end -->"
        head, _, rest = text.partition(begin)
        _, found, tail = rest.partition(end)
        assert found, f"README.md has no {begin} ... {end}"
        text = f"{head}{begin}\n{table}\n{end}{tail}"
    return text


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["add", name, source, command, *rest]:
            add(name, Path(source), command, *rest)
        case ["encoders", name, command, *sources] if sources:
            add_encoders(name, command, sources)
        case ["write"]:
            README.write_text(rendered(README.read_text()))
        case _:
            sys.exit(__doc__)
