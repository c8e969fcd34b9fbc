"""Series in time: made chirps, and the user's own recordings in .npz or CSV files, cut into windows.

Every source here gives `series` float32 [L, C] (L time steps of C channels) and, where the series are labelled, `label`
int32 [].
"""

from __future__ import annotations

import csv
import math
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from msgspec import Meta

from zoo.data.arrays import array_name, check_labels, class_names, read_array, tell_classes
from zoo.data.folders import SPLITS, Files, divide, existing, find_files, hashed, tell
from zoo.data.images import check_split
from zoo.data.pipeline import Data, Source
from zoo.errors import UserError
from zoo.fields import Below1, Count, NotEmpty, Seed, Size
from zoo.files import check_head, digests, reading, sha256_of_json

RATES = (4, 9, 14, 19)  # what a chirp's frequency gains in the window, its class
NOISE = 0.3
SUFFIXES = (".csv", ".tsv")
_LOOKED_AT = 256  # rows by which a header is told from numbers
SpecOf = Mapping[str, jax.ShapeDtypeStruct]


# Made series


@dataclass(frozen=True)
class Chirps(Data):
    """Noisy tones that rise: s(t) = A sin(2 pi (f0 t + r t^2 / 2) + phi) + 0.3 noise at t = 0, 1/length, ..., below 1.

    The class is the rate r, one of 4, 9, 14 and 19, in turn; f0 is uniform in [2, 5), phi in [0, 2 pi) and A in [0.7, 1.3) (our
    choice), the noise is normal. `series` is [length, 1]. Example i of a split follows from (seed, split, i) alone: more
    examples leave the first ones as they were.
    """

    train: Count = 10_000
    test: Count = 2_000
    length: Annotated[int, Meta(ge=2, le=2**18)] = 256
    seed: Seed = 0

    def source(self, split: str, spec: SpecOf | None = None) -> ChirpSource:
        """The examples of a split, made at once and kept in memory (10,000 take a quarter of a second)."""
        check_split(split)
        return ChirpSource(_chirps(self.seed, split, self.train if split == "train" else self.test, self.length))


class ChirpSource(Source):
    """Examples from their array [N, L]; the class of example i is i modulo 4."""

    labels = tuple(map(str, RATES))

    def __init__(self, series: np.ndarray) -> None:
        self._series = series

    def __len__(self) -> int:
        return len(self._series)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {"series": self._series[index][:, None], "label": np.asarray(index % len(RATES), np.int32)}


@lru_cache(maxsize=4)
def _chirps(seed: int, split: str, count: int, length: int) -> np.ndarray:
    """float32 [N, L]. Both streams are drawn row by row, so that a row does not depend on how many follow."""
    chosen = np.random.default_rng((seed, SPLITS.index(split), 0)).random((count, 3))
    series = np.random.default_rng((seed, SPLITS.index(split), 1)).standard_normal((count, length), np.float32)
    series *= NOISE
    t = np.arange(length) / length
    for first in range(0, count, 1024):
        low, phase, amplitude = chosen[first : first + 1024, :, None].swapaxes(0, 1)
        rate = np.asarray(RATES)[np.arange(first, first + len(low)) % len(RATES)][:, None]
        angle = 2 * np.pi * ((2 + 3 * low) * t + rate * t**2 / 2 + phase)
        series[first : first + 1024] += (0.7 + 0.6 * amplitude) * np.sin(angle)
    series.setflags(write=False)
    return series


# The user's own


