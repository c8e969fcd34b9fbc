"""The clock: which examples make up batch k, read in threads and put where the step wants them.

Batch k is the examples at positions [k*B, (k+1)*B) of an endless row of shuffled epochs; the order of an epoch depends
on (seed, epoch) alone, the augmentation of an example on (seed, position) alone. So the position in the data is the
step: nothing about an iterator has to be saved, and the same global batches appear on any number of hosts.

A source whose examples differ in shape says which of them may share a batch (`groups`). Then every epoch cuts each
group, permuted, into whole batches and shuffles these; what is left over of a group waits for another epoch.

Grain reads: its unit here is a chunk of rows, because its bookkeeping for one element costs as much as decoding a small
JPEG. For the same reason the order comes from one permutation per epoch and not from `MapDataset.shuffle`, which spends
35 to 80 microseconds of the interpreter's time on every example; the price is 8 bytes of memory per example.
"""

from __future__ import annotations

import copy
import logging
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any, ClassVar, cast

import grain
import jax
import numpy as np

from zoo.data.folders import some, tell
from zoo.errors import UserError
from zoo.fields import check_fields

_log = logging.getLogger("zoo")

Example = dict[str, np.ndarray]
Spec = Mapping[str, jax.ShapeDtypeStruct]


class Source(ABC):
    """Base of sources: random access to the examples of one split; `__getitem__` is called from several threads at once."""

    labels: tuple[str, ...] = ()  # class names, () if there are none
    augment: Any = None  # (example, rng) -> example, applied to training batches only; None: they stay as they are
    groups: Any = ()  # arrays of indices: every batch is drawn from one of them, since shapes differ between them
    aspects: tuple[str, ...] = ()  # names of the groups, where they have some
    vocabulary: Any = None  # of texts
    characters_per_token: Any = None  # of texts: how many a token stands for on average

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Example:
        """One example: `image` float32 [S, S, C] in [-1, 1], `label` int32 [], ..."""
        ...


class Around(Source):
    """Base of sources around another one, which says what they do not say themselves."""

    def __init__(self, source: Source) -> None:
        self._source, self.labels, self.augment = source, source.labels, source.augment
        self.groups, self.aspects = source.groups, source.aspects
        self.vocabulary, self.characters_per_token = source.vocabulary, source.characters_per_token

    def __len__(self) -> int:
        return len(self._source)


class Data(ABC):
    """Base of data descriptions: frozen dataclasses of plain values that know how to open their source."""

    made_up: ClassVar[bool] = False  # True: nothing can be learned from it, so that a run needs no real weights either

    def __post_init__(self) -> None:
        check_fields(self, "data.")

    @property
    def place(self) -> str:
        """Where it lies, the field `path`; "" for what comes with zoo or is made."""
        return str(getattr(self, "path", ""))

    @property
    def mirrored(self) -> bool:
        """Whether a random half of the training images is mirrored, the field `flip`."""
        return bool(getattr(self, "flip", False))

    def made_with(self) -> dict[str, str]:
        """What encoders made it, by kind; {} where none did."""
        return {}

    def fingerprint(self, split: str) -> str | None:
        """What the examples of a split are, wherever they lie; None where that cannot be told."""
        return None

    def vocabulary(self) -> Any:
        """What the tokens of its texts mean; None where it has none."""
        return None

    @abstractmethod
    def source(self, split: str, spec: Spec | None = None) -> Source:
        """The examples of "train" or "test"; `spec` is the task's batch, for sources that make examples to fit."""
        ...


