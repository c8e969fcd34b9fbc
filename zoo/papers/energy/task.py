"""Energies learned with the network of a denoiser, from a trained teacher or from data; products of them, and tilts by a classifier.

B examples; x = x0 + sigma n; s the standard deviation of the data. With z = x / sqrt(sigma^2 + s^2) and a network h,

    E(x, sigma) = |x|^2 / (2 (sigma^2 + s^2)) - (s / sigma) f(z),  so that  x - sigma^2 grad E = c_skip x + c_out grad f:

EDM's preconditioning of the network grad f (arXiv:2206.00364, table 1). f, its scale and all recipes are our choice: the paper's
body was not at hand.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from msgspec import Meta

from zoo.diffusion.energies import Begins, Scored, denoised, scored
from zoo.diffusion.levels import LogNormal
from zoo.diffusion.potentials import Classifier, Potential, Product
from zoo.diffusion.precondition import DENOISER, Precondition, over
from zoo.diffusion.sampling import Conditions, classless, clipped, guidance_of, sampled
from zoo.diffusion.smc import EnergySampling, Form, ParticleSampling
from zoo.diffusion.tasks import Assembled, dropped, labels
from zoo.errors import UserError
from zoo.fields import Below1, check_fields
from zoo.task import About, Batch, Classifies, Denoises, Energetic, Network, Params, sample_keys, speed


def _alike(task: Any) -> tuple[str, ...]:
    """What makes an energy of parameters."""
    return ("head", "network") if isinstance(task, EnergyDistill) else ("head_dim", "low", "high")


@runtime_checkable
class Raw(Protocol):
    """A denoiser of images whose network can be asked without its preconditioning."""

    @property
    def plain(self) -> bool:
        """Whether that preconditioning is EDM's, and the network is all that it needs."""
        ...

    def raw(self, params: Params, z: jax.Array, noise: jax.Array, conditions: Batch | None = None) -> jax.Array:
        """The network's output, of the shape of z; noise is that of `Precondition("edm")`."""
        ...


