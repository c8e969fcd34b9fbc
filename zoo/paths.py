"""Where run folders lie: here, or in a Google Cloud Storage bucket (`gs://BUCKET/PATH`), behind one kind of path.

A folder here is a `pathlib.Path`; one in a bucket is an `epath.Path`, which has the same methods. A bucket has no append,
no locks and no renaming of folders; objects appear whole or not at all. What grows while a run trains is therefore kept in
a scratch folder here, of which a `Mirror` sends copies.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from etils import epath

from zoo import files
from zoo.errors import Retryable, UserError
from zoo.files import first_line, is_part

Folder: TypeAlias = Path | epath.Path

_PRETRAINED = Path(__file__).parent / "pretrained"
_log = logging.getLogger("zoo")
_ANSWER = 60  # seconds that a bucket may take to say whether it can be used
_REQUEST = 15  # seconds for one request of that question
_EVERY = 30.0  # seconds between two uploads of what only grows
_LAST = 120.0  # seconds that the last upload of a run may take

_LOGIN = (
    "log in with `gcloud auth application-default login`, name a key file in GOOGLE_APPLICATION_CREDENTIALS, or give the "
    "VM a service account that may use the bucket"
)
writing = functools.partial(
    files.writing, way="free some space, mend its permissions or choose another folder with workdir=PATH"
)
_ROLES = "it needs the roles Storage Object User and Storage Legacy Bucket Reader on the bucket"


def shipped() -> dict[str, Path]:
    """Weights that come with the package, by name."""
    here = sorted(_PRETRAINED.iterdir()) if _PRETRAINED.is_dir() else []
    return {p.name: p for p in here if (p / "config.json").is_file()}


def parse_path(name: str | os.PathLike[str]) -> Folder:
    """The path that a name means; UserError for a scheme other than gs://, and for a bucket without a folder."""
    text = os.fspath(name)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if scheme is None:
        return Path(name)
    if scheme[1] != "gs":
        raise UserError(f"{text}: {scheme[1]}:// is no place for a run; give a local folder or gs://BUCKET/FOLDER")
    if not re.fullmatch(r"gs://[^/]+/+[^/].*", text):
        raise UserError(
            f"{text} names no folder in a bucket; write gs://BUCKET/FOLDER, such as gs://my-bucket/runs/one"
        )
    return epath.Path(text)


def in_bucket(path: Folder) -> bool:
    """Whether a path of `parse_path` lies in a bucket."""
    return not isinstance(path, Path)


def require_bucket(name: str | os.PathLike[str], field: str = "") -> Folder:
    """`parse_path(name)`, and its bucket has answered that it can be used: nothing fails later that can be known now.

    `field` stands before the name in the sentence, such as `workdir=`.

    Raises:
        UserError: packages or credentials are missing, there is no such bucket, it may not be used, or nothing answers
            within a minute.
    """
    try:
        path = parse_path(name)
    except UserError as error:
        raise UserError(f"{field}{error}") from None
    if in_bucket(path):
        try:
            _ask(path.parts[2])
        except UserError as error:
            raise UserError(f"{field}{name}: {error}") from error.__cause__
    return path


@functools.cache
def _ask(bucket: str) -> None:
    """UserError unless the bucket can be used. Once per bucket and process."""
    for package in ("gcsfs", "google.cloud.storage"):
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise UserError(
                f"gs:// folders need the package {package}; install it with the `gcs` extra: pip install -e '.[gcs]'"
            )
    _settle()
    outcome: list[BaseException | None] = []

    def ask() -> None:
        try:
            _get_bucket(bucket)
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    # in a thread: a machine without a way out may swallow packets, and then each library waits in a way of its own
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_ANSWER)
    if not outcome:
        raise UserError(
            f"the bucket has not answered for {_ANSWER} seconds; look at this machine's network, then try again"
        )
    if outcome[0] is not None:
        raise UserError(_refusal(bucket, outcome[0])) from outcome[0]


def _get_bucket(bucket: str) -> Any:
    """Ask for the bucket as Orbax asks, so that it finds the same credentials and permissions; but without retries."""
    from google.cloud import storage

    return storage.Client().get_bucket(bucket, timeout=_REQUEST, retry=None)


