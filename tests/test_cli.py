"""The command line, in process: what works on one tiny run, and how mistakes are told."""

import dataclasses
import json
import logging
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import zoo
from zoo import cli, models, weights
from zoo.data.synthetic import Synthetic
from zoo.data.vocabulary import text8
from zoo.draws import label_numbers
from zoo.encoders.text import T5
from zoo.papers.part import Part
from zoo.papers.starflow import StarFlow
from zoo.papers.tarflow import TarFlow
from zoo.papers.tarflow_lm import DiscreteLM, Layer, TarFlowLM

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
DISCRETE = DiscreteLM(length=8, width=8, depth=1, head_dim=8)
PART = Part(image=8, channels=1, patch=4, width=8, depth=1, head_dim=8, pairs=4)


class Payload:
    """Pickled, this makes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def export_of(folder: Path, task: Any, /, **about: Any) -> Path:
    """An export of random weights; `about` overrides what its config says."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), weights.abstract(task))
    params = {**params, "prior": {"var": jnp.ones_like(params["prior"]["var"])}} if "prior" in params else params
    model = models.Model(task, params, "raw", 5, Synthetic(), ("cat", "dog"), folder)
    weights.save(folder, params, {**models.export_config(model), **about}, "a card")
    return folder


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
    export_of(root / "numbers_only", LM)
    export_of(root / "discrete", DISCRETE)
    export_of(root / "part", PART)
    (root / "empty.txt").write_text("\n \n")
    export_of(root / "undated", TASK, data=None)
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

    for name, mode in (("colour", "RGB"), ("grey", "L"), ("broken", "RGB"), ("late", "RGB")):
        (root / name).mkdir()
        for i in range(8):
            Image.new(mode, (4, 4), "white").save(root / name / f"{i}.png")
    for path in (root / "broken").iterdir():
        path.write_bytes(path.read_bytes()[:40])
    (root / "late" / "7.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (root / "folder.py").write_text(
        "from zoo.data.images import Images\nfrom zoo.papers.tarflow import TarFlow\nfrom zoo.run import Run\n"
        "task = TarFlow(image=4, channels=3, patch=2, width=8, depth=1, blocks=2, head_dim=8)\n"
        f"config = Run(task, Images({str(root / 'colour')!r}, size=4, test_fraction=0), steps=1, batch=8)\n"
        "number = task\n"
    )
    (root / "story.txt").write_text("Once upon a time, there were 3 bears. " * 20)
    (root / "words.py").write_text(
        "from zoo.data.tokens import Text\nfrom zoo.papers.tarflow_lm import DiscreteLM\nfrom zoo.run import Run\n"
        "task = DiscreteLM(length=8, width=8, depth=1, head_dim=8)\n"
        "config = Run(task, Text('story.txt'), steps=1, batch=8)\n"
    )
    steps = [f"{i},{i % 5}" for i in range(64)]
    (root / "waves.csv").write_text("left,right\n" + "\n".join(steps) + "\n")
    (root / "gap.csv").write_text("left,right\n" + "\n".join([*steps[:5], "nan,0", *steps[6:]]) + "\n")
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

