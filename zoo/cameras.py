"""Pinhole cameras: one convention for data, networks, metrics and files.

x goes right, y down, z forward. `camera` [..., 4, 4] takes points of the camera's frame to the world, `focal` [...] is in
pixels, the principal point is the middle of the image, the centre of pixel (column u, row v) lies at (u + 1/2, v + 1/2), and
depth is z in the camera's frame, not the length of a ray. Functions take NumPy and JAX arrays alike.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.errors import UserError
from zoo.files import reading

Array = Any  # of NumPy or JAX
RIGID = 1e-3  # what a rotation may differ from an orthonormal matrix


def centred(height: int, width: int) -> np.ndarray:
    """Pixel centres [H, W, 2] as (x, y) from the middle of the image, in pixels."""
    x, y = np.arange(width) + 0.5 - width / 2, np.arange(height) + 0.5 - height / 2
    return np.stack(np.broadcast_arrays(x, y[:, None]), -1)


def rays(focal: Array, height: int, width: int) -> Array:
    """Directions [..., H, W, 3] of the pixels in their camera's frame, with z = 1; `focal` is an array [...]."""
    xp = focal.__array_namespace__()
    xy = xp.asarray(centred(height, width), dtype=focal.dtype) / focal[..., None, None, None]
    return xp.concat([xy, xp.ones_like(xy[..., :1])], -1)


def unproject(depth: Array, camera: Array, focal: Array) -> Array:
    """World points [..., H, W, 3] of depths [..., H, W]."""
    height, width = depth.shape[-2:]
    return to_world(depth[..., None] * rays(focal, height, width), camera)


def to_world(points: Array, camera: Array) -> Array:
    """Points [*B, *S, 3] of the frames of cameras [*B, 4, 4] in the world."""
    flat = points.reshape(*camera.shape[:-2], -1, 3)
    return (flat @ camera[..., :3, :3].mT + camera[..., None, :3, 3]).reshape(points.shape)


def to_camera(points: Array, camera: Array) -> Array:
    """World points [*B, *S, 3] in the frames of cameras [*B, 4, 4]."""
    flat = points.reshape(*camera.shape[:-2], -1, 3)
    return ((flat - camera[..., None, :3, 3]) @ camera[..., :3, :3]).reshape(points.shape)


def project(points: Array, camera: Array, focal: Array, height: int, width: int) -> tuple[Array, Array]:
    """Where world points [*B, *S, 3] are seen: (column, row) [*B, *S, 2] in pixels, and depths [*B, *S].

    Behind the camera, where depth is not positive, the place means nothing.
    """
    xp = points.__array_namespace__()
    local = to_camera(points, camera)
    depth = local[..., 2]
    safe = xp.where(depth > 1e-9, depth, 1.0)
    scale = focal.reshape(*focal.shape, *(1,) * (depth.ndim - focal.ndim)) / safe
    middle = xp.asarray([width / 2, height / 2], dtype=points.dtype)
    return local[..., :2] * scale[..., None] + middle, depth


