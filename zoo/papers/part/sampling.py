"""Where patches are taken, what they show, and how they lie to each other. Nothing here is learned.

A box is a start and a size, float32 [..., 2, A] with A = 2 axes (x, y) of an image or A = 1 of a series, in pixels or samples from
the upper left edge: pixel k covers [k, k + 1]. B examples, N patches, P patch, C channels, R numbers of a relation.
"""

from __future__ import annotations

from collections.abc import Sequence

import einops
import jax
import jax.numpy as jnp
import numpy as np


def sample_boxes(
    rng: jax.Array,
    count: Sequence[int],
    extent: Sequence[int],
    smallest: float,
    largest: float,
    *,
    whole: bool = False,
) -> jax.Array:
    """Boxes [*count, 2, A]: sizes uniform in [smallest, largest], each axis for itself, then a start uniform in what is left.

    Args:
        extent: of the signal along each axis, (width, height) or (samples,); at least `largest`.
        whole: start and size are whole numbers, as where patches are cut without resizing.
    """
    one, two = jax.random.split(rng)
    shape, room = (*count, len(extent)), jnp.asarray(extent, jnp.float32)
    if whole:
        size = jax.random.randint(one, shape, round(smallest), round(largest) + 1).astype(jnp.float32)
        start = jnp.floor(jax.random.uniform(two, shape) * (room - size + 1))
        return jnp.stack([jnp.minimum(start, room - size), size], -2)
    size = jax.random.uniform(one, shape, minval=smallest, maxval=largest)
    return jnp.stack([jax.random.uniform(two, shape) * (room - size), size], -2)


def grid_boxes(extent: Sequence[int], patch: int) -> np.ndarray:
    """The boxes [N, 2, A] of the regular grid, in raster order."""
    cells = [np.arange(side // patch) * patch for side in reversed(extent)]  # the slowest axis, y, first
    start = np.stack([axis.ravel() for axis in np.meshgrid(*cells, indexing="ij")][::-1], -1)
    return np.stack([start, np.full_like(start, patch)], -2).astype(np.float32)


def grid_patches(signal: jax.Array, patch: int) -> jax.Array:
    """The patches [B, N, P, P, C] (of series [B, N, P, C]) of the regular grid, in raster order."""
    layout = "b (t p) c -> b t p c" if signal.ndim == 3 else "b (h p) (w q) c -> b (h w) p q c"
    return einops.rearrange(signal, layout, p=patch, **({} if signal.ndim == 3 else {"q": patch}))


def crop(signal: jax.Array, boxes: jax.Array, patch: int) -> jax.Array:
    """What boxes [B, N, 2, A] show of images [B, H, W, C] or series [B, L, C], at P samples an axis: [B, N, P, P, C] or [B, N, P, C].

    Linear interpolation at the centres of P equal cells; where a box is larger than P, the triangle is as wide as a cell, so that nothing
    aliases. A box of P pixels that begins at a whole one gives just these. As matrix products, which accelerators are
    best at: a gather of single pixels is their worst.
    """
    axes = tuple(range(boxes.shape[-1]))

    def one(signal: jax.Array, box: jax.Array) -> jax.Array:
        start, size = box[..., ::-1]  # rows of an image come first
        shape = (*(patch for _ in axes), signal.shape[-1])
        found: jax.Array = jax.image.scale_and_translate(
            signal, shape, axes, patch / size, -start * patch / size, method="linear", antialias=True
        )
        return found

    return jax.vmap(jax.vmap(one, (None, 0)))(signal, boxes)


def relation(reference: jax.Array, target: jax.Array, *, sizes: bool = True, centred: bool = True) -> jax.Array:
    """How boxes `target` lie to `reference`, both [..., 2, A]: [..., R], R = 2 A, or A without `sizes` (spec of the official code).

    (centre of the target - centre of the reference) / size of the reference along each axis, then the size of the target /
    size of the reference. With `centred=False` the starts instead of the centres.
    """
    half = 0.5 if centred else 0.0
    places = [box[..., 0, :] + half * box[..., 1, :] for box in (reference, target)]
    shift = (places[1] - places[0]) / reference[..., 1, :]
    return jnp.concatenate([shift, target[..., 1, :] / reference[..., 1, :]], -1) if sizes else shift


def rebuild(relations: jax.Array, axes: int, most: float, *, centred: bool = True) -> jax.Array:
    """Boxes [..., N, 2, A] from all relations [..., N, N, R] between them, made consistent by least squares.

    Relations leave place and scale open: the mean centre is 0 and the geometric mean size 1. Every pair is counted both ways
    round; on the graph of all pairs the least squares solution is the mean over references.

    Args:
        most: the largest ratio of sizes that there may be; predicted ones are cut to it, and may even be negative.
    """
    shift, ratio = relations[..., :axes], relations[..., axes:]
    if not ratio.shape[-1]:
        size = jnp.ones((*relations.shape[:-2], axes))
    else:
        log = jnp.log(jnp.clip(ratio, 1 / most, most))
        size = jnp.exp(0.5 * (log - log.swapaxes(-2, -3)).mean(-3))
        size = size / jnp.exp(jnp.log(size).mean(-2, keepdims=True))
    apart = shift * size[..., :, None, :]
    place = 0.5 * (apart - apart.swapaxes(-2, -3)).mean(-3)
    centre = place if centred else place + 0.5 * size
    centre = centre - centre.mean(-2, keepdims=True)
    return jnp.stack([centre - 0.5 * size, size], -2)


def random_resized_crop(rng: jax.Array, image: jax.Array, least: float) -> jax.Array:
    """A part of each image [B, S, S, C], back at its size: a share uniform in [least, 1] of the area, sides 3:4 to 4:3.

    Sides that would be longer than the image are cut to it, so that the largest parts are a little smaller.
    """
    one, two, three = jax.random.split(rng, 3)
    count, side = image.shape[:2]
    area = jax.random.uniform(one, (count, 1), minval=least, maxval=1.0)
    root = jnp.exp(jax.random.uniform(two, (count, 1), minval=-1.0, maxval=1.0) * np.log(4 / 3) / 2)
    size = side * jnp.minimum(jnp.sqrt(area) * jnp.concatenate([root, 1 / root], -1), 1.0)
    start = jax.random.uniform(three, (count, 2)) * (side - size)
    return crop(image, jnp.stack([start, size], -2)[:, None], side)[:, 0]


def pad_crop(rng: jax.Array, image: jax.Array) -> jax.Array:
    """Each image [B, S, S, C] shifted by up to an eighth of its side along both axes (4 of 32 pixels), black (-1) outside."""
    edge = image.shape[1] // 8
    padded = jnp.pad(image, ((0, 0), (edge, edge), (edge, edge), (0, 0)), constant_values=-1)
    start = jax.random.randint(rng, (len(image), 2), 0, 2 * edge + 1)

    return jax.vmap(lambda whole, at: jax.lax.dynamic_slice(whole, (at[0], at[1], 0), image.shape[1:]))(padded, start)
