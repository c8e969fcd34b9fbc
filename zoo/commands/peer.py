"""The peer of `zoo bench`: somebody's twin of a task in a Python file, opened and found to compute the same."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from zoo import weights
from zoo.errors import UserError
from zoo.task import speed


@runtime_checkable
class Inverse(Protocol):
    """A flow of images, whose inverse a peer may have as well."""

    tokens: int
    dims: int

    def inverse(self, params: Any, z: jax.Array, label: Any = None) -> jax.Array:
        """Images [B, S, S, C] of z [B, T, D]."""


def load_peer(path: str, task: Any) -> Any:
    """`build(task)` of a Python file, run; UserError when the file, the function or a package it needs is missing."""
    if not Path(path).is_file():
        raise UserError(f"--peer {path}: no such file; give a Python file with a function build(task)")
    spec = importlib.util.spec_from_file_location("zoo_bench_peer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        extra = "; install it with the `torch` extra: pip install -e '.[torch]'" if error.name == "torch" else ""
        raise UserError(f"--peer {path} needs the package {error.name!r}, which is not installed{extra}") from None
    if not hasattr(module, "build"):
        raise UserError(f"--peer {path} defines no function build(task)")
    return module.build(task)


def parity(task: Any, params: Any, twin: Any, host: dict[str, np.ndarray]) -> dict[str, float]:
    """Largest differences between ours and a peer with our weights: the loss of one batch without noise, and, where both
    sides have an `inverse`, the image of one z. UserError when one is too large: then the times compare nothing.
    """
    # Fresh output kernels are zero, which would hide any difference: move every weight a little first.
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    moved = jax.tree.map(
        lambda x: x + 0.16 / max(*x.shape, 1) ** 0.5 * jax.random.normal(next(keys), x.shape, x.dtype), params
    )
    moved = {**moved, **{k: params[k] for k in task.about.held}}
    twin.load(weights.to_official(task, jax.device_get(moved)))
    half = speed(task).get("dtype", "float32") != "float32"
    still: dict[str, Any] = {"noise": 0.0, "noise_type": "gaussian", "drop": 0.0}
    clean = dataclasses.replace(task, **{f.name: still[f.name] for f in dataclasses.fields(task) if f.name in still})
    found = {}
    with jax.default_matmul_precision("default" if half else "float32"):
        ours = float(jax.jit(lambda p, b: clean.loss(p, b, jax.random.key(0))[0])(moved, host))
        found["loss"] = abs(ours - float(twin.loss(host)))
        if isinstance(task, Inverse) and hasattr(twin, "inverse"):
            label = host["label"][:2] if "label" in host else None
            z = jax.random.normal(jax.random.key(2), (2, task.tokens, task.dims))
            inverse = jax.jit(lambda p, z: task.inverse(p, z, label))
            difference = np.asarray(inverse(moved, z)) - twin.inverse(np.array(z), label)
            found["inverse"] = float(np.abs(difference).max())
    limit = 5e-2 if half else 1e-3
    for name, difference in found.items():
        if not difference <= limit:
            raise UserError(
                f"the peer's {name} differs from ours by {difference:.3g} on the same weights and inputs, more than "
                f"{limit:g}: it is no twin, and comparing times would mean nothing; mend the peer first"
            )
    return found
