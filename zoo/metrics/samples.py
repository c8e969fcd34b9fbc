"""What metrics draw and what they compare it with: the jitted sampler, its conditions, the shape of its images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo import dist, hosts
from zoo.data.pipeline import Data, epoch
from zoo.errors import UserError
from zoo.task import Options, Params, Trace, options_of, trace_of

MAX_DIMS = 4_096  # numbers per example up to which a metric forms a covariance, or fits a classifier to pixels


def the_image(drawn: Mapping[str, jax.Array]) -> jax.Array | None:
    """Of what a sampler gives, the images."""
    return drawn.get("image")


@dataclass(frozen=True)
class Drawer:
    """(params, rng, indices [n], conditions) -> what is picked of n samples; sample i depends on (rng, indices[i]) and its own alone."""

    program: Any  # jitted, with their trace besides

    def __call__(self, params: Params, rng: jax.Array, indices: Any, conditions: Mapping[str, Any]) -> Any:
        """What is picked of the samples. UserError for one that its trace says is lost."""
        return self.traced(params, rng, indices, conditions)[0]

    def traced(
        self, params: Params, rng: jax.Array, indices: Any, conditions: Mapping[str, Any]
    ) -> tuple[Any, Trace | None]:
        """That, and how they came about, where the sampler says so."""
        found, trace = self.program(params, rng, indices, conditions)
        trace = hosts.fetch(trace)
        if trace is not None:
            trace.check(indices)
        return found, trace

    def batches(
        self,
        params: Params,
        rng: jax.Array,
        samples: int,
        batch: int,
        given: Callable[[np.ndarray], Mapping[str, Any]] = lambda indices: {},
    ) -> Iterator[tuple[Any, Trace | None, np.ndarray]]:
        """Of samples 0 to `samples`, so many at once: what is picked, here, how they came about, and their indices [n].

        Args:
            given: indices -> conditions.
        """
        for first in range(0, samples, batch):
            indices = np.arange(first, first + batch, dtype=np.int32)  # one compiled shape
            found, trace = self.traced(params, rng, indices, given(indices))
            count = min(batch, samples - first)
            yield *jax.tree.map(lambda x: x[:count], (hosts.fetch(found), trace)), indices[:count]  # noqa: B023

    def eval_shape(self, *arguments: Any) -> Any:
        """Shapes of what is picked; nothing is computed."""
        return self.program.eval_shape(*arguments)[0]


def drawer(task: Any, options: Options, pick: Callable[[Mapping[str, jax.Array]], Any] = the_image) -> Drawer:
    """Of n samples what `pick` takes: images [n, H, W, C], or None. The program is kept, so it is compiled once."""
    return _drawer(task, options_of(task, options, "options"), pick)


@lru_cache(maxsize=8)
def _drawer(task: Any, options: Any, pick: Callable[[Mapping[str, jax.Array]], Any]) -> Drawer:
    def draw(params: Params, rng: jax.Array, indices: jax.Array, conditions: Mapping[str, Any]) -> Any:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, indices)
        samples, trace = trace_of(task.sample(params, keys, len(indices), dict(conditions) or None, options))
        return pick(samples), trace

    return Drawer(jax.jit(draw))


def image_shape(
    task: Any,
    options: Options,
    batch: int,
    conditions: Mapping[str, jax.ShapeDtypeStruct],
    params: Params | None = None,
) -> tuple[int, ...] | None:
    """[H, W, C] of the images that a sampler gives, None where it gives none; nothing is computed.

    Args:
        batch: images at once; that of the measurement, so that the sampler is traced once.
        conditions: shapes of what `batch` samples are conditioned on.
        params: None: those of `task.init`, before there are any.
    """
    key = jax.random.key(0)
    if params is None:
        params = dist.unbox(jax.eval_shape(task.init, key))
    indices = jax.ShapeDtypeStruct((batch,), jnp.int32)
    found = drawer(task, options).eval_shape(params, key, indices, dict(conditions))
    return None if found is None else tuple(found.shape[1:])


def held_out(task: Any, data: Any, batch: int, samples: int) -> Iterator[dict[str, np.ndarray]]:
    """Without end, conditions of `batch` samples at a time: sample i has those of test example i mod N (`about.conditions`).

    For a task without any, empty. N is the number of test examples, at most `samples`; no more than two batches
    are held at once.

    Raises:
        UserError: the data have no such conditions, or no test examples.
    """
    spec = {key: leaf for key, leaf in task.spec(batch).items() if key in task.about.conditions}
    waiting = {key: np.zeros((0, *leaf.shape[1:]), leaf.dtype) for key, leaf in spec.items()}
    while spec:
        count = 0
        for rows, count in epoch(data, batch, split="test", spec=spec, limit=samples):
            waiting = {key: np.concatenate([array, rows[key][:count]]) for key, array in waiting.items()}
            while len(next(iter(waiting.values()))) >= batch:
                yield {key: array[:batch] for key, array in waiting.items()}
                waiting = {key: array[batch:] for key, array in waiting.items()}
        if not count:
            raise UserError(
                f"data={type(data).__name__} has no test examples, whose {', '.join(spec)} samples are conditioned on; "
                "give data with a test split"
            )
    while True:
        yield {}


def described(metric: Any, data: Any) -> tuple[Any, str]:
    """The data description that a metric looks at, `path` or else the run's, and what to call it."""
    path = metric.path
    if path is None:
        return data, f"data={type(data).__name__}"
    if not isinstance(path, Data):
        raise UserError(
            f"path={path!r} of the metric {metric.name} is no data description; on the command line write data={path}, in a "
            'config file a description, e.g. path=Images("data/mnist.npz", size=28, channels=1)'
        )
    return path, f"path={type(path).__name__}"


def check_images(metric: Any, data: Any, split: str, shape: tuple[int, ...], *, label: bool = False) -> Any:
    """The open source of the real images [H, W, C] of `shape`, with labels where asked for, that a metric looks at.

    Raises:
        UserError: no data description, or the first example is something else.
    """
    data, called = described(metric, data)
    spec = {"image": jax.ShapeDtypeStruct((1, *shape), jnp.float32)}
    if label:
        spec["label"] = jax.ShapeDtypeStruct((1,), jnp.int32)
    source = data.source(split, spec)
    example = source[0] if len(source) else {}
    got = example["image"].shape if "image" in example else None
    if got != shape or (label and "label" not in example):
        given = [key if key != "image" or got == shape else f"images of {list(example[key].shape)}" for key in example]
        raise UserError(
            f"the metric {metric.name} needs real images{' with labels' if label else ''} of {list(shape)}, the shape that the "
            f"model draws, and {called} gives {', '.join(given) or 'nothing'} in its {split} split; set path to a description "
            "of such images in a config file"
        )
    return source


def std_error(values: np.ndarray) -> float:
    """Of the mean of values [N]."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
