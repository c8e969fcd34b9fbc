"""The smallest paper there is, with no ability and with each single one: what the contract promises is tried on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from zoo.flows.inverse import Chain, Stepper
from zoo.task import About, Name

SHAPE = (4, 4, 1)


@dataclass(frozen=True)
class Toy:
    """One number for each pixel, trained to be the mean image."""

    about = About()

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {"image": jax.ShapeDtypeStruct((batch, *SHAPE), jnp.float32)}

    def init(self, rng: jax.Array) -> dict[str, jax.Array]:
        return {"mean": 0.1 * jax.random.normal(rng, SHAPE), "seen": jnp.zeros(())}

    def loss(self, params: Any, batch: Any, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return jnp.square(batch["image"] - params["mean"]).mean() + 0 * params["seen"], {}


@dataclass(frozen=True)
class Options:
    """Those of the toy's sampler."""

    spread: float = 1.0


def _chain(self: Any, params: Any, batch: Any, rng: jax.Array, *, guidance: Any = 0.0) -> tuple[jax.Array, Chain]:
    x = batch["image"].reshape(-1, 16, 1)
    stepper = Stepper(lambda u, cache, index: (jnp.ones_like(u), params["mean"].mean() + 0 * u, cache), None)
    return x, Chain(1, lambda i, before=None: stepper, lambda x, i: x, lambda i: jnp.ones((3, 2)))


ABILITIES: dict[str, dict[str, Any]] = {
    "sample": {
        "Sampling": Options,
        "sample": lambda self, params, rng, n, conditions=None, options=None: {
            "image": jnp.tanh(params["mean"] + (options or Options()).spread * jnp.ones((n, 1, 1, 1)))
        },
    },
    "nll": {"nll": lambda self, params, batch, keys: jnp.square(batch["image"] - params["mean"]).sum((1, 2, 3))},
    "denoise": {"sigmas": (0.1, 1.0), "denoise": lambda self, params, x, sigma, conditions=None: x - params["mean"]},
    "energy": {"energy": lambda self, params, x, sigma, conditions=None: jnp.square(x).sum((1, 2, 3))},
    "predict": {"predict": lambda self, params, tokens: jnp.zeros((*tokens.shape, 2))},
    "chain": {"blocks": 1, "chain": _chain},
    "features": {"features": lambda self, params, batch: (batch["image"] + params["mean"]).reshape(-1, 16)},
    "feature_map": {"feature_map": lambda self, params, batch: batch["image"] + params["mean"]},
    "logits": {"logits": lambda self, params, batch: batch["image"].mean((1, 2)) + params["mean"].ravel()[:2]},
    "crops": {"crops": lambda self, batch, rng: batch["image"][:, 1:, 1:]},
    "before_step": {"before_step": lambda self, trained: jax.tree.map(lambda x: jnp.clip(x, -1, 1), trained)},
    "after_step": {
        "about": About(buffers=("seen",)),
        "after_step": lambda self, params, metrics: {**params, "seen": params["seen"] + 1},
    },
    "import_names": {"import_names": lambda self: [Name("m", "mean"), Name("s", "seen")]},
    "import_state": {"import_state": lambda self, state: state},
    "import_note": {"import_note": lambda self: "read it with numpy"},
    "flops": {"flops": lambda self: 16.0},
    "cache_bytes": {"cache_bytes": lambda self, n, guided=True: {"deep": 0, "shallow": 0}},
}
TOYS: dict[str, type] = {"": Toy}
for _name, _members in ABILITIES.items():
    _class = type(f"Toy_{_name}", (Toy,), {**_members, "__module__": __name__, "__doc__": f"A toy that can {_name}."})
    TOYS[_name] = globals()[_class.__name__] = dataclass(frozen=True)(_class)
