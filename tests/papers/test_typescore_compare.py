"""Results of models compared: ranking, refusals, coarse metrics, what people said."""

import contextlib
import csv
import dataclasses
import itertools
import json
import math
import shutil
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mistakes import told
from PIL import Image
from typescore_list import TEXTS, Fake, score

from zoo.errors import UserError
from zoo.papers.typescore import instructions as lists
from zoo.papers.typescore import render as drawing
from zoo.papers.typescore.agreement import agreement
from zoo.papers.typescore.coarse import Clip, Coarse, scored
from zoo.papers.typescore.compare import Compare
from zoo.papers.typescore.extractors import Oracle
from zoo.papers.typescore.instructions import Instruction
from zoo.papers.typescore.render import Corruption, save_all
from zoo.papers.typescore.results import Result, load_all, pair, pairs, resolution, z_of


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


def results(models: Path, *names: str) -> tuple[str, ...]:
    return tuple(str(models / f"{name}-typescore") for name in names or ("good", "fair", "poor"))


def test_models_are_ranked_with_paired_significance(models: Path) -> None:
    out = models / "compared"
    names = results(models, "poor", "good", "fair")
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
    from zoo.papers.typescore import coarse

    right = drawing.render(one, seed=coarse._SEED)
    assert Coarse().score([right, drawing.render(one, seed=1)], [one, one]) == [
        pytest.approx(1),
        pytest.approx(0.9, abs=0.1),
    ]
    result = load_all([str(models / "good-typescore")])[0]
    assert len(scored(result, Coarse(), {i.id: i for i in lists.read(models / "wanted.jsonl")})) == 12
    with told("wanted", "'t-0'"):
        scored(result, Coarse(), {})


