"""Energies learned with the network of a denoiser, from a trained teacher or from data; and products of them.

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

from zoo.diffusion.energies import Scored, denoised, scored
from zoo.diffusion.levels import LogNormal
from zoo.diffusion.potentials import Product
from zoo.diffusion.precondition import Precondition
from zoo.diffusion.sampling import clipped, sampled
from zoo.diffusion.smc import EnergySampling, Form, ParticleSampling
from zoo.errors import UserError
from zoo.fields import Below1, Some, check_fields
from zoo.task import About, Batch, Denoises, Energetic, Network, Params, sample_keys, speed


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
            networks["teacher"] = Network(self.network, Denoises, how=how, entry="weights.teacher=RUN")
        return About(classes=self.network.about.classes, networks=networks)

    @property
    def sigmas(self) -> tuple[float, float]:
        """Lowest and highest level."""
        low, high = self.network.sigmas
        return low, high

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """That of the denoiser."""
        found: dict[str, jax.ShapeDtypeStruct] = self.network.spec(batch)
        return found

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters of the network, and of the teacher."""
        fresh = {"net": self.network.init(rng)["net"]}
        return {**fresh, "teacher": self.network.init(rng)} if self.target == "teacher" else fresh

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
        z = into.reshape(-1, *(1,) * (x.ndim - 1)) * x
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
        image, label = batch["image"], batch.get("label")
        level_rng, noise_rng, drop_rng = jax.random.split(rng, 3)
        sigma = self.noise.draw(level_rng, len(image), self.sigmas)
        if label is not None and self.drop:
            label = jnp.where(jax.random.bernoulli(drop_rng, self.drop, label.shape), -1, label)
        given = None if label is None else {"label": label}
        x = image + sigma[:, None, None, None] * jax.random.normal(noise_rng, image.shape)
        target = image
        if self.target == "teacher":
            target = jax.lax.stop_gradient(self.network.denoise(params["teacher"], x, sigma, given))
        square = jnp.square(self.denoise(params, x, sigma, given) - target).mean((1, 2, 3))
        loss = (Precondition("edm", self.network.data).weight(sigma) * square).mean()
        return loss, {"x0_error": jnp.sqrt(square.mean())}

    def scored(self, params: Params, conditions: Batch | None, count: int) -> Scored:
        """Energy and score of `count` particles for each condition."""
        each = None if conditions is None else {k: jnp.repeat(v, count, 0) for k, v in conditions.items()}
        return scored(lambda x, sigma: self.energy(params, x, sigma, each))

    def sample(
        self,
        params: Params,
        rng: jax.Array,
        n: int,
        conditions: Batch | None = None,
        options: EnergySampling | None = None,
    ) -> dict[str, jax.Array]:
        """n images, by a solver, or by weighted particles where they are tempered or have potentials.

        Image i depends on (rng, i) alone.

        Args:
            rng: one key, or n keys.
            conditions: `label` [n]; negative numbers for "no label". None: no labels.
            options: None: the defaults.

        Returns:
            `image` [n, S, S, C] clipped to [-1, 1] (NaN where it overflowed), and `label` [n] where given.
        """
        o, shape = options or EnergySampling(), self.spec(1)["image"].shape[1:]
        label = (conditions or {}).get("label") if self.about.classes else None
        told: Any = None if label is None else {"label": label}
        if o.weighted:
            image = o.draw(rng, n, self.sigmas, [self.scored(params, told, o.particles.count)], shape)
        else:
            image = sampled(functools.partial(self.denoise, params), self.sigmas, shape, sample_keys(rng, n), told, o)
        return {"image": clipped(image), **(told or {})}


@dataclass(frozen=True)
class ProductSampling(ParticleSampling):
    """How a product of energies of images is sampled."""

    form: Form = "score"  # in many dimensions the others keep few roots


@dataclass(frozen=True)
class EnergyProduct:
    """What several energies allow at once: the product of their densities, without classes. There is nothing to train."""

    parts: Some[EnergyDistill]

    Sampling = ProductSampling

    def __post_init__(self) -> None:
        check_fields(self, "task.")
        if len(self.parts) < 2:
            raise UserError("task.parts holds one energy; a product takes two or more")
        shapes = [part.spec(1)["image"].shape[1:] for part in self.parts]
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
                f"part{i}": Network(part, Energetic, how=how, entry=f"weights.part{i}=RUN")
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
        return {f"part{i}": {"net": part.network.init(rng)["net"]} for i, part in enumerate(self.parts)}

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """UserError: there is none."""
        raise UserError(
            "a product of energies has nothing to train; draw from it with `zoo sample CONFIG weights.part0=RUN ...`"
        )

    def energies(self, params: Params, count: int) -> list[Scored]:
        """Energy and score of each part, as particles take them."""
        return [part.scored(params[f"part{i}"], None, count) for i, part in enumerate(self.parts)]

    def sample(
        self,
        params: Params,
        rng: jax.Array,
        n: int,
        conditions: Batch | None = None,
        options: ProductSampling | None = None,
    ) -> dict[str, jax.Array]:
        """`image` [n, S, S, C] clipped to [-1, 1] (NaN where it overflowed); image i depends on (rng, i) alone.

        Args:
            rng: one key, or n keys.
            options: None: the defaults.
        """
        o, shape = options or ProductSampling(), self.spec(1)["image"].shape[1:]
        image = o.draw(rng, n, self.sigmas, self.energies(params, o.particles.count), shape, [Product()])
        return {"image": clipped(image)}
