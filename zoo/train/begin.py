"""The state that a run begins with: that of its newest checkpoint, or a fresh one that takes what `Run.weights` gives."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from zoo import hosts, models, weights
from zoo.run import Run
from zoo.train import averages
from zoo.train.folder import RunFolder
from zoo.train.provenance import ENCODERS, check_encoders, check_numbers, check_vocabularies
from zoo.train.step import State, split

_log = logging.getLogger("zoo")


def begin(run: Run, folder: RunFolder, labels: Sequence[str], init: Callable[[int], State], abstract: State) -> State:
    """The state, laid out as `abstract` is.

    Raises:
        UserError: a checkpoint that cannot be read; networks that leave a hole, or are no match for the data of the run.
    """
    state = folder.restore(abstract)
    if state is not None:
        _log.info("parameters: step %d of %s", int(state.step), run.workdir)
        made = run.data.made_with()  # large networks come off the devices for it
        check_encoders(run, {k: hosts.fetch(state.params[k]) for k in ENCODERS if k in made and k in state.params})
        return state
    given = models.given_weights(run.weights or {}, run.task)
    filled, report = weights.fill(abstract.params, given, run.weights, run.task)
    if not run.data.made_up:
        needed = [key for key, network in run.task.about.networks.items() if network.required]
        models.check_filled(run, filled, needed)
    check_encoders(run, given)
    check_vocabularies(run)
    check_numbers(run, labels)
    state = init(run.seed)
    for line in report if given else ["fresh"]:
        _log.info("parameters: %s", line)
    if not given:
        return state

    def put(fresh: jax.Array, value: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
        return fresh if isinstance(value, jax.ShapeDtypeStruct) else jax.device_put(value, fresh.sharding)

    params = jax.tree.map(put, state.params, filled)
    ema = jax.tree.map(jnp.copy, averages.begin(run.ema, split(run.task, params)[0]))  # each has arrays of its own
    return state.replace(params=params, ema=ema)
