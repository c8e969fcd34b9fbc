"""Cameras, focal lengths and depth read off images of points (arXiv:2412.01821), similarities, and errors of poses.

All of it runs on the host, in float64, after sampling. F frames, N points, H hypotheses; `at` [N, 2] are pixel centres from the
middle of the image (`zoo.cameras.centred`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from zoo.cameras import Similarity, centred, to_camera
from zoo.errors import UserError

_FEWEST = 6  # points of a camera: eleven numbers of a 3 x 4 matrix up to scale, two from each
_HYPOTHESES, _DRAWN = 128, 8  # of RANSAC, and points of each: with a third of them wild, five draws have none of those
_USED = 4096  # points of a frame at most
_JUDGES = 256  # of them, that choose among hypotheses
_STEPS = 20  # of the refinement
_STUCK = 10.0  # a damping at which no step that pays is left
_LOOKS = 5  # for points that are far off
_FLAT = 1e-3  # thickness of the points, as a share of their spread, below which they lie on one plane
_NOISE = 1.5  # and in units of what they are off their pixels' rays


class Cameras(NamedTuple):
    """The cameras of F frames."""

    camera: np.ndarray  # [F, 4, 4], NaN where a frame is refused
    focal: np.ndarray  # [F], NaN there too
    refused: tuple[str, ...]  # why a frame has no camera, "" where it has one


def solve(points: np.ndarray, seen: np.ndarray, *, one_focal: bool = False) -> Cameras:
    """The pinhole cameras that see images of points, each frame by itself.

    A matrix from all points and from 128 draws of eight (DLT); the one whose median point is nearest to its pixel's ray;
    from there Gauss-Newton steps on the squared distances to the rays, with the depth of each point in closed form, over
    the points that are not far off. What is not finite counts as not seen.

    Args:
        points: [F, H, W, 3].
        seen: bool [F, H, W].
        one_focal: one focal length for all frames, the median of those found; the cameras are then refined with it.
    """
    frames, height, width = seen.shape
    where = centred(height, width).reshape(-1, 2)
    rng = np.random.default_rng(0)
    camera, focal = np.full((frames, 4, 4), np.nan), np.full(frames, np.nan)
    refused, kept = [""] * frames, []
    for f in range(frames):
        x = points[f].reshape(-1, 3).astype(np.float64)
        rows = np.flatnonzero(seen[f].reshape(-1) & np.isfinite(x).all(-1))
        rows = rng.permutation(rows)[:_USED]
        kept.append((x[rows], where[rows]))
        refused[f] = _flat(x[rows])
        if refused[f]:
            continue
        camera[f], focal[f], refused[f] = _settle(*kept[f], *_robust(*kept[f], rng))
    if one_focal and not all(refused):
        common = float(np.exp(np.nanmedian(np.log(np.where([not r for r in refused], focal, np.nan)))))
        for f in (f for f in range(frames) if not refused[f]):
            camera[f], focal[f], refused[f] = _settle(*kept[f], camera[f], common, free=False)
    lost = np.asarray([bool(why) for why in refused])
    camera[lost], focal[lost] = np.nan, np.nan
    return Cameras(camera, focal, tuple(refused))


def _flat(points: np.ndarray, noise: float = 0.0) -> str:
    """Why points [N, 3] with this noise show no camera; "" where they do."""
    if len(points) < _FEWEST:
        return f"{len(points)} of its points are seen, and a camera takes {_FEWEST}; give a frame that shows more"
    spread = np.linalg.svd(points - points.mean(0), compute_uv=False) / np.sqrt(len(points))
    if spread[2] <= max(_FLAT * spread[0], _NOISE * noise):
        return "its points lie on one plane, but for noise, which many cameras see alike; give a frame with more than a wall in view"
    return ""


def _robust(points: np.ndarray, at: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """The best of many matrices: the one with the least median distance to rays."""
    drawn = rng.integers(len(points), size=(_HYPOTHESES, _DRAWN))
    few = dlt(points[drawn], at[drawn])
    whole = dlt(points[None], at[None])
    camera, focal = (np.concatenate(pair) for pair in zip(whole, few))
    some = slice(0, _JUDGES)  # in random order
    far = np.median(off_rays(points[None, some], at[some], camera, focal), -1)
    best = int(np.argmin(np.where(np.isfinite(far), far, np.inf)))
    return camera[best], float(focal[best])


def _settle(
    points: np.ndarray, at: np.ndarray, camera: np.ndarray, focal: float, free: bool = True
) -> tuple[np.ndarray, float, str]:
    """A camera refined on what is not far off, its focal length, and why it is none."""
    if not np.isfinite(camera).all():
        return camera, focal, "no camera has its points in front of it; they are no view of a scene"
    near = np.zeros(len(points), bool)
    for _ in range(_LOOKS):
        far = off_rays(points, at, camera, focal)
        # the distance in two directions of normal errors has the median 1.18 sigma; 4 sigma leave out 1 in 3,000
        before, near = near, far <= 4 / 1.18 * np.median(far) + 1e-9
        if (near == before).all():
            break
        camera, focal = refine(points[near], at[near], camera, focal, free=free)
    left = float(np.sqrt((off_rays(points[near], at[near], camera, focal) ** 2).mean()))
    return camera, focal, _flat(points[near], left / np.sqrt(2))


def dlt(points: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cameras [H, 4, 4] and focal lengths [H] by the direct linear transform; NaN where the best matrix is a mirror.

    The matrix M of least |A m|, |m| = 1, with two rows [Q, 0, -x Q] and [0, Q, -y Q] of A for each point Q = [(X - mean) / s, 1],
    where s is the r.m.s. distance from the mean, and M = K R^T up to scale by an RQ decomposition.

    Args:
        points: [H, N, 3].
        at: [H, N, 2].
    """
    mean = points.mean(1)
    size = np.sqrt(((points - mean[:, None]) ** 2).sum(-1).mean(-1)) + 1e-12
    q = np.concatenate([(points - mean[:, None]) / size[:, None, None], np.ones_like(points[..., :1])], -1)
    unit = np.abs(at).max((1, 2)) + 1e-12
    x, y = np.moveaxis(at / unit[:, None, None], -1, 0)
    one, by_x, by_y, by_both = ((q * w[..., None]).mT @ q for w in (np.ones_like(x), x, y, x * x + y * y))
    zero = np.zeros_like(one)
    moment = np.block([[one, zero, -by_x], [zero, one, -by_y], [-by_x, -by_y, by_both]])
    m = np.linalg.eigh(moment)[1][..., 0].reshape(-1, 3, 4)
    m = m * np.where((q @ m[:, 2, :, None]).mean((1, 2)) < 0, -1, 1)[:, None, None]  # points in front
    # RQ of M by the QR of its mirrored transpose
    turn, upper = np.linalg.qr(m[:, ::-1, :3].mT)
    calibration, rotation = upper.mT[:, ::-1, ::-1], turn.mT[:, ::-1]
    sign = np.where(np.diagonal(calibration, axis1=1, axis2=2) < 0, -1.0, 1.0)
    calibration, rotation = calibration * sign[:, None, :], rotation * sign[..., None]
    scale = np.abs(calibration[:, 2, 2]) + 1e-300
    focal = np.sqrt(calibration[:, 0, 0] * calibration[:, 1, 1]) / scale * unit
    fits = (np.linalg.det(rotation) > 0) & (focal > 0) & np.isfinite(focal)
    fits &= np.abs(np.linalg.det(m[..., :3])) > 1e-12
    safe = np.where(fits[:, None, None], m[..., :3], np.eye(3))
    camera = np.zeros((len(m), 4, 4))
    camera[:, :3, :3] = rotation.mT
    camera[:, :3, 3] = -np.linalg.solve(safe, m[..., 3:])[..., 0] * size[:, None] + mean
    camera[:, 3, 3] = 1
    return np.where(fits[:, None, None], camera, np.nan), np.where(fits, focal, np.nan)


