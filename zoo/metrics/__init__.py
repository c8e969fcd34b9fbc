"""Metrics: frozen dataclasses, called as `(task, params, data, rng) -> dict`; each names the abilities it needs.

The dict holds figures; under the key `pictures` it may hold PIL images by name. These are saved as `samples/NAME-STEP.png` of
the run folder and shown where sheets of samples are; no record has them. One with `captions` is also given `encode`, the
tokeniser of the model's captions; one with `uses_data = False` measures models whose data are not known.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any


def named() -> dict[str, type[Any]]:
    """Every metric class of this package by its `name`, as `zoo eval` takes it."""
    found: dict[str, type[Any]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for value in vars(module).values():
            name = getattr(value, "name", None)
            if isinstance(value, type) and isinstance(name, str) and value.__module__ == module.__name__:
                found[name] = value
    return found
