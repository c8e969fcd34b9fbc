"""Points carried from one view into others: z-buffers, the gaps they leave, and which pixels two views share (arXiv:2412.01821).

The z-buffer is written for JAX and traced: it runs in the loss and in the sampler. What compares finished clips takes NumPy too.
N points, H x W pixels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from zoo.cameras import Array, project

_BEHIND = 5.0  # pixels of depth, as 2 % are at 256 x 256, from which on a point shows through what is in front of it
_NEAR = 1.5  # pixels that a carried point may lie off
_AROUND = 5  # of eight neighbours that a crack must have
_COVERED = 6  # of eight neighbours that are in front of what shows through: a line of it has two of its own


def splat(
    points: jax.Array, seen: jax.Array, camera: jax.Array, focal: jax.Array, size: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Which point each pixel sees: the nearest of those that fall on it, the first of equally near ones.

    Args:
        points: [N, 3].
        seen: bool [N]: the others are left out.
        camera: [4, 4].
        focal: [].
        size: H and W.

    Returns:
        The number of the point, int32 [H, W], -1 where there is none; its depth [H, W], infinite there.
    """
    height, width = size
    where, depth = project(points, camera, focal, height, width)
    column, row = jnp.floor(where[:, 0]).astype(jnp.int32), jnp.floor(where[:, 1]).astype(jnp.int32)
    inside = seen & (depth > 1e-6) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    cell = jnp.where(inside, row * width + column, height * width)  # the last is thrown away
    nearest = jnp.full(height * width + 1, jnp.inf, depth.dtype).at[cell].min(depth)
    wins = inside & (depth == nearest[cell])
    count = len(points)
    place = jnp.full(height * width + 1, count, jnp.int32).at[jnp.where(wins, cell, height * width)]
    number = place.min(jnp.arange(count, dtype=jnp.int32))[:-1]
    hit = number < count
    shape = (height, width)
    return jnp.where(hit, number, -1).reshape(shape), jnp.where(hit, nearest[:-1], jnp.inf).reshape(shape)


def mended(number: jax.Array, depth: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What `splat` gives without what shows through a nearer surface, and with cracks of one pixel filled.

    A point is dropped where it is far behind six of the eight pixels around it: 2 % of their depth in images of 256 pixels,
    more in smaller ones, where a slope takes larger steps. A pixel without a point takes the nearest one of its neighbours
    where at least five of the eight have one.
    """
    around = _neighbours(depth, jnp.inf)
    nearer = (around < depth / (1 + _BEHIND / depth.shape[1])).sum(0) >= _COVERED
    number, depth = jnp.where(nearer, -1, number), jnp.where(nearer, jnp.inf, depth)
    around, numbers = _neighbours(depth, jnp.inf), _neighbours(number, -1)
    best = around.argmin(0)[None]
    crack = (number < 0) & (jnp.isfinite(around).sum(0) >= _AROUND)
    number = jnp.where(crack, jnp.take_along_axis(numbers, best, 0)[0], number)
    return number, jnp.where(crack, jnp.take_along_axis(around, best, 0)[0], depth)


def _neighbours(image: jax.Array, beyond: float) -> jax.Array:
    """The eight pixels around each, [8, H, W]."""
    height, width = image.shape
    padded = jnp.pad(image, 1, constant_values=beyond)
    steps = [(a, b) for a in range(3) for b in range(3) if (a, b) != (1, 1)]
    return jnp.stack([padded[a : a + height, b : b + width] for a, b in steps])


def carried(
    points: jax.Array, seen: jax.Array, camera: jax.Array, focal: jax.Array, size: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Images [F, H, W, 3] of points in the views of cameras [F, 4, 4], and where they show something, bool [F, H, W].

    What a cell shows is one point, to the bit; 0 elsewhere.

    Args:
        points: [N, 3].
        seen: bool [N].
        focal: [].
    """

    def view(one: jax.Array) -> tuple[jax.Array, jax.Array]:
        number, _ = mended(*splat(points, seen, one, focal, size))
        return jnp.where((number >= 0)[..., None], points[number], 0), number >= 0

    with jax.default_matmul_precision(
        "float32"
    ):  # a TPU's own products of 8 bits move points by a third of a pixel of 256
        return jax.vmap(view)(camera)


def filled(image: jax.Array, known: jax.Array) -> jax.Array:
    """Images [F, H, W, C] with the value of a near known pixel in the place of each that is not (`known` bool [F, H, W]).

    Jump flooding: each pixel asks those at distances of half the side, a quarter, ... 1 for the nearest that they know of.
    """
    height, width = known.shape[-2:]
    own = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), -1)

    def one(image: jax.Array, known: jax.Array) -> jax.Array:
        source = jnp.where(known[..., None], own, 4 * (height + width))  # far away: knows of none
        for step in (2**k for k in reversed(range(max(height, width).bit_length()))):
            asked = [(own + step * jnp.asarray((a, b))) for a in (-1, 0, 1) for b in (-1, 0, 1)]
            told = jnp.stack(
                [source[jnp.clip(y[..., 0], 0, height - 1), jnp.clip(y[..., 1], 0, width - 1)] for y in asked]
            )
            best = jnp.square(told - own).sum(-1).argmin(0)
            source = jnp.take_along_axis(told, best[None, ..., None], 0)[0]
        return image[jnp.minimum(source[..., 0], height - 1), jnp.minimum(source[..., 1], width - 1)]

    return jax.vmap(one)(image, known)


