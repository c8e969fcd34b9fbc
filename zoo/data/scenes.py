"""Made clips of still rooms, ray-cast: every pixel knows where in the world it lies.

`frames` float32 [F, S, S, 3] in [-1, 1], `points` float32 [F, S, S, 3] (the surface point that each pixel sees), `seen` bool
[F, S, S] (whether it is known; here it always is), `camera` float32 [F, 4, 4] and `focal` float32 [], in the convention of
`zoo/cameras.py`. Textures are flat colours without light, so a surface has one colour from everywhere.

n clips, F frames, R rays of a frame; rays are handled as three arrays [n, F R] by axis, which stay in the processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal, TypeAlias

import jax
import numpy as np
from msgspec import Meta

from zoo.cameras import look_at, normalisation, rays, to_world
from zoo.data.images import LEVELS, SPLITS, check_split
from zoo.data.pipeline import Data, Source
from zoo.fields import Count, Seed

Frames: TypeAlias = Annotated[int, Meta(ge=1, le=2**10)]
_ROOM = (2.0, 1.2, 2.0)  # half sides; y points up here, the world of a room is nobody's camera
_RAYS = 2**16  # cast at once: 30 arrays of them fit the second-level cache
_SCENE, _PATH = 84, 12  # uniform numbers that a scene and a path are made of


@dataclass(frozen=True)
class Scenes(Data):
    """Rooms with checkered faces, striped balls and boxes on the floor, and a camera on an arc around the middle.

    `family` says what differs between clips: "one_world" only the path, and coordinates stay those of the room, halved;
    "fixed_room" the path and the objects; "open" everything. In the last two a clip is seen from its first camera and fills
    [-1, 1] (`zoo.cameras.normalisation`). Example i of a split follows from (seed, split, i) alone.
    """

    family: Literal["one_world", "fixed_room", "open"] = "open"
    frames: Frames = 8
    size: Annotated[int, Meta(ge=2, le=2**10)] = 32  # pixels a side
    fov: Annotated[float, Meta(ge=10, le=120)] = 60.0  # degrees across
    train: Count = 3_000
    test: Count = 256
    seed: Seed = 0

    def source(self, split: str, spec: Mapping[str, jax.ShapeDtypeStruct] | None = None) -> ClipSource:
        """The clips of a split, made at once and kept in memory."""
        check_split(split)
        return ClipSource(_clips(self, split, self.train if split == "train" else self.test))


class ClipSource(Source):
    """Clips from arrays that lead with N: `frames` uint8, `points`, `seen`, `camera`, `focal`."""

    def __init__(self, clips: Mapping[str, np.ndarray]) -> None:
        self._clips = clips

    def __len__(self) -> int:
        return len(self._clips["frames"])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        example = {key: x[index] for key, x in self._clips.items()}
        return {**example, "frames": LEVELS[example["frames"]]}


@lru_cache(maxsize=4)
def _clips(data: Scenes, split: str, count: int) -> dict[str, np.ndarray]:
    """The arrays of `ClipSource`; numbers are drawn clip by clip, so that a clip does not depend on how many follow."""
    drawn = np.random.default_rng((data.seed, SPLITS.index(split))).random((count, _SCENE + _PATH), np.float32)
    fixed = np.random.default_rng((data.seed, 2)).random(_SCENE, np.float32)
    if data.family == "one_world":
        drawn[:, :_SCENE] = fixed
    elif data.family == "fixed_room":
        drawn[:, :_FACES] = fixed[:_FACES]
    if data.family != "open":
        drawn[:, :3] = 0  # the sides of the room are the least
    shape = (count, data.frames, data.size, data.size)
    clips: dict[str, np.ndarray] = {
        "frames": np.empty((*shape, 3), np.uint8),
        "points": np.empty((*shape, 3), np.float32),
        "seen": np.ones(shape, bool),
        "camera": np.empty((*shape[:2], 4, 4), np.float32),
        "focal": np.full(count, data.size / 2 / math.tan(math.radians(data.fov) / 2), np.float32),
    }
    some = max(1, _RAYS // (data.frames * data.size**2))

    def make(first: int) -> None:
        part = slice(first, min(first + some, count))
        room = Room(drawn[part, :_SCENE])
        camera = arc(drawn[part, _SCENE:], data.frames, room.floor)
        colour, points = cast(room, camera, clips["focal"][part], data.size)
        if data.family == "one_world":
            points *= 0.5
            camera[..., :3, 3] *= 0.5
        else:
            normal = normalisation(points, clips["seen"][part], camera)
            points, camera = normal.points(points), normal.cameras(camera)
        clips["frames"][part] = np.rint(colour * 255)
        clips["points"][part], clips["camera"][part] = points, camera

    with ThreadPoolExecutor() as pool:
        list(pool.map(make, range(0, count, some)))  # NumPy lets go of the interpreter's lock
    for x in clips.values():
        x.setflags(write=False)
    return clips


def arc(drawn: np.ndarray, frames: int, floor: np.ndarray) -> np.ndarray:
    """Cameras [n, F, 4, 4] on arcs around the middle of a room, from numbers [n, 12] in [0, 1)."""
    u = drawn.T[..., None]
    t = np.linspace(0, 1, frames, dtype=np.float32)
    angle = 2 * np.pi * u[0] + np.radians(20 + 25 * u[1]) * np.where(u[2] < 0.5, -1, 1) * t
    radius = 1.3 + 0.5 * (u[3] * (1 - t) + u[4] * t)
    height = floor[:, None] + 0.9 + 0.8 * (u[5] * (1 - t) + u[6] * t)
    target = np.stack([0.4 * u[7] - 0.2, floor[:, None] + 0.6, 0.4 * u[8] - 0.2], -1)
    eye = np.stack([target[..., 0] + radius * np.cos(angle), height, target[..., 2] + radius * np.sin(angle)], -1)
    return look_at(eye, target, np.array([0, 1, 0])).astype(np.float32)


# --- what a ray meets ---------------------------------------------------------------------------------

_FACES = (
    3 + 6 * 6
)  # numbers of the room: its sides; of each face a colour, how often it is checkered, a phase along both axes
_BALL = 3 + 1 + 3 + 2  # presence, place; radius; colour; stripes
_BOX = 3 + 3 + 3 + 1
_AXES = ((1, 2), (0, 2), (0, 1))  # along a face that is at right angles to an axis


class Room:
    """What rooms are made of, from numbers [n, 84] in [0, 1)."""

    def __init__(self, drawn: np.ndarray) -> None:
        u = drawn.astype(np.float32)
        self.half = np.asarray(_ROOM, np.float32) + u[:, :3] * np.asarray([0.6, 0.2, 0.6], np.float32)  # [n, 3]
        face = u[:, 3:_FACES].reshape(-1, 6, 6)
        self.colour = 0.2 + 0.8 * face[..., :3]  # [n, 6, 3]
        self.often = 2 + np.floor(3 * face[..., 3])
        self.phase = face[..., 4:]
        self.floor = -self.half[:, 1]
        balls = u[:, _FACES : _FACES + 2 * _BALL].reshape(-1, 2, _BALL)
        self.ball_there = np.stack([np.ones(len(u), bool), balls[:, 1, 0] < 0.5], 1)  # one or two
        self.ball_radius = 0.25 + 0.2 * balls[..., 3]
        self.ball = self._on_floor(balls[..., 1:3], self.ball_radius)  # [n, 2, 3]
        self.ball_colour = 0.2 + 0.8 * balls[..., 4:7]
        self.ball_stripes = 2 + np.floor(3 * balls[..., 7:])  # along both angles
        boxes = u[:, _FACES + 2 * _BALL :][:, : 2 * _BOX].reshape(-1, 2, _BOX)
        self.box_there = np.stack([np.ones(len(u), bool), boxes[:, 1, 0] < 0.5], 1)
        self.box_half = 0.2 + 0.2 * boxes[..., 3:6]
        self.box = self._on_floor(boxes[..., 1:3], self.box_half[..., 1])
        self.box_colour = 0.2 + 0.8 * boxes[..., 6:9]
        self.box_often = 1 + np.floor(3 * boxes[..., 9])

    def _on_floor(self, place: np.ndarray, height: np.ndarray) -> np.ndarray:
        x, z = np.moveaxis(2.2 * place - 1.1, -1, 0)
        return np.stack([x, self.floor[:, None] + height, z], -1)


def cast(room: Room, camera: np.ndarray, focal: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Colours in [0, 1] and points [n, F, S, S, 3] that cameras [n, F, 4, 4] see in their rooms."""
    n, frames = camera.shape[:2]
    away = np.broadcast_to(rays(focal[:, None], size, size), (n, frames, size, size, 3))
    start = camera[:, :, :3, 3]
    turned = to_world(away, camera) - start[:, :, None, None]
    # [n, R] of each axis; the length of a direction is left as it is, so a parameter along it is a depth
    d = [np.ascontiguousarray(turned[..., a]).reshape(n, -1) for a in range(3)]
    d = [np.where(np.abs(x) < 1e-9, np.float32(1e-9), x) for x in d]
    o = [np.repeat(start[..., a], size**2, 1) for a in range(3)]
    far = [(np.copysign(room.half[:, a, None], d[a]) - o[a]) / d[a] for a in range(3)]
    depth = np.minimum(np.minimum(far[0], far[1]), far[2])
    axis = np.where(far[0] == depth, 0, np.where(far[1] == depth, 1, 2))
    kind = np.zeros(depth.shape, np.int8)  # 0: the room, 1 and 2: balls, 3 and 4: boxes
    for k in range(2):
        _nearer(depth, kind, _ball(room, k, o, d), 1 + k)
    for k in range(2):
        _nearer(depth, kind, _box(room, k, o, d), 3 + k)
    point = np.stack([o[a] + depth * d[a] for a in range(3)], -1)  # [n, R, 3]
    colour = _painted(room, point, axis, d, kind)
    shape = (n, frames, size, size, 3)
    return colour.reshape(shape), point.reshape(shape)


