"""PART's own metrics: how well relations between patches are predicted, and the layout that predictions alone give back.

B images, N patches, A axes, R channels of a relation, M held-out images. "Images" below are series too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from zoo import dist
from zoo.data.pipeline import epoch
from zoo.errors import UserError
from zoo.fields import AtLeast2, Count, NonNegative, Whole
from zoo.metrics.drawing import layouts
from zoo.metrics.probe import check_splits, explained, finite, fresh, jitted, spec_of
from zoo.papers.part.sampling import relation
from zoo.task import Batch, Metric, Params

_PAIRS = 4_096  # of an image that are compared at most, a fixed random choice
AXES = {1: ("dt",), 2: ("dx", "dy")}  # names of the offsets along A axes
_FEWEST = 3  # patches with ink that an image needs to be ranked by them


def check_patches(metric: Any, task: Any, patches: int) -> None:
    """UserError for a single patch, which cannot be compared with another."""
    if patches < 2:
        one = {"images": "an image", "series": "a series"}.get(task.about.unit, "an example")
        raise UserError(
            f"the metric {metric.name} compares patches, and {type(task).__name__} cuts {patches} from {one}; give it a "
            "smaller task.patch"
        )


def shapes(task: Any, metric: Any, call: Any) -> Any:
    """The shapes that `call(params, batch, rng)` gives for a batch of the metric."""
    params = dist.unbox(jax.eval_shape(task.init, jax.random.key(0)))
    return jax.eval_shape(call, params, spec_of(task, metric.batch, label=False), jax.random.key(0))


@runtime_checkable
class OffGrid(Protocol):
    """Encodes patches off the grid: the metric `localise`."""

    def off_grid(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens [B, N, D] of random patches, and their boxes [B, N, 2, A]."""
        ...


