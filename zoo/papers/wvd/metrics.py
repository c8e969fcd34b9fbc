"""What clips are worth as geometry: errors of points, depth and cameras, agreement of frames, and PSNR of what both views see.

Pure functions of finished clips, in NumPy on the host, and below them the metric that asks a model for clips. B clips, F frames;
`points` and `frames` [B, F, H, W, 3], the latter in [-1, 1], `seen` bool [B, F, H, W], `camera` [B, F, 4, 4], `focal` [B].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from zoo.cameras import project
from zoo.data.pipeline import epoch
from zoo.errors import UserError
from zoo.fields import AtLeast2, Count, Whole
from zoo.metrics.probe import finite
from zoo.metrics.samples import drawer
from zoo.papers.wvd.geometry import Cameras, align, angle_between, area_under, depth_of, pose_errors, solve
from zoo.papers.wvd.projection import shared
from zoo.task import Metric, Options, Params, Samples, options_of

Figures = dict[str, float]


def point_error(points: np.ndarray, true: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Mean Euclidean distance of seen points, of each clip [B]."""
    far = np.linalg.norm(points - true, axis=-1)
    return np.where(seen, far, 0).sum((1, 2, 3)) / np.maximum(seen.sum((1, 2, 3)), 1)


def aligned(points: np.ndarray, true: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Points after the similarity of each clip that brings its seen ones nearest to the true ones; as they are where none does."""
    out = []
    for x, y, mask in zip(points, true, seen):
        try:
            out.append(align(x[mask], y[mask]).points(x.reshape(-1, 3)).reshape(x.shape))
        except UserError:  # all points in one place
            out.append(x)
    return np.stack(out)


def point_figures(points: np.ndarray, true: np.ndarray, seen: np.ndarray, mean: np.ndarray | None = None) -> Figures:
    """`points` raw and aligned and their median, beside those of the next clip's points (`shuffled`) and of a `mean` [F, H, W, 3].

    What a model knows of a clip is what its error is below that of another clip's points. One sample of a posterior that knows
    nothing has 1.41 times the r.m.s. error of the mean: averages of samples are what a mean predictor compares with.
    """
    other = np.roll(points, 1, 0)
    each = np.linalg.norm(points - true, axis=-1)[seen]
    found = {
        "points": point_error(points, true, seen).mean(),
        "points_median": np.median(each),
        "points_aligned": point_error(aligned(points, true, seen), true, seen).mean(),
        "points_shuffled": point_error(other, true, seen).mean(),
        "points_shuffled_aligned": point_error(aligned(other, true, seen), true, seen).mean(),
    }
    if mean is not None:
        found["points_mean"] = point_error(np.broadcast_to(mean, true.shape), true, seen).mean()
    return {key: float(x) for key, x in found.items()}


def depth_figures(depth: np.ndarray, true: np.ndarray, seen: np.ndarray) -> Figures:
    """Of depths [B, F, H, W], scaled clip by clip by the ratio of medians: relative error, shares within factors 1.25 and 1.03.

    A depth that is not positive is wrong by all of it; clips without a finite depth are left out.
    """
    errors, ratios = [], []
    for x, y, mask in zip(depth, true, seen & np.isfinite(depth)):
        if not mask.any():
            continue
        a, b = x[mask], y[mask]
        scale = np.median(b) / max(float(np.median(a)), 1e-9)
        a = np.maximum(a * scale, 1e-9)
        errors.append(np.abs(a - b) / b)
        ratios.append(np.maximum(a / b, b / a))
    if not errors:
        return {}
    ratio = np.concatenate(ratios)
    found = {
        "depth_rel": np.concatenate(errors).mean(),
        "depth_1.25": (ratio < 1.25).mean(),
        "depth_1.03": (ratio < 1.03).mean(),
    }
    return {key: float(x) for key, x in found.items()}


def cameras_of(points: np.ndarray, seen: np.ndarray) -> list[Cameras]:
    """The cameras of each clip, with one focal length for its frames."""
    return [solve(x, mask, one_focal=True) for x, mask in zip(points, seen)]


def pose_figures(found: list[Cameras], camera: np.ndarray, focal: np.ndarray) -> Figures:
    """Errors of cameras that were read off points, in degrees (medians): of pairs of frames and, `absolute`, of single ones.

    `pose_identity` is that of cameras that never turn, `auc30` the area under the share of pairs whose larger error, of turn or
    direction, is below a threshold up to 30 degrees. Frames without a camera count as lost there, and in `unsolved`.
    """
    true = camera.astype(np.float64)
    eyes = [one.camera for one in found]
    still = np.broadcast_to(np.eye(4), true.shape)
    turn, move = (np.concatenate(errors) for errors in zip(*map(pose_errors, eyes, true)))
    medians = {
        "pose_turn": turn,
        "pose_move": move,
        "pose_identity": np.concatenate([pose_errors(*pair)[0] for pair in zip(still, true)]),
        "pose_absolute": angle_between(np.stack(eyes)[..., :3, :3], true[..., :3, :3]),
        "focal_off": np.abs(np.stack([one.focal / f for one, f in zip(found, focal)]) - 1),
    }
    figures = {"unsolved": float(np.mean([[bool(why) for why in one.refused] for one in found]))}
    figures |= {key: float(np.nanmedian(x)) for key, x in medians.items() if np.isfinite(x).any()}
    return {**figures, "auc30": area_under(np.maximum(turn, move))} if len(turn) else figures


def reprojection(points: np.ndarray, found: list[Cameras], seen: np.ndarray) -> float:
    """R.m.s. distance in pixels of points from their pixels under their own cameras: whether images of points are views at all."""
    height, width = seen.shape[2:]
    at = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), -1)
    squares = []
    for x, one, mask in zip(points.astype(np.float64), found, seen):
        ok = np.asarray([not why for why in one.refused])
        if not ok.any():
            continue
        where, depth = project(x[ok], one.camera[ok], one.focal[ok], height, width)
        squares.append(((where - at) ** 2).sum(-1)[mask[ok] & (depth > 0)])
    every = np.concatenate(squares) if squares else np.zeros(0)
    return float(np.sqrt(every.mean())) if len(every) else float("nan")


def agreement(frames: np.ndarray, points: np.ndarray, seen: np.ndarray, found: list[Cameras]) -> Figures:
    """Whether frames that see the same place agree there: medians over all pairs of frames of a clip, without any truth.

    A pixel of one frame is looked up in another by its point and that one's camera, blended between four pixels:
    `agree_points` and `agree_frames` are distances of points and of colours, `agree_random` that of colours of pixels that
    are paired at random among those, `covisible` the share of pixels that have a partner. A ratio `agree_frames` /
    `agree_random` of 1 is no correspondence.
    """
    near, same, random, share = [], [], [], []
    rng = np.random.default_rng(0)
    for image, x, mask, one in zip(frames, points.astype(np.float64), seen, found):
        ok = [f for f, why in enumerate(one.refused) if not why]
        for i in ok:
            for j in ok:
                if i == j:
                    continue
                where, both = shared(x[i], one.camera[j], one.focal[j], x[j], mask[j])
                both &= mask[i]
                share.append(both.mean())
                there = _blended(np.concatenate([x[j], image[j]], -1), where[both])
                here = np.concatenate([x[i], image[i]], -1)[both]
                near.append(np.linalg.norm(here[:, :3] - there[:, :3], axis=-1))
                same.append(np.linalg.norm(here[:, 3:] - there[:, 3:], axis=-1))
                random.append(np.linalg.norm(here[:, 3:] - rng.permutation(there[:, 3:]), axis=-1))
    if not sum(map(len, near)):
        return {"covisible": 0.0}
    medians = {"agree_points": near, "agree_frames": same, "agree_random": random}
    return {key: float(np.median(np.concatenate(x))) for key, x in medians.items()} | {
        "covisible": float(np.mean(share))
    }


def _blended(image: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Values [N, C] of an image [H, W, C] at places [N, 2], between the four pixels around."""
    height, width = image.shape[:2]
    at = np.clip(where - 0.5, 0, np.array([width, height]) - 1.0)
    corner = np.minimum(np.floor(at).astype(int), np.maximum(np.array([width, height]) - 2, 0))
    a, b = (at - corner).T[..., None]
    x, y = corner.T
    right, down = np.minimum(x + 1, width - 1), np.minimum(y + 1, height - 1)
    upper = image[y, x] * (1 - a) + image[y, right] * a
    return upper * (1 - b) + (image[down, x] * (1 - a) + image[down, right] * a) * b


def covisible_with_first(points: np.ndarray, seen: np.ndarray, camera: np.ndarray, focal: np.ndarray) -> np.ndarray:
    """Whether the first frame sees the points of each pixel, bool [B, F, H, W], by true points and cameras."""
    first = np.broadcast_to(points[:, :1], points.shape)
    lengths = np.broadcast_to(focal[:, None], camera.shape[:2])
    eye = np.broadcast_to(camera[:, :1], camera.shape)
    return shared(points, eye, lengths, first, np.broadcast_to(seen[:, :1], seen.shape))[1] & seen


def psnr(frames: np.ndarray, true: np.ndarray, where: np.ndarray) -> float:
    """Peak signal to noise in dB of images in [-1, 1], over the pixels `where` [B, F, H, W]; NaN where there are none."""
    error = ((np.clip(frames, -1, 1) - true) ** 2)[where]
    return float(10 * np.log10(4 / max(float(error.mean()), 1e-12))) if len(error) else float("nan")


def frame_figures(frames: np.ndarray, true: np.ndarray, covisible: np.ndarray) -> Figures:
    """PSNR of all frames but the first, which is given: of `covisible` pixels, which the first one shows, and of `new` ones.

    The first kind tells of geometry: there the colours are known, and the place is what can be wrong. `psnr_copy` is that
    of the first frame, standing still.
    """
    later, truth, both = frames[:, 1:], true[:, 1:], covisible[:, 1:]
    every = np.ones_like(both)
    found = {
        "psnr": psnr(later, truth, every),
        "psnr_covisible": psnr(later, truth, both),
        "psnr_new": psnr(later, truth, ~both),
        "psnr_copy": psnr(np.broadcast_to(true[:, :1], truth.shape), truth, every),
    }
    return {key: x for key, x in found.items() if np.isfinite(x)}


# --- the metric -----------------------------------------------------------------------------------


def _clips(drawn: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {key: drawn[key] for key in ("frames", "points") if key in drawn}


@dataclass(frozen=True)
class Geometry(Metric):
    """Held-out clips completed in three tasks, each beside its controls.

    stereo, all images given: errors of points, depth and cameras, of the same when the images are those of another clip
    (`_shuffled`), and of the mean of the training clips' points (`points_mean`). render, the first image and all points given: PSNR of
    the other images, with the points of another clip (`psnr_wrong`) and without any (`psnr_none`, the task image). image: whether
    frames agree with each other. Of a model of images alone it is the PSNR of the task image (`psnr_none`).
    """

    split: str = "test"
    limit: AtLeast2 = 32  # clips at most, a fixed random choice
    draws: Count = 1  # samples of each clip whose points are averaged, in stereo
    batch: Count = 32
    options: Options = field(default_factory=dict)  # of the task's `sample`, besides `task`
    every: Whole = 0  # steps between measurements while training; 0: at the end only

    name = "geometry"
    needs = (Samples,)

    def check(self, task: Any) -> None:
        """UserError for a task that draws no clips."""
        if "frames" not in task.spec(1):
            raise UserError(
                f"the metric {self.name} compares clips, and {type(task).__name__} draws none; leave it out"
            )
        if "task" in self.options:
            raise UserError(f"the metric {self.name} asks for several tasks; leave task out of its options")
        options_of(task, self.options, f"options of the metric {self.name}")

    def check_data(self, task: Any, data: Any) -> None:
        """UserError where a clip has no other one to be told from; asked before a run's first step."""
        self.check(task)
        if len(data.source(self.split, task.spec(1))) < 2:
            raise UserError(
                f"the metric {self.name} tells a clip from another one, and the {self.split} split has one; give it more"
            )

    def __call__(self, task: Any, params: Params, data: Any, rng: jax.Array) -> dict[str, Any]:
        """Figures in the units of `points`, degrees and dB, under the names of the functions above."""
        self.check_data(task, data)
        true = self._true(task, data)
        count = len(true["frames"])

        def drawn(part: str, draw: int = 0, **changed: np.ndarray) -> dict[str, np.ndarray]:
            program = drawer(task, {**self.options, "task": part}, _clips)
            given, found = {**true, **changed}, []
            for first in range(0, count, self.batch):
                rows = np.arange(first, first + self.batch)
                one = program(
                    params, jax.random.fold_in(rng, draw), rows, {k: x[rows % count] for k, x in given.items()}
                )
                found.append(finite(one, "sample", task, self))
            return {key: np.concatenate([x[key] for x in found])[:count] for key in found[0]}

        figures: Figures = {}
        free = drawn("image")
        if "points" not in true:
            figures["psnr_none"] = psnr(
                free["frames"][:, 1:], true["frames"][:, 1:], np.ones(true["frames"][:, 1:].shape[:4], bool)
            )
            return {**figures, "clips": count, "split": self.split}
        points, seen = true["points"], true["seen"]
        mean = self._mean(task, data)
        stereo = np.mean([drawn("stereo", draw)["points"] for draw in range(self.draws)], 0)
        figures |= point_figures(stereo, points, seen, mean)
        found = cameras_of(stereo, seen)
        eyes, lengths = np.asarray(true["camera"]), true["focal"]
        figures |= pose_figures(found, eyes, lengths)
        other = pose_figures([*found[-1:], *found[:-1]], eyes, lengths)
        figures |= {f"{key}_shuffled": other[key] for key in ("pose_turn", "pose_absolute") if key in other}
        _, depth = project(points, eyes, np.broadcast_to(lengths[:, None], eyes.shape[:2]), *seen.shape[2:])
        drawn_depth = np.stack([depth_of(x, one.camera, one.focal) for x, one in zip(stereo, found)])
        figures |= depth_figures(drawn_depth, depth, seen)
        figures["reprojection"] = reprojection(stereo, found, seen)
        both = covisible_with_first(points, seen, eyes, lengths)
        figures |= frame_figures(drawn("render")["frames"], true["frames"], both)
        wrong = drawn("render", points=np.roll(points, 1, 0), seen=np.roll(seen, 1, 0))
        for key, clips in (("wrong", wrong), ("none", free)):
            figures[f"psnr_{key}"] = frame_figures(clips["frames"], true["frames"], both)["psnr"]
        figures |= agreement(
            free["frames"], free["points"], np.ones_like(seen), cameras_of(free["points"], np.ones_like(seen))
        )
        return {**{key: x for key, x in figures.items() if np.isfinite(x)}, "clips": count, "split": self.split}

    def _mean(self, task: Any, data: Any) -> np.ndarray:
        """The mean points [F, H, W, 3] of training clips, of which only a batch is kept at a time."""
        total, number, spec = np.zeros(task.spec(1)["points"].shape[1:]), 0, task.spec(self.batch)
        for batch, count in epoch(data, self.batch, split="train", spec={"points": spec["points"]}, limit=512, seed=0):
            total += batch["points"][:count].sum(0, dtype=np.float64)
            number += count
        return total / number

    def _true(self, task: Any, data: Any) -> dict[str, np.ndarray]:
        rows = [
            {key: np.asarray(x[:count]) for key, x in batch.items()}
            for batch, count in epoch(
                data, self.batch, split=self.split, spec=task.spec(self.batch), limit=self.limit, seed=0
            )
        ]
        return {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
