"""Small tasks of DART, their parameters and conditions, which its tests share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo import weights
from zoo.papers.dart import Dart

TASK = Dart(
    latent=(4, 4),
    channels=1,
    classes=3,
    vae=None,
    steps=3,
    width=16,
    depth=2,
    head_dim=16,
    base=100.0,
    centre=0.1,
    spread=0.7,
)
MASKS = {
    "blocks": TASK,
    "same": dataclasses.replace(TASK, mask="same"),
    "tokens": dataclasses.replace(TASK, mask="tokens"),
}
NESTED = dataclasses.replace(TASK, coarse=2, patch=1, depth=1)
CAPTIONED = dataclasses.replace(TASK, classes=0, text_tokens=3, text_width=8, captions="features")
WRITES = dataclasses.replace(CAPTIONED, captions="letters", writes=True, steps=2, depth=1)


def randomised(task: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), weights.abstract(task))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def conditions(task: Dart, n: int) -> dict[str, Any]:
    if task.classes:
        return {"label": np.arange(n, dtype=np.int32) % 4 - 1}
    if task.captions == "letters":
        return {"tokens": (np.arange(3 * n, dtype=np.int32) % 7).reshape(n, 3)}
    text, null = (normal(n, 3, 8, seed=k) for k in (5, 6))
    return {"text": text, "null_text": null} if task.text_tokens else {}
