"""Sets on disk: ArrayRecord shards of MessagePack records and an `info.json`, read at random and written resumably.

A shard is written under a temporary name and renamed when it is on disk; then a line about it goes into
`progress.jsonl`, whose first line says what the set is made from and how. A killed run started again keeps the shards
that have their line and ends with the same bytes as an undisturbed one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any, ClassVar, TypeVar

import msgspec
import numpy as np

from zoo import files
from zoo.errors import UserError
from zoo.files import first_line, sha256_of_file

INFO, PROGRESS = "info.json", "progress.jsonl"  # of a finished set, of one under way
UNREADABLE = "unreadable.txt"
AGAIN = "run the same `zoo prepare` again, it makes only what is missing"
ANEW = "run `zoo prepare` again into a new folder"
Lost = tuple[str, str]  # name of an example that cannot be used, and why


class Record(msgspec.Struct, array_like=True):
    """One image on disk: the encoded image, its label (-1: none), its name in the source, its caption."""

    image: bytes
    label: int
    name: str
    caption: str = ""  # sets of earlier versions end before it


class Shard(msgspec.Struct):
    """One file of a set, and the examples meant for it that could not be used, with the reason."""

    file: str
    count: int
    bytes: int
    sha256: str
    unreadable: list[Lost]


class Settings(msgspec.Struct):
    """What a set was made from and how; it never mixes two of these."""

    source: str  # name only, for people
    fingerprint: str  # of its files and all their bytes
    size: int | None
    channels: int
    convert: bool
    test_fraction: float
    shard_examples: int


class Info(msgspec.Struct):
    """`info.json` of a set of images."""

    FORMAT: ClassVar[str] = "zoo-images"
    VERSION: ClassVar[int] = 1

    settings: Settings
    labels: list[str]
    splits: dict[str, list[Shard]]
    captions: bool = False  # whether the records have them
    format: str = FORMAT
    version: int = VERSION

    def shards(self) -> list[Shard]:
        """All files of the set."""
        return [shard for shards in self.splits.values() for shard in shards]


K = TypeVar("K")
R = TypeVar("R")


def is_prepared(root: Path) -> bool:
    """Whether a folder holds a set, be it finished or not."""
    return (root / INFO).is_file() or (root / PROGRESS).is_file()


def format_of(root: Path) -> str | None:
    """What a finished set says it is; None for other folders."""
    try:
        head = msgspec.json.decode((root / INFO).read_bytes())
    except (OSError, msgspec.MsgspecError):
        return None
    found = head.get("format") if isinstance(head, dict) else None
    return found if isinstance(found, str) and found.startswith("zoo-") else None


def read_info(root: Path, kind: type[K]) -> K:
    """The description of a finished set of this kind."""
    expected: Any = kind
    if not (root / INFO).is_file() and (root / PROGRESS).is_file():
        raise UserError(f"{root} is not finished; {AGAIN}")
    try:
        head = msgspec.json.decode((root / INFO).read_bytes())
        found = head.get("format") if isinstance(head, dict) else None
        if found in _USES and found != expected.FORMAT:
            raise UserError(f"{root} holds {_WHAT[found]}, not {_WHAT[expected.FORMAT]}; {_USES[found]}")
        if found != expected.FORMAT:
            raise UserError(f"{root / INFO} was not written by `zoo prepare`; {ANEW}")
        if head.get("version") != expected.VERSION:
            raise UserError(
                f"{root} has format version {head.get('version')}, this program reads {expected.VERSION}; {ANEW}"
            )
        return msgspec.convert(head, kind)
    except OSError as error:
        raise UserError(f"{root / INFO} cannot be read ({error.strerror}); {ANEW}") from None
    except msgspec.MsgspecError as error:
        raise UserError(f"{root / INFO} is damaged ({error}); {ANEW}") from None


_WHAT = {"zoo-images": "images", "zoo-latents": "latents", "zoo-tokens": "tokens of texts"}
_USES = {
    "zoo-images": "read it with data=Images(path, size=...), or encode it with `zoo prepare latents`",
    "zoo-latents": "read it with data=Latents(path)",
    "zoo-tokens": "read it with data=Text(path)",
}


def open_shards(root: Path, shards: list[Shard], split: str, record: type[R]) -> tuple[int, Callable[[int], R]]:
    """How many records there are, and a function that reads one; sizes and counts are compared with `shards`."""
    from grain.sources import ArrayRecordDataSource

    shards = [shard for shard in shards if shard.count]
    paths = [root / shard.file for shard in shards]
    for shard, path in zip(shards, paths):
        found = path.stat().st_size if path.is_file() else 0
        if found != shard.bytes:
            raise UserError(f"{path} has {found} bytes in place of {shard.bytes}; {AGAIN}")
    count = sum(shard.count for shard in shards)
    damaged = f"{root} is damaged in its {split} split"
    if not count:

        def nothing(i: int) -> R:
            raise IndexError(i)

        return 0, nothing
    ends = np.cumsum([shard.count for shard in shards])

    @lru_cache(maxsize=max(8, _handles() // 4))
    def opened(k: int) -> Any:
        try:
            records = ArrayRecordDataSource([str(paths[k])])
        except Exception as error:  # what a foreign file raises is up to ArrayRecord
            if "too many open files" in str(error).lower():
                raise UserError(f"{paths[k]} cannot be opened: too many files are; raise `ulimit -n`") from None
            raise UserError(f"{damaged} ({first_line(error)}); {AGAIN}") from None
        if len(records) != shards[k].count:
            raise UserError(f"{damaged} ({len(records)} records in place of {shards[k].count}); {AGAIN}")
        return records

    for k in range(len(shards)):
        opened(k)
    decoder = msgspec.msgpack.Decoder(record)

    def read(i: int) -> R:
        k = int(np.searchsorted(ends, i, "right"))
        try:
            return decoder.decode(opened(k)[i - int(ends[k]) + shards[k].count])
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{damaged} (record {i}: {first_line(error)}); {AGAIN}") from None

    return count, read


def _handles() -> int:
    """How many files this process may have open."""
    try:
        import resource

        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except (ImportError, OSError):
        return 256


# Writing


class Writer:
    """A set under way: the shards that are whole already are kept, the others made; `finish` describes the set."""

    def __init__(self, target: Path, done: dict[str, Shard], log: IO[bytes]) -> None:
        self._target, self._done, self._log = target, done, log
        self._named: list[Lost] = []

    def shard(self, file: str, make: Callable[[], Iterable[bytes | Lost]]) -> tuple[Shard, bool]:
        """The shard of this name, and whether it was there; `make()` gives its records and what has to be left out."""
        there = file in self._done
        if not there:
            self._done[file] = write_shard(self._target / file, make())
            self._log.write(msgspec.json.encode(self._done[file]) + b"\n")
            self._log.flush()
            os.fsync(self._log.fileno())
        self._named += self._done[file].unreadable
        return self._done[file], there

    def shards(
        self, stem: str, count: int, many: int, make: Callable[[range], Iterable[bytes | Lost]], bar: Any
    ) -> list[Shard]:
        """The shards of `count` examples, `many` in each; `make` gives the records of some, and tells the bar of them."""
        found = []
        for number, first in enumerate(range(0, count, many)):
            part = range(first, min(first + many, count))
            shard, there = self.shard(f"{stem}-{number:05d}.array_record", partial(make, part))
            found.append(shard)
            bar.update(len(part) if there else 0)
        return found

    def finish(self, info: Any) -> tuple[Lost, ...]:
        """Writes `info.json`, and the list of what was left out, which is returned."""
        (self._target / UNREADABLE).unlink(missing_ok=True)
        if self._named:
            files.write(self._target / UNREADABLE, "".join(f"{name}\t{reason}\n" for name, reason in self._named))
        files.write(self._target / INFO, msgspec.json.format(msgspec.json.encode(info), indent=1) + b"\n")
        (self._target / PROGRESS).unlink()
        return tuple(self._named)


@contextmanager
def writing(target: Path, settings: Settings, kind: type[Any]) -> Iterator[Writer]:
    """Goes on with the set of this kind in a folder that is held (`entering`). UserError where it was made differently."""
    with mending(target):
        done = _open(target, settings, kind)
        with open(target / PROGRESS, "ab") as log:
            yield Writer(target, done, log)


@contextmanager
def entering(target: Path, kind: type[Any]) -> Iterator[None]:
    """Makes the folder of a set of this kind and holds it before anything is read, so that nobody else writes there.

    A new one into which nothing was written is taken away again.

    Raises:
      UserError: the folder holds something else, is being written by another process, or cannot be.
    """
    check_dest(target, kind)
    with ExitStack() as held:
        with mending(target):
            held.enter_context(files.held(target, f"DEST {target}", "choose a new folder"))
            check_dest(target, kind)  # another process may have been faster
            for path in target.iterdir():  # what killed runs left, the last kinds of earlier versions
                if files.is_part(path.name) or path.name.endswith((".array_record.tmp", "json.tmp", "jsonl.tmp")):
                    path.unlink()
        yield


def mending(target: Path) -> AbstractContextManager[None]:
    """UserError where what is written to a set within cannot be."""
    return files.writing(target, "mend that and run the same command again, what is finished is kept")


def check_dest(target: Path, kind: type[Any]) -> None:
    """UserError where something else lies there."""
    if format_of(target) not in (None, kind.FORMAT):
        raise UserError(f"DEST {target} holds a set of another kind ({format_of(target)}); choose a new folder")
    if target.exists() and not target.is_dir():
        raise UserError(f"DEST {target} is a file; choose a new folder")
    if target.is_dir() and files.names(target) and not is_prepared(target):
        raise UserError(f"DEST {target} is not empty and no prepared set; choose a new folder")


def _open(target: Path, settings: Settings, kind: type[Any]) -> dict[str, Shard]:
    """Checks the folder and its log; the shards in it that are whole, by file name."""
    done: list[Shard] = []
    if (target / INFO).is_file():
        info = read_info(target, kind)
        same(target, msgspec.to_builtins(info.settings), settings)
        done = info.shards()
    else:
        done = noted(target, settings, Shard)
    whole = {shard.file: shard for shard in done if sha256_of_file(target / shard.file) == shard.sha256}
    # started anew: without the torn line, and with the shards of a finished set whose damaged ones are made again
    files.write(target / PROGRESS, b"".join(msgspec.json.encode(x) + b"\n" for x in (settings, *whole.values())))
    return whole


def noted(target: Path, settings: msgspec.Struct, kind: type[K]) -> list[K]:
    """The lines about what is whole of a set that was begun in this way. UserError where it was begun differently."""
    path = target / PROGRESS
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []  # what follows the last line end was torn off
    try:
        if lines:
            same(target, msgspec.json.decode(lines[0], type=dict[str, Any]), settings)
        return [msgspec.json.decode(line, type=kind) for line in lines[1:]]
    except msgspec.MsgspecError as error:
        raise UserError(f"{path} is damaged ({error}); remove DEST {target}") from None


def same(target: Path, there: dict[str, Any], settings: msgspec.Struct) -> None:
    """UserError where a set was made from something else or in another way."""
    here = msgspec.to_builtins(settings)
    if there.get("fingerprint") == here["fingerprint"]:
        there["source"] = here["source"]  # a folder that was renamed is the same folder
    names = [k for k in {**there, **here} if k not in ("fingerprint", "digest")]
    wrong = [f"{k}={there.get(k)!r} there, {here.get(k)!r} now" for k in names if there.get(k) != here.get(k)]
    if there.get("fingerprint") != here["fingerprint"]:
        wrong.append("the source has other files, or others of the same names")
    if there.get("digest") != here.get("digest") and not wrong:
        wrong.append("the tokenizer is another one")
    if wrong:
        raise UserError(f"DEST {target} was prepared differently: {', '.join(wrong)}; choose a new folder or remove it")


def write_shard(path: Path, results: Iterable[bytes | Lost]) -> Shard:
    """One shard of these records, in their order; its bytes depend on nothing else."""
    from array_record.python.array_record_module import ArrayRecordWriter

    count, unreadable = 0, []
    with files.whole(path) as part:  # under a name of this process alone until its digest is known
        # group_size:1 is what random access needs; images are compressed already, latents do not compress
        writer = _disk(ArrayRecordWriter, str(part), "group_size:1,uncompressed")
        try:
            for result in results:
                if isinstance(result, bytes):
                    _disk(writer.write, result)
                    count += 1
                else:
                    unreadable.append(result)
        finally:
            _disk(writer.close)
        size, found = part.stat().st_size, sha256_of_file(part) or ""
    return Shard(path.name, count, size, found, unreadable)


def _disk(call: Callable[..., Any], *args: Any) -> Any:
    """What the shard writer does, its errors (RuntimeError) told apart from those of whoever makes the records."""
    try:
        return call(*args)
    except RuntimeError as error:
        raise OSError(first_line(error)) from None
