"""Files on the local disk, for all who write there: whole or not at all, folders held, digests, words of errors.

What lies in a bucket goes through `zoo/paths.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
from tqdm import tqdm

from zoo.errors import UserError

Data: TypeAlias = bytes | memoryview | str

PART = ".part"  # ends the name of what is not whole yet, which begins with a dot; a killed process leaves it


@contextlib.contextmanager
def whole(path: Path, sync: bool = True) -> Iterator[Path]:
    """A name to write to, of this call alone; at the end that file takes the place of `path`. On any error nothing changes.

    With `sync` it is on the disk before it has its name, and a power cut leaves the old one or the new one. Raises OSError.
    """
    path = path.resolve()  # what a link points to
    part = _part(path)
    part.touch(exist_ok=False)
    try:
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # safetensors makes files for the owner alone
        if sync:
            _sync(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write(path: Path, data: bytes | str, sync: bool = True) -> None:
    """Puts a file in place (`whole`), text as UTF-8, in a folder that is made where it is missing. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path, sync) as part:
        part.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which then takes the place of `folder`, whatever that holds. On any error nothing changes.

    For the moment of the exchange an earlier folder lies beside it as `.NAME.*.old`. Raises OSError.
    """
    folder = folder.resolve()  # "." has no name
    empty = folder.is_dir() and not any(folder.iterdir())
    # the one above it may be closed to us; a shell or a volume stays with the folder that it has
    stays = empty and (folder == Path.cwd() or os.path.ismount(folder) or not os.access(folder.parent, os.W_OK))
    new = _part(folder / "new" if stays else folder)
    try:
        new.mkdir(parents=True)
        yield new
        for file in new.rglob("*"):
            if file.is_file():
                _sync(file)
        if stays:
            for file in new.iterdir():
                os.rename(file, folder / file.name)
        elif empty or not folder.exists():
            os.rename(new, folder)
        else:
            old = new.with_suffix(".old")
            os.rename(folder, old)
            try:
                os.rename(new, folder)
            except BaseException:
                os.rename(old, folder)
                raise
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def is_part(name: str) -> bool:
    """Whether a file or folder of this name is what a killed process left of a write."""
    return name.startswith(".") and name.endswith(PART)


def names(folder: Path) -> list[str]:
    """What lies in a folder, but for such parts. Raises OSError."""
    return sorted(path.name for path in folder.iterdir() if not is_part(path.name))


def _part(path: Path) -> Path:
    # drawn, not counted: processes of several machines or containers share numbers
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def locked(folder: Path, name: str, way: str) -> Iterator[None]:
    """Holds a folder for this process; the system lets go of it however the process ends.

    Where there are no such locks nothing is held. UserError, which calls it `name`, while another process holds it.
    """
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{name} is in use by another process; wait for it, or {way}") from None
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def held(folder: Path, name: str, way: str) -> Iterator[None]:
    """Makes a folder where there is none and holds it (`locked`); one that is made and stays empty is taken away again."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, name, way):
        try:
            yield
        finally:  # while it is held: it may be another process's by then
            with contextlib.suppress(OSError):
                for path in made:
                    path.rmdir()


@contextlib.contextmanager
def writing(what: object, way: str, *errors: type[Exception]) -> Iterator[None]:
    """UserError with the way out where what is written within cannot be; also for these `errors`."""
    kinds: tuple[type[Exception], ...] = (OSError, *errors)
    try:
        yield
    except kinds as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot write {what} ({reason}); {way}") from error


UTF16 = (b"\xff\xfe", b"\xfe\xff")  # what UTF-16 and UTF-32 begin with
_POINTER = b"version https://git-lfs"


def text_of(data: bytes) -> str:
    """What a small file of UTF-8 says, `tidied`. Raises UnicodeDecodeError."""
    return tidied(data.decode("utf-8"))


