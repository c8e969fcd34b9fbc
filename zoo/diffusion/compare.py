"""Solvers side by side: a table and a chart of one figure by calls of the denoiser, the less the better."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zoo import files
from zoo.errors import UserError

Rows = Mapping[str, Sequence[float | None]]  # by solver, one figure for each number of calls; None: it cannot


def folder(out: str, result: str, what: str) -> Path:
    """The folder `out`, made where it is not there; UserError where it holds other things than results, or cannot be made."""
    path = Path(out)
    if path.exists() and (not path.is_dir() or (not (path / result).exists() and any(path.iterdir()))):
        raise UserError(f"out={out} is no folder of {what}; name a new or an empty one with out=FOLDER")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={out} cannot be made ({error}); name another folder with out=FOLDER") from None
    return path


def write(out: Path, name: str, figures: dict[str, Any], text: str, **pictures: Image.Image) -> dict[str, Any]:
    """NAME.json, NAME.md and a .png of each picture in the folder `out`; returns the figures, and where they are."""
    files.write(out / f"{name}.json", json.dumps(figures, indent=1) + "\n")
    files.write(out / f"{name}.md", text)
    for key, picture in pictures.items():
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        files.write(out / f"{key}.png", buffer.getvalue())
    return {**figures, "out": str(out)}


def markdown(head: Sequence[Any], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]]) + "\n"


def table(calls: Sequence[int], rows: Rows, notes: Mapping[str, Sequence[str]] | None = None) -> str:
    """As Markdown: each figure with its note in brackets, the least of each column in bold."""
    least = [min((v for v in column if v is not None), default=None) for column in zip(*rows.values())]
    lines = []
    for name, row in rows.items():
        cells = []
        for value, note, best in zip(row, notes[name] if notes else [""] * len(row), least):
            bold = "**" if value == best else ""
            cells.append("" if value is None else f"{bold}{value:.3g}{bold}{note and f' ({note})'}")
        lines.append([name, *cells])
    return markdown(["solver", *calls], lines)


def chart(calls: Sequence[int], rows: Rows, figure: str) -> Image.Image:
    """One line for each solver, on a logarithmic axis."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(7, 4.5), dpi=110, layout="constrained")
    axes = page.subplots()
    for name, row in rows.items():
        points = [(n, value) for n, value in zip(calls, row) if value is not None]
        if points:
            axes.plot(*zip(*points), marker="o", ms=3, lw=2 if name.startswith("tada") else 1, label=name)
    axes.set(yscale="log", xlabel="calls of the denoiser", ylabel=figure)
    axes.grid(color="#e4e4e4")
    axes.legend(fontsize=6, ncols=2)
    return image_of(page)


def sheet(calls: Sequence[int], samples: Mapping[tuple[str, int], np.ndarray]) -> Image.Image:
    """Samples [n, H, W, C] in [-1, 1] by solver and calls, those of one noise below each other."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for name, _ in samples))
    n, high, wide, _ = next(iter(samples.values())).shape
    size = (1.5 + 2.2 * len(calls), 0.4 + 2.4 * high / (n * wide) * len(names))
    page = Figure(figsize=size, dpi=110, layout="constrained")
    for i, axes in enumerate(page.subplots(len(names), len(calls), squeeze=False).ravel()):
        name, count = names[i // len(calls)], calls[i % len(calls)]
        axes.set(xticks=[], yticks=[])
        axes.set_title(str(count) if i < len(calls) else "", fontsize=8)
        axes.set_ylabel("" if i % len(calls) else name, fontsize=7, rotation=0, ha="right", va="center")
        if (name, count) in samples:
            strip = np.clip((np.concatenate(list(samples[name, count]), 1) + 1) / 2, 0, 1)
            axes.imshow(strip if strip.shape[-1] == 3 else strip.mean(-1), cmap="gray", vmin=0, vmax=1)
        else:
            axes.axis("off")
    return image_of(page)


def image_of(page: Any) -> Image.Image:
    """What a page of matplotlib shows."""
    file = io.BytesIO()
    page.savefig(file, format="png")
    return Image.open(file)
