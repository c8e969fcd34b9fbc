"""The contract between a paper and everything else. It is structural: a task inherits nothing.

A task is a frozen dataclass whose fields are the paper's hyper-parameters, with the four members of `Task`. What the
house asks of it besides stands in `About`, where a misspelt word is an error, and in the abilities below: small protocols,
each with a method or two. This file alone looks them up; commands say in a sentence when one is missing.

B examples, N samples, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

from zoo.errors import UserError, suggest
from zoo.fields import check_fields

if TYPE_CHECKING:  # seconds of start-up, which configs and lists do not need
    import jax

Params = dict[str, Any]  # nested dict of arrays; top-level keys are the unit of what is held and of `Run.weights`
Batch = Mapping[str, "jax.Array"]
Options = Annotated[Mapping[str, Any], "of a task's sampler"]  # by name: fields of its `Sampling`


# --- what a task says of itself -------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """Parameters under a top-level key that come from elsewhere: a teacher, an encoder, layers that an earlier stage trained.

    Held, that is without gradient, optimiser state or average, unless they are trained from there.
    """

    task: Any = None  # whose parameters these are; None: a part of this task that another run has trained
    can: type | None = None  # the ability that is asked of it
    alike: tuple[str, ...] = ()  # fields that no shape of a parameter shows, in which a given one is as `task`
    required: bool = True  # must come from `Run.weights`, unless the data are made up
    trained: bool = False  # True: they only begin there
    how: str = ""  # how to come by one, for the error: a command, or a config that makes it
    entry: str = ""  # what to add to a config that then names it; "": weights.KEY=OUT


@dataclass(frozen=True)
class Likelihood:
    """What the `nll` of a task is of, and how its nats become bits."""

    event: tuple[int, ...]  # shape of what is modelled
    kind: Literal["exact", "bound", "noisy"] = "exact"  # "bound": nll is above -log p; "noisy": of examples with noise
    name: str = "bpd"  # of the bits per dimension, among figures
    bins: float = 1.0  # of the data per unit of what is modelled: grey levels 2/256 apart have 128
    noise: float = 0.0  # standard deviation of the noise, where it is "noisy"
    clean: Any = None  # the same task without that noise
    weighted: bool = True  # of a bound: the mean of several draws' probabilities is tighter; False: draws are terms

    def bits(self, nats: Any) -> Any:
        """Bits per dimension from nats per dimension of a density: those of a bin that is 1 / bins wide."""
        return nats / math.log(2) + math.log2(self.bins)

    @property
    def levels(self) -> int:
        """Grey levels of pixels in [-1, 1]."""
        return round(2 * self.bins)


@dataclass(frozen=True)
class Captions:
    """Captions as a task takes them."""

    tokens: int  # of a caption
    vocabulary: int | None = None  # pieces that its text encoder knows; None: it has none
    template: str = "plain"  # how they are put before they are encoded: "aspect" names the aspect ratio


@dataclass(frozen=True)
class Grid:
    """The rows and columns that samples have; the option `grid` of such a sampler sets others than those of training."""

    trained: tuple[int, int]
    pixels: int = 1  # a side of one cell
    multiple: int = 1  # what the sides of an image must be multiples of, in pixels


@dataclass(frozen=True, kw_only=True)
class About:
    """What the house knows of a task besides its parameters, batch and loss."""

    unit: str = "images"  # what its examples are called
    classes: int = 0  # of `label`; 0: none
    conditions: tuple[str, ...] = ()  # keys of a batch that the sampler is given, besides `label`
    completes: tuple[str, ...] = ()  # keys that the sampler takes as a start: texts to rewrite, images to caption
    holes: bool = False  # and it fills in tokens of -1 there
    buffers: tuple[str, ...] = ()  # top-level keys of params that no gradient moves: `after_step` does, or they stay
    networks: Mapping[str, Network] = field(default_factory=dict)  # from elsewhere, by top-level key
    likelihood: Likelihood | None = None  # of what `nll` is, where it can be told in bits
    captions: Captions | None = None
    vocabulary: int | None = None  # symbols of the texts that it models, or of captions without an encoder
    grid: Grid | None = None  # where samples may have other shapes than examples
    tokens: int = 0  # of an example in the network, by which `zoo compile` estimates what must be sent
    licence: str = ""  # terms of its published weights
    lacks: Mapping[str, str] = field(default_factory=dict)  # abilities of its class that its fields forbid, and why

    @property
    def held(self) -> tuple[str, ...]:
        """Top-level keys of params that get no gradient, no optimiser state and no average."""
        return (*(key for key, network in self.networks.items() if not network.trained), *self.buffers)


@runtime_checkable
class Task(Protocol):
    """What the trainer knows of a paper."""

    @property
    def about(self) -> About:
        """A class attribute or a property."""

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of one global batch, by key."""

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters; leaves may be boxed with logical axis names."""

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """A scalar mean over examples, and metrics: scalars are logged, arrays (batch means) go to `after_step` only."""


@runtime_checkable
class Measures(Protocol):
    """Needs no model: `zoo eval CONFIG` prints what it finds. Figures under `failed` or `unanswered` that are not 0 end it with 1."""

    def run(self) -> dict[str, Any]:
        """The figures, as JSON values."""


# --- abilities ------------------------------------------------------------------------------------


@runtime_checkable
class Samples(Protocol):
    """Draws samples: `zoo sample`, sheets while training, and the metrics of samples."""

    Sampling: ClassVar[type]  # frozen dataclass of the options, all with defaults

    def sample(
        self, params: Params, rng: jax.Array, n: int, conditions: Batch | None = None, options: Any = None
    ) -> Any:
        """A dict of arrays that lead with n, and maybe a `trace` (`Trace`); sample i depends on (rng, i) and its conditions alone.

        Args:
            rng: one key, or n keys.
            conditions: arrays that lead with n: `label`, or the keys of `about.conditions`; None: none.
            options: of the class `Sampling`; None: its defaults.
        """


@runtime_checkable
class Trace(Protocol):
    """How samples came about: what a sampler may give as `trace` beside them, a tree of arrays that lead with n.

    `zoo sample` keeps and prints its figures, `zoo.load` hands it on, metrics check it, and `classes` tells and draws it.
    """

    def check(self, rows: Any) -> None:
        """UserError for the first sample that is lost for good, whatever noise it begins with; they are called `rows` [n]."""

    def figures(self) -> dict[str, Any]:
        """Numbers [n] by name."""

    def picture(self) -> Any:
        """Of all samples, a PIL image."""


@runtime_checkable
class Counting(Protocol):
    """Options of a sampler that know what a sample costs: `zoo sample` writes it into `settings.json`."""

    @property
    def network_calls(self) -> int:
        """For one sample."""


@runtime_checkable
class Likely(Protocol):
    """Knows the likelihood of an example, or a bound of it: the metrics `bpd`, `bayes` and `text`."""

    def nll(self, params: Params, batch: Batch, keys: jax.Array) -> jax.Array:
        """-log p [B] in nats; the noise of example i follows from keys[i] alone."""


@runtime_checkable
class Denoises(Protocol):
    """The door of diffusion: x = x0 + sigma n, in the units of what is modelled."""

    @property
    def sigmas(self) -> tuple[float, float]:
        """Lowest and highest sigma it was made for; finite over all of it."""

    def denoise(self, params: Params, x: jax.Array, sigma: jax.Array, conditions: Batch | None = None) -> jax.Array:
        """E[x0 | x], float32; sigma is a scalar or [B]; a label of -1, or conditions None, is none."""


@runtime_checkable
class Energetic(Protocol):
    """Has an energy whose gradient denoises."""

    def energy(self, params: Params, x: jax.Array, sigma: jax.Array, conditions: Batch | None = None) -> jax.Array:
        """[B] nats up to a constant of sigma."""


@runtime_checkable
class Predicts(Protocol):
    """A language model that can teach and judge."""

    def predict(self, params: Params, tokens: jax.Array) -> jax.Array:
        """log p(x_t | x_<t) [B, T, V] in nats of tokens int [B, T], or of rows [B, T, V] that mix embeddings, for gradients."""


@runtime_checkable
class Inverts(Protocol):
    """A flow of affine blocks: the metric `convergence`, `zoo bench --model`, strategies."""

    # the latter two where its sampler has the options `guidance` and `method` (`zoo.flows.inverse.Jacobi`)

    @property
    def blocks(self) -> int:
        """How many there are."""

    def chain(self, params: Params, batch: Batch, rng: jax.Array, *, guidance: Any = 0.0) -> tuple[jax.Array, Any]:
        """Noisy tokens [B, T, D] and the flow's blocks (`zoo.flows.inverse.Chain`), as they are inverted."""


