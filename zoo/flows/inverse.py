"""Inverses of autoregressive affine flows, and the guidance that bends them. One jitted program each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from zoo.errors import UserError
from zoo.flows.transforms import affine_inverse

# (tokens [B, Q, D], cache, index of the first) -> scale and shift of the tokens behind them [B, Q, D] each, cache
Step = Callable[[jax.Array, Any, jax.Array], tuple[jax.Array, jax.Array, Any]]


@dataclass(frozen=True)
class Guidance:
    """How far scale and shift of a token are pushed away from those of a second, weaker pass.

    The second pass has no label and no caption, and divides its attention logits by `attention_temperature`. A weight of
    0 is no guidance (the usual guidance scale is 1 + weight).

    Rules, with scale s = exp(a), shift b, and w the weight:
      linear: a + w (a - a_weak) and b + w (b - b_weak) (TarFlow, arXiv:2412.06329).
      linear_scale: s + w (s - s_weak) in place of the log-scale (STARFlow, arXiv:2506.06276, its first baseline).
      gaussian: the Gaussian whose score is (1 + w) score - w score_weak (STARFlow, Proposition 2): with
        r = min(s / s_weak, 1)^2 and d = 1 + w - w r, scale s / sqrt(d) and shift b + w r / d (b - b_weak).
    """

    weight: float = 0.0
    what: Literal["ab", "a", "b"] = "ab"  # scale and shift, scale only, shift only
    attention_temperature: float = 1.0
    rule: Literal["linear", "linear_scale", "gaussian"] | None = None  # None: the paper's own
    annealed: bool | None = None  # True: the weight grows linearly with the position; None: as the paper does
    blocks: Literal["all", "first"] = "all"  # of those that see the condition, or only the first one in generation

    def __post_init__(self) -> None:
        if self.what not in ("ab", "a", "b"):
            raise UserError(f"guidance.what={self.what!r}; choose 'ab' (scale and shift), 'a' (scale) or 'b' (shift)")
        if self.rule not in (None, "linear", "linear_scale", "gaussian"):
            raise UserError(f"guidance.rule={self.rule!r}; choose 'linear', 'linear_scale' or 'gaussian'")
        if self.blocks not in ("all", "first"):
            raise UserError(f"guidance.blocks={self.blocks!r}; choose 'all' or 'first'")
        if self.rule == "gaussian" and self.what != "ab":
            raise UserError(
                f"guidance.what={self.what!r}: the gaussian rule moves scale and shift together; leave what out, or set "
                "guidance.rule=linear"
            )
        if isinstance(self.weight, (int, float)) and not 0 <= self.weight < math.inf:
            raise UserError(
                f"guidance={self.weight} is negative or no number; 0 is no guidance, positive weights push away from the weak pass"
            )
        if isinstance(self.attention_temperature, (int, float)) and self.attention_temperature <= 0:
            raise UserError(
                f"guidance.attention_temperature={self.attention_temperature} must be positive; 1 leaves attention as it is"
            )

    @classmethod
    def of(cls, value: float | Guidance, rule: Literal["linear", "gaussian"], annealed: bool) -> Guidance:
        """A weight or a guidance, with what it leaves open filled in."""
        given = value if isinstance(value, Guidance) else cls(value)
        return dataclasses.replace(
            given,
            rule=given.rule or rule,
            annealed=annealed if given.annealed is None else given.annealed,
        )

    @property
    def active(self) -> bool:
        """Whether there is a second pass at all; a traced weight counts as active."""
        return not isinstance(self.weight, (int, float)) or self.weight > 0

    @property
    def tempered(self) -> bool:
        """Whether the second pass has an attention temperature of its own; a traced one counts."""
        return not isinstance(self.attention_temperature, (int, float)) or self.attention_temperature != 1

    def apply(
        self, strong: tuple[jax.Array, jax.Array], weak: tuple[jax.Array, jax.Array], ramp: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(log-scale, shift) of both passes -> guided (scale, shift).

        `ramp` in (0, 1] is the annealing at the token's place, broadcast over [..., D]. A scale made by `linear_scale` may
        be negative.
        """
        weight = self.weight * (ramp if self.annealed else jnp.ones_like(ramp))
        (a, b), (a_weak, b_weak) = strong, weak
        if self.rule == "gaussian":
            ratio = jnp.exp(2 * jnp.minimum(a - a_weak, 0.0))
            total = 1 + weight * (1 - ratio)
            return jnp.exp(a) * jax.lax.rsqrt(total), b + weight * ratio / total * (b - b_weak)
        if "b" in self.what:
            b = b + weight * (b - b_weak)
        if "a" not in self.what:
            return jnp.exp(a), b
        if self.rule == "linear_scale":
            return jnp.exp(a) + weight * (jnp.exp(a) - jnp.exp(a_weak)), b
        return jnp.exp(a + weight * (a - a_weak)), b


def sequential(step: Step, v: jax.Array, cache: Any, start: jax.Array | None = None) -> jax.Array:
    """Token by token: u_t = v_t s_t + b_t with (s_t, b_t) = step(u_{t-1}), in one `lax.scan`.

    Tokens leave the scan as outputs, so nothing of the size of the sequence is carried but the cache.

    Args:
        step: the network on one token, with its cache; its index counts the tokens fed.
        v: [B, T, D] in the order of the flow, float32.
        cache: key/value caches, empty or filled with a prefix.
        start: [D], fed before the first token. None: the first token passes unchanged, u_0 = v_0.

    Returns:
        u [B, T, D].
    """

    def body(
        carry: tuple[jax.Array, Any], inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, Any], jax.Array]:
        u, cache = carry
        index, v_next = inputs
        scale, shift, cache = step(u[:, None], cache, index)
        u = affine_inverse(v_next, scale[:, 0], shift[:, 0])
        return (u, cache), u

    rest = v if start is not None else v[:, 1:]
    if not rest.shape[1]:
        return v
    first = v[:, 0] if start is None else jnp.broadcast_to(start, v[:, 0].shape).astype(v.dtype)
    _, u = jax.lax.scan(body, (first, cache), (jnp.arange(rest.shape[1]), rest.swapaxes(0, 1)))
    u = u.swapaxes(0, 1)
    return u if start is not None else jnp.concatenate([v[:, :1], u], axis=1)
