"""Laws of zoo.config: finding, overriding, writing and reading configs."""

import abc
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from zoo import config
from zoo.data.synthetic import Synthetic
from zoo.errors import UserError
from zoo.fields import Named
from zoo.files import differences
from zoo.flows.inverse import Guidance, Jacobi
from zoo.papers.tarflow import TarFlow
from zoo.run import Checkpoint, Run, Samples
from zoo.task import Options
from zoo.train.optim import AdamW

ROOT = Path(__file__).parent.parent
RUN = Run(TarFlow(image=4, channels=1, patch=2, width=8, depth=1, blocks=2, head_dim=8), Synthetic(), steps=4, batch=8)


@dataclass(frozen=True)
class Inner:
    """A part of `Outer`."""

    size: int = 1
    rate: float = 0.5


class Form(Named):
    """Chosen by name."""

    @abc.abstractmethod
    def area(self) -> float: ...


@dataclass(frozen=True)
class Square(Form):
    """One of them."""

    name = "square"
    side: float = 1.0

    def area(self) -> float:
        return self.side**2


@dataclass(frozen=True)
class Circle(Square):
    """Another."""

    name = "circle"


@dataclass(frozen=True)
class Outer:
    """One field of every kind that a config may hold."""

    count: int = 3
    rate: float = 0.5
    on: bool = False
    name: str = "a"
    kind: Literal["one", "two"] = "one"
    shape: tuple[int, ...] = (1, 2)
    words: tuple[str, ...] = ()
    clip: float | None = 1.0
    folder: str | None = "here"
    inner: Inner = Inner()
    parts: tuple[Inner, ...] = (Inner(), Inner(2))
    by_key: Mapping[str, Inner] = field(default_factory=lambda: {"net": Inner(), "head": Inner()})
    options: Options = field(default_factory=lambda: {"temperature": 0.5})
    form: Form = Square()
    forms: tuple[Form, ...] = ()
    maybe: Inner | None = None


# finding


def test_a_config_is_found_by_path_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    by_path = config.load(str(ROOT / "configs/tarflow/digits.py"))
    monkeypatch.chdir(tmp_path)
    assert by_path == config.load("tarflow/digits") == config.load("configs/tarflow/digits.py")
    assert by_path.workdir == "runs/tarflow-digits"
    smoke = config.load("tarflow/digits:smoke", ["steps=2"])
    assert (smoke.task.image, smoke.steps, smoke.workdir) == (4, 2, "runs/tarflow-digits-smoke")
    assert config.load("tarflow/digits", ["workdir=x"]).workdir == "x"


@pytest.mark.parametrize(
    "name, message",
    [
        ("tarflow/digit", r"no config file 'tarflow/digit'; did you mean 'tarflow/digits'\?"),
        ("tarflow/digits:smok", r"defines no 'smok'; did you mean 'smoke'\?"),
        ("nowhere.py", r"no config file 'nowhere.py'"),
    ],
)
def test_a_name_that_is_none(name: str, message: str):
    with pytest.raises(UserError, match=message):
        config.load(name)


