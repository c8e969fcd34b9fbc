"""`zoo compile`: topologies, programs compiled for TPUs that are not here, what fits and what is proposed instead."""

import dataclasses
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from zoo import cli, config, dist
from zoo.commands import aot, hlo, tables
from zoo.commands.chips import Chip, chip_of_topology
from zoo.data.synthetic import Synthetic
from zoo.errors import UserError
from zoo.papers.tarflow import TarFlow
from zoo.run import Run
from zoo.task import About

pytestmark = pytest.mark.devices8

TASK = TarFlow(
    image=16, channels=3, patch=4, width=128, depth=2, blocks=2, head_dim=64, dtype="bfloat16", attention="auto"
)
RUN = Run(TASK, Synthetic(), steps=10, batch=16, ema=0.99, mesh=dist.Mesh(data=1, fsdp=-1))
SMALL = dataclasses.replace(
    RUN, task=TarFlow(image=4, channels=1, patch=2, width=8, depth=1, blocks=1, head_dim=4), mesh=dist.Mesh()
)
BLANK = Chip("CPU", "cpu", None, None, None, None, None, "no figures")
FAST = dataclasses.replace(BLANK, peak=1e12, memory=2.0**34, bandwidth=1e11, interconnect=1e10)


def here(chip: Chip, devices: int = 8) -> aot.Target:
    """The simulated devices, with the figures of some chip."""
    return aot.Target("cpus", jax.devices()[:devices], chip)


# topologies


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("v9:2x2", "v4:2x2x1, v4:2x2x2"),
        ("v5e", "such as v5e:2x2, v5e:2x4"),
        ("v5e:2x2x2", "such as v5e:2x2"),
        ("v5e:0x2", "such as v5e:2x2"),
        ("v5e:²x2", "such as v5e:2x2"),
    ],
)
def test_a_topology_that_is_none_is_told_with_some_that_are(name: str, known: str) -> None:
    with pytest.raises(UserError) as told:
        aot.target(name)
    assert str(told.value).startswith(f"--topology {name} is unknown; write a generation and its shape")
    assert known in str(told.value)


@pytest.mark.parametrize("slices", [0, -1])
def test_no_slices_are_refused(slices: int) -> None:
    with pytest.raises(UserError, match=f"--slices {slices} leaves no chip; give 1 or more"):
        aot.target("v5e:2x2", slices)


def test_without_the_compiler_a_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        import os

        os.write(2, b"what a library writes past Python")
        raise RuntimeError("libtpu.so: cannot open shared object file")

    monkeypatch.setattr(aot.topologies, "get_topology_desc", missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--topology v5e:2x2 needs the TPU compiler .* install the `aot` extra"):
        aot.target("v5e:2x2")
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match=r"v5e:2x2 does not exist \(libtpu.so: .*\); known ones: v5e:2x2, v5e:2x4"):
        aot.target("v5e:2x2")


# runs that do not go onto the devices


