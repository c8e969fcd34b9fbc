"""Optimisers from dataclasses: schedule, clipping and the weight-decay mask live inside one optax chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from zoo.errors import UserError
from zoo.fields import Below1, NonNegative, Positive, Whole, check_fields


@dataclass(frozen=True)
class AdamW:
    """AdamW with a linear warm-up from `final_lr` to `lr`, then by default a cosine back to `final_lr` at the last step.

    Defaults are plain: no clipping, and decay on kernels only. What a paper does otherwise stands in its config.
    """

    lr: Positive = 1e-3
    final_lr: NonNegative = 1e-6
    warmup: Whole = 0  # steps
    schedule: Literal["cosine", "constant", "inverse_sqrt"] = "cosine"
    hold: NonNegative = 0.0  # steps after which "inverse_sqrt" falls as 1 / sqrt(step); 0: it stays as it is
    b1: Below1 = 0.9
    b2: Below1 = 0.999
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 1e-4
    decay_all: bool = False  # True: norms, biases and embeddings decay as well
    clip: Positive | None = None  # global gradient norm

    def __post_init__(self) -> None:
        check_fields(self, "optim.")

    def learning_rate(self, steps: int) -> optax.Schedule:
        """Learning rate at optimiser step n (0-based) of `steps` (arXiv:2412.06329).

        n <= w: lo + n/w (hi - lo); after it lo + (1 + cos(pi (n - w)/(steps - w)))/2 (hi - lo). "inverse_sqrt" divides the
        warm-up and what follows it by sqrt(max(n / hold, 1)) (arXiv:2312.02696).
        """
        lo, hi, warmup = self.final_lr, self.lr, self.warmup

        def rate(n: Any) -> Any:
            n = jnp.asarray(n, jnp.float32)
            up = lo + n / max(warmup, 1) * (hi - lo)
            if self.schedule == "inverse_sqrt":
                full = jnp.where(n < warmup, up, hi)
                return full / jnp.sqrt(jnp.maximum(n / self.hold, 1)) if self.hold else full
            if self.schedule == "constant":
                after: Any = hi
            else:
                phase = jnp.clip((n - warmup) / max(steps - warmup, 1), 0, 1)
                after = lo + 0.5 * (1 + jnp.cos(jnp.pi * phase)) * (hi - lo)
            return jnp.where(n <= warmup, up, after) if warmup else after + jnp.zeros_like(n)

        return rate

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optax chain for a run of `steps`."""

        def mask(params: Any) -> Any:
            # Kernels are what is left when vectors (norms, biases) and tables (embeddings) are taken away.
            def kernel(path: tuple[Any, ...], _: Any) -> bool:
                return [k.key for k in path if hasattr(k, "key")][-1] == "kernel"  # a boxed leaf ends in `.value`

            return jax.tree_util.tree_map_with_path(kernel, params)

        adamw = optax.adamw(
            self.learning_rate(steps),
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            mask=None if self.decay_all else mask,
        )
        return optax.chain(optax.clip_by_global_norm(self.clip), adamw) if self.clip else adamw


@runtime_checkable
class Optimiser(Protocol):
    """A frozen dataclass that makes a gradient transformation for a run of so many steps, such as `AdamW`."""

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optax chain."""


Optim: TypeAlias = Optimiser | dict[str, Optimiser]  # one for all, or one for each top-level key of params


def build(optim: Optim, steps: int) -> optax.GradientTransformation:
    """One optimiser, or one per top-level key of the parameters, each with its own clipping."""
    if not isinstance(optim, dict):
        return optim.build(steps)

    def label(params: Any) -> Any:
        missing, unknown = sorted(set(params) - set(optim)), sorted(set(optim) - set(params))
        if missing or unknown:
            what = f"has no entry for the parameters {missing}" if missing else f"names {unknown}, which is not trained"
            raise UserError(f"optim {what}; its keys must be those of the trained parameters: {sorted(params)}")
        return {key: jax.tree.map(lambda _, k=key: k, tree) for key, tree in params.items()}

    return optax.partition({key: one.build(steps) for key, one in optim.items()}, label)
