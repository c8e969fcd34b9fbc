"""Images to tokens and back, and rotary positions."""

from __future__ import annotations

from collections.abc import Sequence

import einops
import jax
import jax.numpy as jnp
import numpy as np

_SLOWEST, _FASTEST = "b (h w) (c p q)", "b (h w) (p q c)"  # where the channel stands inside a token


def patchify(image: jax.Array, patch: int, *, channel_first: bool = True) -> jax.Array:
    """[B, H, W, C] -> [B, T, D], T = H/P W/P in raster order and D = C*P*P.

    Inside a token the order is channel, row, column, or with `channel_first=False` row, column, channel: published flow
    weights come in both.
    """
    layout = _SLOWEST if channel_first else _FASTEST
    return einops.rearrange(image, f"b (h p) (w q) c -> {layout}", p=patch, q=patch)


def unpatchify(
    tokens: jax.Array, patch: int, channels: int, *, rows: int | None = None, channel_first: bool = True
) -> jax.Array:
    """[B, T, D] -> [B, H, W, C], the exact inverse of `patchify` for `rows` rows of tokens; None: a square image."""
    rows = round(tokens.shape[1] ** 0.5) if rows is None else rows
    layout = _SLOWEST if channel_first else _FASTEST
    return einops.rearrange(tokens, f"{layout} -> b (h p) (w q) c", h=rows, c=channels, p=patch, q=patch)


def grid_positions(rows: int, columns: int, reach: float) -> np.ndarray:
    """Row and column of each cell in raster order, float64 [T, 2], scaled so that a grid of any size has the same area.

    A square grid spans [0, reach); one with more cells gets positions in between (STARFlow section 3.2).
    """
    scale = reach / (rows * columns) ** 0.5
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    return np.stack([row.ravel(), column.ravel()], -1) * scale


def sincos(positions: np.ndarray, width: int, base: float = 10_000.0) -> np.ndarray:
    """Fixed codes float32 [T, width] of positions [T, A]: each axis has width / A numbers, sines, then cosines.

    ValueError when the axes do not divide the width into even parts.
    """
    axes = positions.shape[-1]
    if width % (2 * axes):
        raise ValueError(f"codes of {width} numbers cannot be shared out among {axes} axes, sines and cosines")
    rates = base ** (-np.arange(width // (2 * axes)) / (width // (2 * axes)))
    parts = [f(np.outer(p, rates)) for p in positions.T for f in (np.sin, np.cos)]
    return np.concatenate(parts, -1).astype(np.float32)


def waves(x: jax.Array, width: int, base: float = 10_000.0, *, last: bool = True) -> jax.Array:
    """Codes float32 [B, width] of numbers [B]: sines, then cosines, of x times rates from 1 to 1 / base.

    With `last=False` they stop one step before 1 / base, as the transformer's positions do (arXiv:1706.03762, section 3.5).
    """
    return _codes(x, base ** -jnp.linspace(0, 1, width // 2, endpoint=last))


def fourier(x: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Codes float32 [B, 2 F] of numbers [B]: sines, then cosines, of 2 pi x times frequencies [F] (arXiv:2006.10739)."""
    return _codes(x, 2 * jnp.pi * frequencies.astype(jnp.float32))


def _codes(x: jax.Array, rates: jax.Array) -> jax.Array:
    angles = x.astype(jnp.float32)[:, None] * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def rope_angles(positions: np.ndarray, pairs: Sequence[int], base: float = 10_000.0) -> np.ndarray:
    """Angles float32 [T, K/2] of rotary embeddings over several axes.

    Axis i of `positions` [T, A] turns pairs[i] pairs of numbers, the j-th at the rate base^(-j / pairs[i]).
    """
    parts = [np.outer(p, base ** (-np.arange(n) / n)) for p, n in zip(positions.T, pairs, strict=True)]
    return np.concatenate(parts, -1).astype(np.float32)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turn the pairs (x_i, x_{i + K/2}) of x [B, T, H, K] by angles [T, K/2]; float32 inside, the dtype of x outside.

    Weights made for adjacent pairs (x_2i, x_2i+1) serve after their rows are reordered: halves are whole registers.
    """
    sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
