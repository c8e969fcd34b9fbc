"""TypeScore with RapidOCR on some hundreds of rendered pictures: reading, monotone scores, ranking, style, kinds of errors.

Minutes on two cores. `pytest -m slow -s tests/papers/test_typescore_acceptance.py` prints the figures.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from typescore_stub import listed as write_list

from zoo.papers.typescore import style
from zoo.papers.typescore.calibrate import Calibrate
from zoo.papers.typescore.compare import Compare, load_all
from zoo.papers.typescore.evaluate import TypeScore
from zoo.papers.typescore.extractors import Extraction, Oracle, RapidOcr
from zoo.papers.typescore.extractors.base import TEXT_CHUNK
from zoo.papers.typescore.instructions import Instruction, listed
from zoo.papers.typescore.metric import Normalisation, error_type, parts
from zoo.papers.typescore.render import Corruption, Render, plain, render

pytestmark = pytest.mark.slow

FAULTS = (0.0, 0.02, 0.05, 0.10, 0.20)  # shares of wrong letters of the five "models"
STYLED = {"font": "handwritten", "points": 30, "rotation": 8, "noise": 20, "texture": True}
ALL = listed("typeinst_synth")
READER = RapidOcr()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    return tmp_path_factory.mktemp("typescore")


def read(pictures: Sequence[Image.Image]) -> list[Extraction]:
    """By RapidOCR; no reading may fail."""
    found = READER.extract(pictures)
    assert [one.error for one in found] == [None] * len(found)
    return found


def some(n: int, words: int = 1, of: Sequence[Instruction] = ALL) -> list[Instruction]:
    """n instructions spread over the list, with so many quoted words or more."""
    fit = [one for one in of if len(one.text.split()) >= words]
    return [fit[round(i)] for i in np.linspace(0, len(fit) - 1, n)]


def error_rate(wanted: str, found: str) -> float:
    """Edits for each character that was drawn."""
    wanted, found = Normalisation()(wanted), Normalisation()(found)
    return (1 - parts(wanted, found).ned) * max(len(wanted), len(found)) / len(wanted)


@pytest.mark.parametrize("kind, most", [("clean", 0.02), ("styled", 0.05)])
def test_a1_texts_are_read(root: Path, kind: str, most: float) -> None:
    fields: dict[str, Any] = STYLED if kind == "styled" else {"points": 32}
    pictures = [plain(one.text, seed=i, **fields) for i, one in enumerate(some(20))]
    *found, empty = read([*pictures, Image.new("RGB", (64, 64), "white")])
    assert empty.text == ""
    rates = [error_rate(picture.info[TEXT_CHUNK], one.text) for picture, one in zip(pictures, found)]
    print(f"\nA1 {kind}: character error rate {np.mean(rates):.4f} (worst {max(rates):.3f})")
    assert np.mean(rates) <= most


def test_a2_scores_fall_with_faults_as_those_of_the_texts_do(root: Path) -> None:
    found = Calibrate(READER, out=str(root / "calibration")).run()
    print(f"\nA2 {json.dumps(found['levels'])} {found['spearman']}")
    assert (found["read"], found["failed"]) == (84, 0)
    for kind in ("clean", "styled"):
        levels = [one for one in found["levels"] if one["style"] == kind]
        scores = [one["score"] for one in levels]
        assert all(low < high for high, low in itertools.pairwise(scores)), scores
        assert all(abs(one["difference"]) <= 3 for one in levels)
        assert found["spearman"][kind] <= -0.95
    assert found["verdict"] == "faithful"


@pytest.fixture(scope="module")
def models(root: Path) -> dict[str, list[str]]:
    """Folders of results of five models with ever more faults, best first, read by RapidOCR and by the oracle."""
    wanted = str(write_list(root / "wanted.jsonl", some(24)))
    out: dict[str, list[str]] = {"rapidocr": [], "oracle": []}
    for seed, p in enumerate(FAULTS):
        images = str(root / f"model{seed}")
        Render(images, wanted, corruption=Corruption(p_char=p), seed=seed).run()  # each draws in its own way
        for reader in (READER, Oracle()):
            out[reader.name].append(str(root / f"model{seed}-{reader.name}"))
            assert TypeScore(wanted, images, reader, out=out[reader.name][-1]).run()["failed"] == 0
    return out


def coarse(results: Sequence[Any], path: Path) -> str:
    """A surrogate of a coarse metric: the cosine of a picture and of the right one, both shrunk to 16x16."""

    def shrunk(picture: Image.Image) -> np.ndarray:
        small = np.asarray(picture.convert("RGB").resize((16, 16), Image.Resampling.BOX), np.float64).ravel()
        return small / np.linalg.norm(small)

    right = {one.id: shrunk(render(one, seed=1_000_003)) for one in some(24)}
    lines = ["image,score\n"]
    for one, record in [(result, record) for result in results for record in result.records]:
        seen = shrunk(Image.open(path.with_name(one.label.removesuffix("-rapidocr")) / record["image"]))
        lines.append(f"{one.label}/{record['image']},{float(seen @ right[record['id']])}\n")
    path.write_text("".join(lines))
    return str(path)


def test_a3_models_are_ranked_and_a_coarse_surrogate_tells_fewer_apart(models: Any, root: Path) -> None:
    results = load_all(models["rapidocr"])
    truth = tuple(one.label for one in results)
    other = coarse(results, root / "coarse.csv")
    found = Compare(tuple(models["rapidocr"]), str(root / "compared"), truth, other).run()
    adjacent = [one["z"] for one in found["pairs"] if truth.index(one["b"]) - truth.index(one["a"]) == 1]
    ours, theirs = found["resolution"]["TypeScore"], found["resolution"]["coarse"]
    print(f"\nA3 means {[one['score'] for one in found['ranking']]}, adjacent z {adjacent}\n{ours}\n{theirs}")
    assert tuple(one["label"] for one in found["ranking"]) == truth
    assert sum(z > 1.96 for z in adjacent) >= 3
    assert theirs["right"] < ours["right"]
    assert theirs["median_z"] < ours["median_z"]


def test_a4_style_and_text_are_told_apart(root: Path) -> None:
    chosen = some(24, of=[one for one in ALL if {"colour", "case", "placement"} & set(one.style)])

    def of(corruption: Corruption, skill: float) -> tuple[float, float]:
        pictures = [render(one, corruption, skill, seed=5) for one in chosen]
        made = TypeScore(extractor=READER)
        records = [made.judge(one, picture, found) for one, picture, found in zip(chosen, pictures, read(pictures))]
        shares = [style.share(v["followed"] for v in record["style"].values()) for record in records]
        known = [share for share in shares if share is not None]
        return float(np.mean([record["score"] for record in records])), float(np.mean(known))

    right, careless, misspelt = of(Corruption(), 1), of(Corruption(), 0), of(Corruption(p_char=0.3), 1)
    print(f"\nA4 (TypeScore, style): right {right}, careless {careless}, misspelt {misspelt}")
    assert abs(right[0] - careless[0]) <= 3
    assert right[1] - careless[1] >= 40
    assert abs(right[1] - misspelt[1]) <= 10
    assert right[0] - misspelt[0] > 20


@pytest.mark.parametrize(
    "kind, corruption", [("missing", Corruption(p_drop=0.4)), ("surplus", Corruption(p_surplus=0.4))]
)
def test_a5_kinds_of_errors_are_told(root: Path, kind: str, corruption: Corruption) -> None:
    chosen = some(24, words=4)
    pictures = [render(one, corruption, seed=2) for one in chosen]
    normalise = Normalisation()
    found = [error_type(normalise(one.text), normalise(r.text)) for one, r in zip(chosen, read(pictures))]
    print(f"\nA5 {kind}: {found.count(kind) / 24:.1%} of pictures")
    assert found.count(kind) >= 0.8 * 24


def test_a6_rapidocr_and_the_oracle_rank_alike(models: Any) -> None:
    by = {name: load_all(folders) for name, folders in models.items()}
    values = {name: [[record["score"] for record in one.records] for one in some] for name, some in by.items()}
    pearson = stats.pearsonr(*(np.ravel(one) for one in values.values())).statistic
    print(f"\nA6 Pearson {pearson:.4f} over {np.size(values['oracle'])} pictures")
    for one in values.values():  # all models have the same instructions, a picture each
        assert np.argsort(-np.mean(one, axis=1)).tolist() == list(range(len(FAULTS)))
    assert pearson >= 0.95
