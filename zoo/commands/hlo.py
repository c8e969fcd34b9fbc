"""Reads a compiled program's text: how often each loop runs, what its collectives send, what it moves through memory.

XLA's own cost analysis counts the body of a loop once; a model whose layers are scanned is nearly all loop.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

_BYTES = {"pred": 1, "token": 0, "opaque": 0, "c64": 8, "c128": 16}
BETWEEN = "between slices"  # a kind of collective of our own
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# Instructions that move nothing: names for parts of others, and the far ends of what has been counted at its start.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "opt-barrier",
    "after-all", "partition-id", "replica-id", "domain", "iota",
}  # fmt: skip

_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^(ROOT )?%([\w.\-]+) = ")


def _item_bytes(dtype: str) -> float:
    if dtype in _BYTES:
        return _BYTES[dtype]
    bits = re.match(r"[a-z]+(\d+)", dtype)
    return int(bits[1]) / 8 if bits else 0


@dataclass(frozen=True)
class Shape:
    """One array of an instruction's result."""

    size: float  # bytes
    local: bool  # lies in on-chip memory: reading it costs no memory bandwidth


def _shapes(text: str) -> tuple[Shape, ...]:
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        count = math.prod(int(re.sub(r"\D", "", d)) for d in dims.split(",") if d)
        found.append(Shape(_item_bytes(dtype) * count, bool(re.search(r"S\([1-9]", layout))))
    return tuple(found)


@dataclass
class Instruction:
    """One line of a computation."""

    name: str
    op: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    text: str  # from the operands on
    root: bool = False

    def called(self, key: str) -> str | None:
        """The computation named by an attribute such as `body`."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.text)
        return found[1] if found else None

    @property
    def calls(self) -> list[str]:
        """Every computation that this instruction runs as often as itself."""
        names = [self.called(key) for key in ("calls", "true_computation", "false_computation")]
        if self.op == "call":
            names.append(self.called("to_apply"))
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.text)
        names += [b.strip().lstrip("%") for b in branches[1].split(",")] if branches else []
        return [name for name in names if name]


@dataclass
class Computation:
    """A named list of instructions."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {i.name: i for i in self.instructions}

    @property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.root), self.instructions[-1])


def _parse_line(line: str) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    if head is None:
        return None
    rest = line[head.end() :]
    # the result's type: one array, or a tuple in parentheses
    if rest.startswith("("):
        depth, end = 1, 1
        while depth and end < len(rest):
            depth += (rest[end] == "(") - (rest[end] == ")")
            end += 1
        kind, rest = rest[:end], rest[end + 1 :]
    else:
        kind, _, rest = rest.partition(" ")
    op, _, rest = rest.partition("(")
    inside = rest.partition(")")[0]
    return Instruction(head[2], op, _shapes(kind), tuple(re.findall(r"%([\w.\-]+)", inside)), rest, bool(head[1]))


@dataclass(frozen=True)
class Collective:
    """One collective operation of the program."""

    kind: str
    sent: float  # bytes that a device sends each time
    times: float  # how often in one run of the program
    groups: tuple[tuple[int, ...], ...]  # of partitions that take part together; pairs for a permutation

    @property
    def total(self) -> float:
        """Bytes that a device sends in one run of the program."""
        return self.sent * self.times