def test_clip_needs_its_packages_before_anything_is_read(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with told("clip=weights", "transformers", "`vlm`"):
        Compare(results(models, "good", "fair"), str(models / "x"), clip="weights").run()


def test_pictures_are_scored_for_the_texts_that_they_were_evaluated_for(models: Path) -> None:
    result = load_all([str(models / "good-typescore")])[0]
    known = {i.id: i for i in lists.read(models / "wanted.jsonl")}
    known["t-1"] = dataclasses.replace(known["t-1"], text="Another text")
    with told("'Another text'", "'t-1'", "good", "'Open"):
        scored(result, Coarse(), known)
    known = {i.id: i for i in lists.read(models / "wanted.jsonl")}
    (models / "good" / "t-1_0.png").write_bytes(b"no picture")
    with told("t-1_0.png", "needs the pictures"):
        scored(result, Coarse(), known)
    (models / "good" / "t-1_0.png").unlink()
    with told("t-1_0.png", "no longer"):
        scored(result, Coarse(), known)


def test_the_right_pictures_are_drawn_once_for_all_models(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.papers.typescore import coarse

    drawn = []
    monkeypatch.setattr(coarse, "render", lambda one, seed: drawn.append(one.id) or drawing.render(one, seed=seed))
    known = {i.id: i for i in lists.read(models / "wanted.jsonl")}
    coarse = Coarse()
    for result in load_all([str(models / f"{name}-typescore") for name in ("good", "fair")]):
        scored(result, coarse, known)
    assert sorted(drawn) == sorted(known)


class Torch(types.ModuleType):
    """What `Clip` takes of torch, by NumPy."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.no_grad = contextlib.nullcontext
        self.nn = types.SimpleNamespace(functional=types.SimpleNamespace(cosine_similarity=self.cosine))

    @staticmethod
    def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


class Transformers(types.ModuleType):
    """A CLIP model that embeds a picture by its first pixel and a text by its letters r, g and b; notes its calls."""

    def __init__(self) -> None:
        super().__init__("transformers")
        self.opened: list[str] = []
        self.batches: list[int] = []
        self.CLIPModel = self.CLIPProcessor = types.SimpleNamespace(from_pretrained=self.open)

    def open(self, name: str) -> "Transformers":
        self.opened.append(name)
        if name == "broken":
            raise OSError("broken holds no config.json\nand more")
        return self

    def eval(self) -> "Transformers":
        return self

    def __call__(self, text: Any = None, images: Any = None, image: Any = None, **how: Any) -> Any:
        if image is not None:
            return types.SimpleNamespace(image_embeds=image, text_embeds=how["words"])
        assert how == {"return_tensors": "pt", "truncation": True, "padding": True}
        assert all(one.mode == "RGB" for one in images)
        self.batches.append(len(images))
        words = np.array([[line.count(letter) for letter in "rgb"] for line in text], float)
        return {"image": np.array([one.getpixel((0, 0)) for one in images], float), "words": words}


def test_clip_is_opened_once_and_scores_in_chunks(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.papers.typescore import coarse

    monkeypatch.setattr(coarse, "_CHUNK", 5)
    fake = Transformers()
    monkeypatch.setitem(sys.modules, "torch", Torch())
    monkeypatch.setitem(sys.modules, "transformers", fake)
    red, green = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("L", (4, 4), 0).convert("RGBA")
    green.paste((0, 255, 0, 255), (0, 0, 4, 4))
    some = [Instruction("a", "rr", "x"), Instruction("b", "", "rg")]
    clip = Clip("weights")
    assert clip.score([red, green], some) == [pytest.approx(2.5), pytest.approx(2.5 / math.sqrt(2))]
    assert clip.score([green], some[:1]) == [0]
    assert fake.opened == ["weights", "weights"]  # the model and its processor
    with pytest.raises(ValueError, match="1 pictures of 2"):
        clip.score([red], some)
    fake.opened.clear()
    fake.batches.clear()
    wanted = str(models / "wanted.jsonl")
    found = Compare(results(models), str(models / "x"), clip="weights", wanted=wanted, resamples=5).run()
    assert found["resolution"]["CLIPScore"]["pairs"] == 3
    assert fake.opened == ["weights", "weights"]
    assert fake.batches == [5, 5, 2] * 3
    with told("clip=broken", "config.json"):
        Compare(results(models), str(models / "y"), clip="broken").run()
    assert not (models / "y").exists()


def test_results_that_do_not_compare_are_refused(models: Path, folder: Path) -> None:
    good = str(models / "good-typescore")
    score(models, "fair", out=str(models / "cased"), case_sensitive=True).run()
    score(models, "fair", out=str(models / "read"), extractor=Fake()).run()
    shutil.copytree(models / "fair-typescore", models / "half")
    (models / "half" / "summary.json").unlink()
    setting = models / "fair-typescore" / "setting.json"
    setting.write_text(setting.read_text().replace('"spec_version": "1"', '"spec_version": "0"'))
    score(folder).run()
    for names, words in (
        ((good, str(models / "cased")), "normalisation.case_sensitive"),
        ((good, str(models / "read")), "extractor.name"),
        ((good, str(models / "half")), "half end"),
        ((good, str(models / "fair-typescore")), "spec_version"),
        ((str(folder / "a-typescore"), good), "'t-0'"),
        ((good,), "two results"),
        ((good, good), "good twice"),
        ((good, str(models / "nowhere")), "nowhere"),
        ((good, str(models / "good")), "setting.json"),
    ):
        with told(*words.split()):
            Compare(names, str(models / "x")).run()
    assert not (models / "x").exists()


def test_the_right_order_is_known_or_not(models: Path) -> None:
    names = results(models)
    fields = {"surrogate": True, "wanted": str(models / "wanted.jsonl"), "resamples": 5}
    compared = Compare(names, str(models / "x"), **fields).run()
    assert compared["truth"] is None
    assert compared["resolution"]["TypeScore"]["right"] is None
    assert "rightly" not in (models / "x" / "comparison.md").read_text()
    found = Compare(names, str(models / "x"), truth=("good", "fair", "poor"), **fields).run()
    assert found["resolution"]["TypeScore"]["right"] == 1
    assert found["resolution"]["coarse surrogate"]["right"] is not None
    assert "| TypeScore | 100% of 3 | 100% | " in (models / "x" / "comparison.md").read_text()
    found = Compare(names, str(models / "x"), truth=("good", "poor", "fair"), **fields).run()
    assert found["resolution"]["TypeScore"]["right"] == pytest.approx(2 / 3, abs=1e-5)
    for truth, words in (
        (("good", "fair"), "truth=good,fair poor"),
        (("good", "fair", "pooor"), "truth 'pooor' 'poor'"),
        (("good", "fair", "poor", "fair"), "twice"),
    ):
        with told(*words.split()):
            Compare(names, str(models / "y"), truth=truth).run()
    assert not (models / "y").exists()
    scores = {"x": {str(i): 5.0 for i in range(9)}, "y": {str(i): 10.0 + i % 3 for i in range(9)}}
    with told("x, y"):
        resolution(pairs(scores), [])


def test_where_less_is_better_the_right_order_and_infinite_z_keep_their_sign(models: Path) -> None:
    out = []
    for name in ("good", "fair", "poor"):
        out.append(str(models / f"{name}-apart"))
        score(models, name, kind="dissimilarity", weights=(2.0, 1.0, 0.0), out=out[-1]).run()
    truth = ("good-apart", "fair-apart", "poor-apart")
    found = Compare(tuple(out), str(models / "x"), truth=truth, resamples=5).run()
    assert [one["label"] for one in found["ranking"]] == list(truth)
    assert found["resolution"]["TypeScore"]["right"] == 1
    assert all(one["z"] < -1.96 for one in found["pairs"])
    found = Compare(tuple(out), str(models / "x"), truth=truth[::-1], resamples=5).run()
    assert found["resolution"]["TypeScore"]["right"] == 0
    text = (models / "x" / "comparison.md").read_text()
    assert "kind=dissimilarity, weights NED 2, NLCS 1, SW 0" in text
    assert "case_sensitive=false, ignore_punct=false, piece_mode=join" in text
    for name, value in (("good", 0.0), ("fair", 5.0), ("poor", 5.0)):
        path = models / f"{name}-apart" / "records.jsonl"
        rows = [json.loads(line) | {"score": value} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Compare(tuple(out), str(models / "x"), truth=truth, resamples=5).run()
    assert [one["z"] for one in found["pairs"]] == ["-inf", "-inf", 0]
    assert float(found["pairs"][0]["z"]) == -math.inf
    assert found["resolution"]["TypeScore"]["median_z"] == "inf"
    text = (models / "x" / "comparison.md").read_text()
    assert "| good-apart over fair-apart | -5.00 (-5.00 to -5.00) | 100% | -∞ |" in text
    assert "| TypeScore | 67% of 3 | 67% | ∞ |" in text
    json.loads((models / "x" / "comparison.json").read_text(), parse_constant=pytest.fail)


def test_one_result_is_enough_to_compare_it_with_people(models: Path) -> None:
    good = str(models / "good-typescore")
    path = judged(models / "human.csv", RATED, [(f"t-{i}_0.png", i) for i in range(8)])
    found = Compare((good,), str(models / "x"), human=str(path), resamples=5).run()
    assert found["human"]["pictures"] == 8
    assert (len(found["ranking"]), found["pairs"], found["resolution"]) == (1, [], {})
    text = (models / "x" / "comparison.md").read_text()
    assert text.startswith("TypeScore of 1 model on 12 instructions")
    assert "Agreement with people: 8 ratings on 8 instructions; 0 lines" in text
    assert "| by picture: accuracy on pairs | 0.50" in text  # all score 100, and a tie is half right
    assert "| 28 |" in text
    with told("one model", "two results"):
        Compare((good,), human=str(path), surrogate=True)


def test_a_comparison_is_never_put_in_place_of_that_of_other_results(models: Path) -> None:
    good, fair, poor = results(models)
    out = models / "x"
    Compare((good, fair), str(out), resamples=5).run()
    before = (out / "comparison.json").read_bytes()
    with told("../fair-typescore", "out=FOLDER"):
        Compare((good, poor), str(out), resamples=5).run()
    assert (out / "comparison.json").read_bytes() == before
    Compare((fair, good), str(out), resamples=9, seed=3).run()  # the same results
    moved = models.with_name("moved")
    models.rename(moved)
    Compare((str(moved / "fair-typescore"), str(moved / "good-typescore")), str(moved / "x"), resamples=5).run()
    moved.rename(models)
    for name, text in (("json", "{}"), ("json", "no json"), ("md", "my own")):
        other = models / f"other-{text}"
        other.mkdir()
        (other / f"comparison.{name}").write_text(text)
        with told("of which results"):
            Compare((good, poor), str(other), resamples=5).run()
        assert (other / f"comparison.{name}").read_text() == text
    with told("no folder"):
        Compare((good, poor), str(models / "wanted.jsonl")).run()


def test_extractors_are_compared_on_the_same_pictures(models: Path) -> None:
    read = {}
    for key, extractor in (("a", Fake()), ("b", Fake("a"))):
        for name in ("good", "fair", "poor"):
            read[name, key] = str(models / f"{name}-by-{key}")
            score(models, name, out=read[name, key], extractor=extractor).run()
    oracle = {name: str(models / f"{name}-typescore") for name in ("good", "fair", "poor")}
    names = (*oracle.values(), *read.values())
    out = models / "x"
    with told("extractor.name", "extractors=true"):
        Compare(names, str(out)).run()
    found = Compare(names, str(out), extractors=True, resamples=20).run()
    labels = ["oracle 1", "fake 1 (e_as=e)", "fake 1 (e_as=a)"]
    assert [one["label"] for one in found["extractors"]] == labels
    assert [[m["label"] for m in one["order"]] for one in found["extractors"]] == [["good", "fair", "poor"]] * 3
    assert (found["models"], found["instructions"], found["pictures"], found["left_out"]) == (3, 12, 36, 0)
    same, other, _ = found["agreement"]
    assert (same["a"], same["b"], same["spearman"], same["kendall_tau_b"]) == (*labels[:2], 1, pytest.approx(1))
    assert (same["pearson_by_picture"], same["difference"], same["low"]) == (pytest.approx(1), 0, 0)
    assert 0 < other["low"] <= other["difference"] <= other["high"]
    means = [np.mean([m["score"] for m in one["order"]]) for one in found["extractors"]]
    assert other["difference"] == pytest.approx(means[0] - means[2], abs=1e-3)
    assert other["pearson_by_picture"] < 0.999
    assert "extractor" not in found
    saved = json.loads((out / "comparison.json").read_text())
    assert saved["agreement"] == found["agreement"]
    assert saved["extractors"][0]["extractor"]["name"] == "oracle"
    text = (out / "comparison.md").read_text()
    assert "| oracle 1 and fake 1 (e_as=e) | 1.000 | 1.000 | 1.000 | +0.00 (+0.00 to +0.00) |" in text
    assert "| oracle 1 | good 100.0 (100.0 to 100.0); fair " in text
    assert Image.open(out / "comparison.png").width > 400
    good, mine = oracle["good"], read["good", "a"]
    score(models, "good", out=str(models / "strict"), extractor=Fake(), case_sensitive=True).run()
    for some, words in (
        (tuple(oracle.values()), "oracle 1"),
        ((*oracle.values(), mine), "fair, poor fake 1"),
        ((good, mine, str(shutil.copytree(mine, models / "again"))), "good fake 1 both"),
        ((good, str(models / "strict")), "normalisation.case_sensitive: false -> true"),
    ):
        with told(*words.split()):
            Compare(some, str(models / "y"), extractors=True).run()
    for field, value in (("truth", ("good",)), ("human", "ratings.csv"), ("surrogate", True)):
        with told(field, "extractors=true"):
            Compare(names, extractors=True, **{field: value})
    path = Path(mine) / "records.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lost = [rows[0] | {"error": "no answer", "score": None}, *rows[1:]]
    path.write_text("".join(json.dumps(row) + "\n" for row in lost))
    found = Compare((good, mine), str(models / "y"), extractors=True, resamples=5).run()
    assert (found["instructions"], found["pictures"], found["left_out"]) == (11, 11, 1)
    assert found["agreement"][0]["spearman"] is None  # of one model
    assert [one["failed"] for one in found["extractors"]] == [0, 1]
    path.write_text("".join(json.dumps(row | {"sha256": "0"}) + "\n" for row in rows))
    with told("t-0_0.png", "good", "fake 1"):
        Compare((good, mine), str(models / "y"), extractors=True).run()


def test_models_of_one_name_are_told_apart_by_their_paths_when_extractors_are_compared(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    out = []
    for name in ("good", "poor"):
        images = shutil.copytree(name, Path("runs", name, "images"))
        for key, extractor in (("oracle", Oracle()), ("fake", Fake())):
            out.append(f"{name}-{key}")
            score(models, str(images), out=out[-1], extractor=extractor).run()
    opened = load_all(out, extractors=True)
    assert [one.label for one in opened] == ["runs/good/images"] * 2 + ["runs/poor/images"] * 2
    found = Compare(tuple(out), "x", extractors=True, resamples=5).run()
    assert found["agreement"][0]["spearman"] == pytest.approx(1)


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
    with told("1 instructions"):
        pair("x", "y", one, {"a": 1.0})
    scores = {"x": {str(i): 10.0 + 0.1 * (i % 3) for i in range(9)}, "y": {str(i): 5.0 for i in range(9)}}
    assert resolution(pairs(scores), ["x", "y"]).right == 1
    assert resolution(pairs(scores), ["y", "x"]).right == 0


def made_up(label: str, scores: dict[str, float | None], kind: str = "similarity") -> Result:
    """A result in memory: a score for each picture ID_K.png, None where the extraction failed."""
    records = [
        {"image": name, "id": name.rpartition("_")[0], "score": value, "error": "no answer" if value is None else None}
        for name, value in scores.items()
    ]
    return Result(label, Path(label), {"kind": kind}, records)


def judged(path: Path, head: str, lines: Sequence[Sequence[Any]]) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([head.split(","), *lines])
    return path


RATED, PREFERRED = "image,rating", "image_a,image_b,preferred"


def test_people_agree_or_not(models: Path) -> None:
    opened = load_all(results(models))
    rows = [(f"{r.label}/{record['image']}", record["score"]) for r in opened for record in r.records]
    path = judged(models / "human.csv", RATED, [(name, 2 * value) for name, value in rows])
    found = agreement(path, opened, resamples=50)
    assert found["spearman"][0] == pytest.approx(1)
    assert found["kendall_tau_b"] == [pytest.approx(1)] * 3
    assert found["pair_accuracy"] == found["pair_accuracy_within_instructions"] == [1, 1, 1]
    assert (found["pictures"], found["ratings"], found["left_out"], found["instructions"]) == (36, 36, 0, 12)
    scores = [value for _, value in rows]
    assert found["pairs"] == sum(a != b for a, b in itertools.combinations(scores, 2))
    assert 0 < found["pairs_within_instructions"] <= 36
    of = found["models"].pop("of")
    assert [one["label"] for one in of] == ["fair", "good", "poor"]
    assert [one["rating"] for one in of] == [pytest.approx(2 * one["score"], abs=1e-3) for one in of]
    one = [pytest.approx(1)] * 3
    assert found["models"] == {"spearman": one, "kendall_tau_b": one, "pair_accuracy": [1, 1, 1], "pairs": 3}
    judged(path, RATED, [(name, -value) for name, value in rows])
    assert agreement(path, opened, resamples=20)["pair_accuracy"][0] == 0
    judged(path, RATED, [(name, 5) for name, _ in rows])
    found = agreement(path, opened, resamples=20)
    assert found["spearman"] == found["models"]["spearman"] == [None, None, None]
    assert found["models"]["pairs"] == 0
    judged(
        path,
        PREFERRED,
        [(f"good/t-{i}_0.png", f"poor/t-{i}_0.png", "a" if i else "tie") for i in range(6)]
        + [("good/t-0_0.png", "good/t-1_0.png", "b")],  # both 100
    )
    found = agreement(path, opened, resamples=50)
    assert (found["preferences"], found["ties"]) == (6, 1)
    assert found["pair_accuracy"][0] == pytest.approx(5.5 / 6)
    assert found["models"]["of"] == [
        {"label": "good", "won_by_score": 1, "won_by_people": pytest.approx(5.5 / 6, abs=1e-4)},
        {"label": "poor", "won_by_score": 0, "won_by_people": pytest.approx(0.5 / 6, abs=1e-4)},
    ]
    assert found["models"]["pair_accuracy"] == [1, 1, 1]
    for head, lines, words in (
        (RATED, [("good/t-0_9.png", 1)], "line 2 'good/t-0_9.png' mean"),
        (RATED, [("good/t-0_0.png", "great")], "line 2 'great'"),
        (RATED, [("good/t-0_0.png", "1")], "three"),
        (RATED, [("good/t-0_0.png", "3", "5")], "line 2 header"),
        (PREFERRED, [("good/t-0_0.png", "poor/t-0_0.png", "c")], "line 2 a, b tie"),
        (PREFERRED, [("good/t-0_0.png", "good/t-0_0.png", "a")], "line 2 one"),
        (PREFERRED, [("good/t-0_0.png", "poor/t-0_0.png", "tie")], "ties"),
        ("picture,stars", [("x", 1)], "picture, stars"),
        (RATED, [], "no lines"),
    ):
        with told(*words.split()):
            agreement(judged(path, head, lines), opened)


def test_people_of_one_text_are_no_independent_witnesses(tmp_path: Path) -> None:
    """Half the instructions have people agree with the scores, half the contrary, with many lines each."""
    a = made_up("a", {f"t{i}_0.png": 10.0 + i for i in range(4)})
    b = made_up("b", {f"t{i}_0.png": 5.0 + i for i in range(4)})
    lines = [(f"a/t{i}_0.png", f"b/t{i}_0.png", "ab"[i % 2]) for i in range(4) for _ in range(100)]
    found = agreement(judged(tmp_path / "people.csv", PREFERRED, lines), [a, b], resamples=400)
    assert found["pair_accuracy"] == [0.5, 0, 1]  # 400 independent lines would say 0.45 to 0.55
    assert found["models"]["pair_accuracy"][1:] == [0, 1]
    lines = [(f"a/t{i}_{k}.png", k + 10 * i) for i in range(4) for k in range(25)]
    scores: dict[str, float | None] = {
        f"t{i}_{k}.png": 10.0 * i + (k if i % 2 else -k) for i in range(4) for k in range(25)
    }
    path = judged(tmp_path / "ratings.csv", RATED, [(name.removeprefix("a/"), value) for name, value in lines])
    found = agreement(path, [made_up("a", scores)], resamples=400)
    assert found["pair_accuracy_within_instructions"] == [0.5, 0, 1]
    assert found["pairs_within_instructions"] == 4 * 25 * 24 / 2
    one = {name: value for name, value in scores.items() if name.startswith("t1")}
    path = judged(tmp_path / "one.csv", RATED, list(one.items()))
    assert agreement(path, [made_up("a", one)])["spearman"] == [pytest.approx(1), None, None]  # no interval of one text


def test_means_of_the_same_ratings_in_another_order_are_tied(tmp_path: Path) -> None:
    scores: dict[str, float | None] = {"t0_0.png": 3.0, "t1_0.png": 2.0, "t2_0.png": 1.0}
    ratings = (
        [("t0_0.png", r) for r in (0.1, 0.2, 0.3)] + [("t1_0.png", r) for r in (0.3, 0.2, 0.1)] + [("t2_0.png", 0.1)]
    )
    found = agreement(judged(tmp_path / "r.csv", RATED, ratings), [made_up("a", scores)], resamples=5)
    assert found["pairs"] == 2
    assert found["spearman"][0] == pytest.approx(3**0.5 / 2, abs=1e-6)
    assert found["kendall_tau_b"][0] == pytest.approx((2 / 3) ** 0.5, abs=1e-6)


def test_one_text_with_two_pictures_does_not_cost_the_pairs_of_the_others(tmp_path: Path) -> None:
    scores: dict[str, float | None] = {f"t{i}_0.png": float(i) for i in range(99)} | {"t0_1.png": 0.5}
    path = judged(tmp_path / "ratings.csv", RATED, list(scores.items()))
    found = agreement(path, [made_up("a", scores)], resamples=20)
    assert (found["pairs"], found["pairs_within_instructions"]) == (100 * 99 / 2, 1)
    assert found["pair_accuracy"] == [1, 1, 1]


def test_pair_accuracy_is_that_of_all_pairs_one_by_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    scores: dict[str, float | None] = {f"t{i}_{k}.png": float(rng.integers(4)) for i in range(5) for k in range(3)}
    ratings = {name: int(rng.integers(4)) for name in scores}
    found = agreement(judged(tmp_path / "r.csv", RATED, list(ratings.items())), [made_up("a", scores)], resamples=5)
    told = {"pair_accuracy": [], "pair_accuracy_within_instructions": []}  # type: dict[str, list[float]]
    for a, b in itertools.combinations(scores, 2):
        if ratings[a] != ratings[b]:
            right = 0.5 + 0.5 * float(np.sign(scores[a] - scores[b]) * np.sign(ratings[a] - ratings[b]))  # type: ignore[operator]
            told["pair_accuracy"].append(right)
            if a[:2] == b[:2]:
                told["pair_accuracy_within_instructions"].append(right)
    for name, rights in told.items():
        assert found[name][0] == pytest.approx(np.mean(rights), abs=1e-6)
    assert (found["pairs"], found["pairs_within_instructions"]) == tuple(map(len, told.values()))


def test_models_whose_folders_share_a_name_are_told_apart(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for to, name in (("runs/a", "good"), ("runs/b", "fair"), ("runs/c", "poor")):
        shutil.copytree(models / f"{name}-typescore", models / to / "out-typescore")
    monkeypatch.chdir(models)
    results = load_all([f"runs/{one}/out-typescore" for one in "ab"] + ["runs/c/out-typescore/summary.json"])
    assert [one.label for one in results] == ["runs/a/out", "runs/b/out", "runs/c/out"]
    rows = [(f"{r.label}/{record['image']}", record["score"]) for r in results for record in r.records]
    found = agreement(judged(models / "human.csv", RATED, rows), results, resamples=20)
    assert [one["label"] for one in found["models"]["of"]] == ["runs/a/out", "runs/b/out", "runs/c/out"]
    assert found["models"]["spearman"][0] == pytest.approx(1)
    shutil.copytree("runs/a/out-typescore", "runs/a/out")
    both = ["runs/a/out", "runs/a/out-typescore"]
    assert [one.label for one in load_all(both)] == both


def test_judgements_of_pictures_that_were_not_read_are_counted_and_left_out(tmp_path: Path) -> None:
    scores: dict[str, float | None] = {f"t{i}_0.png": float(i) for i in range(200)} | {"t7_0.png": None}
    one = made_up("a", scores)
    path = judged(tmp_path / "ratings.csv", RATED, [(f"t{i}_0.png", i) for i in (1, 7, 3, 4, 7)])
    found = agreement(path, [one], resamples=20)
    assert (found["left_out"], found["ratings"], found["pictures"]) == (2, 3, 3)
    path = judged(tmp_path / "pairs.csv", PREFERRED, [("t1_0.png", "t7_0.png", "a"), ("t1_0.png", "t3_0.png", "b")])
    found = agreement(path, [one], resamples=20)
    assert (found["left_out"], found["preferences"], found["pair_accuracy"][0]) == (1, 1, 1)
    assert "models" not in found
    with told("0 pictures", "1 lines"):
        agreement(judged(path, RATED, [("t7_0.png", 1)]), [one])
    with pytest.raises(UserError, match=r"no picture 'zzz'; known: t0_0\.png, .* and 195 more") as caught:
        agreement(judged(path, RATED, [("zzz", 1)]), [one])
    assert len(str(caught.value)) < 300


def test_scores_where_less_is_better_are_turned_round(tmp_path: Path) -> None:
    scores: dict[str, float | None] = {f"t{i}_0.png": float(i) for i in range(5)}
    results = [made_up("a", scores, "dissimilarity"), made_up("b", dict.fromkeys(scores, 9.0), "dissimilarity")]
    path = judged(
        tmp_path / "r.csv", RATED, [(f"{m}/t{i}_0.png", 9 - i if m == "a" else 0) for m in "ab" for i in range(5)]
    )
    found = agreement(path, results, resamples=20)
    assert found["pair_accuracy"][0] == 1
    assert [one["score"] for one in found["models"]["of"]] == [2, 9]
    assert found["models"]["pair_accuracy"] == [1, 1, 1]


def test_tables_are_read_whatever_ends_their_lines(tmp_path: Path) -> None:
    one = made_up("a", {f"t{i}_0.png": float(i) for i in range(3)})
    path = tmp_path / "r.csv"
    for end in ("\n", "\r\n", "\r"):
        path.write_bytes(end.join(["image,rating", "t0_0.png,1", "t1_0.png,2", "t2_0.png,3", ""]).encode())
        assert agreement(path, [one], resamples=5)["pair_accuracy"][0] == 1
    for text, row in (
        ("image,rating\nt0_0.png," + "1" * 200_000 + "\n", 2),
        ("x" * 200_000 + "\n1\n", 1),
        ('image,rating\nt0_0.png,1\n"t1_0.png,2\n', 3),
    ):
        path.write_text(text)
        with told(f"r.csv, line {row}", "CSV"):
            agreement(path, [one])
