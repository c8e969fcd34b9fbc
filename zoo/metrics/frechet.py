"""Frechet distance between samples and training images, in pixels or in the features of a trained network.

FID is this distance in the features of one Inception network, whose weights are not part of zoo: figures from other
features compare with each other, not with published ones. N images, D features.
"""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo import files, hosts, weights
from zoo.data.arrays import open_npz
from zoo.data.pipeline import epoch
from zoo.errors import UserError
from zoo.fields import AtLeast2, Count, Whole
from zoo.metrics.samples import MAX_DIMS, check_images, drawer, held_out, image_shape
from zoo.task import Metric, Options, Params, Samples, abilities, options_of

_PIXELS = "pixels"
_RETRIES = 3  # times that a sample which is not finite is drawn again, from new noise


@dataclass(frozen=True)
class Moments:
    """Number, mean [D] and unbiased covariance [D, D] of feature vectors, float64; of no use for fewer than two."""

    count: int
    mean: np.ndarray
    covariance: np.ndarray


def moments(parts: Iterable[np.ndarray]) -> Moments:
    """Moments of all rows of `parts`, each [N, D]; merged part by part (Chan, Golub, LeVeque 1979), so N has no bound."""
    count, mean, scatter = 0, np.zeros(()), np.zeros(())
    for part in parts:
        if not len(part):
            continue
        x = np.asarray(part, np.float64)
        total = count + len(x)
        centre = x.mean(0)
        shift = centre - mean
        x = x - centre
        scatter = scatter + x.T @ x + np.outer(shift, shift) * (count * len(x) / total)
        mean = mean + shift * (len(x) / total)
        count = total
    return Moments(count, mean, scatter / max(count - 1, 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), the squared distance of Dowson and Landau (1982).

    The trace of the last root is the sum of the singular values of A^1/2 B^1/2. Taken from there, nothing noisy is
    ever put under a root, and covariances of fewer vectors than dimensions do no harm.
    """
    (root_a, axes_a), (root_b, axes_b) = _root(a.covariance), _root(b.covariance)
    overlap = np.linalg.svd(root_a[:, None] * (axes_a.T @ axes_b) * root_b, compute_uv=False).sum()
    apart = np.square(a.mean - b.mean).sum()
    return max(0.0, float(apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap))


def _root(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Roots of the eigenvalues [D] and the eigenvectors [D, D], in columns."""
    values, vectors = np.linalg.eigh(covariance)
    return np.sqrt(np.maximum(values, 0)), vectors


def quantise(image: jax.Array) -> jax.Array:
    """Images in [-1, 1] as the grey levels 0..255 of an 8-bit file, clipped and truncated as arXiv:2412.06329 evaluates."""
    return jnp.floor(0.5 * (jnp.clip(image, -1, 1) + 1) * 255)


@dataclass(frozen=True)
class Frechet(Metric):
    """Frechet distance of samples to the data, both as 8-bit images.

    Labels of a conditional model are balanced; sample i of one with captions has those of test example i mod N of the
    run's data. A run on latents has no images: `path` describes them.

    `reference` is a file in which the statistics of the data are kept: read where it exists and was made with the same
    settings, else written.
    """

    features: str = ""  # "pixels", or a run or export whose task has features
    samples: AtLeast2 = 50_000
    split: str = "train"  # what the samples are compared with
    limit: AtLeast2 | None = None  # images of it at most
    path: Any = None  # a data description of real images; None: the data of the run
    flip: bool | None = None  # mirror a random half of these images; None: as the data do in training
    reference: str | None = None  # .npz file of statistics; None: measured every time
    options: Options = field(default_factory=dict)  # of the task's `sample`
    batch: Count = 128
    every: Whole = 0  # steps between measurements while training; 0: at the end only

    name = "frechet"
    needs = (Samples,)

    def check(self, task: Any) -> None:
        """UserError for a task that draws no images, or none such as these; asked before a run's first step."""
        shape = self._shape(task)
        if self.opens() is None:
            _check_dims(shape)
        if self.path is not None:
            check_images(self, None, self.split, shape)

    def opens(self) -> str | None:
        """The run or export whose features are wanted, for the caller to open; None for pixels.

        Raises:
            UserError: no features were chosen.
        """
        if not self.features:
            raise UserError(
                "the metric frechet has no features; choose features=pixels (images of at most "
                f"{MAX_DIMS:,} numbers), or features=RUN_OR_EXPORT of a task that has features. Inception weights "
                "are not part of zoo, so the figure does not compare with a published FID"
            )
        return None if self.features == _PIXELS else self.features

    def __call__(self, task: Any, params: Params, data: Any, rng: jax.Array, network: Any = None) -> dict[str, Any]:
        """The distance as `frechet`, and what it was measured with. Sample i depends on (rng, i) alone.

        A sample that is not finite is drawn again and counted; one that stays so is left out and counted. With fewer
        than two samples left the distance is NaN.

        Args:
            network: what `opens()` names, opened: anything with `task` and `params`.

        Raises:
            UserError: a task that draws no images, data without such, features that do not fit, unknown options,
                statistics made with other settings.
        """
        shape = self._shape(task, params)
        features, about = self.extractor(shape, network)
        images = data if self.path is None else self.path
        check_images(self, data, self.split, shape)
        spec = {"image": jax.ShapeDtypeStruct((1, *shape), jnp.float32)}
        reference = self._statistics(images, spec, features, about)
        tally: Counter[str] = Counter()
        sampled = moments(self._sample_features(task, params, data, rng, features, tally))
        asked = [key for key in self._conditions(task) if key != "label"]
        return {
            "frechet": frechet_distance(sampled, reference) if sampled.count > 1 else float("nan"),
            "frechet_features": self.features if network is None else f"{self.features} ({about})",
            "frechet_samples": sampled.count,
            "frechet_resampled": tally["resampled"],
            "frechet_left_out": tally["left_out"],
            "frechet_images": reference.count,
            "frechet_split": self.split,
            "frechet_flip": int(self._flips(images)),
            "frechet_labels": "balanced" if _classes(task) else "none",
            "frechet_conditions": (
                "captions of the test split" if asked else "balanced labels" if _classes(task) else "none"
            ),
            "frechet_options": json.dumps({k: self.options[k] for k in sorted(self.options)}, default=repr),
        }

    def statistics(self, data: Any, spec: Mapping[str, Any], network: Any = None) -> Moments:
        """Moments of the data's features alone; read from `reference` or kept there, as in a measurement.

        Args:
            spec: shape of `image` in a batch.
            network: what `opens()` names, opened.

        Raises:
            UserError: features that do not fit, statistics made with other settings.
        """
        return self._statistics(data, spec, *self.extractor(spec["image"].shape[1:], network))

    def _conditions(self, task: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of what a batch of samples is conditioned on."""
        keys = {*task.about.conditions, *(("label",) if _classes(task) else ())}
        return {key: leaf for key, leaf in task.spec(self.batch).items() if key in keys}

    def _shape(self, task: Any, params: Params | None = None) -> tuple[int, ...]:
        """[H, W, C] of the images that the task draws."""
        options_of(task, self.options, "options of the metric frechet")
        shape = image_shape(task, self.options, self.batch, self._conditions(task), params)
        if shape is None:
            raise UserError(
                f"the metric frechet compares images, and {type(task).__name__} draws none; give a task whose samples have "
                "images (of latents: one that holds an autoencoder, task.vae)"
            )
        return shape

    def _flips(self, data: Any) -> bool:
        return data.mirrored if self.flip is None else self.flip

    def _statistics(
        self, data: Any, spec: Mapping[str, Any], features: Callable[[Any], np.ndarray], about: str
    ) -> Moments:
        def measure() -> Moments:
            return moments(self._data_features(data, spec, self._flips(data), features))

        if self.reference is None:
            return measure()
        images = len(data.source(self.split, spec))
        settings = {
            "features": about,
            # what the images are, not where they lie, wherever the data can tell
            "data": data.fingerprint(self.split) or repr(data),
            "split": self.split,
            "images": images if self.limit is None else min(images, self.limit),
            "flip": self._flips(data),
            "shape": list(spec["image"].shape[1:]),
        }
        return _kept(Path(self.reference), settings, measure)

    def extractor(self, shape: tuple[int, ...], network: Any) -> tuple[Callable[[Any], np.ndarray], str]:
        """A function from images [N, S, S, C] in [-1, 1] to [N, D], and what identifies it."""
        name = self.opens()
        if name is None:
            _check_dims(shape)
            pixels = jax.jit(lambda image: (quantise(image) / 255).reshape(len(image), -1))
            return lambda image: hosts.fetch(pixels(image)), _PIXELS
        if network is None:
            raise UserError(
                f"features={name} of the metric frechet is not open; pass network=zoo.models.open_model({name!r})"
            )
        kind = type(network.task).__name__
        if "features" not in abilities(network.task):
            raise UserError(
                f"features={name} of the metric frechet: {kind} has no features, it can: "
                f"{', '.join(abilities(network.task))}; choose a task that has"
            )
        wanted = network.task.spec(1)
        if "image" not in wanted or wanted["image"].shape[1:] != shape:
            takes = list(wanted["image"].shape[1:]) if "image" in wanted else "no images"
            raise UserError(
                f"features={name} of the metric frechet: {kind} takes {takes}, the model makes images of "
                f"{list(shape)}; choose a feature network for such images"
            )

        # off the devices and back: they were loaded for one device, and there may be a mesh of many here
        params = jax.tree.map(jnp.asarray, jax.device_get(network.params))

        @jax.jit
        def extract(params: Params, image: jax.Array) -> jax.Array:
            return network.task.features(params, {"image": 2 * quantise(image) / 255 - 1})

        def checked(image: Any) -> np.ndarray:
            found = hosts.fetch(extract(params, image))
            if not np.isfinite(found).all():
                raise UserError(
                    f"features={name} of the metric frechet: {kind} gives features that are not finite; "
                    "choose another feature network"
                )
            return found

        return checked, f"{kind}, weights {weights.digest(network.params, repr(network.task))}"

    def _data_features(
        self, data: Any, spec: Mapping[str, Any], flip: bool, features: Callable[[Any], np.ndarray]
    ) -> Iterator[np.ndarray]:
        coin = np.random.default_rng(0)
        for batch, count in epoch(data, self.batch, split=self.split, spec=spec, limit=self.limit):
            image = batch["image"]
            if flip:
                mirrored = np.zeros(len(image), bool)
                mirrored[:count] = coin.random(count) < 0.5
                image = np.where(mirrored[:, None, None, None], image[:, :, ::-1], image)
            yield features(image)[:count]

    def _sample_features(
        self,
        task: Any,
        params: Params,
        data: Any,
        rng: jax.Array,
        features: Callable[[Any], np.ndarray],
        tally: Counter[str],
    ) -> Iterator[np.ndarray]:
        classes, draw = _classes(task), drawer(task, self.options)
        conditions = held_out(task, data, self.batch, self.samples)
        for first in range(0, self.samples, self.batch):
            count = min(self.batch, self.samples - first)
            indices = np.arange(first, first + self.batch, dtype=np.int32)
            given = {**({"label": indices % classes} if classes else {}), **next(conditions)}
            image = np.array(hosts.fetch(draw(params, jax.random.fold_in(rng, 0), indices, given)))
            for attempt in range(1, _RETRIES + 1):
                bad = ~_finite(image)
                bad[count:] = False
                if not bad.any():
                    break
                tally["resampled"] += int(bad.sum())
                image[bad] = hosts.fetch(draw(params, jax.random.fold_in(rng, attempt), indices, given))[bad]
            good = _finite(image)
            tally["left_out"] += count - int(good[:count].sum())
            image[~good] = 0  # keeps one compiled shape; these rows are not counted
            yield features(image)[:count][good[:count]]


def _check_dims(shape: tuple[int, ...]) -> None:
    dims = int(np.prod(shape))
    if dims > MAX_DIMS:
        raise UserError(
            f"features=pixels of the metric frechet: images have {dims:,} numbers, and at most {MAX_DIMS:,} "
            "are compared; use features=RUN_OR_EXPORT of a task that has features"
        )


def _finite(image: np.ndarray) -> np.ndarray:
    return np.isfinite(image).all((1, 2, 3))


def _classes(task: Any) -> int:
    return task.about.classes if "label" in task.spec(1) else 0


def _kept(path: Path, settings: Mapping[str, Any], measure: Callable[[], Moments]) -> Moments:
    """Statistics from a file made with the same settings; measured and written where there is no file.

    Raises:
        UserError: the file was made with other settings or by something else, or cannot be written.
    """
    remedy = "remove it, or give reference another name"
    # every process takes the same way: measuring is shared among them
    if hosts.all_agree(path.exists(), "for statistics of the metric frechet"):
        with open_npz(path) as file:
            try:
                found = json.loads(str(file["settings"]))
                kept = Moments(int(file["count"]), file["mean"], file["covariance"])
                size = len(kept.mean)
                whole = kept.covariance.shape == (size, size) and isinstance(found, dict)
            except Exception:  # a missing or damaged member, whatever zipfile, numpy or json make of it
                whole = False
        if not whole:
            raise UserError(f"{path} holds no statistics of the metric frechet; {remedy}")
        differ = [f"{k}: {found.get(k)} -> {v}" for k, v in settings.items() if found.get(k) != v]
        if differ:
            raise UserError(f"{path} was made with other settings ({'; '.join(differ)}); {remedy}")
        return kept
    way = "set reference to a file that you may write"
    with files.writing(path, way):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    measured = measure()
    if hosts.main():
        with files.writing(path, way), files.whole(path) as part, open(part, "wb") as out:
            np.savez(
                out,
                settings=np.array(json.dumps(settings)),
                count=np.array(measured.count),
                mean=measured.mean,
                covariance=measured.covariance,
            )
    return measured