def _settle() -> None:
    """How the libraries shall behave that reach a bucket for us; the user's own settings win."""
    import fsspec

    os.environ.setdefault("EPATH_USE_TF", "false")  # one way to a bucket, whether TensorFlow is there or not
    emulated = bool(os.environ.get("STORAGE_EMULATOR_HOST"))
    settings = {
        # gcsfs would go on as nobody when there are no credentials, after a long search
        "token": "anon" if emulated else "google_default",
        "use_listings_cache": False,  # TensorStore writes beside it
    }
    for name in ("gs", "gcs"):
        fsspec.config.conf[name] = {**settings, **fsspec.config.conf.get(name, {})}
    if emulated:
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks with credentials that nobody has
    for library in ("gcsfs", "google", "urllib3"):  # of a failure we make one sentence
        logging.getLogger(library).setLevel(logging.CRITICAL)


def _refusal(bucket: str, error: BaseException) -> str:
    """What to do about a bucket that cannot be used."""
    kinds = [kind.__name__ for kind in type(error).__mro__]  # names: their packages may not be there
    code, words = getattr(error, "code", None), first_line(error)
    # InvalidOperation: nobody is asked for a login, which nobody cannot give
    if code == 401 or not {"DefaultCredentialsError", "RefreshError", "InvalidOperation"}.isdisjoint(kinds):
        return f"no valid Google Cloud credentials here ({words.partition('. ')[0]}); {_LOGIN}"
    if code == 403:
        return f"these credentials may not use the bucket {bucket} ({words}); {_ROLES}. To use others, {_LOGIN}"
    if code in (400, 404) or isinstance(error, ValueError):
        return (
            f"there is no bucket {bucket} ({words}); mend its name, or make it with "
            f"`gcloud storage buckets create gs://{bucket}`"
        )
    if "Project was not passed" in words:
        return "the credentials name no project; set GOOGLE_CLOUD_PROJECT=PROJECT in the environment"
    return (
        f"Google Cloud Storage cannot be reached ({kinds[0]}: {words}); look at this machine's network, then try again"
    )


