"""The contract between a paper and everything else. It is structural: a task inherits nothing.

A task is a frozen dataclass whose fields are the paper's hyper-parameters. Besides the four members of `Task` it may
have any of the abilities in `ABILITIES`; commands look them up and say in a sentence when one is missing.
Some plain attributes are looked for as well; of these the trainer knows `classes`, `needs`, the held keys that a run must
take from `Run.weights` unless its data are made up, and `template`, how captions are put before they are encoded.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from zoo.errors import UserError, suggest

Params = dict[str, Any]  # nested dict of arrays; top-level keys are the unit of `held` and of `Run.weights`
Batch = Mapping[str, jax.Array]


@runtime_checkable
class Task(Protocol):
    """What the trainer knows of a paper."""

    # top-level keys of params that are carried, sharded and restored, but get no gradient, no optimiser state and no
    # average: teachers, frozen encoders, buffers. A class attribute or a property, never an annotated field.
    held: tuple[str, ...]

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of one global batch, by key."""
        ...

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters; leaves may be boxed with logical axis names."""
        ...

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """A scalar mean over examples, and metrics: scalars are logged, arrays (batch means) go to `after_step` only."""
        ...


ABILITIES: dict[str, str] = {
    "sample": "sample(params, rng, n, conditions=None, **options) -> dict of arrays that lead with n",
    "nll": "nll(params, batch, rng) -> [B] nats",
    "chain": "chain(params, batch, rng, guidance=0.0) -> noisy tokens [B, T, D] and the flow's blocks, as inverted",
    "features": "features(params, batch) -> [B, D]",
    "feature_map": "feature_map(params, batch) -> [B, H, W, D], of a series [B, T, D]",
    "off_grid": "off_grid(params, batch, rng) -> tokens [B, N, D] of random patches, and their boxes [B, N, 2, A]",
    "relations": "relations(params, batch, rng) -> relations of random patches, predicted and true, and the rebuilt layout; "
    "the property `relation_names` says what their numbers are",
    "logits": "logits(params, batch) -> [B, classes]",
    "crops": "crops(batch, rng) -> patches [B, N, ...] and boxes, what a step makes of a batch before its network",
    "denoise": "denoise(params, ...) -> the noise-free estimate",
    "after_step": "after_step(params, metrics) -> params, writing held keys only",
    "import_names": "import_names() -> [Name], the layout of a published checkpoint",
    "import_state": "import_state(state) -> state, a published state dict with the keys of import_names",
}


@dataclass(frozen=True)
class Name:
    """One tensor of a published checkpoint and its place in ours.

    `layout` is an einops pattern from theirs to ours; swapping its sides is the way back. A tensor of layer `layer`
    is one slice of a stacked parameter. `target=None` marks a constant: skipped on import (and allowed to be absent),
    written by `value()` on export.
    """

    source: str
    target: str | None
    layout: str | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    layer: int | None = None
    value: Callable[[], Any] | None = None


def sample_keys(rng: jax.Array, n: int) -> jax.Array:
    """n keys of one key, or those given: sample i depends on (rng, i) alone."""
    return rng if jnp.ndim(rng) else jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(n))


def check_options(task: Any, options: Mapping[str, Any], where: str) -> None:
    """UserError when `options` has a key that the task's sampler does not take, or words where it takes none.

    `where` names the field that holds them.
    """
    known = [p.name for p in inspect.signature(task.sample).parameters.values() if p.kind is p.KEYWORD_ONLY]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise UserError(
            f"{where}: the sampler of {type(task).__name__} has no option {unknown[0]!r}; {suggest(unknown[0], known)}"
        )
    kinds = typing.get_type_hints(type(task).sample)
    for option, value in options.items():
        kind = kinds.get(option, Any)
        parts = {kind, typing.get_origin(kind), *typing.get_args(kind), *map(typing.get_origin, typing.get_args(kind))}
        if isinstance(value, str) and not parts & {str, Any, typing.Literal}:
            raise UserError(f"{where}: {option}={value!r} is no {getattr(kind, '__name__', kind)}")


def check_needs(task: Any, needs: Iterable[str], what: str) -> None:
    """UserError when the task lacks an ability that `what` needs."""
    missing = [ability for ability in needs if not hasattr(task, ability)]
    if missing:
        raise UserError(
            f"{what} needs {missing[0]!r}, which {type(task).__name__} has not; it can: {', '.join(abilities(task))}"
        )


def abilities(task: Any) -> list[str]:
    """The optional abilities of a task, in the order of `ABILITIES`."""
    return [name for name in ABILITIES if hasattr(task, name)]


def is_text(task: Any) -> bool:
    """Whether the examples of a task are texts, `tokens` int32 [B, T] that it models and is not merely told."""
    return "tokens" in task.spec(1) and "tokens" not in getattr(task, "given", ())
