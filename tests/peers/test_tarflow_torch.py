"""The benchmark's PyTorch twin computes TarFlow: the golden arrays, at the tolerances of a float32 port."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the benchmark peer needs the extra `torch`")

spec = importlib.util.spec_from_file_location("tarflow_torch", Path(__file__).with_name("tarflow_torch.py"))
assert spec is not None
assert spec.loader is not None
tarflow_torch = importlib.util.module_from_spec(spec)  # as `zoo bench --peer` does: the file stands alone
spec.loader.exec_module(tarflow_torch)

GOLDEN = Path(__file__).parents[1] / "golden" / "tarflow"
CASES = ("cond_nvp", "uncond_nvp", "uncond_vp")


def nhwc(image: np.ndarray) -> np.ndarray:
    return np.moveaxis(image, -3, -1)


def state_dict(golden: dict[str, np.ndarray], blocks: int) -> dict[str, np.ndarray]:
    state = {k.removeprefix("state/"): v for k, v in golden.items() if k.startswith("state/")}
    return state | {f"blocks.{t}.attn_mask": state["blocks.0.attn_mask"] for t in range(blocks)}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> SimpleNamespace:
    """A golden file, its task without noise, and the loaded peer on the CPU."""
    with np.load(GOLDEN / f"{request.param}.npz") as file:
        golden = dict(file)
    c = json.loads(str(golden["config"]))
    task = SimpleNamespace(
        image=c["img_size"],
        channels=c["in_channels"],
        patch=c["patch_size"],
        width=c["channels"],
        depth=c["layers_per_block"],
        blocks=c["num_blocks"],
        head_dim=c["head_dim"],
        classes=c["num_classes"],
        scale=c["nvp"],
        noise=0.0,
        drop=0.0,
        noise_type="gaussian",
        levels=256,
    )
    peer = tarflow_torch.Peer(task, device="cpu")
    peer.load(state_dict(golden, task.blocks))
    label = golden.get("in/y")
    return SimpleNamespace(golden=golden, config=c, task=task, peer=peer, label=label, image=nhwc(golden["in/x"]))


def close(actual: Any, expected: np.ndarray, atol: float) -> None:
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=atol)


def labels(case: SimpleNamespace) -> dict[str, np.ndarray | None]:
    """Suffix of the golden arrays -> the label they were made with."""
    found = {"": case.label}
    return found if case.label is None else found | {"_nolabel": None, "_droplabel": case.golden["in/y_drop"]}


def test_forward(case: SimpleNamespace) -> None:
    x = case.peer.patchify(torch.tensor(case.image))
    np.testing.assert_array_equal(x.numpy(), case.golden["out/patches"])
    np.testing.assert_array_equal(case.peer.unpatchify(x).numpy(), case.image)
    for suffix, label in labels(case).items():
        z, logdet = case.peer.forward(case.image, label)
        close(z, case.golden[f"out/z{suffix}"], 1e-5)
        close(logdet, case.golden[f"out/logdets{suffix}"], 1e-5)
        batch = {"image": case.image} if label is None else {"image": case.image, "label": label}
        close(case.peer.loss(batch), case.golden[f"out/loss{suffix}"], 1e-5)


def test_inverse(case: SimpleNamespace) -> None:
    golden, config, inverse = case.golden, case.config, case.peer.inverse
    z0, w, tau = golden["in/z0"], config["guidance"], config["attn_temp"]
    close(inverse(golden["out/z"] / np.sqrt(golden["state/var"]), case.label), case.image, 2e-5)
    variants = {
        "sample_plain": {"label": case.label},
        "sample_guided_annealed": {"label": case.label, "guidance": w, "attention_temperature": tau},
    }
    variants["sample_guided"] = variants["sample_guided_annealed"] | {"annealed": False}
    for what in "ab":
        variants[f"sample_guided_annealed_{what}"] = variants["sample_guided_annealed"] | {"what": what}
    if case.label is not None:
        variants["sample_guided_annealed_temp1"] = variants["sample_guided_annealed"] | {"attention_temperature": 1.0}
        variants["sample_nolabel"] = {}
        variants["sample_nolabel_guided_annealed"] = variants["sample_guided_annealed"] | {"label": None}
    assert {f"out/{k}" for k in (*variants, "sample_plain_sequence")} == {
        k for k in golden if k.startswith("out/sample")
    }
    for name, options in variants.items():
        close(inverse(z0, **options), nhwc(golden[f"out/{name}"]), 2e-5)


def test_train_step(case: SimpleNamespace) -> None:
    """Four AdamW steps follow the reference; the step at the peer's own noise and rate moves every parameter."""
    peer = tarflow_torch.Peer(case.task, device="cpu")
    peer.load(state_dict(case.golden, case.task.blocks))
    for group in peer.optimizer.param_groups:
        assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (1e-4, (0.9, 0.95), 1e-4, 1e-8)
        group["lr"] = 1e-3
    batch = {"image": case.image} if case.label is None else {"image": case.image, "label": case.golden["in/y_drop"]}
    losses = [peer.train_step(batch)]
    if case.label is None:  # the stored update is that of the labelled latents
        expected = case.golden["out/var_after_update"] if not case.task.scale else case.golden["state/var"]
        close(peer.model.var, expected, 1e-5)
    losses += [float(peer.train_step(batch, sync=False)) for _ in range(3)]
    close(losses, case.golden["out/adamw_losses"], 1e-5)


def test_noise(case: SimpleNamespace) -> None:
    """Gaussian noise has the task's deviation; dequantisation fills each grey level's own bin, evenly."""
    peer = tarflow_torch.Peer(SimpleNamespace(**{**vars(case.task), "noise": 0.3}), device="cpu")
    image = torch.tensor(np.resize(np.linspace(-1, 1, 5, dtype=np.float32), (64, 10, 10, 1)))
    added = peer.noisy(image) - image
    assert abs(added.mean()) < 0.02
    assert abs(added.std() - 0.3) < 0.02
    peer.task = SimpleNamespace(**{**vars(case.task), "noise_type": "uniform", "levels": 5})
    place = (peer.noisy(image) + 1) * 2.5 - (image + 1) * 2  # grey level k, 0..4: position within bin [k, k + 1)
    assert place.min() >= -1e-5
    assert place.max() <= 1 + 1e-5
    assert abs(place.mean() - 0.5) < 0.02


def test_build_samples_trains_and_loads_strictly() -> None:
    with np.load(GOLDEN / "cond_nvp.npz") as file:
        config = json.loads(str(file["config"]))
        golden = dict(file)
    task = SimpleNamespace(image=12, channels=1, patch=3, width=32, depth=2, blocks=3, head_dim=8, classes=5)
    task = SimpleNamespace(
        **vars(task), scale=True, noise=0.1, drop=0.5, noise_type="gaussian", levels=256, dtype="bfloat16"
    )
    peer = tarflow_torch.build(task)
    state = state_dict(golden, config["num_blocks"])
    peer.load(state)
    images = peer.sample(6)
    assert images.shape == (6, 12, 12, 1)
    assert np.isfinite(images).all()
    assert np.isfinite(peer.train_step({"image": np.zeros((4, 12, 12, 1), np.float32), "label": np.arange(4)}))
    assert (peer.peak_memory() is None) == (peer.device.type == "cpu")
    state.pop("var")
    with pytest.raises(RuntimeError, match="var"):
        peer.load(state)
