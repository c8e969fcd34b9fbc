"""Keys of a seed; and drawing samples: which key each has, what is drawn again, and the classes that they are of."""

from __future__ import annotations

import enum
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo.errors import UserError, suggest
from zoo.task import trace_of

_log = logging.getLogger("zoo")
RETRIES = 3  # times that a sample which overflowed is drawn again, from new noise


class Use(enum.IntEnum):
    """What a seed is drawn upon for. Each has a key of its own, so that no two draw the same numbers."""

    PARAMETERS = 0
    STEPS = 1  # noise of the loss, dropped labels
    LOOKS = 2  # pictures and metrics while a run trains, and `zoo eval` after it
    SAMPLES = 3  # `zoo sample` and `Model.sample`
    LIKELIHOOD = 4  # noise of examples that are not drawn: `Model.nll`


KEYS = 2  # which way from a seed to its keys this is; a folder of samples that began on another is not filled up


def key_of(seed: int | jax.Array, use: Use) -> jax.Array:
    """The key of a seed for one use. UserError for one beyond 32 bits: two of them would draw the same."""
    if isinstance(seed, int) and not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} is out of range; choose 0 <= seed < 2**32")
    return jax.random.fold_in(jax.random.key(seed), use)


def keys(seed: int, indices: np.ndarray, attempt: int = 0, use: Use = Use.SAMPLES) -> jax.Array:
    """One key per sample: sample i depends on (seed, i) and the attempt alone, whatever the batch."""
    base = jax.random.fold_in(key_of(seed, use), attempt)
    return jax.vmap(lambda i: jax.random.fold_in(base, i))(jnp.asarray(indices))


def rows_of(conditions: Mapping[str, Any] | None, rows: np.ndarray) -> dict[str, jax.Array] | None:
    """The conditions of some of the samples."""
    return None if conditions is None else {key: jnp.asarray(array[rows]) for key, array in conditions.items()}


def finite(
    sampler: Any,
    params: Any,
    seed: int,
    rows: np.ndarray,
    conditions: Mapping[str, Any] | None,
    batch: int,
    key: str,
) -> dict[str, Any]:
    """What the sampler gives for these rows, drawn again from new noise where `key` overflows; a warning where it did to the last.

    UserError for a sample that its trace says is lost.
    """
    padded = np.resize(rows, batch)  # one compiled shape, whatever is left
    given = rows_of(conditions, padded)

    def tried(attempt: int) -> dict[str, Any]:
        found = sampler(params, keys(seed, padded, attempt), given)
        drawn: dict[str, Any] = jax.tree.map(lambda x: np.array(x)[: len(rows)], dict(found))
        if (trace := trace_of(drawn)[1]) is not None:
            trace.check(rows)
        return drawn

    drawn = tried(0)
    for attempt in range(1, RETRIES + 1):
        bad = [k for k in range(len(rows)) if key in drawn and _lost(drawn[key][k])]
        if not bad:
            return drawn
        _log.warning("samples %s overflowed and are drawn again", ", ".join(str(rows[k]) for k in bad))
        for kept, new in zip(jax.tree.leaves(drawn), jax.tree.leaves(tried(attempt))):  # its passes and sweeps as well
            kept[bad] = new[bad]
    lost = [int(rows[k]) for k in range(len(rows)) if key in drawn and _lost(drawn[key][k])]
    if lost:
        _log.warning(
            "samples %s are not finite after %d tries; their missing %s are marked",
            ", ".join(map(str, lost)),
            RETRIES + 1,
            "pixels" if key == "image" else key,
        )
    return drawn


def _lost(sample: np.ndarray) -> bool:
    """Whether a sample overflowed: a pixel that is not finite, or a token below 0."""
    if np.issubdtype(sample.dtype, np.integer):
        return bool((sample < 0).any())
    return not np.isfinite(sample).all()


def label_numbers(
    label: str | Sequence[str | int] | None, classes: int, names: Sequence[str], n: int
) -> np.ndarray | None:
    """Class numbers [n] of names and numbers, repeated in turn; balanced by default.

    Args:
        label: a text as of `label=`, separated by commas, in which names come before numbers; or words, which are names, and
            whole numbers.

    UserError for an unknown name or a number out of range; `none` draws without labels.
    """
    if not classes:
        if label is not None:
            raise UserError(f"label={label}: this model is unconditional (task.classes=0); leave label= out")
        return None
    if label is None:
        return (np.arange(n) % classes).astype(np.int32)
    chosen, split = [], isinstance(label, str)
    words = _named(label.split(","), names) if isinstance(label, str) else label
    for word in words:
        if word in names:  # even where a class is called none
            chosen.append(list(names).index(str(word)))
        elif word == "none":
            chosen.append(-1)
        elif isinstance(word, int) or (split and word.lstrip("-").isdigit()):
            if not 0 <= int(word) < classes:
                raise UserError(f"label={word} is out of range; this model has classes 0 to {classes - 1}")
            chosen.append(int(word))
        else:
            raise UserError(f"label={word!r} is no class; {suggest(word, names)}")
    return np.resize(np.array(chosen, np.int32), n)


def _named(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """Words between commas, joined where the name of a class has commas; of several such names the longest is meant."""
    found = []
    while words:
        ends = (end for end in range(len(words), 1, -1) if ",".join(words[:end]) in names)
        end = next(ends, 1)
        found.append(",".join(words[:end]))
        words = words[end:]
    return found
