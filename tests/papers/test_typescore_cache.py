"""What extractors have read is kept."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typescore_stub import (
    Stub,
    client,
    grey,
    picture,
    says,
    status,
)

from zoo.errors import UserError
from zoo.papers.typescore.extractors import (
    TEXT_CHUNK,
    Cached,
    Extraction,
    Line,
    RapidOcr,
    describe,
    digest,
    get_extractor,
)
from zoo.papers.typescore.extractors.cache import Journal

# -------------------------------------------------------------------------------------------------------------------- cache


def test_a_hit_makes_no_second_request(stub: Stub, tmp_path: Path) -> None:
    cached = Cached(client(stub), tmp_path)
    first = cached.extract([picture("one"), picture("two"), picture("one")])
    assert [one.text for one in first] == ["one", "two", "one"]
    assert len(stub.seen) == 2
    assert (cached.reads, cached.hits) == (2, 1)
    again = Cached(client(stub, threads=1, timeout_s=3.0), tmp_path)  # fields that do not change the reading
    assert again.extract([picture("two"), picture("one")]) == [first[1], first[0]]
    assert len(stub.seen) == 2
    assert (again.reads, again.hits) == (0, 2)
    assert describe(cached) == describe(client(stub))
    assert cached.name == "http"
    assert cached.batch == 16


def test_another_config_image_or_question_is_read_anew(stub: Stub, tmp_path: Path) -> None:
    Cached(client(stub), tmp_path).extract([picture("one")])
    Cached(client(stub, model="other"), tmp_path).extract([picture("one")])
    Cached(client(stub), tmp_path).extract([picture("one", shade=0)])
    cached = Cached(client(stub), tmp_path)
    for question in ("Is it red?", "Is it blue?", "Is it red?"):
        cached.ask([picture("one")], [question])
    assert len(stub.seen) == 5
    with pytest.raises(UserError, match="answers no questions"):
        Cached(get_extractor("oracle"), tmp_path).ask([picture("x")], ["?"])


def test_failed_readings_are_not_kept(stub: Stub, tmp_path: Path) -> None:
    stub.script = [status(400), says(""), status(400)]
    cached = Cached(client(stub), tmp_path)
    assert cached.extract([picture("x")])[0].error
    assert not list(tmp_path.rglob("*.json"))
    for _ in range(2):  # an empty reading is a reading, and kept
        found = cached.extract([picture("x")])[0]
        assert (found.text, found.error) == ("", None)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b'"text": "one"', b'"text": "two"'),
        lambda data: b"\x00\xff" * 99,
        lambda data: b"[]",
        lambda data: b"null",
        lambda data: b"[" * 100_000,
        lambda data: data.replace(b'"extraction"', b'"extractoin"'),
    ],
)
def test_damaged_entries_are_made_anew(
    damage: Callable[[bytes], bytes], stub: Stub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cached = Cached(client(stub), tmp_path)
    cached.extract([picture("one")])
    (file,) = tmp_path.rglob("*.json")
    whole = json.loads(file.read_bytes())
    file.write_bytes(damage(file.read_bytes()))
    assert cached.extract([picture("one")])[0].text == "one"
    assert len(stub.seen) == 2
    assert "damaged" in caplog.text
    assert json.loads(file.read_bytes())["extractor"] == whole["extractor"]
    cached.extract([picture("one")])
    assert len(stub.seen) == 2


def test_entries_are_written_whole_or_not(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    cached = Cached(client(stub), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        assert cached.extract([picture("one")])[0].text == "one"  # the reading is not lost with its copy
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_readings_are_kept_as_they_come(tmp_path: Path) -> None:
    """An extractor that is stopped in the third image has left two."""
    read: list[str] = []

    @dataclasses.dataclass(frozen=True)
    class Stopped:
        name = "stopped"
        batch = 1

        def version(self) -> str:
            return "1"

        def extract(self, images: list[Image.Image]) -> list[Extraction]:
            if len(read) == 2:
                raise KeyboardInterrupt
            read.append(images[0].info[TEXT_CHUNK])
            return [Extraction(read[-1])]

    with contextlib.suppress(KeyboardInterrupt):
        Cached(Stopped(), tmp_path).extract([picture(text) for text in "abc"])
    assert len(list(tmp_path.rglob("*.json"))) == 2


def test_readings_come_one_by_one_through_the_cache(stub: Stub, tmp_path: Path) -> None:
    """Those that are there, those that are read, one image twice, and one that is broken."""
    Cached(client(stub), tmp_path).extract([picture("old")])
    broken = grey([[0.0, 0.5]], np.float32)
    told: list[tuple[int, str]] = []
    found = Cached(client(stub, threads=1), tmp_path).extract(
        [picture("new"), picture("old"), broken, picture("new"), picture("last")],
        lambda i, one: told.append((i, one.text)),
    )
    assert told == [(1, "old"), (2, ""), (0, "new"), (3, "new"), (4, "last")]
    assert [one.text for one in found] == ["new", "old", "", "new", "last"]
    told.clear()
    Cached(client(stub), tmp_path).ask([picture("old")], ["Is it?"], lambda i, one: told.append((i, one.text)))
    assert told == [(0, "old")]


def test_every_extractor_tells_of_readings_as_they_come(rapid: dict[str, Any]) -> None:
    for extractor in (get_extractor("oracle"), RapidOcr()):
        told: list[int] = []
        extractor.extract([picture("a"), picture("b")], lambda i, _, told=told: told.append(i))
        assert told == [0, 1]


def test_a_journal_gives_back_whole_lines_of_the_same_picture(tmp_path: Path) -> None:
    path = tmp_path / "readings.jsonl"
    one = Extraction("open \u2013 daily", (Line("open", ((0.0, 0.0),) * 4, 0.5),), {"content": "open"}, 1.5)
    journal = Journal(path)
    assert journal.get("a.png", "1") is None
    journal.put("a.png", "1", Extraction("older"))
    with open(path, "ab") as file:
        file.write(b'\n{"image": "b.png", "sha')  # killed within a line
    journal.put("a.png", "1", one)
    again = Journal(path)
    assert again.get("a.png", "1") == one
    assert again.get("a.png", "2") is None
    assert again.get("b.png", "1") is None
    again.remove()
    again.remove()
    assert not path.exists()


def test_the_digest_is_of_what_is_seen(tmp_path: Path) -> None:
    image = Image.effect_noise((16, 16), 40).convert("RGB")
    image.save(tmp_path / "a.png", compress_level=0)
    image.save(tmp_path / "b.png", compress_level=9)
    assert digest(image) == digest(Image.open(tmp_path / "a.png")) == digest(Image.open(tmp_path / "b.png"))
    assert digest(image) != digest(image.transpose(Image.Transpose.ROTATE_90))
    assert digest(Image.new("RGB", (2, 8))) != digest(Image.new("RGB", (8, 2)))
    one, two = Image.new("RGB", (2, 2)), Image.new("RGB", (2, 2))
    two.info[TEXT_CHUNK] = "the oracle reads this"
    assert digest(one) != digest(two)


def test_a_folder_that_cannot_be_written_is_said_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache: .* cannot be written"):
        Cached(get_extractor("oracle"), tmp_path / "file")