def _nearer(depth: np.ndarray, kind: np.ndarray, found: np.ndarray, number: int) -> None:
    closer = found < depth
    depth[closer] = found[closer]
    kind[closer] = number


def _ball(room: Room, k: int, o: list[np.ndarray], d: list[np.ndarray]) -> np.ndarray:
    """Where rays meet ball k, infinite where they do not."""
    away = [o[a] - room.ball[:, k, a, None] for a in range(3)]
    squared = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
    half = d[0] * away[0] + d[1] * away[1] + d[2] * away[2]
    rest = away[0] ** 2 + away[1] ** 2 + away[2] ** 2 - room.ball_radius[:, k, None] ** 2
    under = half * half - squared * rest
    met = (-half - np.sqrt(np.maximum(under, 0))) / squared
    return np.where((under > 0) & (met > 0) & room.ball_there[:, k, None], met, np.float32(np.inf))


def _box(room: Room, k: int, o: list[np.ndarray], d: list[np.ndarray]) -> np.ndarray:
    """Where rays enter box k, infinite where they do not."""
    enter, leave = np.float32(-np.inf), np.float32(np.inf)
    for a in range(3):
        middle = (room.box[:, k, a, None] - o[a]) / d[a]
        reach = room.box_half[:, k, a, None] / np.abs(d[a])
        enter, leave = np.maximum(enter, middle - reach), np.minimum(leave, middle + reach)
    return np.where((enter < leave) & (enter > 0) & room.box_there[:, k, None], enter, np.float32(np.inf))


