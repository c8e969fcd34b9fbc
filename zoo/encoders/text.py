"""T5's text encoder: captions as token ids to features, read from published files and never trained here.

Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer (arXiv:1910.10683), in the later variant
with a gated MLP (Flan-T5) or the first one with ReLU. Attention has no biases, no 1/sqrt(K), and one table of relative
positions that all layers share.
B captions, S tokens each (T as queries), D width, H heads, K numbers per head.
Order of this file: relative positions, network, task, published weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from msgspec import Meta

from zoo.encoders.tokenizer import PAD
from zoo.errors import UserError
from zoo.fields import Count, Dtype, Layers, Size, Vocabulary, check_fields
from zoo.nn.layers import Dense, RMSNorm, Table, normal
from zoo.nn.transformer import Trunk
from zoo.task import About, Name, Params

HOW = "get it with `zoo import starflow/flan_t5_xl FOLDER OUT`"  # to come by one


def relative_buckets(tokens: int, buckets: int, distance: int) -> np.ndarray:
    """The bucket of every (query, key) pair of positions, [T, T] int32.

    The upper half is for keys after the query. Of each half, the first half are exact distances; the others grow by equal
    factors up to `distance`, and the last one takes whatever is beyond.
    """
    half = buckets // 2
    exact = half // 2
    steps = half - exact

    def bucket(n: int) -> int:
        if n < exact:
            return n
        # floor(steps log(n / exact) / log(distance / exact)) in whole numbers, where no rounding can go wrong
        k = 0
        while k < steps - 1 and n**steps * exact ** (k + 1) >= distance ** (k + 1) * exact**steps:
            k += 1
        return exact + k

    near = np.array([bucket(n) for n in range(tokens)], np.int32)
    ahead = np.arange(tokens)[None] - np.arange(tokens)[:, None]
    return near[np.abs(ahead)] + np.where(ahead > 0, half, 0).astype(np.int32)


class TextBlock(nn.Module):
    """Pre-norm attention with a position bias, and a gated or plain MLP, each added to the residual stream.

    The stream and the last product of the MLP are float32 whatever the dtype: they outgrow half precision in large models.
    """

    heads: int
    head_dim: int
    mlp: int
    gated: bool
    dtype: str

    @nn.compact
    def __call__(
        self, h: jax.Array, cache: Any = None, index: Any = None, layer: Any = None, bias: Any = None, mask: Any = None
    ) -> tuple[jax.Array, Any]:
        """h [B, T, D] float32, bias [H, T, S] float32, mask [B, S] (True: a key to attend to) -> h, cache."""
        h = h + self._attention(RMSNorm(name="attention_norm")(h), bias, mask)
        return h + self._mlp(RMSNorm(name="mlp_norm")(h)), cache

    def _attention(self, x: jax.Array, bias: jax.Array, mask: jax.Array) -> jax.Array:
        width, inner = x.shape[-1], self.heads * self.head_dim
        q, k, v = (
            self._dense(inner, ("embed", "heads"), std, name)(x).reshape(*x.shape[:-1], self.heads, self.head_dim)
            for name, std in (("q", (width * self.head_dim) ** -0.5), ("k", width**-0.5), ("v", width**-0.5))
        )
        logits = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32) + bias
        # Not minus infinity: a caption of padding alone must give zeros, not NaN.
        logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
        y = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(logits, axis=-1).astype(v.dtype), v)
        return self._dense(width, ("heads", "embed"), inner**-0.5, "out")(y.reshape(*x.shape[:-1], inner))

    def _mlp(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        up = self._dense(self.mlp, ("embed", "mlp"), width**-0.5, "up")(x)
        if self.gated:
            gate = self._dense(self.mlp, ("embed", "mlp"), width**-0.5, "gate")(x)
            up = up * jax.nn.gelu(gate.astype(jnp.float32), approximate=True).astype(up.dtype)
        else:
            up = jax.nn.relu(up)
        return Dense(
            width, ("mlp", "embed"), dtype="float32", kernel_init=normal(self.mlp**-0.5), bias=False, name="down"
        )(up)

    def _dense(self, features: int, axes: tuple[str, str], std: float, name: str) -> Dense:
        return Dense(features, axes, dtype=self.dtype, kernel_init=normal(std), bias=False, name=name)


class TextNet(nn.Module):
    """Tokens -> the last layer's output."""

    task: T5

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """tokens [B, S], mask [B, S] bool -> normalised features and the residual stream below them, [B, S, D] float32."""
        task = self.task
        h = Table(task.vocab, task.width, std=1.0, name="tokens")()[tokens]
        table = Table(task.buckets, task.heads, std=task.width**-0.5, axis=None, name="bias")()
        bias = table[relative_buckets(tokens.shape[1], task.buckets, task.distance)].transpose(2, 0, 1)
        block = TextBlock(task.heads, task.head_dim, task.mlp, task.gated, task.dtype, parent=None)
        h, _ = Trunk(task.depth, block, task.scan, name="trunk")(h, bias=bias, mask=mask)
        return RMSNorm(name="norm")(h), h


