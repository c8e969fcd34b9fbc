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
    names = [f"{power.width:g}" for power in ema] if isinstance(ema, tuple) else []
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"ema lists the width {twice[0]} twice; keep one, or give another width")


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


def chosen(ema: Average, average: Params, width: float | None = None) -> Params:
    """The average of this width; None: the one that samples, metrics and exports take, of several that named first.

    UserError where none is kept of this width.
    """
    powers = ema if isinstance(ema, tuple) else (ema,) if isinstance(ema, Power) else ()
    names = [f"{power.width:g}" for power in powers]
    if width is not None and f"{width:g}" not in names:
        way = f"choose one of {', '.join(names)}" if names else "leave ema out"
        raise UserError(f"ema={width:g}: the run keeps no average of this width; {way}")
    if not isinstance(ema, tuple):
        return average
    return average[names[0] if width is None else f"{width:g}"]
