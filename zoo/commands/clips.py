"""Clips as samples: the arrays, GIF files of images over coordinates, coloured points, cameras, and a page that shows them.

A clip is `frames` [F, H, W, 3] in [-1, 1], `points` [F, H, W, 3], and where the sampler gives them `seen` bool [F, H, W], `camera`
[F, 4, 4] (NaN where a frame has none) and `focal` [] in pixels.
"""

from __future__ import annotations

import base64
import functools
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zoo import paths
from zoo.cameras import cameras_json, to_camera
from zoo.paths import Folder
from zoo.train.pictures import grid, save_png

_PAGE = "viewer.html"
_CLIPS = 16  # on the page at most
_POINTS = 200_000  # of a clip on the page at most
_SIDE = 128  # pixels that a GIF's side has at least
_JUMP = 10.0  # steps to the next pixel, in units of the median one, of points that hang between two surfaces

Clip = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Clips:
    """Samples that are clips, as `zoo.commands.draw.Form` has them.

    Of clip i: `000000.npz` (its arrays, as `zoo.data.posed.PointMaps` reads them), `000000.gif`, `000000.ply`, and
    `000000.cameras.json` where cameras are known; of all `viewer.html`, which asks no other file for anything, and `sheet.png`.
    """

    solve: Callable[[Any, Any], tuple[Any, Any, Any]] | None = None  # as of `zoo.task.Locates`

    key = "image"  # the strip: not a number where frames or points overflowed, whichever of them were given
    suffix = ".npz"

    def save(self, out: Folder, i: int, drawn: Mapping[str, np.ndarray], about: Mapping[str, str]) -> None:
        """Write clip i; its arrays last, so that where they are all is there."""
        clip = {key: drawn[key] for key in ("frames", "points", "seen", "camera", "focal") if key in drawn}
        clip["seen"] = np.asarray(clip.get("seen", np.ones(clip["points"].shape[:3], bool)))
        if "camera" not in clip and self.solve is not None:
            camera, focal, _ = self.solve(clip["points"], clip["seen"])
            clip |= {"camera": camera, "focal": np.asarray(focal)}
        paths.write(out / f"{i:06d}.gif", gif(clip, json.dumps(dict(about))))
        paths.write(out / f"{i:06d}.ply", ply(clip))
        if (told := cameras(clip)) is not None:
            paths.write(out / f"{i:06d}.cameras.json", told)
        file = io.BytesIO()
        arrays = {**clip, "frames": _levels(clip["frames"])}
        np.savez_compressed(file, **{key: np.asarray(x)[None] for key, x in arrays.items()})  # type: ignore[arg-type]
        paths.write(out / f"{i:06d}.npz", file.getvalue())

    def show(self, out: Folder, n: int) -> str:
        """Write the page and the sheet of the first clips."""
        clips = {f"{i:06d}": _read(out / f"{i:06d}.npz") for i in range(min(n, _CLIPS))}
        paths.write(out / _PAGE, page(clips))
        strips = [strip(clip) / np.float32(127.5) - 1 for clip in clips.values()]
        save_png(out / "sheet.png", grid(np.stack(strips), columns=1))
        return f"{_PAGE}, sheet.png"


def _read(path: Folder) -> dict[str, np.ndarray]:
    with paths.sentence(path), path.open("rb") as file:
        arrays = np.load(io.BytesIO(file.read()), allow_pickle=False)
        clip = {key: arrays[key][0] for key in arrays.files}
    return {**clip, "frames": clip["frames"] / np.float32(127.5) - 1}


def _levels(x: np.ndarray) -> np.ndarray:
    """uint8 of what lies in [-1, 1]; what is no number is black."""
    return np.rint((np.clip(np.nan_to_num(x, nan=-1.0), -1, 1) + 1) * 127.5).astype(np.uint8)


def strip(clip: Clip) -> np.ndarray:
    """The frames side by side above their points as colours, uint8 [2 H, F W, 3]."""
    return np.concatenate([np.concatenate(list(_levels(clip[key])), 1) for key in ("frames", "points")], 0)


def gif(clip: Clip, comment: str = "") -> bytes:
    """The frames one after another, each above its points as colours."""
    both = np.concatenate([_levels(clip["frames"]), _levels(clip["points"])], 1)
    by = -(-_SIDE // both.shape[2])
    first, *rest = (
        Image.fromarray(x).resize((x.shape[1] * by, x.shape[0] * by), Image.Resampling.NEAREST) for x in both
    )
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=rest, duration=200, loop=0, comment=comment.encode())
    return file.getvalue()