def off_rays(points: np.ndarray, at: np.ndarray, camera: np.ndarray, focal: np.ndarray | float) -> np.ndarray:
    """Distances [..., N] of points [..., N, 3] to the rays of their pixels, infinite behind the camera [..., 4, 4]."""
    local = (points - camera[..., None, :3, 3]) @ camera[..., :3, :3]
    focal = np.asarray(focal)
    ray = np.concatenate([at / focal[..., None, None], np.ones((*focal.shape, len(at), 1))], -1)
    ray = ray / np.linalg.norm(ray, axis=-1, keepdims=True)
    along = (local * ray).sum(-1)
    return np.where(along > 0, np.linalg.norm(local - along[..., None] * ray, axis=-1), np.inf)


def refine(
    points: np.ndarray, at: np.ndarray, camera: np.ndarray, focal: float, *, free: bool = True
) -> tuple[np.ndarray, float]:
    """A camera [4, 4] and focal length with the least squared distances of points [N, 3] to the rays of pixels at [N, 2].

    This is min over pose, focal length and depths of sum |R d K^-1 [u, v, 1] + C - x|^2 (the paper's objective), where each
    depth is best at the foot of the perpendicular. Gauss-Newton, damped where a step does not pay (Levenberg-Marquardt).

    Args:
        free: False: the focal length stays.
    """
    rotation, place, log_f = camera[:3, :3], camera[:3, 3], np.log(focal)
    damping, cost = 1e-6, np.inf
    trial = rotation, place, log_f
    for _ in range(_STEPS):
        residual, slope = _residual(points, at, *trial)
        found = float((residual**2).sum())
        if found < cost:
            (rotation, place, log_f), saved = trial, (residual, slope)
            settled = found >= (1 - 1e-10) * cost
            cost, damping = found, damping / 10
            if settled:
                break
        else:
            damping *= 100
            if damping > _STUCK:
                break
        residual, slope = saved
        columns = slope.reshape(-1, 7)[:, : 7 if free else 6]
        normal = columns.T @ columns
        normal[np.diag_indices(len(normal))] *= 1 + damping
        normal[np.diag_indices(len(normal))] += 1e-18
        step = -np.linalg.solve(normal, columns.T @ residual.reshape(-1))
        step = np.concatenate([step, np.zeros(7 - len(step))])
        trial = rotation @ _turned(step[:3]), place + rotation @ step[3:6], log_f + float(np.clip(step[6], -0.5, 0.5))
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = rotation, place
    return out, float(np.exp(log_f))