def look_at(eye: np.ndarray, target: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Cameras [..., 4, 4] at `eye` [..., 3] that look at `target`, upright; UserError where that is no direction."""
    forward = target - eye
    right = np.cross(forward, up)
    if (np.linalg.norm(right, axis=-1) <= 1e-6 * np.linalg.norm(up, axis=-1)).any():
        raise UserError(
            "a camera looks at the place where it stands, or straight up or down; move its target away from it, to a side"
        )
    right = right / np.linalg.norm(right, axis=-1, keepdims=True)
    forward = forward / np.linalg.norm(forward, axis=-1, keepdims=True)
    camera = np.zeros((*eye.shape[:-1], 4, 4), eye.dtype)
    camera[..., :3, :] = np.stack([right, np.cross(forward, right), forward, eye], -1)
    camera[..., 3, 3] = 1
    return camera


@dataclass(frozen=True)
class Similarity:
    """x -> scale R x + shift: what leaves cameras cameras. Arrays may lead with the same axes."""

    scale: np.ndarray  # [...]
    rotation: np.ndarray  # [..., 3, 3]
    shift: np.ndarray  # [..., 3]

    def points(self, x: np.ndarray) -> np.ndarray:
        """Points [..., *S, 3] moved."""
        flat = x.reshape(*self.scale.shape, -1, 3) @ (self.scale[..., None, None] * self.rotation.mT)
        return (flat + self.shift[..., None, :]).reshape(x.shape)

    def cameras(self, camera: np.ndarray) -> np.ndarray:
        """Cameras [..., F, 4, 4] moved: they see the moved points where they saw the points; depths grow by `scale`."""
        out = camera.copy()
        out[..., :3, :3] = self.rotation[..., None, :, :] @ camera[..., :3, :3]
        out[..., :3, 3] = self.points(camera[..., :3, 3])
        return out

    def inverse(self) -> Similarity:
        """The way back."""
        back = self.rotation.mT / self.scale[..., None, None]
        return Similarity(1 / self.scale, self.rotation.mT, -(back @ self.shift[..., None])[..., 0])


def normalisation(points: np.ndarray, seen: np.ndarray, camera: np.ndarray) -> Similarity:
    """What puts a clip into the frame of its first camera and its seen points into [-1, 1] (arXiv:2412.01821).

    One centre and one scale for all frames and axes: the longest side of the box around the points becomes 2.

    Args:
        points: [..., F, H, W, 3].
        seen: bool [..., F, H, W], true somewhere in each clip.
        camera: [..., F, 4, 4].
    """
    first = camera[..., 0, :, :]
    local = to_camera(points, first).reshape(*first.shape[:-2], -1, 3)
    mask = seen.reshape(*first.shape[:-2], -1, 1)
    low = np.where(mask, local, np.inf).min(-2)
    high = np.where(mask, local, -np.inf).max(-2)
    scale = 2 / np.maximum((high - low).max(-1), 1e-9)
    turn = first[..., :3, :3].mT
    shift = -(turn @ first[..., :3, 3:])[..., 0] - (low + high) / 2
    return Similarity(scale, turn, scale[..., None] * shift)


# --- cameras.json -------------------------------------------------------------------------------------


def check_rigid(camera: np.ndarray, where: str) -> None:
    """UserError unless cameras [F, 4, 4] are finite rotations with a place, none of them a mirror."""
    turn = camera[:, :3, :3]
    off = np.abs(turn.mT @ turn - np.eye(3)).max((-2, -1), initial=0) + np.abs(camera[:, 3] - [0, 0, 0, 1]).max(-1)
    with np.errstate(invalid="ignore"):
        fits = (off < RIGID) & (np.linalg.det(turn) > 0) & np.isfinite(camera).all((-2, -1))
    if not fits.all():
        raise UserError(
            f"{where}: frame {int(np.argmin(fits))} has a `camera` that is no rotation with a place; write camera-to-world "
            "matrices [R C; 0 0 0 1] with det R = 1, x right, y down and z forward"
        )


def read_cameras(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Cameras [F, 4, 4] float64 of a `cameras.json`, and all that it says.

    Its `frames` are a list of dicts with a `camera` each, or with an `eye` and a `target` that it looks at, upright.

    Raises:
        UserError: it cannot be read, or has no such cameras.
    """
    with reading(path, "give a cameras.json"):
        text = path.read_text()
    try:
        said = json.loads(text)
        camera = np.asarray([_camera(frame) for frame in said["frames"]], np.float64).reshape(-1, 4, 4)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f'{path} is no list of cameras; write {{"frames": [{{"camera": [[...], [...], [...], [...]]}}, ...]}} with a '
            'camera-to-world matrix for every frame, or {"eye": [x, y, z], "target": [x, y, z]}'
        ) from None
    if not len(camera):
        raise UserError(f"{path} has no frames; add some")
    check_rigid(camera, str(path))
    return camera, said


def _camera(frame: dict[str, Any]) -> Any:
    if "camera" in frame:
        return frame["camera"]
    eye, target = (np.asarray(frame[key], np.float64).reshape(3) for key in ("eye", "target"))
    return look_at(eye, target, np.array([0.0, -1.0, 0.0]))  # y points down


def cameras_json(
    camera: np.ndarray, focal: float, size: Sequence[int], scale: float, numbers: Sequence[int] | None = None
) -> str:
    """Cameras [F, 4, 4] with one focal length as `read_cameras` reads them.

    Args:
        size: rows and columns of the images.
        scale: median depth of the first frame: by it the path can be walked in another world.
        numbers: which frames of a clip these are; None: all.
    """
    height, width = size
    frames = [
        {"frame": i, "camera": np.round(c.astype(float), 6).tolist()}
        for i, c in zip(numbers or range(len(camera)), camera)
    ]
    lengths = {"focal": round(focal, 4), "scale": round(scale, 6)}
    said = {"width": width, "height": height, **lengths, "frames": frames}
    return json.dumps(said, indent=1) + "\n"
