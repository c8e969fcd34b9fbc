"""One law over every field of every config: inside its range and choices a value is taken, outside it is refused by name."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import pkgutil
import time
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
import pytest
from msgspec import Meta

import zoo
from zoo import config, fields
from zoo.data.synthetic import Synthetic
from zoo.errors import UserError
from zoo.fields import Count, Share, check_fields
from zoo.papers.edm import Edm, Transformer
from zoo.papers.energy import EnergyDistill
from zoo.papers.part import PartClassifier
from zoo.papers.tarflow import TarFlow
from zoo.papers.tarflow_lm import DiscreteLM
from zoo.rewards import LetterShare

# What is no config: results, parts of programs, and what the house makes for itself.
INSIDE = {
    "zoo.commands.aot zoo.commands.bench zoo.commands.check zoo.commands.chips zoo.commands.clips": "",
    "zoo.commands.draw zoo.commands.hlo zoo.commands.text": "",
    "zoo.data.folders zoo.data.records zoo.data.prepare zoo.data.images.sources": "",
    "zoo.data.documents zoo.data.text.prepare zoo.data.text.vocabulary": "",
    "zoo.models zoo.task zoo.train.step zoo.weights zoo.nn": "",
    "zoo.cameras": "",
    "zoo.data.images": "Encoded",
    "zoo.data.images.latents": "_Bucket _Example",
    "zoo.data.series": "Part",
    "zoo.data.text.tokens": "Corpus",
    "zoo.diffusion.tokens zoo.diffusion.traces": "",
    "zoo.flows.inverse": "Chain",
    "zoo.flows.stack zoo.flows.patches": "",
    "zoo.papers.dart.model": "Layout",
    "zoo.papers.dart.process": "Nomad",
    "zoo.papers.tarflow_lm.model": "Flow",
    "zoo.metrics.frechet": "Moments",
    "zoo.metrics.samples": "Drawer",
    "zoo.papers.tada": "Dynamics",
    "zoo.papers.wvd.geometry": "",
    "zoo.papers.typescore.compare": "Result",
    "zoo.papers.typescore.extractors.base": "Extraction Line",
    "zoo.papers.typescore.instructions": "Instruction",
    "zoo.papers.typescore.metric": "Normalisation",
}
# Texts of any content, or of more than a list of words says.
WORDS = {
    "data_dir", "images", "labels", "series", "delimiter", "tokenizer", "aspect", "split", "out", "features", "reference", "workdir",
    "wanted", "other", "human", "base_url", "model", "api_key_env", "classes", "results", "truth",
    "texts", "words", "template", "network", "image_column", "caption_column",
}  # fmt: skip
NEEDED: dict[str, dict[str, Any]] = {  # of what has no default
    "Run": {"task": TarFlow(), "data": Synthetic(), "steps": 8, "batch": 8},
    "zoo.commands.prepare.Images": {},
    "zoo.commands.prepare.Latents": {"size": 8, "vae": "a"},
    "zoo.commands.prepare.Statistics": {"size": 8},
    "zoo.commands.prepare.Text": {"tokenizer": "bytes"},
    "Arrays": {"path": "a.npz"},
    "Images": {"path": "a", "size": 8},
    "Latents": {"path": "a"},
    "Posed": {"path": "a", "size": 8},
    "PointMaps": {"path": "a.npz"},
    "Series": {"path": "a.npz", "length": 8},
    "Text": {"path": "a.txt"},
    "Pairs": {"path": "a.jsonl"},
    "Rewarded": {"data": Synthetic(), "reward": LetterShare()},
    "Compared": {"data": Synthetic(), "reward": LetterShare()},
    "Sampled": {"run": "a"},
    "zoo.derived.Classifier": {"run": "a"},
    "Captioned": {"data": Synthetic()},
    "Tilt": {"function": jnp.sum},
    "Classifier": {"logits": jnp.sum, "label": jnp.zeros(1, int)},
    "Guided": {"main": Edm(), "guide": Edm()},
    "EnergyDistill": {"network": Edm()},
    "EnergyProduct": {"parts": (EnergyDistill(Edm()),) * 2},
    "Learned": {"task": EnergyDistill(Edm(image=1, channels=2, network=Transformer(patch=1)), target="data")},
    "TcsmDistill": {"teacher": DiscreteLM()},
    "EnergyTilted": {
        "energy": EnergyDistill(Edm(image=32, channels=3)),
        "classifier": PartClassifier(image=32, channels=3, patch=8),
    },
}


def is_inside(cls: type) -> bool:
    for places, names in INSIDE.items():
        for place in places.split():
            if f"{cls.__module__}.".startswith(f"{place}.") and (not names or cls.__name__ in names.split()):
                return True
    return False


def configs() -> list[type]:
    """Every frozen dataclass below zoo that a user may set a field of."""
    modules = [importlib.import_module(found.name) for found in pkgutil.walk_packages(zoo.__path__, "zoo.")]
    classes = [
        cls
        for module in modules
        for cls in vars(module).values()
        if isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__module__ == module.__name__
    ]
    own = [cls for cls in classes if cls.__dataclass_params__.frozen and not cls.__name__.startswith("_")]  # type: ignore[attr-defined]
    return [cls for cls in own if dataclasses.fields(cls) and not is_inside(cls)]


CONFIGS = configs()
assert {"Run", "Mesh", "AdamW", "TarFlow", "Layer", "Images", "Http", "Bits", "Jacobi"} <= {
    cls.__name__ for cls in CONFIGS
}


def probes(kind: Any) -> tuple[list[Any], list[Any]]:
    """Values just inside and just outside of a type with its ranges."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        parts = [probes(one) for one in inner]
        return list(itertools.chain(*(p[0] for p in parts))), list(itertools.chain(*(p[1] for p in parts)))
    if origin is Literal:
        return list(inner), ["no such choice"]
    if origin is tuple:
        taken, refused = probes(inner[0])
        size = 1 if inner[-1] is ... else len(inner)
        return [(value,) * size for value in taken], [(value,) * size for value in refused]
    if origin is Annotated and isinstance(inner[1], Meta):
        meta, number = inner[1], inner[0] in (int, float)
        taken, refused = ([], [math.nan, math.inf, 10**400, "word"]) if number else probes(inner[0])
        for low, sign in ((meta.ge, -1), (meta.le, 1)):
            if low is not None:
                taken.append(low)
                refused.append(low + sign if inner[0] is int else math.nextafter(low, sign * math.inf))
        for bound, sign in ((meta.gt, 1), (meta.lt, -1)):
            if bound is not None:
                taken.append(math.nextafter(bound, sign * math.inf))
                refused.append(bound)
        if meta.multiple_of is not None:
            refused.append(meta.ge + 1)
        return taken, refused + ([type(taken[0])()] if meta.min_length and taken else [""] if meta.min_length else [])
    return [], [object()] if kind in (int, float, str, bool) else []


