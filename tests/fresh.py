"""Fresh parameters for tests, without a program of their own to compile."""

from typing import Any

import jax
from jax.interpreters.partial_eval import dce_jaxpr

from zoo import dist


def fresh(task: Any, seed: int = 0) -> Any:
    """`task.init` of a seed, unboxed: to the bit what it gives compiled whole with LLVM's optimisations off.

    Parameters are hundreds of draws of few shapes, and one program of them all takes up to ten times as long to compile as a
    small one for every shape, which all tests share. The forward pass that only finds shapes is left out.
    """
    key = jax.random.key(seed)
    closed, shapes = jax.make_jaxpr(lambda key: dist.unbox(task.init(key)), return_shape=True)(key)
    jaxpr, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    return jax.tree.unflatten(jax.tree.structure(shapes), jax.core.eval_jaxpr(jaxpr, closed.consts, key))