@contextlib.contextmanager
def sentence(path: Folder, doing: str = "read") -> Iterator[None]:
    """Turns what a bucket's libraries raise into a sentence; errors of a local disk and of missing files to read pass."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not in_bucket(path) or (doing == "read" and isinstance(error, FileNotFoundError)):
            raise
        words = first_line(error)
        hint = _ROLES if "Forbidden" in words else "look at the network, then start the same command again"
        kind = UserError if hint == _ROLES else Retryable
        raise kind(f"cannot {doing} {path} ({type(error).__name__}: {words}); {hint}") from error


def write(path: Folder, data: bytes | str, sync: bool = True) -> None:
    """`files.write`, also into a bucket, where objects appear whole. Raises OSError here, UserError for a bucket."""
    if isinstance(path, Path):
        files.write(path, data, sync)
        return
    with sentence(path, "write"):
        path.write_bytes(data.encode() if isinstance(data, str) else data)


def save(path: Folder | str, data: bytes | str, sync: bool = False) -> None:
    """`write`, with a sentence where the disk refuses; without `sync` what is easily made again may not outlive a power cut."""
    file = parse_path(path)
    with writing(file):
        write(file, data, sync)


def names(folder: Folder) -> list[str]:
    """What lies in a folder, sorted, but for what killed processes left of their writes; nothing where there is none."""
    try:
        with sentence(folder):
            # a bucket may hold an empty object for the folder itself
            return sorted(p.name for p in folder.iterdir() if p != folder and not is_part(p.name))
    except FileNotFoundError:
        return []


def move(source: Folder, target: Folder, last: str) -> None:
    """Rename a folder. In a bucket it is copied; then the file `last` is removed, without which it is not whole, and
    then the rest: at any moment one of the two is whole."""
    if not in_bucket(source):
        source.rename(target)
        return
    import fsspec

    with sentence(source, "move"):
        bucket, root = fsspec.core.url_to_fs(str(source))
        new = fsspec.core.url_to_fs(str(target))[1]
        found = bucket.find(root)
        for file in found:
            bucket.cp_file(file, new + file[len(root) :])
        for file in sorted(found, key=lambda name: name != f"{root}/{last}"):
            bucket.rm_file(file)


@contextlib.contextmanager
def local_copy(folder: Folder, wanted: Sequence[str]) -> Iterator[Path]:
    """The folder itself, or for one in a bucket a folder with copies of those of the wanted files that it has."""
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="zoo-") as near:
        for name in wanted:
            _fetch(folder / name, Path(near) / name)
        yield Path(near)


def _fetch(source: Folder, target: Path) -> None:
    """Copy a file, where there is one."""
    with contextlib.suppress(FileNotFoundError), sentence(source):
        target.write_bytes(source.read_bytes())


class Mirror:
    """A scratch folder `here`, copies of whose changed files are sent to a folder in a bucket by a thread of its own.

    It begins with copies of those of the files `first` that the bucket has; UserError when these cannot be read. A
    failed upload costs nothing: it is told once, tried again with the next one, and what could not be sent by the end
    stays here.
    """

    def __init__(self, folder: Folder, first: Sequence[str] = ()) -> None:
        self.folder = folder
        self.here = Path(tempfile.mkdtemp(prefix="zoo-"))
        try:
            for name in first:
                _fetch(folder / name, self.here / name)
        except BaseException:
            shutil.rmtree(self.here, ignore_errors=True)
            raise
        self._sent: dict[Path, tuple[int, int]] = {}
        self._failure: str | None = None
        self._told = False
        self._wanted, self._closing = threading.Event(), threading.Event()
        self._passes = threading.Condition()
        self._begun = self._done = 0  # uploads of everything that changed
        self._due = time.monotonic() + _EVERY
        self._thread = threading.Thread(target=self._work, daemon=True, name="zoo-mirror")
        self._thread.start()

    def soon(self) -> None:
        """Something has grown: it is sent when the last upload is half a minute old."""
        if time.monotonic() >= self._due:
            self._wanted.set()

    def push(self, wait: float = 0.0) -> None:
        """Send what has changed now; return when it is there, or after `wait` seconds."""
        with self._passes:
            target = self._begun + 1
            self._wanted.set()
            self._passes.wait_for(lambda: self._done >= target, wait)

    def close(self) -> str | None:
        """Send the rest and remove the scratch folder; where that fails it stays, and the sentence says so."""
        self._closing.set()
        self._wanted.set()
        self._thread.join(_LAST)
        if self._thread.is_alive():
            self._failure = f"the last upload has taken more than {_LAST:.0f} seconds"
        if self._failure is None:
            shutil.rmtree(self.here, ignore_errors=True)
            return None
        return (
            f"not all files of the run could be sent to {self.folder} ({self._failure}); nothing is lost: they are in "
            f"{self.here}, copy them with `gcloud storage cp -r '{self.here}/*' {self.folder}/`"
        )

    def _work(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            last = self._closing.is_set()
            with self._passes:
                self._begun += 1
            self._failure = self._send()
            self._due = time.monotonic() + _EVERY
            if self._failure and not self._told and not last:
                self._told = True
                _log.warning(
                    "files of the run could not be sent to %s (%s); training goes on, they are kept in %s and tried again",
                    self.folder,
                    self._failure,
                    self.here,
                )
            with self._passes:
                self._done = self._begun
                self._passes.notify_all()
            if last:
                return

    def _send(self) -> str | None:
        """Send what has changed, small files first; the reason where something could not be sent."""
        try:
            states: list[tuple[int, int, Path]] = []
            for file in self.here.rglob("*"):
                with contextlib.suppress(FileNotFoundError):  # a part that has just been given its name
                    if file.is_file() and not file.name.startswith("."):
                        about = file.stat()
                        states.append((about.st_size, about.st_mtime_ns, file))
            for size, changed, file in sorted(states):
                if self._sent.get(file) != (size, changed):
                    (self.folder / file.relative_to(self.here).as_posix()).write_bytes(file.read_bytes())
                    self._sent[file] = (size, changed)
        except Exception as error:
            return f"{type(error).__name__}: {first_line(error)}"
        return None


def scratch(folder: Folder, first: Sequence[str] = ()) -> tuple[Path, Mirror | None]:
    """Where to write what belongs to `folder`: there, or in the scratch folder of a mirror."""
    if isinstance(folder, Path):
        return folder, None
    mirror = Mirror(folder, first)
    return mirror.here, mirror
