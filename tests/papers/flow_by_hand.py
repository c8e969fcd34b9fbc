"""What tests of several flows call: STARFlow on whole grids, and guidance of many kinds in one program."""

import json
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
    optimizer = AdamW(lr=1e-3, schedule="constant", b2=0.95, weight_decay=1e-4, decay_all=True).build(4)
    trained, held = split(task, params)
    leaves, tree = jax.tree.flatten(trained)
    ends = np.cumsum([x.size for x in leaves])

    def whole(flat):
        cuts = (flat[e - x.size : e].reshape(x.shape) for x, e in zip(leaves, ends, strict=True))
        return jax.tree.unflatten(tree, list(cuts))

    @jax.jit
    def slope(flat):
        value, grads = jax.value_and_grad(lambda p: loss({**held, **p}))(whole(flat))
        return value, jnp.concatenate([g.ravel() for g in jax.tree.leaves(grads)])

    @jax.jit
    def move(flat, grads, opt):
        updates, opt = optimizer.update(grads, opt, flat)
        return flat + updates, opt

    flat = np.concatenate([np.ravel(x) for x in leaves])
    opt, losses, first = optimizer.init(flat), [], None
    for _ in range(4):
        value, grads = slope(flat)
        flat, opt = move(flat, grads, opt)
        losses.append(float(value))
        first = np.asarray(grads) if first is None else first
    official = weights.to_official(task, {**jax.tree.map(np.zeros_like, held), **whole(first)})
    return np.array(losses), official, np.sqrt(np.square(first).sum())


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


def denoise(task, params, x, y=None):
    tokens, stack = task.in_tokens(x)
    return untokens(task, stack.denoise(params, tokens, task.noise, y), x.shape[1] // task.patch)


def block(stack, params, i, *inputs):
    """Log-scale and shift of block i."""
    return apply(stack.nets[i], params[f"block{i}"], *inputs)[:2]
