"""Meshes, the one table from logical to mesh axes, shardings with readable errors, and `constrain`."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from msgspec import Meta

from zoo import files
from zoo.errors import UserError
from zoo.fields import check_fields

Rules = Mapping[str, str | tuple[str, ...] | None]

# Logical axes of layers and activations -> mesh axes. Whatever is not named here is replicated.
RULES: Rules = {
    "batch": ("data", "fsdp"),
    "tokens": "sequence",
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}

AXES = ("data", "fsdp", "sequence", "tensor")  # of every mesh, the one that talks most innermost

_LARGE = 16 * 2**20  # bytes above which a parameter that stays whole on every device is worth a warning
_LARGE_CPU = 2**28  # bytes of parameters above which a CPU is not asked for copies: large products use all its cores

_COPY = 0.4  # of a device's memory that a copy of all parameters may take; the rest is for what is computed from them

_rules: ContextVar[Rules] = ContextVar("rules", default=RULES)
_platform: ContextVar[str | None] = ContextVar("platform", default=None)
_log = logging.getLogger("zoo")


Axis: TypeAlias = Annotated[int, Meta(ge=-1, le=2**20)]


@dataclass(frozen=True)
class Mesh:
    """Devices arranged as data x fsdp x sequence x tensor; -1 stands for whatever is left.

    `data` repeats the model, `fsdp` shares out the batch and the parameters, `tensor` the heads and the MLPs of each layer,
    `sequence` the tokens of each example. On several slices of a TPU, `data` spans the slices: only it may cross the slower
    network between them.
    """

    data: Axis = -1
    fsdp: Axis = 1
    tensor: Axis = 1
    sequence: Axis = 1

    def __post_init__(self) -> None:
        check_fields(self, "mesh.")
        for name in AXES:
            if not getattr(self, name):
                raise UserError(f"mesh.{name}=0 is no size; give a positive number, or -1 for the rest")

    def sizes(self, count: int) -> dict[str, int]:
        """Size by axis, outermost first, for so many devices. UserError when they do not multiply to `count`."""
        sizes = {name: getattr(self, name) for name in AXES}
        free = [name for name, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise UserError(f"mesh: only one axis may be -1, but {' and '.join(free)} are; give all but one a size")
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if free and count % fixed == 0:
            sizes[free[0]] = count // fixed
        if math.prod(sizes.values()) != count:
            asked = " x ".join(f"{name}={getattr(self, name)}" for name in sizes)
            raise UserError(
                f"mesh {asked} does not fill the {count} device{'s' * (count > 1)} here; "
                f"their product must be {count} (use mesh.data=-1 for the rest)"
            )
        return sizes

    def build(self, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
        """The mesh over `devices` (default: all). UserError when the sizes do not multiply to their number."""
        devices = jax.devices() if devices is None else devices
        sizes = self.sizes(len(devices))
        shape = tuple(sizes.values())
        slices = len({getattr(d, "slice_index", 0) for d in devices}) if devices[0].platform == "tpu" else 1
        if slices > 1:
            if sizes["data"] % slices:
                raise UserError(
                    f"mesh.data={sizes['data']} must be a multiple of the {slices} slices, which only the data axis may "
                    f"span; set mesh.data={slices}"
                )
            within = (sizes["data"] // slices, *shape[1:])
            grid = mesh_utils.create_hybrid_device_mesh(
                within, (slices, *(1,) * (len(shape) - 1)), devices=devices, allow_split_physical_axes=True
            )
        elif devices[0].platform == "tpu":
            grid = mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
        else:
            grid = np.asarray(devices).reshape(shape)
        return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))

    def abstract(self, count: int) -> jax.sharding.AbstractMesh:
        """The mesh of so many devices that are not there: enough to ask what lies where."""
        sizes = self.sizes(count)
        return jax.sharding.AbstractMesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _keep_memory() -> None:
    """Ask the C library to reuse freed memory instead of handing it back to the system.

    On CPU, XLA takes the temporaries of every step anew; given back each time, their pages are zeroed by the kernel
    again and again, which took a third of a small model's step. Only glibc knows these settings; elsewhere nothing happens.
    """
    mmap_max, trim_threshold, arena_max = -4, -1, -8  # from malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(arena_max, 1)


_CPU_DEVICES = 8  # at most: more share a small batch too thinly


def _cpu_devices(batch: int, mesh: Mesh | None) -> int:
    """How many devices to make of this machine's cores: what the mesh asks for, else what divides the batch."""
    sizes = [getattr(mesh, name) for name in AXES] if mesh is not None else [-1]
    asked = math.prod(size for size in sizes if size > 0)
    processes = int(os.environ.get("JAX_NUM_PROCESSES") or 1)
    if -1 not in sizes or processes > 1:
        return max(1, asked // processes)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    n = 1
    while 2 * n <= min(cores // asked, _CPU_DEVICES) and batch % (2 * n * asked) == 0:
        n *= 2
    return n * asked


def _wait_for_late_devices() -> None:
    """XLA ends a process of which one device comes 40 seconds late to a sum, as one may on a machine that does other things too.

    It comes before the first array, which reads the flags; and always, since the cache knows programs by them.
    """
    patience = "xla_cpu_collective_call_terminate_timeout_seconds"
    if patience not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{patience}=86400".strip()


def _share_cores(batch: int, mesh: Mesh | None) -> None:
    """Make one device of each core, so that a batch is shared out as it is among chips.

    XLA gives one CPU device all cores, but runs small products and loops over tokens on one of them. No device is made where
    the user has set a number of them, or where JAX has already counted them.
    """
    if (
        "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
        or jax.config.values["jax_num_cpu_devices"] > 0
    ):
        return
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", _cpu_devices(batch, mesh))


def start(cache: str | None = None, *, batch: int | None = None, mesh: Mesh | None = None) -> None:
    """Prepare this process: one persistent compilation cache, in `$ZOO_CACHE` or ~/.cache/zoo; memory that is kept.

    A cache that cannot be written is done without; a damaged entry is compiled again. With a batch, on a CPU, its cores
    become devices for `mesh` to spread it over.
    """
    _keep_memory()
    _wait_for_late_devices()
    if batch is not None:
        _share_cores(batch, mesh)
    folder = Path(cache or files.cache()) / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        _log.warning(
            "compiled programs are not kept: %s cannot be written (%s); set ZOO_CACHE to another folder",
            folder,
            error.strerror,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def spread(params: Any, batch: int, boxed: Any = None) -> tuple[jax.sharding.Mesh, Any]:
    """A mesh of this host's devices that share a batch evenly, and `params` with a copy on each of them.

    With `boxed`, the abstract tree of `params` with logical axes, parameters of which a copy takes more than a part of a
    device's memory are cut along `fsdp` instead. UserError when they cannot be.
    """
    devices = jax.local_devices()
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    room = _memory(devices[0])
    if boxed is not None and room is not None and len(devices) > 1 and size > _COPY * room:
        mesh = Mesh(data=1, fsdp=-1).build(devices)
        return mesh, jax.device_put(params, shardings(boxed, mesh))
    count = math.gcd(batch, len(devices))
    if devices[0].platform == "cpu" and size > _LARGE_CPU:
        count = 1
    mesh = Mesh().build(devices[:count])
    return mesh, jax.device_put(params, NamedSharding(mesh, PartitionSpec()))


def _memory(device: jax.Device) -> int | None:
    """Bytes that programs may use on a device; None where it does not say."""
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit")


@contextlib.contextmanager
def use(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, rules: Rules | None = None) -> Iterator[None]:
    """Make `mesh` and `rules` those that `constrain` follows. An abstract mesh is enough to trace, not to run."""
    token = _rules.set({**RULES, **(rules or {})})
    here: Any = mesh  # its class decides what it has
    absent = isinstance(mesh, jax.sharding.AbstractMesh)
    kind = _platform.set(None if absent else here.devices.flat[0].platform)
    try:
        with jax.sharding.use_abstract_mesh(here) if absent else jax.set_mesh(here):
            yield
    finally:
        _platform.reset(kind)
        _rules.reset(token)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Trace programs that shall run on any platform: `platform` says "any", and nothing is made for one alone."""
    kind = _platform.set("any")
    try:
        yield
    finally:
        _platform.reset(kind)


def platform() -> str:
    """What the program being traced will run on, "cpu", "gpu", "tpu" or "any": that of the mesh in use, which need not be here."""
    return _platform.get() or jax.default_backend()


def _axes(name: str | None, mesh: Any) -> tuple[str, ...]:
    value = _rules.get().get(name) if name else None
    names = (value,) if isinstance(value, str) else tuple(value or ())
    return tuple(axis for axis in names if axis in mesh.shape)


def spec(shape: Sequence[int], *names: str | None) -> PartitionSpec | None:
    """Where an activation lies on the mesh in use, by the logical names of its leading axes; None where there is no mesh.

    An axis that its mesh axes do not divide (a remainder of a sampling batch, say) is left whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    parts = []
    for size, name in zip(shape, names, strict=False):
        axes = _axes(name, mesh)
        parts.append(axes if axes and size % math.prod(mesh.shape[a] for a in axes) == 0 else None)
    return PartitionSpec(*parts)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pin the leading axes of an activation to the mesh by logical name; nothing happens where there is no mesh."""
    where = spec(x.shape, *names)
    return x if where is None else jax.lax.with_sharding_constraint(x, where)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """A parameter with these logical axes, made whole where it is cut along axes that also share out the batch (fsdp).

    Left to itself, the compiler turns a product with a kernel that is cut along the axis it sums over, and the product
    that is its gradient, into loops that pass the pieces round and rewrite the whole result for each of them: more than
    twice the memory traffic of a step [compiled for 16 TPUs]. The gradient is summed whole and cut at once.
    """
    return _gather(x, names)


def _gather(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    shared = _axes("batch", mesh)
    kept = [tuple(a for a in _axes(name, mesh) if a not in shared) or None for name in names]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*kept))


def _gathered(x: jax.Array, names: tuple[str | None, ...]) -> tuple[jax.Array, None]:
    return _gather(x, names), None


def _cut(names: tuple[str | None, ...], _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (constrain(_gather(gradient, names), *names),)


gathered.defvjp(_gathered, _cut)


def gather_before_loop(tree: Any, boxed: Callable[[], Any]) -> Any:
    """A tree of parameters gathered over the axes that share out the batch, for a loop that would gather them every time.

    Args:
        boxed: makes a tree with logical axes, of which the shapes are asked for only; what is cut along other mesh axes (tensor) stays cut.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tree

    def gather(box: Any, x: jax.Array) -> jax.Array:
        return _gather(x, box.names if _is_box(box) else (None,) * x.ndim)

    tree = jax.tree.map(gather, jax.eval_shape(boxed), tree, is_leaf=_is_box)
    return jax.lax.optimization_barrier(tree)  # the compiler would put some of it back into the loop, to save memory


def batch_axes(size: int) -> tuple[str, ...] | None:
    """The axes of the mesh in use that share a batch of `size`; None where there is no mesh or they do not divide it."""
    where = spec((size,), "batch")
    axes = where[0] if where is not None else None
    return (axes,) if isinstance(axes, str) else axes


def batch_ways(mesh: Any = None) -> int:
    """Among how many devices a mesh (None: the one in use) shares out a batch."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return 1 if mesh.empty else math.prod(mesh.shape[a] for a in _axes("batch", mesh))


def ways(axes: Any) -> int:
    """Into how many parts one entry of a `spec` cuts its axis on the mesh in use."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in names)


def check_divides(size: int, name: str, what: str) -> None:
    """UserError unless the mesh axes of a logical axis divide `size`; `what` begins the sentence."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = () if mesh.empty else _axes(name, mesh)
    if size % ways(axes):
        raise UserError(_not_dividing(what, size, axes, ways(axes)))


def _not_dividing(what: str, size: int, axes: tuple[str, ...], parts: int) -> str:
    fits = [n for n in range(1, size + 1) if size % n == 0 and n <= parts]
    way = f", e.g. mesh.{axes[0]}={fits[-1]}" if len(axes) == 1 else ""
    return (
        f"{what} has size {size}, which mesh axes {axes} = {parts} do not divide; "
        f"choose a mesh that does{way}, or another size"
    )


def whole_bytes(leaf: Any) -> int:
    """Bytes of all of an abstract array."""
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.extended):  # a typed key
        leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def shard_bytes(leaf: Any) -> int:
    """Bytes of one device's part of an abstract array with a sharding; of all of it where it has none."""
    if leaf.sharding is None or jax.numpy.issubdtype(leaf.dtype, jax.dtypes.extended):  # keys are whole everywhere
        return whole_bytes(leaf)
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of an array that leads with the batch."""
    return NamedSharding(mesh, PartitionSpec(_axes("batch", mesh) or None))


def unbox(tree: Any) -> Any:
    """The plain arrays of a tree whose leaves carry logical axis names."""
    return nn.meta.unbox(tree)


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)


def shardings(boxed: Any, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> Any:
    """NamedShardings for an abstract tree with boxed leaves (a whole train state), structured as the unboxed tree.

    Raises UserError naming the parameter when an axis does not divide or is used twice.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        where = jax.tree_util.keystr(path)
        if not _is_box(leaf):
            if (
                getattr(leaf, "size", 0) * getattr(leaf, "dtype", np.dtype("f4")).itemsize > _LARGE
                and mesh.shape.get("fsdp", 1) > 1
            ):
                _log.warning("%s (%s) is whole on every device: it names no logical axes", where, leaf.shape)
            return NamedSharding(mesh, PartitionSpec())
        value, names = leaf.unbox(), leaf.names
        if not hasattr(value, "shape"):  # a box that an optimiser of other parameters has emptied
            return value
        spec: list[tuple[str, ...] | None] = []
        used: set[str] = set()
        for axis, (size, name) in enumerate(zip(value.shape, names, strict=True)):
            axes = _axes(name, mesh)
            if used & set(axes):
                raise UserError(
                    f"{where}: logical axes {names} use mesh axis {sorted(used & set(axes))[0]!r} twice; name one None"
                )
            used |= set(axes)
            parts = math.prod(mesh.shape[a] for a in axes)
            if size % parts:
                raise UserError(_not_dividing(f"{where}: axis {axis} ({name!r})", size, axes, parts))
            spec.append(axes if parts > 1 else None)
        if not any(spec) and value.size * value.dtype.itemsize > _LARGE and mesh.shape.get("fsdp", 1) > 1:
            _log.warning("%s %s is whole on every device: none of its axes %s is sharded", where, value.shape, names)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=_is_box)


def check_batch(batch: int, accumulate: int, mesh: jax.sharding.Mesh) -> None:
    """UserError unless every micro-batch divides over the devices that share the batch."""
    parts = batch_ways(mesh)
    if batch % (parts * accumulate):
        by = f"{parts} devices" + (f" x {accumulate} micro-batches" if accumulate > 1 else "")
        nearest = max(1, round(batch / (parts * accumulate))) * parts * accumulate
        raise UserError(
            f"batch={batch} does not divide over {by}; choose a multiple of {parts * accumulate}, e.g. batch={nearest}"
        )
