"""Autoguidance: Guiding a Diffusion Model with a Bad Version of Itself (arXiv:2406.02507).

A trained denoiser is led away from what a worse one of the same kind would say: smaller, less trained, or without classes (the
guide of EDM2's published figures, arXiv:2312.02696).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, runtime_checkable

import jax

from zoo.diffusion.guidance import Guidance
from zoo.diffusion.precondition import DENOISER
from zoo.diffusion.sampling import DenoiserSampling, draw
from zoo.diffusion.tasks import Assembled, labels
from zoo.errors import UserError
from zoo.fields import NonNegative, check_fields
from zoo.task import About, Batch, Denoises, Network, Params, sample_keys


@runtime_checkable
class Draws(Protocol):
    """A denoiser that makes of its x0 what its sampler gives."""

    def finished(self, params: Params, x: jax.Array, given: Batch) -> dict[str, jax.Array]:
        """Images of samples x, with what they were conditioned on."""
        ...


@dataclass(frozen=True)
class GuidedSampling(DenoiserSampling):
    """How a guided denoiser is sampled."""

    guidance: NonNegative | Guidance = 1.0  # a weight, or with an interval of levels; 0: the main network alone


@dataclass(frozen=True)
class Guided(Assembled):
    """Two denoisers of one kind; both come from `Run.weights`."""

    main: Annotated[Any, Draws]
    guide: Annotated[Any, Denoises]  # another task of the same images, or of the same latents

    Sampling = GuidedSampling
    untrained = "train its parts, and draw with `zoo sample CONFIG`"

    def __post_init__(self) -> None:
        check_fields(self, "task.")
        main, guide = (task.spec(1) for task in (self.main, self.guide))
        key = next(iter(main))
        if key not in guide or main[key].shape != guide[key].shape:
            raise UserError(
                f"task.guide reads {', '.join(f'{k} {list(v.shape[1:])}' for k, v in guide.items())}, and task.main {key} of "
                f"{list(main[key].shape[1:])}; a guide is of the same kind"
            )
        classes, own = self.guide.about.classes, self.main.about.classes
        if classes not in (0, own):
            raise UserError(f"task.guide has {classes} classes and task.main {own}; a guide has as many, or none")
        low, high = self.guide.sigmas
        if low > self.sigmas[0] or high < self.sigmas[1]:
            raise UserError(
                f"task.guide knows levels from {low:g} to {high:g} and task.main from {self.sigmas[0]:g} to {self.sigmas[1]:g}; "
                "a guide knows all of these"
            )

    @property
    def about(self) -> About:
        """Both networks are held."""
        how = "train or import it, e.g. `zoo train edm/digits:guide`"
        networks = {
            key: Network(task, Denoises, DENOISER, how=how, entry=f"weights.{key}=RUN")
            for key, task in (("main", self.main), ("guide", self.guide))
        }
        return About(classes=self.main.about.classes, networks=networks, licence=self.main.about.licence)

    @property
    def sigmas(self) -> tuple[float, float]:
        """Lowest and highest level, those of the main network."""
        return self.main.sigmas

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """That of the main network."""
        return self.main.spec(batch)

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters of both, which are meant to come from `Run.weights`."""
        one, two = jax.random.split(rng)
        return {"main": self.main.init(one), "guide": self.guide.init(two)}

    def sample(
        self, params: Params, rng: jax.Array, n: int, conditions: Batch | None = None, options: Any = None
    ) -> dict[str, jax.Array]:
        """n samples as the main network's; of their labels a guide without classes hears nothing."""
        o, given = options or GuidedSampling(), labels(self.about.classes, conditions)
        strong = functools.partial(self.main.denoise, params["main"], conditions=given)
        weak = functools.partial(
            self.guide.denoise, params["guide"], conditions=given if self.guide.about.classes else {}
        )

        def both(x: jax.Array, sigma: jax.Array) -> tuple[jax.Array, jax.Array]:
            return strong(x, sigma), weak(x, sigma)

        guidance = Guidance.of(o.guidance)
        shape = next(iter(self.spec(1).values())).shape[1:]
        x = draw(o.plan(self.sigmas), guidance.denoiser(strong, both), sample_keys(rng, n), shape)
        return self.main.finished(params["main"], x, given)
