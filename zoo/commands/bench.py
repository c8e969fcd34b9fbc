"""`zoo bench`: the train step, the sampler and the data of a config, timed, beside a peer or another config where one is given."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import os
import platform
import re
import shlex
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
from zoo import config, dist, hosts, weights
from zoo.commands import clocks, flops
from zoo.commands.arguments import allows, as_run, check_json, takes, write_json, writes_json
from zoo.commands.bench_sampler import asked, conditions_of, inverses, open_weights, time_energy, time_sampler
from zoo.commands.chips import chip_of, count_chips
from zoo.commands.clocks import Figures, compare, in_turn, program_size, seconds_of, unit_of, waited
from zoo.commands.peer import load_peer, parity
from zoo.commands.tables import lines
from zoo.data.pipeline import batches
from zoo.data.synthetic import Synthetic
from zoo.errors import UserError
from zoo.run import Run
from zoo.task import Crops, Energetic, Samples, check_needs, has_methods, option_names, speed
from zoo.train import optim
from zoo.train.step import compile_step, make_sampler

WHAT = {"both": ("train", "sample"), "all": ("train", "sample", "data")}  # names of several parts at once
_STEPS = 100  # steps timed one by one at most
_AHEAD = 6  # batches that the pipeline may hold ready when nobody has taken one for a while


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    takes(parser, "CONFIG", fields="override fields")
    parser.add_argument(
        "--peer", default=None, metavar="FILE", help="a Python file with build(task), timed in turn with ours"
    )
    parser.add_argument(
        "--against",
        default=None,
        metavar="CONFIG",
        help="another config, whose step and sampler are timed in turn with ours, with as many examples and the first --with",
    )
    parser.add_argument(
        "--what",
        choices=("train", "sample", "data", "energy", "both", "all"),
        default="both",
        help="both: train and sample, on synthetic data; data reads the run's own; energy: that of a task that has one, with and without "
        "its score",
    )
    parser.add_argument(
        "--samples",
        default="16",
        metavar="N[,N...]",
        help="batch sizes of the sampler, which is timed with 1 as well",
    )
    parser.add_argument(
        "--model",
        default=None,
        metavar="MODEL",
        help="a run or export of a flow: time its sampler with these weights, by each way to invert a block",
    )
    parser.add_argument(
        "--method",
        action="append",
        default=[],
        dest="methods",
        metavar="FIELDS",
        help="one more way beside sequential, jacobi and gs_jacobi, e.g. 'modules=0,1,1,8 tol=1e-3'; may be repeated",
    )
    parser.add_argument(
        "--with",
        action="append",
        default=[],
        dest="options",
        metavar="FIELDS",
        help="options of the sampler, e.g. 'solver=heun nfe=35'; repeated, each set is timed in turn with the first",
    )
    allows(parser)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each side, in turn")
    writes_json(parser)


def run(args: argparse.Namespace) -> int:
    """Time the parts of a config."""
    if hosts.expected():
        raise UserError(
            "zoo bench measures one process, but the environment names several (JAX_NUM_PROCESSES, Slurm or a TPU pod); run "
            "it on one host, outside of the others"
        )
    run = as_run(config.load(args.config, args.fields), args.config)
    against = None if args.against is None else as_run(config.load(args.against), args.against)
    check_json(args.json)
    if not re.fullmatch(r"-?[0-9]+(,-?[0-9]+)*", args.samples):
        raise UserError(f"--samples {args.samples} is no batch size and no list of them; write 16, or 16,64")
    samples = tuple(map(int, args.samples.split(",")))
    dist.start(batch=run.batch // run.accumulate, mesh=run.mesh)
    names = ("what", "samples", "rounds", "peer", "against", "model")
    flags = [f"--{k} {getattr(args, k)}" for k in names if getattr(args, k) is not None]
    flags += [f"--method {shlex.quote(text)}" for text in args.methods]
    flags += [f"--with {shlex.quote(text)}" for text in args.options]
    about = {"command": " ".join(["zoo bench", args.config, *args.fields, *flags])}
    same = {name: getattr(args, name) for name in ("peer", "what", "rounds", "model", "methods", "options", "allow")}
    figures = bench(run, against=against, samples=samples, about=about, **same)
    print(lines(figures))
    write_json(args.json, figures)
    return 0


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
    options: Sequence[str] = (),
    allow: Sequence[str] = (),
    about: Mapping[str, Any] | None = None,
) -> Figures:
    """Time the parts of a run. The step and the sampler get synthetic data; only the part `data` opens the run's own.

    Args:
        peer: a Python file whose `build(task)` gives an object with load, train_step, loss and sample. It gets our
            weights first, and a loss that differs ends the comparison: a twin that computes something else is none.
        against: another run, whose step and sampler take turns with ours: the side `against`. Its batch, its way of
            accumulation and its mesh are ours, so that examples are compared with as many, and so are the first of `options`,
            as far as its sampler has them.
        what: train, sample, data, both (train and sample), all (these three) or energy, its value with and without the score.
        samples: batch sizes of the sampler, which is timed with 1 as well.
        model: a run, an export or a shipped name whose weights the sampler gets. A flow is then inverted by every method,
            in turn; with fresh weights sweeps converge at once.
        methods: further ones, such as "modules=0,1,1,8 tol=1e-3": fields of `zoo.flows.inverse.Jacobi`.
        allow: packages besides zoo whose classes these may name.
        options: sets of the sampler's options, such as "solver=heun nfe=35", timed in turn instead of the methods and compared
            with the first of them.
        about: what the command was, kept among the figures.

    Raises:
        UserError: no peer there, a peer that differs, another run whose examples are of another kind, no round or sample to
            time, a task without a sampler, a model that is not of this task, a method or an option that is none, or data
            that cannot be read where nothing else was asked for.
    """
    sizes = (samples,) if isinstance(samples, int) else tuple(samples)
    for name, value in (("--rounds", rounds), *(("--samples", n) for n in sizes)):
        if value < 1:
            raise UserError(f"{name} {value} leaves nothing to time; give 1 or more")
    parts = WHAT.get(what, (what,))
    for one, flag in ((run, ""), (against, "--against: ")):
        if one is not None and "sample" in parts and not isinstance(one.task, Samples):
            raise UserError(f"{flag}{type(one.task).__name__} has no sampler; use --what train")
    if against is not None and unit_of(run.task) != unit_of(against.task):
        (ours, mine), (theirs, other) = ((type(t).__name__, t.about.unit) for t in (run.task, against.task))
        raise UserError(
            f"--against: {theirs} models {other} and {ours} {mine}, so that times of one say nothing of the other; give "
            f"another config of {mine}"
        )
    if "energy" in parts:
        check_needs(run.task, (Energetic,), "--what energy")
    draws, both = {"sample"}, {"train", "sample"}
    flags = {
        "--peer": (peer, both),
        "--against": (against, both),
        "--model": (model, draws),
        "--method": (methods, draws),
    }
    for flag, (given, of) in {**flags, "--with": (options, draws)}.items():
        if given and not of & set(parts):
            raise UserError(f"{flag} has no part in --what {what}; leave it out")
    opened = open_weights(run.task, model) if model else None
    if options and methods:
        raise UserError("--with and --method both say how samples are drawn; write --with 'method.modules=4' instead")
    sides = asked(run.task, options, allow) if options else inverses(run.task, opened, methods)
    shared, lacking = ({}, "") if against is None or not options else _alike(against.task, options[0], allow)
    mesh = run.mesh.build()
    twin = load_peer(peer, run.task) if peer else None
    figures = {**(about or {}), **environment(run, mesh), "rounds": rounds}
    torch = sys.modules.get("torch")  # there only if the peer brought it
    if twin is not None and torch is not None:
        figures |= {"torch": str(torch.__version__), "threads, peer": torch.get_num_threads()}
    with dist.use(mesh, run.rules):
        dist.check_batch(run.batch, run.accumulate, mesh)
        step = None
        if parts != ("data",):
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
                if lacking:
                    figures["sampler options, against"] = lacking
                for n in sorted({1, *sizes}):  # one alone: how long a user waits
                    other = None if rival is None else rival.draws(n, shared)
                    figures |= time_sampler(run, params, twin, n, rounds, sides, other)
            if "energy" in parts:
                for n in sizes:
                    figures |= time_energy(run, state.params, n, rounds)
        if "data" in parts:
            try:
                figures |= time_data(run, mesh, rounds, step)
            except UserError as error:
                if parts == ("data",):
                    raise
                figures["data"] = f"not measured: {error}"
    return figures | peak_memory(step, twin)


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


def _planned(program: Any) -> float | None:
    memory = program.memory_analysis()
    if memory is None:
        return None
    # what is given up (the state) is counted among the arguments and the outputs
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (kept + memory.temp_size_in_bytes) / 2**20


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

    def __call__(self, count: int, feed: Iterator[Any] | None = None) -> None:
        """So many steps on that batch, or on what the pipeline gives, as while training."""
        for _ in range(count):
            self.state, _ = self.program(self.state, self.placed if feed is None else next(feed))
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

    def draws(self, n: int, options: Mapping[str, Any]) -> Callable[[int], None]:
        """A call that draws n of its samples, so often."""
        task, given = self.run.task, conditions_of(self.run.task, n)
        spread = jax.process_count() == 1
        mesh, params = dist.spread(self.state.params, n) if spread else (self.mesh, self.state.params)
        with dist.use(mesh, self.run.rules):
            program = jax.jit(make_sampler(task, n, options)).lower(params, jax.random.key(0), given).compile()

        def draw(k: int) -> Any:
            with dist.use(mesh, self.run.rules):
                return program(params, jax.random.key(k), given)

        return waited(draw)


def _rival(against: Run, run: Run, mesh: jax.sharding.Mesh) -> _Rival:
    """Another run with the batch of ours."""
    other = dataclasses.replace(against, batch=run.batch, accumulate=run.accumulate)
    with dist.use(mesh, other.rules):
        init, jitted, abstract = compile_step(
            other.task, optim.build(other.optim, other.steps), mesh, ema=other.ema, accumulate=other.accumulate
        )
        return _Rival(other, mesh, jitted, abstract, init(0))


def _alike(task: Any, text: str, allow: Sequence[str]) -> tuple[Mapping[str, Any], str]:
    """The options of our first side that the sampler of another task has too; a sentence on those that it has not."""
    words = {word: word.partition("=")[0].partition(".")[0] in option_names(task) for word in text.split()}
    (options,) = asked(task, [" ".join(w for w, known in words.items() if known)], allow, "--against --with").values()
    lacking = [word for word, known in words.items() if not known]
    return options, f"its defaults in place of {' '.join(lacking)}, which its sampler has not" if lacking else ""


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
    figures: Figures = {"train first step ms": 1e3 * seconds_of(step, 1)}
    figures |= program_size(step.program, "train program MiB")
    sides: dict[str, Callable[[int], None]] = {"ours": step}
    if twin is not None:
        batch = twin.place(host)

        def theirs(count: int) -> None:
            for k in range(count):
                twin.train_step(batch, sync=k == count - 1)

        sides["peer"] = theirs
    if rival is not None:
        sides["against"] = rival.stepper()
    found = in_turn(sides, rounds)
    compare(figures, "train", found, run.batch, unit_of(run.task))
    step.median = statistics.median(found["ours"])
    # The rounds leave the queue of steps full; here every step is waited for, as long as the rounds took.
    count = max(rounds, min(_STEPS, round(rounds * clocks.ROUND / step.median)))
    each = [1e3 * seconds_of(step, 1) for _ in range(count)]
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
    figures: Figures = {}
    unit = unit_of(run.task)
    found = in_turn({"ours": waited(lambda k: crops(step.placed, jax.random.key(k)))}, rounds)
    compare(figures, "sampler and crops", found, run.batch, unit)
    assert step.median is not None
    figures[f"sampler and crops / train {unit}/s"] = step.median / statistics.median(found["ours"])
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
            compare(figures, "data", {name: _streamed(feed, rounds)}, run.batch, unit_of(run.task))
    if step is not None and step.median is not None:
        alone = run.batch / step.median
        unit = unit_of(run.task)
        figures[f"data, devices / train {unit}/s"] = figures[f"data {unit}/s, devices"] / alone
        with contextlib.closing(run.batches(0, sharding)) as feed:
            step(_AHEAD, feed)
            count = max(1, round(clocks.ROUND / step.median))
            found = [seconds_of(lambda n: step(n, feed), count) for _ in range(rounds)]
        compare(figures, "train", {"fed by the data": found}, run.batch, unit_of(run.task))
        figures["train, fed by the data / ours"] = statistics.median(found) / step.median
    return figures


def _streamed(feed: Iterator[Any], rounds: int) -> list[float]:
    """Seconds per batch, round by round, when batches are taken as fast as they come."""
    for _ in range(_AHEAD):  # read while nobody waited
        next(feed)
    found = []
    for _ in range(rounds):
        begin, count = time.perf_counter(), 0
        while not count or time.perf_counter() - begin < clocks.ROUND:
            jax.block_until_ready(next(feed))
            count += 1
        found.append((time.perf_counter() - begin) / count)
    return found
