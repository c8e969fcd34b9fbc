"""Parameter trees: flat names, stacked and unrolled layers, and filling one model's parameters from another's."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo.errors import UserError, suggest
from zoo.files import sha256_of_parts
from zoo.task import Params, Task


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves of a nested dict by "/"-joined name, sorted; empty dicts leave no trace."""
    flat: dict[str, Any] = {}
    for key in sorted(tree):
        if "/" in key:
            raise ValueError(f"the parameter name {key!r} holds a '/', which separates the levels of a tree")
        node = tree[key]
        if isinstance(node, Mapping):
            flat |= {f"{key}/{name}": leaf for name, leaf in flatten(node).items()}
        else:
            flat[key] = node
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The nested dict whose `flatten` is `flat`."""
    tree: Params = {}
    for name, leaf in flat.items():
        *path, last = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def stacked(tree: Any) -> Any:
    """Any pytree with its layers stacked: dicts with equal `layer0`, `layer1`, ... get one `block` instead.

    Works on parameters, averages and optimiser states; leaves may be numpy or jax arrays (also inside jit) or
    ShapeDtypeStructs, which lose their sharding. Exact to the bit. Layers that differ in structure, shape or dtype
    are left as they are.
    """
    return jax.tree.map(lambda node: _stacked_dict(node) if isinstance(node, dict) else node, tree, is_leaf=_is_dict)


def matching(tree: Any, like: Any) -> Any:
    """`tree` with its layers stacked or unrolled as in `like`. Exact to the bit, usable inside jit.

    Raises UserError that lists all names which are missing or too many, and all shapes that differ from `like`.
    """
    tree = _relayout(tree, like, "")
    have, want = named_leaves(tree), named_leaves(like)
    refuse(
        "the parameters do not fit this task",
        "use the config they were made with",
        {
            "missing": [name for name in want if name not in have],
            "unexpected": [name for name in have if name not in want],
            "wrong shape": _wrong_shapes(have, want),
        },
    )
    return tree


def digest(params: Mapping[str, Any], about: str = "") -> str:
    """A short hash of every parameter and of `about`: 16 hex digits, the same for either layout and any precision it fits."""

    def parts() -> Iterator[str | memoryview]:
        yield about
        for name, leaf in flatten(stacked(jax.device_get(dict(params)))).items():
            array = np.ascontiguousarray(leaf, np.float32)
            yield f"{name} {array.shape} "
            yield array.reshape(-1).view(np.uint8).data

    return sha256_of_parts(parts())[:16]


def encoding(params: Mapping[str, Any]) -> Params:
    """What an encoder's output depends on: `encoder` and the measured scale `latents`; everything where there is no `encoder`.

    What decodes may be trained further, and a run that does so holds more beside it.
    """
    return {key: value for key, value in params.items() if key in ("encoder", "latents") or "encoder" not in params}


def encoder_digest(params: Mapping[str, Any]) -> str:
    """`digest` of what an encoder's output depends on (`encoding`)."""
    return digest(encoding(params))


def abstract(task: Task) -> Params:
    """Shapes and dtypes of `task.init` in the task's own layout, without axis boxes and without computing anything."""
    return jax.tree.map(lambda x: x.unbox() if _is_box(x) else x, boxed(task), is_leaf=_is_box)


def boxed(task: Task) -> Params:
    """The same with axis boxes. Kept for tasks that are values: tracing a deep network takes seconds, and commands ask often."""
    value: Any = task
    try:
        hash(value)
    except TypeError:
        return _kept.__wrapped__(value)
    return _kept(value)


@functools.lru_cache(maxsize=16)
def _kept(task: Task) -> Params:
    return jax.eval_shape(lambda: task.init(jax.random.key(0)))


def _is_dict(node: Any) -> bool:
    return isinstance(node, dict)


def _is_box(leaf: Any) -> bool:
    return hasattr(leaf, "unbox")


def _layers(node: Mapping[str, Any]) -> list[str]:
    """`layer0`, `layer1`, ... when the dict has them without a gap, else nothing."""
    names = [key for key in node if isinstance(key, str) and re.fullmatch(r"layer(0|[1-9]\d*)", key)]
    wanted = [f"layer{i}" for i in range(len(names))]
    return wanted if set(names) == set(wanted) else []


def _equal(layers: Sequence[Any]) -> bool:
    """Whether all layers have one structure and leaves of one shape and dtype."""
    kinds = []
    for layer in layers:
        leaves, structure = jax.tree.flatten(layer)
        kinds.append((structure, [(np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves]))
    return all(kind == kinds[0] for kind in kinds)


def _stack(*leaves: Any) -> Any:
    first = leaves[0]
    if isinstance(first, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *first.shape), first.dtype, sharding=_leading(first.sharding))
    return (jnp if isinstance(first, jax.Array) else np).stack(leaves)