@dataclass(frozen=True)
class T5:
    """The encoder of a T5 model; the defaults are Flan-T5-XL's."""

    width: Size = 2048
    heads: Size = 32
    head_dim: Size = 64
    mlp: Size = 5120
    depth: Layers = 24
    vocab: Vocabulary = 32128
    gated: bool = True  # False: a plain MLP with ReLU, as in the first T5
    buckets: Annotated[int, Meta(ge=4, le=2**18, multiple_of=4)] = 32  # of relative positions, half for each direction
    distance: Count = 128  # beyond which all positions share a bucket
    tokens: Size = 128  # S, of a caption; `encode` takes any number
    dtype: Dtype = "float32"  # of most products; norms, softmax and features stay float32
    scan: bool = True  # scan over layers (compiles fast); False unrolls

    about = About(unit="captions")

    def __post_init__(self) -> None:
        check_fields(self, "task.")
        if self.distance <= self.buckets // 4:
            raise UserError(
                f"task.distance={self.distance} must be more than the {self.buckets // 4} exact distances of "
                f"task.buckets={self.buckets}, e.g. task.distance={4 * self.buckets}"
            )

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`tokens` [B, S], each caption's ids ending in 1 and filled up with 0."""
        return {"tokens": jax.ShapeDtypeStruct((batch, self.tokens), jnp.int32)}

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters, as T5's own training starts: a stand-in where no published file is at hand."""
        tokens = jnp.zeros((1, 1), jnp.int32)  # no parameter depends on their number
        return TextNet(self).init(rng, tokens, tokens == PAD)["params"]

    def encode(self, params: Params, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Features of captions, zero where the mask is.

        Args:
            tokens: [B, S] ids, see `zoo.encoders.tokenizer`.
            mask: [B, S], true or 1 for tokens that count; None: those that are not padding (id 0). Others are neither
                attended to nor given out.

        Returns:
            [B, S, D] float32.
        """
        mask = (tokens != PAD) if mask is None else jnp.asarray(mask).astype(bool)
        features: Any = TextNet(self).apply({"params": params}, tokens, mask)
        return features[0] * mask[..., None]

    def import_names(self) -> list[Name]:
        """The layout of `transformers`' T5EncoderModel (linear maps [out, in])."""
        names = [
            Name("shared.weight", "tokens/table"),
            Name("encoder.embed_tokens.weight", None),  # the same table once more
            Name("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "bias/table"),
            Name("encoder.final_layer_norm.weight", "norm/scale"),
        ]
        mlp = {"wi_0": "gate", "wi_1": "up", "wo": "down"} if self.gated else {"wi": "up", "wo": "down"}
        ours = "trunk/block"
        for l in range(self.depth):
            attention, dense = (f"encoder.block.{l}.layer.{i}" for i in range(2))
            names += [
                Name(f"{attention}.layer_norm.weight", f"{ours}/attention_norm/scale", layer=l),
                Name(f"{dense}.layer_norm.weight", f"{ours}/mlp_norm/scale", layer=l),
            ]
            for theirs, own in {"q": "q", "k": "k", "v": "v", "o": "out"}.items():
                source = f"{attention}.SelfAttention.{theirs}.weight"
                names.append(Name(source, f"{ours}/{own}/kernel", "o i -> i o", layer=l))
            for theirs, own in mlp.items():
                source = f"{dense}.DenseReluDense.{theirs}.weight"
                names.append(Name(source, f"{ours}/{own}/kernel", "o i -> i o", layer=l))
        return names

    def import_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The encoder's part of a published state dict: files of the whole model hold a decoder too."""
        new = {key: array for key, array in state.items() if not key.startswith(("decoder.", "lm_head."))}
        if "shared.weight" not in new and "encoder.embed_tokens.weight" in new:
            new["shared.weight"] = new.pop("encoder.embed_tokens.weight")
        return new


def xl(**fields: Any) -> T5:
    """Flan-T5-XL's encoder, 1.2 billion parameters, as the defaults are; fields may be overridden."""
    return T5(**fields)
