"""Captions from a file: one per line, whatever program wrote it."""

import logging
from types import SimpleNamespace

import pytest

from zoo.commands.conditions import read
from zoo.errors import UserError
from zoo.task import About

TASK = SimpleNamespace(about=About(conditions=("tokens",)))


@pytest.mark.parametrize(
    "data, captions",
    [
        (b"a cat\na dog", ["a cat", "a dog"]),
        (b"\xef\xbb\xbfa cat\r\na dog\r\n", ["a cat", "a dog"]),  # as Windows writes it
        ("one\u2028line\x85of\x0ball\n".encode(), ["one\u2028line\x85of\x0ball"]),
        (b"\n  a cat \n\n \t\na dog\n\n", ["a cat", "a dog"]),
    ],
)
def test_a_caption_is_a_line(tmp_path, data, captions):
    (tmp_path / "p.txt").write_bytes(data)
    found, about = read(TASK, None, str(tmp_path / "p.txt"))
    assert found == captions
    assert about["prompts"].startswith("p.txt (sha256 ")


def test_lines_are_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO, "zoo")
    path = tmp_path / "p.txt"
    path.write_text("a cat\n\na dog\n")
    read(TASK, None, str(path))
    assert caplog.messages == [f"prompts={path}: 2 captions in 3 lines, blank ones are passed over"]
    path.write_text("\n \n")
    with pytest.raises(UserError, match="holds no caption in 2 lines; give a text file, one caption per line"):
        read(TASK, None, str(path))
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="is no UTF-8 text"):
        read(TASK, None, str(path))
