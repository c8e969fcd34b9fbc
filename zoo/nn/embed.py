"""Images to tokens and back."""

from __future__ import annotations

import einops
import jax


def patchify(image: jax.Array, patch: int) -> jax.Array:
    """[B, S, S, C] -> [B, T, D], T = (S/P)^2 in raster order and D = C*P*P.

    Inside a token the order is channel, row, column with the channel slowest, as published flow weights have it.
    """
    return einops.rearrange(image, "b (h p) (w q) c -> b (h w) (c p q)", p=patch, q=patch)


def unpatchify(tokens: jax.Array, patch: int, channels: int) -> jax.Array:
    """[B, T, D] -> [B, S, S, C], the exact inverse of `patchify` for square images."""
    side = round(tokens.shape[1] ** 0.5)
    return einops.rearrange(tokens, "b (h w) (c p q) -> b (h p) (w q) c", h=side, c=channels, p=patch, q=patch)
