"""The command line, in process: what works on one tiny run, and how mistakes are told."""

import dataclasses
import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from fresh import exported
from mistakes import Payload, told
from PIL import Image

import zoo
from zoo import cli, draws, models, process, weights
from zoo.commands import sample
from zoo.commands.prepare import check_spelling
from zoo.data.synthetic import Synthetic
from zoo.data.text.vocabulary import text8
from zoo.draws import KEYS, label_numbers
from zoo.encoders.text import T5
from zoo.papers.energy.mixtures import CORNERS
from zoo.papers.starflow import StarFlow
from zoo.papers.tarflow import TarFlow
from zoo.papers.tarflow_lm import Layer, TarFlowLM

SMOKE = "tarflow/digits:smoke"
TASK = TarFlow(image=4, channels=1, patch=2, width=8, depth=1, blocks=2, head_dim=8, noise_type="uniform", levels=17)

LATENTS = StarFlow(latent=(4, 4), channels=2, width=32, depths=(1, 1), head_dim=32, reach=4.0, classes=2)
TEXT = dataclasses.replace(
    LATENTS,
    classes=0,
    text_tokens=4,
    text_width=8,
    text=T5(width=8, heads=1, head_dim=8, mlp=8, depth=1, vocab=40, tokens=4),
)
LM = TarFlowLM(length=8, dims=2, layers=(Layer("mixd", depth=1, components=27),), width=8, head_dim=8)