def steady(points: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Which points [F, H, W, 3] lie on a surface, bool [F, H, W].

    Not those that are further from two neighbours on opposite sides than ten times the median step of their frame: blending
    of two surfaces leaves points that hang between them.
    """
    kept = seen & np.isfinite(points).all(-1)
    for axis in (1, 2):
        step = np.linalg.norm(np.diff(points, axis=axis), axis=-1)
        limit = [_JUMP * np.median(one[np.isfinite(one)]) if np.isfinite(one).any() else 0.0 for one in step]
        far = step > np.reshape(limit, (-1, 1, 1))
        edge = [(0, 0)] * 3
        before, after = edge.copy(), edge.copy()
        before[axis], after[axis] = (1, 0), (0, 1)
        kept &= ~(np.pad(far, before) & np.pad(far, after))
    return kept


def ply(clip: Clip) -> bytes:
    """The points of all frames with their colours, as a binary PLY file."""
    mask = steady(clip["points"], clip["seen"])
    kinds = [(axis, "<f4") for axis in "xyz"] + [(name, "u1") for name in ("red", "green", "blue")]
    table = np.empty(int(mask.sum()), kinds)
    for (name, _), column in zip(kinds, [*clip["points"][mask].T, *_levels(clip["frames"][mask]).T]):
        table[name] = column
    lines = [f"property {'float' if kind == '<f4' else 'uchar'} {name}" for name, kind in kinds]
    head = ["ply", "format binary_little_endian 1.0", f"element vertex {len(table)}", *lines, "end_header", ""]
    return "\n".join(head).encode() + table.tobytes()


def known(clip: Clip) -> np.ndarray:
    """The numbers of the frames whose cameras are known."""
    return np.flatnonzero(np.isfinite(clip["camera"]).all((1, 2))) if "camera" in clip else np.zeros(0, int)


def cameras(clip: Clip) -> str | None:
    """The cameras as `zoo.cameras.read_cameras` reads them, without frames that have none; None where no frame has one."""
    which = known(clip)
    if not len(which):
        return None
    one = which[0]
    depth = to_camera(clip["points"][one], clip["camera"][one])[..., 2][clip["seen"][one]]
    return cameras_json(
        clip["camera"][which], float(clip["focal"]), clip["seen"].shape[1:], float(np.median(depth)), which.tolist()
    )


# --- the page -------------------------------------------------------------------------------------


def page(clips: Mapping[str, Clip]) -> str:
    """One HTML file of clips by name, to be turned around; it loads nothing, and forbids itself to."""
    told = json.dumps([_entry(name, clip) for name, clip in clips.items()])
    return _template().replace("/*CLIPS*/[]", told.replace("<", "\\u003c"))


@functools.cache
def _template() -> str:
    return Path(__file__).with_name(_PAGE).read_text()


def _entry(name: str, clip: Clip) -> dict[str, Any]:
    mask = steady(clip["points"], clip["seen"])
    stride = -(-int(mask.sum()) // _POINTS)
    if stride > 1:
        mask &= np.arange(mask[0].size).reshape(mask[0].shape) % stride == 0
    points, colours = clip["points"][mask], _levels(clip["frames"][mask])
    low, high = (points.min(0), points.max(0)) if len(points) else (np.zeros(3), np.ones(3))
    centre, unit = (low + high) / 2, float(max((high - low).max() / 2, 1e-6))
    which, width = known(clip), mask.shape[2]
    near = np.linalg.norm(np.diff(clip["points"], axis=2), axis=-1)
    near = near[np.isfinite(near)]
    file = io.BytesIO()
    Image.fromarray(strip(clip)).save(file, "PNG")
    return {
        "name": name,
        "points": base64.b64encode(np.rint((points - centre) / unit * 32767).astype("<i2").tobytes()).decode(),
        "colours": base64.b64encode(colours.tobytes()).decode(),
        "counts": mask.sum((1, 2)).tolist(),
        "centre": centre.tolist(),
        "middle": (np.median(points, 0) if len(points) else centre).tolist(),
        "unit": unit,
        "spacing": float(np.median(near)) * stride**0.5 if near.size else 0.0,
        "cameras": clip["camera"][which].tolist() if len(which) else [],
        "focal": float(clip["focal"]) / width if len(which) else 1.0,
        "strip": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
    }
