"""`zoo eval CONFIG`: what a config measures without a model of the zoo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zoo import config
from zoo.errors import UserError, suggest
from zoo.task import Measures, Metric


def run(name: str, fields: Sequence[str]) -> dict[str, Any]:
    """The figures of a config whose value measures by itself. UserError where `name` is no such config."""
    try:
        config.locate(name)
    except UserError:
        if not name.partition(":")[0].endswith(".py"):
            from zoo import metrics

            raise UserError(
                f"what of {name} shall be measured? Write zoo eval {name} METRIC; {suggest('', metrics.named())}; a config that "
                "measures by itself needs none"
            ) from None
        raise
    value = config.load(name)
    if isinstance(value, Metric):
        raise UserError(f"{name} holds the metric {value.name}, which measures models; write zoo eval MODEL {name}")
    if not isinstance(value, Measures):
        raise UserError(
            f"{name} holds a {type(value).__name__}, which measures nothing by itself; write zoo eval MODEL METRIC, or name "
            "a config of what `zoo list` marks with zoo eval CONFIG"
        )
    made: Measures = config.override(value, fields)
    return made.run()
