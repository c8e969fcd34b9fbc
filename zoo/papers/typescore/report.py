"""What people look at: one HTML page with every picture, what was wanted and what was read; tables as Markdown.

The page needs nothing but itself, loads nothing, and reads without JavaScript, which only sorts and filters. All that comes from
outside (texts, names, what an extractor said) is escaped by the template, and the page's policy lets no script run but its own.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from zoo import files
from zoo.papers.typescore.extractors.base import flat
from zoo.papers.typescore.metric import align
from zoo.papers.typescore.style import share

_THUMB, _QUALITY = 288, 72  # pixels of the longer side; of a JPEG
_PICTURES = 2000  # a page with more would be too heavy for a browser: further rows have none


def write(path: Path, summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]], images: Path) -> None:
    """Writes the page of a summary and its records, with small copies of the pictures in the folder `images`. OSError."""
    import jinja2

    source = Path(__file__).with_name("report.html.j2").read_text("utf-8")
    # the policy names the only style and script that may run, by their digests
    allowed = {
        kind: "sha256-" + base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        for kind, body in re.findall(r"<(style|script)>(.*?)</\1>", source, re.DOTALL)
    }
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, finalize=shown
    )
    page = environment.from_string(source).stream(
        summary=summary,
        records=enumerate(records),
        allowed=allowed,
        align=align,
        share=lambda record: share(verdict["followed"] for verdict in record["style"].values()),
        thumbnail=lambda place, name: thumbnail(images / name) if place < _PICTURES else "",
    )
    with files.whole(path) as part, open(part, "w", encoding="utf-8", errors="replace") as file:
        file.writelines(page)


def shown(value: Any) -> Any:
    """Characters that cannot be seen, or that turn the direction of what follows, as a box; nothing as a dash."""
    if value is None:
        return "–"
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "".join("▯" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co") and c not in "\n\t" else c for c in value)


def thumbnail(path: Path) -> str:
    """A small JPEG of a picture as a data URI; "" where it cannot be opened."""
    try:
        with Image.open(path) as picture:
            seen = flat(picture)
            seen.thumbnail((_THUMB, _THUMB))
            data = io.BytesIO()
            seen.save(data, "jpeg", quality=_QUALITY)
    except Exception:  # its record says what is wrong with it
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with the rows' keys as its head, and the empty line behind it; "" without rows."""

    def cell(value: Any) -> str:
        text = f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value)
        return text.replace("|", "\\|").replace("\n", " ")

    cells = [[*rows[0]], ["---"] * len(rows[0]), *(row.values() for row in rows)] if rows else []
    return "".join(f"| {' | '.join(map(cell, row))} |\n" for row in cells) + "\n" * bool(rows)
