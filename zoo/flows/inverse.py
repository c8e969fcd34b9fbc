"""Inverses of autoregressive affine flows, and the guidance that bends them. One jitted program each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from zoo.errors import UserError
from zoo.flows.transforms import affine_inverse

# (token [B, 1, D], cache, its index) -> log-scale and shift of the next token [B, D] each, cache
Step = Callable[[jax.Array, Any, jax.Array], tuple[jax.Array, jax.Array, Any]]


@dataclass(frozen=True)
class Guidance:
    """How far log-scale and shift are pushed away from a second, weaker pass: a + w (a - a_weak).

    The second pass has no label and divides its attention logits by `attention_temperature`. A weight of 0 is no
    guidance (the usual guidance scale is 1 + weight). Annealed, the weight grows linearly with the position and is
    reached at the last token (TarFlow section on guidance).
    """

    weight: float = 0.0
    what: Literal["ab", "a", "b"] = "ab"  # log-scale and shift, log-scale only, shift only
    attention_temperature: float = 1.0
    annealed: bool = True

    def __post_init__(self) -> None:
        if self.what not in ("ab", "a", "b"):
            raise UserError(f"guidance.what={self.what!r}; choose 'ab' (scale and shift), 'a' (scale) or 'b' (shift)")
        if isinstance(self.weight, (int, float)) and self.weight < 0:
            raise UserError(
                f"guidance={self.weight} is negative; 0 is no guidance, positive weights push away from the weak pass"
            )
        if isinstance(self.attention_temperature, (int, float)) and self.attention_temperature <= 0:
            raise UserError(
                f"guidance.attention_temperature={self.attention_temperature} must be positive; 1 leaves attention as it is"
            )

    @property
    def active(self) -> bool:
        """Whether there is a second pass at all; a traced weight counts as active."""
        return not isinstance(self.weight, (int, float)) or self.weight > 0

    def apply(
        self, strong: tuple[jax.Array, jax.Array], weak: tuple[jax.Array, jax.Array], ramp: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Guided (log-scale, shift). `ramp` in (0, 1] is the annealing: j / (T - 1) for token j, broadcast over [..., D]."""
        weight = self.weight * (ramp if self.annealed else jnp.ones_like(ramp))
        (a, b), (a_weak, b_weak) = strong, weak
        if "a" in self.what:
            a = a + weight * (a - a_weak)
        if "b" in self.what:
            b = b + weight * (b - b_weak)
        return a, b


def sequential(step: Step, v: jax.Array, cache: Any) -> jax.Array:
    """Token by token: u_0 = v_0, u_{t+1} = v_{t+1} exp(a) + b with (a, b) = step(u_t).

    T - 1 steps in one `lax.scan`; the last token is never fed. Tokens leave the scan as outputs, so nothing of the size
    of the sequence is carried but the cache.

    Args:
        step: the network on one token, with its cache.
        v: [B, T, D] in the order of the flow, float32.
        cache: empty key/value caches for T tokens.

    Returns:
        u [B, T, D].
    """
    tokens = v.shape[1]
    if tokens == 1:
        return v

    def body(
        carry: tuple[jax.Array, Any], inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, Any], jax.Array]:
        u, cache = carry
        index, v_next = inputs
        a, b, cache = step(u[:, None], cache, index)
        u = affine_inverse(v_next, a, b)
        return (u, cache), u

    _, rest = jax.lax.scan(body, (v[:, 0], cache), (jnp.arange(tokens - 1), v[:, 1:].swapaxes(0, 1)))
    return jnp.concatenate([v[:, :1], rest.swapaxes(0, 1)], axis=1)
