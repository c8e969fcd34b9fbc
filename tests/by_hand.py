"""A plan run step by step on the host, in float64, and denoisers in closed form."""

from collections.abc import Callable
from typing import Any

import numpy as np

from zoo.diffusion.solvers import Plan


def by_hand(plan: Plan, denoise: Callable[[Any, float], Any], noise: Any, fresh: Any = None) -> np.ndarray:
    """What `zoo.diffusion.solvers.run` computes."""
    x = np.tensordot(plan.start, np.asarray(noise, np.float64), 1)
    h = np.zeros((plan.read_h.shape[1], *x.shape[1:]))
    for i, sigma in enumerate(plan.sigma):
        e = np.zeros(x.shape[1:]) if fresh is None else fresh[i]
        y = np.tensordot(plan.read_x[i], x, 1) + np.tensordot(plan.read_h[i], h, 1) + plan.read_e[i] * e
        h = np.concatenate([denoise(y, sigma)[None], h[:-1]])
        x = np.tensordot(plan.move_x[i], x, 1) + np.tensordot(plan.move_h[i], h, 1)
        x = x + np.multiply.outer(plan.move_e[i], e)
    return h[0]


def gaussian(variance: Any = 0.25) -> Callable[[Any, Any], Any]:
    """The denoiser of N(0, variance)."""
    return lambda x, sigma: x * (variance / (variance + sigma**2))
