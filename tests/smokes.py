"""The shipped configs and their tiny runs: which are trained to try the contract, and which only traced."""

import dataclasses
import functools
from typing import Any

from zoo import config, weights
from zoo.run import Run

RUNS = [name for name, path in config.shipped().items() if isinstance(config.load(str(path)), Run)]


@functools.cache
def smoke(name: str) -> Run:
    return dataclasses.replace(config.load(f"{name}:smoke"), workdir=None)


def choices(value: Any, place: str = "") -> set[str]:
    """What of a task decides its program, choice by choice: not its rates, dtypes, sizes, frozen autoencoder or having classes."""
    if isinstance(value, dict):
        return {
            c
            for k, v in value.items()
            if k not in ("dtype", "levels", "classes")
            for c in choices(bool(v) if k == "vae" else v, f"{place}.{k}")
        }
    if isinstance(value, list):
        return {c for v in value for c in choices(v, place)}
    return {f"{place}={bool(value) if isinstance(value, int | float) else value}"}


def covering(names: list[str]) -> list[str]:
    """A few of the smoke configs that make every choice between them, the one with the most new ones first."""
    left = {name: choices(config.dump(smoke(name).task), type(smoke(name).task).__name__) for name in names}
    missing, taken = set().union(*left.values()), []
    while missing:
        taken.append(max(sorted(left), key=lambda name: len(left[name] & missing)))
        missing -= left[taken[-1]]
    return sorted(taken)


@functools.cache
def trained_kinds() -> set[type]:
    """Tasks that have something to train, by one config of each."""
    kinds = {type(smoke(name).task): smoke(name).task for name in RUNS}
    return {kind for kind, task in kinds.items() if weights.abstract(task).keys() - {*task.about.held}}


def trains(name: str) -> bool:
    return type(smoke(name).task) in trained_kinds()


CONFIGS = [name for name in RUNS if trains(name)]
SMOKES = covering(CONFIGS)
# One of each task, that of the fewest choices: these are trained, the others only traced.
KINDS = {
    type(smoke(name).task): name
    for name in sorted(SMOKES, key=lambda name: -len(choices(config.dump(smoke(name).task))))
}
