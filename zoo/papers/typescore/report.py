"""What people look at: a plot, and one HTML page with every picture, what was wanted and what was read.

The page needs nothing but itself, loads nothing, and reads without JavaScript, which only sorts and filters. All that comes from
outside (texts, names, what an extractor said) is escaped, and its policy lets no script run but its own.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from zoo import files
from zoo.papers.typescore.extractors.base import flat
from zoo.papers.typescore.files import as_png
from zoo.papers.typescore.render import wrap
from zoo.papers.typescore.score import align

_THUMB, _QUALITY = 288, 72  # pixels of the longer side; of a JPEG
_PICTURES = 2000  # a page with more would be too heavy for a browser: further rows have none
_COLOURS = {"none": "#2f8f4e", "spelling": "#1f6fb4", "missing": "#8c6d1f", "surplus": "#7a4fb0", "failed": "#c0392b"}

_STYLE = """
:root { color-scheme: light dark; --soft: #8884; --good: #2f8f4e; --bad: #c0392b; --add: #7a4fb0 }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 76rem; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid var(--soft) }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.note { border-left: .25rem solid var(--add); padding: .2rem .8rem }
.tables { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem }
.row { display: grid; grid-template-columns: 18rem 1fr; gap: 1rem; padding: 1rem 0; border-top: 1px solid var(--soft) }
.row img { max-width: 100%; height: auto; background: var(--soft) }
.row h3 { font-size: 1rem; margin: 0 0 .3rem } .row p { margin: .3rem 0; overflow-wrap: anywhere }
.text { font-family: ui-monospace, monospace; white-space: pre-wrap }
.text b { display: inline-block; min-width: 4.5rem; font: inherit; opacity: .7 }
del, ins, mark { text-decoration: none; border-radius: .15rem; padding: 0 .08rem; color: inherit }
del { background: #c0392b44; border-bottom: 2px solid var(--bad) } ins { background: #7a4fb044; border-bottom: 2px dotted var(--add) }
mark { background: #f2b01e55; border-bottom: 2px solid #d08700 }
.tag { border: 1px solid currentColor; border-radius: 1rem; padding: 0 .55rem; font-size: .85rem; margin-left: .4rem }
.small { font-size: .87rem; opacity: .8 } .yes { color: var(--good) } .no { color: var(--bad) }
.controls { position: sticky; top: 0; background: Canvas; padding: .5rem 0; z-index: 1 } .controls label { margin-right: 1.2rem }
[hidden] { display: none !important }
@media (max-width: 46rem) { .row { grid-template-columns: 1fr } }
@media print { .controls { display: none } .row { break-inside: avoid } }
"""

_SCRIPT = """
'use strict';
(() => {
  const list = document.getElementById('rows'), rows = [...list.children];
  const sort = document.getElementById('sort'), kind = document.getElementById('kind'), shown = document.getElementById('shown');
  const find = document.getElementById('find');
  const number = (row, key) => row.dataset[key] === '' ? -1 : Number(row.dataset[key]);
  const update = () => {
    const [key, down] = sort.value.split(' '), words = find.value.toLowerCase();
    const order = [...rows].sort((a, b) => (down ? -1 : 1) * (number(a, key) - number(b, key)) || a.dataset.place - b.dataset.place);
    let n = 0;
    for (const row of order) {
      row.hidden = (kind.value !== 'all' && row.dataset.kind !== kind.value) || !row.textContent.toLowerCase().includes(words);
      n += !row.hidden;
      list.append(row);
    }
    shown.textContent = n + ' of ' + rows.length + ' pictures';
  };
  for (const one of [sort, kind]) one.addEventListener('change', update);
  find.addEventListener('input', update);
  document.querySelector('.controls').hidden = false;
  update();
})();
"""


def write(path: Path, summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]], images: Path) -> None:
    """Writes the page of a summary and its records, with small copies of the pictures in the folder `images`. OSError."""
    with files.whole(path) as part, open(part, "w", encoding="utf-8", errors="replace") as file:
        file.writelines(page(summary, records, images))


def page(summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]], images: Path) -> Iterator[str]:
    """The page in pieces."""
    allowed = f"default-src 'none'; img-src data:; style-src '{_hash(_STYLE)}'; script-src '{_hash(_SCRIPT)}'"
    extractor = summary["extractor"]
    yield (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{allowed}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>TypeScore {_number(summary['score'])}</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>TypeScore {_number(summary['score'])} {_interval(summary)}</h1>\n"
        f'<p class="note">Scores are {_text(summary["note"])}.</p>\n'
        f"<p>{summary['instructions']} of {summary['of']} instructions, {summary['read']} pictures read by "
        f"{_text(extractor['name'])} {_text(extractor['version'])}"
        + (f", <strong>{summary['failed']} not read and in no mean</strong>" if summary["failed"] else "")
        + (
            f", {summary['missing']['count']} instructions without a picture"
            if summary.get("missing", {}).get("count")
            else ""
        )
        + f". Spec {_text(summary['spec_version'])}, {_setting(summary)}.</p>\n"
    )
    yield '<div class="tables">' + _tables(summary) + "</div>\n<h2>Pictures</h2>\n"
    kinds = [*summary["error_types"], "failed"]
    options = "".join(f'<option value="{_text(kind)}">{_text(kind)}</option>' for kind in kinds)
    yield (
        '<div class="controls" hidden><label>Sort <select id="sort"><option value="place">as listed</option>'
        '<option value="score">score, lowest first</option><option value="score down">score, highest first</option>'
        '<option value="words">shortest text first</option><option value="words down">longest text first</option>'
        '<option value="style">style, lowest first</option></select></label>'
        f'<label>Errors <select id="kind"><option value="all">all</option>{options}</select></label>'
        '<label>Find <input id="find" type="search"></label><span id="shown" role="status"></span></div>\n'
        '<p class="small">Wanted against read, as they are compared: <del>lacking</del> <mark>wrong</mark> '
        '<ins>surplus</ins>.</p>\n<div id="rows">\n'
    )
    for place, record in enumerate(records):
        yield _row(place, record, images)
    yield f"</div>\n<script>{_SCRIPT}</script></body></html>\n"


def _row(place: int, record: Mapping[str, Any], images: Path) -> str:
    kind = "failed" if record["error"] is not None else record["error_type"]
    name = record["image"]
    known = [v["followed"] for v in record["style"].values() if v["followed"] is not None]
    style = f"{100 * sum(known) / len(known):.1f}" if known else ""
    score = "" if record["score"] is None else f"{record['score']:.4f}"
    source = thumbnail(images / name) if place < _PICTURES else ""
    label = f"{record['image']}: wanted {record['wanted']}"
    out = (
        f'<article class="row" data-place="{place}" data-score="{score}" data-kind="{_text(kind)}" data-style="{style}" '
        f'data-words="{len(record["wanted"].split())}"><div>'
        + (f'<img src="{source}" alt="{_text(label)}">' if source else '<span class="small">no picture</span>')
        + f"</div><div><h3>{_text(name)} {_number(record['score'])}"
        + f'<span class="tag">{_text(kind)}</span></h3>'
    )
    if record["error"] is not None:
        return (
            out + f'<p class="text"><b>wanted</b><bdi>{_text(record["wanted"])}</bdi></p>'
            f'<p class="no">Not read: {_text(record["error"])}</p></div></article>\n'
        )
    wanted, read = aligned(*record["compared"])
    parts = record["parts"]
    out += f'<p class="text"><b>wanted</b><bdi>{wanted}</bdi></p><p class="text"><b>read</b><bdi>{read}</bdi></p>'
    out += (
        f'<p class="small">NED {parts["ned"]:.3f}, NLCS {parts["nlcs"]:.3f}, SW {parts["sw"]:.3f}; '
        f"{_text(', '.join(x for x in (record['length_bin'], record['domain'], record['content']) if x))}; "
        f"{record['seconds']:.2f} s</p>"
    )
    if record["style"]:
        marks = {True: ("yes", "✓"), False: ("no", "✗"), None: ("small", "–")}
        out += '<p class="small">Style: ' + "; ".join(
            f'<span class="{marks[v["followed"]][0]}">{marks[v["followed"]][1]} {_text(attribute)} {_text(v["wanted"])}</span> '
            f"({_text(v['found'])})"
            for attribute, v in record["style"].items()
        ) + "</p>"  # fmt: skip
    return out + "</div></article>\n"


def aligned(reference: str, read: str) -> tuple[str, str]:
    """Both texts as HTML, with what is lacking, wrong and surplus marked."""
    wanted, found = [], []
    for op, left, right in align(reference, read):
        if op == "equal":
            wanted.append(_text(left))
            found.append(_text(right))
        elif op == "delete":
            wanted.append(f"<del>{_text(left)}</del>")
        elif op == "insert":
            found.append(f"<ins>{_text(right)}</ins>")
        else:
            wanted.append(f"<mark>{_text(left)}</mark>")
            found.append(f"<mark>{_text(right)}</mark>")
    return "".join(wanted), "".join(found)


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


def sheet(records: Sequence[Mapping[str, Any]], images: Sequence[Image.Image]) -> Image.Image:
    """The first 16 images, each with its score, what was wanted and what was read below it."""
    font: Any = ImageFont.load_default(13)
    side, line, lines = 224, 16, 6
    some = list(zip(records, images))[:16]
    columns = min(len(some), 4) or 1
    high = side + line * (lines + 1)
    page = Image.new("RGB", ((side + 12) * columns + 12, high * (-(-len(some) // columns)) + 12), "white")
    draw = ImageDraw.Draw(page)
    for i, (record, image) in enumerate(some):
        x, y = 12 + (side + 12) * (i % columns), 12 + high * (i // columns)
        small = image.convert("RGB")
        scale = side / max(small.size)
        small = small.resize([max(round(n * scale), 1) for n in small.size], Image.Resampling.LANCZOS)
        page.paste(small, (x, y))
        read = f"not read: {record['error']}" if record["error"] is not None else f"read: {record['read']}"
        told = [f"{_number(record['score'])}, wanted: {record['wanted']}", read]
        for half, text in enumerate(told):
            rows = wrap("".join(c if c.isprintable() else " " for c in text), font, side)
            for row, part in enumerate(rows[: lines // 2]):
                place = (x, y + side + line * (half * lines // 2 + row))
                draw.text(place, part, "#2d3036" if half else "#606670", font)
    return page


def plot(summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG: scores of the pictures, score by length of the text, and kinds of errors."""
    from matplotlib.figure import Figure  # without pyplot: no window system is asked for, no state is left behind
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 3.8), dpi=110, layout="constrained")
    scores, lengths, kinds = figure.subplots(1, 3)
    values = [record["score"] for record in records if record["score"] is not None]
    scores.hist(values, bins=[5 * k for k in range(21)], color="#1f6fb4")
    scores.set(xlabel="TypeScore of a picture", ylabel="pictures", xlim=(0, 100))
    if summary["score"] is not None:
        scores.axvline(summary["score"], color="#d1571b", lw=1.5)
        scores.set_title(f"mean {summary['score']:.1f} ({summary['low']:.1f} to {summary['high']:.1f})")
    by = summary["by"]["length_bin"]
    middle = [one["score"] for one in by.values()]
    apart = [
        [max(one["score"] - one["low"], 0) for one in by.values()],
        [max(one["high"] - one["score"], 0) for one in by.values()],
    ]
    if by:
        lengths.errorbar(range(len(by)), middle, yerr=apart, fmt="o-", color="#1f6fb4", capsize=4)
    lengths.set_xticks(range(len(by)), [name.replace("$", r"\$") for name in by])  # or matplotlib sets it as a formula
    lengths.set(xlabel="words wanted", ylabel="TypeScore", ylim=(0, 105))
    counts = {**summary["error_types"], "failed": summary["failed"]}
    kinds.bar(list(counts), list(counts.values()), color=[_COLOURS[kind] for kind in counts])
    kinds.set(ylabel="pictures", title="main error")
    for axes in (scores, kinds):
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (scores, lengths, kinds):
        axes.grid(color="#e4e4e4")
        axes.set_axisbelow(True)
    return as_png(figure)


# --- pieces -----------------------------------------------------------------------------------------


def _tables(summary: Mapping[str, Any]) -> str:
    parts = "".join(
        f'<tr><td>{name}</td><td class="n">{"–" if summary["parts"][key] is None else format(summary["parts"][key], ".3f")}</td></tr>'
        for name, key in (("NED", "ned"), ("NLCS", "nlcs"), ("SW", "sw"))
    )
    exact = summary["exact"]
    parts += f'<tr><td>read exactly</td><td class="n">{"–" if exact is None else format(exact, ".1%")}</td></tr>'
    out = f'<table><tr><th>part</th><th class="n">mean</th></tr>{parts}</table>'
    for name, groups in summary["by"].items():
        rows = "".join(
            f'<tr><td>{_text(group)}</td><td class="n">{one["instructions"]}</td><td class="n">{_number(one["score"])}</td>'
            f'<td class="small">{_interval(one)}</td></tr>'
            for group, one in groups.items()
        )
        if rows:
            head = f'<tr><th>{_text(name.replace("_bin", ""))}</th><th class="n">n</th><th class="n">score</th><th></th></tr>'
            out += f"<table>{head}{rows}</table>"
    style = summary["style"]
    if style and style["by"]:
        rows = "".join(
            f'<tr><td>{_text(attribute)}</td><td class="n">{one["evaluated"]}</td><td class="n">{_number(one["followed"])}</td></tr>'
            for attribute, one in style["by"].items()
        )
        rows += f'<tr><td>all</td><td></td><td class="n">{_number(style["score"])}</td></tr>'
        out += f'<table><tr><th>style</th><th class="n">evaluated</th><th class="n">followed %</th></tr>{rows}</table>'
    rows = "".join(f'<tr><td>{_text(k)}</td><td class="n">{n}</td></tr>' for k, n in summary["error_types"].items())
    return out + f'<table><tr><th>main error</th><th class="n">pictures</th></tr>{rows}</table>'


def _setting(summary: Mapping[str, Any]) -> str:
    rules = summary["normalisation"]
    case = "case counts" if rules["case_sensitive"] else "case does not count"
    punctuation = "punctuation does not" if rules["ignore_punct"] else "punctuation counts"
    order = "quoted texts in any order" if summary["piece_mode"] == "set" else "quoted texts in their order"
    weights = ", ".join(f"{name} {weight:g}" for name, weight in zip(("NED", "NLCS", "SW"), summary["weights"]))
    return f"{case}, {punctuation}, {order}, {_text(summary['kind'])}, weights {weights}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _interval(one: Mapping[str, Any]) -> str:
    return "" if one["low"] is None else f'<span class="small">({one["low"]:.1f} to {one["high"]:.1f})</span>'


def _text(value: Any) -> str:
    """Escaped; characters that cannot be seen, or that turn the direction of what follows, as a box."""
    shown = "".join(
        "▯" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co") and c not in "\n\t" else c for c in str(value)
    )
    return html.escape(shown, quote=True)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
