"""Floating-point operations of a traced program, counted from its equations."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params

from zoo import weights
from zoo.task import Counted
from zoo.train.step import split

try:
    from jax.interpreters.partial_eval import partial_eval_jaxpr_nounits
except ImportError:  # JAX 0.10 has it in a private place alone
    from jax._src.interpreters.partial_eval import partial_eval_jaxpr_nounits


def count(jaxpr: Any, causal: bool = False) -> float:
    """Operations of the matrix products and convolutions of a (closed) jaxpr, a multiply-add as two.

    A scan counts as often as it runs (XLA's own analysis counts its body once), a loop of unknown length once, of branches
    the dearest. What a `shard_map` does on one device counts for all of them; a kernel counts over its grid, and half of
    that where it skips what a causal mask hides (the scope `causal` of `zoo.nn.attention.splash`).
    """
    total, outer = 0.0, causal
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = eqn.primitive.name, eqn.params
        causal = outer or "causal" in str(eqn.source_info.name_stack)
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / outputs
        elif name == "scan":
            total += params["length"] * count(params["jaxpr"], causal)
        elif name == "cond":
            total += max(count(branch, causal) for branch in params["branches"])
        elif name == "pallas_call":
            grid = params["grid_mapping"].grid
            blocks = grid[-1] if causal else 1
            total += math.prod(grid) * (blocks + 1) / (2 * blocks) * count(params["jaxpr"], causal)
        elif name == "shard_map":
            axes = params.get("newly_manual_axes", params.get("manual_axes", params["mesh"].axis_names))
            total += math.prod(params["mesh"].shape[axis] for axis in axes) * count(params["jaxpr"], causal)
        else:
            total += sum(count(inner, causal) for inner in jaxprs_in_params(params))
    return total


def training_example(task: Any) -> float:
    """Model FLOPs of one training example: the task's own figure, else those of its loss, three times where parameters are trained.

    The backward pass of a product is two products. What follows from the batch and from held networks alone has none, and
    nothing that is computed twice to save memory counts.
    """
    if isinstance(task, Counted) and (own := task.flops()) is not None:
        return float(own)
    trained, held = split(task, weights.abstract(task))
    given = (held, task.spec(1), jax.eval_shape(lambda: jax.random.key(0)))
    traced = jax.make_jaxpr(lambda trained, held, *rest: task.loss({**trained, **held}, *rest)[0])(trained, *given)
    moved = len(jax.tree.leaves(trained))
    known, unknown, _, _ = partial_eval_jaxpr_nounits(
        traced, [i < moved for i in range(len(traced.in_avals))], instantiate=False
    )
    return count(known) + 3.0 * count(unknown)