@dataclass(frozen=True)
class Mute:
    """A task that only trains."""

    about = About()

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {"x": jax.ShapeDtypeStruct((batch, 4), jnp.float32)}

    def init(self, rng: jax.Array) -> dict[str, jax.Array]:
        return {"w": jnp.ones((4, 2))}

    def loss(self, params: Any, batch: Any, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return jnp.square(batch["x"] @ params["w"]).mean(), {}


@pytest.mark.parametrize(
    ("fields", "what", "message"),
    [
        ({"mesh": dist.Mesh(fsdp=16)}, "train", r"does not fill the 8 devices here; their product must be 8"),
        ({"batch": 12}, "train", r"batch=12 does not divide over 8 devices; choose a multiple of 8"),
        ({"accumulate": 3}, "train", r"batch=16 does not divide over 8 devices x 3 micro-batches"),
        ({"mesh": dist.Mesh(tensor=4)}, "sample", r"the number of heads, task.width / task.head_dim, has size 2"),
        ({"task": Mute()}, "sample", r"Mute has no sampler; use --what train"),
    ],
)
def test_what_does_not_go_onto_the_devices_is_a_sentence(fields: dict[str, Any], what: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        aot.compile_run(dataclasses.replace(SMALL, **fields), here(FAST), what)


# what is read off a program, on devices that are here


def test_a_task_without_a_word_on_its_cost_is_compiled_too() -> None:
    figures = aot.compile_run(dataclasses.replace(SMALL, task=Mute()), here(FAST)).figures
    assert figures["parameters"] == 8
    assert figures["model TFLOP"] * 1e12 == 16 * 3 * 2 * 4 * 2
    # the gradient of 8 numbers is summed once over 8 devices; a loss and its like are not worth counting
    assert figures["sent, least possible"]["data"] * 2**30 == 2 * 8 * 4 * 7 / 8
    assert figures["sent / least possible"] >= 1


def failing(message: str) -> Any:
    class Lowered:
        def compile(self, **_: Any) -> Any:
            raise jax.errors.JaxRuntimeError(message)

    return Lowered()


def test_of_the_compilers_words_the_size_of_the_program_is_read() -> None:
    with pytest.raises(aot._TooLarge) as told:
        aot._compile(
            failing("RESOURCE_EXHAUSTED: Ran out of memory: Used 19.94G of 15.75G hbm. Exceeded by 4.19G.\nmore")
        )
    assert told.value.needs == 19.94 * 2**30
    assert str(told.value).endswith("by 4.19G.")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        aot._compile(failing("INTERNAL: 3G of trouble"))


# what to change


def pretend(monkeypatch: pytest.MonkeyPatch, *fits: bool) -> list[tuple[Run, Any]]:
    """Makes the compiler answer so, in turn; what it was asked for."""
    asked: list[tuple[Run, Any]] = []

    def compile_run(run: Run, to: Any, what: str, samples: int | None) -> aot.Compiled:
        asked.append((run, samples))
        return aot.Compiled({"peak GiB": 1.0}, fits[len(asked) - 1])

    monkeypatch.setattr(aot, "compile_run", compile_run)
    return asked


def failed(state: float, peak: float) -> aot.Compiled:
    return aot.Compiled({"state GiB": state, "peak GiB": peak}, False)


FULL = dataclasses.replace(RUN, task=dataclasses.replace(TASK, remat="full"))
ROOM = dataclasses.replace(FAST, memory=8.0 * 2**30)


def test_what_is_proposed_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend(monkeypatch, False, True)
    text = aot.nearest_fit(FULL, here(ROOM, 4), failed(4, 9), "train", None)
    assert text == "it fits with accumulate=4 (peak 1.00 of 8.00 GiB)"
    assert [run.accumulate for run, _ in asked] == [2, 4]
    assert all(dataclasses.replace(run, accumulate=1) == FULL for run, _ in asked)


def test_what_the_estimate_rules_out_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """9 GiB of state on four devices and 10 of the rest: half of it, and the gradients, are still too much."""
    asked = pretend(monkeypatch, True)
    text = aot.nearest_fit(FULL, here(ROOM, 4), failed(9, 12.25), "train", None)
    assert text.startswith("it fits with accumulate=4 (")
    assert [run.accumulate for run, _ in asked] == [4]


def test_recomputing_is_proposed_after_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend(monkeypatch, False, True)
    text = aot.nearest_fit(RUN, here(ROOM, 4), failed(4, 9), "train", None)
    assert text.startswith("it fits with task.remat=full (")
    assert [run for run, _ in asked] == [dataclasses.replace(RUN, accumulate=2), FULL]


@pytest.mark.parametrize(("state", "data"), [(6, 2), (8, 1)])
def test_a_state_that_is_repeated_is_shared_out_first(state: float, data: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As little as need be, as far as can be told without compiling."""
    asked = pretend(monkeypatch, True)
    run = dataclasses.replace(RUN, mesh=dist.Mesh())
    text = aot.nearest_fit(run, here(ROOM, 4), failed(state, 9), "train", None)
    assert text.startswith(f"it fits with mesh.data={data} mesh.fsdp={4 // data} (")
    assert asked == [(dataclasses.replace(run, mesh=dist.Mesh(data=data, fsdp=4 // data)), None)]


def test_a_mesh_that_does_not_divide_a_parameter_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_run(run: Run, *_: Any) -> aot.Compiled:
        if run.mesh.fsdp > 1:
            raise UserError("an axis does not divide")
        return aot.Compiled({"peak GiB": 1.0}, True)

    monkeypatch.setattr(aot, "compile_run", compile_run)
    run = dataclasses.replace(FULL, mesh=dist.Mesh())
    assert aot.nearest_fit(run, here(ROOM, 4), failed(3, 9), "train", None).startswith("it fits with accumulate=2 (")


def test_of_a_sampler_fewer_samples_at_a_time_are_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend(monkeypatch, True)
    text = aot.nearest_fit(RUN, here(ROOM, 4), failed(4, 12), "sample", 32)
    assert text.startswith("it fits with --samples 16 (")
    assert [samples for _, samples in asked] == [16]


@pytest.mark.parametrize(("fits", "state"), [((False,) * 3, 4), ((), 90)])
def test_where_nothing_fits_the_search_ends_and_says_what_it_tried(
    fits: tuple[bool, ...], state: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = pretend(monkeypatch, *fits)
    run = dataclasses.replace(FULL, batch=512)
    text = aot.nearest_fit(run, here(ROOM, 4), failed(state, state / 4 + 8), "train", None)
    assert len(asked) == len(fits)
    tried = ", ".join(f"accumulate={run.accumulate}" for run, _ in asked)
    assert text.startswith(f"nothing near it fits ({'tried ' + tried if tried else 'by estimate'}); take more chips")


# compiled for chips that are not here


@pytest.fixture(scope="module")
def tpu() -> Iterator[None]:
    """The TPU compiler, kept from looking for chips; its programs are kept out of the cache, which only chips can read."""
    pytest.importorskip("libtpu", reason="needs the aot extra")
    names = ("ALLOW_MULTIPLE_LIBTPU_LOAD", "TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_STDERR_LOG_LEVEL")
    with pytest.MonkeyPatch.context() as env:
        for name, value in zip(names, ("1", "1", "localhost", "3"), strict=True):
            env.setenv(name, value)
        before = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
        yield
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def compiled(run: Run, to: aot.Target, what: str = "train") -> tuple[aot.Compiled, hlo.Program]:
    """What is told of a program, and the program."""
    programs: list[hlo.Program] = []

    class Kept(hlo.Program):
        def __init__(self, text: str) -> None:
            super().__init__(text)
            programs.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hlo, "Program", Kept)
        found = aot.compile_run(run, to, what)
    return found, programs[0]


@pytest.fixture(scope="module")
def trained(tpu: None) -> tuple[aot.Compiled, hlo.Program]:
    """The train step for four chips."""
    return compiled(RUN, aot.target("v5e:2x2"))


@pytest.mark.parametrize(
    ("name", "devices", "share"),
    [("v5e:2x2", 4, 1), ("V5E:2x4", 8, 1), ("v5e:1x1", 1, 1), ("v4:2x2x1", 4, 1), ("tpu7x:2x2x1", 8, 0.5)],
)
def test_the_devices_of_a_topology(tpu: None, name: str, devices: int, share: float) -> None:
    to = aot.target(name)
    assert (to.name, len(to.devices), to.share) == (name, devices, share)
    assert to.chip is chip_of_topology(name)


def test_slices_are_as_many_topologies(tpu: None) -> None:
    to = aot.target("v5e:2x2", 2)
    assert (to.name, len(to.devices), to.share) == ("2 x v5e:2x2", 8, 1)
    assert {d.slice_index for d in to.devices} == {0, 1}


def test_a_shape_that_the_compiler_does_not_know(tpu: None) -> None:
    with pytest.raises(UserError, match=r"--topology v5e:5x7 does not exist \(.+\); known ones: v5e:2x2, v5e:2x4"):
        aot.target("v5e:5x7")


def test_the_state_is_shared_out_and_updated_in_place(trained: tuple[aot.Compiled, hlo.Program]) -> None:
    found, _ = trained
    figures = found.figures
    assert found.fits
    assert figures["topology"] == "v5e:2x2 (4 devices, TPU v5e)"
    assert figures["mesh"] == "fsdp=4"
    done, _, total = figures["state arrays updated in place"].partition(" of ")
    assert done == total
    assert int(total) > 100
    assert 1 <= figures["state / (total / (fsdp x tensor))"] < 1.05
    assert 1 <= figures["arguments GiB per device"] / figures["state GiB per device"] < 1.1
    assert figures["peak GiB"] == pytest.approx(
        figures["arguments GiB per device"] + figures["temporaries GiB, at the peak"]
    )
    assert figures["peak GiB"] < figures["memory GiB"] == 15.75
    assert figures["peak / memory"] == pytest.approx(figures["peak GiB"] / 15.75)


def test_every_parameter_is_gathered_and_its_gradient_scattered_once(
    trained: tuple[aot.Compiled, hlo.Program],
) -> None:
    """Without recomputation: twice the parameters of the other devices in bfloat16, and little else."""
    figures = trained[0].figures
    kinds = figures["sent, by kind"]
    assert sum(kinds.values()) == pytest.approx(figures["sent GiB per device"])
    others = figures["parameters"] * 2 * 3 / 4 / 2**30
    assert kinds["all-gather"] == pytest.approx(others, rel=0.05)
    assert kinds["reduce-scatter"] == pytest.approx(others, rel=0.05)
    assert 1 <= figures["sent / least possible"] < 1.1


def test_the_bound_is_the_longest_of_the_times(trained: tuple[aot.Compiled, hlo.Program]) -> None:
    figures = trained[0].figures
    times, step = figures["times s"], figures["step s, at least"]
    assert set(times) == {"compute", "memory", "interconnect"}
    assert step == max(times.values()) == times[figures["bound"]]
    assert times["compute"] == pytest.approx(figures["program TFLOP"] / 197 / 4)
    assert times["memory"] == pytest.approx(figures["moved GiB per device"] * 2**30 / 819e9)
    assert times["interconnect"] == pytest.approx(figures["sent GiB per device"] * 2**30 / 200e9)
    assert figures["examples/s, at most"] == pytest.approx(16 / step)
    assert figures["utilisation, at most"] == pytest.approx(figures["model TFLOP"] / 197 / 4 / step)
    assert figures["model TFLOP"] == pytest.approx(TASK.flops() * 16 / 1e12)


def test_the_table_shows_every_figure(trained: tuple[aot.Compiled, hlo.Program]) -> None:
    found, _ = trained
    lines = tables.lines(found.figures).splitlines()
    assert [line.partition("  ")[0] for line in lines] == list(found.figures)
    assert len({len(line) - len(line[len(key) :].lstrip()) for line, key in zip(lines, found.figures)}) == 1
    assert next(line for line in lines if line.startswith("times s")).endswith(" s") is False
    assert "835,264" in next(line for line in lines if line.startswith("parameters"))


def test_a_sampler_gathers_its_parameters_outside_the_loop_over_tokens(tpu: None) -> None:
    found, program = compiled(
        dataclasses.replace(RUN, samples=dataclasses.replace(RUN.samples, n=8)), aot.target("v5e:2x2"), "sample"
    )
    assert found.fits
    assert found.figures["program"] == "sampler, 8 samples"
    gathers = [c for c in program.collectives() if c.kind == "all-gather"]
    tokens = TASK.tokens - 1
    assert any(times == tokens for times in program.times.values())  # there is a loop over tokens
    assert gathers
    assert max(c.times for c in gathers) <= TASK.depth * TASK.blocks < tokens
    # all parameters in bfloat16, once to sample and, as this model denoises, once more for a score
    assert sum(c.total for c in gathers) == pytest.approx(2 * found.figures["parameters"] * 2 * 3 / 4, rel=0.1)


def test_what_does_not_fit_is_told_and_what_fits_is_compiled_first(
    trained: tuple[aot.Compiled, hlo.Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = trained[0].figures["peak GiB"] * 2**30
    to = aot.target("v5e:2x2")
    to = dataclasses.replace(to, chip=dataclasses.replace(to.chip, memory=0.9 * peak))
    seen: list[tuple[Run, aot.Compiled]] = []
    real = aot.compile_run

    def compile_run(run: Run, *rest: Any) -> aot.Compiled:
        seen.append((run, real(run, *rest)))
        return seen[-1][1]

    monkeypatch.setattr(aot, "compile_run", compile_run)
    text = aot.nearest_fit(RUN, to, trained[0], "train", None)
    run, found = seen[-1]
    told = re.match(r"it fits with (.+) \(peak", text)
    assert told
    assert run == config.override(RUN, told[1].split())
    assert run != RUN
    assert found.fits
    assert found.figures["peak GiB"] * 2**30 <= 0.9 * peak
    assert not any(earlier.fits for _, earlier in seen[:-1])


def test_a_program_that_the_compiler_finds_no_room_for(tpu: None) -> None:
    mesh = dist.Mesh().build(aot.target("v5e:1x1").devices)
    with dist.use(mesh):
        x = jax.ShapeDtypeStruct((100_000, 50_000), jnp.float32, sharding=NamedSharding(mesh, P()))
        with pytest.raises(aot._TooLarge, match="RESOURCE_EXHAUSTED") as told:
            aot._compile(jax.jit(lambda x: x.T @ x).lower(x))
    assert 16 * 2**30 < told.value.needs < 64 * 2**30


def test_only_the_data_axis_spans_slices(tpu: None) -> None:
    to = aot.target("v5e:2x2", 2)
    with pytest.raises(UserError, match=r"mesh.data=1 must be a multiple of the 2 slices, .*; set mesh.data=2"):
        aot.compile_run(RUN, to)
    task = dataclasses.replace(TASK, blocks=1)
    found, program = compiled(dataclasses.replace(RUN, task=task, mesh=dist.Mesh(data=2, fsdp=-1)), to)
    figures = found.figures
    assert figures["mesh"] == "data=2 x fsdp=4"
    times = figures["times s"]
    # Between slices goes the gradient of what a device holds, in bfloat16, and a little; within them what went before.
    across = figures["sent, by kind"][hlo.BETWEEN]
    assert across * 2**30 == pytest.approx(figures["parameters"] / 4 * 2, rel=0.2)
    assert times["network between slices"] == pytest.approx(across * 2**30 / (6.4e12 / 8 / 256))
    assert times["interconnect"] == pytest.approx((figures["sent GiB per device"] - across) * 2**30 / 200e9)
    slices = [d.slice_index for d in dist.Mesh(data=2, fsdp=-1).build(to.devices).devices.flat]
    assert all(len({slices[p] for p in g}) == 1 for c in program.collectives() for g in c.groups)


# the command


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """A small run, as a config file."""
    path = tmp_path / "tiny.py"
    path.write_text(
        "from zoo.data.synthetic import Synthetic\nfrom zoo.papers.tarflow import TarFlow\nfrom zoo.run import Run\n"
        "task = TarFlow(image=4, channels=1, patch=2, width=8, depth=1, blocks=1, head_dim=4)\n"
        "config = Run(task, Synthetic(), steps=1, batch=8)\n"
    )
    return str(path)


def test_what_fits_is_told_with_exit_code_0(
    tpu: None, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = tmp_path / "figures.json"
    assert cli.main(["compile", tiny, "--topology", "v5e:2x2", "--json", str(told), "mesh.fsdp=4", "mesh.data=1"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    figures = json.loads(told.read_text())
    assert figures["fits"] is True
    assert (figures["mesh"], figures["topology"]) == ("fsdp=4", "v5e:2x2 (4 devices, TPU v5e)")
    assert [line.partition("  ")[0] for line in out.splitlines()] == [key for key in figures if key != "fits"]


@pytest.mark.parametrize("flags", [[], ["--no-search"]])
def test_what_does_not_fit_is_told_with_exit_code_1(
    flags: list[str], tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aot, "target", lambda name, slices: here(dataclasses.replace(FAST, memory=1.0)))
    monkeypatch.setattr(aot, "nearest_fit", lambda run, to, failed, what, samples: f"try {what} with {samples}")
    told = tmp_path / "figures.json"
    command = ["compile", tiny, "--topology", "any", "--what", "sample", "--samples", "8", "--json", str(told)]
    assert cli.main([*command, *flags]) == 1
    out, err = capsys.readouterr()
    assert "sampler, 8 samples" in out
    figures = json.loads(told.read_text())
    assert figures["fits"] is False
    assert figures["peak / memory"] > 1
    first, *rest = err.splitlines()
    assert first == f"does not fit: it needs {figures['peak GiB']:.2f} GiB of 0.00 GiB a device"
    assert rest == ([] if flags else ["try sample with 8"])


def test_what_the_compiler_found_no_room_for_is_told_too(
    tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any) -> Any:
        raise aot._TooLarge(20.0 * 2**30, "RESOURCE_EXHAUSTED: used 20.00G of 16.00G")

    monkeypatch.setattr(aot, "_compile", no_room)
    monkeypatch.setattr(aot, "target", lambda name, slices: here(FAST))
    assert cli.main(["compile", tiny, "--topology", "any", "--no-search"]) == 1
    out, err = capsys.readouterr()
    assert "RESOURCE_EXHAUSTED: used 20.00G of 16.00G" in out
    assert err == "does not fit: it needs 20.00 GiB of 16.00 GiB a device\n"