def _painted(room: Room, point: np.ndarray, axis: np.ndarray, d: list[np.ndarray], kind: np.ndarray) -> np.ndarray:
    """Colours [n, R, 3] of points on surfaces."""
    clip = np.broadcast_to(np.arange(len(point))[:, None], kind.shape)
    side = np.where(axis == 0, d[0], np.where(axis == 1, d[1], d[2])) > 0
    face = 2 * axis + side
    place = point / room.half[:, None]  # [-1, 1]
    one, two = (
        np.where(axis == 0, place[..., a], np.where(axis == 1, place[..., b], place[..., c])) for a, b, c in zip(*_AXES)
    )
    often, phase = room.often[clip, face], room.phase[clip, face]
    squares = np.floor((one + 1) / 2 * often + phase[..., 0]) + np.floor((two + 1) / 2 * often + phase[..., 1])
    colour = room.colour[clip, face] * _checkered(squares)[..., None]
    for k in range(2):
        rows = np.nonzero(kind == 1 + k)
        if len(rows[0]):
            up = (point[rows] - room.ball[rows[0], k]) / room.ball_radius[rows[0], k, None]
            stripes = room.ball_stripes[rows[0], k]
            turn = np.floor((np.arctan2(up[:, 2], up[:, 0]) / np.pi + 1) * stripes[:, 0])
            tilt = np.floor(np.arccos(np.clip(up[:, 1], -1, 1)) / np.pi * 2 * stripes[:, 1])
            colour[rows] = room.ball_colour[rows[0], k] * _checkered(turn + tilt)[:, None]
        rows = np.nonzero(kind == 3 + k)
        if len(rows[0]):
            at = (point[rows] - room.box[rows[0], k]) / room.box_half[rows[0], k]  # on a face one of them is 1 or -1
            across = np.abs(at).argmax(-1)
            cells = np.floor((at + 1) / 2 * room.box_often[rows[0], k, None] * (1 - 1e-5))
            squares = cells.sum(-1) - cells[np.arange(len(at)), across]
            shade = np.array([0.85, 1.0, 0.7], np.float32)[across]
            colour[rows] = room.box_colour[rows[0], k] * (shade * _checkered(squares))[:, None]
    return np.minimum(colour, 1)


def _checkered(squares: np.ndarray) -> np.ndarray:
    """The contrast of squares by their number: 25 % brighter or darker."""
    return np.where(squares % 2 == 0, np.float32(1.25), np.float32(0.75))