def _residual(
    points: np.ndarray, at: np.ndarray, rotation: np.ndarray, place: np.ndarray, log_f: float
) -> tuple[np.ndarray, np.ndarray]:
    """Perpendiculars r = P q [N, 3] from rays to points q in the camera's frame, P = 1 - n n^T, and their slopes [N, 3, 7].

    With dq = q x w - t for a turn w and a move t of the camera (both in its frame); with n the direction of a ray and n' its
    slope by log f, r' = -n' (n.q) - n (n'.q).
    """
    q = (points - place) @ rotation
    ray = np.concatenate([at / np.exp(log_f), np.ones((len(at), 1))], -1)
    long = np.linalg.norm(ray, axis=-1, keepdims=True)
    n = ray / long
    along = (n * q).sum(-1, keepdims=True)
    cross = np.zeros((len(q), 3, 3))  # columns q x e_i
    cross[:, 0, 1], cross[:, 0, 2], cross[:, 1, 2] = -q[:, 2], q[:, 1], -q[:, 0]
    cross -= cross.mT
    moved = np.concatenate([cross, np.broadcast_to(-np.eye(3), cross.shape)], -1)
    moved = moved - n[..., None] * (n[:, None] @ moved)
    bent = np.concatenate([-ray[:, :2], np.zeros((len(at), 1))], -1) / long
    bent = bent - n * (n * bent).sum(-1, keepdims=True)
    by_focal = -bent * along - n * (bent * q).sum(-1, keepdims=True)
    return q - along * n, np.concatenate([moved, by_focal[..., None]], -1)


