"""`zoo bench`: figures that hang together, a peer that must be a twin, and sentences for mistakes."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fresh import exported, noise
from mistakes import told
from toy import TOYS
from unigram import Unigram, Windows

from zoo import models, weights
from zoo.cli import main
from zoo.commands import bench as module
from zoo.commands import bench_sampler, clocks
from zoo.commands.bench import bench
from zoo.commands.chips import Chip
from zoo.commands.tables import lines
from zoo.data.images import Images
from zoo.data.pipeline import Data, Source
from zoo.dist import Mesh
from zoo.errors import UserError
from zoo.papers.edm import Edm, UNet
from zoo.papers.starflow import StarFlow
from zoo.papers.tarflow import TarFlow
from zoo.run import Run
from zoo.task import About, Name, image_spec
from zoo.train.optim import AdamW


@dataclass(frozen=True)
class Options:
    spread: float = 1.0
    nfe: int = 0
    network_calls: int = 1


@dataclass(frozen=True)
class Scales:
    """A flow of one scale for each pixel, with what `zoo bench` asks of a task: its programs compile at once."""

    dtype: str = "float32"

    Sampling = Options
    about = About(classes=3)
    tokens, dims = 4, 4

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        return image_spec(batch, 4, 1, 3)

    def init(self, rng: jax.Array) -> Any:
        return {"scale": jnp.ones(16)}

    def loss(self, params: Any, batch: Any, rng: jax.Array) -> Any:
        return jnp.square(batch["image"].reshape(-1, 16) * params["scale"]).mean(), {}

    def inverse(self, params: Any, z: Any, label: Any = None) -> Any:
        shift = 0.0 if label is None else jnp.asarray(label, jnp.float32)[:, None]
        return (z.reshape(-1, 16) / params["scale"] + shift).reshape(-1, 4, 4, 1)

    def sample(self, params: Any, rng: Any, n: int, conditions: Any = None, options: Any = None) -> Any:
        return {"image": self.inverse(params, jax.random.normal(rng, (n, 4, 4))) * (options or Options()).spread}

    def import_names(self) -> list[Name]:
        return [Name("s", "scale")]

    def flops(self) -> float:
        return 48.0


TASK = TarFlow(image=4, channels=1, patch=2, width=8, depth=1, blocks=2, head_dim=8, classes=3)
# unless it is asked for, bench must not open the data
RUN = Run(task=Scales(), data=Images("nowhere", size=4), steps=4, batch=8, optim=AdamW(decay_all=True), ema=0.9)
FLOW = replace(RUN, task=TASK)

# A twin in our own code, so that no PyTorch is needed; what WRONG_* add is what a bad twin would get wrong.
PEER = """
import numpy as np, jax, time
from dataclasses import replace
from zoo import weights

class Peer:
    asked = 0
    def __init__(self, task): self.task = replace(task, noise=0.0, drop=0.0) if hasattr(task, "drop") else task
    def load(self, state): self.params = weights.from_official(self.task, state)
    def place(self, batch): return batch
    def train_step(self, batch, sync=True): time.sleep(0.02)
    def sample(self, n): time.sleep(0.02)
    def loss(self, batch):
        ours = jax.jit(lambda p, b: self.task.loss(p, b, jax.random.key(0))[0])
        return float(ours(self.params, batch)) + WRONG_LOSS
    def inverse(self, z, label=None): return np.asarray(self.task.inverse(self.params, z, label)) + WRONG_INVERSE
    def peak_memory(self):
        self.asked += 1
        return 2**20 if self.asked == 1 else 0  # like a counter that asking resets