@runtime_checkable
class Encodes(Protocol):
    """Has features: probes, neighbours, Frechet distances in them, the metric `features`."""

    def features(self, params: Params, batch: Batch) -> jax.Array:
        """[B, D]."""


@runtime_checkable
class Maps(Protocol):
    """Has features for each place: the metric `features` with maps."""

    def feature_map(self, params: Params, batch: Batch) -> jax.Array:
        """[B, H, W, D], of a series [B, T, D]."""


@runtime_checkable
class Classifies(Protocol):
    """The metric `accuracy`."""

    def logits(self, params: Params, batch: Batch) -> jax.Array:
        """[B, classes]."""


@runtime_checkable
class Crops(Protocol):
    """Cuts its examples inside the step: `zoo bench` times it alone."""

    def crops(self, batch: Batch, rng: jax.Array) -> Any:
        """What a step makes of a batch before its network."""


@runtime_checkable
class Prepares(Protocol):
    """Puts what it trains in place before a step."""

    def before_step(self, trained: Params) -> Params:
        """The trained parameters that a step begins with: its gradient is theirs, and the optimiser moves them."""


@runtime_checkable
class Buffered(Protocol):
    """Moves what it holds after a step."""

    def after_step(self, params: Params, metrics: dict[str, jax.Array]) -> Params:
        """The new parameters; only `about.buffers` may differ."""


