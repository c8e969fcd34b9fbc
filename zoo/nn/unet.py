"""What U-Nets of images share: the way down through the levels and up again, and how sides are halved and doubled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from zoo.errors import UserError

Resize: TypeAlias = Literal["same", "half", "twice"]


def check_levels(side: int, multiples: tuple[int, ...], attention: tuple[int, ...]) -> None:
    """UserError where an image of this side cannot be halved so often, or no level has a side that should attend."""
    levels = len(multiples)
    step = 2 ** (levels - 1)
    if side % step:
        raise UserError(
            f"task.image={side} is no multiple of {step}, by which {levels} levels "
            f"(task.network.multiples) shrink it; choose one, e.g. task.image={max(1, round(side / step)) * step}"
        )
    sides = [side >> i for i in range(levels)]
    if foreign := [one for one in attention if one not in sides]:
        raise UserError(f"task.network.attention={foreign[0]}: no level has this side; they have {sides}")


def down_and_up(
    h: jax.Array,
    block: Callable[..., Callable[[jax.Array], jax.Array]],
    widths: tuple[int, ...],
    blocks: int,
    attention: tuple[int, ...],
    joined: Callable[[jax.Array, jax.Array], jax.Array],
    halved: Callable[[jax.Array, int], jax.Array] = lambda h, side: h,
    last_attends: bool = False,
) -> jax.Array:
    """[B, R, R, C] through all levels, the finest first, [B, R, R, widths[0]].

    Args:
        block: (name, width, resize, attention) -> a block; the coarsest level always attends, once.
        widths: channels of each level.
        blocks: of a level on the way down; one more on the way up.
        attention: sides of the levels that attend.
        joined: of what comes up and what is kept from the way down.
        halved: of what a level begins with and its side.
        last_attends: on the way up the last block of a level alone.
    """
    side, skips = h.shape[1], []
    for level, width in enumerate(widths):
        if level:
            skips.append(h)
            side //= 2
            h = halved(block(f"enc_{side}_down", h.shape[-1], "half")(h), side)
        for i in range(blocks):
            skips.append(h)
            h = block(f"enc_{side}_block{i}", width, attention=side in attention)(h)
    skips.append(h)
    h = block(f"dec_{side}_in0", h.shape[-1], attention=True)(h)
    h = block(f"dec_{side}_in1", h.shape[-1])(h)
    for level, width in reversed(list(enumerate(widths))):
        if level < len(widths) - 1:
            side *= 2
            h = block(f"dec_{side}_up", h.shape[-1], "twice")(h)
        for i in range(blocks + 1):
            attends = side in attention and (i == blocks or not last_attends)
            h = block(f"dec_{side}_block{i}", width, attention=attends)(joined(h, skips.pop()))
    return h


def resized(x: jax.Array, resize: Resize, taps: tuple[float, ...] = (1, 1), edge: int | None = None) -> jax.Array:
    """[B, H, W, C] at half or twice the side, by a symmetric filter of even length along each side.

    With two equal taps these are means of four pixels, and copies of each. Beyond the border is zero.

    Args:
        edge: zeros around the image when it is halved; when it is doubled, so many of the result's pixels a side are left out.
            None: as many as keep the sides to exactly a half and twice.
    """
    if resize == "same":
        return x
    if len(taps) == 2 and taps[0] == taps[1] and not edge:
        b, h, w, c = x.shape
        if resize == "half":
            return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    edge = len(taps) // 2 - 1 if edge is None else edge
    for axis in (1, 2):
        side = x.shape[axis]
        matrix = _halving(side, taps, edge)
        if resize == "twice":
            matrix = 2 * _halving(2 * side - 2 + len(taps) - 2 * edge, taps, edge).T
        x = jnp.moveaxis(jnp.tensordot(x, jnp.asarray(matrix, x.dtype), ((axis,), (1,))), -1, axis)
    return x


def _halving(side: int, taps: tuple[float, ...], edge: int) -> np.ndarray:
    """The matrix [results, side] of a filter at every second of `side` numbers with `edge` zeros around them.

    A product with it is what matrix units are for; a convolution of each channel by itself is not.
    """
    rows = np.arange((side + 2 * edge - len(taps)) // 2 + 1)
    matrix = np.zeros((len(rows), side + 2 * edge))
    for i, tap in enumerate(taps):
        matrix[rows, 2 * rows + i] = tap / sum(taps)
    return matrix[:, edge : edge + side]
