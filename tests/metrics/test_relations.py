"""Predicted relations: exact ones score one and give the layout back, noise does not; the picture reaches folder and line."""

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mistakes import told
from PIL import Image
from unigram import Listed

from zoo import cli, models
from zoo.commands.draw import save_pictures
from zoo.data.images import Digits
from zoo.data.pipeline import Data
from zoo.papers.part.metrics import Relations, in_pixels, spearman
from zoo.run import Run
from zoo.task import About, Metric
from zoo.train import watch
from zoo.train.report import Report, read_metrics

RNG = jax.random.key(0)
SMALL = {"test": 40, "batch": 16, "images": 4}


@dataclass(frozen=True)
class Exact:
    """Boxes in images 8x8x1 (or series of 32), and relations that are the true ones, or at `noise` 1 nothing but noise.

    So is the layout.
    """

    noise: float = 0.0
    series: bool = False
    patches: int = 9
    blank: bool = False

    @property
    def about(self) -> About:
        return About(unit="series" if self.series else "images")

    @property
    def relation_names(self) -> tuple[str, ...]:
        return ("dt", "dw") if self.series else ("dx", "dy", "dw", "dh")

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        shape = {"series": (batch, 32, 2)} if self.series else {"image": (batch, 8, 8, 1)}
        return {key: jax.ShapeDtypeStruct(s, jnp.float32) for key, s in shape.items()}

    def init(self, rng: Any) -> Any:
        return {}

    def loss(self, params: Any, batch: Any, rng: Any) -> Any:
        return jnp.zeros(()), {}

    def relations(self, params: Any, batch: Any, rng: Any) -> dict[str, jax.Array]:
        b, a, side = next(iter(batch.values())).shape[0], 1 if self.series else 2, 32.0 if self.series else 8.0
        keys = jax.random.split(rng, 4)
        size = jax.random.uniform(keys[0], (b, self.patches, a), minval=side / 8, maxval=side / 2)
        start = jax.random.uniform(keys[1], size.shape) * (side - size)
        centre = start + size / 2
        reference, target = ((x[:, :, None], x[:, None]) for x in (size, centre))
        reference, target = reference[0], (target[1] - target[0]) / reference[0]
        true = jnp.concatenate([target, size[:, None] / reference], -1)
        wrong = self.noise * jax.random.normal(keys[2], true.shape) * true.std((0, 1, 2))
        # up to scale and shift, which nothing but the true boxes can give back
        rebuilt = centre / 3 - 7 + self.noise * 1e3 * jax.random.normal(keys[3], centre.shape)
        patches = jnp.linspace(-1, 1, 16).reshape(16, 1) if self.series else jnp.linspace(-1, 1, 16).reshape(4, 4, 1)
        full = jnp.broadcast_to(patches, (b, self.patches, *patches.shape[: 2 - self.series], 2 if self.series else 1))
        inked = jnp.arange(self.patches) < (2 if self.blank else self.patches - 2)
        return {
            "patches": full * inked.reshape(-1, *[1] * (full.ndim - 2)),
            "boxes": jnp.stack([start, size], -2),
            "predicted": (1 - self.noise) * true + wrong,
            "true": true,
            "layout": jnp.stack([rebuilt - size / 6, size / 3], -2),
        }


@dataclass(frozen=True)
class Curves(Data):
    """Noise [32, 2]."""

    def source(self, split: str, spec: Any = None) -> Any:
        rng = np.random.default_rng(0)
        return Listed({"series": rng.normal(size=(32, 2)).astype(np.float32)} for _ in range(20))


def test_exact_relations_score_one_and_give_the_layout_back() -> None:
    found = Relations(**SMALL)(Exact(), {}, Digits(), RNG)
    for name in ("dx", "dy", "dw", "dh"):
        assert found[f"r2_{name}"] == pytest.approx(1)
        assert found[f"mae_{name}"] == pytest.approx(0, abs=1e-6)
        assert found[f"mae_constant_{name}"] > 0.3
        assert found[f"r2_shuffled_{name}"] < 0
    assert found["layout_all"] == found["layout_ink"] == pytest.approx(1)
    assert abs(found["layout_shuffled"]) < 0.1
    assert (found["images"], found["layout_ink_images"]) == (40, 40)
    picture = found["pictures"]["layout"]
    assert isinstance(picture, Image.Image)
    assert picture.width > 2 * 3 * 192  # two blocks of three panels
    pixels = np.asarray(picture)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 30


