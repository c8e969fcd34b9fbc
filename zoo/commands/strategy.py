"""How `zoo sample` inverts the blocks of a flow: what `zoo eval RUN convergence` has measured, kept with the run."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax

from zoo import files, paths
from zoo.draws import Use, key_of
from zoo.errors import UserError
from zoo.flows.inverse import Guidance, Jacobi
from zoo.metrics.convergence import Convergence
from zoo.models import Model
from zoo.paths import Folder, shipped
from zoo.task import has_methods

_log = logging.getLogger("zoo")


def save(folder: Folder, found: Mapping[str, Any]) -> None:
    """Keep what the metric found, beside the strategies of other devices and batch sizes; a warning where it cannot be.

    A damaged file is replaced.
    """
    if folder in shipped().values():
        _log.warning(
            "the strategies are not kept: a shipped model is not written to; export it, and measure the export"
        )
        return
    path = folder / Convergence.saves
    new = [_key(s) for s in found["strategies"]]
    try:
        kept = [s for s in _read(folder) if _key(s) not in new]
    except UserError:
        kept = []
    try:
        paths.write(path, json.dumps({**found, "strategies": [*kept, *found["strategies"]]}, indent=1) + "\n")
    except (UserError, OSError) as error:
        _log.warning("the strategies are not kept: %s: %s", path, error)


def _key(strategy: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(strategy[k] for k in ("device", "devices", "batch", "guidance"))


def _read(folder: Folder) -> list[dict[str, Any]]:
    """Saved strategies; [] where there are none. UserError when the file is damaged."""
    path = folder / Convergence.saves
    with files.reading(path, "remove it, or give method=sequential"), paths.sentence(path):
        if not path.is_file():
            return []
        data = path.read_bytes()
    try:
        found: list[dict[str, Any]] = json.loads(data)["strategies"]
        for strategy in found:
            _plan(strategy)
            if not (strategy["batch"] > 0 and strategy["devices"] > 0 and strategy["guidance"] >= 0):
                raise ValueError
            _key(strategy)
    except (ValueError, TypeError, KeyError, UserError):
        raise UserError(
            f"{path} is damaged; remove it, or measure again with `zoo eval {folder} convergence`"
        ) from None
    return found


def _plan(strategy: Mapping[str, Any]) -> Jacobi:
    return Jacobi(tuple(strategy["modules"]), tol=strategy["tol"], start=tuple(strategy["start"]))


def chosen(model: Model, options: Any, batch: int) -> Jacobi | None:
    """The strategy saved with a model that suits this device, a batch and the guidance; None where there is none.

    Sweeps pay less the more samples a device has, so one that was timed with as many or more is safe. One that was timed
    with a looser tolerance than the sampler's own is none to take unasked.

    Raises:
        UserError: the file is damaged, or of a model with other blocks.
    """
    here = jax.devices()[0].device_kind
    guided = Guidance.of(options.guidance, "linear", annealed=True).active
    share = math.ceil(batch / math.gcd(batch, jax.local_device_count()))
    saved, blocks = _read(model.folder), model.task.blocks
    if any(len(s["modules"]) != blocks or len(s["start"]) != blocks for s in saved):
        raise UserError(
            f"{model.folder / Convergence.saves} is not of a model with {blocks} blocks; remove it, or measure again with "
            f"`zoo eval {model.folder} convergence`"
        )
    suits = [
        (s["batch"] / s["devices"], s)
        for s in saved
        if s["tol"] <= Jacobi.of("jacobi").tol
        and s["device"] == here
        and (s["guidance"] > 0) == guided
        and s["batch"] / s["devices"] >= share
    ]
    return _plan(min(suits, key=lambda pair: pair[0])[1]) if suits else None


def resolve(model: Model, options: Any, batch: int, *, measure: bool) -> Any:
    """The options with what `method="auto"` stands for; as they are where the sampler inverts no affine flow.

    Args:
        measure: time the methods where nothing is saved; False: go token by token then.

    Raises:
        UserError: the data to measure on cannot be read.
    """
    if not has_methods(model.task) or options.method != "auto":
        return options
    plan = chosen(model, options, batch)
    if plan is None and measure:
        if model.data is None:
            raise UserError(
                f"method=auto: nothing is known of how {model.folder} inverts best, and it does not say what data it was "
                "trained on; give method=sequential or method=jacobi"
            )
        _log.info("method=auto: no strategy is saved for this device, batch and guidance; measuring")
        weight = Guidance.of(options.guidance, "linear", annealed=True).weight
        metric = Convergence(batches=(batch,), guidance=float(weight))
        params = jax.device_put(model.params, jax.local_devices()[0])
        found = metric(model.task, params, model.data, key_of(0, Use.LOOKS))
        save(model.folder, found)
        plan = _plan(found["strategies"][0])
    return replace(options, method=plan or Jacobi.of("sequential"))


def described(method: Any) -> str:
    """A method in a few words."""
    plan = Jacobi.of(method)
    if not plan.modules or (isinstance(plan.modules, tuple) and not any(plan.modules)):
        return "token by token"
    modules, tol = (",".join(map(str, x)) if isinstance(x, tuple) else x for x in (plan.modules, plan.tol))
    return f"sweeps with modules={modules}, tol={tol}"


def tell(drawn: Mapping[str, Any], method: Any) -> None:
    """Warn of samples whose sweeps did not suffice, block by block."""
    if "unconverged" not in drawn:
        return
    kept = Jacobi.of(method).unconverged == "keep"
    for i, count in enumerate(drawn["unconverged"].sum(0)):
        if count:
            _log.warning(
                "block %d: %d of %d samples did not converge by sweeps and %s",
                i,
                count,
                len(drawn["unconverged"]),
                "were kept as they are: set method.unconverged=sequential for exact ones"
                if kept
                else "went token by token",
            )