def _leading(sharding: Any) -> Any:
    """The sharding of an array that got a leading axis, which no mesh axis splits."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return None
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(None, *sharding.spec))


def _slice(leaf: Any, layer: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    return leaf[layer, ...]  # the dots keep a numpy scalar an array


def _stacked_dict(node: dict[str, Any]) -> dict[str, Any]:
    node = {key: stacked(value) for key, value in node.items()}
    names = _layers(node)
    if not names or "block" in node or not _equal([node[name] for name in names]):
        return node
    block = jax.tree.map(_stack, *(node.pop(name) for name in names))
    return {**node, "block": block}


def _relayout(tree: Any, like: Any, path: str) -> Any:
    """`matching` without its final check: what `like` does not know stays as it is."""

    def convert(keys: Any, want: Any, node: Any) -> Any:
        if not (isinstance(want, dict) and isinstance(node, dict)):
            return node
        here = "/".join(part for part in (path, jax.tree_util.keystr(keys, simple=True, separator="/")) if part)
        names, found = _layers(want), _layers(node)
        if names and "block" not in want and "block" in node and not found:
            block = node["block"]
            depths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(block)}
            if depths != {(len(names),)}:
                has = " or ".join(str(d[0]) if d else "no" for d in sorted(depths))
                raise UserError(
                    f"{here}/block has {has} layers, but {len(names)} are expected; use a task of the same depth"
                )
            rows = {n: jax.tree.map(lambda leaf, i=i: _slice(leaf, i), block) for i, n in enumerate(names)}
            node = {**{key: value for key, value in node.items() if key != "block"}, **rows}
        elif "block" in want and not names and found and "block" not in node:
            rows = {n: _relayout(node[n], want["block"], f"{here}/{n}") for n in found}
            if _equal(list(rows.values())):
                block = jax.tree.map(_stack, *rows.values())
                node = {**{key: value for key, value in node.items() if key not in rows}, "block": block}
        return {key: _relayout(v, want[key], f"{here}/{key}") if key in want else v for key, v in node.items()}

    return jax.tree_util.tree_map_with_path(convert, like, tree, is_leaf=_is_dict)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves of any pytree by "/"-joined path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def differs(name: str, have: Any, want: Any) -> str:
    """A wrong shape in words."""
    is_, expected = ("x".join(map(str, np.shape(leaf))) or "a scalar" for leaf in (have, want))
    return f"{name} is {is_} (expected {expected})"


def few(names: Iterable[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    rest = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def refuse(what: str, todo: str, faults: Mapping[str, Sequence[str]]) -> None:
    """UserError that lists each kind of fault with its count; nothing when there is none."""
    found = [f"{kind} ({len(names)}): {few(names)}" for kind, names in faults.items() if names]
    if found:
        raise UserError(f"{what}: {'; '.join(found)}; {todo}")


def parts_of(reference: str) -> tuple[str, str]:
    """PATH and KEY of what stands in `Run.weights`: "PATH" (then KEY is empty) or "PATH:KEY"."""
    path, colon, key = reference.rpartition(":")
    return (path, key) if colon and path and re.fullmatch(r"\w+", key) else (reference, "")


def resolve(reference: str, read: Callable[[str], Params]) -> Params:
    """The tree that `Run.weights` means by "PATH" or "PATH:KEY"; `read(PATH)` gives a run's or export's parameters."""
    path, key = parts_of(reference)
    tree = read(path)
    if not key:
        return tree
    if key not in tree:
        raise UserError(f"weights: {path} has no parameters named {key!r}; {suggest(key, tree)}")
    return tree[key]


def fill(
    params: Params, given: Mapping[str, Any], named: Mapping[str, str] | None = None, task: Any = None
) -> tuple[Params, list[str]]:
    """`params` with the trees of `given` put in, and a report: what was filled, left fresh and not used.

    A key of `given` is a top-level key of `params`, or "" for a tree whose own top-level keys are placed by name (an
    explicit key wins over it). Layers may be stacked or unrolled on either side. Values, of numpy, take the dtype of what
    they replace.

    What is given by "" fills what fits. What is given by name fills its key whole; a model may hold more parts than the key
    (a discriminator beside a decoder), which are not used, and a part of a model may not.

    Args:
        named: `Run.weights`, where the trees come from: for errors, and to tell a model ("PATH") from its part ("PATH:KEY").
        task: whose field may say how many layers there are, for errors.

    Raises:
        UserError: an unknown key, a tree that fits nowhere, any shape that differs, and of what is given by name a tensor that
            is missing or left over.
    """
    flat = flatten(params)
    filled: set[str] = set()
    unused: list[str] = []
    for key, tree in given.items():
        if key and key not in params:
            raise UserError(f"weights: {key!r} is no part of this task's parameters; {suggest(key, params)}")
        reference = (named or {}).get(key, "")
        if key:
            new = _placed(key, tree, params[key], reference, task)
        else:
            new = flatten(_relayout({k: v for k, v in tree.items() if k not in given}, params, ""))
        fits = [name for name in new if name in flat]
        if not fits and new:
            raise UserError(
                f"weights: nothing given for {key!r} has a place: it holds {few(new)}, "
                f"the task has {few(n for n in flat if not key or n.split('/')[0] == key)}; check the reference"
            )
        refuse(
            f"{_entry(key, reference)} does not fit",
            "use a task of the same size, or name only the keys that fit",
            {"wrong shape": _wrong_shapes(new, flat)},
        )
        flat |= {name: np.asarray(new[name]).astype(flat[name].dtype) for name in fits}
        filled |= set(fits)
        unused += [name for name in new if name not in flat]
    fresh = [name for name in flat if name not in filled]
    report = [f"filled: {grouped(filled)}"] if filled else []
    report += [f"left fresh: {grouped(fresh)}"] if fresh else []
    report += [f"not used: {grouped(unused)}"] if unused else []
    return {**params, **unflatten(flat)}, report


def _placed(key: str, tree: Any, want: Any, reference: str, task: Any) -> dict[str, Any]:
    """Leaves by name of a tree that is given for a top-level key; UserError where it does not fill that key whole."""
    entry, whole = _entry(key, reference), not parts_of(reference)[1]
    wanted = flatten({key: want})
    deep, expected = _depths(tree), _depths(want)
    differ = [path for path in expected if deep.get(path, expected[path]) != expected[path]]
    if not differ:
        tree = _relayout(tree, want, key)
    new = flatten({key: tree})
    more = [name for name in new if name not in wanted]
    if whole and isinstance(want, Mapping):
        more = [name for name in more if name.partition("/")[2].split("/")[0] in want]
    faults = {
        "missing": [name for name in wanted if name not in new],
        "left over": more,
        "wrong shape": _wrong_shapes(new, wanted),
    }
    if reference and whole and isinstance(tree, Mapping) and key in tree and (differ or any(faults.values())):
        raise UserError(
            f"{entry} is a whole model ({few(sorted(tree))}), and the task takes its part {key!r} here; give "
            f"weights.{key}={reference}:{key}"
        )
    if differ:
        has, needs = deep[differ[0]], expected[differ[0]]
        field = _depth_field(task, key, needs)
        raise UserError(
            f"{entry} has {has} layers, this task has {needs}"
            + (
                f" ({field}): set {field}={has}, or give weights of {needs} layers"
                if field
                else "; use a task of the same size"
            )
        )
    if any(name in wanted for name in new):  # else all of it is wrong, and `fill` says so
        refuse(f"{entry} does not fit", "use a task of the same size", faults)
    return new


def _entry(key: str, reference: str) -> str:
    """An entry of `Run.weights`, as it is written."""
    return (f"weights.{key}" if key else "weights['']") + (f"={reference}" if reference else "")


def _wrong_shapes(have: Mapping[str, Any], want: Mapping[str, Any]) -> list[str]:
    return [
        differs(name, leaf, want[name])
        for name, leaf in have.items()
        if name in want and np.shape(leaf) != np.shape(want[name])
    ]


def _depths(tree: Any, path: str = "") -> dict[str, int]:
    """How many layers each stack of a tree has, in either layout, by where it lies; stacks within stacks are left out."""
    if not isinstance(tree, Mapping):
        return {}
    names, block = _layers(tree), tree.get("block")
    rest = {key: node for key, node in tree.items() if key not in ("block", *names)}
    found = {path: len(names)} if names else {}
    if isinstance(block, Mapping):
        sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(block)}
        if len(sizes) == 1 and () not in sizes:
            found[path] = sizes.pop()[0]
    for key, node in rest.items():
        found |= _depths(node, f"{path}/{key}")
    return found


def _depth_field(task: Any, key: str, layers: int) -> str:
    """The field of a task that gives the network under a key so many layers; "" where that is not known."""
    held = None if task is None else task.about.networks.get(key)
    own = [] if held is None or held.task is None else [(held.task, "depth", f"task.{key}.depth")]
    places = own or [(task, n, f"task.{n}") for n in (f"{key}_depth", "depth")]
    for holder, name, written in places:
        known = {field.name for field in dataclasses.fields(holder)} if dataclasses.is_dataclass(holder) else set()
        if name in known and getattr(holder, name) == layers:
            return written
    return ""


def grouped(names: Iterable[str]) -> str:
    """Names grouped by top-level key."""
    groups = Counter(name.split("/")[0] for name in sorted(names))
    return ", ".join(f"{key} ({count} tensor{'s' * (count > 1)})" for key, count in groups.items())
