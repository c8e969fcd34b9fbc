"""Averages of the trained weights: of a constant decay, or by the power functions of arXiv:2312.02696, one or several.

Out of snapshots of the latter come those of any other width, long after (section 3.2 of the paper).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
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

_log = logging.getLogger("zoo")
_MISS = 0.05  # of a profile, by which a reconstructed average may be off


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


def named(ema: Average) -> dict[str, Power]:
    """The power functions of a run by the names of their widths."""
    powers = ema if isinstance(ema, tuple) else (ema,) if isinstance(ema, Power) else ()
    return {f"{power.width:g}": power for power in powers}


def check(ema: Average, snapshots: int = 0) -> None:
    """UserError for two averages of one width, or for snapshots of an average that is no power function."""
    if snapshots and not named(ema):
        raise UserError(
            f"checkpoint.snapshots={snapshots} keeps averages by power functions, and ema={ema:g} is none; set it to 0, or use "
            "ema=(Power(0.05), Power(0.1)) in the config"
        )
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


def overlap(time: Any, exponent: Any, other: Any, its: Any) -> Any:
    """The integral over time of the product of two profiles, (s / t)^g (g + 1) / t each for s up to its t (float64)."""
    power = np.where(time < other, its, -exponent)
    return (exponent + 1) * (its + 1) * (time / other) ** power / ((exponent + its + 1) * np.maximum(time, other))


def combination(times: Any, exponents: Any, time: float, exponent: float) -> tuple[np.ndarray, float]:
    """The weights [N] of N averages whose sum comes nearest to the average of `exponent` at `time`, and by how much it misses.

    Least squares over the profiles, brought to a sum of 1 (section 3.2 and appendix C). The miss is the root of the integral of the
    squared difference of profiles, as a share of that of the wanted one.

    Args:
        times: when they end [N], at most `time`.
        exponents: theirs [N].
    """
    t, g = np.asarray(times, np.float64), np.asarray(exponents, np.float64)
    among, wanted = overlap(t[:, None], g[:, None], t, g), overlap(t, g, time, exponent)
    found = np.linalg.solve(among, wanted)
    found /= found.sum()
    whole = overlap(time, exponent, time, exponent)
    return found, float(np.sqrt(max(0.0, whole - 2 * found @ wanted + found @ among @ found) / whole))


def chosen(
    ema: Average,
    average: Params,
    width: float | None = None,
    step: int = 0,
    snapshots: Mapping[int, Callable[[], Params]] | None = None,
) -> Params:
    """The average of a width at `step`: one that is kept, or made out of those and of snapshots of them.

    Args:
        average: the averages at `step`, as `begin` has them.
        width: None: the one that samples, metrics and exports take, of several that named first.
        snapshots: step -> what reads the averages of that step; later ones are left out.

    Raises:
        UserError: this width is not kept, and there are no snapshots, or none from which it can be made.
    """
    powers = named(ema)
    kept, name = ", ".join(powers), f"{width:g}" if width is not None else next(iter(powers), "")
    if width is None or name in powers:
        return average[name] if isinstance(ema, tuple) else average
    steps = [s for s in sorted(snapshots or {}) if s < step]
    if snapshots is None or not steps:
        way = f"choose one of {kept}, or train with checkpoint.snapshots=STEPS" if powers else "leave ema out"
        raise UserError(f"ema={name}: the run keeps no average of this width, and no snapshots to make it of; {way}")
    times = np.repeat(np.asarray([*steps, step]), len(powers)) / step
    exponents = np.tile([power.exponent for power in powers.values()], len(steps) + 1)
    found, missed = combination(times, exponents, 1.0, Power(width).exponent)
    if not missed <= _MISS:
        raise UserError(
            f"ema={name} cannot be made of {len(steps)} snapshots of the widths {kept}: its profile would be off by "
            f"{missed:.1%}, and {_MISS:.0%} is the most; choose a width nearer to those, or train with more snapshots "
            "(checkpoint.snapshots)"
        )
    total: Any = None
    for at, row in zip([*steps, step], found.reshape(-1, len(powers))):
        trees = average if at == step else snapshots[at]()
        for one, factor in zip(powers, row):
            tree = trees[one] if isinstance(ema, tuple) else trees
            part = jax.tree.map(lambda x, c=np.float32(factor): c * x, tree)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
    _log.info("ema=%s: made of %d snapshots of %s, its profile off by %.2g %%", name, len(steps), kept, 100 * missed)
    return total
