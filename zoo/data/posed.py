"""Clips of the user's own still scenes: folders of images, depth and cameras, and .npz files of point maps.

Both give what `zoo.data.scenes.Scenes` gives, seen from the first camera of a clip and with its points in [-1, 1]
(`zoo.cameras.normalisation`). Points of pixels that are not `seen` are those of the nearest seen pixel of their frame, the
middle of the clip in frames that have none.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from zoo.cameras import (
    RIGID,
    centred,
    check_rigid,
    normalisation,
    project,
    read_cameras,
    to_camera,
    to_world,
    unproject,
)
from zoo.data.arrays import open_npz, read_array
from zoo.data.folders import divide, existing
from zoo.data.images import LEVELS, LOOKED_AT, BadImage, check_split, open_image, upright_size
from zoo.data.pipeline import Data, Example, Source
from zoo.data.scenes import ClipSource, Frames
from zoo.errors import UserError
from zoo.fields import Below1, Count, NotEmpty, Side
from zoo.files import digests, first_line, reading, sha256_of_json

_log = logging.getLogger("zoo")
SpecOf = Mapping[str, jax.ShapeDtypeStruct]
_CENTRAL = 0.1  # share of the image that its principal point may lie off the middle
_PAIRS, _GRID = 8, 64  # pairs of frames of a scene that are compared, and points along a side of an image
_OVERLAP = 0.2  # share of the points of a pair that must fall into the other image
_AGREE = 0.05  # median share of the depth beyond which nothing fits
_EXACT = 1e-5  # below it readings are not compared
# share of the width that points may lie off their pixels, and pixels that all of them may be shifted
_NEAR, _SHIFTED = 0.05, 0.25

# --- folders --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Posed(Data):
    """Folders of images with depth and a `cameras.json` each: `path` is one, or holds one for every scene.

    cameras.json is {"frames": [{"image": "rgb/0.png", "depth": "depth/0.png", "camera": 4 x 4 camera to world, "K": 3 x 3}, ...]},
    x right, y down, z forward, pixel centres at 1/2. K and `depth_unit` (of a number in a depth image; 0.001 for 16-bit PNG,
    1 for .npy) may stand above the frames, for all. Depth is z, 0 where it is not known. Images are cropped around their
    principal points and resized. A clip is `frames` frames, every `stride`-th; held out are whole scenes, of a single
    one its end.

    Points of some frames are looked for in others: where another reading of cameras or depth fits better, or none does, the
    folder is refused.
    """

    path: NotEmpty
    size: Side
    frames: Frames = 8
    stride: Count = 1
    test_fraction: Below1 = 0.1

    def source(self, split: str, spec: SpecOf | None = None) -> _PosedSource:
        """The clips of a split, in the order of scenes and frames; images are read when they are asked for."""
        check_split(split)
        scenes = self._scenes()
        span = (self.frames - 1) * self.stride + 1
        lengths = [len(scene.camera) for scene in scenes]
        if len(scenes) == 1:
            held = max(span, round(lengths[0] * self.test_fraction)) if self.test_fraction else 0
            cut = lengths[0] - held
            ends = [(0, 0, cut) if split == "train" else (0, cut, lengths[0])]
        else:
            ends = [(i, 0, lengths[i]) for i in divide(len(scenes), self.test_fraction)[split]]
        clips = [(i, begin) for i, first, last in ends for begin in range(max(first, 0), last - span + 1)]
        if not clips:
            where = f" in its {split} split" if self.test_fraction else ""
            raise UserError(
                f"{self.path} has no {span} frames in a row{where} (scenes of {', '.join(map(str, lengths[:5]))}), and clips of "
                f"{self.frames} with stride {self.stride} take so many; give more, or set data.frames, data.stride, data.test_fraction"
            )
        return _PosedSource(self, scenes, clips)

    def fingerprint(self, split: str) -> str:
        """What the clips of a split are, wherever they lie: cameras, units, names and bytes of all files."""
        check_split(split)
        scenes = self._scenes()
        root = existing(self.path)
        files = [str(path.relative_to(root)) for scene in scenes for path in (*scene.images, *scene.depths)]
        how = [split, self.size, self.frames, self.stride, self.test_fraction]
        cameras = ([scene.camera.tolist(), scene.k.tolist(), scene.units] for scene in scenes)
        return sha256_of_json([how, *cameras, [files, digests(root, files)]])

    def _scenes(self) -> tuple[_Scene, ...]:
        root = existing(self.path)
        folders = [root] if (root / "cameras.json").is_file() else []
        if not folders and root.is_dir():
            folders = sorted(path.parent for path in root.glob("*/cameras.json"))
        if not folders:
            raise UserError(
                f"data.path={root} holds no cameras.json, and no folder with one; give a folder of posed images"
            )
        stamps = tuple((folder, (folder / "cameras.json").stat().st_mtime_ns) for folder in folders)
        return _opened(stamps, self.stride * max(1, (self.frames - 1) // 2))


@dataclass(frozen=True)
class _Scene:
    images: tuple[Path, ...]
    depths: tuple[Path, ...]
    units: tuple[float, ...]
    camera: np.ndarray  # [M, 4, 4]
    k: np.ndarray  # [M, 3, 3]
    size: tuple[int, int]  # of the images, width and height

    def check_size(self, i: int, size: tuple[int, int]) -> None:
        """UserError unless image i has the size of the first one."""
        if size != self.size:
            sizes = " and ".join(f"{w}x{h}" for w, h in (self.size, size))
            raise UserError(
                f"{self.images[i]}: the frames of a scene are {sizes}; give all one size, and K that fits it"
            )

    def depth(self, i: int) -> np.ndarray:
        """Depth [H, W] of frame i, 0 where it is not known."""
        path = self.depths[i]
        try:
            found = np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.asarray(Image.open(path))
        except Exception as error:  # Pillow's decoders raise almost anything on a broken file
            raise UserError(f"{path} cannot be read ({first_line(error)}); give depth as .npy or 16-bit .png") from None
        width, height = self.size
        if found.shape != (height, width):
            raise UserError(
                f"{path} is {list(found.shape)} and its image {[height, width]}; give depth of the size of the images "
                "(resized without blending)"
            )
        found = found.astype(np.float64) * self.units[i]
        return np.where(np.isfinite(found) & (found > 0), found, 0)

    @property
    def half(self) -> float:
        """Tangent of half the field of view that all frames have around their principal points."""
        (fx, fy), (cx, cy), (width, height) = self.focal, self.k[:, :2, 2].T, self.size
        return float(np.minimum(np.minimum(cx, width - cx) / fx, np.minimum(cy, height - cy) / fy).min())

    @property
    def focal(self) -> np.ndarray:
        """[2, M]."""
        return np.stack([self.k[:, 0, 0], self.k[:, 1, 1]])


class _PosedSource(Source):
    def __init__(self, data: Posed, scenes: Sequence[_Scene], clips: Sequence[tuple[int, int]]) -> None:
        self._data, self._scenes, self._clips = data, scenes, clips

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, begin = self._clips[index]
        scene, data = self._scenes[number], self._data
        members = range(begin, begin + data.frames * data.stride, data.stride)
        half = scene.half
        focal = np.full(data.frames, data.size / 2 / half)
        views = [_view(scene, i, data.size, half) for i in members]
        depth = np.stack([depth for _, depth in views])
        camera = scene.camera[members.start : members.stop : members.step]
        given = {
            "frames": np.stack([image for image, _ in views]),
            "points": unproject(depth, camera, focal),
            "seen": depth > 0,
            "camera": camera,
            "focal": focal[0],
        }
        return clip(given, f"the clip from {scene.images[begin]} on")


def _view(scene: _Scene, i: int, size: int, half: float) -> tuple[np.ndarray, np.ndarray]:
    """The middle of frame i, uint8 [S, S, 3], and its depth [S, S], never blended."""
    image = picture(scene.images[i])
    scene.check_size(i, image.size)
    (fx, fy), (cx, cy) = scene.focal[:, i], scene.k[i, :2, 2]
    (width, height), at = scene.size, (np.arange(size) + 0.5) / size
    left, top = max(cx - half * fx, 0.0), max(cy - half * fy, 0.0)  # it is no less but for rounding
    right, bottom = min(cx + half * fx, float(width)), min(cy + half * fy, float(height))
    columns = np.minimum(np.floor(left + at * (right - left)).astype(int), width - 1)
    rows = np.minimum(np.floor(top + at * (bottom - top)).astype(int), height - 1)
    square = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    return np.asarray(square), scene.depth(i)[rows[:, None], columns]


def picture(path: Path) -> Image.Image:
    """The image of a file, in three channels; UserError where it is none."""
    try:
        with reading(path, "restore it"):
            return open_image(path.read_bytes(), 3, convert=True)[0]
    except BadImage as error:
        raise UserError(f"{path} {error}; {error.advice}") from None


def _size(path: Path) -> tuple[int, int]:
    try:
        return upright_size(path)
    except BadImage as error:
        raise UserError(f"{path} {error}; {error.advice}") from None


def clip(given: Mapping[str, np.ndarray], name: str) -> Example:
    """An example from uint8 `frames` and world `points` [F, H, W, 3], `seen` bool [F, H, W], `camera` [F, 4, 4] and `focal` [].

    UserError, which calls it `name`, where no point is seen or a camera is none.
    """
    seen, camera = given["seen"], given["camera"]
    if not seen.any():
        raise UserError(f"{name} has no point that is seen; leave it out, or give its depth")
    check_rigid(camera, name)
    points = np.where(seen[..., None], given["points"], 0).astype(np.float64)
    if not seen.all():
        from scipy.ndimage import distance_transform_edt

        for f in range(len(seen)):
            if seen[f].any():
                row, column = distance_transform_edt(~seen[f], return_distances=False, return_indices=True)
                points[f] = points[f, row, column]
    normal = normalisation(points, seen, camera)
    points = normal.points(points)
    points[~seen.any((1, 2))] = 0  # wherever the world has its origin
    return {
        "frames": LEVELS[given["frames"]],
        "points": points.astype(np.float32),
        "seen": seen,
        "camera": normal.cameras(camera).astype(np.float32),
        "focal": np.asarray(given["focal"], np.float32),
    }


@lru_cache(maxsize=8)  # a folder is opened several times in a run
def _opened(stamps: tuple[tuple[Path, int], ...], apart: int) -> tuple[_Scene, ...]:
    """The scenes of these folders, some of their frames looked at, and compared with frames `apart` later."""
    scenes = tuple(_read(folder) for folder, _ in stamps)
    each = max(1, LOOKED_AT // len(scenes))
    for scene in scenes[:LOOKED_AT]:
        for i in range(0, len(scene.images), -(-len(scene.images) // each)):
            scene.check_size(i, _size(scene.images[i]))
            if not scene.depth(i).any():
                raise UserError(
                    f"{scene.depths[i]} knows no depth anywhere; give depth, or take the frame out of cameras.json"
                )
    for (folder, _), scene in list(zip(stamps, scenes))[:: -(-len(scenes) // _PAIRS)]:
        _compare(scene, folder, apart)
    return scenes


def _read(folder: Path) -> _Scene:
    path = folder / "cameras.json"
    camera, said = read_cameras(path)
    frames = said["frames"]
    for i, frame in enumerate(frames):
        for key in ("image", "depth"):
            if not isinstance(frame.get(key), str):
                raise UserError(f"{path}: frame {i} names no {key}; add its file, below {folder}")
            if not (folder / frame[key]).is_file():
                raise UserError(
                    f"{folder / frame[key]}, the {key} of frame {i}, does not exist; add it, or take the frame out"
                )
    images = tuple(folder / frame["image"] for frame in frames)
    depths = tuple(folder / frame["depth"] for frame in frames)
    try:
        k = np.asarray([frame.get("K", said.get("K")) for frame in frames], np.float64).reshape(-1, 3, 3)
        own = [frame.get("depth_unit", said.get("depth_unit")) for frame in frames]
        units = tuple(float(unit or (1 if path.suffix == ".npy" else 0.001)) for unit, path in zip(own, depths))
    except (ValueError, TypeError):
        raise UserError(f'{path}: "K" is no 3 x 3 matrix, or "depth_unit" no number; write them as numbers') from None
    width, height = _size(images[0])
    plain = (k[:, 0, 0] > 0) & (k[:, 1, 1] > 0) & (np.abs(k[:, 0, 1]) <= RIGID * k[:, 0, 0]) & (k[:, 1, 0] == 0)
    plain &= (k[:, 2] == [0, 0, 1]).all(-1) & np.isfinite(k).all((1, 2))
    middle = k[:, :2, 2] / [width, height]
    if not plain.all():
        raise UserError(
            f"{path}: K of frame {int(np.argmin(plain))} is not [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]; write it so"
        )
    if (off := np.abs(middle - 0.5).max(-1) > _CENTRAL).any():
        i = int(np.argmax(off))
        raise UserError(
            f"{path}: K of frame {i} has its principal point at ({k[i, 0, 2]:g}, {k[i, 1, 2]:g}), and images are {width}x{height}; "
            f"it seems made for images of about {2 * k[i, 0, 2]:.0f}x{2 * k[i, 1, 2]:.0f}: scale its first two rows to the images"
        )
    return _Scene(images, depths, units, camera, k, (width, height))


# --- whether cameras and depth are what they should be --------------------------------------------


def _compare(scene: _Scene, folder: Path, apart: int) -> None:
    """UserError where another reading of a scene fits better than what is written, or none fits."""
    last = len(scene.images) - apart
    pairs = [(i, i + apart) for i in range(0, last, -(-last // _PAIRS))] if last > 0 else []
    if not pairs:
        return
    camera, k, (width, height) = scene.camera, scene.k, scene.size
    depth = {i: scene.depth(i) for pair in pairs for i in pair}
    flat = {i: x / np.linalg.norm(_rays(k[i], width, height), axis=-1) for i, x in depth.items()}
    half = np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
    readings = {
        "": (camera, k, depth),
        "its cameras have y up and look along -z (OpenGL): change the signs of their second and third columns": (
            camera @ np.diag([1.0, -1.0, -1.0, 1.0]), k, depth,
        ),
        "its matrices take the world to cameras: write their inverses": (np.linalg.inv(camera), k, depth),
        "its depth is the length of rays: divide it by that of [(u + 1/2 - cx) / fx, (v + 1/2 - cy) / fy, 1]": (camera, k, flat),
        "K has the centre of the first pixel at 0, here it lies at 1/2: add 1/2 to both numbers of the principal point": (
            camera, k + half, depth,
        ),
        "the principal point lies half a pixel too far right and down: take 1/2 off both of its numbers": (camera, k - half, depth),
        "its depth is in thousandths of the units of its cameras: set depth_unit to a thousandth of what it is": (
            camera, k, {i: x / 1000 for i, x in depth.items()},
        ),
    }  # fmt: skip
    off = {way: _off(*reading, pairs) for way, reading in readings.items()}
    read, best = off[""], min(off, key=lambda way: off[way])
    what = f"{folder}: a point of one frame is not where others see it, by {read:.2g} of its depth"
    # in a wrong reading frames that do not overlap may seem to, but then nothing fits
    if best and read > _EXACT and off[best] < min(read, _AGREE) / 2:
        raise UserError(f"{what}, and {off[best]:.2g} if {best}")
    if not np.isfinite(read):
        _log.warning("%s: whether its cameras fit cannot be told; frames overlap too little", folder)
    elif read > _AGREE:
        raise UserError(f"{what}; mend cameras or depth (x right, y down, z forward; depth along z, both in one unit)")


def _off(camera: np.ndarray, k: np.ndarray, depth: Mapping[int, np.ndarray], pairs: Sequence[tuple[int, int]]) -> float:
    """Median |log| of depths of points of frame i in frame j over the depths there; infinite where frames do not overlap."""
    found, inside = [], 0.0
    for i, j in pairs:
        height, width = depth[i].shape
        some = slice(None, None, max(1, height // _GRID)), slice(None, None, max(1, width // _GRID))
        near, ray = depth[i][some], _rays(k[i], width, height)[some]
        world = to_world((near[..., None] * ray)[near > 0], camera[i])
        local = to_camera(world, camera[j])
        front = local[local[:, 2] > 1e-9]
        at = (front[:, :2] / front[:, 2:]) @ np.diag([k[j, 0, 0], k[j, 1, 1]]) + k[j, :2, 2] - 0.5
        # between the four pixels around, 1 / depth is exact on planes
        corner = np.floor(at).astype(int)
        fits = (corner >= 0).all(-1) & (corner < [width - 1, height - 1]).all(-1)
        corner, part, z = corner[fits], (at - corner)[fits], front[fits, 2]
        four = np.stack([depth[j][corner[:, 1] + b, corner[:, 0] + a] for b in (0, 1) for a in (0, 1)], -1)
        known = (four > 0).all(-1)
        a, b = part[known].T
        weight = np.stack([(1 - a) * (1 - b), a * (1 - b), (1 - a) * b, a * b], -1)
        found.append(np.abs(np.log(z[known] * (weight / four[known]).sum(-1))))
        inside += fits.sum() / max(1, len(world))
    if inside < _OVERLAP * len(pairs) or not sum(map(len, found)):
        return float("inf")
    return float(np.median(np.concatenate(found)))


def _rays(k: np.ndarray, width: int, height: int) -> np.ndarray:
    x, y = (np.arange(width) + 0.5 - k[0, 2]) / k[0, 0], (np.arange(height) + 0.5 - k[1, 2]) / k[1, 1]
    return np.stack(np.broadcast_arrays(x, y[:, None], 1.0), -1)


# --- point maps -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PointMaps(Data):
    """Clips in an .npz file: `frames` uint8 and `points` [N, F, H, W, 3], `camera` [N, F, 4, 4] to world, `focal` [N] in
    pixels, and where some points are not known `seen` bool [N, F, H, W]. Points must lie where their pixels see them.
    """

    path: NotEmpty
    test_fraction: Below1 = 0.1

    def source(self, split: str, spec: SpecOf | None = None) -> ClipSource:
        """The clips of a split, normalised at once and kept in memory."""
        check_split(split)
        path = existing(self.path)
        return ClipSource(_maps(path, path.stat().st_mtime_ns, split, self.test_fraction))

    def fingerprint(self, split: str) -> str:
        """What the clips of a split are: the bytes of the file."""
        check_split(split)
        path = existing(self.path)
        return sha256_of_json([digests(path.parent, [path.name]), split, self.test_fraction])


@lru_cache(maxsize=4)
def _maps(path: Path, version: int, split: str, test_fraction: float) -> dict[str, np.ndarray]:
    with open_npz(path) as file:
        names = set(file.files)
    clips = {key: read_array(path, key, key, "clips") for key in ("frames", "points", "camera", "focal")}
    shape = clips["points"].shape
    seen = clips["seen"] = read_array(path, "seen", "seen", "clips") if "seen" in names else np.ones(shape[:-1], bool)
    wanted = {"frames": shape, "camera": (*shape[:2], 4, 4), "focal": shape[:1], "seen": shape[:-1]}
    wrong = [f"{key} {list(clips[key].shape)}" for key, size in wanted.items() if clips[key].shape != size]
    if len(shape) != 5 or shape[-1] != 3 or wrong or clips["frames"].dtype != np.uint8 or seen.dtype != bool:
        raise UserError(
            f"{path}: points are {list(shape)}, {', '.join(wrong) or 'frames ' + str(clips['frames'].dtype)}; expected points "
            "[N, F, H, W, 3], frames uint8 of that shape, seen bool [N, F, H, W], camera [N, F, 4, 4], focal [N]"
        )
    clips["seen"] = seen & np.isfinite(clips["points"]).all(-1)
    focal = clips["focal"]
    if len(bad := np.flatnonzero(~((focal > 0) & (focal < np.inf)))):
        raise UserError(f"{path}: focal of clip {bad[0]} is {focal[bad[0]]:g}; give focal lengths in pixels")
    part = divide(shape[0], test_fraction)[split]
    if not part:
        raise UserError(f"{path} leaves no clip for the {split} split; change data.test_fraction")
    found = [clip({key: x[i] for key, x in clips.items()}, f"{path}: clip {i}") for i in part]
    for i in np.flatnonzero(clips["seen"].any((1, 2, 3)))[:: -(-shape[0] // LOOKED_AT) or 1]:
        _place(path, i, {key: x[i] for key, x in clips.items()})
    normal = {key: np.stack([one[key] for one in found]) for key in clips if key != "frames"}
    return {"frames": clips["frames"][part], **normal}


def _place(path: Path, i: int, one: Mapping[str, np.ndarray]) -> None:
    """UserError where the points of a clip do not lie on the rays of their pixels."""
    frames, height, width = one["seen"].shape
    focal, middle = np.full(frames, one["focal"], np.float64), np.array([width, height]) / 2
    at, depth = project(one["points"].astype(np.float64), one["camera"].astype(np.float64), focal, height, width)
    off = (at - middle - centred(height, width))[one["seen"]]
    far = float(np.median(np.where(depth[one["seen"]] > 0, np.abs(off).max(-1), np.inf)))
    if far > _NEAR * width or np.abs(np.median(off, 0)).max() > _SHIFTED:
        raise UserError(
            f"{path}: points of clip {i} are not where their pixels see them, by {far:.2g} pixels in the middle; mend cameras, focal "
            "lengths or points (camera to world, x right, y down, z forward, the centre of the first pixel at 1/2)"
        )
