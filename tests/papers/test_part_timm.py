"""The encoder is the plain vision transformer of timm: arrays that timm made, and timm itself where it is installed.

`python tests/papers/test_part_timm.py` makes the golden file anew, of random weights.
"""

import ast
import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo import weights
from zoo.papers.part import AbsolutePosition, MaskedAutoencoder, Part, PartClassifier

GOLDEN = Path(__file__).parents[1] / "golden" / "part" / "timm.npz"
SHAPE: dict[str, Any] = {"image": 8, "channels": 3, "patch": 4, "width": 16, "depth": 2, "head_dim": 8}
PART = Part(**SHAPE, pairs=4)
ABSOLUTE, MASKED = AbsolutePosition(**SHAPE), MaskedAutoencoder(**SHAPE)
CLASSIFIER = PartClassifier(**SHAPE, classes=5, pool="class", scan=True)
MEAN = dataclasses.replace(CLASSIFIER, pool="mean")


def arguments(task: Any) -> dict[str, Any]:
    """What a task says that timm's model is made with."""
    found = re.match(r"timm: (VisionTransformer\(.*?\));", task.import_note())
    assert found
    call = ast.parse(found[1], mode="eval").body
    assert isinstance(call, ast.Call)
    return {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}


def build(task: Any) -> Any:
    """timm's model, made as the task says."""
    timm = pytest.importorskip("timm", reason="needs the extra `torch`")
    return timm.models.vision_transformer.VisionTransformer(**arguments(task)).eval()


def numbers(model: Any, image: np.ndarray, *, mean: bool = False) -> dict[str, np.ndarray]:
    """What timm makes of images [B, H, W, C]: `tokens` [B, 1 + N, D] with the class token first, and `logits`."""
    import torch

    if mean:
        model.global_pool = "avg"
    with torch.no_grad():
        found = model.forward_features(torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, 1))))
        return {"tokens": found.numpy(), "logits": model.forward_head(found).numpy()}


def images(count: int = 2) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (count, 8, 8, 3)).astype(np.float32)


def ours(task: Any, params: Any, image: np.ndarray) -> dict[str, jax.Array]:
    """The same of ours in one program: `tokens` in timm's order, the abilities of the task, and `logits_of_mean`."""

    def call(params: Any, image: jax.Array) -> dict[str, jax.Array]:
        rows = image.reshape(len(image), 2, 4, 2, 4, 3).swapaxes(2, 3).reshape(len(image), 4, 4, 4, 3)
        z, first = task.encode(params, rows, task.positions(params))
        found = {"tokens": jnp.concatenate([first[:, None], z], 1)}
        batch = {"image": image}
        found |= {k: getattr(task, k)(params, batch) for k in ("features", "feature_map", "logits") if hasattr(task, k)}
        if hasattr(task, "logits"):
            found["logits_of_mean"] = dataclasses.replace(task, pool="mean").logits(params, batch)
        return found

    return jax.jit(call)(params, image)


def near(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.fixture(scope="module")
def golden() -> SimpleNamespace:
    with np.load(GOLDEN) as file:
        arrays = dict(file)
    state = {k.removeprefix("state/"): v for k, v in arrays.items() if k.startswith("state/")}
    return SimpleNamespace(state=state, **{k: v for k, v in arrays.items() if "/" not in k})


@pytest.mark.parametrize("scan", [True, False])
def test_weights_that_timm_had_give_what_timm_gave(golden: SimpleNamespace, scan: bool) -> None:
    task = dataclasses.replace(CLASSIFIER, scan=scan)
    params = weights.from_official(task, golden.state)
    found = ours(task, params, golden.image)
    for name in ("tokens", "logits", "logits_of_mean"):
        near(found[name], getattr(golden, name))
    near(found["features"], golden.tokens[:, 1:].mean(1))
    near(found["feature_map"], golden.tokens[:, 1:].reshape(2, 2, 2, 16))
    assert np.abs(golden.tokens[0] - golden.tokens[1]).max() > 0.1  # the images matter
    again = weights.to_official(task, params)
    assert again.keys() == golden.state.keys()
    for name, value in golden.state.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_what_timm_is_to_be_made_with() -> None:
    shape = {"img_size": 8, "patch_size": 4, "in_chans": 3, "embed_dim": 16, "depth": 2, "num_heads": 2}
    assert arguments(PART) == arguments(ABSOLUTE) == arguments(MASKED) == {**shape, "num_classes": 0}
    assert arguments(CLASSIFIER) == {**shape, "num_classes": 5, "global_pool": "token"}
    assert arguments(MEAN) == {**shape, "num_classes": 5, "global_pool": "avg", "fc_norm": False}
    assert PART.import_note().endswith(
        "; features here are the mean of its patch tokens, forward_features(x)[:, 1:].mean(1), of images x [B, C, H, W] in [-1, 1]"
    )


@pytest.mark.parametrize(
    "task", [PART, ABSOLUTE, MASKED, CLASSIFIER, MEAN], ids=["part", "absolute", "masked", "class", "mean"]
)
def test_timm_reads_what_is_exported_and_computes_the_same(tmp_path: Path, task: Any) -> None:
    model = build(task)
    from safetensors.torch import load_file

    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), weights.abstract(task))
    file = tmp_path / "vit.safetensors"
    weights.write_state_dict(file, weights.to_official(task, params))
    model.load_state_dict(load_file(file), strict=True)
    image = images()
    theirs, found = numbers(model, image), ours(task, params, image)
    near(found["tokens"], theirs["tokens"])
    near(found["features"], theirs["tokens"][:, 1:].mean(1))
    if hasattr(task, "logits"):
        near(found["logits"], theirs["logits"])
        other = dataclasses.replace(task, pool="class" if task.pool == "mean" else "mean")
        assert np.abs(np.asarray(ours(other, params, image)["logits"]) - theirs["logits"]).max() > 0.01  # pools differ


def test_the_golden_file_is_what_timm_gives(golden: SimpleNamespace) -> None:
    pytest.importorskip("timm", reason="needs the extra `torch`")
    import torch

    model = build(CLASSIFIER)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in golden.state.items()}, strict=True)
    found = numbers(model, golden.image)
    near(found["tokens"], golden.tokens)
    near(found["logits"], golden.logits)
    near(numbers(model, golden.image, mean=True)["logits"], golden.logits_of_mean)


def make() -> None:
    """Write the golden file: every weight random, so that none can be left out unseen."""
    import torch

    model = build(CLASSIFIER)
    torch.manual_seed(0)
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.3)
    state = {f"state/{k}": v.numpy() for k, v in model.state_dict().items()}
    found, image = numbers(model, images()), images()
    mean = numbers(model, image, mean=True)["logits"]
    np.savez_compressed(GOLDEN, image=image, **found, logits_of_mean=mean, **state)


if __name__ == "__main__":
    make()
