"""The network of DART (arXiv:2410.08159): a transformer over the noisy copies of an example, one block of tokens for each.

B examples, T copies, K tokens of a copy, D numbers a token, S tokens of a caption in front, W width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from zoo.nn.attention import Stages
from zoo.nn.embed import rope_angles, waves
from zoo.nn.layers import Dense, Table, zeros
from zoo.nn.modulated import ModulatedBlock, modulated, spread
from zoo.nn.transformer import Trunk, init_trunk_cache

Mask: TypeAlias = Literal["blocks", "tokens", "same"]


@dataclass(frozen=True)
class Layout:
    """Where tokens stand in the sequence: a caption, then blocks of rows x columns tokens, of the same picture in all sizes.

    A caption that is written has its place once more behind them, and each of its letters sees those before it.
    """

    grids: tuple[tuple[int, int], ...]  # rows and columns of each block, of which the last has most
    prefix: int = 0  # S
    written: bool = False

    @property
    def size(self) -> int:
        """K of the last block."""
        return math.prod(self.grids[-1])

    @property
    def end(self) -> int:
        """Slot behind the last block."""
        return self.slots - self.prefix * self.written

    @property
    def slots(self) -> int:
        """Tokens in all."""
        return sum(self.spans)

    @cached_property
    def spans(self) -> tuple[int, ...]:
        """Tokens of each part: a caption and every block is one."""
        caption = (self.prefix,) if self.prefix else ()
        return (*caption, *(rows * columns for rows, columns in self.grids), *(caption if self.written else ()))

    @cached_property
    def part(self) -> np.ndarray:
        """[slots], counted from 0."""
        return np.repeat(np.arange(len(self.spans)), self.spans)

    @cached_property
    def places(self) -> np.ndarray:
        """Of the tokens of blocks, one number for each place of each size of block."""
        first = dict(zip(sizes := list(dict.fromkeys(self.grids)), np.cumsum([0, *map(math.prod, sizes)])))
        return np.concatenate([first[grid] + np.arange(math.prod(grid)) for grid in self.grids])

    def stages(self, same: bool) -> Stages:
        """Which tokens see which."""
        part = self.part
        new = np.diff(part, prepend=-1) > 0
        if self.written:  # a stage for each letter
            new |= (part == 0) | (part == len(self.spans) - 1)
        return Stages(tuple((np.cumsum(new) - 1).tolist()), same)

    def angles(self, head_dim: int, base: float) -> np.ndarray:
        """Rotations [slots, K/2] by step, row and column; the words of a caption stand before the first step, at no place.

        A quarter of a head's pairs turn by the step, three eighths each by row and by column, in units of the last block's
        tokens: those of a smaller one stand at the centres of what they cover.
        """
        parts = [np.stack([np.arange(-self.prefix, 0), *np.zeros((2, self.prefix))], 1)]
        for step, grid in enumerate(self.grids):
            row, column = ((np.arange(n) + 0.5) * whole / n - 0.5 for n, whole in zip(grid, self.grids[-1]))
            parts.append(np.stack(np.meshgrid([step], row, column, indexing="ij"), -1).reshape(-1, 3))
        if self.written:
            parts.append(np.stack([len(self.grids) + np.arange(self.prefix), *np.zeros((2, self.prefix))], 1))
        pairs = head_dim // 2
        return rope_angles(np.concatenate(parts), (pairs // 4, 3 * pairs // 8, 3 * pairs // 8), base)


class DartNet(nn.Module):
    """Noisy copies -> for each token what its x0 is read from, all at once, or some after others with a cache.

    With `mask="blocks"` a token sees its own block and those before; with "same" its own alone; with "tokens" what came before
    it, and its output is of the token that follows.
    """

    layout: Layout
    dims: int  # D
    width: int
    depth: int
    head_dim: int
    mask: Mask
    condition: int  # E, numbers of a class or of a word; 0: there is neither
    base: float = 10_000.0  # of the rotations
    gated: bool = True
    dtype: str = "float32"
    scan: bool = True
    remat: str = "none"
    backend: str = "xla"

    @nn.compact
    def __call__(
        self, x: jax.Array | None, condition: jax.Array | None = None, cache: Any = None, index: Any = 0
    ) -> tuple[Any, Any, Any, Any]:
        """x [B, Q, D] -> output [B, Q, D] and hidden states [B, Q, W], float32, the letters' logits [B, S', E - 1], and the cache.

        Without a cache x are the tokens of all blocks. With one, they are those from slot `index` on, all of one block;
        `x=None` puts the caption into it, or some of its letters.

        Args:
            condition: [B, 1, E], a class, or [B, S, E], a caption; one that is written twice, for before and behind. None where
                there is neither, and with a cache that has it.
        """
        at, caption = self.layout, self.layout.prefix
        steps = Table(len(at.spans), self.width, std=1.0, name="steps")()
        if cache is not None:  # one block, or the caption
            steps = steps[jnp.asarray(at.part)[index]][None]
        known = steps[None]
        if self.condition and not caption:
            label = Dense(self.width, (None, "embed"), bias=False, name="label")
            known = known + label(condition * self.condition**0.5)
        known = nn.silu(known)

        def fresh_zeros(features: int | tuple[int, ...], name: str, *, bias: bool = True) -> Dense:
            axes = ("embed", *(None,) * (1 if isinstance(features, int) else len(features)))
            return Dense(features, axes, kernel_init=zeros, bias_init=zeros, bias=bias, name=name)

        each = jnp.moveaxis(fresh_zeros((self.depth, 6 * self.width), "modulation", bias=False)(known), -2, 0)
        shift, scale = jnp.split(fresh_zeros(2 * self.width, "last")(known), 2, -1)
        parts, behind = [], []
        if caption and condition is not None:
            words = Dense(self.width, (None, "embed"), dtype=self.dtype, name="words")(condition)
            if at.written:
                place = (0 if cache is None else index - (index >= at.end) * at.end) + jnp.arange(condition.shape[1])
                letters = Table(caption, self.width, std=0.02, name="letters")()[place % caption]
                words = words + letters.astype(self.dtype)
            parts, behind = [words[:, :caption]], [words[:, caption:]]
        if x is not None:
            h = Dense(self.width, (None, "embed"), dtype=self.dtype, name="in")(x)
            place = jnp.asarray(at.places)[(0 if cache is None else index - caption) + jnp.arange(x.shape[1])]
            h = h + Table(int(at.places.max()) + 1, self.width, std=0.02, name="positions")()[place].astype(self.dtype)
            if self.mask == "tokens":  # where the token that follows stands
                h = h + Table(at.size, self.width, std=0.02, name="next")()[(place + 1) % at.size].astype(self.dtype)
            parts.append(h)
        h = jnp.concatenate([*parts, *behind], 1)
        rope: Any = jnp.asarray(at.angles(self.head_dim, self.base))
        if cache is not None:
            rope = jax.lax.dynamic_slice_in_dim(rope, index, h.shape[1])
        spans = at.spans
        block = ModulatedBlock(
            self.head_dim,
            self.mask == "tokens" or (at.written and x is None),
            norm="rms",
            gated=self.gated,
            qk_norm=True,
            dtype=self.dtype,
            backend=self.backend,
            stages=None if self.mask == "tokens" else at.stages(self.mask == "same"),
            spans=spans,
            parent=None,
        )
        trunk = Trunk(self.depth, block, self.scan, self.remat, name="trunk")
        slot = 0 if self.mask == "same" else index  # a block that sees itself alone takes the place of the one before
        h, cache = trunk(h, cache, slot, {"modulation": each}, rope=rope)
        if x is None and not at.written:
            return None, None, None, cache
        h = modulated(h.astype(jnp.float32), spread(shift, spans), spread(scale, spans), "rms")
        logits = None
        if at.written and condition is not None:
            first = 0 if x is None else x.shape[1]
            text = h if x is None else jnp.concatenate([h[:, :caption], h[:, caption + first :]], 1)
            logits = fresh_zeros(self.condition - 1, "letter")(text)
        if x is None:
            return None, None, logits, cache
        begin = caption if cache is None else 0
        h = h[:, begin : begin + x.shape[1]]
        # float32: x0 has more levels than bfloat16
        return fresh_zeros(self.dims, "out")(h), h, logits, cache

    @nn.nowrap
    def memory(self, rows: int) -> Any:
        """Empty caches for so many examples."""
        heads, slots = self.width // self.head_dim, self.layout.size if self.mask == "same" else self.layout.slots
        return init_trunk_cache(self.depth, self.scan, rows, slots, heads, self.head_dim, self.dtype)


class FlowHead(nn.Module):
    """The velocity that carries a proposal for the next copy of a token to it: DART-FM, a small network for each token alone."""

    width: int
    depth: int = 3

    @nn.compact
    def __call__(self, z: jax.Array, time: jax.Array, hidden: jax.Array) -> jax.Array:
        """z [..., D] at times [...] between 0, the proposal, and 1, given hidden states [..., W] -> velocity [..., D], float32."""
        codes = waves(1_000 * time.reshape(-1), self.width - self.width % 2).reshape(*time.shape, -1)
        known = Dense(self.width, (None, "embed"), name="time")(codes) + Dense(
            self.width, (None, "embed"), name="known"
        )(hidden)
        known = nn.silu(known)
        h = Dense(self.width, (None, "embed"), name="in")(z)
        for i in range(self.depth):
            told = Dense(3 * self.width, ("embed", None), kernel_init=zeros, bias_init=zeros, name=f"told{i}")(known)
            shift, scale, gate = jnp.split(told, 3, -1)
            y = Dense(self.width, ("embed", "mlp"), name=f"up{i}")(modulated(h, shift, scale))
            h = h + gate * Dense(self.width, ("mlp", "embed"), name=f"down{i}")(nn.silu(y))
        out = Dense(z.shape[-1], ("embed", None), kernel_init=zeros, bias_init=zeros, name="out")
        return out(modulated(h, jnp.zeros(()), jnp.zeros(())))
