"""`zoo compile`: the real train step or sampler, compiled for chips that are not here; what it needs, and how fast it can be."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from zoo import dist, weights
from zoo.commands import chips, flops, hlo
from zoo.commands.chips import Chip
from zoo.errors import UserError
from zoo.files import first_line
from zoo.run import Run
from zoo.task import Samples, speed
from zoo.train import optim
from zoo.train.step import State, abstract_state, compile_step, make_sampler, sampler_spec

_log = logging.getLogger("zoo")
_TRIES = 3  # programs compiled in search of one that fits
_SPARE = 0.97  # of the memory that an estimate may fill to be worth a try


@dataclass(frozen=True)
class Target:
    """Chips to compile for."""

    name: str
    devices: Sequence[Any]
    chip: Chip

    @property
    def share(self) -> float:
        """Of a chip's figures, what belongs to one device: the two halves of some chips are devices of their own."""
        return chips.count_chips(self.devices) / len(self.devices)


def target(name: str, slices: int = 1) -> Target:
    """The devices of a topology such as `v5p:4x4x4`, on a machine that has none of them.

    Raises:
        UserError: no such topology, or the compiler for it is not installed.
    """
    prefix, _, shape = name.partition(":")
    found = chips.read_topology(name)
    if found is None:
        known, chip = [t for c in chips.CHIPS for t in c.topologies], chips.chip_of_topology(name)
        near = [t for t in known if chip and t.partition(":")[0] in chip.prefixes] or known
        raise UserError(f"--topology {name} is unknown; write a generation and its shape, such as {', '.join(near)}")
    chip, sizes = found
    if slices < 1:
        raise UserError(f"--slices {slices} leaves no chip; give 1 or more")
    if chip.kind.startswith("NVIDIA"):
        if slices > 1:
            raise UserError(f"--slices {slices}: GPUs of {name} are one machine; leave --slices out")
        return Target(name, _gpus(name, chip, sizes[0]), chip)
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if math.prod(sizes) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if prefix.lower() == "v4":
        options["chip_config_name"] = "megacore"  # as a TPU VM has it: one device per chip
    try:
        with _hushed():
            described = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{chip.prefixes[0]}:{shape}", **options
            )
    except Exception as error:
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                f"--topology {name} needs the TPU compiler (it runs on any Linux machine): "
                "install the `aot` extra, e.g. EXTRAS=dev,aot launch/local.sh zoo compile ..."
            ) from None
        raise UserError(
            f"--topology {name} does not exist ({first_line(error)}); known ones: {', '.join(chip.topologies)}"
        ) from None
    return Target(f"{slices} x {name}" if slices > 1 else name, described.devices, chip)


def _gpus(name: str, chip: Chip, count: int) -> Sequence[Any]:
    """GPUs of the Hopper generation of one machine, described to XLA's compiler by hand (an interface that may change)."""
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # there is no driver whose version could be asked
    try:
        with _hushed():
            return topologies.get_topology_desc(
                platform="cuda",
                topology_name=f"1x{count}x1",
                topology=f"1x{count}x1",
                target_config=_HOPPER.format(
                    memory=int(chip.memory or 0), bandwidth=int(chip.bandwidth or 0), name=chip.kind
                ),
            ).devices
    except Exception as error:
        if importlib.util.find_spec("jax_cuda12_plugin") is None:
            raise UserError(
                f"--topology {name} needs XLA's compiler for NVIDIA GPUs (it runs on any Linux machine): install the "
                "`aot-cuda` extra, e.g. EXTRAS=dev,aot-cuda launch/local.sh zoo compile ..."
            ) from None
        raise UserError(
            f"--topology {name} is not known to this version of jax ({first_line(error)}); use a TPU topology"
        ) from None


# What the compiler asks of a device: limits of compute capability 9.0 (CUDA programming guide) and the SXM cards' figures.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {memory}
  shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{name}"
