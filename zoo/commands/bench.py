"""`zoo bench`: the train step and the sampler of a config, timed in turn with a peer where one is given."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from zoo import dist, weights
from zoo.commands.chips import chip_of, count_chips
from zoo.data.pipeline import batches
from zoo.data.synthetic import Synthetic
from zoo.errors import UserError
from zoo.run import Run
from zoo.train import optim
from zoo.train.step import compile_step

_ROUND = 0.5  # seconds that one timed round of one side takes at least
_STEADY = 1.5  # slowest round over fastest from which a measurement counts for nothing


@dataclass(frozen=True)
class Result:
    """What was measured, as a dict of plain numbers."""

    figures: dict[str, Any]

    def table(self) -> str:
        """Aligned lines, one per figure."""
        width = max(map(len, self.figures))
        return "\n".join(f"{k:<{width}}  {_text(v)}" for k, v in self.figures.items())


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{k} {_text(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def load_peer(path: str, task: Any) -> Any:
    """`build(task)` of a Python file, run; UserError when the file, the function or a package it needs is missing."""
    if not Path(path).is_file():
        raise UserError(f"--peer {path}: no such file; give a Python file with a function build(task)")
    spec = importlib.util.spec_from_file_location("zoo_bench_peer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        extra = "; install it with the `torch` extra: pip install -e '.[torch]'" if error.name == "torch" else ""
        raise UserError(f"--peer {path} needs the package {error.name!r}, which is not installed{extra}") from None
    if not hasattr(module, "build"):
        raise UserError(f"--peer {path} defines no function build(task)")
    return module.build(task)


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    """Without the persistent compilation cache: what is timed shall be a compilation, not the reading of a file."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # jax asks for the setting once and remembers
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _rounds(sides: dict[str, Callable[[int], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call, round by round; the sides take turns so that a drifting machine hits both."""
    counts = {}
    for name, call in sides.items():
        call(1)  # compiles, or warms up
        begin = time.perf_counter()
        call(1)
        counts[name] = max(1, round(_ROUND / max(time.perf_counter() - begin, 1e-6)))
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            begin = time.perf_counter()
            call(counts[name])
            found[name].append((time.perf_counter() - begin) / counts[name])
    return found


def _compare(figures: dict[str, Any], what: str, found: dict[str, list[float]], items: int) -> None:
    for name, seconds in found.items():
        figures[f"{what} ms, {name}"] = _spread([1e3 * s for s in seconds])
        figures[f"{what} examples/s, {name}"] = items / statistics.median(seconds)
        if max(seconds) > _STEADY * min(seconds):
            # A busy machine slows the two sides unequally (threads that spin at a barrier suffer most).
            figures[f"{what} unsteady, {name}"] = (
                f"rounds differ by a factor of {max(seconds) / min(seconds):.1f}; "
                "the machine is busy: repeat on an idle one, do not quote"
            )
    if len(found) == 2:
        ours, peer = found.values()
        figures[f"{what}, ours / peer"] = _spread([a / b for a, b in zip(ours, peer)])


def bench(run: Run, *, peer: str | None = None, what: str = "both", samples: int = 16, rounds: int = 5) -> Result:
    """Time a run's train step and its sampler on synthetic data; no data set is needed.

    Args:
        peer: a Python file whose `build(task)` gives an object with load, train_step, loss and sample. It gets our
            weights first, and a loss that differs ends the comparison: a twin that computes something else is none.

    Raises:
        UserError: no peer there, a peer that differs, no round or sample to time, or a task without a sampler.
    """
    for name, value in (("--rounds", rounds), ("--samples", samples)):
        if value < 1:
            raise UserError(f"{name} {value} leaves nothing to time; give 1 or more")
    if what in ("sample", "both") and not hasattr(run.task, "sample"):
        raise UserError(f"{type(run.task).__name__} has no sampler; use --what train")
    task, mesh = run.task, run.mesh.build()
    twin = load_peer(peer, task) if peer else None
    device = jax.devices()[0]
    figures: dict[str, Any] = {
        "device": f"{device.device_kind} x {mesh.size}",
        "jax": jax.__version__,
        "cores": os.cpu_count(),
        "batch": run.batch,
    }
    torch = sys.modules.get("torch")  # there only if the peer brought it
    if twin is not None and torch is not None:
        figures["torch"] = str(torch.__version__)
        figures["threads, peer"] = torch.get_num_threads()
    with dist.use(mesh, run.rules):
        dist.check_batch(run.batch, run.accumulate, mesh)
        init, step, abstract = compile_step(
            task, optim.build(run.optim, run.steps), mesh, ema=run.ema, accumulate=run.accumulate
        )
        state = init(0)
        figures["parameters"] = sum(int(x.size) for x in jax.tree.leaves(state.params))
        values = getattr(task, "classes", 0) or 2
        with contextlib.closing(batches(Synthetic(values=values), run.batch, spec=run.spec())) as feed:
            host = next(feed)
        placed = jax.device_put(host, dist.batch_sharding(mesh))
        if twin is not None:
            figures["largest difference to the peer"] = _parity(task, state.params, twin, host)
        if what in ("train", "both"):
            begin = time.perf_counter()
            with _no_cache():
                program = step.lower(abstract, placed).compile()
            figures["train compile s"] = time.perf_counter() - begin
            begin = time.perf_counter()
            state, _ = jax.block_until_ready(program(state, placed))
            figures["train first step ms"] = 1e3 * (time.perf_counter() - begin)
            memory = program.memory_analysis()
            if memory is not None:
                figures["train program MiB"] = {
                    "arguments": memory.argument_size_in_bytes / 2**20,
                    "temporaries": memory.temp_size_in_bytes / 2**20,
                }

            def ours(count: int) -> None:
                nonlocal state
                for _ in range(count):
                    state, _ = program(state, placed)
                jax.block_until_ready(state)

            sides: dict[str, Callable[[int], None]] = {"ours": ours}
            if twin is not None:
                batch = twin.place(host)

                def theirs(count: int) -> None:
                    for k in range(count):
                        twin.train_step(batch, sync=k == count - 1)

                sides["peer"] = theirs
            found = _rounds(sides, rounds)
            _compare(figures, "train", found, run.batch)
            if hasattr(task, "flops"):
                rate = task.flops() * run.batch / statistics.median(found["ours"])
                figures["train model TFLOP/s"] = rate / 1e12
                chip = chip_of(device.device_kind)
                if chip is not None and chip.peak:
                    figures["train utilisation of bf16 peak"] = rate / (chip.peak * count_chips(mesh.devices.flat))
        if what in ("sample", "both"):
            label = jnp.arange(samples) % task.classes if getattr(task, "classes", 0) else None
            # The peer inverts and no more, so neither do we.
            options = {"denoise": 0.0} if "denoise" in inspect.signature(task.sample).parameters else {}
            draw = jax.jit(
                lambda p, key: task.sample(p, key, samples, None if label is None else {"label": label}, **options)
            )
            params = state.params

            def our_samples(count: int) -> None:
                for k in range(count):
                    jax.block_until_ready(draw(params, jax.random.key(k)))

            sides = {"ours": our_samples}
            if twin is not None:

                def their_samples(count: int) -> None:
                    for _ in range(count):
                        twin.sample(samples)

                sides["peer"] = their_samples
            _compare(figures, f"sample {samples}", _rounds(sides, rounds), samples)
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        figures["peak device memory MiB"] = stats["peak_bytes_in_use"] / 2**20
    peak_memory = (
        twin.peak_memory() if twin is not None and hasattr(twin, "peak_memory") else None
    )  # once: asking may reset it
    if peak_memory is not None:
        figures["peak device memory MiB, peer"] = peak_memory / 2**20
    return Result(figures)


def _parity(task: Any, params: Any, twin: Any, host: dict[str, np.ndarray]) -> dict[str, float]:
    """Largest differences between ours and a peer with our weights: the loss of one batch without noise, and, where both
    sides have an `inverse`, the image of one z. UserError when one is too large: then the times compare nothing.
    """
    # Fresh output kernels are zero, which would hide any difference: move every weight a little first.
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    moved = jax.tree.map(
        lambda x: x + 0.16 / max(*x.shape, 1) ** 0.5 * jax.random.normal(next(keys), x.shape, x.dtype), params
    )
    moved = {**moved, **{k: params[k] for k in task.held}}
    twin.load(weights.to_official(task, jax.device_get(moved)))
    half = getattr(task, "dtype", "float32") != "float32"
    still = {"noise": 0.0, "noise_type": "gaussian", "drop": 0.0}
    clean = dataclasses.replace(task, **{k: v for k, v in still.items() if hasattr(task, k)})
    found = {}
    with jax.default_matmul_precision("default" if half else "float32"):
        ours = float(jax.jit(lambda p, b: clean.loss(p, b, jax.random.key(0))[0])(moved, host))
        found["loss"] = abs(ours - float(twin.loss(host)))
        paper = sys.modules[type(task).__module__]
        if hasattr(paper, "inverse") and hasattr(paper, "forward") and hasattr(twin, "inverse"):
            image, label = host["image"][:2], host["label"][:2] if "label" in host else None
            shape = jax.eval_shape(lambda p: paper.forward(task, p, image, label)[0], moved).shape
            z = jax.random.normal(jax.random.key(2), shape)
            inverse = jax.jit(lambda p, z: paper.inverse(task, p, z, label))
            difference = np.asarray(inverse(moved, z)) - twin.inverse(np.array(z), label)
            found["inverse"] = float(np.abs(difference).max())
    limit = 5e-2 if half else 1e-3
    for name, difference in found.items():
        if not difference <= limit:
            raise UserError(
                f"the peer's {name} differs from ours by {difference:.3g} on the same weights and inputs, more than "
                f"{limit:g}: it is no twin, and comparing times would mean nothing; mend the peer first"
            )
    return found