def test_noise_is_no_better_than_a_constant() -> None:
    found = Relations(**SMALL, picture=False)(Exact(noise=1.0), {}, Digits(), RNG)
    assert all(found[f"r2_{name}"] <= 0 for name in ("dx", "dy", "dw", "dh"))
    assert found["mae_dx"] > 0.5 * found["mae_constant_dx"]
    assert abs(found["layout_all"]) < 0.15
    assert "pictures" not in found


def test_series_have_their_own_axis_and_picture() -> None:
    found = Relations(**SMALL, every=3)(Exact(series=True), {}, Curves(), RNG)
    assert found["r2_dt"] == pytest.approx(1)
    assert found["images"] == 20  # fewer than asked for
    assert found["layout_all"] == pytest.approx(1)
    assert found["pictures"]["layout"].width < 2 * 3 * 320  # series stand in one block


def test_blank_patches_are_left_out_and_so_are_images_of_them_alone() -> None:
    found = Relations(**SMALL, picture=False)(Exact(blank=True), {}, Digits(), RNG)
    assert found["layout_ink_images"] == 0
    assert "layout_ink" not in found
    assert found["layout_all"] == pytest.approx(1)
    assert Relations(**SMALL, ink=5.0, picture=False)(Exact(), {}, Digits(), RNG)["layout_ink_images"] == 0


def test_ranks_and_the_place_of_a_rebuilt_layout() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, (12, 2)), rng.integers(0, 5, (12, 2))
    want = np.mean([spearmanr(a[:, k], b[:, k]).statistic for k in range(2)])
    assert spearman(a, b) == pytest.approx(want)
    assert spearman(a, np.zeros((12, 2))) == 0
    assert "-" not in str(Relations()._layout(-boxes_of(a), boxes_of(np.zeros((12, 2))), np.ones((1, 12), bool))[0])
    boxes = np.stack([rng.uniform(0, 9, (3, 6, 2)), rng.uniform(1, 4, (3, 6, 2))], -2)
    scale = np.exp(np.log(boxes[..., 1, :]).mean(1))[:, None, None]
    shifted = boxes / scale
    shifted[..., 0, :] -= 5
    np.testing.assert_allclose(in_pixels(shifted, boxes), boxes, atol=1e-9)


def boxes_of(starts: np.ndarray) -> np.ndarray:
    """Boxes [1, N, 2, A] of size 1."""
    return np.stack([starts, np.ones_like(starts)], -2)[None].astype(float)


SERIES_RUN = """
from zoo.data.series import Series
from zoo.papers.part.metrics import Localise
from zoo.papers.part.metrics import Relations
from zoo.papers.part import AbsolutePosition, Part
from zoo.run import Run

_encoder = dict(image=0, length=16, channels=1, patch=4, width=8, depth=1, head_dim=8)
config = Run(
    task=Part(**_encoder, pairs=4),
    data=Series("wave.csv", length=16),
    steps=2, batch=8, workdir="run", evals=(Relations(batch=8), Localise(batch=8)),
)
arrays = Run(
    task=AbsolutePosition(**_encoder),
    data=Series("series.npz", length=16, labels="", standardise=False),
    steps=2, batch=8, workdir="run", evals=(Localise(batch=8),),
)
"""


