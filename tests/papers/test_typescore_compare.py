"""Results of models compared: ranking, refusals, other metrics, what people said."""

import csv
import itertools
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mistakes import told
from typescore_stub import TEXTS, Fake, listed, score

from zoo.papers.typescore.compare import Compare, Result, agreement, load_all, pair, resolution
from zoo.papers.typescore.instructions import Instruction
from zoo.papers.typescore.render import Corruption, Render

RATED = "image,rating"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results `good`, `fair` and `poor` on twelve instructions."""
    root = tmp_path_factory.mktemp("models")
    texts = [f"{a} {b}" for a in TEXTS for b in ("for all who sail", "and a warm stove")]
    some = [Instruction(f"t-{i}", f'"{text}"', text) for i, text in enumerate(texts)]
    wanted = str(listed(root / "wanted.jsonl", some))
    for seed, (name, p) in enumerate((("good", 0.0), ("fair", 0.1), ("poor", 0.3))):
        Render(str(root / name), wanted, corruption=Corruption(p_char=p), seed=seed, size=96).run()
        score(root, name).run()
    return root


@pytest.fixture
def models(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of these, to be spoilt."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "models"))
    return tmp_path / "models"


def judged(path: Path, head: str, lines: Sequence[Sequence[Any]]) -> str:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([head.split(","), *lines])
    return str(path)


THREE = ("poor-typescore", "good-typescore", "fair-typescore")


def test_models_are_ranked_with_paired_significance_beside_another_metric(models: Path) -> None:
    opened = load_all(THREE)
    worth = {"good": 1, "fair": 2, "poor": 2}
    rows = [(f"{one.label}/{record['image']}", worth[one.label]) for one in opened for record in one.records]
    other = judged(models / "clip.csv", "image,score", rows)
    truth = ("good", "fair", "poor")
    found = Compare(THREE, "x", truth, other, resamples=50).run()
    assert [one["label"] for one in found["ranking"]] == list(truth)
    assert [one["told_apart_from_next"] for one in found["ranking"]] == [True, True, None]
    assert found["instructions"] == 12
    first = found["pairs"][0]
    assert (first["a"], first["b"]) == ("good", "fair")
    assert first["low"] <= first["difference"] <= first["high"]
    assert first["win_rate"] > 0.9
    assert found["resolution"]["TypeScore"] == found["resolution"]["TypeScore"] | {"told_apart": 1, "right": 1}
    clip = {"pairs": 3, "told_apart": pytest.approx(2 / 3, abs=1e-6), "median_z": "inf", "right": 0}
    assert found["resolution"]["clip"] == clip
    json.loads((models / "x" / "comparison.json").read_text(), parse_constant=pytest.fail)
    text = (models / "x" / "comparison.md").read_text()
    assert "| 1 | good | 100.00 | 100.00 | 100.00 | 0 | 0 | True |" in text
    assert "| clip | 3 | 0.67 | inf | 0.00 |" in text
    judged(models / "clip.csv", "image,score", rows[:-1])
    for fields, words in (
        ({"truth": ("good", "fair")}, "truth=good,fair poor"),
        ({"other": other}, "no score 't-11' fair"),
    ):
        with told(*words.split()):
            Compare(THREE, "y", **fields).run()
    assert not (models / "y").exists()


def test_results_that_do_not_compare_are_refused(models: Path, folder: Path) -> None:
    score(models, "fair", out="cased", case_sensitive=True).run()
    score(models, "fair", out="read", extractor=Fake()).run()
    for name in ("half", "torn"):
        shutil.copytree("fair-typescore", name)
    Path("half/summary.json").unlink()
    records = Path("torn/records.jsonl")
    records.write_bytes(records.read_bytes()[:-9])
    score(folder).run()
    for names, words in (
        (("cased",), "normalisation.case_sensitive"),
        (("read",), "extractor.name"),
        (("half",), "half end"),
        (("torn",), "torn damaged"),
        ((str(folder / "a-typescore"),), "text.t-0"),
        (("good-typescore",), "good twice"),
        (("nowhere",), "nowhere"),
    ):
        with told(*words.split()):
            Compare(("good-typescore", *names), "x").run()
    Compare(THREE[:2], "x", resamples=5).run()
    before = Path("x/comparison.json").read_bytes()
    with told("../good-typescore", "out=FOLDER"):
        Compare(THREE[::2], "x", resamples=5).run()
    assert Path("x/comparison.json").read_bytes() == before
    Compare(THREE[1::-1], "x", resamples=9, seed=3).run()  # the same results


def test_results_of_the_version_before_compare_or_are_refused(models: Path) -> None:
    """Their records hold more; and quoted texts could be compared in any order, and scores be dissimilarities."""
    out = models / "fair-typescore"
    rows = [json.loads(line) | {"boxes": [], "k": 0, "seconds": 0.1} for line in (out / "records.jsonl").open()]
    (out / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    setting = json.loads((out / "setting.json").read_text())
    (out / "setting.json").write_text(json.dumps(setting | {"style": True}))
    assert len(Compare(THREE, "x", resamples=5).run()["ranking"]) == 3
    for name, value in (("piece_mode", "set"), ("kind", "dissimilarity"), ("spec_version", "0")):
        (out / "setting.json").write_text(json.dumps(setting | {name: value}))
        with told(name, value, "evaluate both"):
            Compare(THREE, "x").run()


def test_instructions_that_only_some_results_have_are_left_out_and_told(models: Path, caplog: Any) -> None:
    records = models / "fair-typescore" / "records.jsonl"
    records.write_text("".join(records.read_text().splitlines(keepends=True)[3:]))
    for to, name in (("runs/a", "good"), ("runs/b", "fair")):  # folders that share a name are told apart
        shutil.copytree(f"{name}-typescore", f"{to}/out-typescore")
    found = Compare(("runs/a/out-typescore", "runs/b/out-typescore"), "x", resamples=5).run()
    assert (found["instructions"], found["ranking"][0]["left_out"]) == (9, 3)
    assert "3 instructions of runs/a/out-typescore are not in all results" in caplog.text


def test_z_and_wins() -> None:
    one, other = np.random.default_rng(0).normal(1, 2, (2, 50))
    found, apart = pair(one, other), one - other
    assert found["z"] == pytest.approx(apart.mean() / (apart.std(ddof=1) / math.sqrt(50)), abs=1e-6)
    assert found["difference"] == pytest.approx(apart.mean(), abs=1e-6)
    assert found["win_rate"] == pytest.approx((apart > 0).mean())
    assert pair(one, one)["z"] == 0
    assert pair(np.zeros(5), np.full(5, 0.25))["z"] == "-inf"
    tied = pair(np.array([3.0, 2.0, 1.0]), np.array([1.0, 2.0, 2.0]))
    assert (tied["ties"], tied["win_rate"]) == (1, 0.5)
    pairs = [{"a": "x", "b": "y", **pair(np.full(9, 10.0), np.arange(9))}]
    assert [resolution(pairs, truth)["right"] for truth in ("xy", "yx", "")] == [1, 0, None]


def made_up(scores: Mapping[str, float | None]) -> Result:
    """A result in memory: a score for each picture ID_K.png, None where the extraction failed."""
    records = []
    for name, value in scores.items():
        error = "no answer" if value is None else None
        records.append({"image": name, "id": name.rpartition("_")[0], "score": value, "error": error})
    return Result("a", Path("a"), {}, records)


def test_people_agree_or_not(models: Path) -> None:
    opened = load_all(THREE)
    rows = [(f"{one.label}/{record['image']}", record["score"]) for one in opened for record in one.records]
    path = models / "human.csv"
    for value, rho, tau, accuracy in ((2, 1, 1, 1), (-1, -1, -1, 0), (0, None, None, None)):
        found = agreement(judged(path, RATED, [(name, value * s) for name, s in rows]), opened, resamples=20)
        for kind, wanted in (("spearman", rho), ("kendall_tau_b", tau), ("pair_accuracy", accuracy)):
            assert found[kind] == [wanted if wanted is None else pytest.approx(wanted)] * 3
    assert (found["judgements"], found["left_out"], found["instructions"]) == (36, 0, 12)
    human = judged(path, RATED, [(f"t-{i}_0.png", i) for i in range(8)])
    found = Compare(THREE[1:2], "x", human=human, resamples=5).run()  # one result is enough
    assert found["human"]["pair_accuracy"][0] == 0.5  # all score 100, and a tie is half right
    assert "| pair_accuracy | 0.50 |" in (models / "x" / "comparison.md").read_text()
    for head, line, words in (
        (RATED, "good/t-0_9.png 1", "line 2 'good/t-0_9.png' mean"),
        (RATED, "good/t-0_0.png great", "human.csv great"),
        (RATED, "good/t-0_0.png inf", "line 2 no number"),
        (RATED, "good/t-0_0.png 1", "three"),
        (RATED, "good/t-0_0.png 3 5", "human.csv columns"),  # 3,5 must not be taken for 3
        ("picture,stars", "x 1", "image rating"),
    ):
        with told(*words.split()):
            agreement(judged(path, head, [line.split()]), opened)


def test_pair_accuracy_is_that_of_all_pairs_one_by_one(tmp_path: Path) -> None:
    x, y = np.random.default_rng(1).integers(4, size=(2, 15))
    names = [f"t{i}_{k}.png" for i in range(5) for k in range(3)]
    scores, ratings = dict(zip(names, x.astype(float))), dict(zip(names, y))
    both = [(a, b) for a, b in itertools.combinations(range(15), 2) if y[a] != y[b]]
    rights = [0.5 + 0.5 * np.sign(x[a] - x[b]) * np.sign(y[a] - y[b]) for a, b in both]
    found = agreement(judged(tmp_path / "r.csv", RATED, list(ratings.items())), [made_up(scores)], resamples=5)
    assert found["pair_accuracy"][0] == pytest.approx(np.mean(rights), abs=1e-6)
    # means of the same ratings in another order are tied
    several = {"t0_0.png": (0.1, 0.2, 0.3), "t1_0.png": (0.3, 0.2, 0.1), "t2_0.png": (0.1,)}
    lines = [(name, rating) for name, some in several.items() for rating in some]
    few = [made_up({"t0_0.png": 3.0, "t1_0.png": 2.0, "t2_0.png": 1.0})]
    found = agreement(judged(tmp_path / "r.csv", RATED, lines), few, resamples=5)
    assert found["spearman"][0] == pytest.approx(3**0.5 / 2, abs=1e-6)


def test_intervals_are_over_instructions_and_lines_of_unread_pictures_are_left_out(tmp_path: Path) -> None:
    """Half the instructions have people agree with the scores, half the contrary, with fifty pictures each."""
    every = [(f"t{i}_{k}.png", k, k * (-1) ** i) for i in range(4) for k in range(50)]
    path = judged(tmp_path / "r.csv", RATED, [(name, rating) for name, _, rating in every])
    low, high = agreement(path, [made_up({name: k for name, k, _ in every})], resamples=200)["spearman"][1:]
    assert (low, high) == (pytest.approx(-1, abs=0.2), pytest.approx(1, abs=0.2))  # 200 witnesses would say +-0.14
    one = made_up({f"t{i}_0.png": float(i) for i in range(9)} | {"t7_0.png": None})
    path = judged(tmp_path / "r.csv", RATED, [(f"t{i}_0.png", i) for i in (1, 7, 3, 4, 7)])
    found = agreement(path, [one], resamples=20)
    assert (found["left_out"], found["judgements"]) == (2, 3)
    Path(path).write_bytes(b"\xef\xbb\xbfimage,rating\rt0_0.png,1\rt1_0.png,2\rt2_0.png,3\r")  # of other systems
    assert agreement(path, [one], resamples=5)["pair_accuracy"][0] == pytest.approx(1)