@runtime_checkable
class Relates(Protocol):
    """Tells how patches lie to each other: the metric `relations`."""

    @property
    def relation_names(self) -> tuple[str, ...]:
        """What the R numbers of a relation are ("dx", "dy")."""
        ...

    def relations(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """Relations of random patches, `predicted` and `true` [B, N, N, R], their `patches`, `boxes` and rebuilt `layout`."""
        ...


@dataclass(frozen=True)
class Relations(Metric):
    """Predicted relations of the patches of held-out images against the true ones, and the layout rebuilt from them alone.

    R^2 and the mean absolute error of each channel, over pairs of different patches, stand against a constant, the mean of
    the held-out values; `r2_shuffled` has the true relations of another image, which nothing can predict.
    `layout` is the Spearman correlation of true and rebuilt coordinates of an image's patches, a mean over axes and images
    (a rebuilt coordinate that is all the same counts as 0); `layout_shuffled` has the true boxes shuffled among the patches.
    Blank patches have no place, so `layout_ink` is of those with ink; an image with fewer than three is passed over.
    """

    test: AtLeast2 = 500  # held-out images at most, a fixed random choice
    ink: NonNegative = (
        0.1  # standard deviation of a patch's levels in [0, 1] above which it has ink; of series, of their own values
    )
    images: Count = 6  # in the picture
    picture: bool = True  # True: draw images, their boxes and both layouts
    batch: Count = 100
    every: Whole = 0  # steps between measurements while training; 0: at the end only

    name = "relations"
    needs = (Relates,)

    def check_data(self, task: Any, data: Any) -> None:
        """UserError for data that cannot be read or do not fit the task, and for fewer than two test examples or patches.

        Asked before a run's first step.
        """
        check_splits(self, task, data, "test", fewest=2)
        measured, _ = shapes(task, self, _measured(task))
        check_patches(self, task, measured["boxes"].shape[1])

    def __call__(self, task: Any, params: Params, data: Any, rng: jax.Array) -> dict[str, Any]:
        """By channel `r2_dx`, `mae_dx`, `mae_constant_dx`, `r2_shuffled_dx`; `layout_all`, `layout_ink`, `layout_shuffled`.

        `pictures` has the PIL image `layout`. Patches follow from rng and the place of their batch.

        Raises:
            UserError: what `check_data` refuses, predictions that are not finite.
        """
        self.check_data(task, data)
        spec = task.spec(self.batch)
        parts: list[dict[str, np.ndarray]] = []
        shown: dict[str, np.ndarray] = {}
        for k, (batch, count) in enumerate(epoch(data, self.batch, spec=spec, limit=self.test, seed=0)):
            measured, patches = _measured(task)(params, batch, jax.random.fold_in(rng, k))
            parts.append({key: x[:count] for key, x in finite(measured, "relations", task, self).items()})
            if self.picture and (missing := self.images - len(shown.get("patches", ()))) > 0:
                some = {"example": batch["image" if "image" in batch else "series"], "patches": patches}
                new = {key: x[: min(count, missing)] for key, x in finite(some, "relations", task, self).items()}
                shown = {key: np.concatenate([shown[key], x]) if shown else x for key, x in new.items()}
        whole = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        placed, scores = self._layout(whole["boxes"], whole["layout"], whole["ink"] > self.ink)
        found = {**_channels(task.relation_names, whole["predicted"], whole["true"]), **placed}
        found |= {"images": len(whole["boxes"])}
        if self.picture:
            n = len(shown["patches"])
            found["pictures"] = {
                "layout": layouts(
                    shown["example"],
                    shown["patches"],
                    whole["boxes"][:n],
                    in_pixels(whole["layout"][:n], whole["boxes"][:n]),
                    [_caption(*score) for score in scores[:n]],
                )
            }
        return found

    def _layout(
        self, boxes: np.ndarray, layout: np.ndarray, inked: np.ndarray
    ) -> tuple[dict[str, Any], list[tuple[float, float | None]]]:
        """The figures of the layouts [M, N, 2, A]; of each image its correlation over all patches and over those with ink."""
        true, rebuilt = (x[..., 0, :] + x[..., 1, :] / 2 for x in (boxes.astype(np.float64), layout.astype(np.float64)))
        coin = np.random.default_rng(0)
        every, some, shuffled = [], [], []
        for t, r, ink in zip(true, rebuilt, inked):
            every.append(spearman(t, r))
            some.append(spearman(t[ink], r[ink]) if ink.sum() >= _FEWEST else None)
            shuffled.append(spearman(coin.permutation(t), r))
        known = [score for score in some if score is not None]
        found: dict[str, Any] = {"layout_all": _mean(every), "layout_all_std_error": _std_error(every)}
        if known:
            found |= {"layout_ink": _mean(known), "layout_ink_std_error": _std_error(known)}
        found |= {"layout_ink_images": len(known), "layout_shuffled": _mean(shuffled)}
        return found, list(zip(every, some))


@lru_cache(maxsize=8)
def _measured(task: Any) -> Any:
    """A jitted (params, batch, rng) -> relations of the pairs [B, P, R], boxes, layout, ink [B, N]; and the patches."""

    def measure(params: Params, batch: Any, rng: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        out = task.relations(params, jax.tree.map(lambda x: dist.constrain(x, "batch"), batch), rng)
        patches = out["patches"]
        i, j = _pairs(patches.shape[1])
        within = tuple(range(2, patches.ndim - 1))
        # over pixels and not over channels: a patch of one colour is blank. Pixels are in [-1, 1], levels in [0, 1]
        ink = jnp.sqrt(jnp.var(patches.astype(jnp.float32), within).mean(-1)) / (2 if len(within) == 2 else 1)
        pairs = {key: out[key][:, i, j].astype(jnp.float32) for key in ("predicted", "true")}
        return {**pairs, "boxes": out["boxes"], "layout": out["layout"], "ink": ink}, patches

    return jax.jit(measure)


def _pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """References and targets of the ordered pairs of different patches that are compared."""
    i, j = np.nonzero(~np.eye(n, dtype=bool))
    if len(i) > _PAIRS:
        chosen = np.sort(np.random.default_rng(0).permutation(len(i))[:_PAIRS])
        i, j = i[chosen], j[chosen]
    return i, j


def _channels(names: tuple[str, ...], predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Figures of each channel of relations [M, P, R]."""
    other = np.roll(true, 1, 0)
    guess, truth, other = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (predicted, true, other))
    columns = {
        "r2": explained(guess, truth),
        "mae": np.abs(guess - truth).mean(0),
        "mae_constant": np.abs(truth.mean(0) - truth).mean(0),
        "r2_shuffled": explained(guess, other),
    }
    return {
        f"{key}_{name}": float(x) + 0.0  # no -0.0
        for key, column in columns.items()
        for name, x in zip(names, column, strict=True)
    }


def in_pixels(layout: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Rebuilt boxes [..., N, 2, A], which have neither scale nor place, put where the true ones can be compared with them.

    They are multiplied by the geometric mean size of the true boxes and moved to the mean of their centres.
    """
    size = np.exp(np.log(boxes[..., 1, :]).mean(-2))  # [..., A]
    centre = (boxes[..., 0, :] + boxes[..., 1, :] / 2).mean(-2)
    out = layout.astype(np.float64) * size[..., None, None, :]
    middle = (out[..., 0, :] + out[..., 1, :] / 2).mean(-2)
    out[..., 0, :] += (centre - middle)[..., None, :]
    return out


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of columns [n, A], the mean over columns; 0 for a column that is all the same."""
    from scipy.stats import rankdata

    a, b = (rankdata(x, axis=0) - (len(x) + 1) / 2 for x in (a, b))
    return float(((a * b).sum(0) / np.sqrt(np.maximum((a * a).sum(0) * (b * b).sum(0), 1e-12))).mean())


def _caption(every: float, some: float | None) -> str:
    shown = [f"{round(x, 2) + 0.0:.2f}" for x in (every, some) if x is not None]  # + 0.0: no "-0.00"
    return "Spearman " + ", with ink ".join(shown)


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) + 0.0  # no -0.0


def _std_error(values: list[float]) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


# --- where patches lie ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Localise(Metric):
    """How well two patches' features tell where one lies from the other, by a linear map: R^2 on held-out images.

    The encoder is frozen. It sees random patches off the grid, rescaled; a ridge regression from [z_i ; z_j], standardised,
    to (dx, dy) = (c_j - c_i) / size_i is fitted to pairs of training images. 0 is what the mean offset reaches.
    """

    train: Count = 2_000  # images that the regression is fitted to, at most
    test: Count = 1_000  # held-out images, at most
    pairs: Count = 16  # of different patches, per image
    ridge: NonNegative = 1.0  # penalty on the squared weights, beside a sum of squares over all pairs
    batch: Count = 256
    baseline: bool = False  # True: also the figures of fresh parameters (`task.init`), the same patches
    every: Whole = 0  # steps between measurements while training; 0: at the end only

    name = "localise"
    needs = (OffGrid,)

    def check_data(self, task: Any, data: Any) -> None:
        """UserError for data that cannot be read or do not fit the task, and for a single patch; asked before a run's first step."""
        check_splits(self, task, data, "train", "test")
        tokens, _ = shapes(task, self, jitted(task, "off_grid"))
        check_patches(self, task, tokens.shape[1])

    def __call__(self, task: Any, params: Params, data: Any, rng: jax.Array) -> dict[str, Any]:
        """`localise_r2` and that of each axis, `localise_r2_dx` ...; with `baseline` also with `_random` at the end.

        Patches follow from rng and the place of their batch.

        Raises:
            UserError: what `check_data` refuses, features that are not finite.
        """
        self.check_data(task, data)
        draw, init = jax.random.split(rng)
        found = self._measure(task, params, data, draw)
        if self.baseline:
            other = self._measure(task, fresh(task, params, init), data, draw)
            found |= {f"{key}_random": value for key, value in other.items() if "_r2" in key}
        return found

    def _measure(self, task: Any, params: Params, data: Any, rng: jax.Array) -> dict[str, Any]:
        from sklearn.linear_model import Ridge
        from sklearn.preprocessing import StandardScaler

        counts, parts = {}, {}
        for fold, split in enumerate(("train", "test")):
            rows = list(self._pairs(task, params, data, split, jax.random.fold_in(rng, fold)))
            counts[split] = len(rows)
            parts[split] = [np.concatenate(x) for x in zip(*rows)]
        scale = StandardScaler(copy=False).fit(parts["train"][0])
        fit = Ridge(self.ridge).fit(scale.transform(parts["train"][0]), parts["train"][1])
        guess, truth = fit.predict(scale.transform(parts["test"][0])), parts["test"][1]
        r2 = explained(guess.reshape(truth.shape), truth)
        return {
            "localise_r2": float(r2.mean()) + 0.0,  # no -0.0
            **{f"localise_r2_{axis}": float(r) + 0.0 for axis, r in zip(AXES[truth.shape[1]], r2)},
            **{f"localise_{split}": count for split, count in counts.items()},
            "localise_pairs": self.pairs,
        }

    def _pairs(
        self, task: Any, params: Params, data: Any, split: str, rng: jax.Array
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of each image [z_i ; z_j] float64 [pairs, 2 D] and offsets float64 [pairs, A]."""
        coin = np.random.default_rng(0)
        spec, limit = spec_of(task, self.batch, label=False), {"train": self.train, "test": self.test}[split]
        for k, (batch, count) in enumerate(epoch(data, self.batch, split=split, spec=spec, limit=limit, seed=0)):
            found = jitted(task, "off_grid")(params, batch, jax.random.fold_in(rng, k))
            tokens, boxes = finite(found, "off_grid", task, self)
            n = tokens.shape[1]
            for z, box in zip(tokens[:count].astype(np.float64), boxes[:count].astype(np.float64)):
                i = coin.integers(n, size=self.pairs)
                j = (i + coin.integers(1, n, size=self.pairs)) % n
                yield np.concatenate([z[i], z[j]], 1), np.asarray(relation(box[i], box[j], sizes=False))
