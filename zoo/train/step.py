"""The train step: one pure function for every paper, and its placement on a mesh."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.struct import PyTreeNode

from zoo import dist
from zoo.draws import Use, key_of
from zoo.task import Buffered, Options, Params, Prepares, Task, options_of
from zoo.train import averages
from zoo.train.averages import Average
from zoo.weights.layout import boxed


class State(PyTreeNode):
    """All that a step reads and writes, and all that a checkpoint holds."""

    step: jax.Array
    params: Params
    ema: Params  # average of the trained parameters, of several each by its name; {} where none is kept
    opt: optax.OptState
    rng: jax.Array
    skipped: jax.Array  # steps whose loss or gradient was not finite
    streak: jax.Array  # how many of them in a row, up to now


Metrics = dict[str, jax.Array]
Step = Callable[[State, Any], tuple[State, Metrics]]


def split(task: Task, params: Params) -> tuple[Params, Params]:
    """(trained, held) parameters by top-level key."""
    held = task.about.held
    trained = {k: v for k, v in params.items() if k not in held}
    return trained, {k: v for k, v in params.items() if k in held}


def init_state(task: Task, optimizer: optax.GradientTransformation, seed: int | jax.Array, ema: Average) -> State:
    """A fresh state, leaves still boxed with their logical axes."""
    return _begin(task, optimizer, task.init(key_of(seed, Use.PARAMETERS)), seed, ema)


def _begin(
    task: Task, optimizer: optax.GradientTransformation, params: Params, seed: int | jax.Array, ema: Average
) -> State:
    # Of a leaf that starts as a Python number ("weakly typed") the first step would make another type, and compile twice.
    params = jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.asarray(x).dtype), params)
    trained, _ = split(task, params)
    zero = jnp.zeros((), jnp.int32)
    return State(
        step=zero,
        params=params,
        ema=averages.begin(ema, trained),
        opt=optimizer.init(trained),
        rng=key_of(seed, Use.STEPS),
        skipped=zero,
        streak=zero,
    )


def make_train_step(
    task: Task, optimizer: optax.GradientTransformation, *, ema: Average = 0.0, accumulate: int = 1
) -> Step:
    """A pure function (state, batch) -> (state, metrics). Placement belongs to `compile_step`.

    A step with a loss or gradient that is not finite changes nothing but the counters. Accumulated over micro-batches,
    a mean loss without noise equals that of the whole batch.
    """

    def loss(trained: Params, held: Params, batch: Any, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        return task.loss({**held, **trained}, batch, rng)

    gradient = jax.value_and_grad(loss, has_aux=True)

    def step(state: State, batch: Any) -> tuple[State, Metrics]:
        trained, held = split(task, state.params)
        if isinstance(task, Prepares):
            trained = task.before_step(trained)
        rngs = jax.random.split(
            jax.random.fold_in(state.rng, state.step + 1), accumulate
        )  # the key follows from the step alone

        if accumulate == 1:
            (value, metrics), grads = gradient(trained, held, batch, rngs[0])
            metrics = {"loss": value, **metrics}
        else:
            # Strided: each device keeps the rows it has.
            parts = jax.tree.map(
                lambda x: dist.constrain(x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), None, "batch"), batch
            )

            def micro(total: Params, part: Any) -> tuple[Params, Metrics]:
                (value, metrics), grads = gradient(trained, held, *part)
                return jax.tree.map(jnp.add, total, grads), {"loss": value, **metrics}

            grads, stacked = jax.lax.scan(micro, jax.tree.map(jnp.zeros_like, trained), (parts, rngs))
            grads = jax.tree.map(lambda g: g / accumulate, grads)
            metrics = jax.tree.map(lambda m: m.mean(0), stacked)  # over micro-batches: arrays keep their shape

        norm = optax.tree.norm(grads)
        ok = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        updates, opt = optimizer.update(grads, state.opt, trained)
        trained = optax.apply_updates(trained, updates)
        average = averages.update(ema, state.ema, trained, state.step)
        params = {**held, **trained}
        if isinstance(task, Buffered):
            params = task.after_step(params, metrics)

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)

        scalars = {k: v for k, v in metrics.items() if v.ndim == 0}
        state = state.replace(
            step=state.step + 1,
            params=keep(params, state.params),
            ema=keep(average, state.ema),
            opt=keep(opt, state.opt),
            skipped=state.skipped + ~ok,
            streak=jnp.where(ok, 0, state.streak + 1),
        )
        return state, {**scalars, "grad_norm": norm, "skipped": state.skipped, "streak": state.streak}

    return step


def make_sampler(task: Any, n: int, options: Options | Any) -> Callable[..., dict[str, jax.Array]]:
    """A pure function (params, rng, conditions=None) -> n samples of a task.

    Options are those of its sampler, or some of them by name.

    Without conditions, arrays that lead with n, its labels are balanced over its classes. On a mesh whose devices n does
    not fill evenly, more are drawn than asked for: else every device would draw, and hold the caches of, all of them.
    """
    options = options_of(task, options, "options") if isinstance(options, Mapping) else options
    classes = task.about.classes
    balanced = {"label": np.arange(n, dtype=np.int32) % classes} if classes and "label" in task.spec(1) else None

    def sampler(params: Params, rng: jax.Array, conditions: Any = None) -> dict[str, jax.Array]:
        given = balanced if conditions is None else conditions
        drawn = -(-n // dist.batch_ways()) * dist.batch_ways()
        if drawn == n:
            return task.sample(params, rng, n, given, options)
        given = jax.tree.map(lambda x: jnp.asarray(x)[jnp.arange(drawn) % n], given)
        return jax.tree.map(lambda x: x[:n], task.sample(params, rng, drawn, given, options))

    return sampler


def sampler_spec(task: Any, n: int) -> dict[str, jax.ShapeDtypeStruct] | None:
    """Shapes of the conditions that n samples take from a batch of data (`about.conditions`); None for a task without any."""
    given = task.about.conditions
    return {key: leaf for key, leaf in task.spec(n).items() if key in given} if given else None


def abstract_state(
    task: Task,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    ema: Average,
) -> State:
    """Shapes, dtypes and shardings of a state on `mesh`; nothing is allocated."""
    state = jax.eval_shape(lambda params: _begin(task, optimizer, params, 0, ema), boxed(task))
    shardings = dist.shardings(state, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), dist.unbox(state), shardings)


def compile_init(init: Callable[[Any], State], where: Any) -> Callable[[Any], State]:
    """`init` as one program whose results lie at `where`."""
    # It runs once: on a CPU, optimising it takes longer than it ever could save. Its numbers are the same to the bit.
    asked = "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", "")
    cpu = jax.tree.leaves(where)[0].mesh.devices.flat[0].platform == "cpu"
    once = {"xla_backend_optimization_level": 1} if cpu and not asked else None
    return jax.jit(init, out_shardings=where, compiler_options=once)


def compile_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    *,
    ema: Average = 0.0,
    accumulate: int = 1,
) -> tuple[Callable[[int], State], Any, State]:
    """(sharded init by seed, jitted step with the state donated, abstract state). Call all within `dist.use(mesh)`."""
    abstract = abstract_state(task, optimizer, mesh, ema)
    where = jax.tree.map(lambda x: x.sharding, abstract)
    fresh = compile_init(lambda seed: dist.unbox(init_state(task, optimizer, seed, ema)), where)
    step = jax.jit(
        make_train_step(task, optimizer, ema=ema, accumulate=accumulate),
        in_shardings=(where, dist.batch_sharding(mesh)),
        out_shardings=(where, None),
        donate_argnums=0,
    )
    return lambda seed: fresh(np.uint32(seed)), step, abstract  # seeds go up to 2**32 - 1, a Python int to 2**31 - 1