def test_no_step_is_taken_where_the_last_look_would_fail(tmp_path: Any, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.py").write_text(SERIES_RUN)
    rng = np.random.default_rng(0)
    np.savetxt("wave.csv", rng.normal(size=(48, 1)))  # three windows
    train, test = rng.normal(size=(2, 4, 16, 1))
    test[1, 3] = np.nan
    np.savez("series.npz", train_series=train, test_series=test)
    for config, words in (
        (
            "run.py",
            "the metric relations compares series with others, and data=Series has 1 of them in its test split; set",
        ),
        ("run.py:arrays", "array 'test_series' has nan in row 1 (time step 3, channel 0)"),
    ):
        assert cli.main(["train", config]) == 2
        out, err = capsys.readouterr()
        assert words in err
        assert "step" not in out
        assert not (tmp_path / "run").exists()
    for task, words in (
        (Exact(patches=1), "cuts 1 from an image"),
        (Exact(noise=np.nan), "gives numbers that are not"),
    ):
        with told(words):
            Relations(**SMALL)(task, {}, Digits(), RNG)


# --- pictures, from metric to folder --------------------------------------------------------------


@dataclass(frozen=True)
class Draws(Metric):
    """A figure and a picture."""

    split: str = "test"
    every: int = 0

    name = "draws"

    def __call__(self, task: Any, params: Any, data: Any, rng: Any) -> dict[str, Any]:
        return {"figure": 1.5, "split": self.split, "pictures": {"layout": Image.new("RGB", (5, 3), (255, 0, 0))}}


def test_a_run_saves_pictures_and_keeps_them_out_of_its_records(tmp_path: Any) -> None:
    run = Run(Exact(), Digits(), batch=8, steps=800, evals=(Draws(), Draws(split="train")))
    with Report(tmp_path, start=0, total=800, batch=8, quiet=True) as report:
        found = watch.Watch(run, report, ()).look(800, SimpleNamespace(params={}, ema={}))
    assert found == [{"figure": 1.5, "split": "test"}, {"figure": 1.5, "split": "train"}]
    assert [set(r) & {"figure", "pictures"} for r in read_metrics(tmp_path / "metrics.jsonl")] == [{"figure"}] * 2
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        "layout-test-0000800.png",
        "layout-train-0000800.png",
    ]
    with Image.open(tmp_path / "samples/layout-test-0000800.png") as picture:
        assert picture.size == (5, 3)
        assert picture.text == {"step": "800", "weights": "raw"}  # type: ignore[attr-defined]
    assert any(b"layout-test" in p.read_bytes() for p in (tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("home", ["run", "read-only"])
def test_eval_saves_pictures_and_prints_where(tmp_path: Any, monkeypatch: Any, capsys: Any, home: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if home == "read-only":
        (folder / "samples").write_text("in the way")
    run = Run(Exact(), Digits(), batch=8, steps=800)
    model = models.Model(Exact(), {}, "raw", 800, Digits(), (), folder, run)
    monkeypatch.setattr(models, "open_model", lambda *a, **k: model)
    monkeypatch.setattr(models, "open_task", lambda *a, **k: (model.task, folder))
    monkeypatch.setattr("zoo.metrics.named", lambda: {"draws": Draws})
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", "model", "draws"]) == 0
    line = json.loads(capsys.readouterr().out)
    where = line["pictures"]["layout"]
    assert where == (str(folder / "samples/layout-0000800.png") if home == "run" else "samples/layout-0000800.png")
    with Image.open(where) as picture:
        assert picture.size == (5, 3)
    assert line["figure"] == 1.5


def test_eval_overwrites_no_picture(tmp_path: Any, monkeypatch: Any) -> None:
    """That of training stays, and so does each of evaluations: in the run's folder and, of an export, here."""
    monkeypatch.chdir(tmp_path)
    first = {"layout": Image.new("RGB", (5, 3), (255, 0, 0))}
    other = {"layout": Image.new("RGB", (7, 3)), "second": Image.new("RGB", (7, 3))}
    model = models.Model(Exact(), {}, "raw", 800, Digits(), (), tmp_path / "run", Run(Exact(), Digits(), 8, 800))
    for opened, stem in ((model, "run/samples/"), (replace(model, run=None, step=None), "samples/")):
        step = "-0000800" if opened.run else ""
        found = [save_pictures(opened, pictures) for pictures in (first, other, other)]
        names = [str((tmp_path / saved["layout"]).relative_to(tmp_path)) for saved in found]
        assert names == [f"{stem}layout{step}{count}.png" for count in ("", "-2", "-3")]
        assert [Image.open(tmp_path / name).width for name in names] == [5, 7, 7]
        assert found[2]["second"].endswith(f"second{step}-2.png")
