"""DART's own metric: how well each block tells the image, and whether it uses the copies before it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from zoo import hosts
from zoo.data.pipeline import epoch
from zoo.fields import Count, Whole
from zoo.task import Batch, Metric, Params


@runtime_checkable
class Copied(Protocol):
    """Reads several noisy copies of an example: the metric `context`."""

    def errors(self, params: Params, batch: Batch, keys: jax.Array, swap: jax.Array) -> jax.Array:
        """Mean squared error of the estimate at each copy [B, T]; `swap`: the earlier copies are another example's."""
        ...


@lru_cache(maxsize=8)
def _errors(task: Any) -> Any:
    """A jitted (params, batch, indices, rng, swap) -> [B, T]."""

    def errors(params: Params, batch: Batch, indices: jax.Array, rng: jax.Array, swap: jax.Array) -> jax.Array:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, indices)
        return task.errors(params, batch, keys, swap)

    return jax.jit(errors)


@dataclass(frozen=True)
class Context(Metric):
    """Held-out mean squared error of x0 at each copy, the noisiest first, and with the earlier copies of another example.

    The noise is the same both times. A model that does not look at earlier copies has exactly the same error; one that uses them
    gets worse.
    """

    split: str = "test"
    limit: Count | None = None  # examples at most, a fixed random choice
    draws: Count = 2  # of the noise, for each example
    batch: Count = 99
    every: Whole = 0  # steps between measurements while training; 0: at the end only

    name = "context"
    needs = (Copied,)

    def __call__(self, task: Any, params: Params, data: Any, rng: jax.Array) -> dict[str, Any]:
        """`mse_I` of each copy with its standard error over examples, `swapped_I`, and `rise_I`, their ratio less 1."""
        errors, first = _errors(task), 0
        plain: list[np.ndarray] = []
        swapped: list[np.ndarray] = []
        for batch, count in epoch(
            data, self.batch, split=self.split, spec=task.spec(self.batch), limit=self.limit, seed=0
        ):
            for rows, swap in ((plain, False), (swapped, True)):
                found = [
                    errors(
                        params, batch, first + jnp.arange(self.batch), jax.random.fold_in(rng, draw), jnp.asarray(swap)
                    )
                    for draw in range(self.draws)
                ]
                rows.append(hosts.fetch(jnp.stack(found).mean(0))[:count])
            first += count
        one, other = (np.concatenate(rows).astype(np.float64) for rows in (plain, swapped))
        error = one.std(0) / math.sqrt(first)
        figures: dict[str, Any] = {}
        for i, (a, b) in enumerate(zip(one.mean(0), other.mean(0)), 1):
            figures |= {f"mse_{i}": float(a), f"mse_{i}_std_error": float(error[i - 1])}
            figures |= {f"swapped_{i}": float(b), f"rise_{i}": float(b / a - 1)}
        return {**figures, "examples": first, "split": self.split}
