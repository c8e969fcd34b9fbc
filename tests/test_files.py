"""The laws of `zoo/files.py`: whole or not at all, one writer a folder, digests of what is there."""

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from zoo import files
from zoo.data.images.latents import encode_set
from zoo.data.prepare import prepare
from zoo.data.text.prepare import prepare_text
from zoo.errors import UserError
from zoo.papers.typescore.evaluate import claim


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@contextmanager
def one_file(path: Path) -> Iterator[Path]:
    with files.whole(path / "a") as part:
        yield part


@contextmanager
def a_folder(path: Path) -> Iterator[Path]:
    with files.filled(path) as new:
        yield new / "a"


WRITERS = (one_file, a_folder)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("fault", ["body", "interrupt", "os.fsync", "os.replace", "os.rename"])
def test_a_failed_write_changes_nothing_and_leaves_no_scrap(
    writer: Callable[[Path], Any], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    files.write(out / "a", "old")
    rename = os.rename

    def full(*args: Any) -> None:
        if fault == "os.rename" and not str(args[0]).endswith(files.PART):
            return rename(*args)  # the old folder may be moved, and comes back
        raise OSError(28, "No space left on device")

    if fault.startswith("os."):
        monkeypatch.setattr(fault, full)
    kept = {one_file: "os.rename", a_folder: "os.replace"}[writer] == fault  # what this writer has no need of
    error = KeyboardInterrupt if fault == "interrupt" else OSError
    try:
        with writer(out) as path:
            path.write_text("new")
            if not fault.startswith("os."):
                raise error
    except error:
        assert not kept
    assert tree(tmp_path) == {"out/a": b"new" if kept else b"old"}


KILLED = """
import os, signal, sys
from pathlib import Path
from zoo import files
out, folder = Path(sys.argv[1]), sys.argv[2] == "a_folder"
with files.filled(out) if folder else files.whole(out / "a") as path:
    (path / "a" if folder else path).write_text("half of the n")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("writer", WRITERS)
def test_a_killed_writer_leaves_the_old_whole_and_is_in_nobodys_way(writer: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    files.write(out / "a", "old")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out), writer.__name__], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert (files.names(tmp_path), files.names(out), (out / "a").read_text()) == (["out"], ["a"], "old")
    with writer(out) as path:
        path.write_text("new")
    assert (out / "a").read_text() == "new"


def test_writers_of_one_name_at_once_leave_one_of_them_whole(tmp_path: Path) -> None:
    said = [str(i) * 100_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: files.write(tmp_path / "deep" / "a", text, sync=False), said * 8))
    assert os.listdir(tmp_path / "deep") == ["a"]
    assert (tmp_path / "deep" / "a").read_text() in said


def test_a_new_file_is_as_readable_as_any(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with files.whole(tmp_path / "a") as part:
        part.unlink()
        part.touch(0o600)  # as safetensors does
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_an_empty_folder_is_filled_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with files.filled(Path()) as new:
        (new / "a").write_text("1")
        (new / "deep").mkdir()
    assert sorted(os.listdir()) == sorted(os.listdir(here)) == ["a", "deep"]  # the shell's folder is still this one


HOLDER = """
import sys
from pathlib import Path
from zoo import files
with files.locked(Path(sys.argv[1]), "x", "y"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_has_one_holder_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    texts, photos, out = tmp_path / "a.txt", tmp_path / "photos", tmp_path / "out"
    texts.write_text("to be or not to be " * 50)
    photos.mkdir()
    for i in range(12):
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(photos / f"{i}.png")
    out.mkdir()
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], **pipes)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for write in (
            lambda: prepare(str(photos), str(out), progress=False),
            lambda: prepare_text(str(texts), str(out), "text8", progress=False),
            lambda: encode_set(str(photos), str(out), None, size=8, progress=False),
            claim(out, {"seed": 1}, "results").__enter__,
        ):
            with pytest.raises(UserError, match=f"{out} is in use by another process; wait for it, or "):
                write()
            assert os.listdir(out) == []
    finally:
        holder.kill()
        holder.communicate()
    assert prepare(str(photos), str(out), progress=False).ok


def test_a_folder_is_free_again_after_its_holder(tmp_path: Path) -> None:
    for _ in range(2):
        with (
            files.locked(tmp_path, "one", "go"),
            pytest.raises(UserError, match="two is in use"),
            files.locked(tmp_path, "two", "go"),
        ):
            raise AssertionError("held twice")
    with files.locked(tmp_path / "nowhere", "none", "go"):
        pass


def test_digests_are_those_of_what_is_written(tmp_path: Path) -> None:
    text = "grün\n" * 1000
    files.write(tmp_path / "a", text)
    want = hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    assert files.sha256(text) == files.sha256_of_file(tmp_path / "a") == want
    assert files.sha256(text[:7], memoryview(text[7:].encode())) == files.sha256_of_parts(iter(text)) == want
    assert files.sha256_of_file(tmp_path / "b") is None
    assert files.sha256_of_json({"b": [1], "a": 2}) == files.sha256_of_json(json.loads('{"a": 2,  "b": [1]}'))


def test_what_another_library_says_is_told_by_its_first_line_and_what_is_no_text_by_its_byte() -> None:
    for said, line in (("", "OSError"), ("\n  why \nand more", "why"), ("x" * 300, f"{'x' * 120} ... {'x' * 120}")):
        assert files.first_line(OSError(said)) == line
        for doing, told in (
            (files.writing(Path("a"), "mend it"), f"cannot write a ({line}); mend it"),
            (files.reading("a", "mend it"), f"a cannot be read ({line}); mend it"),
        ):
            with pytest.raises(UserError) as caught, doing:
                raise OSError(said)
            assert str(caught.value) == told
    with pytest.raises(UserError, match=r"a is no UTF-8 text \(byte 2\); save it so"), files.reading("a", "save it so"):
        b"gr\xfcn".decode("utf-8")
