"""Config files: load one, override its fields with typed values, write it as JSON and read it back.

A config is plain data: frozen dataclasses of numbers, strings, tuples, dicts and further such dataclasses. JSON names a
dataclass by its import path; since such files travel between strangers, only frozen dataclasses of modules under
`zoo.` are resolved, others need their package named, and nothing is imported before that check.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json
import logging
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from zoo.errors import UserError, suggest
from zoo.fields import Named, fits, kinds, required, sentence
from zoo.files import differences, sha256, sha256_of_json
from zoo.task import SPEED, Options, sampling

_CLASS = "class"  # the JSON key that holds a dataclass's import path
_warn = functools.cache(logging.getLogger("zoo").warning)  # once a process: a config is opened many times


# --- config files ---------------------------------------------------------------------------------


def _shipped() -> Path:
    """The folder of shipped configs: beside the package in a clone, inside it in an installed wheel."""
    package = Path(__file__).parent
    return package / "_configs" if (package / "_configs").is_dir() else package.parent / "configs"


def shipped() -> dict[str, Path]:
    """Every shipped config by its short name, `tarflow/digits`."""
    root = _shipped()
    return {
        str(p.relative_to(root).with_suffix("")): p for p in sorted(root.rglob("*.py")) if not p.name.startswith("_")
    }


def locate(name: str) -> tuple[Path, str]:
    """File and value name of `configs/tarflow/digits.py`, `tarflow/digits` or either with `:smoke` behind."""
    path, _, value = name.partition(":") if not re.match(r"^[A-Za-z]:[\\/]", name) else (name, "", "")
    value = value or "config"
    if Path(path).is_file():
        return Path(path), value
    known = shipped()
    short = re.sub(r"^configs/", "", re.sub(r"\.py$", "", path))
    if short in known:
        return known[short], value
    raise UserError(f"no config file {path!r}; {suggest(short, known)} (`zoo list` shows them all)")


def _execute(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"zoo_config_{sha256(str(path.resolve()))[:12]}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file; a config is a .py file that defines `config`")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses defined in the file need their module to be findable
    spec.loader.exec_module(module)
    return module


def load(name: str, overrides: Sequence[str] = (), allow: Sequence[str] = ()) -> Any:
    """The value `config` (or the one named after a colon) of a config file, with `field=value` overrides applied.

    Args:
        name: a path (`configs/tarflow/digits.py`), a shipped name (`tarflow/digits`), either with `:smoke`.
        allow: packages besides zoo whose classes overrides may name.

    Raises:
        UserError: no such file, no such value in it, or an override that does not fit.
    """
    path, value = locate(name)
    module = _execute(path)
    if not hasattr(module, value):
        known = [k for k, v in vars(module).items() if dataclasses.is_dataclass(v) and not isinstance(v, type)]
        raise UserError(f"{path} defines no {value!r}; {suggest(value, known)}")
    config = getattr(module, value)
    if getattr(config, "workdir", 0) is None:
        suffix = "" if value == "config" else f"-{value}"
        config = dataclasses.replace(config, workdir=f"runs/{path.resolve().parent.name}-{path.stem}{suffix}")
    return override(config, overrides, allow=allow)


def describe(name: str) -> str:
    """First line of a config file's docstring, without running it."""
    path, _ = locate(name)
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


# --- overrides ------------------------------------------------------------------------------------


def override(config: Any, assignments: Iterable[str], options: type | None = None, allow: Sequence[str] = ()) -> Any:
    """Apply `field.sub=value` assignments to a tree of frozen dataclasses; each value is parsed for its field's type.

    All fields of one object change together, so that `task.width=96 task.head_dim=24` needs no order. What is chosen
    by name takes its fields beside: `solver=tada solver.detail=2`; several are `solvers=heun,tada solvers.1.detail=2`.

    Args:
        options: the class of what fields of the type `Options` hold, the sampler's options; None: that of `config.task`.
        allow: packages besides zoo whose classes may be named.
    """
    tree = _tree(assignments)
    if options is None and _is_config(config) and any(f.name == "task" for f in dataclasses.fields(config)):
        options = sampling(config.task)
    known = _around.set((options, allow))
    try:
        return _replace(config, tree, "")
    finally:
        _around.reset(known)


def make(cls: type, assignments: Iterable[str]) -> Any:
    """An object of a frozen dataclass by `field=value`, as `override` has them; UserError where one without a default is missing."""
    return _made(cls, _tree(assignments), "", cls.__name__)


