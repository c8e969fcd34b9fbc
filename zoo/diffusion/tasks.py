"""What tasks of denoisers share: the levels they are asked for, images by class, and those that are put together of trained ones."""

from __future__ import annotations

import abc
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from zoo.diffusion.sampling import DenoiserSampling, clipped, sampled
from zoo.errors import UserError
from zoo.fields import check_fields
from zoo.task import Batch, Params, image_spec, sample_keys


class Levelled:
    """A task that is asked for levels from its field `low` to its field `high`."""

    low: Any
    high: Any

    def __post_init__(self) -> None:
        check_fields(self, "task.")
        if self.low >= self.high:
            raise UserError(f"task.low={self.low:g} must be below task.high={self.high:g}")

    @property
    def sigmas(self) -> tuple[float, float]:
        """Lowest and highest level."""
        return self.low, self.high


class ByClass(Levelled, abc.ABC):
    """A denoiser of square images, conditioned on the class where there are classes. S pixels a side, C channels."""

    image: Any
    channels: Any
    classes: Any

    Sampling = DenoiserSampling

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`image` [B, S, S, C] in [-1, 1], and `label` [B] where there are classes."""
        return image_spec(batch, self.image, self.channels, self.classes)

    def hot(self, conditions: Batch | None) -> jax.Array | None:
        """Classes [B, classes], one-hot, zeros for a label below 0; None where there is none."""
        given = labels(self.classes, conditions)
        return jax.nn.one_hot(given["label"], self.classes) if given else None

    @abc.abstractmethod
    def denoise(self, params: Params, x: jax.Array, sigma: jax.Array, conditions: Batch | None = None) -> jax.Array:
        """As of `zoo.task.Denoises`."""

    def sample(
        self, params: Params, rng: jax.Array, n: int, conditions: Batch | None = None, options: Any = None
    ) -> dict[str, jax.Array]:
        """What `finished` makes of n samples, as of `zoo.task.Samples`; negative labels are no class.

        UserError for levels outside those of the task, and for guidance without classes.
        """
        given, shape = labels(self.classes, conditions), (self.image, self.image, self.channels)
        denoise, o = functools.partial(self.denoise, params), options or self.Sampling()
        return self.finished(params, sampled(denoise, self.sigmas, shape, sample_keys(rng, n), given, o), given)

    def finished(self, params: Params, x: jax.Array, given: Batch) -> dict[str, jax.Array]:
        """`image` clipped to [-1, 1], of samples x [n, S, S, C] (NaN where they overflowed), with what they were conditioned on."""
        return {"image": clipped(x), **given}


class Assembled:
    """A task that is put together of trained ones: it has nothing to train."""

    untrained: ClassVar[str]  # what to do instead, for the error

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """UserError: there is none."""
        raise UserError(f"{type(self).__name__} has nothing to train; {self.untrained}")


def labels(classes: int, conditions: Batch | None) -> dict[str, jax.Array]:
    """`label` of conditions, where there are classes and it is given; None is no class."""
    label = (conditions or {}).get("label")
    return {"label": label} if classes and label is not None else {}


def dropped(rng: jax.Array, given: dict[str, jax.Array], share: float) -> dict[str, jax.Array]:
    """Conditions of a training step, with no class in the place of this share of them."""
    if not given or not share:
        return given
    return {"label": jnp.where(jax.random.bernoulli(rng, share, given["label"].shape), -1, given["label"])}
