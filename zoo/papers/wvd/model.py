"""The network of WVD (arXiv:2412.01821): a transformer over the tokens of all frames, images and points together.

B clips, F frames, L tokens of a frame, T = F L tokens, D numbers of a token, W width. A modality (frames or points) has a module of
its own for what enters and leaves, and the trunk knows none of them: a network of frames alone is a part of one of both.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from zoo.nn.embed import rope_angles, waves
from zoo.nn.layers import Dense, Table, zeros
from zoo.nn.modulated import ModulatedBlock, modulated, spread
from zoo.nn.transformer import Trunk

Pattern: TypeAlias = Literal["joint", "factorised"]


def angles(frames: int, rows: int, columns: int, head_dim: int, base: float) -> np.ndarray:
    """Rotations [F, L, K/2] by frame, row and column: a quarter of a head's pairs, and three eighths each."""
    place = np.stack(np.meshgrid(*map(np.arange, (frames, rows, columns)), indexing="ij"), -1).reshape(-1, 3)
    side = 3 * (head_dim // 2) // 8
    return rope_angles(place, (head_dim // 2 - 2 * side, side, side), base).reshape(frames, rows * columns, -1)


class Modality(nn.Module):
    """What of the network belongs to frames, or to points: the way in, the code of the noise level, the way out.

    `added`: to a network that knew nothing of it, whose output it leaves as it was until it has learned something.
    """

    width: int
    dims: int  # D
    added: bool = False
    dtype: str = "float32"

    def setup(self) -> None:
        start = zeros if self.added else None
        self.tokens = Dense(self.width, (None, "embed"), dtype=self.dtype, kernel_init=start, bias_init=start)
        self.known = Dense(self.width, (None, "embed"), dtype=self.dtype, kernel_init=zeros, bias=False)
        self.level = Dense(self.width, (None, "embed"))
        self.told = Dense(self.width, ("embed", None), kernel_init=start, bias_init=start)
        self.out = Dense(self.dims, ("embed", None), kernel_init=zeros, bias_init=zeros)

    def __call__(self, x: jax.Array, known: jax.Array, level: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """All of it, for fresh parameters."""
        h, told = self.enter(x, known, level)
        return h, told, self.leave(h)

    def enter(self, x: jax.Array, known: jax.Array, level: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens [B, T, D], which of their cells are known [B, T, P P], and noise levels in [0, 1] [B, F] -> [B, T, W] and [B, F, W]."""
        codes = waves(1_000 * level.reshape(-1), self.width).reshape(*level.shape, -1)
        return self.tokens(x) + self.known(known.astype(x.dtype)), self.told(nn.silu(self.level(codes)))

    def leave(self, h: jax.Array) -> jax.Array:
        """[B, T, W] -> [B, T, D], float32."""
        return self.out(h)


class Crossed(nn.Module):
    """Two blocks: one within frames, and one across them at each place; a block of `Trunk`."""

    block: ModulatedBlock
    frames: int

    @nn.compact
    def __call__(
        self,
        h: jax.Array,
        cache: Any = None,
        index: Any = None,
        layer: Any = None,
        *,
        rope: jax.Array,
        modulation: jax.Array,
    ) -> tuple[jax.Array, None]:
        """h [B, T, W] -> h; rope [F, L, K/2], modulation [B, F, 6 W]."""
        batch, tokens, width = h.shape
        grid = (batch, self.frames, tokens // self.frames)
        h = h.reshape(batch * self.frames, -1, width)
        h, _ = self.block.copy(name="space")(h, rope=rope[0], modulation=modulation.reshape(len(h), 1, -1))
        h = h.reshape(*grid, width).swapaxes(1, 2).reshape(-1, self.frames, width)
        h, _ = self.block.copy(name="time")(h, rope=rope[:, 0], modulation=jnp.repeat(modulation, grid[2], 0))
        return h.reshape(batch, grid[2], self.frames, width).swapaxes(1, 2).reshape(batch, tokens, width), None


class WvdTrunk(nn.Module):
    """Tokens of all modalities, added up, and their noise levels -> hidden states that every modality reads its velocity from."""

    frames: int
    rows: int
    columns: int
    width: int
    depth: int
    head_dim: int
    pattern: Pattern = "joint"
    base: float = 100.0
    dtype: str = "float32"
    scan: bool = True
    remat: str = "none"
    backend: str = "xla"

    @nn.compact
    def __call__(self, h: jax.Array, told: jax.Array) -> jax.Array:
        """h [B, T, W], told [B, F, W] -> [B, T, W] float32."""
        places = self.rows * self.columns
        where = Table(places, self.width, std=0.02, name="places")()
        when = Table(self.frames, self.width, std=0.02, name="times")()
        h = h + (when[:, None] + where).reshape(-1, self.width).astype(h.dtype)
        known = nn.silu(told)
        modulation = Dense(6 * self.width, ("embed", None), kernel_init=zeros, bias_init=zeros, name="modulation")(
            known
        )
        last = Dense(2 * self.width, ("embed", None), kernel_init=zeros, bias_init=zeros, name="last")(known)
        rope = jnp.asarray(angles(self.frames, self.rows, self.columns, self.head_dim, self.base))
        joint = self.pattern == "joint"
        spans = (places,) * self.frames
        one = ModulatedBlock(
            self.head_dim,
            norm="rms",
            gated=True,
            qk_norm=True,
            dtype=self.dtype,
            backend=self.backend,
            spans=spans if joint else (),
            parent=None,
        )
        block: nn.Module = one if joint else Crossed(one, self.frames, parent=None)
        trunk = Trunk(self.depth if joint else self.depth // 2, block, self.scan, self.remat, name="trunk")
        h, _ = trunk(h, rope=rope.reshape(-1, rope.shape[-1]) if joint else rope, modulation=modulation)
        shift, scale = (spread(x, spans) for x in jnp.split(last, 2, -1))
        return modulated(h.astype(jnp.float32), shift, scale, "rms")