def build(task): return Peer(task)
"""


def peer(folder: Path, loss: str = "0.0", inverse: str = "0.0") -> str:
    path = folder / "peer.py"
    path.write_text(PEER.replace("WRONG_LOSS", loss).replace("WRONG_INVERSE", inverse))
    return str(path)


def on_one_device(self: Mesh, devices: Any = None, *rest: Any, build: Any = Mesh.build, **more: Any) -> Any:
    return build(self, jax.devices()[:1] if devices is None else devices[:1], *rest, **more)


@pytest.fixture(autouse=True)
def _short_rounds_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "ROUND", 0.01)
    monkeypatch.setattr(Mesh, "build", on_one_device)


def test_figures_hang_together(tmp_path: Path) -> None:
    result = bench(RUN, peer=peer(tmp_path), samples=2, rounds=2, about={"command": "zoo bench x"})
    figures = json.loads(json.dumps(result))
    assert figures["command"] == "zoo bench x"
    assert set(figures["largest difference to the peer"]) == {"loss", "inverse"}
    assert max(figures["largest difference to the peer"].values()) < 1e-4
    for what, items in (("train", 8), ("sample 1", 1), ("sample 2", 2)):
        for side in ("ours", "peer"):
            times = figures[f"{what} ms, {side}"]
            assert 0 < times["min"] <= times["median"] <= times["max"]
            assert figures[f"{what} images/s, {side}"] == pytest.approx(1e3 * items / times["median"])
        assert figures[f"{what} ms, peer"]["min"] >= 20
        ours, theirs, ratio = (figures[k] for k in (f"{what} ms, ours", f"{what} ms, peer", f"{what}, ours / peer"))
        lowest, highest = ours["min"] / theirs["max"], ours["max"] / theirs["min"]
        assert lowest <= ratio["min"] * 1.001 <= ratio["max"] * 1.002 <= highest * 1.003  # the same but for rounding
    each = figures["train each step ms"]
    assert 0 < each["p10"] <= each["p50"] <= each["p90"] <= each["max"]
    assert 2 <= each["steps"] <= 100
    assert figures["train model TFLOP/s"] * 1e12 == pytest.approx(48 * figures["train images/s, ours"])
    assert 0 < figures["train trace s"] < figures["train compile s"]
    assert figures["train compile s, warm"] > 0  # a sentence where the second compilation read nothing
    assert "train utilisation of bf16 peak" not in figures  # a CPU has no entry in the table
    assert not [k for k in figures if k.startswith("data")]
    planned = figures["peak device memory MiB, planned by the compiler"]
    program = figures["train program MiB"]
    assert program["temporaries"] < planned <= 2 * program["arguments"] + program["temporaries"]
    assert figures["peak host memory MiB, with the peer"] > 50
    assert figures["peak device memory MiB, peer"] == 1
    assert len(lines(result).splitlines()) == len(figures)


def test_unsteady_rounds_are_named_and_steady_ones_not() -> None:
    figures: dict[str, object] = {}
    clocks.compare(figures, "train", {"ours": [1.0, 1.1], "peer": [0.1, 4.0]}, 8)
    assert "train unsteady, ours" not in figures
    assert "factor of 40.0" in str(figures["train unsteady, peer"])
    assert "do not quote" in lines(figures)


# --- utilisation and memory -----------------------------------------------------------------------


def stepper(run: Run) -> module._Stepper:
    """A step that adds up its batches, without a model."""

    def add(total: jax.Array, batch: Any) -> tuple[jax.Array, None]:
        return total + batch["image"].sum(), None

    program = jax.jit(add).lower(jnp.zeros(()), run.spec()).compile()
    return module._Stepper(program, jnp.zeros(()), {k: jnp.zeros(v.shape, v.dtype) for k, v in run.spec().items()})


def test_utilisation_is_the_models_share_of_the_chips_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    chip = Chip("made up", "cpu", 2e9, None, None, None, None, "nowhere")
    monkeypatch.setattr(module, "chip_of", lambda kind: chip)
    monkeypatch.setattr(module, "count_chips", lambda devices: 4)
    figures = module.time_step(RUN, RUN.mesh.build(), stepper(RUN), None, None, rounds=1)
    assert figures["train utilisation of bf16 peak"] == pytest.approx(figures["train model TFLOP/s"] * 1e12 / (4 * 2e9))
    assert module.environment(RUN, RUN.mesh.build())["chips"] == "made up x 4"
    unknown = replace(chip, peak=None)
    monkeypatch.setattr(module, "chip_of", lambda kind: unknown)
    assert "train utilisation of bf16 peak" not in module.time_step(
        RUN, RUN.mesh.build(), stepper(RUN), None, None, rounds=1
    )


def test_a_task_that_does_not_count_its_operations_is_counted() -> None:
    plain = SimpleNamespace(about=TASK.about, spec=TASK.spec, init=TASK.init, loss=TASK.loss)
    step = stepper(FLOW)
    figures = module.time_step(replace(FLOW, task=plain), RUN.mesh.build(), step, None, None, rounds=1)
    assert step.median is not None
    counted = figures["train model TFLOP/s"] * 1e12 * step.median / RUN.batch
    # the task's own figure leaves out what a causal mask hides, which plain attention computes
    assert 0.8 * TASK.flops() < counted < 1.5 * TASK.flops()


def test_devices_that_count_their_memory_are_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = [SimpleNamespace(memory_stats=lambda n=n: {"peak_bytes_in_use": n * 2**20}) for n in (3, 7, 5)]
    silent = SimpleNamespace(memory_stats=lambda: None)
    monkeypatch.setattr(jax, "local_devices", lambda: [*counted, silent])
    figures = module.peak_memory(stepper(RUN), None)
    assert figures["peak device memory MiB"] == 7
    assert not any("planned" in k or "peer" in k for k in figures)
    monkeypatch.setattr(jax, "local_devices", lambda: [silent])
    assert not any("device" in k for k in module.peak_memory(None, None))  # nothing was compiled, nothing is claimed


# --- the sampler ----------------------------------------------------------------------------------


def test_methods_are_timed_with_the_weights_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, twin = str(exported(tmp_path / "model", TASK, noise(TASK, 0.2), kind="ema")), Path(peer(tmp_path))
    twin.write_text(
        twin.read_text().replace("def inverse", "def slow_inverse")
    )  # that of the peer is not compared here
    twins: list[Any] = []
    load = module.load_peer
    monkeypatch.setattr(module, "load_peer", lambda *given: (twins.append(load(*given)), twins[-1])[1])
    short = "modules=1 sweeps=1 unconverged=keep"
    figures = bench(
        replace(FLOW, task=replace(TASK, scan=False)),  # its layers lie otherwise than those of the model
        peer=str(twin),
        what="sample",
        samples=1,
        rounds=2,
        model=name,
        methods=["modules=0,2  tol=1e-6", short, "sequential"],  # the last is ours
    )
    json.dumps(figures)
    assert figures["sampler weights"] == f"{name}, ema, step 5"
    methods = ("jacobi", "gs_jacobi", "modules=0,2 tol=1e-6", short)
    sides = ("ours", *methods, "peer")
    assert [k for k in figures if k.startswith("sample 1 ms, ")] == [f"sample 1 ms, {side}" for side in sides]
    for method in methods:
        times, ours, theirs = (figures[f"sample 1 ms, {side}"] for side in (method, "ours", "peer"))
        assert figures[f"sample 1 images/s, {method}"] == pytest.approx(1e3 / times["median"])
        for other, of in (("ours", ours), ("peer", theirs)):
            ratio = figures[f"sample 1, {method} / {other}"]
            assert times["min"] / of["max"] <= ratio["min"] * 1.001 <= ratio["max"] * 1.002
        assert set(figures[f"sample 1 program MiB, {method}"]) == {"arguments", "temporaries"}
    assert "sample 1, ours / peer" in figures
    assert not any(k.startswith("sample 1, peer") for k in figures)
    for method in methods[:3]:
        assert figures[f"sample 1 error, {method}"] < 1e-4
        assert f"sample 1 unconverged, {method}" not in figures
    assert figures[f"sample 1 error, {short}"] > 1e-4  # these weights need more than a sweep
    assert figures[f"sample 1 unconverged, {short}"] == 2
    assert figures[f"sample 1 sweeps, {short}"] == [1, 1]
    assert all(1 < n <= 3 for n in figures["sample 1 sweeps, jacobi"])
    swept = figures["sample 1 sweeps, modules=0,2 tol=1e-6"]
    assert swept[0] == 0
    assert swept[1] > 1
    # the peer samples with the same weights
    given = weights.matching(models.open_model(name).params, twins[0].params)
    jax.tree.map(np.testing.assert_array_equal, given, twins[0].params)


def test_caches_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    task = StarFlow(latent=(4, 4), channels=2, width=8, depths=(1, 1), head_dim=8)
    monkeypatch.setattr(bench_sampler, "make_sampler", lambda *_: lambda params, key, given: {"latent": params})
    figures = module.time_sampler(replace(RUN, task=task), jnp.zeros(2), None, 2, 1)
    # keys and values of 2 samples, 16 tokens and 8 numbers in float32
    assert figures["sample 2 caches of a block MiB"]["deep"] * 2**20 == 2 * 2 * 16 * 8 * 4


def test_samples_that_differ_are_told_apart() -> None:
    ours = {"latent": np.array([[0.0, 1.0], [np.nan, 2.0]])}
    near = {"latent": ours["latent"] + 0.25}
    far = {"latent": np.array([[0.0, 1.0], [0.0, np.nan]]), "sweeps": np.array([[1, 4], [3, 2]])}
    far["unconverged"] = np.array([[False, True], [False, False]])
    figures = bench_sampler._told({"ours": ours, "near": near, "far": far}, 2)
    assert figures == {
        "sample 2 error, near": 0.25,
        "sample 2 sweeps, near": "none: every block goes token by token",
        "sample 2 error, far": "1 of 2 samples are finite on one side only",
        "sample 2 sweeps, far": [3, 4],
        "sample 2 unconverged, far": 1,
    }


EDM = Edm(image=4, channels=1, classes=3, network=UNet(width=8, multiples=(1,), blocks=1))


def test_options_are_timed_in_turn_with_the_first_of_them() -> None:
    first, second = "spread=2 nfe=4", "nfe=9"
    figures = bench(RUN, what="sample", samples=1, rounds=2, options=["spread=2  nfe=4", second])
    json.dumps(figures)
    assert [k for k in figures if k.startswith("sample 1 ms, ")] == [f"sample 1 ms, {k}" for k in (first, second)]
    for side, calls in ((first, 4), (second, 9)):
        assert figures[f"sample 1 ms a call, {side}"] == pytest.approx(
            figures[f"sample 1 ms, {side}"]["median"] / calls
        )
    one, other, ratio = (figures[f"sample 1{k}"] for k in (f" ms, {first}", f" ms, {second}", f", {second} / {first}"))
    assert other["min"] / one["max"] <= ratio["min"] * 1.001 <= ratio["max"] * 1.002
    assert f"sample 1, {first} / {second}" not in figures
    assert not any("error" in key or "ours" in key or key.startswith(("train", "data")) for key in figures)


def test_the_first_options_hold_for_the_other_config_as_far_as_it_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(
        module, "make_sampler", lambda task, n, options: made.append(options) or (lambda *_: jnp.ones(n))
    )
    other = replace(RUN, task=TOYS["sample"]())  # whose options are `spread` alone
    figures = bench(RUN, what="sample", samples=1, rounds=1, options=["spread=3 nfe=4", "spread=2"], against=other)
    assert made == [{"spread": 3.0}]
    assert figures["sampler options, against"] == "its defaults in place of nfe=4, which its sampler has not"
    assert {"sample 1, spread=3 nfe=4 / against", "sample 1, spread=2 / against"} <= set(figures)
    assert "sampler options, against" not in bench(
        RUN, what="sample", samples=1, rounds=1, options=["nfe=4"], against=RUN
    )


def test_fresh_weights_of_a_flow_say_nothing_of_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_methods", lambda task: True)
    figures = bench(RUN, what="sample", samples=1, rounds=1)
    assert "--model" in figures["sampler weights"]
    assert [k for k in figures if k.endswith(" ms, ours")] == ["sample 1 ms, ours"]


def test_options_that_are_none_are_told_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "compile_step", lambda *_, **__: pytest.fail("compiled"))
    run, mute = replace(RUN, task=EDM), SimpleNamespace(about=EDM.about, spec=EDM.spec, init=EDM.init, loss=EDM.loss)
    for one, fields, words in (
        (run, {"options": ["nfe=35", "solvr=heun"]}, "--with 'solvr=heun': solvr 'solver'?"),
        (run, {"options": ["solver=heum"]}, "--with 'solver=heum': 'heun'?"),
        (run, {"options": ["heun"]}, "--with 'heun' field=value"),
        (run, {"options": ["solver=heun nfe=8"]}, "nfe=8 odd 7 9"),
        (run, {"options": ["levels.high=99"]}, "--with 'levels.high=99': 80 levels.high"),  # the task is asked as well
        (run, {"options": ["nfe=5"], "what": "train"}, "--with --what train"),
        (FLOW, {"options": ["guidance=1"], "methods": ["jacobi"]}, "--with --method"),
        (replace(RUN, task=mute), {"options": ["nfe=5"]}, "SimpleNamespace sampler"),
    ):
        with told(*words.split()):
            bench(one, **fields)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("newton", "'newton'"),
        ("auto", "open"),
        ("module=4", "module Jacobi 'modules'"),
        ("modules=4 jacobi", "'jacobi'"),
        ("modules=1,2,3", "3 2"),
    ],
)
def test_a_method_that_is_none(tmp_path: Path, method: str, says: str) -> None:
    model = models.Model(TASK, {}, "raw", None, None, (), tmp_path)
    with told(f"--method '{method}'", *says.split()):
        module.inverses(TASK, model, [method])


def test_a_model_that_is_none_and_nothing_to_time(tmp_path: Path) -> None:
    name = str(exported(tmp_path / "model", replace(TASK, dtype="bfloat16", width=16, blocks=1)))
    for run, fields, words in (
        (FLOW, {"what": "sample", "model": name}, "task.width: 8 -> 16"),
        (FLOW, {"what": "sample", "model": "nowhere"}, "nowhere"),
        (RUN, {"what": "train", "model": name}, "--model --what train"),
        (RUN, {"what": "data", "methods": ["jacobi"]}, "--method --what data"),
        (FLOW, {"what": "sample", "methods": ["jacobi"]}, "--method --model"),
        (RUN, {"what": "sample", "model": name}, "flow Scales"),
        (RUN, {"rounds": 0}, "--rounds 0"),
        (RUN, {"samples": (16, 0)}, "--samples 0"),
        (RUN, {"peer": "peer.py", "what": "data"}, "--peer --what data"),
    ):
        with told(*words.split()):
            bench(run, **fields)


# --- the data -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counted(Data):
    """Images whose pixels are their index; `seen` is what was read."""

    size: int = 64
    broken: int = -1  # an index that cannot be read
    seen: list[int] = field(default_factory=list)

    def source(self, split: str, spec: Any = None) -> Any:
        data = self

        class Examples(Source):
            def __len__(self) -> int:
                return data.size

            def __getitem__(self, index: int) -> dict[str, np.ndarray]:
                if index == data.broken:
                    raise UserError(f"example {index} cannot be read; delete it")
                data.seen.append(index)
                return {"image": np.full((4, 4, 1), index, np.float32), "label": np.asarray(index % 3, np.int32)}

        return Examples()


def test_the_pipeline_alone_and_feeding_the_step() -> None:
    run = replace(RUN, data=Counted())
    step = stepper(run)
    taken: list[np.ndarray] = []
    program = step.program
    step.program = lambda state, batch: (taken.append(np.asarray(batch["image"][:, 0, 0, 0])), program(state, batch))[1]
    step.median = 0.005
    figures = module.time_data(run, run.mesh.build(), 2, step)
    assert figures["data first batch ms"] > 0
    for where in ("host", "devices"):
        times = figures[f"data ms, {where}"]
        assert figures[f"data images/s, {where}"] == pytest.approx(8e3 / times["median"])
    ratio = figures["data, devices / train images/s"]
    assert ratio == pytest.approx(figures["data images/s, devices"] * 0.005 / 8)
    fed = figures["train ms, fed by the data"]["median"]
    assert figures["train, fed by the data / ours"] == pytest.approx(fed / 1e3 / 0.005)
    # what the step was fed are the run's own training batches, in their order
    feed = run.batches(0)
    np.testing.assert_array_equal(taken, [next(feed)["image"][:, 0, 0, 0] for _ in taken])
    feed.close()
    assert len(taken) == module._AHEAD + 2 * 2


@pytest.mark.parametrize("data", [Images("nowhere", size=4), Counted(broken=5)], ids=["missing", "broken"])
def test_data_that_cannot_be_read_is_a_line_and_the_rest_goes_on(
    data: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "compile_twice", lambda *_: (stepper(RUN).program, {"train compile s": 1.0}))
    monkeypatch.setattr(module, "time_step", lambda *_: {"train ms, ours": {}})
    monkeypatch.setattr(module, "time_sampler", lambda *_: {"sample 1 ms, ours": {}})
    figures = bench(replace(RUN, data=data), what="all", rounds=1)
    assert str(figures["data"]).startswith("not measured: ")
    assert ("nowhere does not exist" in figures["data"]) or ("example 5 cannot be read" in figures["data"])
    assert {"train ms, ours", "sample 1 ms, ours", "peak host memory MiB"} <= set(figures)
    with told(data.path if isinstance(data, Images) else "example 5"):
        bench(replace(RUN, data=data), what="data", rounds=1)


# --- the command and its records ------------------------------------------------------------------


def test_the_command_writes_what_it_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    command = "bench tarflow/digits:smoke batch=4 --what data --rounds 1"
    assert main([*command.split(), "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert figures["command"] == "zoo bench tarflow/digits:smoke batch=4 --what data --samples 16 --rounds 1"
    assert figures["batch"] == 4
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == list(figures)


def test_the_command_passes_on_sizes_model_methods_and_options(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(module, "bench", lambda run, **given: asked.update(given) or {"x": 1})
    command = "bench tarflow/digits:smoke --what sample --samples 16,64 --model m --method jacobi"
    extra = ["--method", "modules=2 tol=1e-3", "--with", "temperature=0.5 denoise=0", "--with", "guidance=1"]
    assert main([*command.split(), *extra]) == 0
    assert (asked["samples"], asked["model"]) == ((16, 64), "m")
    assert asked["methods"] == ["jacobi", "modules=2 tol=1e-3"]
    assert asked["options"] == ["temperature=0.5 denoise=0", "guidance=1"]
    assert asked["about"]["command"] == (
        "zoo bench tarflow/digits:smoke --what sample --samples 16,64 --rounds 5 --model m --method jacobi "
        "--method 'modules=2 tol=1e-3' --with 'temperature=0.5 denoise=0' --with guidance=1"
    )


@pytest.mark.parametrize("samples", ["16,", "1.5", ""])
def test_batch_sizes_that_are_none(samples: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tarflow/digits:smoke", "--samples", samples]) == 2
    assert f"--samples {samples}".strip() in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_found_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "bench", lambda *_, **__: pytest.fail("measured"))
    assert main(["bench", "tarflow/digits:smoke", "--json", str(tmp_path / "no" / "figures.json")]) == 2
    assert "its folder does not exist" in capsys.readouterr().err


# --- the peer -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrong", "by"), [("loss", "0.01"), ("inverse", "float('nan')")])
def test_a_peer_that_differs_is_no_twin(tmp_path: Path, wrong: str, by: str) -> None:
    with told(wrong, "differs"):
        bench(RUN, peer=peer(tmp_path, **{wrong: by}), what="sample")


def test_bf16_allows_what_float32_does_not(tmp_path: Path) -> None:
    run = replace(RUN, task=Scales("bfloat16"))
    assert "sample 2 ms, ours" in bench(run, peer=peer(tmp_path, "0.01"), what="sample", samples=2, rounds=1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "file"),
        ("x = 1\n", "build(task)"),
        ("import torch_that_is_not_there\n", "'torch_that_is_not_there'"),
        ("raise ModuleNotFoundError(name='torch')\n", "`torch`"),
    ],
)
def test_a_peer_file_that_is_none(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "bad.py"
    if text is not None:
        path.write_text(text)
    with told("bad.py", says):
        bench(RUN, peer=str(path))


# --- another config -------------------------------------------------------------------------------

TWO = """
from zoo.run import Run
from unigram import Unigram, Windows

