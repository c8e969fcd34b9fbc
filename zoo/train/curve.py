"""The curve of a run: training and held-out figures against step, out of the records of metrics.jsonl."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

Record = dict[str, Any]

_HELD = ("#d1571b", "#2f8f4e", "#7a4fb0", "#8c6d1f")  # lines of held-out bits


def part_of(record: Record) -> str:
    """What tells a metric's record from those of others of its kind."""
    return " ".join(str(record[key]) for key in ("split", "eval") if key in record)


def _series(records: list[Record], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of `key`, in order of step."""
    points = sorted((r["step"], r[key]) for r in records if isinstance(r.get(key), (int, float)))
    x, y = np.array(points, np.float64).reshape(-1, 2).T
    return x[np.isfinite(y)], y[np.isfinite(y)]


def draw(records: list[Record], title: str, per: str) -> bytes | None:
    """A PNG of training and held-out figures against step, bits being `per` what; None when there is no point to draw.

    Held-out figures of several splits are a line each.
    """
    train = [r for r in records if "loss" in r]
    key = "bits" if any("bits" in r for r in train) else "loss"
    held = [r for r in records if "loss" not in r]
    held_key = "bpd" if any("bpd" in r for r in held) else "bits_per_token"
    parts = sorted({part_of(r) for r in held if held_key in r})
    lines_of = {part: _series([r for r in held if part_of(r) == part], held_key) for part in parts}
    held_out = {part: points for part, points in lines_of.items() if len(points[0])}
    x, y = _series(train, key)
    if not len(x) and not held_out:
        return None
    # the figure is built without pyplot: no window system is asked for and no global state is left behind
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    held_axes = axes.twinx() if key == "loss" and len(x) and held_out else axes
    lines: list[Any] = []
    if len(x):
        window = max(1, len(x) // 50)
        name = "training bits" if key == "bits" else "training loss"
        if window > 1:
            axes.plot(x, y, color="#9ec5e8", lw=0.8)
            middle = x[(window - 1) // 2 :][: len(x) - window + 1]
            smooth = np.convolve(y, np.full(window, 1 / window), "valid")
            lines += axes.plot(middle, smooth, color="#1f6fb4", lw=1.8, label=f"{name}, mean of {window} records")
        else:
            lines += axes.plot(x, y, color="#1f6fb4", lw=1.8, marker=".", label=name)
    for i, (part, (held_x, held_y)) in enumerate(held_out.items()):
        name = f"held-out bits{f', {part}' if part and len(held_out) > 1 else ''} (last: {held_y[-1]:.3f})"
        colour = _HELD[i % len(_HELD)]
        lines += held_axes.plot(held_x, held_y, color=colour, marker="o", ms=5, lw=1, ls="--", label=name)
    if held_out:
        held_axes.set_ylabel(f"bits per {per}")
    if len(x):
        axes.set_ylabel(f"bits per {per}" if key == "bits" else "loss")

    late = 0.05 * max(steps.max(initial=0) for steps in (x, *(points[0] for points in held_out.values())))
    tail, held_tails = y[x >= late], [held_y[held_x >= late] for held_x, held_y in held_out.values()]
    if held_axes is axes:
        _zoom(axes, tail, *held_tails)
    else:
        _zoom(axes, tail)
        _zoom(held_axes, *held_tails)
    axes.set_xlim(left=0)
    axes.set_xlabel("step")
    axes.set_title(title)
    axes.grid(color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.legend(handles=lines, loc="upper right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _zoom(axes: Any, *curves: np.ndarray) -> None:
    """Fits the vertical axis to late values: a few wild ones, at the start or in between, would flatten all others."""
    ends = [(v.min(), np.quantile(v, 0.995) if len(v) > 50 else v.max()) for v in curves if len(v)]
    if ends:
        low, high = min(a for a, _ in ends), max(b for _, b in ends)
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 0.1
        axes.set_ylim(low - margin, high + margin)