@runtime_checkable
class Published(Protocol):
    """Has a published layout: `zoo import`, `zoo export --format official`."""

    def import_names(self) -> list[Name]:
        """Every tensor of a published checkpoint, and its place in ours."""


@runtime_checkable
class Renames(Protocol):
    """Published files differ from the layout of `import_names`."""

    def import_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """A published state dict with the keys of `import_names`."""


@runtime_checkable
class Noted(Protocol):
    """Says how another library reads what `zoo export --format official` writes."""

    def import_note(self) -> str:
        """Printed after such an export."""


@runtime_checkable
class Counted(Protocol):
    """Knows what a step of it costs, better than a count of its traced products."""

    def flops(self) -> float | None:
        """Floating-point operations of one training example; None: they are counted."""


@runtime_checkable
class Cached(Protocol):
    """Knows what its sampler keeps: `zoo show`, `zoo bench`."""

    def cache_bytes(self, n: int, guided: bool = True) -> dict[str, int]:
        """Bytes of the key/value caches while n samples are drawn: of a `deep` and a `shallow` block of a flow, or of `all`."""


@runtime_checkable
class Locates(Protocol):
    """Reads cameras off the points of its clips: what `zoo sample` writes beside them, and from where a path begins."""

    def cameras(self, points: Any, seen: Any) -> tuple[Any, Any, Any]:
        """Cameras [F, 4, 4], NaN for none, focal length [], why there is none [F]; of points [F, H, W, 3], `seen` bool [F, H, W]."""


