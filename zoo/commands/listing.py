"""`zoo list`: what there is, read from sources. Importing every paper to know its name would take seconds."""

from __future__ import annotations

import argparse
import ast
import functools
import re
from pathlib import Path
from typing import Any

from zoo import config, paths
from zoo.task import Measures, abilities

_ROOT = Path(__file__).parents[2]  # of the package


def papers() -> list[dict[str, Any]]:
    """Each paper file: module, title, arXiv number, and its tasks with their abilities, or what measures without a model."""
    found = []
    for path in sorted((_ROOT / "zoo" / "papers").iterdir()):
        if path.name.startswith("_") or not (path.suffix == ".py" or (path / "__init__.py").exists()):
            continue
        module = f"zoo.papers.{path.stem}"
        title = (ast.get_docstring(_tree(module)) or "").partition("\n")[0].rstrip(".")
        number = re.search(r"arXiv:(\d{4}\.\d{4,5})", title)
        own = _classes(module)
        tasks = {name: abilities(cls) for name, cls in own.items() if hasattr(cls, "spec") and hasattr(cls, "loss")}
        tasks |= {name: ["zoo eval CONFIG"] for name, cls in own.items() if issubclass(cls, Measures)}
        found.append({"module": path.stem, "title": title, "arxiv": number.group(1) if number else "", "tasks": tasks})
    return found


@functools.cache
def _tree(module: str) -> ast.Module:
    path = _ROOT.joinpath(*module.split("."))
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())


def _classes(module: str) -> dict[str, type]:
    """The classes of a paper by the names that its module gives them: those it defines or imports from its own package."""
    names: list[str] = []
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{module}."):
            names += [alias.asname or alias.name for alias in node.names]
    found = {name: _stand_in(module, name) for name in names}
    return {name: cls for name, cls in found.items() if cls is not None}


@functools.cache
def _stand_in(module: str, name: str) -> type | None:
    """A class with the names that the source of this one has in it, and its bases of zoo; None where it is no such class."""
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            bases = [_stand_in(module, base.id) for base in node.bases if isinstance(base, ast.Name)]
            return type(name, tuple(base for base in bases if base is not None), _members(node))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("zoo."):
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return _stand_in(node.module or "", alias.name)
    return None


def _members(node: ast.ClassDef) -> dict[str, Any]:
    """What stands in a class: constants as they are, all else as True."""
    found: dict[str, Any] = {}
    for inner in node.body:
        if isinstance(inner, (ast.FunctionDef, ast.ClassDef)):
            found[inner.name] = True
        elif isinstance(inner, (ast.Assign, ast.AnnAssign)) and inner.value is not None:
            value = inner.value.value if isinstance(inner.value, ast.Constant) else True
            targets = inner.targets if isinstance(inner, ast.Assign) else [inner.target]
            found |= {target.id: value for target in targets if isinstance(target, ast.Name)}
    return found


def listing() -> str:
    """Papers with arXiv number and abilities, shipped configs and shipped weights."""
    lines = ["Papers"]
    for paper in papers():
        lines.append(f"  {paper['title']}")
        lines += [f"    {name}: {', '.join(can)}" for name, can in paper["tasks"].items()]
    lines += [
        "",
        "Configs (zoo train NAME, of a metric zoo eval NAME; NAME:smoke for a tiny one; `zoo show NAME` for all of it)",
    ]
    known = config.shipped()
    width = max(map(len, known), default=0)
    lines += [f"  {name:<{width}}  {config.describe(name)}" for name in known]
    lines += ["", "Weights (zoo sample NAME)"]
    cards = {
        name: (folder / "README.md").read_text().partition("\n")[0][2:] for name, folder in paths.shipped().items()
    }
    width = max(map(len, cards), default=0)
    lines += [f"  {name:<{width}}  {title}" for name, title in cards.items()]
    return "\n".join(lines)


def add(parser: argparse.ArgumentParser) -> None:
    """It has no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print the list."""
    print(listing())
    return 0
