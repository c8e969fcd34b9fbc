"""Where a camera shall go: around what it sees, towards it, turning where it stands, or as a file says."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from zoo.cameras import project, read_cameras
from zoo.errors import UserError, suggest

MOVES = ("orbit", "dolly", "pan")
_TURN = 30.0  # degrees of an orbit or a pan
_WAY = 0.4  # share of the depth that a dolly covers


def trajectory(path: str, first: np.ndarray, depth: float, frames: int) -> np.ndarray:
    """Cameras [F, 4, 4] that begin at the camera `first` [4, 4].

    An orbit turns around the point at `depth` in front of it, a pan turns where it stands, to the right both; a dolly goes
    forward. A file (`zoo.cameras.read_cameras`) is walked from `first`, and what it calls `scale` becomes `depth`.

    Args:
        path: orbit, dolly, pan, or a .json file.
        depth: median of what the first camera sees.

    Raises:
        UserError: no such path or file, another number of cameras, moves without a scale.
    """
    t = np.linspace(0, 1, frames)
    steps = np.broadcast_to(np.eye(4), (frames, 4, 4)).copy()
    if path in ("orbit", "pan"):
        angle = np.radians(_TURN) * t
        steps[:, 0, 0] = steps[:, 2, 2] = np.cos(angle)
        steps[:, 0, 2], steps[:, 2, 0] = np.sin(angle), -np.sin(angle)
        if path == "orbit":  # the point in front stays where it is
            steps[:, :3, 3] = depth * (np.array([0, 0, 1]) - steps[:, :3, 2])
    elif path == "dolly":
        steps[:, 2, 3] = _WAY * depth * t
    elif path.endswith(".json"):
        steps = _walked(Path(path), depth, frames)
    else:
        raise UserError(f"path={path} is no path; {suggest(path, (*MOVES, 'FILE.json'))}")
    return first @ steps


def _walked(path: Path, depth: float, frames: int) -> np.ndarray:
    camera, said = read_cameras(path)
    if len(camera) != frames:
        raise UserError(f"path={path} has {len(camera)} cameras, and a clip has {frames}; give one for every frame")
    steps = np.linalg.inv(camera[0]) @ camera
    scale = said.get("scale")
    if not isinstance(scale, (int, float)) or not 0 < scale < np.inf:
        if np.abs(steps[:, :3, 3]).max() > 1e-9:
            raise UserError(
                f'path={path} moves, and does not say in what scale; add "scale": how far away what its first camera sees is in '
                "the file's units (the median depth)"
            )
        scale = 1.0
    steps[:, :3, 3] *= depth / scale
    return steps


def check_clear(
    path: str, camera: np.ndarray, points: np.ndarray, seen: np.ndarray, first: np.ndarray, focal: float
) -> None:
    """UserError for a camera of a path that stands behind the surface that the first frame sees there: in a wall or a thing.

    Args:
        camera: [F, 4, 4], of the path.
        points: [H, W, 3] of the first frame.
        seen: bool [H, W].
        first: [4, 4].
        focal: of the first camera, in pixels.
    """
    height, width = seen.shape
    at, depth = project(camera[:, :3, 3], first, np.asarray(focal), height, width)
    _, surface = project(points.astype(np.float64), first, np.asarray(focal), height, width)
    column, row = np.floor(at).astype(int).T
    inside = (depth > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    there = np.where(seen, surface, np.inf)[np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)]
    if (hidden := inside & (depth >= there)).any():
        k = int(np.argmax(hidden))
        raise UserError(
            f"path={path}: camera {k} stands {depth[k]:.2g} in front of the first one, inside of what that sees at {there[k]:.2g}; "
            "give a shorter path, or one that goes around it"
        )
