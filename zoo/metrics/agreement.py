"""Whether a class-conditional sampler draws the class it was asked for, judged by a classifier of real images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo import hosts
from zoo.data.pipeline import epoch
from zoo.errors import UserError
from zoo.metrics.frechet import quantise
from zoo.task import Params, check_options

_PIXEL_DIMS = 4_096  # numbers per image up to which the classifier takes pixels


@dataclass(frozen=True)
class Agreement:
    """Share of samples that a support vector machine, fitted to real images, puts into the class that was asked for.

    For small images (its pixels, reduced to principal components, are what it sees). Its accuracy on real test images is
    reported beside: below about 97 % the figure says as much of the judge as of the samples.
    """

    samples: int = 500  # labels in turn
    options: Mapping[str, Any] = field(default_factory=dict)  # of the task's `sample`
    path: Any = None  # a data description of labelled images; None: those of the run
    train: int = 20_000  # images that the classifier is fitted to, at most
    test: int = 10_000  # images that it is tested on, at most
    components: int = 64  # principal components that it sees
    batch: int = 128
    every: int = 0  # steps between measurements while training; 0: at the end only

    name = "agreement"
    needs = ("sample",)

    def __post_init__(self) -> None:
        for name in ("samples", "train", "test", "components", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} of the metric agreement must be at least 1")

    def check(self, task: Any) -> None:
        """UserError for a task that draws no images by class."""
        if not getattr(task, "classes", 0):
            raise UserError("the metric agreement asks for classes, and this model is unconditional (task.classes=0)")
        check_options(task, self.options, "options of the metric agreement")

    def __call__(self, task: Any, params: Params, data: Any, rng: jax.Array) -> dict[str, Any]:
        """`agreement` with its standard error, and `judge_accuracy` on real test images. Sample i depends on (rng, i) alone.

        Raises:
            UserError: the task draws no images, or the data has none with labels.
        """
        from sklearn.decomposition import PCA
        from sklearn.pipeline import make_pipeline
        from sklearn.svm import SVC

        self.check(task)
        shape = jax.eval_shape(lambda p: self._draw(task, p, rng, jnp.zeros(1, jnp.int32)), params)
        if shape is None or int(np.prod(shape.shape[1:])) > _PIXEL_DIMS:
            raise UserError(
                f"the metric agreement judges images of at most {_PIXEL_DIMS:,} numbers, and this model draws "
                f"{'none' if shape is None else 'larger ones'}"
            )
        images = data if self.path is None else self.path
        fit, real = self._real(images, "train", self.train), self._real(images, "test", self.test)
        judge = make_pipeline(PCA(min(self.components, *fit[0].shape), random_state=0), SVC(C=10))
        judge.fit(*fit)
        draw = jax.jit(lambda p, i: self._draw(task, p, rng, i))
        right, lost = [], 0
        for first in range(0, self.samples, self.batch):
            count = min(self.batch, self.samples - first)
            drawn = hosts.fetch(draw(params, jnp.arange(first, first + self.batch, dtype=jnp.int32)))[:count]
            finite = np.isfinite(drawn).all((1, 2, 3))
            lost += int((~finite).sum())
            asked = np.arange(first, first + count) % task.classes
            guess = judge.predict(_seen(np.where(finite[:, None, None, None], drawn, 0)))
            right.append((guess == asked) & finite)
        share = float(np.concatenate(right).mean())
        return {
            "agreement": share,
            "agreement_std_error": math.sqrt(share * (1 - share) / self.samples),
            "agreement_samples": self.samples,
            "agreement_not_finite": lost,
            "judge_accuracy": float(judge.score(*real)),
            "judge_train_images": len(fit[0]),
            "judge_test_images": len(real[0]),
        }

    def _draw(self, task: Any, params: Params, rng: jax.Array, indices: jax.Array) -> jax.Array:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, indices)
        labels = {"label": indices % task.classes}
        found = task.sample(params, keys, len(indices), labels, **dict(self.options)).get("image")
        return found

    def _real(self, data: Any, split: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
        rows = [(b, count) for b, count in epoch(data, 512, split=split, limit=limit)]
        if "image" not in rows[0][0] or "label" not in rows[0][0]:
            raise UserError(
                "the metric agreement needs real images with labels, and the run's data has "
                f"{', '.join(rows[0][0])}; set path to a description of such images in a config file"
            )
        return (
            np.concatenate([_seen(b["image"][:count]) for b, count in rows]),
            np.concatenate([b["label"][:count] for b, count in rows]),
        )


def _seen(image: np.ndarray) -> np.ndarray:
    """Images [N, H, W, C] in [-1, 1] as rows of grey levels in [0, 1], as an 8-bit file would hold them."""
    return np.asarray(quantise(jnp.asarray(image)) / 255).reshape(len(image), -1)
