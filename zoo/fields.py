"""Ranges and choices of the fields of configs: said once, in their types, and checked here.

`Annotated[int, Meta(ge=1)]` bounds a number, `Literal[...]` lists choices, `Annotated[Any, Protocol]` says what an object has
to have. A dataclass asks for the check in `__post_init__`; only relations between fields are written by hand. Integers are
bounded above too: what no machine can hold, and what would be built for ever, is a slip of the hand.
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
import functools
import importlib
import inspect
import math
import operator
import pkgutil
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias, TypeVar

from msgspec import Meta

from zoo.errors import UserError

Dtype: TypeAlias = Literal["float32", "bfloat16"]
Count: TypeAlias = Annotated[int, Meta(ge=1, le=2**31 - 1)]  # of what is gone through: steps, examples
AtLeast2: TypeAlias = Annotated[int, Meta(ge=2, le=2**31 - 1)]  # likewise, of what is compared
Whole: TypeAlias = Annotated[int, Meta(ge=0, le=2**31 - 1)]  # likewise, where 0 means none, all or off
Seed: TypeAlias = Annotated[int, Meta(ge=0, le=2**32 - 1)]  # `jax.random.key` keeps 32 bits
Size: TypeAlias = Annotated[int, Meta(ge=1, le=2**18)]  # of an axis of an array
Side: TypeAlias = Annotated[int, Meta(ge=1, le=2**14)]  # of an image, in pixels
Layers: TypeAlias = Annotated[int, Meta(ge=1, le=2**10)]  # of what is built one after the other
Vocabulary: TypeAlias = Annotated[int, Meta(ge=1, le=2**20)]  # symbols or pieces
SizeOr0: TypeAlias = Annotated[int, Meta(ge=0, le=2**18)]  # 0: there is no such axis
Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Below1: TypeAlias = Annotated[float, Meta(ge=0, lt=1)]  # a share that leaves something
Positive: TypeAlias = Annotated[float, Meta(gt=0)]
NonNegative: TypeAlias = Annotated[float, Meta(ge=0)]
Offset: TypeAlias = Annotated[float, Meta(ge=-1e6, le=1e6)]  # of data, taken away
NotEmpty: TypeAlias = Annotated[str, Meta(min_length=1)]  # a name or a path that has to be given
T = TypeVar("T")
Some: TypeAlias = Annotated[tuple[T, ...], Meta(min_length=1)]

_LIMITS: dict[str, tuple[Any, str]] = {  # what `Meta` may say: how a value keeps to it, and in words
    "ge": (operator.ge, "from {}"),
    "gt": (operator.gt, "above {}"),
    "le": (operator.le, "to {}"),
    "lt": (operator.lt, "to below {}"),
    "multiple_of": (lambda value, n: value % n == 0, "in steps of {}"),
    "min_length": (lambda value, n: len(value) >= n, "with at least {}"),
}
_WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text", type(None): "none"}


def check_fields(config: Any, place: str = "") -> None:
    """UserError naming the first field of a dataclass that is not of its type, out of its range or none of its choices.

    Args:
        place: what stands before the name of a field, such as "task.".
    """
    cls: type = type(config)
    for name, kind in kinds(cls).items():
        value = getattr(config, name)
        if not fits(value, kind):
            shown = repr(value)
            raise UserError(sentence(f"{place}{name}", shown if len(shown) < 200 else f"{shown[:200]}...", kind))


@functools.cache
def kinds(cls: type) -> dict[str, Any]:
    """The type of every field of a dataclass, with its ranges."""
    found = typing.get_type_hints(cls, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(cls)}


class Named(abc.ABC):
    """Base of what a field takes by name: frozen dataclasses, each with a `name` of its own."""

    name: ClassVar[str]

    @classmethod
    def named(cls) -> dict[str, type[Self]]:
        """The classes below this one by name: those of zoo and its papers, then what else is imported."""
        papers = importlib.import_module("zoo.papers")
        for info in pkgutil.iter_modules(papers.__path__):
            importlib.import_module(f"zoo.papers.{info.name}")
        below: list[Any] = [cls]
        for one in below:
            below += one.__subclasses__()
        found: dict[str, Any] = {}
        for one in sorted(below, key=lambda one: not one.__module__.startswith("zoo.")):
            if "name" in vars(one) and not inspect.isabstract(one):
                found.setdefault(one.name, one)
        return found


def required(cls: Any) -> set[str]:
    """The fields of a dataclass that have no default."""
    missing = dataclasses.MISSING
    return {f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing}


def fits(value: Any, kind: Any) -> bool:
    """Whether `value` is a `kind` and keeps to its ranges. Whole numbers count as numbers; arrays pass, traced ones too."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if hasattr(value, "dtype") and hasattr(value, "item") and not hasattr(value, "aval") and not value.shape:
        value = value.item()  # a number of NumPy's
    if kind is Any or (hasattr(value, "shape") and hasattr(value, "dtype")):
        return True
    if origin is Annotated:
        return fits(value, inner[0]) and all(_keeps(value, limit) for limit in inner[1:])
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is tuple:
        each = inner[:1] * len(value) if inner[-1] is ... and isinstance(value, tuple) else inner
        return isinstance(value, tuple) and len(value) == len(each) and all(map(fits, value, each))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool) and (kind is int or _finite(value))
    return isinstance(value, origin or kind)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _keeps(value: Any, limit: Any) -> bool:
    if isinstance(limit, type):  # a protocol
        return isinstance(value, limit)
    return all(_LIMITS[name][0](value, bound) for name, bound in _bounds(limit).items())


def _bounds(limit: Any) -> dict[str, Any]:
    return {name: bound for name in _LIMITS if (bound := getattr(limit, name, None)) is not None}


def sentence(name: str, shown: str, kind: Any) -> str:
    """What a field that holds `shown` should be, with a did-you-mean for a misspelt choice."""
    close = difflib.get_close_matches(shown.strip("'"), [str(one) for one in _choices(kind)], n=1, cutoff=0.5)
    return f"{name}={shown} must be {words(kind)}" + (f"; did you mean {close[0]!r}?" if close else "")


def _choices(kind: Any) -> Iterable[Any]:
    if typing.get_origin(kind) is Literal:
        return typing.get_args(kind)
    return [choice for one in typing.get_args(kind) for choice in _choices(one)]


def words(kind: Any) -> str:
    """A type with its ranges, as a sentence says it: "a whole number from 1 to 16384"."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        protocols = [f"a {limit.__name__}" for limit in inner[1:] if isinstance(limit, type)]
        bounds = [_LIMITS[name][1].format(bound) for limit in inner[1:] for name, bound in _bounds(limit).items()]
        return " ".join([*(protocols or [words(inner[0])]), *bounds])
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(words, inner))
    if origin is tuple:
        each = dict.fromkeys(words(one) for one in inner if one is not ...)
        return f"a tuple{'' if inner[-1] is ... else f' of {len(inner)}'} (each {', '.join(each)})"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a dict whose values are each {words(inner[1])}"
    return _WORDS.get(kind) or f"a {getattr(kind, '__name__', kind)}"
