"""`zoo bench`: figures that hang together, a peer that must be a twin, and sentences for mistakes."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from zoo.commands import bench as module
from zoo.commands.bench import Result, bench
from zoo.data.images import Images
from zoo.dist import Mesh
from zoo.errors import UserError
from zoo.papers.tarflow import TarFlow
from zoo.run import Run
from zoo.train.optim import AdamW

TASK = TarFlow(image=4, channels=1, patch=2, width=8, depth=1, blocks=2, head_dim=8, classes=3)
# bench must not open the data
RUN = Run(task=TASK, data=Images("nowhere", size=4), steps=4, batch=8, optim=AdamW(decay_all=True), ema=0.9)

# A twin in our own code, so that no PyTorch is needed; what WRONG_* add is what a bad twin would get wrong.
PEER = """
import numpy as np, jax, time
from dataclasses import replace
from zoo import weights
from zoo.papers import tarflow

class Peer:
    asked = 0
    def __init__(self, task): self.task = replace(task, noise=0.0, drop=0.0)
    def load(self, state): self.params = weights.from_official(self.task, state)
    def place(self, batch): return batch
    def train_step(self, batch, sync=True): time.sleep(0.02)
    def sample(self, n): time.sleep(0.02)
    def loss(self, batch): return float(self.task.loss(self.params, batch, jax.random.key(0))[0]) + WRONG_LOSS
    def inverse(self, z, label=None): return np.asarray(tarflow.inverse(self.task, self.params, z, label)) + WRONG_INVERSE
    def peak_memory(self):
        self.asked += 1
        return 2**20 if self.asked == 1 else 0  # like a counter that asking resets

def build(task): return Peer(task)
"""


def peer(folder: Path, loss: str = "0.0", inverse: str = "0.0") -> str:
    path = folder / "peer.py"
    path.write_text(PEER.replace("WRONG_LOSS", loss).replace("WRONG_INVERSE", inverse))
    return str(path)


@pytest.fixture(autouse=True)
def _short_rounds_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROUND", 0.01)
    monkeypatch.setattr(Mesh, "build", lambda self, build=Mesh.build: build(self, jax.devices()[:1]))


def test_figures_hang_together(tmp_path: Path) -> None:
    result = bench(RUN, peer=peer(tmp_path), samples=2, rounds=2)
    figures = json.loads(json.dumps(result.figures))
    assert set(figures["largest difference to the peer"]) == {"loss", "inverse"}
    assert max(figures["largest difference to the peer"].values()) < 1e-4
    for what, items in (("train", 8), ("sample 2", 2)):
        for side in ("ours", "peer"):
            times = figures[f"{what} ms, {side}"]
            assert 0 < times["min"] <= times["median"] <= times["max"]
            assert figures[f"{what} examples/s, {side}"] == pytest.approx(1e3 * items / times["median"])
        assert figures[f"{what} ms, peer"]["min"] >= 20
        ours, theirs, ratio = (figures[k] for k in (f"{what} ms, ours", f"{what} ms, peer", f"{what}, ours / peer"))
        assert ours["min"] / theirs["max"] <= ratio["min"] <= ratio["max"] <= ours["max"] / theirs["min"]
    assert figures["train model TFLOP/s"] * 1e12 == pytest.approx(TASK.flops() * figures["train examples/s, ours"])
    assert figures["train compile s"] > 0
    assert "train utilisation of bf16 peak" not in figures  # a CPU has no entry in the table
    assert figures["peak device memory MiB, peer"] == 1
    lines = result.table().splitlines()
    assert len(lines) == len(figures)
    assert "ours / peer" in result.table()


def test_unsteady_rounds_are_named_and_steady_ones_not() -> None:
    figures: dict[str, object] = {}
    module._compare(figures, "train", {"ours": [1.0, 1.1], "peer": [0.1, 4.0]}, 8)
    assert "train unsteady, ours" not in figures
    assert "factor of 40.0" in str(figures["train unsteady, peer"])
    assert "do not quote" in Result(figures).table()


@pytest.mark.parametrize("wrong", ["loss", "inverse"])
@pytest.mark.parametrize("by", ["0.01", "float('nan')"])
def test_a_peer_that_differs_is_no_twin(tmp_path: Path, wrong: str, by: str) -> None:
    with pytest.raises(UserError, match=f"peer's {wrong} differs"):
        bench(RUN, peer=peer(tmp_path, **{wrong: by}), what="sample")


def test_bf16_allows_what_float32_does_not(tmp_path: Path) -> None:
    run = replace(RUN, task=replace(TASK, dtype="bfloat16"))
    assert "sample 2 ms, ours" in bench(run, peer=peer(tmp_path, "0.01"), what="sample", samples=2, rounds=1).figures


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no such file"),
        ("x = 1\n", r"no function build\(task\)"),
        ("import torch_that_is_not_there\n", "'torch_that_is_not_there', which is not installed"),
        ("raise ModuleNotFoundError(name='torch')\n", "`torch` extra"),
    ],
)
def test_a_peer_file_that_is_none(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "bad.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=says):
        bench(RUN, peer=str(path))


def test_nothing_to_time() -> None:
    with pytest.raises(UserError, match="--rounds 0"):
        bench(RUN, rounds=0)
    with pytest.raises(UserError, match="--samples 0"):
        bench(RUN, samples=0)
    mute = SimpleNamespace(held=(), spec=TASK.spec, init=TASK.init, loss=TASK.loss)
    with pytest.raises(UserError, match="no sampler; use --what train"):
        bench(replace(RUN, task=mute))
