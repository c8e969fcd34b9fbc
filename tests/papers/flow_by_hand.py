"""What tests of several flows call: STARFlow on whole grids, and guidance of many kinds in one program."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from zoo.flows.inverse import Guidance
from zoo.flows.stack import apply
from zoo.nn.embed import unpatchify


@dataclass(frozen=True)
class Rows(Guidance):
    """Guidance of a batch in equal parts, one for each of `parts`: one program compiles in the time of each of many."""

    parts: Any = ()

    @classmethod
    def by(cls, stack, parts, **fields):
        """`parts` with what a flow fills in where they leave it open."""
        return cls(1.0, parts=tuple(stack.guidance(part) for part in parts), **fields)

    def apply(self, strong, weak, ramp):
        cut = [[jnp.split(x, len(self.parts)) for x in passes] for passes in (strong, weak)]
        each = zip(self.parts, *(zip(*passes) for passes in cut), strict=True)
        return tuple(map(jnp.concatenate, zip(*(part.apply(s, w, ramp) for part, s, w in each))))


def nhwc(x):
    return jnp.asarray(np.moveaxis(x, -3, -1))


def tokens(task, x):
    return task.in_tokens(x)[0]


def untokens(task, x, rows):
    return unpatchify(x, task.patch, task.channels, rows=rows, channel_first=False)


def forward(task, params, x, y=None):
    """z, log-det and mean squares of latents."""
    x, stack = task.in_tokens(x)
    return stack.forward(params, x, y)


def inverse(task, params, z, y=None, null=None, guidance=0.0, **options):
    """Latents on the way back from z, which has their shape."""
    (x, stack), rows = task.in_tokens(z), z.shape[1] // task.patch
    return [untokens(task, s, rows) for s in stack.inverse(params, x, y, null, guidance, **options).states]


def denoise(task, params, x, y=None):
    tokens, stack = task.in_tokens(x)
    return untokens(task, stack.denoise(params, tokens, task.noise, y), x.shape[1] // task.patch)


def block(stack, params, i, *inputs):
    """Log-scale and shift of block i."""
    return apply(stack.nets[i], params[f"block{i}"], *inputs)[:2]