@dataclass(frozen=True)
class EnergyDistill:
    """An energy of images: its gradient follows a teacher's score, or the noise of the data.

    `inner`: f = <h(z), z> / 2, whose gradient is about h where h grows with z, so that it may begin as the teacher's network.
    `norm`: f = |h|^2 / 2. `dae`: the energy is |x - D(x)|^2 / (2 sigma^2) instead, D the denoiser made of h.
    """

    network: Annotated[Any, Raw]  # the task of a denoiser; its network is h
    head: Literal["inner", "dae", "norm"] = "inner"
    target: Literal["teacher", "data"] = "teacher"  # data: denoising score matching
    noise: LogNormal = LogNormal(wide=0.25)  # levels of training steps
    drop: Below1 = 0.1  # probability that a label is dropped in training

    Sampling = EnergySampling

    def __post_init__(self) -> None:
        check_fields(self, "task.")
        if not self.network.plain:
            raise UserError(
                "task.network has another preconditioning than EDM's, or numbers that are held; take one without"
            )
        fast = speed(self.network)
        if fast.get("dtype") == "bfloat16":
            raise UserError("task.network.dtype=bfloat16: energies differ by less than it resolves; set float32")
        if fast.get("attention", "xla") != "xla":
            raise UserError(
                f"task.network.attention={fast['attention']} has no second derivative, which energies need; set task.network.attention=xla"
            )

    @property
    def about(self) -> About:
        """The teacher is held; the network may begin as the teacher's."""
        start = Network(required=False, trained=True, entry="weights.net=RUN:net")
        networks = {"net": start}
        if self.target == "teacher":
            how = "train one, e.g. `zoo train edm/digits`"
            networks["teacher"] = Network(self.network, Denoises, DENOISER, how=how, entry="weights.teacher=RUN")
        return About(classes=self.network.about.classes, networks=networks)

    @property
    def sigmas(self) -> tuple[float, float]:
        """Lowest and highest level."""
        return self.network.sigmas

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """That of the denoiser."""
        return self.network.spec(batch)

    def fresh(self, rng: jax.Array) -> Params:
        """Fresh parameters of the network, all that an energy needs."""
        return {"net": self.network.init(rng)["net"]}

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters of the network, and of the teacher."""
        return {**self.fresh(rng), **({"teacher": self.network.init(rng)} if self.target == "teacher" else {})}

    def energy(self, params: Params, x: jax.Array, sigma: jax.Array, conditions: Batch | None = None) -> jax.Array:
        """[B] nats, float32, up to a constant of sigma and class; x [B, S, S, C], sigma a scalar or [B]."""
        x, sigma = jnp.asarray(x, jnp.float32), jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), x.shape[:1])
        door, data = Precondition("edm", self.network.data), self.network.data

        def network(z: jax.Array, noise: jax.Array) -> jax.Array:
            found: jax.Array = self.network.raw(params, z, noise, conditions)
            return found.astype(jnp.float32)

        def total(a: jax.Array) -> jax.Array:
            return a.sum(tuple(range(1, a.ndim)))

        if self.head == "dae":
            return total(jnp.square(x - door.denoise(network, x, sigma))) / (2 * sigma**2)
        _, _, into, noise = door.coefficients(sigma)
        z = over(into, x) * x
        h = network(z, noise)
        f = total(h * z) / 2 if self.head == "inner" else total(jnp.square(h)) / 2
        return total(jnp.square(x)) / (2 * (sigma**2 + data**2)) - data / sigma * f

    def denoise(self, params: Params, x: jax.Array, sigma: jax.Array, conditions: Batch | None = None) -> jax.Array:
        """E[x0 | x], of the shape of x, in float32; a label below 0, or none, is no class."""
        return denoised(lambda x, sigma: self.energy(params, x, sigma, conditions), x, sigma)

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean over images and numbers of (sigma^2 + s^2) / (sigma s)^2 |x0 - target|^2 (the weight is our choice).

        Metrics: `x0_error`, the root mean square of x0 - target without the weight.
        """
        image, given = batch["image"], labels(self.about.classes, batch)
        level_rng, noise_rng, drop_rng = jax.random.split(rng, 3)
        sigma = self.noise.draw(level_rng, len(image), self.sigmas)
        given = dropped(drop_rng, given, self.drop)
        x = image + over(sigma, image) * jax.random.normal(noise_rng, image.shape)
        target = image
        if self.target == "teacher":
            target = jax.lax.stop_gradient(self.network.denoise(params["teacher"], x, sigma, given))
        square = jnp.square(self.denoise(params, x, sigma, given) - target).mean((1, 2, 3))
        loss = (Precondition("edm", self.network.data).weight(sigma) * square).mean()
        return loss, {"x0_error": jnp.sqrt(square.mean())}

    def scored(self, params: Params, conditions: Batch | None) -> Scored:
        """Energy and score of particles under these conditions, a row for each."""
        return scored(lambda x, sigma: self.energy(params, x, sigma, conditions))

    def sample(
        self, params: Params, rng: jax.Array, n: int, conditions: Batch | None = None, options: Any = None
    ) -> dict[str, Any]:
        """n images, by a solver, or by weighted particles where they are asked for, tempered, or have potentials.

        Particles are guided by weights as well: towards p(x | class)^(1 + w) p(x)^-w, which guided scores alone do not draw.

        Returns:
            `image` [n, S, S, C] clipped to [-1, 1] (NaN where it overflowed), `label` [n] where given, and of particles a `trace`.
        """
        o, shape = options or EnergySampling(), self.spec(1)["image"].shape[1:]
        told = labels(self.about.classes, conditions)
        if not o.weighted:
            image = sampled(functools.partial(self.denoise, params), self.sigmas, shape, sample_keys(rng, n), told, o)
            return {"image": clipped(image), **told}

        def target(given: Conditions) -> tuple[list[Scored], list[Potential]]:
            strong = self.scored(params, given)
            if not (weight := guidance_of(o.guidance, given).weight):
                return [strong], []
            return [strong, self.scored(params, classless(given or {}))], [Product((1 + weight, -weight))]

        image, trace = o.draw(rng, n, self.sigmas, target, shape, told)
        return {"image": clipped(image), **told, "trace": trace}


@dataclass(frozen=True)
class ProductSampling(ParticleSampling):
    """How a product of energies of images is sampled."""

    form: Form = "score"  # in many dimensions the others keep few roots


