"""Attention over whole sequences and over a static key/value cache, behind one backend switch.

B batch, T tokens, H heads, K numbers per head.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from zoo.errors import UserError

Cache = dict[str, jax.Array]  # {"k", "v"}: [B, H, K, T], or [L, B, H, K, T] for a scanned stack

BACKENDS = ("xla", "cudnn")


def check_backend(name: str, dtype: str) -> None:
    """UserError when the attention backend cannot serve a network of this dtype."""
    if name not in BACKENDS:
        raise UserError(f"task.attention={name!r} is no attention backend; choose one of {', '.join(BACKENDS)}")
    if name == "cudnn" and dtype != "bfloat16":
        raise UserError(
            f"task.attention='cudnn' computes in bfloat16, but task.dtype={dtype!r}; set task.dtype=bfloat16"
        )


def attend(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool, backend: str = "xla") -> jax.Array:
    """softmax(q k^T / sqrt(K)) v with the softmax in float32.

    Args:
        q, k, v: [B, T, H, K].
        causal: token t attends to tokens up to and including t.
        backend: "xla" anywhere; "cudnn" on NVIDIA GPUs in bfloat16.

    Returns:
        [B, T, H, K] in the dtype of q.
    """
    if backend == "cudnn":
        if jax.default_backend() != "gpu":
            raise UserError("task.attention='cudnn' needs an NVIDIA GPU and there is none here; set task.attention=xla")
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    tokens, head_dim = q.shape[1], q.shape[-1]
    q = q * jnp.asarray(head_dim**-0.5, q.dtype)
    logits = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32)
    if causal:
        logits = jnp.where(jnp.tril(jnp.ones((tokens, tokens), bool)), logits, -jnp.inf)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(logits, axis=-1).astype(v.dtype), v)


def init_cache(layers: int | None, batch: int, tokens: int, heads: int, head_dim: int, dtype: Any) -> Cache:
    """An empty cache for one layer (`layers=None`) or for a scanned stack of them."""
    stack = () if layers is None else (layers,)
    shape = (*stack, batch, heads, head_dim, tokens)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def write_cache(cache: Cache, k: jax.Array, v: jax.Array, index: Any, layer: Any) -> Cache:
    """Put keys and values [B, 1, H, K] of token `index` into the cache of `layer`."""

    def put(where: jax.Array, what: jax.Array) -> jax.Array:
        what = what.transpose(0, 2, 3, 1).astype(where.dtype)  # [B, H, K, 1]
        if layer is None:
            return jax.lax.dynamic_update_slice(where, what, (0, 0, 0, index))
        return jax.lax.dynamic_update_slice(where, what[None], (layer, 0, 0, 0, index))

    return {"k": put(cache["k"], k), "v": put(cache["v"], v)}


def attend_cached(q: jax.Array, cache: Cache, index: Any, layer: Any) -> jax.Array:
    """Attention of the one token q [B, 1, H, K] at position `index` to positions 0..index of the cache."""
    k, v = cache["k"], cache["v"]
    if layer is not None:
        k, v = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (k, v))
    q = (q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype))[:, 0]
    logits = jnp.einsum("bhk,bhkt->bht", q, k, preferred_element_type=jnp.float32)
    logits = jnp.where(jnp.arange(k.shape[-1]) <= index, logits, -jnp.inf)
    return jnp.einsum("bht,bhkt->bhk", jax.nn.softmax(logits, axis=-1).astype(v.dtype), v)[:, None]
