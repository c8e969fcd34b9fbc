"""TCSM: a transformer that sees all tokens, as denoiser and as log-ratio of whole texts (arXiv:2504.16431).

B texts, T tokens, V vocabulary, W width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from zoo.nn.embed import rope_angles, waves
from zoo.nn.layers import Dense, LayerNorm, Table, gelu, zeros
from zoo.nn.modulated import ModulatedBlock
from zoo.nn.transformer import Block, Trunk

_CODE, _CONDITION = 256, 128  # numbers of the noise: its sines, and what modulates the blocks


class Body(nn.Module):
    """Vectors of tokens -> features that see all of them, told the noise where `time` is set."""

    length: int
    width: int
    depth: int
    head_dim: int
    time: bool
    dtype: str
    scan: bool
    remat: str
    attention: str

    @nn.compact
    def __call__(self, h: jax.Array, noise: jax.Array) -> jax.Array:
        """h [B, T, W] and noise [B] -> [B, T, W].

        Untimed blocks are the plain ones: a constant condition would only be one more scale and shift. Timed ones are those
        of DiT (arXiv:2212.09748), each with a modulation of its own.
        """
        rope = jnp.asarray(rope_angles(np.arange(self.length)[:, None], (self.head_dim // 2,)))
        if self.time:
            code = waves(1000 * noise, _CODE, last=False)
            told = Dense(_CONDITION, (None, None), name="noise")(code)
            told = nn.silu(Dense(_CONDITION, (None, None), name="told")(nn.silu(told)))
            each = Dense(
                (self.depth, 6 * self.width), (None, None, "embed"), kernel_init=zeros, bias=False, name="modulation"
            )
            timed = ModulatedBlock(self.head_dim, dtype=self.dtype, backend=self.attention, parent=None)
            trunk = Trunk(self.depth, timed, self.scan, self.remat, name="trunk")
            h, _ = trunk(h.astype(self.dtype), each={"modulation": jnp.moveaxis(each(told), 1, 0)}, rope=rope)
        else:
            plain = Block(self.head_dim, dtype=self.dtype, backend=self.attention, parent=None)
            trunk = Trunk(self.depth, plain, self.scan, self.remat, name="trunk")
            h, _ = trunk(h.astype(self.dtype), rope=rope)
        return LayerNorm(name="norm")(h)


class Embed(nn.Module):
    """Tokens -> vectors; MASK, which is V, has one as well."""

    vocab: int
    width: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B, T] -> float32 [B, T, W]."""
        return Table(self.vocab + 1, self.width, std=0.02, name="tokens")()[tokens]


class Head(nn.Module):
    """Features -> a number for each of the V tokens, of which none is MASK."""

    vocab: int
    dtype: str

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        """[..., W] -> float32 [..., V]; zero at the start."""
        axes = ("embed", "vocab")
        out = Dense(self.vocab, axes, dtype=self.dtype, kernel_init=zeros, bias_init=zeros, name="out")
        return out(h).astype(jnp.float32)


class Beside(nn.Module):
    """What a clean text's vectors are told of the noisy one's; nothing at the start."""

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        """[B, T, W] -> [B, T, W]."""
        return Dense(h.shape[-1], (None, "embed"), kernel_init=zeros, bias=False, name="in")(h)


class Scalar(nn.Module):
    """Features of a text -> one number."""

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        """[B, T, W] -> float32 [B]; zero at the start."""
        h = gelu(Dense(h.shape[-1], ("embed", None), name="up")(h.astype(jnp.float32).mean(1)))
        return Dense(1, (None, None), kernel_init=zeros, bias_init=zeros, name="out")(h)[:, 0]


def apply(module: nn.Module, params: Any, *inputs: Any) -> Any:
    """What a module gives for these parameters."""
    return module.apply({"params": params}, *inputs)