@dataclass(frozen=True)
class EnergyProduct(Assembled):
    """What several energies allow at once: the product of their densities, without classes.

    Particles follow the first one. Of flows that know all levels of noise nothing is approximate in their weights.
    """

    parts: Annotated[tuple[Annotated[Any, Energetic], ...], Meta(min_length=2)]

    Sampling = ProductSampling
    untrained = "draw from it with `zoo sample CONFIG weights.part0=RUN ...`"

    def __post_init__(self) -> None:
        check_fields(self, "task.")
        shapes = [part.spec(1)["image"].shape[1:] for part in self.parts]
        if len({isinstance(part, Begins) for part in self.parts}) > 1:
            raise UserError(
                "task.parts holds energies of noisy flows and others; particles begin as the one or as the other"
            )
        for name, values in (("images", shapes), ("levels", [part.sigmas for part in self.parts])):
            if other := next((value for value in values if value != values[0]), None):
                raise UserError(
                    f"task.parts have {name} of {values[0]} and of {other}; the parts of a product are alike in both"
                )

    @property
    def about(self) -> About:
        """The parts are held."""
        how = "train one for each, e.g. `zoo train energy/digits:low` and `zoo train energy/digits:high`"
        return About(
            networks={
                f"part{i}": Network(part, Energetic, _alike(part), how=how, entry=f"weights.part{i}=RUN")
                for i, part in enumerate(self.parts)
            }
        )

    @property
    def sigmas(self) -> tuple[float, float]:
        """Lowest and highest level."""
        return self.parts[0].sigmas

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`image` [B, S, S, C]."""
        return {"image": self.parts[0].spec(batch)["image"]}

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters of the parts, which are meant to come from `Run.weights`."""
        made = [part.fresh if isinstance(part, EnergyDistill) else part.init for part in self.parts]
        return {f"part{i}": init(rng) for i, init in enumerate(made)}

    def target(self, params: Params, given: Conditions = None) -> tuple[list[Scored], list[Potential]]:
        """Energy and score of each part, as particles take them, and their product."""
        parts = [functools.partial(part.energy, params[f"part{i}"]) for i, part in enumerate(self.parts)]
        return [scored(part) for part in parts], [Product()]

    def sample(
        self, params: Params, rng: jax.Array, n: int, conditions: Batch | None = None, options: Any = None
    ) -> dict[str, Any]:
        """`image` [n, S, S, C] clipped to [-1, 1] (NaN where it overflowed), and its `trace`."""
        o, shape = options or ProductSampling(), self.spec(1)["image"].shape[1:]
        first, start = self.parts[0], None
        if isinstance(first, Begins):

            def start(keys: jax.Array, given: Conditions) -> jax.Array:
                return first.begin(params["part0"], keys, self.sigmas[1])

        image, trace = o.draw(rng, n, self.sigmas, functools.partial(self.target, params), shape, start=start)
        return {"image": clipped(image), "trace": trace}


@dataclass(frozen=True)
class EnergyTilted(Assembled):
    """An energy without classes, tilted to a class by a classifier: p(x) p(class | x)."""

    energy: EnergyDistill
    classifier: Annotated[Any, Classifies]  # of images without noise; it sees what the energy takes a particle for

    Sampling = ParticleSampling
    untrained = "train its energy and its classifier, and draw with `zoo sample CONFIG`"

    def __post_init__(self) -> None:
        check_fields(self, "task.")
        image, other = (task.spec(1)["image"].shape[1:] for task in (self.energy, self.classifier))
        if image != other:
            raise UserError(
                f"task.energy is of images of {image} and task.classifier of {other}; take two of one shape"
            )

    @property
    def about(self) -> About:
        """Both are held; classes are the classifier's."""
        one = Network(
            self.energy,
            Energetic,
            _alike(self.energy),
            how="train one, e.g. `zoo train energy/digits`",
            entry="weights.energy=RUN",
        )
        two = Network(
            self.classifier,
            Classifies,
            ("head_dim", "pool"),
            how="train one, e.g. `zoo train part/finetune_digits:scratch`",
            entry="weights.classifier=RUN",
        )
        return About(classes=self.classifier.about.classes, networks={"energy": one, "classifier": two})

    @property
    def sigmas(self) -> tuple[float, float]:
        """Lowest and highest level."""
        return self.energy.sigmas

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`image` [B, S, S, C] and `label` [B]."""
        return self.classifier.spec(batch)

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters, which are meant to come from `Run.weights`."""
        return {"energy": self.energy.fresh(rng), "classifier": self.classifier.init(rng)}

    def sample(
        self, params: Params, rng: jax.Array, n: int, conditions: Batch | None = None, options: Any = None
    ) -> dict[str, Any]:
        """As of an energy; negative labels, and none, are any class."""
        o, shape = options or ParticleSampling(), self.spec(1)["image"].shape[1:]
        label = (conditions or {}).get("label")
        told: Any = {"label": jnp.full(n, -1) if label is None else label}

        def target(given: Any) -> tuple[list[Scored], list[Potential]]:
            def logits(x0: jax.Array) -> jax.Array:
                return self.classifier.logits(params["classifier"], {"image": x0})

            classifier = Classifier(logits, given["label"], self.energy.network.data)
            return [self.energy.scored(params["energy"], None)], [classifier]

        image, trace = o.draw(rng, n, self.sigmas, target, shape, told)
        return {"image": clipped(image), **({} if label is None else told), "trace": trace}