@dataclass(frozen=True)
class Series(Data):
    """Windows of the user's recordings: `length` time steps every `hop`, cut from an .npz file or from CSV files.

    An .npz file holds series of one length, numbers [N, T] or [N, T, C], and labels int [N]; `{split}` in the name of an
    array becomes "train" or "test". Without it `test_fraction` of the series are held out, whole and drawn at random: where
    neighbours come from one recording, store one series per recording or the splits as arrays of their own.

    In a CSV file (.csv or .tsv) a row is a time step and every column is a channel, a column of times too: leave it out; an index of pandas
    (no name; 0, 1, 2, ...) is left out here. A header line, also one of numbers, and lines before it that begin with # are passed
    over. `path` is one such file, a folder of them, folders of
    them by class, or `train` and `test` folders of either kind. Without a test part a share of the files is held out, of every
    class at least one.

    Where there is only one recording to hold out from (one file, one file of a class, an .npz of one series), its END is the
    test split: `test_fraction` of its time steps and at least one window, two where it has four, as far as the training split
    keeps one. No window reaches from one split into the other.
    """

    path: NotEmpty
    length: Size
    hop: Count | None = None  # time steps from one window to the next; None: `length`, windows side by side
    series: str = "{split}_series"
    labels: str = "{split}_labels"  # "": unlabelled
    classes: tuple[str, ...] = ()  # names of the labels in an .npz file; (): "0", "1", ...
    delimiter: str = ","  # of CSV files: one character, \t for a tab, a blank for any number of blanks
    standardise: bool = True  # each channel by its mean and deviation in training; a constant one is only centred
    test_fraction: Below1 = 0.1

    def source(self, split: str, spec: SpecOf | None = None) -> WindowSource:
        """The windows of a split, in the order of the recordings and of time."""
        part = self.part(split)
        hop = self.length if self.hop is None else self.hop
        mean, scale = _moments(self, self._stamp()) if self.standardise else (None, None)
        if mean is not None and mean.size != part.channels:
            raise UserError(
                f"{self.path} has {mean.size} channels in its train split and {part.channels} in its {split} split; "
                "give both the same"
            )
        source = WindowSource(part, self.length, hop, mean, scale)
        if not len(source):
            raise UserError(
                f"{self.path} has no window of data.length={self.length} time steps in its {split} split; "
                "change data.test_fraction or data.length, or add recordings"
            )
        return source

    def fingerprint(self, split: str) -> str:
        """What the windows of a split are, wherever the files lie: names and bytes of these, and how windows are cut from them."""
        check_split(split)
        root = self._root()
        how = [split, self.length, self.hop, self.standardise, self.test_fraction]
        if root.is_file():
            name = [self.series, self.labels] if _is_npz(root) else self.delimiter
            return sha256_of_json([digests(root.parent, [root.name]), name, *how])
        parts = find_files(root, SUFFIXES, "recording")[0]
        files = [path for part in parts.values() for path in part.paths]  # both splits: one standardises the other
        return hashed(root, files, repr([self.delimiter, *how]))

    def _root(self) -> Path:
        root = existing(self.path)
        if root.is_file() and not _is_npz(root) and root.suffix.lower() not in SUFFIXES:
            raise UserError(
                f"data.path={root} is no kind of series that is known; give an .npz file ({self.series}, {self.labels}), a "
                f"CSV file ({', '.join(SUFFIXES)}) or a folder of CSV files"
            )
        return root

    def part(self, split: str) -> Part:
        """The recordings of a split, before they are cut into windows."""
        check_split(split)
        root = self._root()
        return self._from_npz(root, split) if root.is_file() and _is_npz(root) else self._from_csv(root, split)

    def _stamp(self) -> tuple[Stamp, ...]:
        """The files as they are now, for what is cached."""
        root = self._root()
        if root.is_file():
            return (_stamp(root),)
        parts = find_files(root, SUFFIXES, "recording")[0]
        return tuple(_stamp(root / path) for part in parts.values() for path in part.paths)

    def _from_npz(self, root: Path, split: str) -> Part:
        stamp = _stamp(root)
        name = array_name(self.series, split, "data.series")
        series = _series(stamp, name)
        count, steps = series.shape[:2]
        if count and steps < self.length:
            raise UserError(
                f"{root}: array {name!r} holds {count} series of {steps} time steps, fewer than data.length={self.length}; set "
                f"data.length={steps} or less (one recording [T, C] is stored as [1, T, C])"
            )
        labels = None
        if self.labels:
            labels = _labels(stamp, array_name(self.labels, split, "data.labels"))
            check_labels(root, labels, count, "series")
        names = class_names(self.classes, labels)
        if labels is not None and split == "train":
            tell_classes(root, labels, names)
        members, (first, last) = np.arange(count), (0, steps)
        if "{split}" not in self.series and count == 1:
            first, last = self._cut(steps)[split]
        elif "{split}" not in self.series:
            members = np.asarray(divide(count, self.test_fraction, labels, names)[split], np.int64)
        spans = np.full(len(members), first), np.full(len(members), last)
        return Part(series, members, *spans, None if labels is None else labels[members], names)

    def _from_csv(self, root: Path, split: str) -> Part:
        if self.classes:
            raise UserError("data.classes names the labels of an .npz file; CSV files are labelled by their folders")
        names: tuple[str, ...]
        if root.is_file():
            parts, names, root = {"all": Files([root.name], None)}, (), root.parent
        else:
            parts, names = find_files(root, SUFFIXES, "recording")
        files = parts.get(split) or parts["all"]
        stamps = tuple(_stamp(root / path) for path in files.paths)
        series = _recordings(stamps, _separator(self.delimiter))
        for stamp, recording in zip(stamps, series):
            if len(recording) < self.length:
                raise UserError(
                    f"{stamp[0]} has {len(recording)} time steps, fewer than data.length={self.length}; set "
                    f"data.length={len(recording)} or less, or remove that file"
                )
        spans = [(i, 0, len(recording)) for i, recording in enumerate(series)]
        if "all" in parts:
            spans = self._share(split, [len(recording) for recording in series], files.labels)
        members, first, last = np.asarray(spans, np.int64).reshape(-1, 3).T
        labels = None if files.labels is None else np.asarray(files.labels)[members]
        return Part(series, members, first, last, labels, names)

    def _share(self, split: str, lengths: Sequence[int], labels: list[int] | None) -> list[tuple[int, int, int]]:
        """What a split gets of recordings that no folder assigns: (recording, first time step, end)."""
        spans = []
        kinds = np.zeros(len(lengths), np.int64) if labels is None else np.asarray(labels)
        for kind in np.unique(kinds):
            group = np.flatnonzero(kinds == kind).tolist()
            if len(group) == 1:
                first, last = self._cut(lengths[group[0]])[split]
                spans += [(group[0], first, last)] if first < last else []
            else:
                spans += [(group[j], 0, lengths[group[j]]) for j in divide(len(group), self.test_fraction)[split]]
        return sorted(spans)

    def _cut(self, steps: int) -> dict[str, tuple[int, int]]:
        """The time steps of both splits in one recording; where both cannot have a window, the training split has all."""
        hop = self.length if self.hop is None else self.hop
        held_out = 0
        if self.test_fraction and steps >= 2 * self.length:
            several = (steps - self.length) // hop + 1 >= 4  # two to test on: some metrics compare examples
            held_out = max(self.length + hop * several, round(steps * self.test_fraction))
        cut = max(self.length, steps - held_out) if held_out else steps
        return {"train": (0, cut), "test": (cut, steps)}


