"""Attention over whole sequences and over a static key/value cache, behind one backend switch.

B batch, T tokens, H heads, K numbers per head.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from zoo import dist
from zoo.errors import UserError
from zoo.fields import Dtype

# cudnn is for NVIDIA GPUs in bfloat16, splash for TPUs; auto takes whichever the device has
Backend: TypeAlias = Literal["auto", "xla", "cudnn", "splash"]
_BLOCK = 512  # queries and keys that a TPU kernel holds at a time; fewer where there are fewer tokens
_PART = 64  # queries that XLA computes together: fewer are slower than what they spare [two CPU cores, stages of 16]
_LANES = 128  # numbers in a row of a TPU's vector registers: the smallest block


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of one layer [B, H, K, T], or of a scanned stack of them [L, B, H, K, T]."""

    k: jax.Array
    v: jax.Array
    # slots that attention looks at, the first ones; None: all. Part of the type, so that programs are made for it.
    reach: int | None = dataclasses.field(default=None, metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Stages:
    """Which tokens see each other, by a number for each: those of its own stage and of lower ones, or with `same` its own alone."""

    of: tuple[int, ...]  # [T], never falling
    same: bool = False

    @property
    def mask(self) -> np.ndarray:
        """bool [T, T], queries by keys."""
        of = np.asarray(self.of)
        return of[:, None] == of if self.same else of[:, None] >= of

    @property
    def parts(self) -> list[tuple[int, int, int]]:
        """(first query, end, first key) of the parts in which XLA computes: a stage each, of small ones some together.

        The queries of a part see no key behind its end, and with `same` none before its first query.
        """
        found, begin, end = [], 0, 0
        for _, tokens in itertools.groupby(self.of):
            end += len(list(tokens))
            if end - begin >= _PART or end == len(self.of):
                found.append((begin, end, begin if self.same else 0))
                begin = end
        return found


def check_backend(name: Backend, dtype: Dtype) -> None:
    """UserError when the attention backend cannot serve a network of this dtype."""
    if name == "cudnn" and dtype != "bfloat16":
        raise UserError(
            f"task.attention='cudnn' computes in bfloat16, but task.dtype={dtype!r}; set task.dtype=bfloat16"
        )


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    backend: str = "xla",
    seen: jax.Array | None = None,
    stages: Stages | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v with the softmax in float32.

    Args:
        q: [B, T, H, K].
        k, v: [B, T, H, K], or with fewer heads, each of which serves H over its number of consecutive query heads.
        causal: token t attends to tokens up to and including t.
        backend: "xla" anywhere; "cudnn" on NVIDIA GPUs in bfloat16; "splash" on TPUs, which like cuDNN never holds the
            [T, T] logits; "auto" is whichever of these the device has.
        seen: bool [B, T], the keys that every query may look at; None: all. The kernels take none: "auto" is then "xla".
        stages: in place of `causal`. XLA computes what is seen and no more; cuDNN takes none: "auto" is then "xla" on GPUs.

    Returns:
        [B, T, H, K] in the dtype of q.

    Raises:
        UserError: the device in use has no such kernel, or the kernel takes no `seen` or no stages.
    """
    if seen is not None and backend in ("cudnn", "splash"):
        raise UserError(f"task.attention={backend!r} cannot leave out keys (task.mask); set task.attention=auto or xla")
    device = dist.platform()
    k, v = (x if x.shape[2] == q.shape[2] else jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    if seen is not None:
        backend = "xla"
    if backend == "auto":
        cudnn = stages is None and q.dtype == jnp.bfloat16 and _has_cudnn(device) and _cudnn_takes(q)
        backend = "splash" if device == "tpu" else "cudnn" if cudnn else "xla"
    if backend == "cudnn":
        if stages is not None:
            raise UserError("task.attention='cudnn' knows no stages of tokens; set task.attention=auto or xla")
        if not _has_cudnn(device):
            raise UserError("task.attention='cudnn' needs an NVIDIA GPU and there is none here; set task.attention=xla")
        if not _cudnn_takes(q):
            raise UserError(
                f"task.attention='cudnn' takes heads of at most 128 numbers, in eights, and whole sequences, not heads of "
                f"{q.shape[-1]} or mesh.sequence > 1; set task.attention=xla"
            )
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    if backend == "splash":
        if device != "tpu":
            raise UserError(f"task.attention='splash' is a TPU kernel and this is a {device}; set task.attention=auto")
        return splash(q, k, v, causal=causal, stages=stages)
    return _xla(q, k, v, causal, seen) if stages is None else _staged(q, k, v, stages)


def _has_cudnn(device: str) -> bool:
    """Whether the device in use is an NVIDIA GPU of this machine: cuDNN is asked for its version while tracing."""
    if device != "gpu" or jax.default_backend() != "gpu":
        return False
    return "cuda" in jax.devices()[0].client.platform_version.lower()


def _cudnn_takes(q: jax.Array) -> bool:
    where = dist.spec(q.shape, "batch", "tokens")
    return q.shape[-1] <= 128 and q.shape[-1] % 8 == 0 and (where is None or where[1] is None)


def _staged(q: jax.Array, k: jax.Array, v: jax.Array, stages: Stages) -> jax.Array:
    """By parts, each with the keys that it sees; equal stages that see themselves alone are further examples.

    Heads come in front and keys are turned once for all parts, and weights are divided by their sum after the product: a training
    step of 16 stages of 16 tokens takes 6 % less processor time so [two CPU cores].
    """
    sizes = {len(list(tokens)) for _, tokens in itertools.groupby(stages.of)}
    if stages.same and len(sizes) == 1:
        rows = [x.reshape(-1, *sizes, *x.shape[2:]) for x in (q, k, v)]
        return _xla(rows[0], rows[1], rows[2], False).reshape(q.shape)
    mask, found = stages.mask, []
    q, v = ((q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)).swapaxes(1, 2), v.swapaxes(1, 2))
    k = k.transpose(0, 2, 3, 1)
    for begin, end, first in stages.parts:
        logits = jnp.einsum(
            "bhtk,bhks->bhts", q[:, :, begin:end], k[..., first:end], preferred_element_type=jnp.float32
        )
        seen = mask[begin:end, first:end]
        if not seen.all():
            logits = logits + np.where(seen, 0, -np.inf).astype(np.float32)
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        y = jnp.einsum("bhts,bhsk->bhtk", weights.astype(v.dtype), v[:, :, first:end])
        found.append((y / weights.sum(-1, keepdims=True)).astype(v.dtype))
    return jnp.concatenate(found, 2).swapaxes(1, 2)


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, seen: jax.Array | None = None) -> jax.Array:
    """`seen`: bool [B, S], keys that count."""
    tokens, head_dim = q.shape[1], q.shape[-1]
    q = q * jnp.asarray(head_dim**-0.5, q.dtype)
    logits = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32)
    if causal:
        logits = jnp.where(jnp.tril(jnp.ones((tokens, tokens), bool)), logits, -jnp.inf)
    if seen is not None:
        logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(logits, axis=-1).astype(v.dtype), v)


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    stages: Stages | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`attend` by JAX's block-sparse TPU kernel, on each device for its own examples, heads and queries.

    XLA cannot partition a custom kernel, so this is a `shard_map` over the mesh in use: a sequence axis shares out the
    queries, and every device gets all keys of its examples and heads.

    Args:
        q, k, v: [B, T, H, K]; T is filled up to whole blocks.
        interpret: run the kernel step by step on any device, to check its numbers.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    tokens, heads, head_dim = q.shape[1:]
    mesh = jax.sharding.get_abstract_mesh()
    where = dist.spec(q.shape, "batch", "tokens", "heads", None) or PartitionSpec(None, None, None, None)
    rows, queries, groups, _ = where
    shards = dist.ways(queries)
    # Each device's queries are a whole number of blocks.
    per = -(-tokens // (shards * _LANES)) * _LANES
    block = max(b for b in range(_LANES, min(_BLOCK, per) + 1, _LANES) if per % b == 0)
    padded = per * shards
    own = causal or stages is not None  # each device's queries see other keys
    if stages is not None:  # what is filled up comes last, in a stage of its own
        more = max(stages.of) + 1
        mask: Any = masks.NumpyMask(Stages((*stages.of, *(more,) * (padded - tokens)), stages.same).mask)
    elif causal:  # what is filled up comes last, where no token looks
        mask = masks.CausalMask((padded, padded), shard_count=shards)
    else:  # the same on each device, so the kernel is told of one device's queries only
        seen = np.broadcast_to(np.arange(padded) < tokens, (per, padded))
        mask = masks.FullMask((per, padded)) if padded == tokens else masks.NumpyMask(seen)
    kernel = kernels.make_splash_mha(
        mask=masks.MultiHeadMask([mask] * (heads // dist.ways(groups))),
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=shards if own else 1,
        interpret=interpret,
    )

    def local(kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, H, T, K]
        with jax.named_scope("causal" if own else "full"):  # by which operations are counted
            return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)

    q = q * jnp.asarray(head_dim**-0.5, q.dtype)
    q, k, v = (jnp.pad(x, ((0, 0), (0, padded - tokens), (0, 0), (0, 0))) for x in (q, k, v))
    if mesh.empty:
        return local(kernel, q, k, v)[:, :tokens]
    whole = PartitionSpec(rows, None, groups, None)
    kernel_spec = kernel.manual_sharding_spec(
        jax.sharding.NamedSharding(mesh, PartitionSpec(None, queries if own else None))
    )
    # check_vma: the kernel says nothing of how its outputs vary over the mesh
    shared = jax.shard_map(local, in_specs=(kernel_spec, where, whole, whole), out_specs=where, check_vma=False)
    return shared(kernel, q, k, v)[:, :tokens]


def init_cache(layers: int | None, batch: int, tokens: int, heads: int, head_dim: int, dtype: Any) -> Cache:
    """An empty cache for one layer (`layers=None`) or for a scanned stack of them."""
    stack = () if layers is None else (layers,)
    shape = (*stack, batch, heads, head_dim, tokens)
    names = (*(None for _ in stack), "batch", "heads")
    k, v = (dist.constrain(jnp.zeros(shape, dtype), *names) for _ in range(2))
    return Cache(k, v)


def _tokens_last(cache: jax.Array) -> jax.Array:
    """The cache as it is, for a TPU with its last axis in the lanes.

    Left to itself its compiler turns caches round to write a token in one place, which puts K numbers into rows of 128:
    heads of 64 then take, and every token reads, twice as much as there is. Tokens in the lanes fill them, and a write
    touches the 128 tokens around it [compiled for TPU v5e: 1.6 instead of 4.1 GiB for ImageNet-64].
    """
    head_dim, tokens = cache.shape[-2:]
    if dist.platform() != "tpu" or head_dim % _LANES == 0 or tokens < 4 * _LANES:
        return cache

    def pin(x: jax.Array) -> jax.Array:
        return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))

    # On a mesh each device pins its own part: the partitioner would gather what it does not know how to cut.
    where = dist.spec(cache.shape, *(None,) * (cache.ndim - 4), "batch", "heads")
    return pin(cache) if where is None else jax.shard_map(pin, in_specs=where, out_specs=where, check_vma=False)(cache)


def write_cache(cache: Cache, k: jax.Array, v: jax.Array, index: Any, layer: Any) -> Cache:
    """Put keys and values [B, Q, H, K] of the tokens from `index` on into the cache of `layer`."""

    def put(where: jax.Array, what: jax.Array) -> jax.Array:
        what = what.transpose(0, 2, 3, 1).astype(where.dtype)  # [B, H, K, Q]
        if layer is None:
            return _tokens_last(jax.lax.dynamic_update_slice(where, what, (0, 0, 0, index)))
        return _tokens_last(jax.lax.dynamic_update_slice(where, what[None], (layer, 0, 0, 0, index)))

    return dataclasses.replace(cache, k=put(cache.k, k), v=put(cache.v, v))


def reaches(count: int, size: int = 1) -> list[int]:
    """Into which parts to cut a loop of `count` steps of `size` tokens each, as their ends, so that early tokens look at fewer
    slots (`reaching`).

    On a TPU the slices are read in place: four loops over a quarter each read 5/8 of what one reads. Elsewhere they might
    be copied, which nobody has measured, and there is one loop.
    """
    parts = min(4, count, count * size // (2 * _LANES)) if dist.platform() == "tpu" else 1
    return [count * (i + 1) // parts for i in range(parts)] if parts > 1 else [count]


def reaching(caches: Any, slots: int | None) -> Any:
    """Caches of any number of layers of which attention looks at the first `slots` only, in whole blocks of a TPU's rows."""
    slots = None if slots is None else -(-slots // _LANES) * _LANES
    return jax.tree.map(
        lambda x: dataclasses.replace(x, reach=slots) if isinstance(x, Cache) else x,
        caches,
        is_leaf=lambda x: isinstance(x, Cache),
    )


def clear_cache(caches: Any, index: int) -> Any:
    """Caches of any number of layers with the slots from `index` on as if they had never been written."""
    return jax.tree.map(lambda x: jnp.where(jnp.arange(x.shape[-1]) < index, x, jnp.zeros((), x.dtype)), caches)


def attend_cached(q: jax.Array, cache: Cache, index: Any, layer: Any, *, whole: bool = False) -> jax.Array:
    """Attention of the tokens q [B, Q, H, K] at positions `index`, `index` + 1, ... to the cache up to their own.

    With `whole` they see each other too, that is all up to the last of them. A cache of fewer heads serves H over its number of
    consecutive query heads with each. With a plain integer for `index` the slots behind the last query are not looked at.
    """
    batch, queries, heads, head_dim = q.shape
    slots = index + queries if isinstance(index, int) else min(cache.reach or cache.k.shape[-1], cache.k.shape[-1])
    if layer is None:
        k, v = (x[..., :slots] for x in (cache.k, cache.v))
    else:  # in one slice, which a TPU reads in place
        sizes = (1, *cache.k.shape[1:-1], slots)
        k, v = (jax.lax.dynamic_slice(x, (layer, 0, 0, 0, 0), sizes)[0] for x in (cache.k, cache.v))
    q = q * jnp.asarray(head_dim**-0.5, q.dtype)
    q = q.reshape(batch, queries, k.shape[1], heads // k.shape[1], head_dim)
    if queries > 1 and dist.platform() in ("cpu", "any"):  # where XLA has no such product of bfloat16 into float32
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    logits = jnp.einsum("bqhgk,bhkt->bhgqt", q, k, preferred_element_type=jnp.float32)
    last = jnp.full(queries, queries - 1) if whole else jnp.arange(queries)
    seen = jnp.arange(k.shape[-1]) <= (index + last)[:, None]
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bhgqt,bhkt->bqhgk", weights, v).reshape(batch, queries, heads, head_dim)
