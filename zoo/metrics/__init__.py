"""Metrics: frozen dataclasses on the base `zoo.task.Metric`; each names the abilities it needs.

Those of one paper's own abilities lie beside it, in `zoo/papers/PAPER/metrics.py`.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any


def named() -> dict[str, type[Any]]:
    """Every metric class of zoo by its `name`, as `zoo eval` takes it."""
    from zoo.task import Metric

    papers = Path(__path__[0]).parent / "papers"
    names = [f"{__name__}.{info.name}" for info in pkgutil.iter_modules(__path__)]
    names += [f"zoo.papers.{file.parent.name}.metrics" for file in sorted(papers.glob("*/metrics.py"))]
    found: dict[str, type[Any]] = {}
    for module in map(importlib.import_module, names):
        for value in vars(module).values():
            own = isinstance(value, type) and issubclass(value, Metric) and value.__module__ == module.__name__
            if own and not value.__name__.startswith("_"):
                found[value.name] = value
    return found
