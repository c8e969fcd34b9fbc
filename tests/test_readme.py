"""The pages that people read first: their commands run as written, their tables are what was measured."""

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import figures
import numpy as np
import pytest
from PIL import Image

import zoo.papers
from zoo import cli, config
from zoo.commands import listing
from zoo.data.images import Digits

README = (figures.ROOT / "README.md").read_text()
CONTRIBUTING = figures.CONTRACT.read_text()


def blocks(text: str, language: str = "") -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for kind, block in found if kind == language]


def commands(text: str) -> list[list[str]]:
    """What is typed, without the launcher that installs, and without lines that want a word of the user's own."""
    lines = [line.partition(" #")[0] for block in blocks(text) for line in block.replace("\\\n", "").splitlines()]
    words = [shlex.split(line.removeprefix("launch/local.sh ")) for line in lines if "zoo " in line]
    return [w[1:] for w in words if w[0] == "zoo" and not any(re.fullmatch(r"[A-Z]{3,}", part) for part in w)]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a user's photos of two classes."""
    source = Digits().source("train")
    for i in range(48):
        image = np.uint8((source[i]["image"][..., 0] + 1) * 127.5).repeat(4, 0).repeat(4, 1)
        (tmp_path / "photos" / ("cat", "dog")[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).convert("RGB").save(tmp_path / "photos" / ("cat", "dog")[i % 2] / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


FIRST = README[: README.index("## Export and import")]  # the first two screens


def test_the_first_commands_and_the_python_of_the_readme_run_as_written(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [words for words in commands(FIRST) if words[0] != "train" or words[1].endswith(":smoke")]
    assert {words[0] for words in found} == {"sample", "list", "train", "show", "check", "prepare", "eval"}
    for words in found:
        assert cli.main(words) == 0, words
    assert len(list((home / "samples").glob("0*.png"))) == 64
    assert json.loads((home / "data" / "mine" / "info.json").read_text())
    (code,) = blocks(FIRST, "python")
    made: dict[str, object] = {}
    exec(code, made)
    assert Image.open("digits.png").size > (32, 32)
    assert '"bpd"' in capsys.readouterr().out


@pytest.mark.slow
def test_all_commands_of_the_readme_before_clusters_run_as_written(home: Path) -> None:
    found = commands(README[: README.index("## GPU, cluster, TPU")])
    assert sum(words[0] == "train" for words in found) == 4
    for words in found:
        assert cli.main(words) == 0, words
    assert (home / "runs" / "mine" / "samples").is_dir()
    assert (home / "out" / "model.safetensors").is_file()


def test_the_worked_example_of_a_paper_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, recipe = blocks(CONTRIBUTING, "python")[-2:]
    assert len(model.splitlines()) <= 48
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gaussian.py").write_text(model)
    (tmp_path / "digits.py").write_text(recipe)
    spec = importlib.util.spec_from_file_location("zoo.papers.gaussian", tmp_path / "gaussian.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    monkeypatch.setattr(zoo.papers, "gaussian", module, raising=False)
    spec.loader.exec_module(module)
    assert cli.main(["train", "digits.py", "workdir=run", "--quiet"]) == 0
    assert cli.main(["sample", "run", "n=4"]) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if "loss" in r]
    assert losses[-1] < losses[0] - 0.3  # nats a pixel
    assert np.isfinite(records[-1]["bpd"])


def test_the_pages_show_the_measured_figures_and_the_contract() -> None:
    for page in figures.PAGES:
        assert figures.rendered(page) == page.read_text(), "run: python tests/figures.py write"
    for file in figures.FOLDER.iterdir():
        kinds = figures.read(file.stem)
        assert (figures.ROOT / "configs" / file.stem / "README.md").is_file()
        assert kinds.keys() <= figures.TABLES.keys()
        for record in (r for records in kinds.values() for r in records.values()):
            assert record.keys() == {"command", "hardware", "date", "figures"}


@pytest.mark.parametrize(
    ("device", "says"), [("cpu x 2", "2 cores of Some CPU"), ("NVIDIA H200 x 1", "NVIDIA H200 x 1")]
)
def test_a_record_says_where_it_was_measured(
    device: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    times = {"min": 1.0, "median": 2.0, "max": 3.0}
    place = {"device": device, "cpu": "Some CPU", "cores": 2, "date": "2024-02-29T23:00:00+00:00", "batch": 8}
    shown = {f"{what} ms, ours": times for what in ("train", "sample 1", "sample 16")}
    (tmp_path / "bench").write_text(json.dumps({**place, **shown, "train ms, fed by the data": times}))
    figures.add("toy", "tiny", tmp_path / "bench", "zoo bench tiny")
    *table, _, source = figures.bench_table(figures.read("toy")["bench"]).splitlines()
    assert {row.split(" | ")[1] for row in table[2:]} == {"train step, batch 8", "sample 1 image", "sample 16 images"}
    assert source == f"- 2024-02-29, {says}: `zoo bench tiny`"


def test_commands_that_differ_in_their_id_stand_once() -> None:
    record = {"date": "2024-02-29", "hardware": "a core", "figures": {"bits_per_token": [1.0, 2.0], "steps": 3}}
    records = {f"short:{i}": {**record, "command": f"zoo train x/short:{i} data.path=short:{i}.txt"} for i in "ab"}
    other = {"long": {**record, "command": "zoo train x/long"}}
    lines = figures.texts_table(other | records).splitlines()
    assert lines[2] == "| long | 1.000 | 2.000 | 3 |"
    assert lines[-3:] == [
        "- long: 2024-02-29, a core: `zoo train x/long`",
        "- short:a: 2024-02-29, a core: `zoo train x/short:a data.path=short:a.txt`",
        "- short:b: 2024-02-29, a core: `zoo train x/short:b data.path=short:b.txt`",
    ]
    same = {name: {**r, "command": f"zoo train x/{name} seed=0"} for name, r in records.items()}
    assert figures.texts_table(same).splitlines()[-1] == "- 2024-02-29, a core: `zoo train x/RUN seed=0`"


def test_the_readme_is_a_front_page_and_its_lines_fit_a_screen() -> None:
    assert len(README.splitlines()) <= 150
    assert max(map(len, README.splitlines())) <= figures.WIDTH
    for page in figures.PAGES:
        rows = [line for line in page.read_text().splitlines() if line[:1] == "|"]
        assert [row for row in rows if len(row) > figures.WIDTH] == []


def test_the_readme_lists_the_papers_that_zoo_list_lists_and_each_link_leads_somewhere() -> None:
    for paper in listing.papers():
        assert paper["arxiv"] in README
        assert f"configs/{paper['module']}/README.md" in README
    for page in (figures.ROOT / "README.md", *figures.PAGES):
        for link in re.findall(r"\]\(([^)#]+)|^\[\w+\]: (\S+)", page.read_text(), re.MULTILINE):
            target = "".join(link)
            assert target.startswith("http") or (page.parent / target).exists(), (page, target)


@pytest.mark.parametrize("page", [figures.ROOT / "README.md", *figures.PAGES], ids=lambda page: page.parent.name)
def test_commands_on_the_pages_name_configs_and_fields_that_there_are(page: Path) -> None:
    for verb, *words in commands(page.read_text()):
        names = [word for word in words if re.match(r"(configs/)?\w+/\w+(\.py)?(:\w+)?$", word)]
        names = [name for name in names if not name.startswith(("runs/", "exports/", "data/"))]
        for name in names:
            config.locate(name)
        if verb in ("train", "bench", "compile") and "--allow" not in words:
            config.load(names[0], [word for word in words if re.match(r"[a-z_.0-9]+=\S*$", word)])


def test_every_module_stands_in_the_tree_of_contributing() -> None:
    for path in (figures.ROOT / "zoo").iterdir():
        if not path.name.startswith("_"):
            name = f"zoo/{path.name}{'/' if path.is_dir() else ''}"
            assert f"`{name}`" in CONTRIBUTING, name