def tidied(text: str) -> str:
    """A text without a byte order mark, its line ends newlines."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def check_head(path: object, head: bytes) -> None:
    """UserError for a file whose first bytes say that it stands for one that Git LFS has elsewhere, or is UTF-16."""
    if head.startswith(_POINTER):
        raise UserError(f"{path} is a Git LFS pointer and not the file itself; fetch that with `git lfs pull`")
    if head.startswith(UTF16):
        raise UserError(f"{path} is UTF-16; write it again as UTF-8 (iconv -f utf-16 -t utf-8)")


@contextlib.contextmanager
def reading(what: object, way: str) -> Iterator[None]:
    """UserError with the way out where what is read within cannot be, or is no text."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be read ({error.strerror or first_line(error)}); {way}") from error
    except UnicodeDecodeError as error:
        why = "it is UTF-16" if error.object.startswith(UTF16) else f"byte {error.start:,}"
        raise UserError(f"{what} is no UTF-8 text ({why}); {way}") from error


def sha256(*parts: Data) -> str:
    """The digest of bytes one after another; texts count as UTF-8."""
    return sha256_of_parts(parts)


def sha256_of_parts(parts: Iterable[Data]) -> str:
    """`sha256` of what need not be in memory as a whole."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()


def sha256_of_file(path: Path) -> str | None:
    """The digest of a file; None where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def digests(root: Path, paths: Sequence[str]) -> list[tuple[str | None, int]]:
    """`sha256_of_file` and size of each file below a folder; a file that cannot be read has none, and the size -1.

    A file is read once: what it was is known by its path, size, times and inode, and kept in the cache, also when it is interrupted.
    """
    kept = cache() / "digests" / f"{sha256(os.fsencode(root.resolve()))[:32]}.msgpack"
    known: dict[bytes, str] = {}  # stamps and digests
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        known = msgspec.msgpack.decode(kept.read_bytes(), type=dict[bytes, str])
    began = time.time_ns()
    there = [(path, path.encode("utf-8", "surrogateescape"), stamp(f"{root}{os.sep}{path}")) for path in paths]
    unread = [about for about in there if about[2] and not known.get(about[1], "").startswith(f"{about[2]} ")]
    total = sum(_size(now) for _, _, now in unread)
    bar = tqdm(total=total, desc="compared", unit="B", unit_scale=True, delay=2, leave=False)
    try:
        with bar, ThreadPoolExecutor(8) as pool:
            for first in range(0, len(unread), 1024):  # there may be millions
                part = unread[first : first + 1024]
                for (_, name, now), digest in zip(part, pool.map(lambda about: sha256_of_file(root / about[0]), part)):
                    known[name] = f"{now} {digest or ''}"
                    bar.update(_size(now))
    finally:
        lasting = {name: about for name, about in known.items() if settled(began, [about])} if unread else {}
        if lasting:
            with contextlib.suppress(OSError):
                write(kept, msgspec.msgpack.encode(lasting), sync=False)
    found = [known[name].rpartition(" ")[2] if now else "" for _, name, now in there]
    return [(digest or None, _size(now)) for digest, (_, _, now) in zip(found, there)]


def stamp(path: str) -> str:
    """What changes with the bytes of a file: its size, times and inode; "" where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def _size(stamped: str) -> int:
    return int(stamped.partition(" ")[0] or -1)


def settled(now: int, stamps: Iterable[str]) -> bool:
    """Whether these stamps are old enough to tell: what changes twice within one tick of its clock has the same."""
    return all(max(map(int, found.split(" ")[1:3])) < now - 2 * 10**9 for found in stamps if found)


def cache() -> Path:
    """Where is kept what can be made again: `$ZOO_CACHE` or ~/.cache/zoo; for a user without a home in the folder of scratch files."""
    home = os.path.expanduser("~")
    kept = os.path.join(tempfile.gettempdir(), f"zoo-{os.getuid()}") if home == "~" else f"{home}/.cache/zoo"
    return Path(os.environ.get("ZOO_CACHE") or kept)


def sha256_of_json(value: Any) -> str:
    """The digest of what JSON can hold, whatever the order of its keys."""
    return sha256(json.dumps(value, sort_keys=True))


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Fields in which two settings, as JSON holds them, differ: `optim.lr: 0.001 -> 0.0003`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{where}.{k}" if where else k)]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new)) for d in differences(a, b, f"{where}.{i}")]
    return [] if old == new else [f"{where}: {json.dumps(old)} -> {json.dumps(new)}"]


def first_line(error: BaseException) -> str:
    """The first line of what an error of another library says, cut in the middle where it is long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = re.split(r" \[\w+='", lines[0])[0] if lines else type(error).__name__  # TensorStore appends its settings
    return line if len(line) <= 250 else f"{line[:120]} ... {line[-120:]}"
