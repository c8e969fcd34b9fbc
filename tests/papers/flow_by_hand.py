"""What tests of several flows call: STARFlow on whole grids, and guidance of many kinds in one program."""

import json
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zoo import weights
from zoo.flows.inverse import Guidance
from zoo.flows.stack import apply
from zoo.nn.embed import unpatchify
from zoo.train.optim import AdamW
from zoo.train.step import split


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


class PatchGolden:
    """A golden file of a flow over patches, our task and parameters for it, and everything computed in a few programs.

    What differs in labels or guidance alone is rows of one batch.
    """

    def __init__(self, file, task_of, **fields):
        self.f = np.load(file)
        c = self.c = json.loads(str(self.f["config"]))
        same = {
            "image": c["img_size"],
            "channels": c["in_channels"],
            "head_dim": c["head_dim"],
            "classes": c["num_classes"],
        }
        self.task = task_of(**same, **fields, **self.fields(c))
        self.state = {k.removeprefix("state/"): v for k, v in self.f.items() if k.startswith("state/")}
        self.params = weights.from_official(self.task, self.state)
        self.x, self.z0 = nhwc(self.f["in/x"]), self.f["in/z0"]
        classes = self.task.classes
        self.label, self.drop = (self.f[f"in/{k}"].astype(np.int32) if classes else None for k in ("y", "y_drop"))
        self.none = np.full_like(self.label, -1) if classes else None
        self.found = {}
        for made in self.programs():
            self.found |= jax.device_get(jax.jit(made)(self.params))

    def labels(self, *rows):
        return np.concatenate(rows) if self.task.classes else None


def four_steps(task, params, loss):
    """Losses of four steps of AdamW as the official goldens take them; the gradient of the first in their layout, and its norm.

    The optimiser moves one long vector: a program for every parameter of a tree takes as long to compile as the network.
    """
    optimizer = optax.flatten(AdamW(lr=1e-3, schedule="constant", b2=0.95, weight_decay=1e-4, decay_all=True).build(4))
    trained, held = split(task, params)

    @jax.jit
    def step(trained, opt):
        value, grads = jax.value_and_grad(lambda p: loss({**held, **p}))(trained)
        updates, opt = optimizer.update(grads, opt, trained)
        return jax.tree.map(jnp.add, trained, updates), opt, value, grads

    opt, found = optimizer.init(trained), []
    for _ in range(4):
        trained, opt, *outputs = step(trained, opt)
        found.append(jax.device_get(outputs))
    first = found[0][1]
    norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(first)))
    official = weights.to_official(task, {**jax.tree.map(np.zeros_like, held), **first})
    return np.array([value for value, _ in found]), official, norm


def nhwc(x):
    return np.ascontiguousarray(np.moveaxis(x, -3, -1))


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


def block(stack, params, i, *inputs):
    """Log-scale and shift of block i."""
    return apply(stack.nets[i], params[f"block{i}"], *inputs)[:2]
