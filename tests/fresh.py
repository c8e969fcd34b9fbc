"""Fresh parameters for tests, without a program of their own to compile."""

from collections.abc import Callable
from typing import Any

import jax
from jax.interpreters.partial_eval import dce_jaxpr

from zoo import dist


def drawn(init: Callable[[Any], Any], seed: Any) -> Any:
    """`init` of a seed or a key: to the bit what it gives compiled whole with LLVM's optimisations off.

    Parameters are hundreds of draws of few shapes, and one program of them all takes up to ten times as long to compile as a
    small one for every shape, which all tests share. The forward pass that only finds shapes is left out.
    """
    closed, shapes = jax.make_jaxpr(init, return_shape=True)(seed)
    jaxpr, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    return jax.tree.unflatten(jax.tree.structure(shapes), jax.core.eval_jaxpr(jaxpr, closed.consts, seed))


def fresh(task: Any, seed: int = 0) -> Any:
    """`task.init` of a seed, unboxed."""
    return drawn(lambda key: dist.unbox(task.init(key)), jax.random.key(seed))


def placed(init: Callable[[Any], Any], where: Any) -> Callable[[Any], Any]:
    """Instead of `zoo.train.step.compile_init`."""
    return lambda seed: jax.device_put(drawn(init, seed), where, may_alias=False)
