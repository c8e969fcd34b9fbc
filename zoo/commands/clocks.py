"""Calls timed in turn, and what is told of them; what `zoo bench` times are such calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

ROUND = 0.5  # seconds that one timed round of one side takes at least
_STEADY = 1.5  # slowest round over fastest from which a measurement counts for nothing
_OTHERS = ("peer", "against")  # sides that are not ours

Figures = dict[str, Any]


def unit_of(task: Any) -> str:
    """What the examples of a task are called in rates."""
    return str(task.about.unit)


def _spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def seconds_of(call: Callable[[int], None], count: int) -> float:
    """Seconds per repetition of a call that repeats by itself."""
    begin = time.perf_counter()
    call(count)
    return (time.perf_counter() - begin) / count


def waited(call: Callable[[int], Any]) -> Callable[[int], None]:
    """A call with 0, 1, ... that repeats by itself, each waited for."""

    def repeat(count: int) -> None:
        for k in range(count):
            jax.block_until_ready(call(k))

    return repeat


def in_turn(sides: dict[str, Callable[[int], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call, round by round; the sides take turns so that a drifting machine hits both."""
    counts = {}
    for name, call in sides.items():
        call(1)  # compiles, or warms up
        counts[name] = max(1, round(ROUND / max(seconds_of(call, 1), 1e-6)))
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            found[name].append(seconds_of(call, counts[name]))
    return found


def compare(
    figures: Figures,
    what: str,
    found: dict[str, list[float]],
    items: int,
    unit: str = "examples",
    first: str = "ours",
) -> None:
    """Times, rates and ratios of sides, from seconds round by round, into `figures`.

    Args:
        what: is timed.
        items: that a call makes, called `unit`.
        first: the side with which the others are compared, besides a peer and another config.
    """
    for name, seconds in found.items():
        figures[f"{what} ms, {name}"] = _spread([1e3 * s for s in seconds])
        figures[f"{what} {unit}/s, {name}"] = items / statistics.median(seconds)
        if max(seconds) > _STEADY * min(seconds):
            # A busy machine slows the two sides unequally (threads that spin at a barrier suffer most).
            figures[f"{what} unsteady, {name}"] = (
                f"rounds differ by a factor of {max(seconds) / min(seconds):.1f}; "
                "the machine is busy: repeat on an idle one, do not quote"
            )
    for name, seconds in found.items():
        for other in (first, *_OTHERS):
            if other in found and name not in (other, *_OTHERS):
                figures[f"{what}, {name} / {other}"] = _spread([a / b for a, b in zip(seconds, found[other])])


def program_size(program: Any, name: str) -> Figures:
    """What a compiled program takes in and works with, on each device; nothing where the compiler does not say."""
    memory = program.memory_analysis()
    if memory is None:
        return {}
    sizes = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}
    return {name: {k: size / 2**20 for k, size in sizes.items()}}
