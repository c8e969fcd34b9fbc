"""Likelihood metrics: bits per dimension, simple densities to compare them with, classification by Bayes' rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo import dist, hosts
from zoo.data.pipeline import epoch
from zoo.errors import UserError
from zoo.fields import Count, Whole
from zoo.metrics.frechet import Moments, moments
from zoo.metrics.samples import MAX_DIMS, std_error
from zoo.task import Likelihood, Likely, Metric, is_text

_LOG_2PI = math.log(2 * math.pi)


def over_draws(nats: jax.Array) -> jax.Array:
    """The mean over draws of [draws, B] nats."""
    return nats.mean(0)


@lru_cache(maxsize=8)
def per_example(task: Any, draws: int, combine: Callable[[jax.Array], Any] = over_draws) -> Any:
    """A jitted (params, batch, indices, rng) -> what `combine` makes of the nats [draws, B] of each example.

    The noise of an example follows from (rng, draw, index of the example), so the batch size changes rounding only.
    """

    def many(params: Any, batch: Any, indices: jax.Array, rng: jax.Array) -> Any:
        # on a mesh each device takes its share of the examples
        batch, indices = jax.tree.map(lambda x: dist.constrain(x, "batch"), (batch, indices))

        def draw(d: jax.Array) -> jax.Array:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(rng, d), indices)
            return task.nll(params, batch, keys)

        return combine(jax.lax.map(draw, jnp.arange(draws)))

    return jax.jit(many)


@dataclass(frozen=True)
class Bits(Metric):
    """Bits per dimension of held-out images, a mean over images and draws of noise (as arXiv:2412.06329: no label).

    Without `label` captions are left out too, and the bits are those of an unconditional model.

    Reported as `bpd` for uniform dequantisation (a bound on the data's own bits) and as `noisy_bits_per_dim` for a
    model trained with Gaussian noise, whose bits are those of noisy images and compare with nothing else.
    """

    draws: Count = 1  # of noise per image
    split: str = "test"
    batch: Count = 256
    limit: Count | None = None  # images at most
    label: bool = False  # True: condition on label or caption
    baselines: bool = False  # True: also a full-covariance Gaussian fitted to the training data, and for grey levels a
    # histogram per pixel
    every: Whole = 0  # steps between measurements while training; 0: at the end only

    name = "bpd"
    needs = (Likely,)

    def check(self, task: Any) -> None:
        """UserError where the metric makes no sense for a task; asked before a run's first step."""
        if is_text(task):
            raise UserError(
                f"the metric bpd counts bits per dimension, and {type(task).__name__} models texts; use text"
            )
        dims = math.prod(of(task).event)
        if self.baselines and (dims > MAX_DIMS or _event_key(task) is None):
            raise UserError(
                f"baselines=True of the metric bpd fits a covariance to data as they are stored, of at most {MAX_DIMS} "
                f"dimensions; here are {dims}, or images that are encoded on the way: set baselines=False"
            )

    def __call__(self, task: Any, params: Any, data: Any, rng: jax.Array) -> dict[str, Any]:
        """The figure, its standard error over images, and what it was measured on.

        Raises:
            UserError: baselines asked for where they make no sense.
        """
        self.check(task)
        spec = task.spec(self.batch)
        known = ("label", *task.about.conditions)
        asked = {k for k in spec if k in known and not k.startswith("null_")}
        if not self.label:
            spec = {k: v for k, v in spec.items() if k not in asked}
        nll, bits, first = per_example(task, self.draws), [], 0
        likelihood = of(task)
        dims = math.prod(likelihood.event)
        for batch, count in epoch(data, self.batch, split=self.split, spec=spec, limit=self.limit):
            nats = nll(params, batch, first + jnp.arange(self.batch), rng)
            bits.append(hosts.fetch(likelihood.bits(nats / dims))[:count])
            first += count
        values = np.concatenate(bits).astype(np.float64)
        key = likelihood.name
        found: dict[str, Any] = {
            key: float(values.mean()),
            f"{key}_std_error": std_error(values),
            "images": len(values),
            "draws": self.draws,
            "split": self.split,
            "conditioned": self.label and bool(asked),
        }
        return {**found, **self._baselines(task, data)} if self.baselines else found

    def _baselines(self, task: Any, data: Any) -> dict[str, float]:
        likelihood = of(task)
        if likelihood.kind == "noisy":
            fitted = _noisy_moments(task, data, "train", None)
            nats = gaussian_nats(*fitted, *_noisy_moments(task, data, self.split, self.limit)) / len(fitted[1])
            return {f"gaussian_{likelihood.name}": float(likelihood.bits(nats))}
        levels = likelihood.levels
        train = _grey_levels(data, "train", levels, None)
        test = _grey_levels(data, self.split, levels, self.limit)
        return {
            "histogram_bpd": histogram_bits(train, test, levels),
            "gaussian_bpd": gaussian_bits(train, test, levels),
        }


def of(task: Any) -> Likelihood:
    """What the likelihood of a task is of. UserError where the task does not say."""
    found: Likelihood | None = task.about.likelihood
    if found is None:
        raise UserError(
            f"the metric bpd gives bits, and {type(task).__name__} does not say how its nats become bits; set `likelihood` in "
            "its About"
        )
    return found


def _event_key(task: Any) -> str | None:
    """Under which key the data hold it; None where it is made on the way."""
    spec = task.spec(1)
    return next((k for k in ("latent", "image") if k in spec and spec[k].shape[1:] == of(task).event), None)


def _noisy_moments(task: Any, data: Any, split: str, limit: int | None) -> tuple[Moments, np.ndarray]:
    """Moments of the examples of a split without noise, and the mean over examples of the variance [dims] of their noise.

    In one pass that holds a part of the examples at a time.
    """
    key, dims, part = _event_key(task), math.prod(of(task).event), 1_024
    assert key is not None
    kept = {k: v for k, v in task.spec(part).items() if k.startswith(key)}
    squares = np.zeros(dims)

    def rows() -> Iterator[np.ndarray]:
        for batch, count in epoch(data, part, split=split, spec=kept, limit=limit):
            if f"{key}_std" in kept:
                std = batch[f"{key}_std"][:count].reshape(count, dims)
                squares[:] += np.square(std, dtype=np.float64).sum(0)
            yield batch[key][:count].reshape(count, dims)

    found = moments(rows())
    return found, squares / found.count + of(task).noise ** 2


def gaussian_nats(train: Moments, variance: np.ndarray, test: Moments, test_variance: np.ndarray) -> float:
    """Expected -log p in nats of noisy test examples under a full-covariance Gaussian fitted to noisy training examples.

    Each example is a Gaussian of its own with a diagonal covariance, and its noise is averaged in closed form: of the
    examples only the moments matter, and the mean variances [dims] of their noise.
    """
    covariance = _biased(train) + np.diag(variance)
    precision = np.linalg.inv(covariance)
    off = test.mean - train.mean
    quadratic = np.sum(precision * (_biased(test) + np.outer(off, off))) + test_variance @ np.diag(precision)
    return float(0.5 * (quadratic + np.linalg.slogdet(covariance)[1] + len(off) * _LOG_2PI))


def _biased(of: Moments) -> np.ndarray:
    return of.covariance * ((of.count - 1) / of.count)


def _grey_levels(data: Any, split: str, levels: int, limit: int | None) -> np.ndarray:
    """Integer grey levels [N, dims] of a split."""
    rows = [b["image"][:count] for b, count in epoch(data, 256, split=split, limit=limit)]
    images = np.concatenate(rows)
    return np.rint((images.reshape(len(images), -1) + 1) / 2 * (levels - 1)).astype(np.int64)


def histogram_bits(train: np.ndarray, test: np.ndarray, levels: int) -> float:
    """Bits per dimension of `test` [M, dims] under one add-one smoothed histogram per pixel of `train` [N, dims]."""
    counts = (train[:, :, None] == np.arange(levels)).sum(0) + 1
    logp = np.log2(counts / counts.sum(1, keepdims=True))
    return float(-np.take_along_axis(logp, test.T, axis=1).mean())


def gaussian_bits(train: np.ndarray, test: np.ndarray, levels: int) -> float:
    """Bits per dimension of `test` under a full-covariance Gaussian fitted to dequantised `train`.

    In units of grey levels, where a bin is 1 wide; the variance 1/12 of the dequantisation is added in closed form.
    """
    dims = train.shape[1]
    x, y = train + 0.5, test + 0.5
    mean = x.mean(0)
    covariance = np.cov(x, rowvar=False, bias=True).reshape(dims, dims) + np.eye(dims) / 12
    centred = y - mean
    # E over u of the quadratic form: that of the bin's centre plus tr(precision) / 12
    precision = np.linalg.inv(covariance)
    quadratic = np.einsum("nd,de,ne->n", centred, precision, centred).mean() + np.trace(precision) / 12
    nats = 0.5 * (quadratic + np.linalg.slogdet(covariance)[1] + dims * _LOG_2PI)
    return float(nats / dims / math.log(2))


@dataclass(frozen=True)
class BayesAccuracy(Metric):
    """Accuracy of argmin over classes of nll(image | class), a uniform prior over classes (arXiv:2412.06329).

    Images go in without noise where the model was trained with Gaussian noise; with dequantisation, draws are averaged.
    """

    split: str = "test"
    batch: Count = 128
    limit: Count | None = None
    draws: Count = 4  # of dequantisation noise
    every: Whole = 0

    name = "bayes"
    needs = (Likely,)

    def check(self, task: Any) -> None:
        """UserError for an unconditional model; asked before a run's first step."""
        if not task.about.classes:
            raise UserError(
                "the metric bayes compares classes, and this model is unconditional (task.classes=0); use bpd"
            )

    def __call__(self, task: Any, params: Any, data: Any, rng: jax.Array) -> dict[str, Any]:
        """`accuracy`, its standard error and the images it was measured on. UserError for an unconditional model."""
        self.check(task)
        likelihood = task.about.likelihood
        clean = None if likelihood is None else likelihood.clean
        draws = self.draws if clean is None else 1
        nll = per_example(task if clean is None else clean, draws)
        spec, right, first = task.spec(self.batch), [], 0

        @jax.jit
        def classify(params: Any, batch: Any, indices: jax.Array, rng: jax.Array) -> jax.Array:
            def under(label: jax.Array) -> jax.Array:
                return nll(params, {**batch, "label": jnp.full(indices.shape, label, jnp.int32)}, indices, rng)

            nats = jax.lax.map(under, jnp.arange(task.about.classes))
            return jnp.where(jnp.isnan(nats), jnp.inf, nats).argmin(0)  # argmin alone would choose an overflow

        for batch, count in epoch(data, self.batch, split=self.split, spec=spec, limit=self.limit):
            kept = {k: v for k, v in batch.items() if k != "label"}
            guess = hosts.fetch(classify(params, kept, first + jnp.arange(self.batch), rng))
            right.append((guess == batch["label"])[:count])
            first += count
        hits = np.concatenate(right)
        accuracy = float(hits.mean())
        error = math.sqrt(accuracy * (1 - accuracy) / len(hits))
        return {
            "accuracy": accuracy,
            "accuracy_std_error": error,
            "accuracy_images": len(hits),
            "accuracy_draws": draws,
            "accuracy_split": self.split,
        }
