"""Who may import whom, where Flax may live, and what every paper file must say."""

import ast
import functools
import graphlib
import importlib
import inspect
import re
from pathlib import Path

import pytest

from zoo import config
from zoo.commands import listing
from zoo.errors import UserError
from zoo.task import ABILITIES, Measures, abilities

ROOT = Path(__file__).parent.parent / "zoo"

# room -> rooms it may import; `errors`, `fields`, `files`, `rewards` and `task` are open to all
MAY = {
    "errors": set(),
    "process": set(),
    "files": set(),
    "task": set(),
    "fields": set(),
    "rewards": set(),
    "config": set(),
    "paths": set(),
    "dist": set(),
    "hosts": set(),
    "draws": set(),
    "cameras": set(),
    "data": {"cameras"},
    "weights": set(),
    "nn": {"dist"},
    "flows": {"dist", "nn"},
    "encoders": {"nn", "paths"},
    "diffusion": {"dist", "nn"},
    "papers": {"nn", "flows", "diffusion", "encoders", "dist", "cameras"},
    "papers.metrics": {"papers", "metrics", "data", "dist", "hosts", "cameras"},  # a paper's own, in zoo/papers/PAPER/metrics.py
    "metrics": {"encoders", "flows", "diffusion", "data", "dist", "hosts", "weights"},
    "train.optim": set(),
    "train.curve": set(),
    "train.pictures": {"paths"},
    "train.report": {"paths", "train.curve", "train.pictures", "train.tracking"},
    "train.averages": set(),
    "train.step": {"draws", "dist", "weights", "train.averages"},
    "train.tracking": set(),
    "train.checkpoint": {"hosts", "paths", "weights", "train.step"},
    "run": {"dist", "data", "train.averages", "train.optim"},
    "captions": {"data", "encoders", "paths", "train.pictures"},
    "models": {
        "captions", "config", "dist", "data", "draws", "paths", "run", "weights",
        "train.averages", "train.optim", "train.step", "train.checkpoint", "train.pictures",
    },
    "derived": {"config", "data", "dist", "models", "paths", "weights"},
    "train.provenance": {"config", "data", "encoders", "models", "paths", "run", "weights"},
    "train.profile": {"run", "train.report"},
    "train.checks": {"data", "run", "weights", "train.step", "train.tracking"},
    "train.folder": {"config", "hosts", "models", "paths", "run", "train.checkpoint", "train.provenance", "train.step"},
    "train.begin": {
        "hosts", "models", "run", "weights", "train.averages", "train.folder", "train.provenance", "train.step",
    },
    "train.watch": {
        "data", "draws", "hosts", "models", "run", "train.averages", "train.pictures", "train.provenance", "train.report", "train.step",
    },
    "train.loop": {
        "config", "dist", "hosts", "paths", "run", "train.begin", "train.checks", "train.folder", "train.optim",
        "train.profile", "train.provenance", "train.report", "train.step", "train.watch",
    },
    "commands": {
        "cameras", "captions",
        "config", "dist", "data", "diffusion", "draws", "encoders", "flows", "hosts", "models", "paths", "run", "weights",
        "metrics",
        "train.loop", "train.optim", "train.pictures", "train.provenance", "train.report", "train.step",
    },
    "cli": {"commands", "process"},
    "": {"models", "process"},
}  # fmt: skip
FLAX = {"nn", "encoders", "flows", "papers", "dist", "train.step"}  # train.step: flax.struct only


def room(module: str) -> str:
    parts = module.split(".")[1:]
    if not parts:
        return ""
    if parts[0] == "papers" and parts[-1] == "metrics":
        return "papers.metrics"
    return ".".join(parts[:2]) if parts[0] == "train" else parts[0]


@functools.cache
def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        if "_configs" in parts:
            continue
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


