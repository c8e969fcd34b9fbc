"""`zoo show`: the options of samplers, and the configs of runs and exports."""

import dataclasses
import json
from pathlib import Path

import pytest

from zoo import cli, config, files
from zoo.commands import show
from zoo.task import sampling


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["show", *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["show", *arguments]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "name, nested",
    [
        ("tarflow/digits:smoke", {"guidance.weight", "guidance.rule", "method.modules", "method.tol"}),
        ("starflow/mnist_latents:smoke", {"guidance.attention_temperature", "method.clamp"}),
        ("tarflow_lm/text8", {"method.criterion"}),
    ],
)
def test_every_option_is_listed_with_its_default_and_taken_by_that_name(name: str, nested: set[str]) -> None:
    kind = sampling(config.load(name).task)
    assert kind is not None
    lines = show.sampler(config.load(name), name).splitlines()[2:]
    defaults = dict(line.split(maxsplit=2)[:2] for line in lines)
    own = {f.name: repr(getattr(kind(), f.name)) for f in dataclasses.fields(kind)}
    assert own.items() <= defaults.items()
    assert nested <= set(defaults)
    for option, default in defaults.items():
        changed = config.override(kind(), [f"{option}={default}"])
        assert ("." in option) or changed == kind(), option


def test_types_are_told_with_their_ranges_and_comments(capsys: pytest.CaptureFixture[str]) -> None:
    lines = {line.split()[0]: line for line in shown(capsys, "tarflow-digits", "--sampler").splitlines() if line}
    assert "a finite number from 0 or a Guidance" in lines["guidance"]
    assert "one of ab, a, b" in lines["guidance.what"]
    assert "scale and shift, scale only, shift only" in lines["guidance.what"]
    assert "a finite number above 0" in lines["guidance.attention_temperature"]


def test_what_has_no_sampler_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--sampler needs 'sample', which Part has not" in refused(capsys, "part/digits", "--sampler")
    assert "holds a TypeScore, which has no sampler" in refused(capsys, "typescore/oracle", "--sampler")


def test_runs_and_exports_are_shown_as_configs_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = config.load("tarflow/digits:smoke")
    files.write(tmp_path / "config.json", json.dumps({"run": config.dump(run)}))
    ours, theirs = shown(capsys, str(tmp_path), "steps=7"), shown(capsys, "tarflow/digits:smoke", "steps=7")
    assert ours.splitlines()[1:] == theirs.splitlines()[1:]
    assert shown(capsys, str(tmp_path), "--shardings").startswith("parameter")
    rows = shown(capsys, "tarflow-digits").splitlines()
    assert rows[0].startswith("tarflow-digits: ")
    assert any(row.split()[:2] == ["image", "8"] for row in rows if row)


def test_foreign_classes_of_a_run_are_refused_until_they_are_allowed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"run": {"class": "foreign.Run"}}')
    assert "--allow foreign" in refused(capsys, str(tmp_path))
    assert "foreign.Run, which does not exist here" in refused(capsys, str(tmp_path), "--allow", "foreign")
    assert "neither a folder nor a shipped model, and no config either" in refused(capsys, "nonsuch")