def batches(
    data: Data,
    batch: int,
    start: int = 0,
    seed: int = 0,
    *,
    spec: Spec | None = None,
    split: str = "train",
    sharding: jax.sharding.NamedSharding | None = None,
    threads: int = 8,
) -> Generator[dict[str, Any], None, None]:
    """Global batches `start`, `start + 1`, ... without end: dicts of arrays that lead with `batch`.

    With `spec` (the task's) only its keys are kept, and the first example is compared with it before anything is
    returned. With `sharding` (of the batch axis alone, say `P(("data", "fsdp"))`) this host reads the rows that its own
    devices hold and yields global jax arrays, two of them ahead; without, numpy arrays of all rows.

    Raises:
      UserError: the data does not fit the task or the devices, or an example cannot be read.
    """
    _check_batch(batch)
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} is out of range; choose 0 <= seed < 2**32")
    source = data.source(split, spec)
    keys = _keys(data, source, spec)
    augment = source.augment if split == "train" else None
    at = _grouped(data, source.groups, batch, seed) if source.groups else _ungrouped(len(source), seed)

    def fetch(position: int) -> Example:
        example = source[at(position)]
        # the third number keeps these streams apart from the epochs' permutations
        return augment(example, np.random.default_rng((seed, position, 1))) if augment else example

    rows = _local_rows(sharding, batch) if sharding is not None else np.arange(batch)
    host = _read(_Chunks(fetch, keys, batch, rows, start, sys.maxsize // batch - start), threads)
    return host if sharding is None else _to_devices(host, sharding, batch, rows)


def _check_batch(batch: int) -> None:
    if batch < 1:
        raise UserError(f"batch={batch} holds no example; choose batch=1 or more")


def _ungrouped(size: int, seed: int) -> Callable[[int], int]:
    """The example at each position of the endless row."""

    @lru_cache(maxsize=4)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(size)

    def at(position: int) -> int:
        epoch, offset = divmod(position, size)
        return int(order(epoch)[offset])

    return at


def _grouped(data: Data, groups: tuple[np.ndarray, ...], batch: int, seed: int) -> Callable[[int], int]:
    """The same where a batch comes from one group: a row of whole batches, in an order of their own."""
    count = sum(len(group) // batch for group in groups)
    if not count:
        raise UserError(
            f"batch={batch} is more than any group of equal shapes in data={type(data).__name__} holds "
            f"({', '.join(str(len(group)) for group in groups)} examples); choose batch={max(map(len, groups))} or fewer"
        )
    if small := [len(group) for group in groups if len(group) < batch]:
        lost = f"{', '.join(map(str, small))}; {sum(small)} of {sum(map(len, groups))} examples"
        what = f"{len(small)} of {len(groups)} groups of equal shapes have fewer examples and are left out ({lost})"
        _log.warning("batch=%d: %s", batch, what)

    @lru_cache(maxsize=4)
    def order(epoch: int) -> np.ndarray:
        parts = []
        for number, group in enumerate(groups):
            # four numbers, the last not 0: zeros at the end would make it the stream of (seed, epoch)
            mixed = np.random.default_rng((seed, epoch, number, 2)).permutation(group)
            parts.append(mixed[: len(group) // batch * batch].reshape(-1, batch))
        return np.random.default_rng((seed, epoch)).permutation(np.concatenate(parts))

    def at(position: int) -> int:
        k, row = divmod(position, batch)
        epoch, number = divmod(k, count)
        return int(order(epoch)[number, row])

    return at


def epoch(
    data: Data,
    batch: int,
    *,
    split: str = "test",
    spec: Spec | None = None,
    limit: int | None = None,
    seed: int | None = None,
) -> Generator[tuple[Example, int], None, None]:
    """One pass, not augmented: (numpy batch of `batch` rows, how many of them are real).

    In order; with a `seed` in the random order of that seed, so that `limit` is a fair choice of a split that lies in the
    order of its classes.

    The last batch is filled up with copies of its last example, so that every batch has the one compiled shape. Of a
    source with groups of different shapes only the first group is gone through.
    """
    _check_batch(batch)
    source = data.source(split, spec)
    keys = _keys(data, source, spec)
    part: Sequence[int] | np.ndarray = source.groups[0] if source.groups else range(len(source))
    if seed is not None:
        part = np.random.default_rng(seed).permutation(part)
    size = len(part) if limit is None else min(limit, len(part))
    chunks = _Chunks(lambda i: source[int(part[min(i, size - 1)])], keys, batch, np.arange(batch), 0, -(-size // batch))
    host = _read(chunks)
    return ((b, min(batch, size - k * batch)) for k, b in enumerate(host))


def named(data: Data, names: tuple[str, ...]) -> Data:
    """The same data, label k of which is the class `names[k]`, whatever its number there.

    Its sources raise UserError for a class that is not among the names, and warn of names without examples, where labels are
    asked for. Data without labels, or whose classes have no names, stay as they are.
    """

    def source(split: str, spec: Spec | None = None) -> Source:
        found = data.source(split, spec)
        if not found.labels or found.labels == names or (spec is not None and "label" not in spec):
            return found
        where = data.place or type(data).__name__
        if unknown := [name for name in found.labels if name not in names]:
            raise UserError(
                f"{where} has classes that the model does not know ({some(unknown)}); it knows {some(names)}: give data of these, or "
                "name them so"
            )
        if missing := [name for name in names if name not in found.labels]:
            tell(f"{where} has no example of the class {some(missing)}, which the model knows")
        return _Named(found, names)

    twin = copy.copy(data)
    object.__setattr__(twin, "source", source)
    return twin


class _Named(Around):
    def __init__(self, source: Source, names: tuple[str, ...]) -> None:
        super().__init__(source)
        self.labels, self._numbers = names, np.array([names.index(name) for name in source.labels], np.int32)

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        return {**example, "label": self._numbers[example["label"]]} if "label" in example else example


def _keys(data: Data, source: Source, spec: Spec | None) -> tuple[str, ...]:
    """The keys to keep; every difference between `spec` and the first example is reported at once.

    Where groups differ in the shape of something, only its number of axes and the last of them are compared.
    """
    firsts = [source[int(group[0])] for group in source.groups or ([0],)]
    example = firsts[0]
    if spec is None:
        return tuple(example)
    wrong = []
    for key, want in spec.items():
        shape, dtype = tuple(want.shape[1:]), np.dtype(want.dtype)
        if key not in example:
            advice = "; use labelled data or an unconditional task (task.classes=0)" if key == "label" else ""
            wrong.append(f"the task wants {key!r}, the data gives {', '.join(map(repr, example))}{advice}")
            continue
        got = example[key]
        differs = any(first[key].shape != got.shape for first in firsts)
        fits = (got.ndim, got.shape[-1:]) == (len(shape), shape[-1:]) if differs else got.shape == shape
        if not fits or got.dtype != dtype:
            wrong.append(
                f"{key!r}: the data gives {got.dtype}{list(got.shape)}, the task wants {dtype}{list(shape)}; "
                + _advice(data, key, got.shape, shape)
            )
    if wrong:
        raise UserError(f"data={type(data).__name__} does not fit the task: " + ". Also ".join(wrong))
    return tuple(spec)


def _advice(data: Data, key: str, got: tuple[int, ...], want: tuple[int, ...]) -> str:
    if key == "series" and len(got) == len(want) == 2 and got != want:
        ways = [f"task.channels={got[1]}"] if got[1] != want[1] else []
        other = f" (or data.length={want[0]})" if hasattr(data, "length") else ""
        ways += [f"task.length={got[0]}{other}"] if got[0] != want[0] else []
        return "set " + ", and ".join(ways)
    if key in ("frames", "points", "seen", "camera") and len(got) == len(want) and got != want:
        named = (("frames", "frames"), ("image", "size"))[: 1 if key == "camera" else 2]
        ways = [
            f"task.{ours}={a}" + (f" or data.{theirs}={b}" if hasattr(data, theirs) else "")
            for (ours, theirs), a, b in zip(named, got, want)
            if a != b
        ]
        return "set " + ", and ".join(ways)
    if len(got) != 3 or len(want) != 3 or got == want:
        return "change the field of the task or of the data that sets it"
    ways = []
    if got[2] != want[2]:
        has = getattr(data, "channels", want[2])
        other = (
            f"data.channels={want[2]}" if has != want[2] else "data.convert=True" if hasattr(data, "convert") else ""
        )
        ways.append(f"set task.channels={got[2]}" + (f" or {other}" if other else ""))
    if got[:2] != want[:2] and key != "image":
        other = " or another data.aspect" if hasattr(data, "aspect") else ""
        ways.append(f"set task.{key.partition('_')[0]}={got[0]},{got[1]}{other}")
    elif got[:2] != want[:2]:
        ours = [f"task.image={got[0]}"] if got[0] == got[1] else []
        theirs = [f"data.size={want[0]}"] if hasattr(data, "size") else []
        ways.append(f"set {' or '.join(ours + theirs)}" if ours or theirs else "give square images")
    return ", and ".join(ways)


@dataclass(frozen=True)
class _Chunks:
    """What Grain reads of `count` batches from `start` on: element j is `chunk` consecutive rows of this host, stacked."""

    fetch: Callable[[int], Example]
    keys: tuple[str, ...]
    batch: int
    rows: np.ndarray  # of a batch, those of this host
    start: int
    count: int

    @cached_property
    def chunk(self) -> int:
        return max(c for c in range(1, min(32, len(self.rows)) + 1) if len(self.rows) % c == 0)

    @property
    def parts(self) -> int:
        return len(self.rows) // self.chunk

    def __len__(self) -> int:
        return self.count * self.parts

    def __getitem__(self, index: int) -> Example:
        k, part = divmod(int(index), self.parts)
        rows = self.rows[part * self.chunk : (part + 1) * self.chunk]
        examples = [self.fetch((self.start + k) * self.batch + int(row)) for row in rows]
        try:
            return {key: np.stack([e[key] for e in examples]) for key in self.keys}
        except ValueError:
            shapes = sorted({str(list(e[key].shape)) for e in examples for key in self.keys if e[key].ndim})
            raise UserError(
                f"the examples differ in shape ({', '.join(shapes)}) and make no batch; give the data a size"
            ) from None


def _read(chunks: _Chunks, threads: int = 8) -> Generator[Example, None, None]:
    """Numpy batches of this host's rows, decoded in threads, two batches ahead."""
    if not len(chunks):
        return
    keys, ahead = chunks.keys, 2 * chunks.parts
    options = grain.ReadOptions(num_threads=min(threads, ahead), prefetch_buffer_size=ahead)
    reader = iter(grain.MapDataset.source(cast(Any, chunks)).to_iter_dataset(options))
    with closing(reader):
        while parts := list(islice(reader, chunks.parts)):
            yield {key: np.concatenate([p[key] for p in parts]) if len(parts) > 1 else parts[0][key] for key in keys}


def _local_rows(sharding: jax.sharding.NamedSharding, batch: int) -> np.ndarray:
    """The rows of a global batch that this host's devices hold, ascending.

    Read off the sharding: hosts may hold the same rows (a tensor axis across hosts), or rows that are not one block (a
    torus of chips flattened to a batch axis); counting processes gets both wrong, and JAX does not notice.
    """
    try:
        spans = sharding.addressable_devices_indices_map((batch,)).values()
    except ValueError:
        names = sharding.spec[0] if len(sharding.spec) else None
        axes = names if isinstance(names, tuple) else (names,)
        ways = int(np.prod([sharding.mesh.shape[a] for a in axes if a]))
        raise UserError(
            f"batch={batch} cannot be shared out among {ways} devices (mesh axes {', '.join(map(str, axes))}); "
            f"choose a multiple, e.g. batch={-(-batch // ways) * ways}"
        ) from None
    held = [np.arange(batch)[span] for spans_of in spans if spans_of is not None for span in spans_of]
    return np.unique(np.concatenate(held))


def _to_devices(
    host: Generator[Example, None, None], sharding: jax.sharding.NamedSharding, batch: int, rows: np.ndarray
) -> Generator[dict[str, jax.Array], None, None]:
    """Global arrays from this host's rows; two batches are under way while the step runs."""

    def place(local: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            first, last, _ = (index or (slice(None),))[0].indices(batch)
            at = int(np.searchsorted(rows, first))
            return local[at : at + last - first]

        # not make_array_from_process_local_data: that one gives up where the rows of a host are not one block
        return jax.make_array_from_callback((batch, *local.shape[1:]), sharding, shard)

    ahead: deque[dict[str, jax.Array]] = deque()
    with closing(host):
        for local in host:
            ahead.append({key: place(value) for key, value in local.items()})
            if len(ahead) > 2:
                yield ahead.popleft()
        yield from ahead