@functools.cache
def imports(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_follow_the_plan() -> None:
    everything = modules()
    wrong = []
    for name, tree in everything.items():
        here = room(name)
        if here == "train":
            continue  # the empty zoo/train/__init__.py
        for target in imports(tree):
            if not target.startswith("zoo."):
                continue
            there = room(target)
            if there not in MAY:  # `from zoo import x` names an attribute, not a room
                there = room(target.rpartition(".")[0])
            if there not in {here, "errors", "fields", "files", "rewards", "task", *MAY[here]}:
                wrong.append(f"{name} imports {target}")
    assert not wrong, wrong


def test_no_two_files_of_a_paper_import_each_other() -> None:
    """For types neither: what a network needs of its task is a value that the task makes."""
    everything = {name: tree for name, tree in modules().items() if name.startswith("zoo.papers.")}
    uses = {
        name: {
            other for other in everything for t in imports(tree) if other != name and f"{t}.".startswith(f"{other}.")
        }
        for name, tree in everything.items()
    }
    packages = {name for name in everything if any(other.startswith(f"{name}.") for other in everything)}
    graphlib.TopologicalSorter({name: used - packages for name, used in uses.items()}).prepare()


def test_papers_do_not_import_papers() -> None:
    for name, tree in modules().items():
        if name.startswith("zoo.papers."):
            own = ".".join(name.split(".")[:3])
            others = {t for t in imports(tree) if t.startswith("zoo.papers.") and not t.startswith(own)}
            assert not others, (name, others)


def test_flax_stays_behind_its_fence() -> None:
    for name, tree in modules().items():
        flax = {t for t in imports(tree) if t.split(".")[0] == "flax"}
        if flax:
            assert room(name) in FLAX, (name, flax)
        if room(name) == "train.step":
            assert flax == {"flax.struct.PyTreeNode"}


def test_importing_zoo_and_listing_what_it_has_do_not_import_jax() -> None:
    import subprocess
    import sys

    code = "import sys, zoo; from zoo.commands import listing; listing.listing(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_paper_names_its_arxiv_number() -> None:
    for paper in listing.papers():
        assert re.fullmatch(r"\d{4}\.\d{4,5}", paper["arxiv"]), paper["module"]
        assert paper["tasks"], paper["module"]


def test_sources_tell_the_list_what_the_classes_can_do() -> None:
    for paper in listing.papers():
        module = importlib.import_module(f"zoo.papers.{paper['module']}")
        classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__.startswith(module.__name__)]
        tasks = {c.__name__: abilities(c) for c in classes if hasattr(c, "spec") and hasattr(c, "loss")}
        alone = {c.__name__: ["zoo eval CONFIG"] for c in classes if issubclass(c, Measures)}
        assert list(paper["tasks"].items()) == list((tasks | alone).items())
        for name, can in tasks.items():  # a method that happens to be called like an ability would be taken for one
            for ability in can:
                promised, given = (
                    list(inspect.signature(getattr(cls, ability)).parameters)
                    for cls in (ABILITIES[ability], getattr(module, name))
                )
                assert given[: len(promised)] == promised, (name, ability)


# --- the engine knows no paper, and asks a task for nothing by name -------------------------------

LOOKUPS = {
    "getattr", "hasattr", "setattr", "delattr", "vars", "dir", "signature", "getattr_static", "getmembers", "getfullargspec",
}  # fmt: skip
GETTERS = {"attrgetter", "methodcaller"}
HIDDEN = {"__dict__", "__getattribute__", "__getattr__"}