class Program:
    """The text of a compiled, partitioned program (`compiled.as_text()`)."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        # outputs that are written where an argument lay
        header = text.partition("\n")[0].partition("input_output_alias={")[2].partition("entry_computation_layout")[0]
        self.aliased = len(re.findall(r"\{[\d,\s]*\}: \(", header))
        current: Computation | None = None
        for line in text.splitlines():
            head = _HEAD.match(line)
            if head is not None:
                current = self.computations[head[1]] = Computation(head[1])
                if line.startswith("ENTRY"):
                    self.entry = head[1]
            elif line == "}":  # a kernel's own notes may hold lines that begin so
                current = None
            elif current is not None:
                found = _parse_line(line.strip())
                if found is not None:
                    current.instructions.append(found)

    @cached_property
    def _fused(self) -> set[str]:
        """The computations inside fusions."""
        return {c for one in self.computations.values() for i in one.instructions if i.op == "fusion" for c in i.calls}

    @cached_property
    def times(self) -> dict[str, float]:
        """How often each computation runs in one run of the program; those inside fusions too."""
        found: dict[str, float] = defaultdict(float)
        order: list[str] = []
        seen: set[str] = set()

        def visit(name: str) -> None:
            if name in seen or name not in self.computations:
                return
            seen.add(name)
            for inner in self._children(name):
                visit(inner[0])
            order.append(name)

        visit(self.entry)
        found[self.entry] = 1.0
        for name in reversed(order):  # callers come before what they call
            for inner, trips in self._children(name):
                found[inner] += found[name] * trips
        return dict(found)

    def _children(self, name: str) -> list[tuple[str, float]]:
        found = []
        for i in self.computations[name].instructions:
            if i.op == "while":
                trips = self.trips(name, i)
                found += [(inner, trips) for key in ("body", "condition") if (inner := i.called(key))]
            else:
                found += [(inner, 1.0) for inner in i.calls]
        return [(inner, trips) for inner, trips in found if inner in self.computations]

    def trips(self, caller: str, loop: Instruction) -> float:
        """How often a loop's body runs; 1 where the text does not tell."""
        told = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
        if told:
            return float(told[1])
        condition, body = (self.computations.get(loop.called(key) or "") for key in ("condition", "body"))
        if condition is None or body is None:
            return 1.0
        test = condition.root
        ends = [_number(condition.by_name.get(name)) for name in test.operands]
        index = next((_index(condition.by_name.get(name)) for name in test.operands), None)
        if "direction=LT" not in test.text or len(ends) != 2 or ends[1] is None or index is None:
            return 1.0
        begin, step = 0.0, 1.0
        first = self.computations[caller].by_name.get(loop.operands[0]) if loop.operands else None
        if first is not None and first.op == "tuple" and index < len(first.operands):
            given = _number(self.computations[caller].by_name.get(first.operands[index]))
            begin = begin if given is None else given
        if body.root.op == "tuple" and index < len(body.root.operands):
            added = body.by_name.get(body.root.operands[index])
            if added is not None and added.op == "add":
                steps = [n for name in added.operands if (n := _number(body.by_name.get(name))) is not None]
                step = steps[0] if steps and steps[0] > 0 else step
        return max(0.0, math.ceil((ends[1] - begin) / step))

    def collectives(self) -> list[Collective]:
        """Every collective, as often as it is started.

        One that is spread over several fusions has the same channel in all of them, some of them perhaps in a loop that runs
        meanwhile. Otherwise a channel tells nothing apart: copies of an instruction share theirs.
        """
        found: list[Collective] = []
        pieces: dict[str, Collective] = {}
        started: set[str] = set()
        for name, times in self.times.items():
            here = self.computations[name].instructions
            starts = any('"AsyncCollectiveStart"' in i.text for i in here)
            for i in here:
                kind = i.op.removesuffix("-start")
                if kind == "send" and "megascale" in i.text:  # handed to the host, for the network between slices
                    kind = BETWEEN
                elif kind not in _COLLECTIVES:
                    continue
                if not times:
                    continue
                scatters = "all-reduce-scatter" in name  # a TPU's fusion of a sum and the slice of it that is kept
                kind = "reduce-scatter" if scatters else kind
                groups = replica_groups(i.text)
                one = Collective(kind, self._sent(name, i, kind, len(groups[0]) if groups else 1), times, groups)
                channel = re.search(r"channel_id=(\d+)", i.text)
                if channel is None or scatters or name not in self._fused:
                    found.append(one)
                elif starts:
                    found.append(one)
                    started.add(channel[1])
                elif channel[1] not in pieces or pieces[channel[1]].times > times:
                    pieces[channel[1]] = one
        return found + [one for channel, one in pieces.items() if channel not in started]

    def _sent(self, caller: str, i: Instruction, kind: str, ways: int) -> float:
        """Bytes that a device sends, with the algorithms that send least."""
        known = self.computations[caller].by_name
        put = sum(s.size for name in i.operands if name in known for s in known[name].shapes[:1])
        if kind in ("collective-permute", BETWEEN):
            return put or i.shapes[0].size
        if kind == "all-gather":
            return put * (ways - 1)
        if kind == "all-reduce":
            return 2 * put * (ways - 1) / ways
        return put * (ways - 1) / ways

    def moved(self, loops: bool = True) -> float:
        """Bytes read from and written to device memory; `loops=False` counts every body once, as XLA's analysis does.

        What lies on the chip is free. Of an operand that is only sliced the slices count, of a result that is updated in
        place the update.
        """
        total = 0.0
        for name, times in self.times.items():
            if name not in self._fused:
                once = sum(self._bytes(self.computations[name], i) for i in self.computations[name].instructions)
                total += once * (times if loops else min(times, 1))
        return total

    def _bytes(self, where: Computation, i: Instruction) -> float:
        if i.op in _FREE or i.op.endswith("-done"):
            return 0.0
        inside = self.computations.get(i.called("calls") or "") if i.op == "fusion" else None
        read = 0.0
        for position, name in enumerate(i.operands):
            source = where.by_name.get(name)
            if source is None or not source.shapes or source.shapes[0].local:
                continue
            whole = source.shapes[0].size
            read += min(
                whole, _read(self.computations, inside, position, whole) if inside else _sliced(i, position, whole)
            )
        return read + (_written(inside) if inside else _plain_written(where, i))


