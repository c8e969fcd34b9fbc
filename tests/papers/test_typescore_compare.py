"""Results of models compared: ranking, refusals, other metrics, what people said."""

import csv
import itertools
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mistakes import told
from typescore_stub import TEXTS, Fake, listed, score

from zoo.errors import UserError
from zoo.papers.typescore.compare import Compare, Result, agreement, load_all, pair, resolution
from zoo.papers.typescore.instructions import Instruction, length_bin
from zoo.papers.typescore.render import Corruption, Render

RATED, PREFERRED = "image,rating", "image_a,image_b,preferred"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results `good`, `fair` and `poor` on twelve instructions."""
    root = tmp_path_factory.mktemp("models")
    some = [
        Instruction(f"t-{i}", f'"{text}"', text, (text,), {}, length_bin(text), "shop")
        for i, text in enumerate(f"{a} {b}" for a in TEXTS for b in ("for all who sail", "and a warm stove"))
    ]
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
    rows = [
        (f"{one.label}/{r['image']}", {"good": 1, "fair": 2, "poor": 2}[one.label])
        for one in opened
        for r in one.records
    ]
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
        ({"truth": (*truth, "fair")}, "truth once"),
        ({"other": other}, "no score 't-11' fair"),
    ):
        with told(*words.split()):
            Compare(THREE, "y", **fields).run()
    assert not (models / "y").exists()


def test_results_that_do_not_compare_are_refused(models: Path, folder: Path) -> None:
    score(models, "fair", out="cased", case_sensitive=True).run()
    score(models, "fair", out="read", extractor=Fake()).run()
    for name in ("half", "spec", "torn"):
        shutil.copytree("fair-typescore", name)
    Path("half/summary.json").unlink()
    Path("torn/records.jsonl").write_text('{"image": "t')
    setting = Path("spec/setting.json")
    setting.write_text(setting.read_text().replace('"spec_version": "1"', '"spec_version": "0"'))
    score(folder).run()
    for names, words in (
        (("cased",), "normalisation.case_sensitive"),
        (("read",), "extractor.name"),
        (("half",), "half end"),
        (("spec",), "spec_version"),
        (("torn",), "torn damaged"),
        ((str(folder / "a-typescore"),), "text.t-0"),
        ((), "two results"),
        (("good-typescore",), "good twice"),
        (("nowhere",), "nowhere"),
        (("good",), "good zoo"),
    ):
        with told(*words.split()):
            Compare(("good-typescore", *names), "x").run()
    Compare(THREE[:2], "x", resamples=5).run()
    before = Path("x/comparison.json").read_bytes()
    with told("../good-typescore", "out=FOLDER"):
        Compare(THREE[::2], "x", resamples=5).run()
    assert Path("x/comparison.json").read_bytes() == before
    Compare(THREE[1::-1], "x", resamples=9, seed=3).run()  # the same results


def test_results_of_the_version_before_compare(models: Path) -> None:
    """Their records held the setting too, and no questions that failed."""
    path = models / "fair-typescore" / "records.jsonl"
    rows = [json.loads(line) | {"extractor": {}, "spec_version": "1"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(Compare(THREE, "x", resamples=5).run()["ranking"]) == 3


def test_where_less_is_better_the_order_and_infinite_z_keep_their_sign(models: Path) -> None:
    out = ("good-apart", "fair-apart", "poor-apart")
    for name in out:
        score(models, name[:4], kind="dissimilarity", out=name).run()
    found = Compare(out, "x", out, resamples=5).run()
    assert [one["label"] for one in found["ranking"]] == list(out)
    assert found["resolution"]["TypeScore"]["right"] == 1
    assert all(one["z"] < -1.96 for one in found["pairs"])
    assert Compare(out, "x", out[::-1], resamples=5).run()["resolution"]["TypeScore"]["right"] == 0


def test_z_and_wins() -> None:
    one, other = np.random.default_rng(0).normal(1, 2, (2, 50))
    found, apart = pair(one, other), one - other
    assert found["z"] == pytest.approx(apart.mean() / (apart.std(ddof=1) / math.sqrt(50)), abs=1e-6)
    assert found["difference"] == pytest.approx(apart.mean(), abs=1e-6)
    assert found["win_rate"] == pytest.approx((apart > 0).mean())
    assert pair(one, one)["z"] == 0
    assert pair(np.zeros(5), np.full(5, 0.25))["z"] == "-inf"
    tied = pair(np.array([3.0, 2.0, 1.0]), np.array([1.0, 2.0, 2.0]))
    assert (tied["ties"], tied["win_rate"], pair(np.ones(2), np.zeros(2), sign=-1)["win_rate"]) == (1, 0.5, 0)
    pairs = [{"a": "x", "b": "y", **pair(np.full(9, 10.0), np.arange(9))}]
    assert [resolution(pairs, truth)["right"] for truth in ("xy", "yx", "")] == [1, 0, None]


def made_up(label: str, scores: dict[str, float | None], kind: str = "similarity") -> Result:
    """A result in memory: a score for each picture ID_K.png, None where the extraction failed."""
    records = [
        {"image": name, "id": name.rpartition("_")[0], "score": value, "error": "no answer" if value is None else None}
        for name, value in scores.items()
    ]
    return Result(label, Path(label), {"kind": kind}, records)


def test_people_agree_or_not(models: Path) -> None:
    opened = load_all(THREE)
    rows = [(f"{one.label}/{record['image']}", record["score"]) for one in opened for record in one.records]
    path = models / "human.csv"
    found = agreement(judged(path, RATED, [(name, 2 * value) for name, value in rows]), opened, resamples=50)
    one = [pytest.approx(1)] * 3
    assert found["spearman"] == found["kendall_tau_b"] == found["pair_accuracy"] == one
    assert (found["judgements"], found["left_out"], found["instructions"]) == (36, 0, 12)
    of = found["models"].pop("of")
    assert [row["label"] for row in of] == ["fair", "good", "poor"]
    assert [row["by_people"] for row in of] == [pytest.approx(2 * row["by_score"]) for row in of]
    assert found["models"] == {"spearman": one, "kendall_tau_b": one, "pair_accuracy": one}
    found = agreement(judged(path, RATED, [(name, -value) for name, value in rows]), opened, resamples=20)
    assert found["pair_accuracy"][0] == pytest.approx(0)
    found = agreement(judged(path, RATED, [(name, 5) for name, _ in rows]), opened, resamples=20)
    assert found["spearman"] == found["models"]["spearman"] == [None, None, None]
    ratings = [(f"good/t-{i}_0.png", f"poor/t-{i}_0.png", "a" if i else "tie") for i in range(6)]
    ratings.append(("good/t-0_0.png", "good/t-1_0.png", "b"))  # both 100
    found = agreement(judged(path, PREFERRED, ratings), opened, resamples=50)
    assert found["pair_accuracy"][0] == pytest.approx(5.5 / 6, abs=1e-6)
    assert found["models"]["pair_accuracy"][0] == 1
    human = judged(path, RATED, [(f"t-{i}_0.png", i) for i in range(8)])
    found = Compare(THREE[1:2], "x", human=human, resamples=5).run()  # one result is enough
    assert found["human"]["pair_accuracy"][0] == 0.5  # all score 100, and a tie is half right
    assert "| picture | pair_accuracy | 0.50 |" in (models / "x" / "comparison.md").read_text()
    for head, lines, words in (
        (RATED, [("good/t-0_9.png", 1)], "line 2 'good/t-0_9.png' mean"),
        (RATED, [("good/t-0_0.png", "great")], "line 2 'great'"),
        (RATED, [("good/t-0_0.png", "1")], "three"),
        (RATED, [("good/t-0_0.png", "3", "5")], "line 2 header"),
        (PREFERRED, [("good/t-0_0.png", "poor/t-0_0.png", "c")], "line 2 a, b tie"),
        (PREFERRED, [("good/t-0_0.png", "good/t-0_0.png", "a")], "line 2 two"),
        ("picture,stars", [("x", 1)], "image,rating or image_a"),
        (RATED, [], "image,rating"),
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


def test_pair_accuracy_is_that_of_all_pairs_one_by_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    scores: dict[str, float | None] = {f"t{i}_{k}.png": float(rng.integers(4)) for i in range(5) for k in range(3)}
    ratings = {name: int(rng.integers(4)) for name in scores}
    path = judged(tmp_path / "r.csv", RATED, list(ratings.items()))
    rights = [
        0.5 + 0.5 * float(np.sign(scores[a] - scores[b]) * np.sign(ratings[a] - ratings[b]))  # type: ignore[operator]
        for a, b in itertools.combinations(scores, 2)
        if ratings[a] != ratings[b]
    ]
    found = agreement(path, [made_up("a", scores)], resamples=5)
    assert found["pair_accuracy"][0] == pytest.approx(np.mean(rights), abs=1e-6)
    turned = [made_up("a", {name: -value for name, value in scores.items() if value is not None}, "dissimilarity")]
    assert agreement(path, turned, resamples=5) == found
    # means of the same ratings in another order are tied
    lines = [
        (n, r)
        for n, some in (("t0_0.png", (0.1, 0.2, 0.3)), ("t1_0.png", (0.3, 0.2, 0.1)), ("t2_0.png", (0.1,)))
        for r in some
    ]
    few = [made_up("a", {"t0_0.png": 3.0, "t1_0.png": 2.0, "t2_0.png": 1.0})]
    found = agreement(judged(tmp_path / "r.csv", RATED, lines), few, resamples=5)
    assert found["spearman"][0] == pytest.approx(3**0.5 / 2, abs=1e-6)


def test_judgements_of_pictures_that_were_not_read_are_counted_and_left_out(tmp_path: Path) -> None:
    one = made_up("a", {f"t{i}_0.png": float(i) for i in range(99)} | {"t7_0.png": None})
    path = judged(tmp_path / "ratings.csv", RATED, [(f"t{i}_0.png", i) for i in (1, 7, 3, 4, 7)])
    found = agreement(path, [one], resamples=20)
    assert (found["left_out"], found["judgements"]) == (2, 3)
    with pytest.raises(UserError, match=r"no picture 'zzz'; known: t0_0\.png"):
        agreement(judged(tmp_path / "r.csv", RATED, [("zzz", 1)]), [one])
    Path(path).write_bytes(b"\xef\xbb\xbfimage,rating\rt0_0.png,1\rt1_0.png,2\rt2_0.png,3\r")  # of other systems
    assert agreement(path, [one], resamples=5)["pair_accuracy"][0] == pytest.approx(1)


def test_models_whose_folders_share_a_name_are_told_apart(models: Path) -> None:
    for to, name in (("runs/a", "good"), ("runs/b", "fair")):
        shutil.copytree(f"{name}-typescore", f"{to}/out-typescore")
    names = ("runs/a/out-typescore", "runs/b/out-typescore")
    assert [one.label for one in load_all(names)] == list(names)