def word(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def asked_by_name(tree: ast.AST) -> list[int]:
    """Lines that look something up by a string on what is called a task: task, self.task, type(task), guide_task."""

    def is_task(node: ast.AST) -> bool:
        return any(re.fullmatch(r"(\w*_)?tasks?", word(part), re.IGNORECASE) for part in ast.walk(node))

    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            made = word(node.func.func) if isinstance(node.func, ast.Call) else ""  # attrgetter("nll")(task)
            if (word(node.func) in LOOKUPS or made in GETTERS) and node.args and is_task(node.args[0]):
                found.append(node.lineno)
        elif isinstance(node, ast.Attribute) and node.attr in HIDDEN and is_task(node.value):
            found.append(node.lineno)
    return found


def test_abilities_are_looked_up_in_one_file() -> None:
    wrong = {name: asked_by_name(tree) for name, tree in modules().items() if name != "zoo.task"}
    assert not {name: lines for name, lines in wrong.items() if lines}


@pytest.mark.parametrize(
    "line",
    [
        'getattr(task, "bound", False)',
        'hasattr(run.task, "sample")',
        'hasattr(type(self.task), "nll")',
        "inspect.signature(model.task.sample)",
        "signature(task.sample).parameters",
        "getattr(network.task, name)(params)",
        'operator.attrgetter("sample")(guide_task)',
        'vars(task)["unit"]',
        'task.__dict__["unit"]',
    ],
)
def test_a_planted_lookup_is_found(line: str) -> None:
    assert asked_by_name(ast.parse(f"def f(task):\n    return {line}")) == [2]


def test_what_a_task_says_in_the_open_is_no_lookup() -> None:
    fair = "isinstance(task, Samples) and task.about.unit and getattr(metric, name)(task) and hasattr(data, 'hop')"
    assert asked_by_name(ast.parse(fair)) == []


@functools.cache
def names_of_papers() -> re.Pattern[str]:
    """Titles, modules, configs and tasks. Of words that are English too (PART, `Compare`) only the unmistakable forms."""
    exact, coined = [*map(re.escape, config.shipped())], []
    for paper in listing.papers():
        exact += [rf"configs/{paper['module']}\b", rf"zoo[./]papers[./]{paper['module']}\b"]
        short = paper["title"].partition(":")[0].split(" (")[0]
        if short.isupper():
            exact.append(rf"\b{short}\b")
        else:
            coined.append(rf"(?<![a-z]){short}(?![a-z])")  # in names too: tarflow_grid
        exact += [rf"\b{name}\b" for name in paper["tasks"] if re.search(r".[A-Z]", name)]
    return re.compile(rf"{'|'.join(exact)}|(?i:{'|'.join(coined)})")


def papers_named(tree: ast.AST) -> list[str]:
    """Names of papers in strings, f-strings and docstrings, which may cite a number, and among identifiers."""
    names = names_of_papers()
    said = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            said.append(node.value)
        elif isinstance(node, ast.ImportFrom):
            said += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, (ast.alias, ast.FunctionDef, ast.ClassDef)):
            said.append(node.name)
        else:
            said.append(word(node))
    return [text for text in said if names.search(text)]


def test_the_engine_names_no_paper() -> None:
    rooms = ("zoo.train", "zoo.data", "zoo.metrics", "zoo.commands")
    wrong = {name: papers_named(tree) for name, tree in modules().items() if name.startswith(rooms)}
    assert not {name: texts for name, texts in wrong.items() if texts}


@pytest.mark.parametrize(
    "line",
    [
        'raise UserError("write zoo eval configs/typescore/rapidocr.py")',
        'print(f"train {name} by part/digits first")',
        '"""The rule of TarFlow."""',
        '"zoo import starflow/sd_vae FILE OUT"',
        "from zoo.papers.part import Part",
        "from zoo.papers import tarflow",
        "import zoo.papers.tarflow_lm.task as t",
        "isinstance(task, TarFlow)",
        'type(task).__name__ == "MaskedAutoencoder"',
        "starflow_grid = 3",
        '"compared as in PART"',
    ],
)
def test_a_planted_name_of_a_paper_is_found(line: str) -> None:
    assert papers_named(ast.parse(line))


def test_ordinary_words_and_citations_are_no_names_of_papers() -> None:
    fair = (
        'def render(part, compare):\n    "Compare part of it (arXiv:2412.06329)"\n    return part / 2, "Render", Part'
    )
    assert papers_named(ast.parse(fair)) == []


def test_a_user_error_is_a_value_error() -> None:
    assert issubclass(UserError, ValueError)