def _number(i: Instruction | None) -> float | None:
    found = re.match(r"(-?[\d.]+)\)", i.text) if i is not None and i.op == "constant" else None
    return float(found[1]) if found else None


def _index(i: Instruction | None) -> int | None:
    found = re.search(r"index=(\d+)", i.text) if i is not None and i.op == "get-tuple-element" else None
    return int(found[1]) if found else None


def _sliced(i: Instruction, position: int, whole: float) -> float:
    if i.op in ("dynamic-slice", "slice", "gather", "slice-start") and position == 0:
        return min(s.size for s in i.shapes if s.size > 0) if i.shapes else whole
    if i.op in ("dynamic-update-slice", "scatter") and position == 0:
        return 0.0
    return whole


def _read(computations: Mapping[str, Computation], inside: Computation, position: int, whole: float) -> float:
    """Bytes that a fusion reads of its parameter at `position`; a slice may be taken in a fusion within it."""
    parameter = next(
        (p for p in inside.instructions if p.op == "parameter" and p.text.startswith(f"{position})")), None
    )
    if parameter is None:
        return whole
    total = 0.0
    for user in (u for u in inside.instructions if parameter.name in u.operands):
        at = user.operands.index(parameter.name)
        nested = computations.get(user.called("calls") or "") if user.op == "fusion" else None
        total += _read(computations, nested, at, whole) if nested else _sliced(user, at, whole)
    return total


def _written(inside: Computation) -> float:
    """Bytes that a fusion writes."""
    root = inside.root
    results = [inside.by_name[n] for n in root.operands if n in inside.by_name] if root.op == "tuple" else [root]
    return sum(_plain_written(inside, r) for r in results)


def _plain_written(where: Computation, i: Instruction) -> float:
    if i.op == "dynamic-update-slice" and len(i.operands) > 1 and i.operands[1] in where.by_name:
        return sum(s.size for s in where.by_name[i.operands[1]].shapes[:1] if not i.shapes[0].local)
    if i.op == "copy-start":  # (result, operand, ...)
        return sum(s.size for s in i.shapes[:1] if not s.local)
    if i.op.endswith("-start"):  # (operand, result, ...)
        return sum(s.size for s in i.shapes[1:2] if not s.local)
    return sum(s.size for s in i.shapes if not s.local)


def replica_groups(text: str) -> tuple[tuple[int, ...], ...]:
    """The groups of an instruction, in whichever way they are written down; pairs for a permutation; () for none."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
    if pairs:
        return tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)", pairs[1] + "}"))
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", text)
    if listed:
        return tuple(tuple(map(int, g.split(","))) for g in re.findall(r"\{([\d,]+)\}", listed[1]))
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if tiled:
        flat, size = _counted(tiled[2]), int(tiled[1].split(",")[-1])
        return tuple(tuple(flat[at : at + size]) for at in range(0, len(flat), size))
    named = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", text)
    if named:
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        groups = _over_axes(axes, re.findall(r"'([^']+)'", named[3]))
        ids = _counted(named[2] or "")
        return tuple(tuple(ids[p] for p in group) for group in groups) if ids else groups
    return ()


def _counted(text: str) -> list[int]:
    """Devices that are listed as they are, or as [sizes]T(axes): counted in an array and read along other axes first."""
    sizes, axes = (re.search(rf"{mark}([\d,]+)", text) for mark in (r"\[", r"T\("))
    if sizes is None:
        return [int(n) for n in re.findall(r"\d+", text)]
    order = tuple(map(int, axes[1].split(","))) if axes else None
    counted: list[int] = _grid(map(int, sizes[1].split(","))).transpose(order).ravel().tolist()
    return counted


def _grid(sizes: Iterable[int]) -> np.ndarray:
    """The numbers 0, 1, ... of an array of these sizes."""
    shape = tuple(sizes)
    return np.arange(math.prod(shape)).reshape(shape)


def _over_axes(axes: Mapping[str, int], among: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Groups of a mesh that differ in the axes `among` only."""
    names = list(axes)
    inner = [names.index(a) for a in among if a in axes]
    outer = [k for k in range(len(names)) if k not in inner]
    size = math.prod(axes[names[k]] for k in inner)
    return tuple(map(tuple, _grid(axes.values()).transpose([*outer, *inner]).reshape(-1, size).tolist()))
