"""Who may import whom, where Flax may live, and what every paper file must say."""

import ast
import graphlib
import re
from pathlib import Path

from zoo.commands import listing
from zoo.errors import UserError

ROOT = Path(__file__).parent.parent / "zoo"

# room -> rooms it may import; `errors`, `fields`, `files` and `task` are open to all
MAY = {
    "errors": set(),
    "files": set(),
    "task": set(),
    "fields": set(),
    "config": set(),
    "paths": set(),
    "dist": set(),
    "hosts": set(),
    "draws": set(),
    "data": set(),
    "weights": set(),
    "nn": {"dist"},
    "flows": {"dist", "nn"},
    "encoders": {"nn"},
    "diffusion": {"nn"},
    "papers": {"nn", "flows", "diffusion", "encoders", "dist"},
    "papers.metrics": {"papers", "metrics", "data", "dist", "hosts"},  # a paper's own, in zoo/papers/PAPER/metrics.py
    "metrics": {"encoders", "flows", "diffusion", "data", "dist", "hosts", "weights"},
    "train.optim": set(),
    "train.report": {"paths", "train.tracking"},
    "train.step": {"dist"},
    "train.tracking": set(),
    "train.checkpoint": {"hosts", "paths", "weights", "train.step"},
    "run": {"dist", "data", "train.optim"},
    "models": {
        "config", "dist", "data", "draws", "encoders", "paths", "run", "weights",
        "train.optim", "train.step", "train.checkpoint", "train.report",
    },
    "train.loop": {
        "config", "dist", "data", "hosts", "models", "paths", "run", "weights",
        "train.optim", "train.checkpoint", "train.report", "train.step", "train.tracking",
    },
    "commands": {
        "config", "dist", "data", "draws", "encoders", "flows", "hosts", "models", "paths", "run", "weights", "metrics", "papers",
        "train.optim", "train.report", "train.step",
    },
    "cli": {"config", "dist", "data", "draws", "hosts", "metrics", "models", "paths", "run", "commands", "train.loop"},
    "": {"models"},
}  # fmt: skip
FLAX = {"nn", "encoders", "papers", "dist", "train.step"}  # train.step: flax.struct only


def room(module: str) -> str:
    parts = module.split(".")[1:]
    if not parts:
        return ""
    if parts[0] == "papers" and parts[-1] == "metrics":
        return "papers.metrics"
    return ".".join(parts[:2]) if parts[0] == "train" else parts[0]


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        if "_configs" in parts:
            continue
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


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
            if there not in {here, "errors", "fields", "files", "task", *MAY[here]}:
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


def test_importing_zoo_does_not_import_jax() -> None:
    import subprocess
    import sys

    code = "import sys, zoo; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_paper_names_its_arxiv_number() -> None:
    for paper in listing.papers():
        assert re.fullmatch(r"\d{4}\.\d{4,5}", paper["arxiv"]), paper["module"]
        assert paper["tasks"], paper["module"]


def test_readme_lists_what_zoo_list_lists() -> None:
    readme = (ROOT.parent / "README.md").read_text()
    for paper in listing.papers():
        assert paper["arxiv"] in readme
        for task in paper["tasks"]:
            assert f"`{task}`" in readme


def test_a_user_error_is_a_value_error() -> None:
    assert issubclass(UserError, ValueError)
