"""Averages of the trained weights: of a constant decay, or by the power functions of arXiv:2312.02696, one or several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from msgspec import Meta

from zoo.errors import UserError
from zoo.fields import Below1, Some, check_fields
from zoo.task import Params


@dataclass(frozen=True)
class Power:
    """After t steps, those of step s weigh as s to the power of g (section 3.1); it needs no warm-up.

    `width` is the standard deviation of that profile as a share of t.
    """

    width: Annotated[float, Meta(ge=0.001, lt=12**-0.5)] = 0.1

    def __post_init__(self) -> None:
        check_fields(self, "ema.")

    @property
    def exponent(self) -> float:
        """g, where the width is sqrt((g + 1) / ((g + 2)^2 (g + 3))) (float64)."""
        t = self.width**-2
        return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())

    def decay(self, step: Any) -> Any:
        """The share of the old average in step `step` + 1: 0 in the first."""
        return jnp.exp((self.exponent + 1) * jnp.log1p(-1 / (step + 1.0)))


Average: TypeAlias = Below1 | Power | Some[Power]


def check(ema: Average) -> None:
    """UserError for two averages of one width."""
    if isinstance(ema, tuple) and (twice := sorted({p.width for p in ema if ema.count(p) > 1})):
        raise UserError(f"ema lists the width {twice[0]:g} twice; keep one, or give another width")


def begin(ema: Average, trained: Params) -> Params:
    """The averages before the first step: a tree of parameters, of several one for each width by name; {} for none."""
    if isinstance(ema, tuple):
        return {f"{power.width:g}": trained for power in ema}
    return trained if ema else {}


def update(ema: Average, average: Params, trained: Params, step: jax.Array) -> Params:
    """The averages after step `step` + 1, which gave `trained`."""
    if isinstance(ema, tuple):
        return {f"{power.width:g}": update(power, average[f"{power.width:g}"], trained, step) for power in ema}
    if not ema:
        return average
    if isinstance(ema, Power):
        decay = ema.decay(step)
    else:
        decay = jnp.minimum(ema, (1 + step) / (10 + step))  # warm-up: a plain average ruins short runs
    return optax.incremental_update(trained, average, 1 - decay)


def first(ema: Average, average: Params) -> Params:
    """The average that samples, metrics and exports take: of several the one that is named first."""
    return average[f"{ema[0].width:g}"] if isinstance(ema, tuple) else average