"""


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Without what the TPU library writes to the screen when it is loaded on a machine that has no TPU."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


@dataclass(frozen=True)
class Compiled:
    """A program for a target, and what was read off it; `figures` is plain numbers and strings."""

    figures: dict[str, Any]
    fits: bool


def _gib(count: float) -> float:
    return count / 2**30


class _TooLarge(Exception):
    """The compiler found no room; `needs` is what it says the program takes, in bytes, where it says so."""

    def __init__(self, needs: float | None, words: str) -> None:
        super().__init__(words)
        self.needs = needs


def _compile(lowered: Any, chip: Chip | None = None) -> Any:
    # Without a GPU nothing can be tuned, and Triton refuses some shapes untuned: matrix products go to the library.
    options = {"xla_gpu_enable_triton_gemm": False} if chip is not None and chip.kind.startswith("NVIDIA") else None
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        words = str(error)
        if "RESOURCE_EXHAUSTED" not in words or not re.search(r"\bhbm\b", words, re.IGNORECASE):
            raise  # also a kernel that does not fit into a chip's on-chip memory: no mesh mends that
        amounts = [float(n) * 1024 ** " KMGT".index(unit) for n, unit in re.findall(r"([\d.]+)([KMGT])\b", words)]
        raise _TooLarge(max(amounts, default=None), words.partition("\n")[0]) from None


def compile_run(run: Run, to: Target, what: str = "train", samples: int | None = None) -> Compiled:
    """Compile a run's train step (`what="train"`) or its sampler (`"sample"`) for a target.

    Nothing is allocated and nothing runs. The roofline takes each of compute, memory and network at its full rate and
    all of them at once: hardly any program is faster, most are slower.

    Raises:
        UserError: a mesh or a batch that the target's devices do not divide into.
    """
    mesh = run.mesh.build(to.devices)
    optimizer = optim.build(run.optim, run.steps)
    key = jax.eval_shape(lambda: jax.random.key(0))
    begin = time.perf_counter()
    with dist.use(mesh, run.rules):
        abstract = abstract_state(run.task, optimizer, mesh, run.ema)
        if what == "train":
            dist.check_batch(run.batch, run.accumulate, mesh)
            _, program, _ = compile_step(run.task, optimizer, mesh, ema=run.ema, accumulate=run.accumulate)
            where = dist.batch_sharding(mesh)
            batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=where) for k, v in run.spec().items()}
            arguments: tuple[Any, ...] = (abstract, batch)
            state: Any = abstract
            items = run.batch
        else:
            if not isinstance(run.task, Samples):
                raise UserError(f"{type(run.task).__name__} has no sampler; use --what train")
            items = samples or run.samples.n or 64
            program = jax.jit(make_sampler(run.task, items, run.samples.options))
            whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            given = (key, sampler_spec(run.task, items))
            state = abstract.params
            arguments = (state, *jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), given))
        traced = program.trace(*arguments)
        operations = flops.count(traced.jaxpr)
        figures: dict[str, Any] = {
            "program": f"{what} step, batch {items}" if what == "train" else f"sampler, {items} samples",
            "topology": f"{to.name} ({len(to.devices)} devices, {to.chip.name})",
            "mesh": " x ".join(f"{k}={v}" for k, v in mesh.shape.items() if v > 1) or "1 device",
            "accumulate": run.accumulate,
            "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(abstract.params)),
        }
        memory = to.chip.memory * to.share if to.chip.memory else None
        figures |= _state_figures(state, mesh)
        try:
            compiled = _compile(traced.lower(), to.chip)
        except _TooLarge as error:
            if error.needs is not None:
                figures["needs GiB"] = _gib(error.needs)
            figures["memory GiB"] = _gib(memory or 0)
            figures["compiler"] = str(error)
            return Compiled(figures, False)
    figures["compile s"] = time.perf_counter() - begin
    text = hlo.Program(compiled.as_text())
    fits = _memory_figures(figures, compiled, state, memory)
    if what == "train":  # a sampler gives nothing back to write into
        figures["state arrays updated in place"] = f"{text.aliased} of {len(jax.tree.leaves(state))}"
    model = flops.training_example(run.task) * run.batch if what == "train" else operations
    floor = _least_sent(run, abstract, mesh) if what == "train" else None
    _speed_figures(figures, text, to, mesh, operations, model, floor)
    step = figures.get("step s, at least")
    if step:
        figures["examples/s, at most"] = items / step
    return Compiled(figures, fits)


def _state_figures(state: Any, mesh: Any) -> dict[str, Any]:
    leaves = jax.tree.leaves(state)
    total, here = sum(map(dist.whole_bytes, leaves)), sum(map(dist.shard_bytes, leaves))
    even = total / (mesh.shape["fsdp"] * mesh.shape["tensor"])
    return {
        "state GiB": _gib(total),
        "state GiB per device": _gib(here),
        "state / (total / (fsdp x tensor))": here / even,
    }


def _memory_figures(figures: dict[str, Any], compiled: Any, state: Any, memory: float | None) -> bool:
    """Adds what the compiled program takes; whether it fits."""
    needs = compiled.memory_analysis()
    if needs is None:
        figures["memory"] = "this compiler does not say"
        return True
    here = sum(dist.shard_bytes(x) for x in jax.tree.leaves(state))
    peak = needs.peak_memory_in_bytes or needs.argument_size_in_bytes + needs.temp_size_in_bytes
    figures["arguments GiB per device"] = _gib(needs.argument_size_in_bytes)
    figures["arguments / (total / (fsdp x tensor))"] = (
        figures["state / (total / (fsdp x tensor))"] * needs.argument_size_in_bytes / here
    )
    figures["temporaries GiB, at the peak"] = _gib(max(0, peak - needs.argument_size_in_bytes))
    figures["peak GiB"] = _gib(peak)
    if memory is None:
        return True
    figures["memory GiB"] = _gib(memory)
    figures["peak / memory"] = peak / memory
    return bool(peak <= memory)


def _speed_figures(
    figures: dict[str, Any],
    program: hlo.Program,
    to: Target,
    mesh: Any,
    operations: float,
    model: float,
    floor: dict[str, float] | None,
) -> None:
    """Adds what the program computes, moves and sends, and the least time that takes."""
    chip, count = to.chip, len(to.devices)
    kinds: Counter[str] = Counter()
    for one in program.collectives():
        kinds[one.kind] += one.total  # type: ignore[assignment]
    far = float(kinds[hlo.BETWEEN])
    sent = float(sum(kinds.values()))
    figures["model TFLOP"] = model / 1e12
    figures["program TFLOP"] = operations / 1e12
    figures["moved GiB per device"] = _gib(program.moved())
    figures["sent GiB per device"] = _gib(sent)
    figures["sent, by kind"] = {k: _gib(v) for k, v in sorted(kinds.items())}
    if floor is not None:
        figures["sent, least possible"] = {k: _gib(v) for k, v in floor.items() if v}
        if sum(floor.values()):
            figures["sent / least possible"] = sent / sum(floor.values())
    times: dict[str, float] = {}
    if chip.peak:
        times["compute"] = operations / (count * chip.peak * to.share)
    if chip.bandwidth:
        times["memory"] = program.moved() / (chip.bandwidth * to.share)
    if chip.interconnect:
        times["interconnect"] = (sent - far) / (chip.interconnect * to.share)
    if chip.network and far:
        times["network between slices"] = far / (chip.network * to.share)
    if not times:
        return
    bound = max(times, key=lambda k: times[k])
    figures["times s"] = times
    figures["bound"] = bound
    figures["step s, at least"] = times[bound]
    if chip.peak:
        figures["utilisation, at most"] = model / (times[bound] * count * chip.peak * to.share)


def _least_sent(run: Run, abstract: State, mesh: Any) -> dict[str, float]:
    """Bytes that each device must send in a step with these mesh axes, whatever the compiler does.

    fsdp: every sharded parameter is gathered once in the dtype of the products, and once more where the backward pass
    recomputes (`task.remat`), and its gradient summed and scattered, for every micro-batch. data: the gradients of a
    device's shards are summed once.
    tensor: the output of each kernel that is cut along what it sums over, and the input gradient of each that is cut
    along its output, is summed. A sequence axis is not counted: that depends on the attention.
    """
    fast = speed(run.task)
    item = jnp.dtype(fast.get("dtype", "float32")).itemsize
    data, fsdp, tensor = (mesh.shape[a] for a in ("data", "fsdp", "tensor"))
    tokens = run.task.about.tokens / mesh.shape["sequence"]
    rows = run.batch / run.accumulate / (data * fsdp)
    passes = 2 if fast.get("remat", "none") == "none" else 3
    found = {"fsdp": 0.0, "data": 0.0, "tensor": 0.0}
    trained = {k: v for k, v in abstract.params.items() if k not in run.task.about.held}
    for name, leaf in weights.flatten(trained).items():
        parts = [{p} if isinstance(p, str) else set(p or ()) for p in leaf.sharding.spec]
        size, cut = math.prod(leaf.shape), set().union(*parts)
        here = size / (tensor if "tensor" in cut else 1)
        kernel = name.endswith("kernel")
        each = item if kernel else 4  # bytes: products are in the network's dtype, and so are their gradients
        if "fsdp" in cut:
            found["fsdp"] += passes * here * item * (fsdp - 1) / fsdp * run.accumulate
        elif fsdp > 1:
            found["fsdp"] += 2 * here * each * (fsdp - 1) / fsdp
        if data > 1:
            found["data"] += 2 * here / (fsdp if "fsdp" in cut else 1) * each * (data - 1) / data
        if kernel and "tensor" in cut:
            stacked = "/block/" in name  # layers of a trunk
            shape, parts = (leaf.shape[1:], parts[1:]) if stacked else (leaf.shape, parts)
            width = max((n for n, part in zip(shape, parts) if "tensor" not in part), default=0)
            sums = (leaf.shape[0] if stacked else 1) * run.accumulate
            found["tensor"] += 2 * rows * tokens * width * item * (tensor - 1) / tensor * sums
    return found


def nearest_fit(run: Run, to: Target, failed: Compiled, what: str, samples: int | None) -> str:
    """What to change, as `field=value`, so that the program fits; compiled, not only estimated. A sentence.

    In this order: more of the state shared out (which changes no number), fewer rows at a time, more recomputed, and pairs.
    """
    memory = (to.chip.memory or 0) * to.share
    sizes = run.mesh.sizes(len(to.devices))
    slices = len({getattr(d, "slice_index", 0) for d in to.devices})
    state = failed.figures["state GiB"] * 2**30
    needs = (failed.figures.get("needs GiB") or failed.figures.get("peak GiB") or 2 * _gib(memory)) * 2**30
    shards = sizes["fsdp"] * sizes["tensor"]
    work = max(needs - state / shards, needs / 2)  # what is not state shrinks with the rows at a time
    ways = sizes["data"] * sizes["fsdp"]

    def meshes() -> Iterator[tuple[list[str], Run, float]]:
        yield [], run, shards
        data = sizes["data"]
        while data % 2 == 0 and data > slices:
            data //= 2
            mesh = dataclasses.replace(run.mesh, data=data, fsdp=ways // data)
            fields = [f"mesh.data={data}", f"mesh.fsdp={ways // data}"]
            yield fields, dataclasses.replace(run, mesh=mesh), ways // data * sizes["tensor"]

    def fewer_rows(one: Run) -> Iterator[tuple[list[str], Run, int]]:
        yield [], one, 1
        k = 2
        n = samples or run.samples.n or 64
        if what == "train":
            while run.batch % (ways * run.accumulate * k) == 0:
                yield [f"accumulate={run.accumulate * k}"], dataclasses.replace(one, accumulate=run.accumulate * k), k
                k *= 2
        else:
            while n % k == 0:
                fewer = dataclasses.replace(one.samples, n=n // k)
                yield [f"--samples {n // k}"], dataclasses.replace(one, samples=fewer), k
                k *= 2

    choices: list[tuple[tuple[int, int, bool, bool], list[str], Run]] = []
    for m, (mesh_fields, meshed, cut) in enumerate(meshes()):
        for r, (row_fields, one, k) in enumerate(fewer_rows(meshed)):
            for saved in (False, True):
                if saved and (what != "train" or speed(run.task).get("remat") not in ("none", "dots")):
                    continue
                fields = [*mesh_fields, *row_fields, *(["task.remat=full"] if saved else [])]
                gradients = state / 3 / cut if k > 1 and what == "train" else 0
                estimate = work / k / (3 if saved else 1) + state / cut + gradients
                if fields and estimate <= _SPARE * memory:
                    full = dataclasses.replace(one, task=dataclasses.replace(one.task, remat="full")) if saved else one
                    changes = bool(mesh_fields) + bool(row_fields) + saved
                    choices.append(((changes, m + r + saved, saved, bool(row_fields)), fields, full))
    tried: list[str] = []
    for _, fields, one in sorted(choices, key=lambda c: c[0]):
        if len(tried) == _TRIES:
            break
        try:
            _log.info("trying %s ...", " ".join(fields))
            found = compile_run(one, to, what, one.samples.n if what == "sample" else None)
        except UserError:  # a mesh that does not divide some parameter
            continue
        if found.fits:
            return f"it fits with {' '.join(fields)} (peak {found.figures['peak GiB']:.2f} of {_gib(memory):.2f} GiB)"
        tried.append(" ".join(fields))
    return (
        f"nothing near it fits ({'tried ' + ', '.join(tried) if tried else 'by estimate'}); take more chips, a chip with "
        "more memory, or a smaller batch or model"
    )