@runtime_checkable
class Decodes(Protocol):
    """An autoencoder of images: latents are encoded and decoded by it."""

    scale: float | None
    channels: int

    @property
    def factor(self) -> int:
        """Pixels a side to one of the latent."""

    def encode(self, params: Params, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and standard deviation of latents [B, h, w, Z] of images [B, H, W, C] in [-1, 1]."""

    def decode(self, params: Params, latent: jax.Array) -> jax.Array:
        """Images of latents, not clipped."""


@runtime_checkable
class Reads(Protocol):
    """A text encoder."""

    tokens: int
    width: int
    vocab: int

    def encode(self, params: Params, tokens: jax.Array) -> jax.Array:
        """Features [B, S, D] float32 of ids [B, S]."""


# in the order in which `zoo list` names them, each by its method
ABILITIES: dict[str, type] = {
    "sample": Samples,
    "nll": Likely,
    "denoise": Denoises,
    "energy": Energetic,
    "predict": Predicts,
    "chain": Inverts,
    "features": Encodes,
    "feature_map": Maps,
    "logits": Classifies,
    "crops": Crops,
    "before_step": Prepares,
    "after_step": Buffered,
    "import_names": Published,
    "import_state": Renames,
}


@dataclass(frozen=True)
class Name:
    """One tensor of a published checkpoint and its place in ours.

    `layout` is an einops pattern from theirs to ours; swapping its sides is the way back. A tensor of layer `layer`
    is one slice of a stacked parameter. `target=None` marks a constant: skipped on import (and allowed to be absent),
    written by `value()` on export.
    """

    source: str
    target: str | None
    layout: str | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    layer: int | None = None
    value: Callable[[], Any] | None = None


class Metric(ABC):
    """Base of metrics, which are frozen dataclasses: called as (task, params, data, rng), they give a dict of figures.

    Under the key `pictures` it may hold PIL images by name: these are saved as `samples/NAME-STEP.png` of the run folder and
    shown where sheets of samples are; no record has them.
    """

    name: ClassVar[str]  # as `zoo eval` takes it
    needs: ClassVar[tuple[type, ...]] = ()  # abilities that it asks of a task
    captions: ClassVar[bool] = False  # asks for `encode`: (texts, S) -> ids [N, S]; `tokenizer` may name its file
    by_class: ClassVar[bool] = True  # labels of its data are classes of the model; False: classes of these data alone
    uses_data: ClassVar[bool] = True  # False: measures models whose data are not known as well
    saves: ClassVar[str] = ""  # the file beside a model in which `zoo eval` keeps what it found
    every: Any = 0  # steps between measurements while training; 0: at the end only
    split: Any = None  # of the data, where it is a metric of one
    path: Any = None  # a data description to measure on; None: that of the run
    tokenizer: Any = ""  # the file of a tokeniser; "": the one beside the model

    def __post_init__(self) -> None:
        check_fields(self, f"metric {self.name}: ")

    @property
    def shares(self) -> int | None:
        """The batch that the cores of a CPU shall share; None: they share none."""
        return None

    def opens(self) -> str | None:
        """The run or export that it is to be given, opened, as `network`; None: none."""
        return None

    def check(self, task: Any) -> None:  # noqa: B027
        """UserError where it makes no sense for a task; asked before a run's first step."""

    def check_data(self, task: Any, data: Any) -> None:  # noqa: B027
        """UserError where it makes none for the data; asked before a run's first step."""

    def check_captions(self, task: Any, encode: Any) -> None:  # noqa: B027
        """UserError for captions of letters that do not fit; asked of one with `captions` before a run's first step."""

    @abstractmethod
    def __call__(self, *arguments: Any, **loaded: Any) -> dict[str, Any]:
        """The figures of (task, params, data, rng). `loaded` is what it asked for: `network`, `encode`."""


# --- looking up -----------------------------------------------------------------------------------


def abilities(task: Any) -> list[str]:
    """The abilities of a task (or of its class), in the order of `ABILITIES`."""
    return [name for name, ability in ABILITIES.items() if isinstance(task, ability) and name not in _lacks(task)]


def _lacks(task: Any) -> Mapping[str, str]:
    about = getattr(task, "about", None)  # of a class it may be a property
    return about.lacks if isinstance(about, About) else {}


def check_needs(task: Any, needs: Iterable[type], what: str) -> None:
    """UserError when the task lacks an ability that `what` needs."""
    for ability in needs:
        name = next(name for name, member in vars(ability).items() if inspect.isfunction(member) and name[0] != "_")
        if name in _lacks(task) or not isinstance(task, ability):
            why = f" ({_lacks(task)[name]})" if name in _lacks(task) else ""
            can = ", ".join(abilities(task)) or "train alone"
            raise UserError(f"{what} needs {name!r}, which {type(task).__name__} has not{why}; it can: {can}")


def holds(task: Any, ability: type) -> bool:
    """Whether a task has an ability, or a network in one of its fields has."""
    return any(isinstance(one, ability) for one in (task, *(getattr(task, f.name) for f in dataclasses.fields(task))))


def is_text(task: Any) -> bool:
    """Whether the examples of a task are texts: `tokens` int32 [B, T], and no image or latent."""
    spec = task.spec(1)
    return "tokens" in spec and not {"image", "latent"} & set(spec)


SPEED = ("dtype", "remat", "scan", "attention")


def speed(task: Any) -> dict[str, Any]:
    """Fields of a task that change no weight but how fast it is and in what numbers: dtype, remat, scan, attention."""
    return {f.name: getattr(task, f.name) for f in dataclasses.fields(task) if f.name in SPEED}


def image_spec(batch: int, side: int, channels: int, classes: int) -> dict[str, jax.ShapeDtypeStruct]:
    """`image` [B, S, S, C] float32, and `label` [B] where there are classes: the `spec` of square images by class."""
    import jax
    import jax.numpy as jnp

    spec = {"image": jax.ShapeDtypeStruct((batch, side, side, channels), jnp.float32)}
    return {**spec, "label": jax.ShapeDtypeStruct((batch,), jnp.int32)} if classes else spec


def sample_keys(rng: jax.Array, n: int) -> jax.Array:
    """n keys of one key, or those given: sample i depends on (rng, i) alone."""
    import jax
    import jax.numpy as jnp

    return rng if jnp.ndim(rng) else jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(n))