def export_of(folder: Path, task: Any, /, **about: Any) -> Path:
    """An export of random weights; `about` overrides what its config says."""
    return exported(folder, task, None, Synthetic(), ("cat", "dog"), about=about)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, exports, and everything the mistakes below need; the working folder of all tests here."""
    root = tmp_path_factory.mktemp("cli")
    assert cli.main(["train", SMOKE, f"workdir={root}/run", "samples.n=0", "--quiet"]) == 0
    (root / "file").write_text("not a folder")

    cond = dataclasses.replace(TASK, classes=2)
    export_of(root / "cond", cond)
    (root / "outsider.py").write_text("raise SystemExit('imported')")
    (root / "mute.py").write_text(
        "import jax\nfrom dataclasses import dataclass\n@dataclass(frozen=True)\nclass Mute:\n    width: int = 2\n"
        "    held = ()\n"
        "    def spec(self, batch): return {'x': jax.ShapeDtypeStruct((batch, self.width), 'float32')}\n"
        "    def init(self, rng): return {'w': jax.numpy.ones(self.width)}\n"
        "    def loss(self, params, batch, rng): return (batch['x'] @ params['w']).mean(), {}\n"
    )
    export_of(root / "latents", LATENTS)
    export_of(root / "text", TEXT)
    export_of(root / "stored", dataclasses.replace(TEXT, text=None, captions="features"))
    text8().save(export_of(root / "lm", LM))
    export_of(root / "foreign", TASK, task={"class": "outsider.Task", "width": 2})
    export_of(root / "foreign_data", TASK, data={"class": "outsider.Data"})
    weights.save(
        root / "mute",
        {"w": np.ones(2, np.float32)},
        {"format": 1, "task": {"class": "mute.Mute"}, "data": None, "labels": []},
        "a card",
    )
    data = (export_of(root / "flipped", TASK) / "model.safetensors").read_bytes()
    (root / "flipped" / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    official = weights.to_official(TASK, zoo.load(str(root / "run"))[1])
    official["blocks.7.extra"] = official.pop("blocks.0.proj_in.bias")
    np.savez(root / "unfit.npz", **official)
    (root / "evil.pth").write_bytes(pickle.dumps(Payload(root / "payload-ran"), protocol=2))

    for name in ("colour", "late"):
        (root / name).mkdir()
        for i in range(8):
            Image.new("RGB", (4, 4), "white").save(root / name / f"{i}.png")
    (root / "late" / "7.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (root / "folder.py").write_text(
        "from zoo.data.images import Images\nfrom zoo.papers.tarflow import TarFlow\nfrom zoo.run import Run\n"
        "task = TarFlow(image=4, channels=3, patch=2, width=8, depth=1, blocks=2, head_dim=8)\n"
        f"config = Run(task, Images({str(root / 'colour')!r}, size=4, test_fraction=0), steps=1, batch=8)\n"
        "number = task\n"
    )
    (root / "story.txt").write_text("Once upon a time, there were 3 bears. " * 20)
    (root / "words.py").write_text(
        "from zoo.data.text.tokens import Text\nfrom zoo.papers.tarflow_lm import DiscreteLM\nfrom zoo.run import Run\n"
        "task = DiscreteLM(length=8, width=8, depth=1, head_dim=8)\n"
        "config = Run(task, Text('story.txt'), steps=1, batch=8)\n"
    )
    steps = [f"{i},{i % 5}" for i in range(64)]
    (root / "waves.csv").write_text("left,right\n" + "\n".join(steps) + "\n")
    (root / "series.py").write_text(
        "from zoo.data.series import Series\nfrom zoo.papers.part import Part\nfrom zoo.run import Run\n"
        "task = Part(image=0, length=16, channels=2, patch=4, width=8, depth=1, head_dim=8, pairs=8)\n"
        "config = Run(task, Series('waves.csv', length=16), steps=1, batch=8)\n"
    )
    return root


@pytest.fixture(autouse=True)
def here(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in the folder of the fixture, with its modules importable but not imported."""
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(root)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("outsider", "mute"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def snapshot(folder: Path) -> dict[str, int]:
    """Every path below a folder, files with the time they were written."""
    return {str(p): p.stat().st_mtime_ns if p.is_file() else 0 for p in folder.rglob("*")}


def png(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image, np.int32)


def succeeds(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a command that must succeed prints."""
    capsys.readouterr()
    code = cli.main(argv)
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


# mistakes

LONG = "x" * 300
MISTAKES = {  # a command, and what its sentence must name
    f"train {SMOKE} optim.lrr=1": "optim.lrr AdamW 'lr'?",
    f"train {SMOKE} steps=many": "steps=many 2147483647",
    f"train {SMOKE} steps=1 steps=2": "steps twice",
    "train tarflow/digit": "'tarflow/digits'?",
    "train folder.py:number": "folder.py:number TarFlow Run",
    f"train {SMOKE} task.patch=3": "task.patch=3 task.image=4",
    f"train {SMOKE} batch=13": "batch=13 2",
    f"train {SMOKE} task.classes=1": "2 task.classes=1",
    "train folder.py task.classes=2": "task.classes=0",
    "train folder.py data.path=colours": "colours mean",
    "train folder.py data.size=8": "task.image=8 data.size=4",
    "train series.py data.length=8": "task.length=8 data.length=16",
    "train words.py task.vocab=50257": "27 task.vocab=50257",
    f"train {SMOKE} workdir=run optim.lr=0.5": "workdir=run optim.lr: 0.001 0.5",
    f"train {SMOKE} workdir=colour": "workdir=colour 0.png",
    f"train {SMOKE} workdir=file": "file",
    f"train {SMOKE} --profile=5": "--profile 5 FIRST:LAST",
    f"train {SMOKE} --profile=1:2:3": "--profile 1:2:3 FIRST:LAST",
    "sample cont": "cont",
    "sample cond label=dgo": "label='dgo' 'dog'?",
    "sample run label=1": "label=1 unconditional",
    "sample run guidence=1": "'guidence' 'guidance'?",
    "sample text prompt=cat prompts=file": "prompt= prompts=",
    "sample text prompts=no.txt": "prompts=no.txt directory",
    "sample stored prompt=cat": "features",
    "sample stored": "caption",
    "sample lm strength=0.3": "strength=0.3",
    "sample run aspect=16:9": "aspect=16:9 TarFlow",
    "sample latents aspect=16:9 grid=4,8": "aspect=16:9 grid=",
    "sample latents": "task.vae weights.vae",
    "sample run --batch 0": "--batch 0",
    "sample run n=1 --out file/samples": "file/samples",
    "sample run n=1 --out colour": "colour",
    "sample foreign": "outsider.Task zoo",
    "sample foreign --allow mute": "outsider.Task",
    "sample flipped": "model.safetensors sha256",
    "eval foreign_data bpd": "outsider.Data --allow",
    "eval run bdp": "'bdp' 'bpd'?",
    "eval run bpd drws=1": "drws Bits 'draws'?",
    "eval run typescore/rapidocr": "TypeScore typescore/rapidocr",
    "eval typescore/model": "prompted MODEL",
    f"eval typescore/oracle images={LONG}": "images= long",
    "eval run prompted": "prompted scorer",
    "export run file/export": "file/export directory",
    "export run colour": "colour",
    "export run unfit.npz --format official": "unfit.npz",
    "export run weights.xyz --format official": "weights.xyz '.xyz'",
    "export run new --format stablehlo --samples 0": "--samples 0",
    "export run new temperature=2": "temperature=2 --format zoo stablehlo",
    "export run new --format stablehlo temprature=2": "temprature 'temperature'?",
    "export run new --format stablehlo guidance=-1": "guidance",
    "export run new --format stablehlo method=newton": "method=newton gs_jacobi",
    "export latents new --format stablehlo grid=0,4": "grid",
    f"import {SMOKE} no.npz new": "no.npz",
    f"import {SMOKE} unfit.npz new": "(1): blocks.0.proj_in.bias blocks.7.extra",
    f"import {SMOKE} unfit.npz new task.width=16": "shape",
    f"bench {SMOKE} --rounds 0": "--rounds 0",
    f"bench {SMOKE} --against tarflow/digit": "'tarflow/digits'?",
    "prepare images colours new": "colours",
    "prepare images colour new size=0": "size=0 1",
    "prepare images colour new sizes=4": "'size'?",
    "prepare images colour new channels=2": "channels=2 1, 3",
    "prepare text story.txt new": "tokenizer= text8",
    "prepare text story.txt new tokenizer=text8 test_fraction=1": "test_fraction=1",
    "prepare latents colour new vae=cond": "size=",
    "prepare latents colour new size=4": "vae= autoencoder",
    "prepare latents colour new size=4 vae=kond": "vae=kond import",
    "prepare latents colour new size=4 vae=cond features=true": "features= text=",
    "prepare statistics colour new.npz": "size=",
    "prepare statistics colour new size=4": "DEST new",
    "prepare statistics colour new.npz features=cond size=4": "[4, 1] 3]",
    f"show {SMOKE} --devices 8": "--devices --shardings",
    f"show {SMOKE} --shardings --devices ²": "--devices ² v5p:4x4x4",
    f"show {SMOKE} --shardings --devices v5e:0x4": "v5e:0x4",
    f"show {SMOKE} --shardings --devices 16 mesh.fsdp=16": "('fsdp',) 16 8",
    f"compile {SMOKE} --topology v9:2x2": "--topology v9:2x2",
}


OLDER = {  # `zoo prepare` as versions before had it
    "colour new": "images colour new",
    "--size=4 colour new --channels 1 --allow-unreadable": "images colour new size=4 channels=1 allow_unreadable=true",
    "colour new --size 4 --encode vae=a --encode text=b --raw": "latents colour new vae=a text=b --raw size=4",
    "colour new --encode vae=a --allow x --channels 3 --aspects": "latents colour new vae=a --allow=x aspects=true",
    "colour new.npz --statistics pixels --flip --size 4": "statistics colour new.npz features=pixels flip=true size=4",
    "colour new --enc vae=a --size 4": "latents colour new vae=a size=4",
    "story.txt new --text text8 --valid-fraction 0.1": "text story.txt new tokenizer=text8 valid_fraction=0.1",
}


@pytest.mark.parametrize("words", OLDER)
def test_the_older_spelling_of_prepare_is_told_the_new_one(words: str):
    with told(f"`zoo prepare {OLDER[words]}`"):
        check_spelling(words.split())
    check_spelling(OLDER[words].split())


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_that_names_it_and_leaves_nothing(
    root: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, command: str
):
    before = snapshot(root)
    code = cli.main(command.split())
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith(f"zoo {command.split()[0]}: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert [word for word in MISTAKES[command].split() if word not in err] == [], err
    assert not [r.message for r in caplog.records if r.levelno >= logging.WARNING]  # these lines lie on stderr too
    assert snapshot(root) == before
    assert "outsider" not in sys.modules


def test_an_image_that_turns_out_unreadable_later_is_named(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["train", "folder.py", "data.path=late", f"workdir={tmp_path}/run", "--quiet"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"zoo train: {root / 'late' / '7.png'} cannot be decoded")
    assert err.count("\n") == 1
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_malicious_pickle_is_refused_and_does_not_run(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def refused(expected: str) -> None:
        before = snapshot(root)
        assert cli.main(["import", SMOKE, "evil.pth", "new"]) == 2
        err = capsys.readouterr().err
        assert err.startswith("zoo import: evil.pth ")
        assert err.count("\n") == 1
        assert expected in err
        assert snapshot(root) == before

    with monkeypatch.context() as without:
        without.setitem(sys.modules, "torch", None)
        refused("PyTorch is not installed")
    pytest.importorskip("torch")
    refused("asks for code to run")
    pickle.loads((root / "evil.pth").read_bytes())
    assert (root / "payload-ran").is_dir()  # it would have run
    (root / "payload-ran").rmdir()


def test_an_allowed_package_is_imported(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="imported"):
        cli.main(["sample", "foreign", "--allow", "outsider"])
    succeeds(capsys, "export", "mute", str(tmp_path / "again"), "--allow", "mute")
    assert type(zoo.load(str(tmp_path / "again"), allow=("mute",))[0]).__name__ == "Mute"


def test_traceback_shows_where_a_mistake_arose(root: Path):
    with pytest.raises(zoo.errors.UserError, match="did you mean 'lr'"):
        cli.main(["--traceback", "train", SMOKE, "optim.lrr=1"])


def test_fields_and_flags_come_in_any_order(root: Path, capsys: pytest.CaptureFixture[str]):
    before = snapshot(root)
    for command in ("train --quiet {} steps=0", "train {} --quiet steps=0", "train {} log_every=1 --quiet steps=0"):
        assert cli.main(command.format(SMOKE).split()) == 2
        assert capsys.readouterr().err.startswith("zoo train: steps=0 must be a whole number from 1")
    for command in ("train {} --quite steps=1", "train {} --quiet -x=1", "list x=1"):
        with pytest.raises(SystemExit) as left:
            cli.main(command.format(SMOKE).split())
        assert left.value.code == 2
        assert "unrecognized arguments: " in capsys.readouterr().err
    assert snapshot(root) == before


# one run, from training to the published layout and back


def test_train_leaves_a_run_and_resumes_it(root: Path, capsys: pytest.CaptureFixture[str]):
    assert {"config.json", "metrics.jsonl", "checkpoints"} <= {p.name for p in (root / "run").iterdir()}
    assert models.open_model(root / "run").step == 4
    before = snapshot(root / "run" / "checkpoints")
    out = succeeds(capsys, "train", SMOKE, f"workdir={root}/run", "samples.n=0", "log_every=1")
    assert "this run is finished: step 4 of 4" in out
    assert snapshot(root / "run" / "checkpoints") == before


def test_samples_depend_on_seed_and_number_alone(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    text = succeeds(capsys, "sample", "run", "n=3", "seed=7", "--out", str(out))
    assert f"3 samples in {out}" in text
    assert "average weights, seed 7" in text
    files = [f"{i:06d}.png" for i in range(3)]
    assert sorted(p.name for p in out.iterdir()) == [*files, "settings.json", "sheet.png"]
    settings = json.loads((out / "settings.json").read_text())
    assert settings == {
        "model": "run", "step": 4, "weights": "ema", "seed": 7, "keys": KEYS, "label": None,
        "guidance": 0.0, "denoise": None, "temperature": 1.0,
    }  # fmt: skip
    first = [png(out / name) for name in files]
    assert first[0].shape == (4, 4, 3)
    assert len({x.tobytes() for x in first}) == 3
    with Image.open(out / files[2]) as image:
        assert (image.text["index"], image.text["seed"]) == ("2", "7")

    # Resumed with another batch: what is there stays, what is gone comes back, and more may be asked for.
    (out / files[1]).unlink()
    Image.new("RGB", (4, 4)).save(out / files[2])
    succeeds(capsys, "sample", "run", "n=4", "seed=7", "--out", str(out), "--batch", "1")
    assert np.abs(png(out / files[1]) - first[1]).max() <= 1
    assert np.abs(first[1] - first[0]).max() > 1
    assert not png(out / files[2]).any()
    assert (out / "000003.png").exists()

    before = snapshot(out)
    for other in (["seed=8"], ["seed=7", "temperature=0.5"], ["seed=7", "--raw"]):
        assert cli.main(["sample", "run", "n=4", "--out", str(out), *other]) == 2
        assert "holds samples drawn with other settings (" in capsys.readouterr().err
    assert snapshot(out) == before
    del settings["keys"]  # begun by a version whose seeds made other keys
    (out / "settings.json").write_text(json.dumps(settings))
    assert cli.main(["sample", "run", "n=5", "seed=7", "--out", str(out)]) == 2
    assert "holds samples drawn with other settings (keys" in capsys.readouterr().err


def test_samples_of_a_run_lie_in_its_folder_by_default(root: Path, capsys: pytest.CaptureFixture[str]):
    succeeds(capsys, "sample", "run", "n=1", "guidance.weight=1.0", "guidance.attention_temperature=0.5")
    assert (root / "run" / "samples" / "000000.png").exists()
    settings = json.loads((root / "run" / "samples" / "settings.json").read_text())
    assert settings["guidance"]["attention_temperature"] == 0.5


def test_labels_are_named_and_in_turn(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def labels(*options: str) -> list[str]:
        succeeds(capsys, "sample", "cond", *options)
        found = []
        for path in sorted(tmp_path.glob("out/0*.png")):
            with Image.open(path) as image:
                found.append(image.text["label"])
        return found

    assert labels("n=1", f"--out={tmp_path}/out", "--batch=1") == ["cat"]
    assert labels("n=3", f"--out={tmp_path}/out", "--batch=1") == ["cat", "dog", "cat"]  # the first one is kept
    assert cli.main(["sample", "cond", "n=3", "label=dog,cat", f"--out={tmp_path}/out"]) == 2
    assert 'label: "balanced" -> "dog,cat"' in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, expected",
    [(None, [0, 1, 0]), ("dog", [1, 1, 1]), ("dog,0", [1, 0, 1]), ("none", [-1, -1, -1]), ("1,none", [1, -1, 1])],
)
def test_label_numbers(text: str | None, expected: list[int]):
    assert label_numbers(text, 2, ("cat", "dog"), 3).tolist() == expected
    assert label_numbers(None, 0, (), 3) is None
    names = ("cat, black", "none", "2", "cat", "dog, cat")
    for i, name in enumerate(names):
        assert label_numbers(name, 5, names, 1) == [i]
    assert label_numbers("cat, black,cat,dog, cat,0,none", 5, names, 5).tolist() == [0, 3, 4, 0, 1]


def test_eval_prints_one_line_that_says_what_was_measured(root: Path, capsys: pytest.CaptureFixture[str]):
    found = {}
    for raw in ([], ["--raw"]):
        out = succeeds(capsys, "eval", "run", "bpd", "limit=12", "batch=8", "draws=2", "data.seed=3", *raw)
        assert out.count("\n") == 1
        line = json.loads(out)
        assert (line["weights"], line["step"]) == ("raw" if raw else "ema", 4)
        assert (line["images"], line["draws"], line["split"]) == (12, 2, "test")
        assert (line["metric"]["limit"], line["metric"]["batch"]) == (12, 8)
        assert line["data"] == {"class": "zoo.data.synthetic.Synthetic", "examples": 256, "values": 2, "seed": 3}
        found[line["weights"]] = line["bpd"]
    assert found["raw"] != found["ema"]
    assert all(np.isfinite(value) for value in found.values())


def same(a: Any, b: Any) -> None:
    """Equal tasks, and parameters equal to the bit."""
    assert a[0] == b[0]
    a, b = weights.flatten(a[1]), weights.flatten(b[1])
    assert set(a) == set(b)
    for name in a:
        assert np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes(), name


@pytest.mark.parametrize("raw", [False, True])
def test_an_export_is_the_run(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], raw: bool):
    out = succeeds(capsys, "export", "run", str(tmp_path / "out"), *(["--raw"] if raw else []))
    assert ("the weights of the last step" if raw else "the average of the weights") in out
    same(zoo.load(str(tmp_path / "out")), zoo.load("run", raw=raw))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize("suffix", [".npz", ".pth"])
def test_the_published_layout_and_back(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str):
    if suffix == ".pth":
        pytest.importorskip("torch")
    path = tmp_path / f"official{suffix}"
    succeeds(capsys, "export", "run", str(path), "--format", "official")
    out = succeeds(capsys, "import", SMOKE, str(path), str(tmp_path / "back"))
    assert "every tensor used" in out
    same(zoo.load(str(tmp_path / "back")), zoo.load("run"))
    assert models.open_model(tmp_path / "back").kind == "imported"


# what there is


def test_list_names_papers_configs_and_weights(capsys: pytest.CaptureFixture[str]):
    out = succeeds(capsys, "list")
    assert "arXiv:2412.06329" in out
    assert "TarFlow: sample, nll, denoise, chain, features, after_step, import_names" in out
    assert "tarflow/digits " in out
    assert "TarFlow on the bundled scans of digits" in out


def test_show_says_types_comments_sizes_and_precision(capsys: pytest.CaptureFixture[str]):
    def rows(*fields: str) -> dict[str, str]:
        lines = succeeds(capsys, "show", SMOKE, *fields).splitlines()
        return {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line.strip()}

    shown = rows("steps=7")
    assert shown["steps"].startswith("7 int")
    assert shown["task.width"] == "8 int"
    assert shown["task.depth"] == "1 int transformer layers per flow block"
    assert shown["optim.clip"] == "1.0 float | None global gradient norm"
    assert shown["task.noise_type"].startswith("'uniform' Literal['gaussian', 'uniform'] uniform: dequantisation")
    assert "matrix products" in shown["float32"]
    assert "bfloat16" not in shown
    mixed = rows("task.dtype=bfloat16")
    assert "matrix products" in mixed["bfloat16"]
    count = sum(x.size for x in jax.tree.leaves(weights.abstract(TASK)))
    assert f"{count:,} parameters in" in succeeds(capsys, "show", SMOKE)


@pytest.mark.devices8
@pytest.mark.parametrize(
    "devices, mesh, count",
    [
        ("v5e:4x4", "data=4 x fsdp=4", 16),
        ("v4:2x2x2", "data=2 x fsdp=4", 8),  # the cores of a chip are one device
        (None, "data=2 x fsdp=4", 8),  # those here
    ],
)
def test_show_says_where_every_parameter_lies(
    capsys: pytest.CaptureFixture[str], devices: str | None, mesh: str, count: int
):
    flags = ["--devices", devices] if devices else []
    out = succeeds(capsys, "show", SMOKE, "--shardings", *flags, "mesh.fsdp=4")
    table, _, summary = out.partition("\n\n")
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in table.splitlines()[1:]}
    assert set(rows) == set(weights.flatten(weights.abstract(TASK)))
    up, var = rows["block0/trunk/block/mlp/up/kernel"], rows["prior/var"]
    assert (up[0], up[1].split()) == ("1x8x32", ["-,", "fsdp,", "-", "0.2"])  # a quarter of 1 KiB
    assert (var[0], var[1].split()) == ("4x4", ["whole", "0.1"])
    assert len({len(line) for line in table.splitlines()}) == 1
    assert summary.splitlines()[0] == f"mesh {mesh} ({count} devices)"
    assert "state (parameters, optimiser state, average of the weights): " in summary
    assert "whole on every device: " in summary


def test_show_names_both_axes_that_cut_a_parameter(capsys: pytest.CaptureFixture[str]):
    fields = ("mesh.data=2", "mesh.fsdp=4", "mesh.tensor=2", "task.head_dim=4")
    out = succeeds(capsys, "show", SMOKE, "--shardings", "--devices", "16", *fields)
    (up,) = [line for line in out.splitlines() if line.startswith("block1/trunk/block/mlp/up/kernel")]
    assert "-, fsdp, tensor" in up
    assert "mesh data=2 x fsdp=4 x tensor=2 (16 devices)" in out


def test_a_word_that_is_an_option_of_the_sampler_goes_to_the_sampler() -> None:
    words, options = sample._options(SimpleNamespace(task=CORNERS), ["temper=2", "form=score", "n=3"], ())
    assert (words["form"], words["n"], options.form) == (None, 3, "score")


def test_what_a_command_meets_outside_of_itself_is_a_sentence(tmp_path, monkeypatch):
    """A full stdout, an interrupted import, a locale of ASCII, none of the devices that are asked for."""
    python = [sys.executable, "-m", "zoo.cli"]
    with open("/dev/full", "w") as nowhere:
        full = subprocess.run([*python, "list"], stdout=nowhere, stderr=subprocess.PIPE, text=True)
    assert (full.returncode, full.stderr.count("\n")) == (2, 1)
    assert "No space left" in full.stderr
    (tmp_path / "Ä").mkdir()
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    found = subprocess.run([*python, "check", str(tmp_path / "Ä")], env=plain, capture_output=True)
    assert (found.returncode, "Ä holds no text" in found.stdout.decode()) == (1, True)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    error = RuntimeError("Unable to initialize backend 'tpu': INTERNAL: no libtpu.so (set JAX_PLATFORMS='' to choose)")
    assert process.explained("sample", error) == 2
    assert process.explained("sample", RuntimeError("a fault")) is None
    for seed in (-1, 2**32, 2**32 + 5):
        with told("seed", str(seed)):
            draws.key_of(seed, draws.Use.SAMPLES)
