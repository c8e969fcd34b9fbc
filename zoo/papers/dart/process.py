"""NOMAD, the non-Markovian diffusion of DART (arXiv:2410.08159, section 3): noisy copies of one example with independent noise.

Copy i of T, the noisiest first, is x_i = sqrt(gamma_i) x0 + sqrt(1 - gamma_i) eps_i. The copies up to i tell of x0 what one
sample y_i of a Markov chain does, whose signal-to-noise ratio is the sum of theirs:

    abar_i / (1 - abar_i) = sum_{j <= i} gamma_j / (1 - gamma_j),
    y_i = (1 - abar_i) / sqrt(abar_i) sum_{j <= i} sqrt(gamma_j) / (1 - gamma_j) x_j = sqrt(abar_i) x0 + sqrt(1 - abar_i) n.

All of it is float64 on the host: in float32 the small increments of the ratio are lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np

Schedule: TypeAlias = Literal["copies", "chain"]
_EDGE = 1e-6  # gamma and abar keep this far from 0 and 1


@dataclass(frozen=True)
class Nomad:
    """The copies of a schedule."""

    snr: tuple[float, ...]  # [T] of the chain, rising: abar / (1 - abar)

    @classmethod
    def of_chain(cls, abar: np.ndarray) -> Nomad:
        """Those that tell as much as a chain with these abar [T], rising from the noisiest."""
        abar = np.asarray(abar, np.float64)
        return cls(tuple((abar / (1 - abar)).tolist()))

    @classmethod
    def of_copies(cls, gamma: np.ndarray) -> Nomad:
        """Those with these gamma [T]."""
        gamma = np.asarray(gamma, np.float64)
        return cls(tuple(np.cumsum(gamma / (1 - gamma)).tolist()))

    @classmethod
    def cosine(cls, steps: int, schedule: Schedule) -> Nomad:
        """A cosine over T steps: gamma = cos^2(pi t / 2 T) for the copies, or abar = f(t / T) / f(0) for the chain.

        f(u) = cos^2(pi / 2 (u + 0.008) / 1.008) (arXiv:2102.09672, equation 17); t is T for the noisiest and 1 for the last.
        """
        t = np.arange(steps, 0, -1) / steps
        if schedule == "copies":
            return cls.of_copies(np.clip(np.cos(np.pi / 2 * t) ** 2, _EDGE, 1 - _EDGE))
        f = np.cos(np.pi / 2 * (np.append(t, 0) + 0.008) / 1.008) ** 2
        return cls.of_chain(np.clip(f[:-1] / f[-1], _EDGE, 1 - _EDGE))

    @property
    def steps(self) -> int:
        """T."""
        return len(self.snr)

    @cached_property
    def abar(self) -> np.ndarray:
        """[T]."""
        s = np.asarray(self.snr)
        return s / (1 + s)

    @cached_property
    def gamma(self) -> np.ndarray:
        """[T]."""
        own = np.diff(self.snr, prepend=0.0)
        return own / (1 + own)

    @cached_property
    def sums(self) -> np.ndarray:
        """[T]: sqrt(gamma) / (1 - gamma), by which a copy counts in the sufficient statistic."""
        return np.sqrt(self.gamma) / (1 - self.gamma)

    @cached_property
    def scales(self) -> np.ndarray:
        """[T]: (1 - abar) / sqrt(abar), which makes the chain of those sums."""
        return (1 - self.abar) / np.sqrt(self.abar)

    @cached_property
    def to_chain(self) -> np.ndarray:
        """[T, T], lower triangular: copies -> chain."""
        return np.tril(self.scales[:, None] * self.sums)

    @cached_property
    def residuals(self) -> np.ndarray:
        """[T, T, T]: what is left of the noise of the copies, [i] when y_i is known; of those after i it means nothing.

        Copies up to i are sqrt(gamma) y_i / sqrt(abar_i) + residuals[i] eps: with the noise of y_i, independent again.
        """
        shares = self.sums * np.sqrt(1 - self.gamma) * np.tril(np.ones((self.steps, self.steps)))  # [i, j]
        shares = shares / np.asarray(self.snr)[:, None]
        return np.diag(np.sqrt(1 - self.gamma)) - np.sqrt(self.gamma)[:, None] * shares[:, None]

    @cached_property
    def following(self) -> tuple[np.ndarray, np.ndarray]:
        """Signal and noise [T] of what comes after each copy: the next one, at last the clean example."""
        gamma = np.append(self.gamma[1:], 1.0)
        return np.sqrt(gamma), np.sqrt(1 - gamma)