def _turned(turn: np.ndarray) -> np.ndarray:
    """The rotation by a vector (Rodrigues)."""
    angle = float(np.linalg.norm(turn))
    x, y, z = turn / max(angle, 1e-300)
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k


def depth_of(points: np.ndarray, camera: np.ndarray, focal: np.ndarray) -> np.ndarray:
    """The best depths [F, H, W] of images of points [F, H, W, 3]: r.(x - C) / r.r with the ray r of the pixel, z = 1."""
    height, width = points.shape[1:3]
    ray = np.concatenate(
        [centred(height, width) / focal[:, None, None, None], np.ones((len(points), height, width, 1))], -1
    )
    return (to_camera(points.astype(np.float64), camera) * ray).sum(-1) / (ray * ray).sum(-1)


def align(points: np.ndarray, target: np.ndarray) -> Similarity:
    """The similarity of least squared distance from points [N, 3] to target [N, 3] (Umeyama 1991).

    Raises:
        UserError: fewer than three points, or all in one line.
    """
    if len(points) < 3:
        raise UserError(f"{len(points)} points fix no similarity; give three or more")
    x, y = points.astype(np.float64), target.astype(np.float64)
    a, b = x - x.mean(0), y - y.mean(0)
    u, s, v = np.linalg.svd(b.T @ a / len(x))
    if s[1] <= 1e-12 * max(float(s[0]), 1e-300):
        raise UserError("points in one line fix no similarity; give some that are not")
    sign = np.array([1, 1, np.sign(np.linalg.det(u) * np.linalg.det(v))])
    rotation = (u * sign) @ v
    scale = float((s * sign).sum() / (a * a).sum(-1).mean())
    return Similarity(np.asarray(scale), rotation, y.mean(0) - scale * rotation @ x.mean(0))


# --- errors of poses ------------------------------------------------------------------------------


def angle_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Degrees [...] between rotations [..., 3, 3]."""
    # by the sine of half the angle, which is exact where the angle is small
    half = np.linalg.norm(a - b, axis=(-2, -1)) / np.sqrt(8)
    return np.degrees(2 * np.arcsin(np.clip(half, 0, 1)))


def pose_errors(camera: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Degrees by which the relative poses of all pairs of frames are off: rotations and directions of moves, each [F (F - 1) / 2].

    A pair is (R_i^T R_j, R_i^T (C_j - C_i)) of cameras [F, 4, 4]. A move of no length, true or found, is 90 degrees off.
    """
    i, j = np.triu_indices(len(camera), 1)
    turns, moves = [], []
    for c in (camera, true):
        turn = c[i, :3, :3].mT
        turns.append(turn @ c[j, :3, :3])
        move = (turn @ (c[j, :3, 3:] - c[i, :3, 3:]))[..., 0]
        moves.append(move / np.maximum(np.linalg.norm(move, axis=-1, keepdims=True), 1e-12))
    cosine = (moves[0] * moves[1]).sum(-1)
    sine = np.linalg.norm(np.cross(moves[0], moves[1]), axis=-1)
    direction = np.where((sine == 0) & (cosine == 0), 90.0, np.degrees(np.arctan2(sine, cosine)))
    return angle_between(*turns), direction


def area_under(error: np.ndarray, limit: float = 30.0) -> float:
    """Area under the share of errors below a threshold from 0 to `limit`, over `limit`; NaN counts as lost (AUC@30)."""
    kept = np.where(np.isnan(error), np.inf, error)
    return float(np.maximum(0, 1 - kept / limit).mean())
