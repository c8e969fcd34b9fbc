"""The sampler of a task, timed by each way to invert a flow or with each set of options, beside others; and its energy."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from zoo import config, dist, models, weights
from zoo.commands.clocks import Figures, compare, in_turn, program_size, unit_of, waited
from zoo.diffusion.energies import scored
from zoo.errors import UserError
from zoo.flows.inverse import Jacobi
from zoo.run import Run
from zoo.task import Cached, has_methods, option_names
from zoo.train.step import make_sampler, sampler_spec

Sides = dict[str, dict[str, Any]]  # options of the sampler, by the name of the side


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
    if found := config.unlike(task, model.task):
        raise UserError(
            f"--model {name} is another model than the config's ({found[0]}); override the fields of the config, or open "
            "a model that was made with it"
        )
    params = weights.matching(model.params, weights.abstract(task))  # its layers may be stacked and ours unrolled
    return dataclasses.replace(model, task=task, params=params)


def asked(task: Any, texts: Sequence[str], allow: Sequence[str] = (), flag: str = "--with") -> Sides:
    """The sides that a flag asks for, each by its text: `field=value` with blanks between them.

    UserError for an option that the sampler has not, or that does not fit the task.
    """
    sides: Sides = {}
    for text in (" ".join(text.split()) for text in texts):
        try:
            options = config.override(task.Sampling(), text.split(), allow=allow)
            sampler = make_sampler(task, 1, options)  # traced here: what does not fit is told before anything is timed
            jax.eval_shape(sampler, weights.abstract(task), jax.random.key(0), conditions_of(task, 1))
        except UserError as error:
            raise UserError(f"{flag} '{text}': {error}") from None
        sides[text or "defaults"] = vars(options)
    return sides


def inverses(task: Any, model: models.Model | None, methods: Sequence[str] = ()) -> Sides:
    """The sides that the sampler is timed with where nothing else is asked for: its option `method`, where it has one.

    `ours` goes token by token. Without a model there is no other.

    Args:
        methods: names, or fields of `zoo.flows.inverse.Jacobi` with a blank between them.

    Raises:
        UserError: methods without a model, or one that is unknown or does not fit the blocks of the task.
    """
    if methods and model is None:
        raise UserError("--method needs --model: fresh weights converge at once, so that sweeps tell nothing on them")
    if model is None:
        return {"ours": {"method": "sequential"} if has_methods(task) else {}}
    sides: Sides = {
        "ours": {"method": "sequential"},
        "jacobi": {"method": "jacobi"},
        "gs_jacobi": {"method": "gs_jacobi"},
    }
    for text in (" ".join(method.split()) for method in methods):
        try:
            if text == "auto":
                raise UserError("it leaves the choice open; name a method, or give its fields, e.g. modules=4")
            method = config.override(Jacobi(), text.split(" ")) if "=" in text else text
            Jacobi.of(method).block(0, task.blocks)  # as many values as blocks
        except UserError as error:
            raise UserError(f"--method '{text}': {error}") from None
        if {"method": method} not in sides.values():
            sides[text] = {"method": method}
    return sides


def time_sampler(
    run: Run,
    params: Any,
    twin: Any,
    n: int,
    rounds: int,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    against: Callable[[int], None] | None = None,
) -> Figures:
    """Seconds that a batch of n samples takes, beside the peer and the other run, on the devices that `zoo sample` would use.

    Args:
        options: those of each side, from `inverses` or `asked`; the others are compared with the first. None: ours alone,
            with the defaults.
        against: draws n samples of the other run, so often.

    Returns:
        Times, what each program needs of a device's memory, and of every side besides ours how far its samples are from
        ours for the same keys and what its sweeps came to. Of options that say `nfe` also the time of a call of the denoiser.
    """
    task, options = run.task, options or {"ours": {}}
    # A peer inverts and no more, so neither do we beside one.
    inverts = twin is not None and "denoise" in option_names(task)
    plain = {"denoise": 0.0} if inverts else {}
    given = conditions_of(task, n)
    figures: Figures = {}
    with contextlib.ExitStack() as stack:
        if jax.process_count() == 1:
            mesh, params = dist.spread(params, n)
            stack.enter_context(dist.use(mesh, run.rules))
        programs = {}
        for name, own in options.items():
            lowered = jax.jit(make_sampler(task, n, {**own, **plain})).lower(params, jax.random.key(0), given)
            programs[name] = lowered.compile()
            figures |= program_size(programs[name], f"sample {n} program MiB, {name}")

        def draw(program: Any, k: int) -> Any:
            return program(params, jax.random.key(k), given)

        sides = {name: waited(functools.partial(draw, program)) for name, program in programs.items()}
        if twin is not None:

            def theirs(count: int) -> None:
                for _ in range(count):
                    twin.sample(n)

            sides["peer"] = theirs
        if against is not None:
            sides["against"] = against
        found = in_turn(sides, rounds)
        told: Figures = {}
        if len(programs) > 1 and "ours" in programs:  # others draw other samples
            told = _told({name: jax.device_get(draw(program, 0)) for name, program in programs.items()}, n)
    times: Figures = {}
    compare(times, f"sample {n}", found, n, unit_of(task), next(iter(options)))
    for name, own in options.items():
        if own.get("nfe"):
            times[f"sample {n} ms a call, {name}"] = times[f"sample {n} ms, {name}"]["median"] / own["nfe"]
    if has_methods(task) and isinstance(task, Cached):
        sizes = task.cache_bytes(n, guided=False).items()
        figures[f"sample {n} caches of a block MiB"] = {block: size / 2**20 for block, size in sizes}
    return times | told | figures


def time_energy(run: Run, params: Any, n: int, rounds: int) -> Figures:
    """Energies of n examples alone, which cost what their network's forward pass does, in turn with energies and scores."""
    task, known = run.task, run.task.about.likelihood
    x = np.zeros((n, *(known.event if known else next(iter(task.spec(1).values())).shape[1:])), np.float32)
    given = {"label": np.zeros(n, np.int32)} if task.about.classes else None
    energy = functools.partial(task.energy, conditions=given)
    ways: dict[str, Callable[..., Any]] = {
        "alone": energy,
        "with score": lambda params, x, sigma: scored(functools.partial(energy, params))(x, sigma),
    }
    programs = {name: jax.jit(call).lower(params, x, np.ones(n, np.float32)).compile() for name, call in ways.items()}

    def call(program: Any, _: int) -> Any:
        return program(params, x, np.ones(n, np.float32))

    figures: Figures = {}
    for name, program in programs.items():
        figures |= program_size(program, f"energy {n} program MiB, {name}")
    times: Figures = {}
    found = in_turn({name: waited(functools.partial(call, program)) for name, program in programs.items()}, rounds)
    compare(times, f"energy {n}", found, n, unit_of(task), "alone")
    return times | figures


def conditions_of(task: Any, n: int) -> dict[str, np.ndarray] | None:
    """Zeros for what the sampler of a task is given for n samples; None where it is given nothing."""
    spec = sampler_spec(task, n)
    return None if spec is None else {key: np.zeros(leaf.shape, leaf.dtype) for key, leaf in spec.items()}


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