@dataclass(frozen=True)
class Part:
    """What a split is made of: time steps [first, last) of some recordings `series[member]`, each [T, C]."""

    series: Sequence[np.ndarray] | np.ndarray
    members: np.ndarray  # int [M]
    first: np.ndarray  # int [M]
    last: np.ndarray  # int [M]
    labels: np.ndarray | None  # int [M]
    names: tuple[str, ...]

    @property
    def channels(self) -> int:
        return self.series[0].shape[-1] if len(self.series) else 0

    def pieces(self) -> Iterator[np.ndarray]:
        """All time steps once, in pieces [n, C]."""
        if isinstance(self.series, np.ndarray) and len(self.members):  # one span for all: many short series at once
            some = max(1, 2**20 // max(1, self.series[0].size))
            for at in range(0, len(self.members), some):
                piece = self.series[self.members[at : at + some], self.first[0] : self.last[0]]
                yield piece.reshape(-1, self.channels)
        else:
            for member, first, last in zip(self.members, self.first, self.last):
                yield self.series[member][first:last]


class WindowSource(Source):
    """Windows `length` long every `hop` time steps of what a split is made of, standardised where `mean` is given."""

    def __init__(self, part: Part, length: int, hop: int, mean: np.ndarray | None, scale: np.ndarray | None) -> None:
        self.labels = part.names
        self._part, self._length, self._hop, self._mean, self._scale = part, length, hop, mean, scale
        self._counts = np.maximum(0, (part.last - part.first - length) // hop + 1)
        self._ends = np.cumsum(self._counts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = self._part
        i = int(np.searchsorted(self._ends, index, side="right"))
        start = int(part.first[i] + (index - self._ends[i] + self._counts[i]) * self._hop)
        window = part.series[part.members[i]][start : start + self._length]
        if self._mean is not None:
            window = (window.astype(np.float64) - self._mean) / self._scale
        example = {"series": window.astype(np.float32)}
        return example if part.labels is None else {**example, "label": np.asarray(part.labels[i], np.int32)}


@lru_cache(maxsize=8)
def _moments(data: Series, stamp: tuple[Stamp, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each channel over the training split, float64 [C]; 1 for the deviation of a constant channel."""
    part = data.part("train")
    count, mean, squares = 0, np.zeros(part.channels), np.zeros(part.channels)
    low, high = np.full(part.channels, np.inf), np.full(part.channels, -np.inf)
    for piece in part.pieces():
        if not len(piece):
            continue
        values = piece.astype(np.float64)
        low, high = np.minimum(low, values.min(0)), np.maximum(high, values.max(0))
        ours = values.mean(0)
        # two sets of values made one (Chan, Golub, LeVeque 1979)
        squares += ((values - ours) ** 2).sum(0) + (ours - mean) ** 2 * (count * len(values) / (count + len(values)))
        mean = mean + (ours - mean) * (len(values) / (count + len(values)))
        count += len(values)
    scale = np.sqrt(squares / max(1, count))
    constant = low >= high
    # rounding can leave something of a deviation, and of the mean, where there is none
    return np.where(constant & np.isfinite(low), low, mean), np.where(constant | (scale == 0), 1.0, scale)


# .npz files

Stamp = tuple[Path, int, int]  # a file, when it was written and how large it is: what makes a rewritten file a new one


def _is_npz(path: Path) -> bool:
    return path.suffix.lower() == ".npz"


def _stamp(path: Path) -> Stamp:
    with reading(path, "restore it, or remove it"):
        status = path.stat()
    return path, status.st_mtime_ns, status.st_size


@lru_cache(maxsize=4)
def _labels(stamp: Stamp, name: str) -> np.ndarray:
    return read_array(stamp[0], name, "data.labels", "series")


@lru_cache(maxsize=4)
def _series(stamp: Stamp, name: str) -> np.ndarray:
    """One array of an .npz file as [N, T, C], in its own type and read-only; all of it is finite."""
    path = stamp[0]
    series = read_array(path, name, "data.series", "series")
    if series.ndim not in (2, 3) or series.dtype.kind not in "fiub" or (series.ndim == 3 and not series.shape[2]):
        raise UserError(
            f"{path}: array {name!r} is {series.dtype}{list(series.shape)}; expected numbers [N, T] or [N, T, C] "
            "(one recording [T] is stored as [1, T])"
        )
    series = series[..., None] if series.ndim == 2 else series
    some = max(1, 2**20 // max(1, math.prod(series.shape[1:])))
    for at in range(0, len(series) if series.dtype.kind == "f" else 0, some):
        wrong = ~_usable(series[at : at + some])
        if wrong.any():
            row, step, channel = np.argwhere(wrong)[0]
            raise UserError(
                f"{path}: array {name!r} has {series[at + row, step, channel]} in row {at + row} (time step {step}, channel "
                f"{channel}), and float32 cannot hold it as a number; fill the gap, or leave the row out"
            )
    series.setflags(write=False)
    return series


def _usable(values: np.ndarray) -> np.ndarray:
    """Where values are neither NaN nor infinite, as float32."""
    with np.errstate(over="ignore"):
        return np.isfinite(values.astype(np.float32))


# CSV files


def _separator(delimiter: str) -> str:
    found = "\t" if delimiter == "\\t" else delimiter
    if len(found) != 1 or found.isalnum() or found in "\"'+-.#\r\n":
        raise UserError(f"data.delimiter={delimiter!r} separates no numbers; choose ',', ';', ' ' or '\\t' (a tab)")
    return found


@lru_cache(maxsize=4)
def _recordings(stamps: tuple[Stamp, ...], separator: str) -> tuple[np.ndarray, ...]:
    """CSV files as float64 [T, C], with the same channels everywhere."""
    found, said = [], Counter[str]()
    for path, *_ in stamps:
        with reading(path, "restore it, or remove it"):
            values, notes = _recording(path, separator)
        found.append(values)
        said.update(notes)
        if found[-1].shape[1] != found[0].shape[1]:
            raise UserError(
                f"{path} has {found[-1].shape[1]} columns, but {stamps[0][0]} has {found[0].shape[1]}; "
                "give all recordings the same channels"
            )
    for note, count in said.items():
        tell(f"{stamps[0][0]}{f' and {count - 1} more' if count > 1 else ''}: {note}")
    return tuple(found)


def _recording(path: Path, separator: str) -> tuple[np.ndarray, list[str]]:
    """One CSV file as float64 [T, C], read-only and all of it finite; and what of it is no channel."""
    with open(path, "rb") as file:
        check_head(path, file.read(64))
    head = list(islice(_rows(path, separator), _LOOKED_AT))
    notes: list[str] = []
    first = head[0][1] if head else []
    unnamed = len(first) > 1 and not first[0].strip()  # as pandas writes an index
    if first and all(_number(cell) is None for cell in first):
        head = head[1:]
    elif (unnamed and _whole(first[1:])) or _numbered(path, [cells for _, cells in head]):
        said = ", ".join(first[:6])
        notes.append(f"the first line ({said}) is taken for numbers of channels and not for a time step")
        head = head[1:]
    if not head:
        raise UserError(f"{path} holds no row of numbers; remove that file, or fill it")
    between, begin = None if separator == " " else separator, head[0][0]
    how: dict[str, Any] = {"comments": None, "quotechar": '"', "ndmin": 2}
    try:  # as latin-1, since a header may be in anything and numbers are the same in all
        values = np.loadtxt(path, delimiter=between, skiprows=begin - 1, encoding="latin-1", **how)
    except ValueError:
        values = None
    if values is None or not _usable(values).all():  # slower, but it takes more and says where something is wrong
        values = _read_by_line(path, separator, begin)
    if unnamed and values.shape[1] > 1 and (values[:, 0] == np.arange(len(values))).all():
        values = np.ascontiguousarray(values[:, 1:])
        notes.append("1 column is an index and no channel: the first, which has no name and counts 0, 1, 2, ...")
    values.setflags(write=False)
    return values, notes


def _whole(cells: Sequence[str]) -> bool:
    return all(cell.strip().isdigit() for cell in cells)


def _numbered(path: Path, rows: Sequence[list[str]]) -> bool:
    """Whether the first row of a recording is a header of the numbers of channels: ascending integers above other values.

    UserError where it may be either. A lone column is 0 to pandas.
    """
    first, *others = rows or [[]]

    numbers = [int(cell) for cell in first] if first and _whole(first) else []
    if not others or not numbers or any(a >= b for a, b in pairwise(numbers)):
        return False
    if not any(map(_whole, others)) and len(numbers) > 1:  # writers of floats give 0 a point
        return True
    counts = numbers == [*range(numbers[0], numbers[0] + len(numbers))] and numbers[0] in (0, 1)[: len(numbers)]
    time = _whole(others[0][:1]) and int(others[0][0]) == numbers[0] + 1
    if counts and not time and not (_whole(others[0]) and int(others[0][0]) == numbers[-1] + 1):
        raise UserError(
            f"{path}: its first row {', '.join(first[:6])} may be the numbers of channels or a time step; put # before a header, "
            f"or write {numbers[0]}.0 where it is a time step"
        )
    return False


def _read_by_line(path: Path, separator: str, begin: int) -> np.ndarray:
    values, width, first = array("d"), 0, 0
    for line, cells in _rows(path, separator):
        if line < begin:
            continue
        if not width:
            width, first = len(cells), line
        numbers = [_number(cell) for cell in cells]
        for column, (cell, number) in enumerate(zip(cells, numbers), 1):
            where = f"{path}, line {line}, column {column}: {cell.strip()!r}"
            if number is None:
                raise UserError(f"{where} is no number; {_advice(cells, separator)}")
            if not _usable(np.asarray(number)):
                raise UserError(f"{where} is no number that float32 can hold; fill the gap, or cut the recording there")
        if len(cells) != width:
            raise UserError(
                f"{path}, line {line} has {len(cells)} cells, but line {first} has {width}; give every row one cell per channel"
            )
        values.extend(number for number in numbers if number is not None)
    return np.frombuffer(values, np.float64).reshape(-1, width)


def _advice(cells: Sequence[str], separator: str) -> str:
    line = separator.join(cells)
    for other, name in ((";", ";"), ("\t", "\\t"), (" ", " "), (",", ",")):
        parts = line.split(None if other == " " else other)
        if other != separator and len(parts) > 1 and all(_number(part.replace(",", ".")) is not None for part in parts):
            return f"set data.delimiter='{name}'"
    return "write numbers with a decimal point and no gaps, below at most one header line without any number"


def _number(cell: str) -> float | None:
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def _rows(path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Lines of cells with their number from 1: no empty ones, and no comments before the first numbers."""
    begun = False
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.reader(file, delimiter=separator)
        lines = enumerate((line.split() for line in file), 1)
        try:
            for line, cells in lines if separator == " " else ((reader.line_num, cells) for cells in reader):
                if not any(cell.strip() for cell in cells) and len(cells) < 2:
                    continue
                if not begun and cells[0].lstrip().startswith("#"):
                    continue
                begun = begun or any(_number(cell) is not None for cell in cells)
                yield line, cells
        except csv.Error as error:
            raise UserError(f"{path} is no CSV file ({error}); save it as plain text") from None