def _tree(assignments: Iterable[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        node, parts = tree, key.split(".")
        if not equals or not all(parts):
            raise UserError(f"{text!r} is no override; write field=value, e.g. optim.lr=3e-4")
        for part in parts:
            node = node.setdefault(part, {})
        if _WHOLE in node:
            raise UserError(f"{key} is set twice; keep one of them")
        node[_WHOLE] = value
    return tree


_WHOLE = ""  # in a tree of changes, the key of what an object is set to as a whole
_around: ContextVar[tuple[type | None, Sequence[str]]] = ContextVar("around", default=(None, ()))


def _replace(node: Any, changes: Mapping[str, Any], prefix: str, kind: Any = None) -> Any:
    if kind == Options:
        options, _ = _around.get()
        if options is None:
            raise UserError(f"{prefix}{next(iter(changes))}: there is no sampler that takes options; leave it out")
        unknown = [k for k in node if k not in {f.name for f in dataclasses.fields(options)}]
        if unknown:
            raise UserError(f"{prefix}{unknown[0]}: {options.__name__} has no such option; leave it out")
        new = _replace(options(**node), changes, prefix)
        return {**node, **{k: getattr(new, k) for k in changes}}
    if Mapping[str, str] in _either(kind):  # words by free names, such as `Run.weights`
        node = node or {}
        return {**node, **{k: _change(node.get(k, ""), str, v, f"{prefix}{k}") for k, v in changes.items()}}
    if isinstance(node, dict):
        unknown = [k for k in changes if k not in node]
        if unknown:
            raise UserError(f"no key {prefix}{unknown[0]}; {suggest(unknown[0], node)}")
        return {**node, **{k: _change(node[k], None, v, f"{prefix}{k}") for k, v in changes.items()}}
    if isinstance(node, tuple):
        items = list(node)
        for k, v in changes.items():
            if not k.isdigit() or int(k) >= len(items):
                raise UserError(
                    f"no element {prefix}{k}; {prefix.rstrip('.')} has {len(items)} elements, counted from 0"
                )
            items[int(k)] = _change(items[int(k)], None, v, f"{prefix}{k}")
        return tuple(items)
    classes = [k for k in _either(kind) if dataclasses.is_dataclass(k)]
    if not _is_config(node) and classes:  # a weight, or a name, that stands for such an object; or none
        node = _built(typing.cast(Any, classes[0]), {}, prefix.rstrip("."))
    if not _is_config(node):
        raise UserError(f"{prefix.rstrip('.')}={node!r} has no fields; set it as a whole")
    names = [f.name for f in dataclasses.fields(node)]
    unknown = [k for k in changes if k not in names]
    if unknown and (way := getattr(node, "replaced", {}).get(unknown[0])):
        raise UserError(f"{prefix}{unknown[0]} is gone: {way}")
    if unknown:
        raise UserError(f"no field {prefix}{unknown[0]} in {type(node).__name__}; {suggest(unknown[0], names)}")
    cls: type = type(node)
    own = kinds(cls)
    return dataclasses.replace(
        node, **{k: _change(getattr(node, k), own[k], v, f"{prefix}{k}") for k, v in changes.items()}
    )


def _change(old: Any, kind: Any, new: Mapping[str, Any], name: str) -> Any:
    parts = {k: v for k, v in new.items() if k != _WHOLE}
    if _WHOLE not in new:
        return _replace(old, parts, f"{name}.", kind)
    base, several = _by_name(kind)
    if base is None:
        if parts:
            keep = f"keep one of {name}= and {name}.{next(iter(parts))}="
            raise UserError(f"{name} is set both as a whole and in part; {keep}")
        return parse(new[_WHOLE], type(old) if kind is None else kind, name, old)
    if not several:
        return _chosen(new[_WHOLE], base, name, parts)
    words = [word for word in new[_WHOLE].split(",") if word]
    if foreign := parts.keys() - set(map(str, range(len(words)))):
        raise UserError(f"no element {name}.{min(foreign)}; {name} has {len(words)} elements, counted from 0")
    return tuple(_chosen(word, base, f"{name}.{i}", parts.get(str(i), {})) for i, word in enumerate(words))


def _by_name(kind: Any) -> tuple[type[Named] | None, bool]:
    """What a field takes that is chosen by name, or None; and whether it takes several."""
    while typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    several = typing.get_origin(kind) is tuple
    one = typing.get_args(kind)[0] if several else kind
    return (one if isinstance(one, type) and issubclass(one, Named) else None), several


def _chosen(text: str, base: type[Named], name: str, parts: Mapping[str, Any]) -> Any:
    """An object of the class below `base` that `text` names, or of its import path, with these fields."""
    known = base.named()
    if text not in known and "." not in text:
        raise UserError(f"{name}={text} is no {base.__name__}; {suggest(text, known)}")
    cls = known.get(text) or _resolve(text, _around.get()[1], name)
    if not issubclass(cls, base):
        raise UserError(f"{name}={text} is no {base.__name__}; name one of {', '.join(known)}, or a class below it")
    return _made(cls, parts, f"{name}.", name)


def _made(cls: type, parts: Mapping[str, Any], prefix: str, where: str) -> Any:
    """An object of a class with these fields, of which those without a default make it and the others change it."""
    given = {k: v for k, v in parts.items() if k in required(cls)}
    made = _built(cls, {k: _change(None, kinds(cls)[k], v, f"{prefix}{k}") for k, v in given.items()}, where)
    rest = {k: v for k, v in parts.items() if k not in given}
    return _replace(made, rest, prefix) if rest else made


def _either(kind: Any) -> list[Any]:
    """The members of a union but None; [] for another type."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return [k for k in typing.get_args(kind) if union and k is not type(None)]


def _is_plain(kind: Any) -> bool:
    """Whether a type is of numbers and words alone."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    return (
        kind in (int, float, str, bool)
        or origin is typing.Literal
        or (origin is typing.Annotated and _is_plain(inner[0]))
    )


def parse(text: str, kind: Any, name: str, old: Any = None) -> Any:
    """`text` as a value of type `kind`; UserError naming the field when it is none."""
    if _is_config(old) and (simple := [k for k in _either(kind) if _is_plain(k)]):
        kind, old = typing.Union[tuple(simple)], None  # noqa: UP007
    inside = _inside(old)
    if inside:
        raise UserError(
            f"{name} is a whole object, not a value; set its fields ({name}.{inside[0]}=...): {', '.join(inside)}"
        )
    if text in ("none", "None") and type(None) in typing.get_args(kind):
        return None  # before a text field takes it for a word
    attempts: list[Any] = [text]
    if kind is Any:
        kind = (
            bool | int | float | str
            if old is None or not isinstance(old, (bool, int, float, str))
            else type(old)
            if isinstance(old, str)
            else bool | int | float
        )
    try:
        attempts.append(ast.literal_eval(text))
        attempts.append((attempts[-1],))  # one value for a tuple
    except (ValueError, SyntaxError):
        attempts.append(tuple(part for part in text.split(",") if part))  # a,b for a tuple of strings
    for attempt in attempts:
        with contextlib.suppress(msgspec.ValidationError, TypeError):
            value = msgspec.convert(attempt, kind, strict=False)
            if fits(value, kind):
                return value
    raise UserError(f"{sentence(name, text, kind)} (it is {old!r} now)")


def _inside(value: Any) -> list[str]:
    """What to set in a config, or in a tuple or dict of them; [] for a plain value."""
    if _is_config(value):
        return [f.name for f in dataclasses.fields(value)]
    parts = dict(enumerate(value)) if isinstance(value, tuple) else value if isinstance(value, dict) else {}
    return list(map(str, parts)) if any(map(_is_config, parts.values())) else []


# --- JSON -----------------------------------------------------------------------------------------


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def unlike(one: Any, other: Any, place: str = "task") -> list[str]:
    """In what two tasks, or fields of these, differ besides how fast they are: `task.width: 64 -> 32`."""
    found = differences(dump(one, place), dump(other, place), place)
    return [text for text in found if text.partition(":")[0].rpartition(".")[2] not in SPEED]


def check_alike(wanted: Any, given: Any, fields: Sequence[str], where: str) -> None:
    """UserError for a task that is given in the place of another of its class and differs from it in one of these fields that it has."""
    shared = [f for f in fields if type(wanted) is type(given) and hasattr(wanted, f)]
    found = [d for f in shared for d in unlike(getattr(wanted, f), getattr(given, f), f)]
    if found:
        field, _, values = found[0].partition(": ")
        raise UserError(
            f"{where} differs in {field} ({' there, and here '.join(reversed(values.split(' -> ')))}); give the config what it was "
            "trained with, or another one"
        )


def dump(value: Any, where: str = "config") -> Any:
    """JSON-able form of a config. Callables, arrays and other living things are refused."""
    if _is_config(value):
        cls = type(value)
        return {
            _CLASS: f"{cls.__module__}.{cls.__qualname__}",
            **{f.name: dump(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)},
        }
    if isinstance(value, Mapping):
        return {str(k): dump(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [dump(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UserError(
        f"{where} is a {type(value).__name__}; a config holds numbers, strings, tuples and frozen dataclasses only"
    )


def undump(data: Any, allow: Sequence[str] = (), where: str = "config") -> Any:
    """The config that `dump` wrote. Classes outside `zoo.` and the packages in `allow` are refused unimported.

    Fields that an earlier version had are left out with a warning.
    """
    if isinstance(data, list):
        return tuple(undump(v, allow, f"{where}[{i}]") for i, v in enumerate(data))
    if not isinstance(data, dict):
        return data
    if _CLASS not in data:
        return {k: undump(v, allow, f"{where}.{k}") for k, v in data.items()}
    cls = _resolve(data[_CLASS], allow, where)
    values = {k: v for k, v in data.items() if k != _CLASS}
    for field, way in getattr(cls, "replaced", {}).items():
        if field in values:
            shown = json.dumps(values.pop(field))
            _warn(f"{cls.__name__}.{field}={shown:.120} of an earlier version is gone: {way}")
    names = [f.name for f in dataclasses.fields(cls)]
    unknown = [k for k in values if k not in names]
    if unknown:
        raise UserError(
            f"{where}: {cls.__name__} has no field {unknown[0]!r}; {suggest(unknown[0], names)} (was it written by another version?)"
        )
    return _built(
        cls,
        {k: undump(v, allow, f"{where}.{k}") for k, v in values.items()},
        where,
        "; the file is damaged or of another version",
    )


def _built(cls: type, fields: Mapping[str, Any], where: str, why: str = "") -> Any:
    """An object of a class; UserError for a field that is missing and has no default, or holds another type."""
    try:
        return cls(**fields)
    except TypeError as error:
        missing = ", ".join(map(repr, sorted(required(cls) - fields.keys())))
        raise UserError(
            f"{where}: these fields make no {cls.__name__} ({f'it lacks {missing}' if missing else error}){why}"
        ) from None


def completed(old: Any, new: Any) -> Any:
    """What `dump` wrote, with the fields that have come since at their defaults; as it is where it cannot be read.

    `new` is written too, and says which packages are at home here.
    """
    packages = {name.partition(".")[0] for name in re.findall(rf'"{_CLASS}": "([^"]+)"', json.dumps(new))}
    try:
        return dump(undump(old, tuple(packages)))
    except UserError:
        return old


_MOVED = {  # classes, and modules of classes, that configs written before know elsewhere
    "zoo.metrics.relations.Relations": "zoo.papers.part.metrics.Relations",
    "zoo.metrics.probe.Localise": "zoo.papers.part.metrics.Localise",
    "zoo.data.latents": "zoo.data.images.latents",
    "zoo.data.captions": "zoo.data.images.captions",
    "zoo.data.tokens": "zoo.data.text.tokens",
    "zoo.data.pairs": "zoo.data.text.pairs",
    "zoo.data.vocabulary": "zoo.data.text.vocabulary",
}


def _resolve(name: Any, allow: Sequence[str], where: str) -> type:
    if isinstance(name, str):
        name = _MOVED.get(name, name)
        old, dot, attribute = name.rpartition(".")
        name = _MOVED.get(old, old) + dot + attribute
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name):
        raise UserError(f"{where}: {name!r} is no class name; the file is damaged or not a zoo config")
    module, _, attribute = name.rpartition(".")
    package = module.partition(".")[0]
    if package not in ("zoo", *allow):
        raise UserError(
            f"{where} names the class {name}, which is not part of zoo, and nothing of it was imported; if you trust the file, "
            f"say so with --allow {package}"
        )
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        raise UserError(
            f"{where} names the class {name}, which does not exist here; was it written by another version?"
        ) from None
    frozen = isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    if not frozen or cls.__module__ != module:
        raise UserError(
            f"{where} names {name}, which is no frozen dataclass of that module; the file is damaged or not a zoo config"
        )
    return cls


def digest(value: Any) -> str:
    """A short hash of a config: equal configs, equal digests, on every host."""
    return sha256_of_json(dump(value))[:16]
