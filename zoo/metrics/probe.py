"""What an encoder's features are good for: linear probe, nearest neighbours; and the accuracy of a trained classifier.

B examples, D width. "Images" below are series too.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from zoo import dist, hosts
from zoo.data.pipeline import epoch
from zoo.errors import UserError
from zoo.fields import Count, Positive, Whole
from zoo.metrics.agreement import share_error
from zoo.metrics.samples import described, std_error
from zoo.task import Classifies, Encodes, Metric, Params, call


@lru_cache(maxsize=8)
def jitted(task: Any, ability: str) -> Any:
    """An ability (params, batch, ...) of a task as one compiled function; on a mesh each device takes its share of the batch."""

    def run(params: Params, batch: Any, *rest: Any) -> Any:
        return call(task, ability, params, jax.tree.map(lambda x: dist.constrain(x, "batch"), batch), *rest)

    return jax.jit(run)


def fresh(task: Any, params: Params, rng: jax.Array) -> Params:
    """Untrained parameters, laid out as `params`; held networks are those of `params`."""
    where = jax.tree.map(lambda x: getattr(x, "sharding", None), params)
    made = jax.jit(lambda key: dist.unbox(task.init(key)), out_shardings=where)(rng)
    return {**made, **{key: params[key] for key in task.about.held}}


def finite(found: Any, ability: str, task: Any, metric: Any) -> Any:
    """The arrays of a tree, here; UserError where a number is none."""
    here = hosts.fetch(found)
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(here)):
        raise UserError(
            f"the metric {metric.name}: {type(task).__name__}.{ability} gives numbers that are not finite; the weights have "
            "diverged: evaluate an earlier step, or train with a lower optim.lr"
        )
    return here


def check_splits(metric: Any, task: Any, data: Any, *splits: str, label: bool = False, fewest: int = 1) -> None:
    """Open what a metric goes through and read an example of each split.

    Raises:
        UserError: a split that cannot be read, that does not fit the task, or that has fewer than `fewest` examples (two are
            asked for by a metric that compares them) or, asked for, no labels.
    """
    whole, called = described(metric, data)
    spec = spec_of(task, metric.batch, label=label)
    for split in splits:
        source = whole.source(split, spec)
        groups = source.groups
        count = len(groups[0] if groups else source)  # what `epoch` goes through
        if not count:
            raise UserError(f"the metric {metric.name}: {called} has no {split} examples; give data that have some")
        if count < fewest:
            raise UserError(
                f"the metric {metric.name} compares {task.about.unit} with others, and {called} has {count} of them in its {split} "
                f"split; {_for_more(whole)}give data that have more"
            )
        example = source[int(groups[0][0]) if groups else 0]
        if label and "label" not in example:
            way = "data.path" if whole.place else "data"
            raise UserError(
                f"the metric {metric.name} needs labels, and {called} gives {', '.join(example)} alone in its {split} split; "
                f"set {way} to labelled data, or leave the metric out"
            )
        # compares its first example with the task; nothing is read ahead yet
        epoch(whole, 1, split=split, spec=spec_of(task, 1, label=False), limit=1).close()


def _for_more(data: Any) -> str:
    """How a description of data can be made to hold out more."""
    fewer = [f"data.{name}" for name in ("hop", "length") if hasattr(data, "hop")]
    ways = ["data.test_fraction to more"] if hasattr(data, "test_fraction") else []
    ways += [f"{' or '.join(fewer)} to less"] if fewer else []
    return f"set {', '.join(ways)}, or " if ways else ""


def spec_of(task: Any, batch: int, *, label: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """What the task reads of a batch, with `label` int32 [B] or without."""
    spec = {key: leaf for key, leaf in task.spec(batch).items() if key != "label"}
    return {**spec, "label": jax.ShapeDtypeStruct((batch,), jnp.int32)} if label else spec


# --- labels from features -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Judged(Metric):
    """Accuracy on test images of a classifier that is fitted to the features of labelled training images.

    Both are a fixed random choice from their split, since a split may lie in the order of its classes. Features are
    standardised by the training ones. The encoder sees no label.
    """

    train: Count = 3_000  # labelled images that the classifier is fitted to, at most
    test: Count = 2_000  # images that it is tested on, at most
    batch: Count = 256
    path: Any = None  # a data description of labelled images; None: those of the run
    baseline: bool = False  # True: also the figures of fresh parameters (`task.init`), the same images
    every: Whole = 0  # steps between measurements while training; 0: at the end only

    name: ClassVar[str]
    needs = (Encodes,)
    by_class = False

    def check_data(self, task: Any, data: Any) -> None:
        """UserError for data without labels, or that do not fit the task; asked before a run's first step."""
        check_splits(self, task, data, "train", "test", label=True)

    def __call__(self, task: Any, params: Params, data: Any, rng: jax.Array) -> dict[str, Any]:
        """`NAME_accuracy` with its standard error (that of `agreement`), how many images of how many classes it is of.

        With `baseline` the same with `_random` at the end, whose parameters follow from `rng`.

        Raises:
            UserError: no labels, training images of one class, features that are not finite.
        """
        self.check_data(task, data)
        name, found = self.name, self._judge(task, params, data)
        if self.baseline:
            other = self._judge(task, fresh(task, params, rng), data)
            found |= {f"{name}_{key}_random": other[f"{name}_{key}"] for key in ("accuracy", "std_error")}
        return found

    def _judge(self, task: Any, params: Params, data: Any) -> dict[str, Any]:
        from sklearn.preprocessing import StandardScaler

        name = self.name
        seen, labels = self._features(task, params, data, "train")
        scale = StandardScaler().fit(seen)
        kinds = np.unique(labels)
        if len(kinds) < 2:
            raise UserError(
                f"train={self.train} of the metric {name}: the {len(labels):,} training {task.about.unit} are all of class "
                f"{kinds[0]}; set train to more, or give data of several classes"
            )
        judge, about = self._fitted(scale.transform(seen), labels)
        tested, truth = self._features(task, params, data, "test")
        hits = int((judge.predict(scale.transform(tested)) == truth).sum())
        return {
            f"{name}_accuracy": hits / len(truth),
            f"{name}_std_error": share_error(hits, len(truth)),
            f"{name}_train": len(labels),
            f"{name}_test": len(truth),
            f"{name}_classes": len(kinds),
            **about,
        }

    @abstractmethod
    def _fitted(self, seen: np.ndarray, labels: np.ndarray) -> tuple[Any, dict[str, Any]]:
        """The classifier, an object with `predict`, of standardised features [N, D]; what else to report."""

    def _features(self, task: Any, params: Params, data: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Features [N, D] float64 and labels [N] of the images chosen from a split."""
        whole, _ = described(self, data)
        spec, limit = spec_of(task, self.batch, label=True), {"train": self.train, "test": self.test}[split]
        seen, labels = [], []
        for batch, count in epoch(whole, self.batch, split=split, spec=spec, limit=limit, seed=0):
            labels.append(batch.pop("label")[:count])
            found = jitted(task, "features")(params, batch)
            seen.append(finite(found, "features", task, self)[:count].reshape(count, -1))
        return np.concatenate(seen).astype(np.float64), np.concatenate(labels)


@dataclass(frozen=True)
class Probe(_Judged):
    """Accuracy on test images of a logistic regression on an encoder's features: the linear probe.

    Fitted to standardised features of a fixed random choice of labelled training images, with an L2 penalty (scikit-learn's
    C). `probe_converged` says whether the optimiser came to its end: time goes with iterations, images, classes and D.
    """

    inverse_penalty: Positive = 1.0  # C: smaller holds the weights closer to 0
    iterations: Count = 1_000  # of the optimiser (L-BFGS), at most

    name = "probe"

    def _fitted(self, seen: np.ndarray, labels: np.ndarray) -> tuple[Any, dict[str, Any]]:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        judge = LogisticRegression(C=self.inverse_penalty, max_iter=self.iterations)
        with warnings.catch_warnings():  # it is a figure of the result
            warnings.simplefilter("ignore", ConvergenceWarning)
            judge.fit(seen, labels)
        return judge, {"probe_converged": bool(np.max(judge.n_iter_) < self.iterations)}


@dataclass(frozen=True)
class Neighbours(_Judged):
    """Accuracy on test images of the majority of their k nearest training images.

    Near is the Euclidean distance of standardised features; of classes with as many votes the smaller number wins.
    """

    k: Count = 10

    name = "knn"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k > self.train:
            raise UserError(
                f"k={self.k} of the metric knn is more than train={self.train}; choose k={self.train} or less"
            )

    def _fitted(self, seen: np.ndarray, labels: np.ndarray) -> tuple[Any, dict[str, Any]]:
        from sklearn.neighbors import KNeighborsClassifier

        if self.k > len(labels):
            raise UserError(
                f"k={self.k} of the metric knn is more than the {len(labels):,} training examples; choose k={len(labels)} or "
                "less"
            )
        return KNeighborsClassifier(self.k, algorithm="brute").fit(seen, labels), {"knn_k": self.k}


# --- a trained classifier -------------------------------------------------------------------------


@dataclass(frozen=True)
class Accuracy(Metric):
    """Share of held-out examples whose largest logit is that of their label, and the mean cross entropy."""

    split: str = "test"
    batch: Count = 256
    limit: Count | None = None  # examples at most, a fixed random choice; None: all
    every: Whole = 0  # steps between measurements while training; 0: at the end only

    name = "accuracy"
    needs = (Classifies,)

    def check_data(self, task: Any, data: Any) -> None:
        """UserError for data without labels, or that do not fit the task; asked before a run's first step."""
        check_splits(self, task, data, self.split, label=True)

    def __call__(self, task: Any, params: Params, data: Any, rng: jax.Array) -> dict[str, Any]:
        """`accuracy` and `nll` (nats) with their standard errors, and of how many examples.

        Raises:
            UserError: no labels, labels that the classifier has no logit for, logits that are not finite.
        """
        self.check_data(task, data)
        spec, hits, nats = spec_of(task, self.batch, label=True), 0, []
        for batch, count in epoch(data, self.batch, split=self.split, spec=spec, limit=self.limit, seed=0):
            label = batch.pop("label")[:count]
            logits = finite(jitted(task, "logits")(params, batch), "logits", task, self)[:count].astype(np.float64)
            if not (label.min() >= 0 and label.max() < logits.shape[1]):
                raise UserError(
                    f"labels out of range: the {self.split} split of data={type(data).__name__} has {label.min()} to "
                    f"{label.max()}, the classifier 0 to {logits.shape[1] - 1}; give data of the classes it was trained on"
                )
            hits += int((logits.argmax(1) == label).sum())
            top = logits.max(1)
            nats.append(top + np.log(np.exp(logits - top[:, None]).sum(1)) - logits[np.arange(count), label])
        values = np.concatenate(nats)
        return {
            "accuracy": hits / len(values),
            "accuracy_std_error": share_error(hits, len(values)),
            "nll": float(values.mean()),
            "nll_std_error": std_error(values),
            "examples": len(values),
            "split": self.split,
        }


def explained(guess: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """R^2 of guesses [M, R] by column, against the mean of the true values; nan where these are all the same."""
    guess, truth = guess.astype(np.float64), truth.astype(np.float64)
    left, spread = ((guess - truth) ** 2).sum(0), ((truth - truth.mean(0)) ** 2).sum(0)
    return 1 - left / np.where(spread > 0, spread, np.nan)