def trace_of(drawn: Mapping[str, Any]) -> tuple[dict[str, Any], Trace | None]:
    """What a sampler gave: the samples, and how they came about where it says so."""
    return {key: x for key, x in drawn.items() if key != "trace"}, drawn.get("trace")


def paper(task: Any) -> str:
    """Title line of the paper's file, or of its package."""
    module = type(task).__module__
    if module.startswith("zoo.papers."):
        module = ".".join(module.split(".")[:3])
    return (sys.modules[module].__doc__ or "").partition("\n")[0].rstrip(".")


def call(task: Any, ability: str, *arguments: Any) -> Any:
    """What an ability, named by its method, gives for these arguments."""
    return getattr(task, ability)(*arguments)


# --- options of samplers --------------------------------------------------------------------------


def sampling(task: Any) -> type | None:
    """The class of the options of a task's sampler; None where it has no sampler. UserError for one without such a class."""
    if hasattr(task, "sample") and not hasattr(task, "Sampling"):
        raise UserError(
            f"{type(task).__name__} has a sampler and no `Sampling`, the frozen dataclass of its options; give it one, without "
            "fields where there are no options"
        )
    return task.Sampling if isinstance(task, Samples) else None


def option_names(task: Any) -> tuple[str, ...]:
    """The options of a task's sampler."""
    kind = sampling(task)
    return () if kind is None else tuple(f.name for f in dataclasses.fields(kind))


def has_methods(task: Any) -> bool:
    """Whether the sampler of a task inverts a flow by a method that can be chosen."""
    return isinstance(task, Inverts) and {"guidance", "method"} <= set(option_names(task))


def options_of(task: Any, given: Options, where: str) -> Any:
    """Options of a task's sampler from a mapping of some of them; UserError for an unknown one or a value that does not fit.

    `where` names the field that holds them.
    """
    kind = sampling(task)
    if kind is None:
        raise UserError(f"{where}: {type(task).__name__} has no sampler, so it takes no options; leave them out")
    known = option_names(task)
    for name in given:
        if name not in known:
            way = suggest(name, known) if known else "it has none"
            raise UserError(f"{where}: the sampler of {type(task).__name__} has no option {name!r}; {way}")
    try:
        options = kind(**given)
        check_fields(options)
        return options
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
