"""TypeScore with RapidOCR on some hundreds of rendered pictures: reading, monotone scores, ranking, style, kinds of errors.

Minutes on two cores. `pytest -m slow -s tests/papers/test_typescore_acceptance.py` prints the figures.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from zoo.papers.typescore import instructions as lists
from zoo.papers.typescore import style, synth
from zoo.papers.typescore.calibrate import Calibrate
from zoo.papers.typescore.coarse import Coarse, scored
from zoo.papers.typescore.evaluate import TypeScore
from zoo.papers.typescore.extractors import Cached, Extraction, Oracle, RapidOcr
from zoo.papers.typescore.instructions import Instruction
from zoo.papers.typescore.render import TEXT, Corruption, plain, render, save_all
from zoo.papers.typescore.results import load_all, pairs, resolution
from zoo.papers.typescore.score import Normalisation, error_type, parts

pytestmark = pytest.mark.slow

FAULTS = (0.0, 0.02, 0.05, 0.10, 0.20)  # shares of wrong letters of the five "models"
STYLED = {"font": "handwritten", "points": 30, "rotation": 8, "noise": 20, "texture": True}
ALL = lists.read(synth.FILE)
READER = RapidOcr()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    return tmp_path_factory.mktemp("typescore")


@pytest.fixture(scope="module")
def read(root: Path) -> Callable[[Sequence[Image.Image]], list[Extraction]]:
    """RapidOCR behind a cache; no reading may fail."""
    reader = Cached(READER, root / "cache")

    def all_of(pictures: Sequence[Image.Image]) -> list[Extraction]:
        found = reader.extract(pictures)
        assert [one.error for one in found] == [None] * len(found)
        return found

    return all_of


def some(n: int, words: int = 1) -> list[Instruction]:
    """n instructions spread over the list, with so many quoted words or more."""
    fit = [one for one in ALL if len(one.text.split()) >= words]
    return [fit[round(i)] for i in np.linspace(0, len(fit) - 1, n)]


def error_rate(wanted: str, found: str) -> float:
    """Edits for each character that was drawn."""
    wanted, found = Normalisation()(wanted), Normalisation()(found)
    longest = max(len(wanted), len(found))
    return (1 - parts(wanted, found).ned) * longest / len(wanted)


@pytest.mark.parametrize("kind, most", [("clean", 0.02), ("styled", 0.05)])
def test_a1_texts_are_read(read: Any, kind: str, most: float) -> None:
    fields: dict[str, Any] = STYLED if kind == "styled" else {"points": 32}
    pictures = [plain(one.text, seed=i, **fields) for i, one in enumerate(some(20))]
    start = time.perf_counter()
    found = read(pictures)
    seconds = (time.perf_counter() - start) / len(pictures)
    rates = [error_rate(picture.info[TEXT], one.text) for picture, one in zip(pictures, found)]
    print(f"\nA1 {kind}: character error rate {np.mean(rates):.4f} (worst {max(rates):.3f}), {seconds:.2f} s a picture")
    assert np.mean(rates) <= most


def test_a2_scores_fall_with_faults_as_those_of_the_texts_do(root: Path) -> None:
    made = Calibrate(READER, cache=str(root / "cache"), out=str(root / "calibration"))
    assert len(made.texts) == 7
    assert len(made.levels) == 6
    found = made.run()
    print(f"\nA2 {json.dumps(found['levels'])} {found['spearman']}")
    assert found["failed"] == 0
    for kind in ("clean", "styled"):
        levels = [one for one in found["levels"] if one["style"] == kind]
        scores = [one["score"] for one in levels]
        assert all(low < high for high, low in itertools.pairwise(scores)), scores
        assert all(abs(one["difference"]) <= 3 for one in levels)
        assert found["spearman"][kind] <= -0.95
    assert found["verdict"] == "faithful"


@pytest.fixture(scope="module")
def models(root: Path) -> dict[str, dict[str, list[str]]]:
    """Folders of results of five models with ever more faults, best first, read by RapidOCR and by the oracle."""
    chosen = some(24)
    lists.write(root / "wanted.jsonl", chosen)
    out: dict[str, list[str]] = {"rapidocr": [], "oracle": []}
    for seed, p in enumerate(FAULTS):
        images = root / f"model{seed}"
        save_all(chosen, images, Corruption(p_char=p), seed=seed)  # each draws in its own way
        for reader in (READER, Oracle()):
            to = root / f"model{seed}-{reader.name}"
            summary = TypeScore(
                str(root / "wanted.jsonl"), str(images), reader, cache=str(root / "cache"), out=str(to)
            ).run()
            assert summary["failed"] == 0
            out[reader.name].append(str(to))
    return {"folders": out}


def test_a3_models_are_ranked_and_the_coarse_surrogate_tells_fewer_apart(models: Any) -> None:
    results = load_all(models["folders"]["rapidocr"])
    scores = {result.label: result.scores() for result in results}
    labels = list(scores)
    means = [float(np.mean(list(one.values()))) for one in scores.values()]
    fine = pairs(scores)
    coarse = pairs({result.label: scored(result, Coarse(), {one.id: one for one in ALL}) for result in results})
    ours, theirs = resolution(fine, labels), resolution(coarse, labels)
    adjacent = [one for one in fine if labels.index(one.b) - labels.index(one.a) == 1]
    print(f"\nA3 means {np.round(means, 2)}, adjacent z {[round(one.z, 2) for one in adjacent]}\n{ours}\n{theirs}")
    assert means == sorted(means, reverse=True)
    assert sum(one.z > 1.96 for one in adjacent) >= 3
    assert ours.right is not None
    assert theirs.right is not None
    assert theirs.right < ours.right
    assert theirs.median_z < ours.median_z


def test_a4_style_and_text_are_told_apart(read: Any) -> None:
    measurable = {"colour", "case", "placement"}
    chosen = [one for one in ALL if measurable & set(one.style)]
    chosen = [chosen[round(i)] for i in np.linspace(0, len(chosen) - 1, 24)]

    def of(corruption: Corruption, skill: float) -> tuple[float, float]:
        pictures = [render(one, corruption, skill, seed=5) for one in chosen]
        made = TypeScore(extractor=READER)
        records = [made.judge(one, picture, found) for one, picture, found in zip(chosen, pictures, read(pictures))]
        verdicts = [{k: style.Verdict(v["followed"], "") for k, v in record["style"].items()} for record in records]
        shares = [share for one in verdicts if (share := style.share(one)) is not None]
        return float(np.mean([record["score"] for record in records])), float(np.mean(shares))

    right, careless, misspelt = of(Corruption(), 1), of(Corruption(), 0), of(Corruption(p_char=0.3), 1)
    print(f"\nA4 (TypeScore, style): right {right}, careless {careless}, misspelt {misspelt}")
    assert abs(right[0] - careless[0]) <= 3
    assert right[1] - careless[1] >= 40
    assert abs(right[1] - misspelt[1]) <= 10
    assert right[0] - misspelt[0] > 20


@pytest.mark.parametrize(
    "kind, corruption", [("missing", Corruption(p_drop=0.4)), ("surplus", Corruption(p_surplus=0.4))]
)
def test_a5_kinds_of_errors_are_told(read: Any, kind: str, corruption: Corruption) -> None:
    chosen = some(24, words=4)
    pictures = [render(one, corruption, seed=2) for one in chosen]
    normalise = Normalisation()
    found = [error_type(normalise(one.text), normalise(r.text)) for one, r in zip(chosen, read(pictures))]
    drawn = [error_type(normalise(one.text), normalise(picture.info[TEXT])) for one, picture in zip(chosen, pictures)]
    share, perfect = found.count(kind) / len(found), drawn.count(kind) / len(drawn)
    print(f"\nA5 {kind}: {share:.1%} of pictures, {perfect:.1%} of their texts")
    assert share >= 0.8


def test_a6_rapidocr_and_the_oracle_rank_alike(models: Any) -> None:
    by = {name: load_all(folders) for name, folders in models["folders"].items()}
    order = {
        name: np.argsort([-np.mean(list(result.scores().values())) for result in results]).tolist()
        for name, results in by.items()
    }
    values = {
        name: [record["score"] for result in results for record in result.records] for name, results in by.items()
    }
    pearson = stats.pearsonr(values["rapidocr"], values["oracle"])[0]
    same = np.mean([abs(a - b) < 1e-6 for a, b in zip(values["rapidocr"], values["oracle"])])
    print(f"\nA6 order {order}, Pearson {pearson:.4f} over {len(values['oracle'])} pictures, {same:.1%} the same")
    assert order["rapidocr"] == order["oracle"] == list(range(len(FAULTS)))
    assert pearson >= 0.95


def test_the_shipped_config_reads_a_folder(root: Path) -> None:
    from zoo import config

    images = root / "few"
    save_all(ALL[:3], images)
    made = dataclasses.replace(config.load("typescore/rapidocr"), images=str(images), limit=3)
    found = made.run()
    assert found["failed"] == 0
    assert found["score"] > 95
    assert found["style"]["score"] > 80
