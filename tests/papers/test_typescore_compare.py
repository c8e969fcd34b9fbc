"""Results of models compared: ranking, refusals, coarse metrics, what people said."""

import csv
import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from zoo.errors import UserError
from zoo.papers.typescore import instructions as lists
from zoo.papers.typescore import render as drawing
from zoo.papers.typescore.compare import Coarse, Compare, agreement, load_all, pair, pairs, resolution, scored, z_of
from zoo.papers.typescore.evaluate import TypeScore
from zoo.papers.typescore.extractors import Extraction, Oracle
from zoo.papers.typescore.instructions import Instruction
from zoo.papers.typescore.render import Corruption, plain, save, save_all

TEXTS = (
    "Open daily",
    "Jazz night at nine",
    "Mind the step",
    "Fresh bread & butter",
    "No entry after 8 pm",
    "Lost? Ask us",
)
LIST = [
    Instruction(
        f"t-{i}",
        f'A sign says "{text}".',
        text,
        (text,),
        {"colour": "red", "font": "serif"},
        lists.length_bin(text),
        "shop",
    )
    for i, text in enumerate(TEXTS)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A list `wanted.jsonl`, and `a`: two pictures of each instruction, of which some have faults."""
    lists.write(tmp_path / "wanted.jsonl", LIST)
    (tmp_path / "a").mkdir()
    for one in LIST:
        for k, text in enumerate((one.text, one.text.replace("e", "a"))):
            save(plain(text, size=64, points=8), tmp_path / "a" / f"{one.id}_{k}.png")
    return tmp_path


def score(folder: Path, images: str = "a", **fields: Any) -> TypeScore:
    fields = {"extractor": Oracle(), "resamples": 50, **fields}
    return TypeScore(wanted=str(folder / "wanted.jsonl"), images=str(folder / images), **fields)


@dataclasses.dataclass(frozen=True)
class Fake:
    """Reads what the renderer drew, with every "e" read as `e_as`."""

    e_as: str = "e"

    name: ClassVar[str] = "fake"
    batch: ClassVar[int] = 2

    def version(self) -> str:
        return "1"

    def check(self) -> None: ...

    @property
    def described(self) -> dict[str, Any]:
        return {"name": "fake", "version": "1", "config": {}}

    def extract(self, images: Sequence[Image.Image]) -> list[Extraction]:
        return [Extraction(image.info[drawing.TEXT].replace("e", self.e_as)) for image in images]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results `good`, `fair` and `poor` on twelve instructions, with the pictures."""
    root = tmp_path_factory.mktemp("models")
    some = [
        Instruction(f"t-{i}", f'"{text}"', text, (text,), {"colour": "blue"}, lists.length_bin(text), "shop")
        for i, text in enumerate(f"{a} {b}" for a in TEXTS for b in ("for all who sail", "and a warm stove"))
    ]
    lists.write(root / "wanted.jsonl", some)
    for seed, (name, p) in enumerate((("good", 0.0), ("fair", 0.1), ("poor", 0.3))):
        save_all(some, root / name, Corruption(p_char=p), seed=seed, size=96)
        score(root, name).run()
    return root


@pytest.fixture
def models(made: Path, tmp_path: Path) -> Path:
    """A copy of these, to be spoilt; `folder` lies beside."""
    return Path(shutil.copytree(made, tmp_path / "models"))


def test_models_are_ranked_with_paired_significance(models: Path) -> None:
    names = tuple(str(models / f"{name}-typescore") for name in ("poor", "good", "fair"))
    out = models / "compared"
    found = Compare(names, str(out), surrogate=True, wanted=str(models / "wanted.jsonl"), resamples=100).run()
    assert [one["label"] for one in found["ranking"]] == ["good", "fair", "poor"]
    assert [one["told_apart_from_next"] for one in found["ranking"]] == [True, True, None]
    assert found["instructions"] == 12
    first = found["pairs"][0]
    assert (first["a"], first["b"]) == ("good", "fair")
    assert first["low"] <= first["difference"] <= first["high"]
    assert first["win_rate"] > 0.9
    assert found["resolution"]["TypeScore"]["told_apart"] == 1
    assert found["resolution"]["coarse surrogate"]["pairs"] == 3
    assert json.loads((out / "comparison.json").read_text())["pairs"] == found["pairs"]
    assert "| 1 | good |" in (out / "comparison.md").read_text()
    assert Image.open(out / "comparison.png").width > 400
    assert "CLIPScore" not in json.dumps(found)


def test_the_surrogate_is_1_for_the_right_picture(models: Path) -> None:
    one = lists.read(models / "wanted.jsonl")[0]
    from zoo.papers.typescore import compare

    right = drawing.render(one, seed=compare._SEED)
    assert Coarse().score([right, drawing.render(one, seed=1)], [one, one]) == [
        pytest.approx(1),
        pytest.approx(0.9, abs=0.1),
    ]
    result = load_all([str(models / "good-typescore")])[0]
    assert len(scored(result, Coarse(), {i.id: i for i in lists.read(models / "wanted.jsonl")})) == 12
    with pytest.raises(UserError, match="wanted has no instruction 't-0'"):
        scored(result, Coarse(), {})


def test_clip_needs_its_packages_before_anything_is_read(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    names = tuple(str(models / f"{name}-typescore") for name in ("good", "fair"))
    with pytest.raises(UserError, match=r"clip=weights needs the package transformers.*extra `vlm`"):
        Compare(names, str(models / "x"), clip="weights").run()


def test_results_that_do_not_compare_are_refused(models: Path, folder: Path) -> None:
    good = str(models / "good-typescore")
    for fields, what in (
        ({"case_sensitive": True}, "normalisation.case_sensitive"),
        ({"weights": (1.0, 1.0, 0.0)}, "weights"),
        ({"extractor": Fake()}, "extractor.name"),
    ):
        out = models / f"other-{what}"
        score(models, "fair", out=str(out), **fields).run()
        with pytest.raises(UserError, match=f"do not compare, since they differ in {what}"):
            Compare((good, str(out)), str(models / "x")).run()
    shutil.copytree(models / "fair-typescore", models / "half")
    (models / "half" / "summary.json").unlink()
    with pytest.raises(UserError, match="half has not come to its end"):
        Compare((good, str(models / "half")), str(models / "x")).run()
    setting = models / "fair-typescore" / "setting.json"
    setting.write_text(setting.read_text().replace('"spec_version": "1"', '"spec_version": "0"'))
    with pytest.raises(UserError, match="differ in spec_version"):
        Compare((good, str(models / "fair-typescore")), str(models / "x")).run()
    score(folder).run()
    with pytest.raises(UserError, match="instruction 't-0' wants"):
        Compare((str(folder / "a-typescore"), good), str(models / "x")).run()
    for names, message in (
        ((good,), "no two results"),
        ((good, good), "named twice"),
        ((good, str(models / "nowhere")), "nowhere does not exist"),
        ((good, str(models / "good")), "holds no setting.json"),
    ):
        with pytest.raises(UserError, match=message):
            Compare(names, str(models / "x")).run()
    assert not (models / "x").exists()


def test_z_and_wins() -> None:
    rng = np.random.default_rng(0)
    apart = rng.normal(1, 2, 50)
    assert z_of(apart) == pytest.approx(apart.mean() / (apart.std(ddof=1) / math.sqrt(50)))
    assert z_of(np.zeros(5)) == 0
    assert z_of(np.full(5, -0.25)) == -math.inf
    one = {"a": 3.0, "b": 2.0, "c": 1.0, "d": 9.0}
    other = {"a": 1.0, "b": 2.0, "c": 2.0, "e": 9.0}
    found = pair("x", "y", one, other)
    assert (found.instructions, found.ties, found.win_rate) == (3, 1, 0.5)
    assert found.difference == pytest.approx(1 / 3)
    assert pair("x", "y", {"a": 3.0, "b": 2.0}, {"a": 1.0, "b": 1.0}, lower_is_better=True).win_rate == 0
    with pytest.raises(UserError, match="1 instructions in common"):
        pair("x", "y", one, {"a": 1.0})
    scores = {"x": {str(i): 10.0 + 0.1 * (i % 3) for i in range(9)}, "y": {str(i): 5.0 for i in range(9)}}
    assert resolution(pairs(scores), ["x", "y"]).right == 1
    assert resolution(pairs(scores), ["y", "x"]).right == 0


def test_people_agree_or_not(models: Path) -> None:
    results = load_all([str(models / f"{name}-typescore") for name in ("good", "fair", "poor")])
    rows = [(f"{r.label}/{record['image']}", record["score"]) for r in results for record in r.records]
    path = models / "human.csv"

    def write(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([head, *lines])

    write(("image", "rating"), [(name, 2 * value) for name, value in rows])
    found = agreement(path, results, resamples=50)
    assert found["spearman"][0] == pytest.approx(1)
    assert found["kendall_tau_b"] == [pytest.approx(1)] * 3
    assert found["pair_accuracy"] == [1, 1, 1]
    assert found["pairs_within_instructions"]
    assert found["models"] == {"spearman": pytest.approx(1), "kendall_tau_b": pytest.approx(1)}
    write(("image", "rating"), [(name, -value) for name, value in rows])
    assert agreement(path, results, resamples=20)["pair_accuracy"][0] == 0
    write(("image", "rating"), [(name, 5) for name, _ in rows])
    found = agreement(path, results, resamples=20)
    assert found["spearman"] == [None, None, None]
    assert found["models"] == {"spearman": None, "kendall_tau_b": None}
    write(
        ("image_a", "image_b", "preferred"),
        [(f"good/t-{i}_0.png", f"poor/t-{i}_0.png", "a" if i else "tie") for i in range(6)]
        + [("good/t-0_0.png", "good/t-1_0.png", "b")],  # both 100
    )
    found = agreement(path, results, resamples=50)
    assert (found["preferences"], found["ties"]) == (6, 1)
    assert found["pair_accuracy"][0] == pytest.approx(5.5 / 6)
    for head, lines, message in (
        (("image", "rating"), [("good/t-0_9.png", 1)], "line 2: no picture 'good/t-0_9.png'"),
        (("image", "rating"), [("good/t-0_0.png", "great")], "line 2: rating is 'great'"),
        (("image", "rating"), [("good/t-0_0.png", "1")], "needs three"),
        (("image_a", "image_b", "preferred"), [("good/t-0_0.png", "poor/t-0_0.png", "c")], "write a, b or tie"),
        (("picture", "stars"), [("x", 1)], "columns picture, stars"),
        (("image", "rating"), [], "no lines"),
    ):
        write(head, lines)
        with pytest.raises(UserError, match=message):
            agreement(path, results)