MISTAKES = {
    "unknown field": (f"train {SMOKE} optim.lrr=1", "no field optim.lrr in AdamW; did you mean 'lr'?"),
    "wrong type": (f"train {SMOKE} steps=many", "steps=many must be a whole number from 1 to 2147483647 (it is 4 now)"),
    "set twice": (f"train {SMOKE} steps=1 steps=2", "steps is set twice"),
    "no config": ("train tarflow/digit", "did you mean 'tarflow/digits'?"),
    "no run": ("train folder.py:number", "folder.py:number holds a TarFlow, not a Run"),
    "head_dim": (f"train {SMOKE} task.head_dim=3", "task.head_dim=3 does not divide task.width=8"),
    "patch": (f"train {SMOKE} task.patch=3", "task.patch=3 does not divide task.image=4"),
    "devices": (f"train {SMOKE} batch=13", "batch=13 does not divide over 2 devices; choose a multiple of 2"),
    "mesh": (f"train {SMOKE} mesh.fsdp=3", "does not fill the 2 devices here"),
    "more classes than the task": (f"train {SMOKE} task.classes=1", "the data has 2 classes, task.classes=1"),
    "unlabelled data": ("train folder.py task.classes=2", "task.classes=0"),
    "missing data": ("train folder.py data.path=colours", "colours does not exist; did you mean"),
    "unreadable images": ("train folder.py data.path=broken", "png cannot be decoded"),
    "grey images": ("train folder.py data.path=grey", "png is grey, but channels=3; set channels=1, or convert"),
    "colour task": (f"train {SMOKE} task.channels=3 workdir=run", "task.channels: 1 -> 3"),
    "a gap in a series": ("train series.py data.path=gap.csv", "gap.csv, line 7, column 1: 'nan' is no number that"),
    "a series shorter than a window": (
        "train series.py data.length=99",
        "waves.csv has 64 time steps, fewer than data.length=99",
    ),
    "windows of another length": ("train series.py data.length=8", "set task.length=8 (or data.length=16)"),
    "other size": ("train folder.py data.size=8", "set task.image=8 or data.size=4"),
    "another run's folder": (f"train {SMOKE} workdir=run optim.lr=0.5", "another config: optim.lr: 0.001 -> 0.5"),
    "an export as run folder": (f"train {SMOKE} workdir=cond", "workdir=cond is an export, not a run"),
    "a folder of other things": (f"train {SMOKE} workdir=colour", "workdir=colour is not empty and is no run (0.png"),
    "unwritable run folder": (f"train {SMOKE} workdir=file/run", "cannot write the run folder"),
    "a file as run folder": (f"train {SMOKE} workdir=file", "cannot write the run folder"),
    "no model": ("sample cont", "cont is neither a folder nor a shipped model"),
    "no model in the folder": ("sample colour", "colour holds no config.json"),
    "label out of range": ("sample cond label=99", "label=99 is out of range; this model has classes 0 to 1"),
    "negative label": ("sample cond label=0,-1", "label=-1 is out of range"),
    "no such label": ("sample cond label=dgo", "label='dgo' is no class; did you mean 'dog'?"),
    "label of an unconditional model": ("sample run label=1", "label=1: this model is unconditional"),
    "no such option": ("sample run guidence=1", "no option 'guidence' of this sampler; did you mean 'guidance'?"),
    "option of another type": ("sample run temperature=hot", "temperature=hot must be a finite number"),
    "whole and part": ("sample run guidance=2 guidance.what=a", "guidance is set both as a whole and in part"),
    "part of an option": ("sample run guidance.wight=1", "no field guidance.wight in Guidance; did you mean 'weight'?"),
    "unknown method": (
        "sample run method=fast",
        "method=fast must be one of auto, sequential, jacobi, gs_jacobi or a Jacobi",
    ),
    "modules of other blocks": (
        "sample run method.modules=1,1,1",
        "method.modules=1,1,1: 3 values for the 2 blocks of this model; give one, or one for each block",
    ),
    "method as a whole and in part": (
        "sample run method=jacobi method.modules=2",
        "method is set both as a whole and in part",
    ),
    "nothing to time strategies for": ("eval run convergence batches=1,0", "batches=1,0 must be a tuple (each a whole"),
    "a number that no step has": (
        f"train {SMOKE} optim.warmup={'9' * 30}",
        "must be a whole number from 0 to 2147483647",
    ),
    "no metrics": (f"train {SMOKE} evals=7", "evals=7 must be a tuple (each a Metric)"),
    "prompt for a class model": ("sample cond prompt=cat", "prompt=cat: this model is not conditioned on captions"),
    "prompts for a class model": (
        "sample cond prompts=file",
        "prompts=file: this model is not conditioned on captions",
    ),
    "prompt and prompts": ("sample text prompt=cat prompts=file", "prompt= and prompts= are both given; keep one"),
    "no file of prompts": ("sample text prompts=no.txt", "prompts=no.txt cannot be read (No such file or directory)"),
    "a file of no prompts": ("sample text prompts=empty.txt", "prompts=empty.txt holds no caption"),
    "prompt for stored features": (
        "sample stored prompt=cat",
        "trained on stored features of captions and holds no text",
    ),
    "nothing for stored features": ("sample stored", "what stands for no caption is not stored with it"),
    "no tokeniser": ("sample text prompt=cat", "there is none in text; copy it there"),
    "no such tokeniser": ("sample text prompt=cat --tokenizer no.model", "no.model is missing"),
    "nothing to rewrite": ("sample lm prompts=empty.txt", "prompts=empty.txt holds no text in 2 lines"),
    "too little to rewrite": (
        "sample lm prompt=hi",
        "prompt= has 2 tokens, and this model rewrites texts of 8; give 6",
    ),
    "a model that rewrites nothing": (
        "sample discrete prompt=hi",
        "DiscreteLM draws texts and rewrites none; leave it",
    ),
    "rewriting without a vocabulary": ("sample numbers_only prompt=hi", "numbers_only has no vocabulary.json, so that"),
    "a strength of nothing": (
        "sample lm strength=0.3",
        "strength=0.3 says how much of a given text shall be new, and none",
    ),
    "passes of no flow": ("sample discrete passes=true", "no option 'passes' of this sampler"),
    "aspect of texts": (
        "sample lm aspect=16:9",
        "aspect=16:9: all sequences of TarFlowLM have one shape; leave it out",
    ),
    "unknown aspect": ("sample latents aspect=16:8", "'16:8' is no aspect ratio of the buckets; did you mean '16:9'?"),
    "aspect of squares": ("sample run aspect=16:9", "aspect=16:9: all images of TarFlow have one shape; leave it out"),
    "aspect and grid": ("sample latents aspect=16:9 grid=4,8", "aspect=16:9 and grid= both say the shape; keep one"),
    "latents and no autoencoder": ("sample latents", "names no autoencoder: set task.vae and weights.vae"),
    "no samples": ("sample run n=0", "n=0 must be a whole number from 1"),
    "no batch": ("sample run --batch 0", "--batch 0"),
    "unwritable samples": ("sample run n=1 --out file/samples", "cannot write samples to file/samples"),
    "a folder of other images": ("sample run n=1 --out numbers", "numbers holds images that zoo did not draw"),
    "no such metric": ("eval run bdp", "no metric 'bdp'; did you mean 'bpd'?"),
    "what measures by itself": (
        "eval run typescore/rapidocr",
        "holds a TypeScore, which is no metric of models; write zoo eval typescore/rapidocr",
    ),
    "metric of no model": (
        "eval typescore/model",
        "holds the metric prompted, which measures models; write zoo eval MODEL",
    ),
    "flag of models": ("eval typescore/oracle --raw images=x", "--raw is for models"),
    "prompts for a model without captions": (
        "eval run typescore/model options.guidance=1",
        "takes captions, and this TarFlow takes none",
    ),
    "no scorer": ("eval run prompted", "the metric prompted has no scorer"),
    "long name of a folder": (f"eval typescore/oracle images={'x' * 300}", "cannot be read (File name too long)"),
    "no such field of a metric": ("eval run bpd drws=1", "no field drws in Bits; did you mean 'draws'?"),
    "no such field of the data": ("eval run bpd data.example=1", "no field data.example in Synthetic"),
    "bits per dimension of texts": ("eval lm bpd", "TarFlowLM models texts; use text"),
    "bits per token of images": ("eval run text", "the metric text is of texts, and TarFlow models image"),
    "statistics of the texts of images": ("eval run generation", "is of texts, and TarFlow models image"),
    "metric of passes of no flow": ("eval discrete passes", "layers of a flow, and DiscreteLM has none"),
    "metric of a conditional model": ("eval run bayes", "unconditional (task.classes=0)"),
    "unwritable export": ("export run file/export", "file/export (Not a directory); free some space"),
    "not empty": ("export run colour", "colour is not an export"),
    "a file in the way": ("export run unfit.npz --format official", "unfit.npz exists; remove it first"),
    "unknown suffix": ("export run weights.xyz --format official", "weights.xyz ends in '.xyz'"),
    "no published file": (f"import {SMOKE} no.npz new", "no.npz is no file"),
    "missing and extra tensors": (
        f"import {SMOKE} unfit.npz new",
        "missing (1): blocks.0.proj_in.bias; unexpected (1): blocks.7.extra;",
    ),
    "published file of another size": (f"import {SMOKE} unfit.npz new task.width=16", "wrong shape ("),
    "foreign task": ("sample foreign", "task names the class outsider.Task, which is not part of zoo"),
    "foreign data": ("eval foreign_data bpd", "say so with --allow outsider"),
    "foreign task to export": ("export foreign new", "nothing of it was imported"),
    "another package allowed": ("sample foreign --allow mute", "task names the class outsider.Task"),
    "flipped byte": ("sample flipped", "model.safetensors is damaged: the sha256 of"),
    "flipped byte to export": ("export flipped new", "model.safetensors is damaged"),
    "no sampler": ("sample mute --allow mute", "Mute has no sampler; it can:"),
    "no likelihood": ("eval mute bpd --allow mute", "bpd needs 'nll', which Mute has not; it can:"),
    "no data": ("eval undated bpd data.path=x", "undated does not say what data it was trained on"),
    "no published layout": ("export mute new.npz --format official --allow mute", "Mute knows no published layout"),
    "no sampler to export": (
        "export mute new --format stablehlo --allow mute",
        "Mute has neither a sampler nor features to export",
    ),
    "nothing to export": (
        "export part new --format stablehlo --samples 0",
        "--samples 0 leaves a portable program nothing to do; give 1 or more",
    ),
    "boxes larger than the image": (
        "train part/digits:smoke task.largest=99",
        "task.largest=99 is larger than task.image=8: no such box fits; set task.largest=8 or less",
    ),
    "more pairs than there are": (
        "train part/digits:smoke task.head=cross_attention task.pairs=1000",
        "task.pairs=1000 is more than the 256 distinct pairs of 16 patches; choose 256 or fewer, or set task.pairing=",
    ),
    "patches that do not fill the image": (
        "train part/digits:smoke task.patch=3",
        "task.patch=3 does not divide task.image=8; choose a divisor, e.g. task.patch=2",
    ),
    "samples of what draws none": ("sample part", "Part has no sampler; it can: features, feature_map, crops,"),
    "a likelihood of what has none": ("eval part bpd", "bpd needs 'nll', which Part has not; it can: features,"),
    "probe without features": ("eval discrete probe", "probe needs 'features', which DiscreteLM has not; it can:"),
    "features without features": (
        "eval discrete features out=x.npz",
        "features needs 'features', which DiscreteLM has not; it can:",
    ),
    "relations of what has none": ("eval run relations", "relations needs 'relations', which TarFlow has not; it can:"),
    "features and no file": ("eval part features", "the metric features has no file to write; add out=FILE.npz"),
    "features in a file that exists": (
        "eval part features out=unfit.npz",
        "out=unfit.npz of the metric features exists; remove it first, or give another file",
    ),
    "nothing to bench": (f"bench {SMOKE} --rounds 0", "--rounds 0 leaves nothing to time"),
    "nothing to bench against": (f"bench {SMOKE} --against tarflow/digit", "did you mean 'tarflow/digits'?"),
    "data against": (f"bench {SMOKE} --against {SMOKE} --what data", "--against has no part in --what data; leave it"),
    "nothing to prepare": ("prepare colours new", "colours does not exist"),
    "a column of images that have none": ("prepare colour new --image-column x", "--image-column names a column of"),
    "unknown tokens of a text": (
        "prepare story.txt new --text tex8",
        "bytes; did you mean 'text8'? give one of these,",
    ),
    "no tokenizer in the file": (
        "prepare story.txt new --text cond/config.json",
        "is no tokenizer of the package token",
    ),
    "an empty text to prepare": ("prepare empty.txt new --text text8", "empty.txt has no letter and no digit"),
    "an image as a text": ("prepare colour/0.png new --text bytes", "0.png is no text in UTF-8 (byte 0 is 0x89)"),
    "images as texts": ("prepare colour new --text text8", "colour holds no text; expected files that end in .txt"),
    "tokens in a folder of images": (
        "prepare story.txt colour --text text8",
        "colour is not empty and no prepared set",
    ),
    "no share of a text": (
        "prepare story.txt new --text text8 --test-fraction 1",
        "test_fraction=1.0 is no share of the",
    ),
    "a size of texts": (
        "prepare story.txt new --text text8 --size 8",
        "--size is of images and says nothing of --text",
    ),
    "a part of images": ("prepare colour new --valid-fraction 0.1", "--valid-fraction is of texts; add --text, or"),
    "another vocabulary": (
        "train words.py task.vocab=50257",
        "the data has 27 symbols, task.vocab=50257; set task.vocab",
    ),
    "tokens of another vocabulary": (
        "train words.py data.tokenizer=bytes",
        "the data has 256 symbols, task.vocab=27; set",
    ),
    "characters that are none of the symbols": (
        "train words.py data.normalise=False",
        "story.txt has 80 characters that are none of the 27 symbols (space and a to z): 'O' at 0, ',' at 16, '3' at 29, '.'",
    ),
    "a text shorter than a sequence": (
        "train words.py task.length=2000",
        "fewer than the 2,000 of one sequence; set task.length=",
    ),
    "an empty text": (
        "train words.py data.path=empty.txt",
        "empty.txt has no letter and no digit, so that nothing of it",
    ),
    "a binary file as text": ("train words.py data.path=cond/model.safetensors", "model.safetensors is no text "),
    "no file of a tokenizer": ("train words.py data.tokenizer=gpt2.json", "data.tokenizer=gpt2.json: there is no file"),
    "images as text": ("train words.py data.path=colour", "colour holds no text; expected files that end in .txt"),
    "a missing text": ("train words.py data.path=stroy.txt", "stroy.txt does not exist; did you mean"),
    "text for images": ("train folder.py data.path=story.txt", "story.txt is a file; give a folder of images"),
    "aspects of nothing encoded": ("prepare colour new --aspects", "--aspects says how images and captions are"),
    "no such encoder": ("prepare colour new --encode vea=cond", "no kind of encoder; did you mean 'vae'?"),
    "no name of an encoder": (
        "prepare colour new --encode vae",
        "names no model; get the published one with `zoo import",
    ),
    "captions without images": ("prepare colour new --encode text=cond", "needs an autoencoder for the images as well"),
    "no size to encode": ("prepare colour new --encode vae=cond", "add --size, e.g. --size 256"),
    "no autoencoder": (
        "prepare colour new --size 4 --encode vae=cont",
        "cont is neither a folder nor a shipped model; known:",
    ),
    "the way to an autoencoder": (
        "prepare colour new --size 4 --encode vae=cont",
        "`zoo import starflow/sd_vae FILE OUT`",
    ),
    "the way to a text encoder": (
        "prepare colour new --size 4 --encode vae=cond --encode text=none",
        "get it with `zoo import starflow/flan_t5_xl FOLDER OUT`",
    ),
    "another task as autoencoder": ("prepare colour new --size 4 --encode vae=cond", "TarFlow is no autoencoder"),
    "features of nothing": (
        "prepare colour new --size 4 --features --encode vae=cond",
        "--features needs a text encoder",
    ),
    "statistics without a size": ("prepare colour new.npz --statistics pixels", "add --size, e.g. --size 64"),
    "statistics in a folder": ("prepare colour new --statistics pixels --size 4", "DEST new is no name for statistics"),
    "statistics of nothing": (
        "prepare colours new.npz --statistics pixels --size 4",
        "colours does not exist; did you",
    ),
    "no such features": ("prepare colour new.npz --statistics cont --size 4", "cont is neither a folder nor a shipped"),
    "features of another size": (
        "prepare colour new.npz --statistics cond --size 4",
        "TarFlow takes [4, 4, 1], the model makes images of [4, 4, 3]",
    ),
    "statistics and latents": (
        "prepare colour new.npz --statistics pixels --size 4 --encode vae=x",
        "--encode says nothing of --statistics; leave one of them out",
    ),
    "mirroring without statistics": ("prepare colour new --flip", "add --statistics pixels, or leave it out"),
    "nothing to show": (f"show {SMOKE} task.widht=1", "no field task.widht in TarFlow; did you mean 'width'?"),
    "devices without shardings": (f"show {SMOKE} --devices 8", "--devices says nothing without --shardings"),
    "devices that are none": (
        f"show {SMOKE} --shardings --devices 0",
        "--devices 0 is neither a number nor a topology",
    ),
    "nonsense as devices": (f"show {SMOKE} --shardings --devices nonsense", "write 64, or v5p:4x4x4"),
    "a power as devices": (f"show {SMOKE} --shardings --devices ²", "--devices ² is neither a number nor a topology"),
    "a topology of no chips": (f"show {SMOKE} --shardings --devices v5e:0x4", "--devices v5e:0x4 is neither"),
    "a topology of other dimensions": (f"show {SMOKE} --shardings --devices v5p:4x4", "--devices v5p:4x4 is neither"),
    "a mesh that does not fill the topology": (
        f"show {SMOKE} --shardings --devices v5e:4x4 mesh.fsdp=3",
        "mesh data=-1 x fsdp=3 x sequence=1 x tensor=1 does not fill the 16 devices",
    ),
    "a mesh that does not divide the model": (
        f"show {SMOKE} --shardings --devices 16 mesh.fsdp=16",
        "axis 0 ('embed') has size 8, which mesh axes ('fsdp',) = 16 do not divide; choose a mesh that does",
    ),
    "no run to place": ("show folder.py:number --shardings", "folder.py:number holds a TarFlow, not a Run"),
    "no run to compile": ("compile folder.py:number --topology v5e:2x2", "holds a TarFlow, not a Run"),
    "unknown topology": (f"compile {SMOKE} --topology v9:2x2", "--topology v9:2x2 is unknown; write a generation and"),
    "topology of other dimensions": (f"compile {SMOKE} --topology v5e:2x2x2", "such as v5e:2x2, v5e:2x4, v5e:4x4,"),
    "no slices": (f"compile {SMOKE} --topology v5e:2x2 --slices 0", "--slices 0 leaves no chip; give 1 or more"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(
    root: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, name: str
):
    command, message = MISTAKES[name]
    if name == "a folder of other images":
        (root / "numbers").mkdir()
        Image.new("L", (4, 4)).save(root / "numbers" / "000000.png")
    before = snapshot(root)
    code = cli.main(command.split())
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith(f"zoo {command.split()[0]}: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert message in err
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
        "model": "run", "step": 4, "weights": "ema", "seed": 7, "label": None,
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


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth"])
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
    assert "TarFlow: sample, nll, chain, features, after_step, import_names" in out
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
        ("48", "data=12 x fsdp=4", 48),
        ("v4:2x2x2", "data=2 x fsdp=4", 8),  # the cores of a chip are one device
        ("tpu7x:2x2x1", "data=2 x fsdp=4", 8),  # and here two
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


def test_a_mesh_larger_than_the_topology_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("libtpu", reason="needs the aot extra")
    for name in ("ALLOW_MULTIPLE_LIBTPU_LOAD", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.setenv(name, "1")
    for fields, message in (
        (["mesh.fsdp=8"], "mesh data=-1 x fsdp=8 x sequence=1 x tensor=1 does not fill the 4 devices"),
        (["batch=6"], "batch=6 does not divide over 4 devices; choose a multiple of 4, e.g. batch=8"),
    ):
        assert cli.main(["compile", SMOKE, "--topology", "v5e:2x2", *fields]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("zoo compile: ")
        assert err.count("\n") == 1
        assert message in err


@pytest.mark.parametrize("text", ["5", "5:", "a:b", "-1:3", "1:2:3"])
def test_a_profile_that_is_no_range_is_refused(capsys: pytest.CaptureFixture[str], text: str):
    assert cli.main(["train", SMOKE, f"--profile={text}"]) == 2
    assert f"--profile {text} is no range of steps; write FIRST:LAST" in capsys.readouterr().err