def test_a_config_file_of_ones_own(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text('"""Mine.\n\nMore."""\nfrom zoo.train.optim import AdamW\nconfig = AdamW(lr=0.5)\n')
    assert config.load(str(path), ["lr=0.25"]) == AdamW(lr=0.25)
    assert config.describe(str(path)) == "Mine."


# overrides


@pytest.mark.parametrize(
    "text, expected",
    [
        ("count=-7", {"count": -7}),
        ("count=1e3", {"count": 1000}),
        ("rate=3e-4", {"rate": 3e-4}),
        ("rate=2", {"rate": 2.0}),
        ("on=true", {"on": True}),
        ("on=0", {"on": False}),
        ("name=17", {"name": "17"}),
        ("name=a=b", {"name": "a=b"}),
        ("name=none", {"name": "none"}),
        ("kind=two", {"kind": "two"}),
        ("shape=4,5,6", {"shape": (4, 5, 6)}),
        ("shape=()", {"shape": ()}),
        ("words=a,b", {"words": ("a", "b")}),
        ("words=a", {"words": ("a",)}),
        ("clip=none", {"clip": None}),
        ("folder=none", {"folder": None}),
        ("inner.size=9", {"inner": Inner(size=9)}),
        ("parts.1.rate=0.25", {"parts": (Inner(), Inner(2, 0.25))}),
        ("by_key.head.size=4", {"by_key": {"net": Inner(), "head": Inner(4)}}),
        ("options.temperature=2", {"options": {"temperature": 2.0}}),
        ("options.guidance=2.5", {"options": {"temperature": 0.5, "guidance": 2.5}}),
        ("options.guidance.weight=2", {"options": {"temperature": 0.5, "guidance": Guidance(2.0)}}),
        ("options.method=jacobi", {"options": {"temperature": 0.5, "method": "jacobi"}}),
        ("options.method.modules=0,2", {"options": {"temperature": 0.5, "method": Jacobi((0, 2))}}),
        ("options.denoise=none", {"options": {"temperature": 0.5, "denoise": None}}),
        ("options={'guidance': 2.0}", {"options": {"guidance": 2.0}}),
    ],
)
def test_values_take_the_type_of_their_field(text: str, expected: dict[str, Any]):
    changed = config.override(Outer(), [text], TarFlow.Sampling)
    assert changed == replace(Outer(), **expected)
    for key, value in expected.items():
        assert type(getattr(changed, key)) is type(value)


@pytest.mark.parametrize(
    "texts, message",
    [
        (["cuont=1"], r"no field cuont in Outer; did you mean 'count'\?"),
        (["inner.siez=1"], r"no field inner.siez in Inner; did you mean 'size'\?"),
        (["by_key.haed.size=1"], r"no key by_key.haed; did you mean 'head'\?"),
        (["parts.2.size=1"], r"no element parts.2; parts has 2 elements, counted from 0"),
        (["count=many"], r"count=many must be a whole number \(it is 3 now\)"),
        (["count=True"], r"count=True must be a whole number"),
        (["inner.rate=fast"], r"inner.rate=fast must be a finite number \(it is 0.5 now\)"),
        (["options.temperature=nan"], r"options.temperature=nan must be a finite number from 0"),
        (["options.temprature=1"], r"no field options.temprature in TarFlowSampling; did you mean 'temperature'\?"),
        (["form=cirle"], r"form=cirle is no Form; did you mean 'circle'\?"),
        (["form=circle", "form.sides=2"], r"no field form.sides in Circle; did you mean 'side'\?"),
        (["form=circle", "form=square"], r"form is set twice"),
        (["form=zoo.run.Samples"], r"form=zoo.run.Samples is no Form; name one of square, circle"),
        (["form=os.system"], r"form names the class os.system, which is not part of zoo.*--allow os"),
        (["forms=square", "forms.1.side=2"], r"no element forms.1; forms has 1 elements"),
        (["forms=square,cirle"], r"forms.1=cirle is no Form; did you mean 'circle'\?"),
        (["maybe=1"], r"maybe=1 must be a Inner or none"),
        (["options.denoise.x=1"], r"options.denoise=None has no fields"),
        (["on=maybe"], r"on=maybe must be true or false"),
        (["kind=twoo"], r"kind=twoo must be one of one, two; did you mean 'two'\?"),
        (["shape=1,b"], r"shape=1,b must be a tuple \(each a whole number\)"),
        (["clip=fast"], r"clip=fast must be a finite number or none"),
        (["count.x=1"], r"count=3 has no fields"),
        (["inner=3"], r"inner is a whole object.*inner.size=\.\.\.\): size, rate"),
        (["parts=()"], r"parts is a whole object.*parts.0"),
        (["by_key=3"], r"by_key is a whole object.*by_key.net=\.\.\.\): net, head"),
        (["count"], r"'count' is no override; write field=value"),
        (["by_key.=1"], r"'by_key.=1' is no override"),
        (["count=1", "count=2"], r"count is set twice"),
        (["inner=1", "inner.size=2"], r"inner is set both as a whole and in part; keep one of inner= and inner.size="),
        (["inner.size=2", "inner=1"], r"inner is set (both as a whole and in part|twice)"),
    ],
)
def test_overrides_that_do_not_fit(texts: list[str], message: str):
    with pytest.raises(UserError, match=message):
        config.override(Outer(), texts, TarFlow.Sampling)


def test_a_class_is_chosen_by_name_and_its_fields_are_set_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for texts in itertools.permutations(["form=circle", "form.side=2", "maybe.rate=1"]):
        assert config.override(Outer(), texts) == replace(Outer(), form=Circle(2.0), maybe=Inner(rate=1.0))
    several = config.override(Outer(), ["forms=circle,square", "forms.1.side=3"]).forms
    assert several == (Circle(), Square(3.0))
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nimport test_config\n@dataclass(frozen=True)\n"
        "class Own(test_config.Square):\n    name = 'square'\n"
        "@dataclass(frozen=True)\nclass Bare(test_config.Form):\n    knob: int\n    def area(self): return self.knob\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "test_config", sys.modules[__name__])
    own = config.override(Outer(), ["form=mine.Own", "form.side=4"], allow=["mine"]).form
    assert (type(own).__name__, own.area()) == ("Own", 16)
    assert type(config.override(Outer(), ["form=square"]).form) is Square  # whatever else has that name
    bare = config.override(Outer(), ["form=mine.Bare", "form.knob=7"], allow=["mine"]).form
    assert bare.area() == 7
    with pytest.raises(UserError, match=r"form: these fields make no Bare .*'knob'"):
        config.override(Outer(), ["form=mine.Bare"], allow=["mine"])
    assert config.override(replace(Outer(), forms=(Square(),)), ["forms="]).forms == ()


def test_fields_of_one_object_change_together():
    with pytest.raises(UserError, match="does not divide"):
        config.override(RUN, ["task.head_dim=6"])
    assert config.override(RUN, ["task.head_dim=6", "task.width=12"]).task.width == 12
    assert RUN.task.width == 8


def test_one_optimiser_per_key_is_overridden_by_key_and_never_replaced_by_a_number():
    run = replace(RUN, optim={"net": AdamW(), "head": AdamW()})
    assert config.override(run, ["optim.head.lr=0.5"]).optim == {"net": AdamW(), "head": AdamW(lr=0.5)}
    with pytest.raises(UserError, match="optim is a whole object"):
        config.override(run, ["optim=5"])


# JSON


def through_json(value: Any, allow: tuple[str, ...] = ()) -> Any:
    return config.undump(json.loads(json.dumps(config.dump(value))), allow)


def test_a_run_survives_json():
    run = replace(
        RUN,
        optim={"net": AdamW(clip=1.0), "head": AdamW(schedule="constant")},
        weights={"net": "RUN:net"},
        rules={"batch": ("data", "fsdp"), "embed": None},
        checkpoint=Checkpoint(every=7),
        samples=Samples(n=4, options={"guidance": 2.0}),
        workdir="runs/x",
    )
    assert through_json(run) == run
    assert type(through_json(run).rules["batch"]) is tuple


@pytest.mark.parametrize("living", [len, np.zeros(2), np.float32(1), Synthetic, {1, 2}, Path("x"), object()])
def test_living_things_are_refused_by_name(living: Any):
    with pytest.raises(UserError, match=rf"config\.samples\.options\.key\[1\] is a {type(living).__name__};"):
        config.dump(replace(RUN, samples=Samples(options={"key": (1, living)})))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d["task"].update(colour=1), r"config.task: TarFlow has no field 'colour'"),
        (lambda d: d.pop("task"), r"config: these fields make no Run \(.*'task'"),
        (lambda d: d["task"].update(width="wide"), r"task.width='wide' must be a whole number from 1 to"),
        (lambda d: d["task"].update(image=0), r"task.image=0 must be a whole number from 1 to 16384"),
        (lambda d: d["task"].update({"class": "zoo.papers.tarflow.TarFlaw"}), r"TarFlaw, which does not exist here"),
        (lambda d: d["task"].update({"class": "zoo.papers.gone.Gone"}), r"Gone, which does not exist here"),
        (
            lambda d: d["task"].update({"class": "zoo.papers.tarflow.block_names"}),
            r"block_names, which is no frozen dataclass",
        ),
        (lambda d: d["task"].update({"class": "zoo.papers.tarflow.Guidance"}), r"no frozen dataclass of that module"),
        (lambda d: d["task"].update({"class": "zoo"}), r"'zoo' is no class name"),
        (lambda d: d["task"].update({"class": 3}), r"3 is no class name"),
    ],
)
def test_a_damaged_config_is_a_sentence(change: Callable[[dict[str, Any]], Any], message: str):
    data = config.dump(RUN)
    change(data)
    with pytest.raises(UserError, match=message):
        config.undump(data)


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package outside zoo, importable, whose import leaves a mark; returns the mark."""
    mark = tmp_path / "imported"
    for name in ("outsider", "zoo_outsider"):
        (tmp_path / f"{name}.py").write_text(
            f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
            "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Task:\n    width: int = 1\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("outsider", "zoo_outsider"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return mark


@pytest.mark.parametrize("name", ["outsider.Task", "outsider.zoo.Task", "zoo_outsider.Task", "os.system"])
@pytest.mark.parametrize("allow", [(), ("another",)])
def test_classes_outside_zoo_are_refused_unimported(foreign: Path, name: str, allow: tuple[str, ...]):
    data = {**config.dump(RUN), "task": {"class": name, "width": 3}}
    with pytest.raises(UserError, match=rf"config.task names the class {name}, which is not part of zoo.*--allow"):
        config.undump(data, allow)
    assert not foreign.exists()
    assert not {"outsider", "zoo_outsider"} & set(sys.modules)


def test_an_allowed_package_is_resolved(foreign: Path):
    task = config.undump({"class": "outsider.Task", "width": 3}, ("outsider",))
    assert foreign.exists()
    assert (type(task).__name__, task.width) == ("Task", 3)
    assert through_json(task, ("outsider",)) == task
    sys.modules.pop("outsider")


def test_differences_name_the_fields():
    new = replace(
        RUN, steps=5, task=replace(RUN.task, width=16), optim=AdamW(clip=1.0), samples=Samples(options={"n": 1})
    )
    assert differences(config.dump(RUN), config.dump(new)) == [
        "task.width: 8 -> 16",
        "steps: 4 -> 5",
        "optim.clip: null -> 1.0",
        "samples.n: 0 -> 64",
        "samples.options.n: null -> 1",
    ]
    assert differences({"a": [1, 2]}, {"a": [1, 3]}) == ["a.1: 2 -> 3"]
    assert differences({"a": [1]}, {"a": [1, 3]}) == ["a: [1] -> [1, 3]"]
    assert differences(config.dump(RUN), config.dump(dataclasses.replace(RUN))) == []


def test_the_digest_follows_from_the_config_alone():
    task = TarFlow(image=4, patch=2, width=8, head_dim=8)
    plain = {"a": (1, 2.5, None), "b": "x"}
    assert config.digest(plain) == "e80ae95b4645b9d7"  # golden: the same on every host and in every process
    assert config.digest(dict(reversed(plain.items()))) == config.digest(plain)
    assert config.digest(task) == config.digest(through_json(task)) == config.digest(replace(task))
    assert len({config.digest(t) for t in (task, replace(task, width=16), replace(task, noise=0.1))}) == 3
