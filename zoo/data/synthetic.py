"""Examples made from a task's own spec, for smoke runs and benchmarks: nothing to learn, nothing to download."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np

from zoo.data.pipeline import Data, Source
from zoo.errors import UserError
from zoo.fields import Count, Seed


@dataclass(frozen=True)
class Synthetic(Data):
    """Noise of the shapes that the task asks for: floats uniform in [-1, 1], integers in [0, values)."""

    examples: Count = 256
    values: Count = 2  # how many different integers; small, so that they are valid labels and tokens of any task
    seed: Seed = 0

    made_up = True  # nothing can be learned from it, so a run needs no real weights either

    def source(self, split: str, spec: Mapping[str, jax.ShapeDtypeStruct] | None = None) -> _Noise:
        """The examples of a split, each a pure function of (seed, split, index, key)."""
        if spec is None:
            raise UserError(
                "Synthetic() makes examples from a task's spec and got none; "
                "pass spec=task.spec(batch), or use data that knows its own shape, e.g. Digits()"
            )
        for key, want in spec.items():
            if np.dtype(want.dtype).kind not in "fiub":
                raise UserError(
                    f"Synthetic() cannot make {key!r} of dtype {np.dtype(want.dtype)}; "
                    "it makes floats, integers and booleans: use real data for this task"
                )
        return _Noise(self, split, dict(spec))


@dataclass
class _Noise(Source):
    data: Synthetic
    split: str
    spec: dict[str, jax.ShapeDtypeStruct]

    def __post_init__(self) -> None:
        self.labels: tuple[str, ...] = tuple(map(str, range(self.data.values))) if "label" in self.spec else ()

    def __len__(self) -> int:
        return self.data.examples

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {key: self._value(index, key, want) for key, want in self.spec.items()}

    def _value(self, index: int, key: str, want: jax.ShapeDtypeStruct) -> np.ndarray:
        rng = np.random.default_rng((self.data.seed, zlib.crc32(f"{self.split}/{key}".encode()), index))
        shape, dtype = want.shape[1:], np.dtype(want.dtype)
        if dtype.kind == "f":
            return np.asarray(rng.uniform(-1, 1, shape), dtype)
        return np.asarray(rng.integers(0, 2 if dtype.kind == "b" else self.data.values, shape), dtype)
