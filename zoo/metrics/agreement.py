"""Which classes a sampler draws, judged by a classifier of real images; and whether they are those that were asked for."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo.errors import UserError
from zoo.fields import Count, Whole
from zoo.metrics.frechet import quantise
from zoo.metrics.samples import MAX_DIMS, check_images, drawer, image_shape
from zoo.task import Metric, Options, Params, Samples, Trace, options_of

_PART = 512  # images that are read at once


@dataclass(frozen=True)
class _Judged(Metric):
    """Base: a support vector machine, fitted to real images, says of which class samples are.

    For small images: their pixels, reduced to principal components, are what it sees. Real images are a fixed random choice
    from each split, since they often lie in the order of their classes. Its accuracy on those of the test split is reported
    beside: below about 97 % a figure says as much of the judge as of the samples.
    """

    samples: Count = 500
    options: Options = field(default_factory=dict)  # of the task's `sample`
    path: Any = None  # a data description of labelled images; None: those of the run
    train: Count = 20_000  # images that the classifier is fitted to, at most
    test: Count = 10_000  # images that it is tested on, at most
    components: Count = 64  # principal components that it sees
    batch: Count = 128
    every: Whole = 0  # steps between measurements while training; 0: at the end only

    needs = (Samples,)

    def check(self, task: Any) -> None:
        """UserError for a task that draws no images, or too large ones; asked before a run's first step."""
        shape = self._shape(task)
        if self.path is not None:
            for split in ("train", "test"):
                check_images(self, None, split, shape, label=True)

    def _shape(self, task: Any, params: Params | None = None) -> tuple[int, ...]:
        """[H, W, C] of the images that the task draws."""
        options_of(task, self.options, f"options of the metric {self.name}")
        label = {"label": jax.ShapeDtypeStruct((self.batch,), jnp.int32)} if task.about.classes else {}
        shape = image_shape(task, self.options, self.batch, label, params)
        if shape is None or math.prod(shape) > MAX_DIMS:
            raise UserError(
                f"the metric {self.name} judges images of at most {MAX_DIMS:,} numbers, and {type(task).__name__} draws "
                f"{'none' if shape is None else f'some of {list(shape)}'}; give a model of small images"
            )
        return shape

    def _judged(
        self, task: Any, params: Params, data: Any, rng: jax.Array, needed: int | None
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any], Trace | None]:
        """Of each sample the class that the judge sees, -1 for one that is not finite, and the class asked for; about the judge;
        how samples came about, where the sampler says so.

        Args:
            needed: how many classes the real images must have; None: those that they have.
        """
        from sklearn.decomposition import PCA
        from sklearn.pipeline import make_pipeline
        from sklearn.svm import SVC

        shape, draw = self._shape(task, params), drawer(task, self.options)
        fit, real = (self._real(data, split, shape, needed) for split in ("train", "test"))
        judge = make_pipeline(PCA(min(self.components, *fit[0].shape), random_state=0), SVC(C=10))
        judge.fit(*fit)
        seen, traces, classes = [], [], task.about.classes

        def given(indices: np.ndarray) -> dict[str, np.ndarray]:
            return {"label": indices % classes} if classes else {}

        for drawn, trace, _ in draw.batches(params, rng, self.samples, self.batch, given):
            traces.append(trace)
            finite = np.isfinite(drawn).all((1, 2, 3))
            guess = judge.predict(_seen(np.where(finite[:, None, None, None], drawn, 0)))
            seen.append(np.where(finite, guess, -1))
        about = {
            "judge_accuracy": float(judge.score(*real)),
            "judge_train_images": len(fit[0]),
            "judge_test_images": len(real[0]),
        }
        whole: Any = jax.tree.map(lambda *each: np.concatenate(each), *traces)
        return np.concatenate(seen), np.arange(self.samples) % max(classes, 1), about, whole

    def _real(
        self, data: Any, split: str, shape: tuple[int, ...], classes: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the classifier sees of real images [N, H W C], and their labels [N]; a fixed choice, of all classes."""
        source = check_images(self, data, split, shape, label=True)
        limit = {"train": self.train, "test": self.test}[split]
        chosen = np.random.default_rng(0).permutation(len(source))[:limit]
        seen, labels = [], []
        with ThreadPoolExecutor(8) as pool:
            for first in range(0, len(chosen), _PART):
                rows = list(pool.map(lambda i: source[int(i)], chosen[first : first + _PART]))
                seen.append(_seen(np.stack([row["image"] for row in rows])))
                labels.append(np.stack([row["label"] for row in rows]))
        known = np.concatenate(labels)
        missing = np.setdiff1d(np.arange(classes or 0), known)
        if len(missing):
            few = ", ".join(map(str, missing[:5])) + (" ..." if len(missing) > 5 else "")
            way = f"set {split} to more, or path" if limit < len(source) else "set path"
            raise UserError(
                f"{split}={limit} of the metric {self.name}: {len(chosen):,} images of the {split} split have none of "
                f"{len(missing)} of task.classes={classes} classes ({few}); {way} to a description of images of all classes"
            )
        return np.concatenate(seen), known


@dataclass(frozen=True)
class Agreement(_Judged):
    """Share of samples that the judge puts into the class that was asked for; labels are asked for in turn.

    The standard error of a share k / n is that of (k + 2) / (n + 4) among n + 4 (Agresti and Coull 1998), so that a share of 0 or
    1 has one too.
    """

    name = "agreement"

    def _shape(self, task: Any, params: Params | None = None) -> tuple[int, ...]:
        classes = task.about.classes
        if classes < 2:
            what = "this model is unconditional (task.classes=0)" if not classes else f"task.classes={classes}"
            raise UserError(f"the metric agreement tells classes apart, and {what}; give a model with two or more")
        return super()._shape(task, params)

    def __call__(self, task: Any, params: Params, data: Any, rng: jax.Array) -> dict[str, Any]:
        """`agreement` with its standard error, and `judge_accuracy` on real test images. Sample i depends on (rng, i) alone.

        Raises:
            UserError: the task draws no images, or the data has none with labels of every class in both splits.
        """
        seen, asked, about, _ = self._judged(task, params, data, rng, task.about.classes)
        hits = int((seen == asked).sum())
        return {
            "agreement": hits / self.samples,
            "agreement_std_error": share_error(hits, self.samples),
            "agreement_samples": self.samples,
            "agreement_not_finite": int((seen < 0).sum()),
            **about,
        }


@dataclass(frozen=True)
class Classes(_Judged):
    """Share of samples in each class that the judge sees, and in those of `wanted` together, with its standard error."""

    wanted: tuple[Whole, ...] = ()  # classes; (): no share is told

    name = "classes"

    def __call__(self, task: Any, params: Params, data: Any, rng: jax.Array) -> dict[str, Any]:
        """`class_K` for each class, `wanted`, and `judge_accuracy` on real test images. Sample i depends on (rng, i) alone.

        Where the sampler says how samples came about, its figures too, their spread as `NAME_std`, and a picture of it.
        """
        seen, _, about, trace = self._judged(task, params, data, rng, None)
        found: dict[str, Any] = {f"class_{k}": float((seen == k).mean()) for k in np.unique(seen[seen >= 0]).tolist()}
        if self.wanted:
            hits = int(np.isin(seen, self.wanted).sum())
            found |= {"wanted": hits / self.samples, "wanted_std_error": share_error(hits, self.samples)}
        found |= {"samples": self.samples, "not_finite": int((seen < 0).sum()), **about}
        if trace is None:
            return found
        for name, each in trace.figures().items():
            found |= {name: float(each.mean()), f"{name}_std": float(each.std())}
        return {**found, "pictures": {"trace": trace.picture()}}


def share_error(hits: int, count: int) -> float:
    """Standard error of a share hits / count, with two successes and two failures added."""
    share = (hits + 2) / (count + 4)
    return math.sqrt(share * (1 - share) / (count + 4))


def _seen(image: np.ndarray) -> np.ndarray:
    """Images [N, H, W, C] in [-1, 1] as rows of grey levels in [0, 1], as an 8-bit file would hold them."""
    return np.asarray(quantise(jnp.asarray(image)) / 255).reshape(len(image), -1)
