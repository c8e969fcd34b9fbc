"""The transformer block of denoisers: a condition shifts, scales and gates each of its branches (adaLN-zero, arXiv:2212.09748).

B batch, T tokens, W width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn

from zoo.nn.attention import Stages
from zoo.nn.layers import Table, zeros
from zoo.nn.transformer import MLP, Attention, GatedMLP

Norm: TypeAlias = Literal["layer", "rms"]


def modulated(x: jax.Array, shift: jax.Array, scale: jax.Array, norm: Norm = "layer") -> jax.Array:
    """norm(x) (1 + scale) + shift over the last axis of [B, T, W], in float32 and cast back; the norm has no scale of its own.

    Args:
        shift, scale: [B, T, W], or [B, 1, W] for all tokens.
    """
    h = x.astype(jnp.float32)
    if norm == "layer":
        h = h - h.mean(-1, keepdims=True)
    h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + 1e-6)
    return (h * (1 + scale) + shift).astype(x.dtype)


def spread(x: jax.Array, spans: Sequence[int]) -> jax.Array:
    """[B, G, W] for spans of neighbouring tokens -> [B, T, W], G numbers of tokens of sum T; one row stays one, for all."""
    if x.shape[1] == 1:
        return x
    found, begin = [], 0
    for span, group in itertools.groupby(spans):
        count = len(list(group))
        found.append(jnp.repeat(x[:, begin : begin + count], span, axis=1))
        begin += count
    return found[0] if len(found) == 1 else jnp.concatenate(found, 1)


class ModulatedBlock(nn.Module):
    """Pre-norm attention and MLP, each shifted and scaled before and gated after by the condition; a block of `Trunk`.

    To the modulation it adds a table of its own, which starts at zero: with a modulation of zeros a fresh block is the identity.
    One modulation for all layers is adaLN-single (arXiv:2310.00426, section 2.3). One a layer, which `Trunk` hands out as
    `each`, is adaLN-zero, with the table for its bias.
    """

    head_dim: int
    causal: bool = False
    expand: int = 4
    norm: Norm = "layer"
    gated: bool = False  # a SwiGLU of as many weights, instead of the GELU between two layers
    qk_norm: bool = False
    dtype: str = "float32"
    backend: str = "xla"
    stages: Stages | None = None  # which tokens see each other, in place of `causal`, where there is no cache
    spans: tuple[int, ...] = ()  # neighbouring tokens that share a row of the modulation

    @nn.compact
    def __call__(
        self,
        h: jax.Array,
        cache: Any = None,
        index: Any = None,
        layer: Any = None,
        *,
        modulation: jax.Array,
        **how: Any,
    ) -> tuple[jax.Array, Any]:
        """h [B, T, W] -> h, cache; `how` as of `zoo.nn.transformer.attend_layer`.

        Args:
            modulation: [B, 6 W], or [B, T, 6 W] where tokens differ (a row for each of `spans`, where there are any): shift,
                scale and gate of attention, then of the MLP.
        """
        width = h.shape[-1]
        parts = modulation.reshape(*modulation.shape[:-1], 6, width)
        parts = parts + Table(6, width, start=zeros, name="modulation")()
        parts = parts if parts.ndim == 4 else parts[:, None]
        rows = (parts[..., i, :] for i in range(6))
        shift0, scale0, gate0, shift1, scale1, gate1 = (spread(x, self.spans) if self.spans else x for x in rows)
        attention = Attention(
            self.head_dim, self.causal, self.dtype, self.backend, self.qk_norm, self.stages, name="attention"
        )
        x = modulated(h, shift0, scale0, self.norm)
        y, cache = attention(x, cache, index, layer, **how)
        h = h + gate0.astype(h.dtype) * y
        hidden = 8 * -(-self.expand * width // 12)  # three kernels of two thirds, in eights
        mlp: nn.Module = (
            GatedMLP(hidden, dtype=self.dtype, name="mlp") if self.gated else MLP(self.expand, self.dtype, name="mlp")
        )
        return h + gate1.astype(h.dtype) * mlp(modulated(h, shift1, scale1, self.norm)), cache
