"""A paper of forty lines, with each single ability and with none: every command does its work or says in a sentence why not."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from toy import TOYS

from zoo import cli, encoders, metrics, papers, task
from zoo.commands import clocks
from zoo.train import checks

CONFIG = """
from toy import TOYS
from zoo.data.images import Arrays
from zoo.run import Checkpoint, Run, Samples
from zoo.train.optim import AdamW

config = Run(
    TOYS["{name}"](), Arrays("data.npz"), steps=4, batch=8, optim=AdamW(lr=0.01), checkpoint=Checkpoint(every=2),
    samples=Samples(n=4), workdir="run",
)
"""
# what a metric wants to be told before it measures anything
FIELDS = {
    "solvers": ["nfe=5", "samples=8", "sets=1", "converged=9"],
    "features": ["out=out.npz", "maps=false"],
    "frechet": ["features=pixels", "samples=8", "batch=8"],
    "convergence": ["samples=8", "batches=2", "modules=1", "rounds=1"],
    "agreement": ["samples=8", "batch=8"],
    "classes": ["samples=8", "batch=8"],
}
# metrics by the ability that they need and that is enough for them; `bpd` also wants to know how nats become bits
ENOUGH = {
    "sample": {"frechet", "classes"},
    "nll": set(),
    "denoise": {"denoising", "solvers"},
    "chain": {"convergence"},
    "features": {"probe", "knn", "features"},
    "logits": {"accuracy"},
}


OWN = (
    "sample",
    "crops",
    "before_step",
    "after_step",
)  # what the trainer asks for; the others train as the toy without any does


@pytest.fixture(scope="module", autouse=True)
def _one_device() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        one = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *_: one)  # compiles fastest
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, and a run of the toy without abilities that was stopped and went on."""
    folder, rng = tmp_path_factory.mktemp("toys"), np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (64, 4, 4), np.uint8), np.arange(64) % 2
    np.savez(folder / "data.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    (folder / "config.py").write_text(CONFIG.format(name=""))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for steps in (2, 4):
            assert cli.main(["train", "config.py", "--quiet", f"steps={steps}"]) == 0
    return folder


@pytest.fixture
def home(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(trained / "data.npz", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def as_if_trained(trained: Path, home: Path, name: str) -> None:
    """A run of a toy whose parameters and steps are those of the toy without abilities."""
    for path in shutil.copytree(trained / "run", home / "run").rglob("*"):
        if path.is_file() and b'"toy.Toy"' in (data := path.read_bytes()):
            path.write_bytes(data.replace(b'"toy.Toy"', f'"toy.{TOYS[name].__name__}"'.encode()))


def run(capsys: Any, *words: str) -> tuple[int, str, str]:
    """The exit code of a command, and what it printed; a mistake is a sentence without a traceback."""
    code = cli.main(list(words))
    out, err = capsys.readouterr()
    assert code in (0, 2), (words, code, err)
    assert "Traceback" not in err, (words, err)
    if code == 2:
        assert err.startswith(f"zoo {words[0]}: "), (words, err)
    return code, out, err


@pytest.mark.parametrize("name", TOYS)
def test_every_command_works_or_says_why_not(
    name: str, trained: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "config.py").write_text(CONFIG.format(name=name))
    allow = ("--allow", "toy")
    if name in OWN:
        assert run(capsys, "train", "config.py", "--quiet")[0] == 0
    else:
        as_if_trained(trained, home, name)
    steps = [json.loads(line)["step"] for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (steps[0], steps[-1]) == (1, 4)
    assert run(capsys, "show", "config.py")[0] == 0
    draws = run(capsys, "sample", "run", "n=2", *allow)
    assert draws[0] == (0 if name == "sample" else 2)
    assert name == "sample" or "has no sampler" in draws[2]
    for metric, cls in metrics.named().items():
        if name and task.ABILITIES.get(name) not in cls.needs and metric not in ENOUGH.get(name, ()):
            continue  # it lacks what the toy without abilities lacks
        code, _, err = run(capsys, "eval", "run", metric, *FIELDS.get(metric, []), *allow)
        assert code == (0 if metric in ENOUGH.get(name, ()) else 2), (metric, err)
    forms = {"zoo": {*TOYS}, "official": {"import_names"}, "stablehlo": {"sample", "features", "denoise"}}
    for form, can in forms.items():
        code, _, err = run(capsys, "export", "run", f"out-{form}.npz", "--format", form, "--samples", "2", *allow)
        assert code == (0 if name in can else 2), (form, err)


@pytest.mark.parametrize("name", ["", "sample", "crops"])
def test_what_can_be_timed_and_compiled_is(
    name: str, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clocks, "ROUND", 0.01)
    (home / "config.py").write_text(CONFIG.format(name=name))
    bench = ["bench", "config.py", "--rounds", "1", "--samples", "1"]
    code, out, _ = run(capsys, *bench)
    assert (code, "sample 1 images/s, ours" in out) == ((0, True) if name == "sample" else (2, False))
    if name != "sample":
        code, out, _ = run(capsys, *bench[:4], "--what", "train")
        assert (code, "sampler and crops" in out) == (0, name == "crops")
    for what in ("train", "sample"):  # where the compiler of TPUs is missing it says so
        run(capsys, "compile", "config.py", "--topology", "v5e:2x2", "--what", what)


def test_options_have_one_grammar(trained: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt option is told alike by the sampler, a run's sheets and a metric, as a whole and in part."""
    (home / "config.py").write_text(CONFIG.format(name="sample"))
    as_if_trained(trained, home, "sample")
    train, frechet = ["train", "config.py", "--quiet", "steps=1"], ["eval", "run", "frechet", *FIELDS["frechet"]]
    for name in ("spraed", "spread"):
        whole, part = f"options={{'{name}': 1.0}}", f"options.{name}=0.5"
        commands = {
            "a whole sheet": [*train, "workdir=a", f"samples.{whole}"],
            "a sheet": [*train, "workdir=b", f"samples.{part}"],
            "samples": ["sample", "run", "n=2", f"{name}=0.5", "--allow", "toy"],
            "a metric": [*frechet, part, "--allow", "toy"],
            "a whole metric": [*frechet, whole, "--allow", "toy"],
        }
        for what, words in commands.items():
            if name == "spread" and what in ("a whole sheet", "a metric"):
                continue  # each grammar once
            code, _, err = run(capsys, *words)
            assert code == (0 if name == "spread" else 2), (words, err)
            assert name == "spread" or "did you mean 'spread'" in err, err


def test_the_toys_have_one_ability_each() -> None:
    for name, cls in TOYS.items():
        assert isinstance(cls(), task.Task)
        assert task.abilities(cls()) == task.abilities(cls) == [name] * (name in task.ABILITIES)


def shipped_tasks() -> list[type]:
    found = [
        importlib.import_module(m.name)
        for p in (papers, encoders)
        for m in pkgutil.walk_packages(p.__path__, f"{p.__name__}.")
    ]
    classes = {
        cls for module in found for cls in vars(module).values() if isinstance(cls, type) and hasattr(cls, "about")
    }
    return sorted(classes, key=lambda cls: cls.__name__)


def strangers(cls: type) -> list[str]:
    """Methods of a task that are called like an ability and take something else."""
    pairs = [(getattr(cls, name), getattr(task.ABILITIES[name], name)) for name in task.abilities(cls)]
    words = [
        (
            own.__name__,
            *(list(inspect.signature(f).parameters)[: len(inspect.signature(like).parameters)] for f in (own, like)),
        )
        for own, like in pairs
    ]
    return [name for name, own, like in words if own[: len(like)] != like[: len(own)] or len(own) < len(like)]


def test_what_is_called_like_an_ability_is_one() -> None:
    assert len(shipped_tasks()) >= 10
    assert {cls.__name__: strangers(cls) for cls in shipped_tasks() if strangers(cls)} == {}
    other = type("Other", (TOYS[""],), {"predict": lambda self, params, z, i, j: z})
    assert strangers(other) == ["<lambda>"]


def test_a_violation_is_found(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that reads what the contract does not promise ends in a traceback here."""
    (home / "config.py").write_text(CONFIG.format(name=""))
    monkeypatch.setattr(checks, "check_looks", lambda run: run.task.patch)
    with pytest.raises(AttributeError, match="patch"):
        run(capsys, "train", "config.py", "--quiet")


def test_a_misspelt_word_is_an_error_at_once() -> None:
    with pytest.raises(TypeError, match="units"):
        task.About(units="texts")  # type: ignore[call-arg]
