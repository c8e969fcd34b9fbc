"""Made clips: every pixel's point against a ray cast one by one, laws of the families, and what an example follows from."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mistakes import told

from zoo.cameras import project, rays, to_camera
from zoo.data.pipeline import batches
from zoo.data.scenes import _PATH, _SCENE, Room, Scenes, arc, cast
from zoo.papers.wvd.projection import shared

CENTRES = np.stack(np.meshgrid(np.arange(16) + 0.5, np.arange(16) + 0.5), -1)


def lengths(example: dict) -> np.ndarray:
    return np.broadcast_to(example["focal"], len(example["frames"]))


@pytest.mark.parametrize("family", ["one_world", "fixed_room", "open"])
def test_a_point_lies_where_its_pixel_sees_it(family: str) -> None:
    source = Scenes(family, 4, 16, train=6, test=1).source("train")
    for i in range(6):
        e = source[i]
        where, depth = project(e["points"], e["camera"], lengths(e), 16, 16)
        assert np.abs(where - CENTRES).max() < 1e-3
        assert depth.min() > 0.05
        assert e["focal"] == pytest.approx(8 / math.tan(math.radians(30)))
        assert np.abs(e["points"]).max() <= 1 + 1e-6
        if family != "one_world":
            assert np.abs(e["points"]).max() >= 1 - 1e-6
            np.testing.assert_allclose(e["camera"][0, :3, :3], np.eye(3), atol=1e-6)
        assert e["frames"].min() >= -1
        assert e["frames"].max() <= 1
        assert e["seen"].all()


def by_hand(room: Room, n: int, o: np.ndarray, d: np.ndarray) -> float:
    """How far along d one ray from o goes in room n, with the surfaces tried one after another."""
    found = [((h if x > 0 else -h) - a) / x for h, a, x in zip(room.half[n].tolist(), o, d) if x]
    t = min(found)
    for k in range(2):
        if room.ball_there[n, k]:
            away = o - room.ball[n, k]
            a, b, c = d @ d, 2 * d @ away, away @ away - float(room.ball_radius[n, k]) ** 2
            if b * b > 4 * a * c and 0 < (met := (-b - math.sqrt(b * b - 4 * a * c)) / (2 * a)) < t:
                t = met
        if room.box_there[n, k]:
            low, high = room.box[n, k] - room.box_half[n, k], room.box[n, k] + room.box_half[n, k]
            for a in range(3):
                for side in (low[a], high[a]):
                    met = (float(side) - o[a]) / d[a]
                    p = o + met * d
                    others = [b for b in range(3) if b != a]
                    if 0 < met < t and all(low[b] <= p[b] <= high[b] for b in others):
                        t = met
    return t


def test_rays_meet_what_rays_cast_one_by_one_meet() -> None:
    drawn = np.random.default_rng(1).random((12, _SCENE + _PATH), np.float32)
    room = Room(drawn[:, :_SCENE])
    camera, focal = arc(drawn[:, _SCENE:], 3, room.floor), np.full(12, 11, np.float32)
    colour, points = cast(room, camera, focal, 8)
    depth = to_camera(points, camera)[..., 2]
    away = rays(np.asarray(11.0), 8, 8)
    kinds = 0
    for n in range(12):
        for f in range(3):
            turn, o = camera[n, f, :3, :3].astype(float), camera[n, f, :3, 3].astype(float)
            for row, column in ((0, 0), (2, 5), (3, 3), (4, 4), (5, 2), (6, 4), (7, 7)):
                t = by_hand(room, n, o, turn @ away[row, column])
                assert depth[n, f, row, column] == pytest.approx(t, rel=1e-4)
                kinds += (np.abs(np.abs(points[n, f, row, column]) / room.half[n] - 1) > 1e-4).all()
    assert kinds > 20, "some rays meet balls and boxes"
    assert len(np.unique(colour.reshape(-1, 3), axis=0)) > 100


def test_a_camera_stands_in_the_room_above_what_lies_on_the_floor() -> None:
    drawn = np.random.default_rng(2).random((500, _SCENE + _PATH), np.float32)
    room = Room(drawn[:, :_SCENE])
    eye = arc(drawn[:, _SCENE:], 5, room.floor)[..., :3, 3]
    assert (np.abs(eye) < room.half[:, None] - 0.01).all()
    top = np.maximum((room.ball[..., 1] + room.ball_radius).max(1), (room.box + room.box_half)[..., 1].max(1))
    assert (eye[..., 1] >= top[:, None] - 1e-5).all()


def test_families_share_what_they_say() -> None:
    """In one world the points and colours of one clip are seen from the cameras of another; in a fixed room the walls' colours are."""

    def colours(e: dict) -> set:
        return set(map(tuple, e["frames"].reshape(-1, 3).tolist()))

    for family in ("one_world", "fixed_room", "open"):
        source = Scenes(family, 4, 16, fov=90, train=12, test=1, seed=3).source("train")
        same, common = [], []
        for i in range(1, 12):
            a, b = source[0], source[i]
            _, both = shared(a["points"], b["camera"], lengths(b), b["points"], b["seen"])
            where, _ = project(a["points"], b["camera"], lengths(b), 16, 16)
            column, row = np.clip(np.floor(where), 0, 15).astype(int).transpose(3, 0, 1, 2)
            there = b["frames"][np.arange(4)[:, None, None], row, column]
            same += (np.abs(there - a["frames"]).max(-1) < 1e-6)[both].tolist()
            common.append(len(colours(a) & colours(b)) / len(colours(a)))
        if family == "one_world":
            assert np.mean(same) > 0.8
        assert (np.median(common) > 0.3) == (family != "open"), (family, common)
        assert (np.median(common) > 0.7) == (family == "one_world"), (family, common)


def test_an_example_follows_from_seed_split_and_place_alone() -> None:
    few = Scenes("open", 2, 8, train=5, test=5)
    some, test, other = few.source("train"), few.source("test"), replace(few, seed=1).source("train")
    more = replace(few, train=40, test=40).source("train")
    assert (len(some), len(more)) == (5, 40)
    for key, x in some[4].items():
        assert np.array_equal(x, more[4][key]), key
    for source, i in ((other, 4), (test, 4), (some, 3)):
        assert not np.array_equal(some[4]["points"], source[i]["points"])
    with pytest.raises(IndexError):
        some[5]


def test_batches_are_what_a_task_asks_for() -> None:
    shape = (3, 2, 8, 8)
    shapes = {"frames": (*shape, 3), "points": (*shape, 3), "camera": (3, 2, 4, 4), "focal": (3,)}
    spec = {key: jax.ShapeDtypeStruct(one, jnp.float32) for key, one in shapes.items()}
    spec["seen"] = jax.ShapeDtypeStruct(shape, jnp.bool_)
    data = Scenes("open", 2, 8, train=5, test=5)
    stream = batches(data, 3, spec=spec)
    found = next(stream)
    stream.close()
    assert {key: (x.shape, x.dtype) for key, x in found.items()} == {key: (x.shape, x.dtype) for key, x in spec.items()}
    wide = spec | {"frames": jax.ShapeDtypeStruct((3, 4, 16, 16, 3), jnp.float32)}
    with told("set task.frames=2 or data.frames=4, and task.image=8 or data.size=16"):
        next(batches(data, 3, spec=wide))
