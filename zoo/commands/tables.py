"""Tables of fields, as `zoo show` and the help of `zoo prepare` print them, and of figures."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, TypeAlias

Rows: TypeAlias = list[tuple[str, str, str, str]]  # field, value, type, comment


def comments(cls: type) -> dict[str, str]:
    """The comment behind each field of a dataclass, from its source and that of the classes whose fields it inherits."""
    found: dict[str, str] = {}
    for base in reversed([c for c in cls.__mro__ if dataclasses.is_dataclass(c)]):
        found |= _own_comments(base)
    return found


def _own_comments(cls: type) -> dict[str, str]:
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return {}
    lines, found = source.splitlines(), {}
    for node in ast.walk(ast.parse(inspect.cleandoc(source) if source.startswith(" ") else source)):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno:
            for line in reversed(lines[node.lineno - 1 : node.end_lineno]):  # a long one lies inside of brackets
                _, mark, text = line.partition("# ")
                if mark:
                    found[node.target.id] = text.strip()
                    break
    return found


def table(rows: Rows, widest: int = 28) -> list[str]:
    """Aligned lines; `widest`: letters that a type may have before it moves its comment."""
    widths = [min(max(len(r[i]) for r in rows), limit) for i, limit in enumerate((36, 34, widest))]
    return [
        "  ".join(text.ljust(w) for text, w in zip(row[:3], widths)).rstrip() + (f"  {row[3]}" if row[3] else "")
        for row in rows
    ]


def lines(figures: Mapping[str, Any]) -> str:
    """Aligned lines, one per figure."""
    width = max(map(len, figures))
    return "\n".join(f"{name:<{width}}  {_text(value)}" for name, value in figures.items())


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items()) or "none"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