ours = Run(Unigram(), Windows(), steps=4, batch=8)
theirs = Run(Unigram(vocab=30, length=16), Windows(), steps=9, batch=16, accumulate=2)
number = ours.task
"""


def test_another_config_takes_turns_with_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "two.py").write_text(TWO)
    two, out = tmp_path / "two.py", tmp_path / "out.json"
    assert main(f"bench {two}:ours --against {two}:theirs --rounds 2 --samples 1 --json {out}".split()) == 0
    figures = json.loads(out.read_text())
    assert figures["command"].endswith(f"--against {two}:theirs")
    assert (figures["parameters"], figures["parameters, against"]) == (27, 30)
    assert (figures["task, against"], figures["batch"], figures["accumulate"]) == ("Unigram", 8, 1)
    for what, items in (("train", 8), ("sample 1", 1)):  # as many for both
        for side in ("ours", "against"):
            times = figures[f"{what} ms, {side}"]
            assert figures[f"{what} sequences/s, {side}"] == pytest.approx(1e3 * items / times["median"])
        ratio = figures[f"{what}, ours / against"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
        assert f"{what}, against / ours" not in figures
    assert not any("images/s" in key for key in figures)
    assert main(f"bench {two}:ours --against {two}:number".split()) == 2
    assert "two.py:number holds a Unigram, not a Run" in capsys.readouterr().err


def test_another_config_must_have_what_is_timed() -> None:
    silent: Any = SimpleNamespace(task=SimpleNamespace())
    texts = Run(Unigram(), Windows(), steps=1, batch=8)
    for run, against, what, words in (
        (RUN, silent, "both", "SimpleNamespace --what train"),
        (RUN, texts, "both", "Unigram sequences Scales images"),
        (texts, RUN, "train", "Scales images Unigram sequences"),
        (RUN, RUN, "data", "--what data"),
    ):
        with told("--against", *words.split()):
            bench(run, against=against, what=what)


def test_an_energy_is_timed_with_its_score_and_alone() -> None:
    run = replace(RUN, task=TOYS["energy"]())
    figures = bench(run, what="energy", samples=(2, 3), rounds=1)
    for n in (2, 3):
        ratio = figures[f"energy {n} ms, with score"]["median"] / figures[f"energy {n} ms, alone"]["median"]
        assert figures[f"energy {n}, with score / alone"]["median"] == pytest.approx(ratio)
    assert not [name for name in figures if name.startswith(("train", "sample"))]
    with told("--what energy needs 'energy'", "Scales"):
        bench(RUN, what="energy")
    with told("--against has no part in --what energy"):
        bench(run, what="energy", against=run)
