"""The task of WVD: clips with the place of every pixel, drawn whole or completed from what is known (arXiv:2412.01821).

B clips, F frames, S pixels a side, h = w = S / factor cells a side, C channels of a modality, M modalities.
A cell is known or not, in each modality; z = (1 - t) x0 + t n of a flow from data to noise, with sigma = t / (1 - t).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from msgspec import Meta

from zoo.diffusion.guidance import Denoiser, Guidance
from zoo.diffusion.levels import Levels, LogNormal
from zoo.diffusion.precondition import Precondition
from zoo.diffusion.sampling import DenoiserSampling, clipped, draw, noises
from zoo.diffusion.solvers import Euler, Project, Solver
from zoo.diffusion.tasks import Levelled
from zoo.encoders import vae as autoencoder
from zoo.encoders.vae import AutoEncoder
from zoo.errors import UserError, check_divisor
from zoo.fields import AtLeast2, Dtype, Layers, NonNegative, Positive, Side, Size, check_fields
from zoo.nn.attention import Backend, check_backend
from zoo.nn.embed import patchify, unpatchify
from zoo.nn.transformer import Remat
from zoo.papers.wvd.geometry import solve
from zoo.papers.wvd.model import Modality, Pattern, WvdTrunk
from zoo.papers.wvd.projection import carried, filled, told_by_first
from zoo.task import About, Batch, Decodes, Network, Params, sample_keys

Part: TypeAlias = Literal["joint", "image", "stereo", "depth", "camera", "render"]
_CELL = 0.9  # share of a cell's pixels that make it known
_SEEN = 0.5  # and that make it count in the loss
_OWN = 2**20  # numbers of noises that no solver draws


@dataclass(frozen=True)
class Mixture:
    """How often a training step sees each task: weights, of which only the ratios count. What is known in each:

    joint: nothing. image: the first image. stereo: all images. camera: the first image, its points, and where they are in the other
    frames as far as they are seen there. render: the first image and all points.
    """

    joint: NonNegative = 0.1
    image: NonNegative = 0.3
    stereo: NonNegative = 0.2
    camera: NonNegative = 0.3
    render: NonNegative = 0.1

    def __post_init__(self) -> None:
        check_fields(self, "task.tasks.")
        if not sum(self.weights):
            raise UserError("task.tasks has no task; set a weight above 0, e.g. task.tasks.joint=1")

    @property
    def weights(self) -> tuple[float, ...]:
        """In the order of the fields."""
        return tuple(dataclasses.astuple(self))

    def has(self, name: str) -> bool:
        """Whether training sees the task of this name."""
        return dict(zip(NAMES, self.weights))[name] > 0


NAMES = tuple(field.name for field in dataclasses.fields(Mixture))


def known_frames(frames: int) -> np.ndarray:
    """Which frames are known whole, by task, frame and modality: bool [5, F, 2]."""
    first, every, none = np.arange(frames) == 0, np.ones(frames, bool), np.zeros(frames, bool)
    rows = {
        "joint": (none, none),
        "image": (first, none),
        "stereo": (every, none),
        "camera": (first, first),
        "render": (first, every),
    }
    return np.stack([np.stack(rows[name], -1) for name in NAMES])


@dataclass(frozen=True)
class WvdSampling(DenoiserSampling):
    """What is completed, and how."""

    task: Part = "joint"  # out of nothing; else what `Mixture` says is known; depth: the first frame's, as image
    solver: Solver = Euler()
    nfe: AtLeast2 = 25
    guidance: NonNegative | Guidance = 0.0  # x0 + weight (x0 - x0 with nothing known); 0: off
    levels: Levels = Levels("flow")
    corrections: Annotated[int, Meta(ge=0, le=64)] = 1  # Langevin steps before each call, of a task not trained

    @property
    def known(self) -> str:
        """The task by which parts are known."""
        return "image" if self.task == "depth" else self.task


class Known(NamedTuple):
    """What of clips is known."""

    value: jax.Array  # [B, F, h, w, M C], of what is modelled; of cells that are not known it does not matter
    cell: jax.Array  # bool [B, F, h, w, M]


@dataclass(frozen=True)
class Wvd(Levelled):
    """A denoiser of clips of images and points, and of what of them is not known."""

    frames: Annotated[int, Meta(ge=1, le=2**10)] = 8
    image: Side = 32  # pixels a side
    modalities: Literal["both", "rgb"] = "both"  # rgb: images alone, the twin that knows nothing of places
    patch: Side = 4  # cells a side of a token
    width: Size = 192
    depth: Layers = 6
    head_dim: Annotated[int, Meta(ge=4, le=2**18, multiple_of=4)] = 32  # turned by three axes
    pattern: Pattern = "joint"  # joint: every token sees all; factorised: within frames and across them by turns
    base: Annotated[float, Meta(gt=1, le=1e6)] = 100.0  # of rotations
    tasks: Mixture = Mixture()
    shift: Positive | None = None  # of sigma in training; None: sqrt(tokens / 256) between 1 and 4
    low: Positive = 0.02  # levels that it is asked for in sampling
    high: Positive = 999.0  # t = 0.999: no signal but a thousandth
    vae: AutoEncoder | None = None  # held; None: pixels are modelled
    scales: tuple[Positive, Positive] = (1.0, 1.0)  # by which images and points, or their latents, are multiplied
    dtype: Dtype = "float32"
    remat: Remat = "none"
    scan: bool = True
    attention: Backend = "xla"

    Sampling = WvdSampling

    def __post_init__(self) -> None:
        super().__post_init__()
        check_backend(self.attention, self.dtype)
        check_divisor("head_dim", self.head_dim, "width", self.width)
        if self.image % (self.patch * self.factor):
            raise UserError(
                f"task.image={self.image} is no multiple of {self.patch * self.factor} pixels, a token's side (task.patch={self.patch} "
                f"cells of {self.factor} pixels); change one of them"
            )
        if self.pattern == "factorised" and self.depth % 2:
            raise UserError(
                f"task.pattern='factorised' takes blocks in pairs; set an even task.depth, not {self.depth}"
            )
        points = [name for name in ("stereo", "camera", "render") if self.tasks.has(name)]
        if self.modalities == "rgb" and points:
            raise UserError(
                f"task.tasks.{points[0]} is about points, and task.modalities='rgb' has none; set its weight to 0"
            )

    # --- what the house is told -------------------------------------------------------------------

    @property
    def about(self) -> About:
        """The autoencoder is held; a clip can be given to complete."""
        networks = {"vae": Network(self.vae, Decodes, how=autoencoder.HOW)} if self.vae else {}
        return About(unit="clips", conditions=tuple(self.spec(1)), networks=networks, tokens=self.frames * self.side**2)

    @property
    def factor(self) -> int:
        """Pixels a side of a cell."""
        return self.vae.factor if self.vae else 1

    @property
    def side(self) -> int:
        """Tokens a side of a frame."""
        return self.image // self.factor // self.patch

    @property
    def channels(self) -> int:
        """C."""
        return self.vae.latent if self.vae else 3

    @property
    def names(self) -> tuple[str, ...]:
        """The modalities."""
        return ("frames", "points") if self.modalities == "both" else ("frames",)

    @property
    def shape(self) -> tuple[int, ...]:
        """[F, h, w, M C] of what is modelled."""
        cells = self.image // self.factor
        return self.frames, cells, cells, len(self.names) * self.channels

    @property
    def noise(self) -> LogNormal:
        """Levels of training steps: t is the sigmoid of a normal number, shifted (a t / (1 + (a - 1) t) is a sigma)."""
        shift = self.shift or min(max(math.sqrt(self.about.tokens / 256), 1.0), 4.0)
        return LogNormal(mean=math.log(shift), std=1.0)

    def flops(self) -> float:
        """Floating-point operations of one training clip: 6 per weight and token, and attention. The frozen encoder is left out."""
        places, width = self.side**2, self.width
        seen = self.about.tokens if self.pattern == "joint" else (places + self.frames) / 2
        ends = len(self.names) * (2 * self.channels + 1) * self.patch**2 * width
        token = self.depth * (12 * width**2 + 2 * seen * width) + ends
        return 6.0 * (self.about.tokens * token + self.frames * (8 + 2 * len(self.names)) * width**2)

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`frames` [B, F, S, S, 3] in [-1, 1]; `points` of that shape; `seen` bool [B, F, S, S], where these are known; `camera`
        [B, F, 4, 4] and `focal` [B] as in `zoo/cameras.py`. Images alone where there are no points."""
        clip = (batch, self.frames, self.image, self.image)
        spec = {"frames": jax.ShapeDtypeStruct((*clip, 3), jnp.float32)}
        if self.modalities == "rgb":
            return spec
        return {
            **spec,
            "points": jax.ShapeDtypeStruct((*clip, 3), jnp.float32),
            "seen": jax.ShapeDtypeStruct(clip, jnp.bool_),
            "camera": jax.ShapeDtypeStruct((batch, self.frames, 4, 4), jnp.float32),
            "focal": jax.ShapeDtypeStruct((batch,), jnp.float32),
        }

    # --- the network --------------------------------------------------------------------------------

    @property
    def _trunk(self) -> WvdTrunk:
        return WvdTrunk(
            self.frames, self.side, self.side, self.width, self.depth, self.head_dim, self.pattern, self.base, self.dtype,
            self.scan, self.remat, self.attention,
        )  # fmt: skip

    def _modality(self, name: str) -> Modality:
        return Modality(self.width, self.channels * self.patch**2, name != "frames", self.dtype)

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters: velocities are zero. Of points, what enters and leaves is zero too: `weights.trunk` and
        `weights.frames` of a run on images alone give its images."""
        keys = jax.random.split(rng, 4)
        tokens = self.frames * self.side**2
        told = jnp.zeros((1, self.frames, self.width))
        made: Any = self._trunk.init(keys[0], jnp.zeros((1, tokens, self.width)), told)
        params = {"trunk": made["params"]}
        for key, name in zip(keys[1:], self.names):
            one = self._modality(name)
            x, known = jnp.zeros((1, tokens, one.dims)), jnp.zeros((1, tokens, self.patch**2))
            own: Any = one.init(key, x, known, jnp.zeros((1, self.frames)))
            params[name] = own["params"]
        return {**params, "vae": self.vae.init(keys[3])} if self.vae else params

    def velocity(self, params: Params, z: jax.Array, level: jax.Array, cell: jax.Array) -> jax.Array:
        """n - x0 [B, F, h, w, M C] in float32.

        Args:
            z: [B, F, h, w, M C], clean where it is known.
            level: [B, F, M], t of each frame in each modality; 0 where it is known whole.
            cell: bool [B, F, h, w, M], what is known.
        """
        count = len(self.names)
        parts, known = jnp.split(z, count, -1), jnp.split(cell, count, -1)
        h, told = jnp.zeros(()), jnp.zeros(())
        for i, name in enumerate(self.names):
            own = self._modality(name)
            entered: Any = own.apply(
                {"params": params[name]}, self._tokens(parts[i]), self._tokens(known[i]), level[..., i], method="enter"
            )
            h, told = h + entered[0], told + entered[1]
        hidden: Any = self._trunk.apply({"params": params["trunk"]}, h.astype(self.dtype), told)
        found: list[Any] = [
            self._modality(name).apply({"params": params[name]}, hidden, method="leave") for name in self.names
        ]
        return jnp.concatenate([self._image(x) for x in found], -1)

    def _tokens(self, x: jax.Array) -> jax.Array:
        """[B, F, h, w, C] -> [B, F L, C P P]."""
        return patchify(x.reshape(-1, *x.shape[2:]), self.patch).reshape(len(x), -1, x.shape[-1] * self.patch**2)

    def _image(self, x: jax.Array) -> jax.Array:
        image = unpatchify(x.reshape(-1, self.side**2, x.shape[-1]), self.patch, self.channels)
        return image.reshape(-1, self.frames, *image.shape[1:])

    def _each(self, cell: jax.Array) -> jax.Array:
        """[..., M] for modalities -> [..., M C] for their channels."""
        return jnp.repeat(cell, self.channels, -1)

    def x0(self, params: Params, x: jax.Array, sigma: jax.Array, known: Known) -> jax.Array:
        """E[x0 | x, known] [B, F, h, w, M C] in float32, to the bit what is known where it is.

        Args:
            x: x0 + sigma n.
            sigma: [] or [B].
        """
        there = self._each(known.cell)

        def network(z: jax.Array, t: jax.Array) -> jax.Array:
            return self.velocity(params, jnp.where(there, known.value, z), self._levels(t, known.cell), known.cell)

        return jnp.where(there, known.value, Precondition("flow").denoise(network, x, sigma))

    def _levels(self, t: jax.Array, cell: jax.Array) -> jax.Array:
        """[B, F, M] of t [] or [B]."""
        return jnp.where(cell.all((2, 3)), 0.0, jnp.broadcast_to(t, (len(cell),))[:, None, None])

    # --- what is modelled -----------------------------------------------------------------------------

    def encoded(self, params: Params, *clips: jax.Array) -> jax.Array:
        """Images and points [B, F, S, S, 3] as they are modelled [B, F, h, w, M C]; every image and every map of points by itself."""
        return jnp.concatenate([scale * self._latent(params, x) for x, scale in zip(clips, self.scales)], -1)

    def _latent(self, params: Params, x: jax.Array) -> jax.Array:
        if self.vae is None:
            return x
        mean, _ = self.vae.encode(params["vae"], x.reshape(-1, *x.shape[2:]))
        return jax.lax.stop_gradient(mean).reshape(*x.shape[:2], *mean.shape[1:])

    def decoded(self, params: Params, x: jax.Array) -> dict[str, jax.Array]:
        """The way back: images and points [B, F, S, S, 3] by name."""
        found = {}
        for name, part, scale in zip(self.names, jnp.split(x, len(self.names), -1), self.scales):
            part = part / scale
            if self.vae is not None:
                image = self.vae.decode(params["vae"], part.reshape(-1, *part.shape[2:]))
                part = image.reshape(*x.shape[:2], *image.shape[1:])
            found[name] = part
        return found

    def _cells(self, pixels: jax.Array, share: float) -> jax.Array:
        """Whether so many pixels of a cell are marked: bool [B, F, S, S, ...] -> [B, F, h, w, ...]."""
        f, (rows, columns) = self.factor, (n // self.factor for n in pixels.shape[2:4])
        parts = pixels.reshape(*pixels.shape[:2], rows, f, columns, f, *pixels.shape[4:])
        return parts.mean((3, 5)) >= share if f > 1 else pixels

    def cameras(self, points: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
        """Cameras [F, 4, 4] with one focal length, read off points [F, S, S, 3]; NaN for frames that show none, and why."""
        found = solve(points, seen, one_focal=True)
        known = found.focal[np.isfinite(found.focal)]
        return found.camera, np.median(known) if len(known) else np.asarray(np.nan), found.refused

    # --- training -----------------------------------------------------------------------------------

    def masks(self, batch: Batch, task: jax.Array) -> jax.Array:
        """Which pixels are known, bool [B, F, S, S, M], for tasks [B] by number."""
        pixels = self._whole(batch, task)
        if not self.tasks.camera:
            return pixels
        told = jax.vmap(told_by_first)(batch["points"], batch["seen"], batch["camera"], batch["focal"])
        return pixels.at[..., 1].max(told & (task == NAMES.index("camera"))[:, None, None, None])

    def _whole(self, batch: Batch, task: jax.Array) -> jax.Array:
        """Those of them that are known because all of their frame is; points where they are seen."""
        count = len(self.names)
        frames = jnp.asarray(known_frames(self.frames))[task][:, :, None, None, :count]
        pixels = jnp.broadcast_to(frames, (*batch["frames"].shape[:4], count))
        return pixels if count == 1 else pixels.at[..., 1].min(batch["seen"])

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean square of velocity - (n - x0) over what of a clip is neither known nor unseen, then over clips.

        Metrics: `frames` and `points`, the same of each modality alone.
        """
        level_rng, noise_rng, task_rng = jax.random.split(rng, 3)
        count = len(batch["frames"])
        pixels = self.masks(batch, self._drawn(task_rng, count))
        value = self.encoded(params, *(batch[name] for name in self.names))
        sigma = self.noise.draw(level_rng, count, self.sigmas)
        t = sigma / (1 + sigma)
        noise = jax.random.normal(noise_rng, value.shape)
        cell = self._cells(pixels, _CELL)
        over = t[:, None, None, None, None]
        z = jnp.where(self._each(cell), value, (1 - over) * value + over * noise)
        found = self.velocity(params, z, self._levels(t, cell), cell)
        counts = ~cell
        if self.modalities == "both":
            seen = self._cells(batch["seen"], _SEEN)
            counts &= jnp.stack([jnp.ones_like(seen), seen], -1)
        return self._error(found, noise - value, counts)

    def _drawn(self, rng: jax.Array, count: int) -> jax.Array:
        """Tasks [B] by number, one from each part of equal probability in random order."""
        shift, order = jax.random.split(rng)
        share = (jnp.arange(count) + jax.random.uniform(shift, (count,))) / count
        ends = np.cumsum(self.tasks.weights) / sum(self.tasks.weights)
        return jax.random.permutation(order, (share[:, None] >= ends[:-1]).sum(1))

    def _error(self, found: jax.Array, target: jax.Array, counts: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        axes = (1, 2, 3)
        square = jnp.square(found - target).reshape(*counts.shape, -1).mean(-1)
        total, number = jnp.where(counts, square, 0).sum(axes), counts.sum(axes)  # [B, M]
        loss = (total.sum(-1) / jnp.maximum(number.sum(-1), 1)).mean()
        each = total.sum(0) / jnp.maximum(number.sum(0), 1)
        return loss, dict(zip(self.names, each))

    # --- samples ------------------------------------------------------------------------------------

    def sample(
        self, params: Params, rng: jax.Array, n: int, conditions: Batch | None = None, options: Any = None
    ) -> dict[str, jax.Array]:
        """n clips.

        A task that training saw is completed with what is known clean and flagged; of another one what is known is noised and put in
        the place of what was drawn, with Langevin steps.

        Args:
            conditions: `spec`, of which the task takes what it says is known: of `frames` and `points` [n, F, S, S, 3] the first, or
                all; `seen`; for the task camera the cameras to go to. None: for the task joint.

        Returns:
            `frames` and `points` [n, F, S, S, 3], what is known as it was given; `image` [n, 2 S, F S, 3], frames side by side above
            their points; NaN where it overflowed.
        """
        o, keys = options or WvdSampling(), sample_keys(rng, n)
        given, pixels = self._given(o.task, conditions, n)
        known = Known(self.encoded(params, *given), self._cells(pixels, _CELL))
        denoise, project = self._completing(params, known, keys, o)
        x = draw(o.plan(self.sigmas), denoise, keys, self.shape, project=project)
        found = self.decoded(params, jnp.where(self._each(known.cell), known.value, x))
        clips = {}
        for i, name in enumerate(self.names):
            clips[name] = jnp.where(pixels[..., i, None], given[i], clipped(found[name]))
        rows = [x.swapaxes(1, 2).reshape(n, self.image, -1, 3) for x in clips.values()]
        return {**clips, "image": jnp.concatenate(rows, 1)}

    def _given(self, task: Part, conditions: Batch | None, n: int) -> tuple[list[jax.Array], jax.Array]:
        """The modalities as far as they are given [n, F, S, S, 3] each, and what of them is known, bool [n, F, S, S, M]."""
        have = conditions or {}
        name = "image" if task == "depth" else task
        if self.modalities == "rgb" and name not in ("joint", "image"):
            raise UserError(
                f"task={task} is about points, and this model draws images alone; choose task=joint or image"
            )
        needs = {"joint": (), "render": ("frames", "points", "seen"), "camera": tuple(self.spec(1))}.get(
            name, ("frames",)
        )
        if missing := [key for key in needs if key not in have]:
            raise UserError(
                f"task={task} completes clips, and there are no {missing[0]} here; give some, e.g. from=test"
            )
        empty = {key: jnp.zeros((n, *leaf.shape[1:]), leaf.dtype) for key, leaf in self.spec(1).items()}
        batch = {**empty, **{key: have[key] for key in needs}}
        pixels = self._whole(batch, jnp.full(n, NAMES.index(name)))
        given = [batch[one] for one in self.names]
        if name == "camera":
            carry = jax.vmap(functools.partial(carried, size=(self.image, self.image)))
            points, seen = (batch[key][:, 0].reshape(n, -1, *batch[key].shape[4:]) for key in ("points", "seen"))
            shown, there = carry(
                points, seen, batch["camera"], batch["focal"]
            )  # the first frame's points, in all views
            first = jnp.arange(self.frames)[:, None, None] == 0
            there = jnp.where(first, batch["seen"], there)
            given[1] = jnp.where(
                first[..., None], batch["points"], jax.vmap(filled)(shown, there) if self.vae else shown
            )
            pixels = pixels.at[..., 1].set(there)
        return given, pixels

    def _completing(
        self, params: Params, known: Known, keys: jax.Array, o: WvdSampling
    ) -> tuple[Denoiser, Project | None]:
        """The denoiser of a task, guided or not, and what is done to the state between its calls."""
        there, normal = self._each(known.cell), noises(keys, self.shape)
        none = Known(known.value, jnp.zeros_like(known.cell))
        guidance, trained = Guidance.of(o.guidance), o.known == "joint" or self.tasks.has(o.known)
        if guidance.weight and not (self.tasks.joint and trained and o.known != "joint"):
            raise UserError(
                f"guidance={o.guidance} compares what is known with nothing known: it takes a model that was trained on the task joint "
                f"and on what is asked, and task={o.task} is not that; leave guidance out"
            )
        if not trained:
            return self._replacing(params, known, none, normal, o.corrections)

        def alone(x: jax.Array, sigma: jax.Array) -> jax.Array:
            return self.x0(params, x, sigma, known)

        def both(x: jax.Array, sigma: jax.Array) -> tuple[jax.Array, jax.Array]:
            """One pass of twice the batch: with what is known, and with noise in its place."""
            twice = Known(*(jnp.concatenate(pair) for pair in zip(known, none)))
            blind = jnp.where(there, sigma * normal(_OWN), x)
            strong, weak = jnp.split(self.x0(params, jnp.concatenate([x, blind]), sigma, twice), 2)
            return strong, jnp.where(there, strong, weak)

        return guidance.denoiser(alone, both), None

    def _replacing(
        self, params: Params, known: Known, none: Known, normal: Any, corrections: int
    ) -> tuple[Denoiser, Project | None]:
        """Replacement: what is known, at the noise level of the rest, in the place of what was drawn; then Langevin steps.

        A step is eta s + sqrt(2 eta) n along the score s = (x0 - x) / sigma^2, eta = 2 (0.16 |n| / |s|)^2, over what is not known
        (arXiv:2011.13456, algorithm 4).
        """
        there = self._each(known.cell)

        def put(x: jax.Array, sigma: jax.Array, number: Any) -> jax.Array:
            return jnp.where(there, known.value + sigma * normal(number), x)

        def length(x: jax.Array) -> jax.Array:
            return jnp.sqrt(jnp.where(there, 0, jnp.square(x)).sum((1, 2, 3, 4), keepdims=True))

        def denoise(x: jax.Array, sigma: jax.Array) -> jax.Array:
            return jnp.where(there, known.value, self.x0(params, x, sigma, none))

        def project(i: jax.Array, x: jax.Array, sigma: jax.Array) -> jax.Array:
            begin = _OWN + i * (2 * corrections + 1)

            def step(x: jax.Array, k: jax.Array) -> tuple[jax.Array, None]:
                noise = normal(begin + 2 * k + 1)
                score = (self.x0(params, x, sigma, none) - x) / sigma**2
                eta = 2 * jnp.square(0.16 * length(noise) / jnp.maximum(length(score), 1e-12))
                return put(x + eta * score + jnp.sqrt(2 * eta) * noise, sigma, begin + 2 * k + 2), None

            return jax.lax.scan(step, put(x, sigma, begin), jnp.arange(corrections))[0]

        return denoise, project
