"""Made-up prose, for the tests of texts and tokens."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from zoo.data import documents

WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "a", "dog", "ran", "to", "1", "red", "house,", "slept.", ""]


def spec(length=8, batch=4):
    return {"tokens": jax.ShapeDtypeStruct((batch, length), "int32")}


def prose(seed=0, words=2000):
    rng = np.random.default_rng(seed)
    picked = rng.choice(WORDS, words)
    return "\n".join(" ".join(picked[i : i + 10]) for i in range(0, words, 10)) + "\n"


def whole(data, length=8):
    """The text of all windows of all splits, in order."""
    return [data.vocabulary().decode(data.source(split, spec(length)).tokens) for split in documents.SPLITS]


def files(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}
