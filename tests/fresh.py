"""Fresh and random parameters for tests, without a program of their own to compile, and exports of such."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr

from zoo import dist, models, weights


def drawn(init: Callable[[Any], Any], seed: Any) -> Any:
    """`init` of a seed or a key: what it gives compiled whole with LLVM's optimisations off, with JAX 0.12 to the bit.

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


def randomised(task: Any, out: Any = 0.05, seed: int = 0) -> Any:
    """Parameters of a flow in which masks, orders and shifts show, and which still invert well: fresh blocks are affine maps.

    Args:
        out: standard deviation of the kernels that make log-scale and shift, one for all columns or one for each.
    """
    rng = np.random.default_rng(seed)

    def draw(path: Any, x: Any) -> jax.Array:
        *_, module, name = (key.key for key in path)
        normal = rng.normal(size=x.shape)
        if name == "var":
            value = np.ones(x.shape) if task.scale else 1 + 0.3 * np.tanh(normal)
        elif name == "scale":
            value = 0.5 + 0.1 * normal
        elif len(path) == 3 and (module, name) == ("out", "kernel"):
            value = out * normal
        else:
            value = (0.2 if name == "kernel" else 0.1) * normal
        return jnp.asarray(value, x.dtype)

    return jax.tree_util.tree_map_with_path(draw, weights.abstract(task))


def noise(task: Any, scale: float = 0.1, seed: int = 0) -> Any:
    """Parameters whose every number matters: normal ones, and variances of one in the prior of a flow."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, scale, x.shape), x.dtype), weights.abstract(task))
    return {**params, "prior": {"var": jnp.ones_like(params["prior"]["var"])}} if "prior" in params else params


def exported(
    folder: Path, task: Any, params: Any = None, data: Any = None, labels: Any = (), kind: str = "raw", about: Any = ()
) -> Path:
    """An export of step 5, of random parameters where none are given; `about` overrides what its config says."""
    params = noise(task) if params is None else params
    model = models.Model(task, params, kind, 5, data, labels, folder)
    weights.save(folder, params, {**models.export_config(model), **dict(about)}, "a card")
    return folder