def open_parts(kind: Any) -> set[Any]:
    """The parts of a type that have neither a range nor choices."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType, tuple):
        return set().union(*map(open_parts, inner))
    return {kind} & {int, float, str}


def breaches(cls: type, made: Any) -> Iterator[str]:
    """What is wrong with the ranges of a class, of which `made` is one."""
    for name, kind in fields.kinds(cls).items():
        if open_parts(kind) - {str}:
            yield f"{name} has no range"
        if str in open_parts(kind) and name not in WORDS:
            yield f"{name} is a text of any content and not among WORDS"
        taken, refused = probes(kind)
        for value in taken:
            before = time.process_time()
            try:
                dataclasses.replace(made, **{name: value})
            except UserError as error:  # a relation may refuse it; the check of ranges may not
                if fields.words(kind) in str(error) or not any(f.name in str(error) for f in dataclasses.fields(cls)):
                    yield f"{name}={value!r} is inside and refused: {error}"
            if time.process_time() - before > 3:
                yield f"{name}={value!r} takes over three seconds"
        for value in refused:
            try:
                dataclasses.replace(made, **{name: value})
                yield f"{name}={value!r:.40} is outside and taken"
            except UserError as error:
                if name not in str(error):
                    yield f"{name}={value!r:.40} is refused without its name: {error}"


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: cls.__name__)
def test_a_field_takes_what_is_inside_its_range_and_refuses_what_is_outside(cls: type) -> None:
    needed = NEEDED.get(f"{cls.__module__}.{cls.__name__}", NEEDED.get(cls.__name__, {}))  # some share a name
    found = list(breaches(cls, cls(**needed)))
    assert not found, "\n".join(found)


@dataclasses.dataclass(frozen=True)
class Forgetful:
    share: Share = 0.5
    kind: Literal["a", "b"] = "a"


@dataclasses.dataclass(frozen=True)
class Boundless:
    count: int = 1
    some: tuple[float, ...] = ()
    kind: str = "a"

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class Strict:
    count: Count = 5

    def __post_init__(self) -> None:
        check_fields(self)
        if self.count < 3:
            raise UserError("too few")


def test_the_law_finds_planted_violations() -> None:
    found = "\n".join(breaches(Forgetful, Forgetful()))
    assert "share=nan is outside and taken" in found
    assert "share=1.0000000000000002 is outside and taken" in found
    assert "kind='no such choice' is outside and taken" in found
    found = "\n".join(breaches(Boundless, Boundless()))
    assert all(f"{name} has no range" in found for name in ("count", "some"))
    assert "kind is a text" in found
    assert "count=1 is inside and refused: too few" in "\n".join(breaches(Strict, Strict()))


def test_arrays_pass_and_whole_numbers_are_numbers() -> None:
    assert all(fields.fits(value, Share) for value in (0, 1, 0.5, np.float32(0.5), np.zeros(3), jnp.array(7)))
    assert not any(fields.fits(value, Share) for value in (True, "0", None, 2, 10**400, np.float32(7), np.array(2)))
    assert fields.fits({"a": 1}, dict[str, Count])
    assert not any(fields.fits(value, dict[str, Count]) for value in ({"a": 0}, {1: 1}, ("a", 1)))
    assert not any(fields.fits(value, tuple[Count, ...]) for value in ([1], 1, (0,)))


def scalars(node: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        inner = dict(enumerate(value)) if isinstance(value, tuple) else value if isinstance(value, dict) else {}
        for key, one in (inner or {"": value}).items():
            name = f"{prefix}{field.name}.{key}".rstrip(".")
            yield from scalars(one, f"{name}.") if dataclasses.is_dataclass(one) else [name]


@pytest.mark.parametrize(
    "name",
    [
        "tarflow/digits:smoke",
        "starflow/mnist_latents:smoke",
        "tarflow_lm/stdlib:smoke",
        "part/digits:smoke",
        "typescore/http",
    ],
)
def test_a_mistyped_command_ends_in_a_value_or_a_sentence_with_the_name_of_the_field(name: str) -> None:
    made = config.load(name)
    for field, value in itertools.product(scalars(made), ("-1", "0", "9" * 30, "nan", "inf", "word", "7", "()")):
        said, before = field, time.process_time()
        try:
            config.override(made, [f"{field}={value}"])
        except UserError as error:
            said = str(error)
        assert [part for part in field.split(".") if not part.isdigit()][-1] in said
        assert time.process_time() - before < 1, (field, value)
