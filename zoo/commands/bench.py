"""`zoo bench`: the train step, the sampler and the data of a config, timed, beside a peer or another config where one is given."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

import zoo
from zoo import config, dist, models, weights
from zoo.commands import flops
from zoo.commands.chips import chip_of, count_chips
from zoo.commands.peer import load_peer, parity
from zoo.data.pipeline import batches
from zoo.data.synthetic import Synthetic
from zoo.errors import UserError
from zoo.files import differences
from zoo.flows.inverse import Jacobi
from zoo.run import Run
from zoo.task import Cached, Crops, Samples, has_methods, option_names, speed
from zoo.train import optim
from zoo.train.step import compile_step, make_sampler, sampler_spec

WHAT = {"both": ("train", "sample"), "all": ("train", "sample", "data")}  # names of several parts at once
PARTS = ("train", "sample", "data")
_ROUND = 0.5  # seconds that one timed round of one side takes at least
_STEADY = 1.5  # slowest round over fastest from which a measurement counts for nothing
_STEPS = 100  # steps timed one by one at most
_OTHERS = ("peer", "against")  # sides that are not ours
_AHEAD = 6  # batches that the pipeline may hold ready when nobody has taken one for a while

Figures = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What was measured, as a dict of plain numbers."""

    figures: Figures

    def table(self) -> str:
        """Aligned lines, one per figure."""
        width = max(map(len, self.figures))
        return "\n".join(f"{k:<{width}}  {_text(v)}" for k, v in self.figures.items())


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{k} {_text(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def bench(
    run: Run,
    *,
    peer: str | None = None,
    against: Run | None = None,
    what: str = "both",
    samples: int | Sequence[int] = 16,
    rounds: int = 5,
    model: str | None = None,
    methods: Sequence[str] = (),
    about: Mapping[str, Any] | None = None,
) -> Result:
    """Time the parts of a run. The step and the sampler get synthetic data; only the part `data` opens the run's own.

    Args:
        peer: a Python file whose `build(task)` gives an object with load, train_step, loss and sample. It gets our
            weights first, and a loss that differs ends the comparison: a twin that computes something else is none.
        against: another run, whose step and sampler take turns with ours: the side `against`. Its batch, its way of
            accumulation and its mesh are ours, so that examples are compared with as many.
        what: train, sample, data, both (train and sample) or all.
        samples: batch sizes of the sampler, which is timed with 1 as well.
        model: a run, an export or a shipped name whose weights the sampler gets. A flow is then inverted by every method,
            in turn; with fresh weights sweeps converge at once.
        methods: further ones, such as "modules=0,1,1,8 tol=1e-3": fields of `zoo.flows.inverse.Jacobi`.
        about: what the command was, kept among the figures.

    Raises:
        UserError: no peer there, a peer that differs, another run whose examples are of another kind, no round or sample to
            time, a task without a sampler, a model that is not of this task, a method that is none, or data that cannot be
            read where nothing else was asked for.
    """
    sizes = (samples,) if isinstance(samples, int) else tuple(samples)
    for name, value in (("--rounds", rounds), *(("--samples", n) for n in sizes)):
        if value < 1:
            raise UserError(f"{name} {value} leaves nothing to time; give 1 or more")
    parts = WHAT.get(what, (what,))
    for one, flag in ((run, ""), (against, "--against: ")):
        if one is not None and "sample" in parts and not isinstance(one.task, Samples):
            raise UserError(f"{flag}{type(one.task).__name__} has no sampler; use --what train")
    if against is not None and _unit(run.task) != _unit(against.task):
        (ours, mine), (theirs, other) = ((type(t).__name__, t.about.unit) for t in (run.task, against.task))
        raise UserError(
            f"--against: {theirs} models {other} and {ours} {mine}, so that times of one say nothing of the other; give "
            f"another config of {mine}"
        )
    for flag, other in (("--peer", peer), ("--against", against)):
        if parts == ("data",) and other:
            raise UserError(f"{flag} has no part in --what data; leave it out")
    for flag, given in (("--model", model), ("--method", methods)):
        if given and "sample" not in parts:
            raise UserError(f"{flag} has no part in --what {what}, which draws no samples; leave it out")
    opened = open_weights(run.task, model) if model else None
    sides = inverses(run.task, opened, methods)
    mesh = run.mesh.build()
    twin = load_peer(peer, run.task) if peer else None
    figures = {**(about or {}), **environment(run, mesh), "rounds": rounds}
    torch = sys.modules.get("torch")  # there only if the peer brought it
    if twin is not None and torch is not None:
        figures |= {"torch": str(torch.__version__), "threads, peer": torch.get_num_threads()}
    with dist.use(mesh, run.rules):
        dist.check_batch(run.batch, run.accumulate, mesh)
        step = None
        if "train" in parts or "sample" in parts:
            init, jitted, abstract = compile_step(
                run.task, optim.build(run.optim, run.steps), mesh, ema=run.ema, accumulate=run.accumulate
            )
            state = init(0)
            rival = None if against is None else _rival(against, run, mesh)
            figures["parameters"] = sum(int(x.size) for x in jax.tree.leaves(state.params))
            if rival is not None:
                leaves = jax.tree.leaves(rival.state.params)
                figures |= {"task, against": type(rival.run.task).__name__}
                figures |= {"parameters, against": sum(int(x.size) for x in leaves)}
            host = _example_batch(run)
            if twin is not None:
                figures["largest difference to the peer"] = parity(run.task, state.params, twin, host)
            if "train" in parts:
                placed = jax.device_put(host, dist.batch_sharding(mesh))
                program, compiled = compile_twice(jitted, abstract, placed)
                step = _Stepper(program, state, placed)
                figures |= compiled | time_step(run, mesh, step, twin, host, rounds, rival)
                if isinstance(run.task, Crops):
                    figures |= time_crops(run, step, rounds)
                state = step.state
            if "sample" in parts:
                params = state.params
                if opened is not None:
                    params = opened.params
                    at = "" if opened.step is None else f", step {opened.step}"
                    figures["sampler weights"] = f"{model}, {opened.kind}{at}"
                    if twin is not None:
                        twin.load(weights.to_official(run.task, params))
                elif has_methods(run.task):
                    figures["sampler weights"] = (
                        "fresh: sweeps converge at once on them, and are timed with --model only"
                    )
                for n in sorted({1, *sizes}):  # one alone: how long a user waits
                    figures |= time_sampler(run, params, twin, n, rounds, sides, rival)
        if "data" in parts:
            try:
                figures |= time_data(run, mesh, rounds, step)
            except UserError as error:
                if parts == ("data",):
                    raise
                figures["data"] = f"not measured: {error}"
    return Result(figures | peak_memory(step, twin))


# --- where it runs --------------------------------------------------------------------------------


def environment(run: Run, mesh: jax.sharding.Mesh) -> Figures:
    """What decides whether two results can be compared: the machine, the versions, and how the run is spread."""
    device = jax.devices()[0]
    chip = chip_of(device.device_kind)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": f"{device.device_kind} x {mesh.size}",
        **({"chips": f"{chip.name} x {count_chips(mesh.devices.flat)}"} if chip is not None else {}),
        "processes": jax.process_count(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "zoo": zoo.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
        "batch": run.batch,
        "accumulate": run.accumulate,
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        **speed(run.task),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory(step: _Stepper | None, twin: Any) -> Figures:
    """Peaks in MiB: of the devices where they count, else what the compiler plans; of this process; of the peer."""
    figures: Figures = {}
    counted = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()]
    most = max((n for n in counted if n is not None), default=None)
    if most is not None:
        figures["peak device memory MiB"] = most / 2**20
    elif step is not None and (planned := _planned(step.program)) is not None:
        figures["peak device memory MiB, planned by the compiler"] = planned
    with contextlib.suppress(ImportError):
        import resource  # not on Windows

        unit = 1 if sys.platform == "darwin" else 2**10
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        figures[f"peak host memory MiB{', with the peer' if twin is not None else ''}"] = most / 2**20
    asked = twin.peak_memory() if twin is not None and hasattr(twin, "peak_memory") else None  # once: it may reset it
    if asked is not None:
        figures["peak device memory MiB, peer"] = asked / 2**20
    return figures


def _program(program: Any, name: str) -> Figures:
    """What a compiled program takes in and works with, on each device; nothing where the compiler does not say."""
    memory = program.memory_analysis()
    if memory is None:
        return {}
    sizes = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}
    return {name: {k: size / 2**20 for k, size in sizes.items()}}


def _planned(program: Any) -> float | None:
    memory = program.memory_analysis()
    if memory is None:
        return None
    # what is given up (the state) is counted among the arguments and the outputs
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (kept + memory.temp_size_in_bytes) / 2**20


# --- clocks ---------------------------------------------------------------------------------------


def _unit(task: Any) -> str:
    """What the examples of a task are called in rates."""
    return str(task.about.unit)


def _spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _seconds(call: Callable[[int], None], count: int) -> float:
    """Seconds per repetition of a call that repeats by itself."""
    begin = time.perf_counter()
    call(count)
    return (time.perf_counter() - begin) / count


def _rounds(sides: dict[str, Callable[[int], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call, round by round; the sides take turns so that a drifting machine hits both."""
    counts = {}
    for name, call in sides.items():
        call(1)  # compiles, or warms up
        counts[name] = max(1, round(_ROUND / max(_seconds(call, 1), 1e-6)))
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            found[name].append(_seconds(call, counts[name]))
    return found


def _compare(figures: Figures, what: str, found: dict[str, list[float]], items: int, unit: str = "examples") -> None:
    for name, seconds in found.items():
        figures[f"{what} ms, {name}"] = _spread([1e3 * s for s in seconds])
        figures[f"{what} {unit}/s, {name}"] = items / statistics.median(seconds)
        if max(seconds) > _STEADY * min(seconds):
            # A busy machine slows the two sides unequally (threads that spin at a barrier suffer most).
            figures[f"{what} unsteady, {name}"] = (
                f"rounds differ by a factor of {max(seconds) / min(seconds):.1f}; "
                "the machine is busy: repeat on an idle one, do not quote"
            )
    for name, seconds in found.items():
        for other in ("ours", *_OTHERS):
            if other in found and name not in (other, *_OTHERS):
                figures[f"{what}, {name} / {other}"] = _spread([a / b for a, b in zip(seconds, found[other])])


# --- the train step -------------------------------------------------------------------------------


def _example_batch(run: Run) -> dict[str, np.ndarray]:
    values = run.task.about.classes or 2
    with contextlib.closing(batches(Synthetic(values=values), run.batch, spec=run.spec())) as feed:
        return next(feed)


class _Stepper:
    """A compiled step with the state that it gives up and gets back, and the batch that it repeats."""

    def __init__(self, program: Any, state: Any, placed: Any) -> None:
        self.program, self.state, self.placed = program, state, placed
        self.median: float | None = None  # seconds

    def __call__(self, count: int) -> None:
        for _ in range(count):
            self.state, _ = self.program(self.state, self.placed)
        jax.block_until_ready(self.state)

    def fed(self, feed: Iterator[Any], count: int) -> None:
        """`count` steps on what the pipeline gives, as while training."""
        for _ in range(count):
            self.state, _ = self.program(self.state, next(feed))
        jax.block_until_ready(self.state)


@contextlib.contextmanager
def _new_cache() -> Iterator[None]:
    """With a persistent compilation cache of its own, empty at first, that keeps every program."""
    with tempfile.TemporaryDirectory(prefix="zoo-bench-", ignore_cleanup_errors=True) as folder:
        wanted = {
            "jax_compilation_cache_dir": folder,
            "jax_enable_compilation_cache": True,
            "jax_persistent_cache_min_compile_time_secs": 0.0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
        before = {name: jax.config.values[name] for name in wanted}
        try:
            for name, value in wanted.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()  # jax asks for the settings once and remembers
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()


def compile_twice(step: Any, *arguments: Any) -> tuple[Any, Figures]:
    """(program, seconds to trace and compile it): with an empty cache, as on a new machine, and with a filled one."""

    def once() -> tuple[Any, float, float]:
        jax.clear_caches()  # those in memory
        begin = time.perf_counter()
        lowered = step.lower(*arguments)
        traced = time.perf_counter()
        program = lowered.compile()
        return program, time.perf_counter() - begin, traced - begin

    read: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            read.append(event)

    with _new_cache():
        program, cold, traced = once()
        jax.monitoring.register_event_listener(listen)
        try:
            _, warm, _ = once()
        finally:
            jax.monitoring.unregister_event_listener(listen)
    return program, {
        "train trace s": traced,
        "train compile s": cold,
        "train compile s, warm": warm if read else "not measured: this backend's programs are not kept",
    }


@dataclass(frozen=True)
class _Rival:
    """Another run, with fresh weights and its step as written for our mesh."""

    run: Run
    mesh: jax.sharding.Mesh
    jitted: Any
    abstract: Any
    state: Any

    def stepper(self) -> _Stepper:
        """Its compiled step, which gives up a state of its own."""
        placed = jax.device_put(_example_batch(self.run), dist.batch_sharding(self.mesh))
        with dist.use(self.mesh, self.run.rules):
            program = self.jitted.lower(self.abstract, placed).compile()
        return _Stepper(program, jax.tree.map(jax.numpy.copy, self.state), placed)


def _rival(against: Run, run: Run, mesh: jax.sharding.Mesh) -> _Rival:
    """Another run with the batch of ours."""
    other = dataclasses.replace(against, batch=run.batch, accumulate=run.accumulate)
    with dist.use(mesh, other.rules):
        init, jitted, abstract = compile_step(
            other.task, optim.build(other.optim, other.steps), mesh, ema=other.ema, accumulate=other.accumulate
        )
        return _Rival(other, mesh, jitted, abstract, init(0))


def time_step(
    run: Run,
    mesh: jax.sharding.Mesh,
    step: _Stepper,
    twin: Any,
    host: Any,
    rounds: int,
    rival: _Rival | None = None,
) -> Figures:
    """Throughput in rounds, beside the peer and the other run; then steps one by one; what share of the chips' peak that is."""
    figures: Figures = {"train first step ms": 1e3 * _seconds(step, 1)}
    figures |= _program(step.program, "train program MiB")
    sides: dict[str, Callable[[int], None]] = {"ours": step}
    if twin is not None:
        batch = twin.place(host)

        def theirs(count: int) -> None:
            for k in range(count):
                twin.train_step(batch, sync=k == count - 1)

        sides["peer"] = theirs
    if rival is not None:
        sides["against"] = rival.stepper()
    found = _rounds(sides, rounds)
    _compare(figures, "train", found, run.batch, _unit(run.task))
    step.median = statistics.median(found["ours"])
    # The rounds leave the queue of steps full; here every step is waited for, as long as the rounds took.
    count = max(rounds, min(_STEPS, round(rounds * _ROUND / step.median)))
    each = [1e3 * _seconds(step, 1) for _ in range(count)]
    p10, p50, p90 = (float(p) for p in np.percentile(each, (10, 50, 90)))
    figures["train each step ms"] = {"p10": p10, "p50": p50, "p90": p90, "max": max(each), "steps": count}
    rate = flops.training_example(run.task) * run.batch / step.median
    figures["train model TFLOP/s"] = rate / 1e12
    chip = chip_of(jax.devices()[0].device_kind)
    if chip is not None and chip.peak is not None:
        figures["train utilisation of bf16 peak"] = rate / (chip.peak * count_chips(mesh.devices.flat))
    return figures


def time_crops(run: Run, step: _Stepper, rounds: int) -> Figures:
    """What a step cuts out of its batch before its network, alone (`task.crops`), and how many times faster than the step."""
    crops = jax.jit(run.task.crops).lower(step.placed, jax.random.key(0)).compile()

    def cut(count: int) -> None:
        for k in range(count):
            jax.block_until_ready(crops(step.placed, jax.random.key(k)))

    figures: Figures = {}
    unit = _unit(run.task)
    found = _rounds({"ours": cut}, rounds)
    _compare(figures, "sampler and crops", found, run.batch, unit)
    assert step.median is not None
    figures[f"sampler and crops / train {unit}/s"] = step.median / statistics.median(found["ours"])
    return figures


# --- the sampler ----------------------------------------------------------------------------------


def open_weights(task: Any, name: str) -> models.Model:
    """The model behind `--model`, with parameters in the layout of `task`, in the host's memory.

    UserError where the task is no flow, and where the model's task differs in more than what makes it fast.
    """
    if not has_methods(task):
        raise UserError(
            f"--model times the methods that invert a flow, and {type(task).__name__} is none; leave it out: its "
            "sampler takes as long with fresh weights"
        )
    model = models.open_model(name, on_host=True)
    found = differences(config.dump(task, "task"), config.dump(model.task, "task"), "task")
    found = [text for text in found if text.partition(":")[0].rpartition(".")[2] not in speed(task)]
    if found:
        raise UserError(
            f"--model {name} is another model than the config's ({found[0]}); override the fields of the config, or open "
            "a model that was made with it"
        )
    params = weights.matching(model.params, weights.abstract(task))  # its layers may be stacked and ours unrolled
    return dataclasses.replace(model, task=task, params=params)


def inverses(task: Any, model: models.Model | None, methods: Sequence[str] = ()) -> dict[str, Any]:
    """The sides that the sampler is timed with, by name: the value of its option `method`, None where it has none.

    `ours` goes token by token. Without a model there is no other.

    Args:
        methods: names, or fields of `zoo.flows.inverse.Jacobi` with a blank between them.

    Raises:
        UserError: methods without a model, or one that is unknown or does not fit the blocks of the task.
    """
    if methods and model is None:
        raise UserError("--method needs --model: fresh weights converge at once, so that sweeps tell nothing on them")
    if model is None:
        return {"ours": "sequential" if has_methods(task) else None}
    sides: dict[str, Any] = {"ours": "sequential", "jacobi": "jacobi", "gs_jacobi": "gs_jacobi"}
    for text in (" ".join(method.split()) for method in methods):
        try:
            if text == "auto":
                raise UserError("it leaves the choice open; name a method, or give its fields, e.g. modules=4")
            method = config.override(Jacobi(), text.split(" ")) if "=" in text else text
            Jacobi.of(method).block(0, task.blocks)  # as many values as blocks
        except UserError as error:
            raise UserError(f"--method '{text}': {error}") from None
        if method not in sides.values():
            sides[text] = method
    return sides


def time_sampler(
    run: Run,
    params: Any,
    twin: Any,
    n: int,
    rounds: int,
    methods: Mapping[str, Any] | None = None,
    rival: _Rival | None = None,
) -> Figures:
    """Seconds that a batch of n samples takes, beside the peer and the other run, on the devices that `zoo sample` would use.

    Args:
        methods: the sides, from `inverses`; None: ours alone, as the sampler does by default.

    Returns:
        Times, what each program needs of a device's memory, and of every side besides ours how far its samples are from
        ours for the same keys and what its sweeps came to.
    """
    task, methods = run.task, methods or {"ours": None}
    # A peer inverts and no more, so neither do we beside one.
    inverts = twin is not None and "denoise" in option_names(task)
    options = {"denoise": 0.0} if inverts else {}
    given = _conditions(task, n)
    figures: Figures = {}
    with contextlib.ExitStack() as stack:
        if jax.process_count() == 1:
            mesh, params = dist.spread(params, n)
            stack.enter_context(dist.use(mesh, run.rules))
        programs = {}
        for name, method in methods.items():
            own = options if method is None else {**options, "method": method}
            lowered = jax.jit(make_sampler(task, n, own)).lower(params, jax.random.key(0), given)
            programs[name] = lowered.compile()
            figures |= _program(programs[name], f"sample {n} program MiB, {name}")

        def draw(program: Any, k: int) -> Any:
            return jax.block_until_ready(program(params, jax.random.key(k), given))

        def repeat(program: Any, count: int) -> None:
            for k in range(count):
                draw(program, k)

        sides: dict[str, Callable[[int], None]] = {k: functools.partial(repeat, p) for k, p in programs.items()}
        if twin is not None:

            def theirs(count: int) -> None:
                for _ in range(count):
                    twin.sample(n)

            sides["peer"] = theirs
        if rival is not None:
            sides["against"] = _draws(rival, n)
        found = _rounds(sides, rounds)
        told: Figures = {}
        if len(programs) > 1:
            told = _told({name: jax.device_get(draw(program, 0)) for name, program in programs.items()}, n)
    times: Figures = {}
    _compare(times, f"sample {n}", found, n, _unit(task))
    if has_methods(task) and isinstance(task, Cached):
        sizes = task.cache_bytes(n, guided=False).items()
        figures[f"sample {n} caches of a block MiB"] = {block: size / 2**20 for block, size in sizes}
    return times | told | figures


def _conditions(task: Any, n: int) -> dict[str, np.ndarray] | None:
    spec = sampler_spec(task, n)
    return None if spec is None else {key: np.zeros(leaf.shape, leaf.dtype) for key, leaf in spec.items()}


def _draws(rival: _Rival, n: int) -> Callable[[int], None]:
    """A call that draws n samples of the other run, so often."""
    task, given = rival.run.task, _conditions(rival.run.task, n)
    mesh, params = dist.spread(rival.state.params, n) if jax.process_count() == 1 else (rival.mesh, rival.state.params)
    with dist.use(mesh, rival.run.rules):
        program = jax.jit(make_sampler(task, n, {})).lower(params, jax.random.key(0), given).compile()

    def repeat(count: int) -> None:
        with dist.use(mesh, rival.run.rules):
            for k in range(count):
                jax.block_until_ready(program(params, jax.random.key(k), given))

    return repeat


def _told(drawn: Mapping[str, Mapping[str, np.ndarray]], n: int) -> Figures:
    """Of every side besides ours: how far its samples are from ours, its sweeps by block, and how often they failed."""
    figures: Figures = {}
    for name, one in drawn.items():
        if name == "ours":
            continue
        key = "image" if "image" in one else "latent"
        mine, theirs = np.asarray(drawn["ours"][key], np.float32), np.asarray(one[key], np.float32)
        finite = np.isfinite(mine) & np.isfinite(theirs)
        lost = int((np.isfinite(mine) != np.isfinite(theirs)).any(tuple(range(1, mine.ndim))).sum())
        error = float(np.abs(theirs[finite] - mine[finite]).max(initial=0))
        figures[f"sample {n} error, {name}"] = f"{lost} of {n} samples are finite on one side only" if lost else error
        if "sweeps" not in one:
            figures[f"sample {n} sweeps, {name}"] = "none: every block goes token by token"
            continue
        figures[f"sample {n} sweeps, {name}"] = one["sweeps"].max(0).tolist()  # block 0, nearest the data, first
        failed = int(one["unconverged"].sum())
        if failed:
            figures[f"sample {n} unconverged, {name}"] = failed
    return figures


# --- the data -------------------------------------------------------------------------------------


def time_data(run: Run, mesh: jax.sharding.Mesh, rounds: int, step: _Stepper | None = None) -> Figures:
    """The input pipeline on the run's own data: read alone, put on the devices, and feeding the step where there is one.

    UserError where the data is missing or cannot be read.
    """
    figures: Figures = {}
    sharding = dist.batch_sharding(mesh)
    # Without a sharding the pipeline reads every row; one of several hosts has only its own to read.
    ways = {"devices": sharding} if jax.process_count() > 1 else {"host": None, "devices": sharding}
    for name, where in ways.items():
        with contextlib.closing(run.batches(0, where)) as feed:
            begin = time.perf_counter()
            jax.block_until_ready(next(feed))
            figures.setdefault("data first batch ms", 1e3 * (time.perf_counter() - begin))
            _compare(figures, "data", {name: _streamed(feed, rounds)}, run.batch, _unit(run.task))
    if step is not None and step.median is not None:
        alone = run.batch / step.median
        unit = _unit(run.task)
        figures[f"data, devices / train {unit}/s"] = figures[f"data {unit}/s, devices"] / alone
        with contextlib.closing(run.batches(0, sharding)) as feed:
            step.fed(feed, _AHEAD)
            count = max(1, round(_ROUND / step.median))
            found = [_seconds(lambda n: step.fed(feed, n), count) for _ in range(rounds)]
        _compare(figures, "train", {"fed by the data": found}, run.batch, _unit(run.task))
        figures["train, fed by the data / ours"] = statistics.median(found) / step.median
    return figures


def _streamed(feed: Iterator[Any], rounds: int) -> list[float]:
    """Seconds per batch, round by round, when batches are taken as fast as they come."""
    for _ in range(_AHEAD):  # read while nobody waited
        next(feed)
    found = []
    for _ in range(rounds):
        begin, count = time.perf_counter(), 0
        while not count or time.perf_counter() - begin < _ROUND:
            jax.block_until_ready(next(feed))
            count += 1
        found.append((time.perf_counter() - begin) / count)
    return found