def told_by_first(points: jax.Array, seen: jax.Array, camera: jax.Array, focal: jax.Array) -> jax.Array:
    """Pixels of each frame that the first one tells when it is carried there, bool [F, H, W]: what is known of a clip in training.

    Where a point of the first frame falls on them and lies where theirs does, within one and a half of what a pixel covers
    there. (At 256 pixels that is about the .02 of a scene; a pixel of 16 covers .13.)

    Args:
        points: [F, H, W, 3].
        seen: bool [F, H, W].
        camera: [F, 4, 4].
        focal: [].
    """
    height, width = seen.shape[1:]
    found, hit = carried(points[0].reshape(-1, 3), seen[0].reshape(-1), camera, focal, (height, width))
    with jax.default_matmul_precision("float32"):
        _, depth = project(points, camera, jnp.broadcast_to(focal, camera.shape[:1]), height, width)
    off = jnp.linalg.norm(found - points, axis=-1)
    return hit & seen & (off <= _NEAR * depth / focal)


def shared(
    points: Array, camera: Array, focal: Array, other: Array, there: Array, tolerance: float = 0.05
) -> tuple[Array, Array]:
    """Where another view sees the same points: (column, row) [..., H, W, 2] in it, and whether it does, bool [..., H, W].

    It does where a point falls inside its image and the surface there is not nearer or farther by more than `tolerance` of
    the depth.

    Args:
        points: [..., H, W, 3] of one view.
        camera: [..., 4, 4] of the other view.
        focal: [...] of the other view.
        other: points [..., H, W, 3] of the other view.
        there: bool [..., H, W], seen in the other view.
    """
    xp = points.__array_namespace__()
    height, width = points.shape[-3:-1]
    where, depth = project(points, camera, focal, height, width)
    inside = (depth > 1e-6) & (where >= 0).all(-1) & (where[..., 0] < width) & (where[..., 1] < height)
    column = xp.clip(xp.floor(where[..., 0]), 0, width - 1).astype(xp.int32)
    row = xp.clip(xp.floor(where[..., 1]), 0, height - 1).astype(xp.int32)
    _, surface = project(other, camera, focal, height, width)
    flat = xp.where(there, surface, xp.inf).reshape(*surface.shape[:-2], -1)
    found = xp.take_along_axis(flat, (row * width + column).reshape(flat.shape), -1).reshape(depth.shape)
    return where, inside & (xp.abs(found - depth) <= tolerance * depth)
