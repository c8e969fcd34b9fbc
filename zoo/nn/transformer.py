"""Pre-norm transformer block, and the trunk that owns depth: scan, remat, caches, activation constraints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Self, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn

from zoo.dist import check_divides, constrain
from zoo.errors import UserError
from zoo.nn.attention import Stages, attend, attend_cached, init_cache, write_cache
from zoo.nn.embed import rotate
from zoo.nn.layers import Dense, LayerNorm, RMSNorm, gelu, linear_names, norm_names
from zoo.task import Name, Params

Remat: TypeAlias = Literal["none", "dots", "full"]  # what the backward pass recomputes
REMAT: dict[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def check_rotary(width: int, head_dim: int) -> None:
    """UserError where heads do not divide the width, or positions find no pairs in them to turn."""
    if width % head_dim or head_dim % 2:
        fits = [k for k in range(2, min(head_dim, width) + 1, 2) if width % k == 0]
        raise UserError(
            f"task.head_dim={head_dim} must be even (positions turn pairs) and divide task.width={width}"
            + (f"; choose e.g. task.head_dim={fits[-1]}" if fits else "; choose an even width")
        )


def attend_layer(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: Any,
    index: Any,
    layer: Any,
    *,
    causal: bool,
    backend: str,
    temperature: jax.Array | None = None,
    rope: jax.Array | None = None,
    seen: jax.Array | None = None,
    stages: Stages | None = None,
) -> tuple[jax.Array, Any]:
    """What a layer does with its queries [B, T, H, K], keys and values: turn, temper, and attend with a cache or without.

    Without `causal` the tokens that come to a cache together see each other.

    Args:
        temperature: [B], divides the attention logits of each example.
        rope: [T, K/2], the angles by which queries and keys are turned (`zoo.nn.embed.rotate`).
        seen: bool [B, T], the keys that count where there is no cache.
        stages: in place of `causal`, where there is no cache.

    Returns:
        [B, T, H, K], and the cache.
    """
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope)
    if temperature is not None:
        q = q / temperature[:, None, None, None].astype(q.dtype)
    if cache is None:
        return attend(q, k, v, causal=causal, backend=backend, seen=seen, stages=stages), None
    cache = write_cache(cache, k, v, index, layer)
    return attend_cached(q, cache, index, layer, whole=not causal), cache


class Attention(nn.Module):
    """Multi-head self-attention with one kernel for queries, keys and values."""

    head_dim: int
    causal: bool
    dtype: str = "float32"
    backend: str = "xla"
    qk_norm: bool = False  # RMS norms of each head's queries and keys
    stages: Stages | None = None  # in place of `causal`, where there is no cache

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: Any = None,
        index: jax.Array | None = None,
        layer: jax.Array | None = None,
        **how: Any,
    ) -> tuple[jax.Array, Any]:
        """[B, T, D] -> [B, T, D], and the cache; `how` as of `attend_layer`.

        Kernels keep all numbers of all heads in one axis: TPUs store the last axis in rows of 128, so that an axis of 64
        (one head) would take twice its memory.
        """
        width = x.shape[-1]
        heads = width // self.head_dim
        check_divides(heads, "heads", f"{'/'.join(self.path)}: the number of heads, task.width / task.head_dim,")
        qkv = Dense((3, width), ("embed", None, "heads"), dtype=self.dtype, name="qkv")(x)
        q, k, v = (qkv[..., i, :].reshape(*qkv.shape[:-2], heads, self.head_dim) for i in range(3))
        if self.qk_norm:
            q, k = (RMSNorm(axis=None, name=f"{name}_norm")(x) for x, name in ((q, "query"), (k, "key")))
        own: Any = {"causal": self.causal, "backend": self.backend, "stages": self.stages}
        y, cache = attend_layer(q, k, v, cache, index, layer, **own, **how)
        y = y.reshape(*y.shape[:-2], width)
        return Dense(width, ("heads", "embed"), dtype=self.dtype, name="out")(y), cache


class MLP(nn.Module):
    """Two dense layers with an exact (erf) GELU between them."""

    expand: int = 4
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        h = Dense(self.expand * x.shape[-1], ("embed", "mlp"), dtype=self.dtype, name="up")(x)
        h = gelu(h)
        return Dense(x.shape[-1], ("mlp", "embed"), dtype=self.dtype, name="down")(h)


class GatedMLP(nn.Module):
    """Three dense layers without biases: down(activation(gate x) up x), by default a SwiGLU (arXiv:2002.05202)."""

    hidden: int
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        gate, up = (
            Dense(self.hidden, ("embed", "mlp"), dtype=self.dtype, bias=False, name=name)(x) for name in ("gate", "up")
        )
        down = Dense(x.shape[-1], ("mlp", "embed"), dtype=self.dtype, bias=False, name="down")
        return down(self.activation(gate) * up)


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    head_dim: int
    causal: bool = False
    expand: int = 4
    dtype: str = "float32"
    backend: str = "xla"
    epsilon: float = 1e-5  # of the norms

    @nn.compact
    def __call__(
        self,
        h: jax.Array,
        cache: Any = None,
        index: Any = None,
        layer: Any = None,
        keep: jax.Array | None = None,
        **how: Any,
    ) -> tuple[jax.Array, Any]:
        """h [B, T, D] -> h, cache; `keep` [2, B] are factors on the two branches of each example, `how` as of `attend_layer`."""

        def kept(y: jax.Array, branch: int) -> jax.Array:
            return y if keep is None else y * keep[branch][:, None, None].astype(y.dtype)

        attention = Attention(self.head_dim, self.causal, self.dtype, self.backend, name="attention")
        y, cache = attention(LayerNorm(self.epsilon, name="attention_norm")(h), cache, index, layer, **how)
        h = h + kept(y, 0)
        y = MLP(self.expand, self.dtype, name="mlp")(LayerNorm(self.epsilon, name="mlp_norm")(h))
        return h + kept(y, 1), cache


class Trunk(nn.Module):
    """`depth` copies of a block. It owns depth and nothing else.

    The block must be made with `parent=None`. Scanned, its parameters are stacked under `block/` with a leading layer
    axis; unrolled, they lie under `layer0/`, `layer1/`, ... (faster on CPU, slower to compile everywhere).
    """

    depth: int
    block: nn.Module
    scan: bool = True
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        h: jax.Array,
        cache: Any = None,
        index: Any = None,
        each: Mapping[str, jax.Array] | None = None,
        **values: Any,
    ) -> tuple[jax.Array, Any]:
        """[B, T, D] -> [B, T, D]; with a cache, the T tokens from position `index` on.

        `values` go to every block as they are; of the arrays [depth, ...] in `each` block l gets row l.
        """

        def body(
            block: nn.Module, carry: tuple[jax.Array, Any], own: tuple[jax.Array | None, Mapping[str, Any]]
        ) -> tuple[Any, None]:
            (h, cache), (layer, rows) = carry, own
            h = constrain(h, "batch", "tokens" if cache is None else None, None)
            h, cache = block(h, cache, index, layer, **values, **rows)
            return (h, cache), None

        if self.remat != "none" and cache is None:
            body = nn.remat(body, policy=REMAT[self.remat], prevent_cse=not self.scan)
        if self.scan:
            layers = nn.scan(
                body,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.depth,
                metadata_params={nn.PARTITION_NAME: None},
            )
            (h, cache), _ = layers(self.block, (h, cache), (jnp.arange(self.depth), dict(each or {})))
            return h, cache
        caches = {}
        for i in range(self.depth):
            name = f"layer{i}"
            own = (None, {key: array[i] for key, array in (each or {}).items()})
            (h, caches[name]), _ = body(self.block.copy(name=name), (h, cache[name] if cache else None), own)
        return h, caches if cache else None


class Transformer(nn.Module):
    """Base of networks with a trunk: the sizes that their tasks have by the same names, and how they compute."""

    width: int
    depth: int
    head_dim: int
    dtype: str
    scan: bool
    remat: str
    attention: str

    @classmethod
    def of(cls, like: Any, **fields: Any) -> Self:
        """A network with the sizes that a frozen value has by these names, and fields of its own or in their place."""
        names = ("width", "depth", "head_dim", "dtype", "scan", "remat", "attention")
        return cls(**fields, **{name: getattr(like, name) for name in names if name not in fields})

    @nn.nowrap
    def trunk(self, block: nn.Module) -> Trunk:
        """Its layers; to be called in a compact method."""
        return Trunk(self.depth, block, self.scan, self.remat, name="trunk")

    @nn.nowrap
    def caches(self, rows: int, slots: int) -> Any:
        """Empty caches for so many examples of so many tokens."""
        heads = self.width // self.head_dim
        return init_trunk_cache(self.depth, self.scan, rows, slots, heads, self.head_dim, self.dtype)


def init_trunk_cache(depth: int, scan: bool, batch: int, tokens: int, heads: int, head_dim: int, dtype: Any) -> Any:
    """Empty caches in the layout that `Trunk` uses: one stacked pair when scanned, else one pair per layer.

    Never xs/ys of the layer scan: that would copy every cache at every token.
    """
    if scan:
        return init_cache(depth, batch, tokens, heads, head_dim, dtype)
    return {f"layer{i}": init_cache(None, batch, tokens, heads, head_dim, dtype) for i in range(depth)}


def cast_trunk(params: Any, dtype: str) -> Any:
    """Parameters of a network with the kernels of its `trunk` in `dtype`, once, before a loop that uses them many times."""

    def cast(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return x.astype(dtype) if path[-1].key == "kernel" else x

    return {**params, "trunk": jax.tree_util.tree_map_with_path(cast, params["trunk"])}


def split_trunk(params: Params, n: int) -> tuple[Params, Params]:
    """The first n layers of a trunk, and the others, each as a trunk."""
    if "block" in params:
        return jax.tree.map(lambda x: x[:n], params), jax.tree.map(lambda x: x[n:], params)
    layers = [params[f"layer{i}"] for i in range(len(params))]
    first, rest = ({f"layer{i}": p for i, p in enumerate(part)} for part in (layers[:n], layers[n:]))
    return first, rest


def join_trunks(first: Params, rest: Params) -> Params:
    """The inverse of `split_trunk`."""
    if "block" in first:
        joined: Params = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, rest)
        return joined
    return {**first, **{f"layer{len(first) + i}": rest[f"layer{i}"] for i in range(len(rest))}}


def layer_names(theirs: str, ours: str, layer: int, heads: int = 0) -> list[Name]:
    """A layer of a flow's published PyTorch checkpoint, as a slice of the scanned `Block` ours.

    Args:
        heads: of rotary positions, which turn adjacent pairs of numbers there and halves of a head here; 0: of learned ones.
    """
    pair, sizes = ("h k two", {"h": heads, "two": 2}) if heads else ("h", {})
    half = "(h two k)" if heads else "h"
    qkv = f"{ours}/attention/qkv"
    return [
        *norm_names(f"{theirs}.attention.norm", f"{ours}/attention_norm", layer),
        Name(
            f"{theirs}.attention.qkv.weight", f"{qkv}/kernel", f"(s {pair}) w -> w s {half}", {"s": 3, **sizes}, layer
        ),
        Name(f"{theirs}.attention.qkv.bias", f"{qkv}/bias", f"(s {pair}) -> s {half}", {"s": 3, **sizes}, layer),
        *linear_names(f"{theirs}.attention.proj", f"{ours}/attention/out", f"o ({pair}) -> {half} o", sizes, layer),
        *norm_names(f"{theirs}.mlp.norm", f"{ours}/mlp_norm", layer),
        *linear_names(f"{theirs}.mlp.main.0", f"{ours}/mlp/up", layer=layer),
        *linear_names(f"{theirs}.mlp.main.2", f"{ours}/mlp/down", layer=layer),
    ]
