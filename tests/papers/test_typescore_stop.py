"""A scored folder whose run is stopped: what has been read and paid for is not read again."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from zoo.errors import UserError
from zoo.papers.typescore import render as drawing
from zoo.papers.typescore import report
from zoo.papers.typescore.evaluate import TypeScore
from zoo.papers.typescore.extractors import Extraction
from zoo.papers.typescore.render import plain, save

TEXTS = ("Open daily", "Jazz night", "Mind the step", "Fresh bread", "No entry", "Lost? Ask us")


@dataclasses.dataclass(frozen=True)
class Paid:
    """Reads what the renderer drew, tells of each reading, answers questions; is stopped at the n-th image or question."""

    stops_at_image: int = -1
    stops_at_question: int = -1
    fails: str = ""
    unanswered: bool = False
    read: list[str] = dataclasses.field(default_factory=list, compare=False)
    asked: list[str] = dataclasses.field(default_factory=list, compare=False)

    name: ClassVar[str] = "paid"
    batch: ClassVar[int] = 4
    described: ClassVar[dict[str, Any]] = {"name": "paid", "version": "1", "config": {}}

    def version(self) -> str:
        return "1"

    def check(self) -> None: ...

    def extract(
        self, images: Sequence[Image.Image], keep: Callable[[int, Extraction], object] | None = None
    ) -> list[Extraction]:
        found = {}
        for i in reversed(range(len(images))):  # threads end in any order
            if len(self.read) == self.stops_at_image:
                raise KeyboardInterrupt
            text = images[i].info[drawing.TEXT]
            self.read.append(text)
            found[i] = (
                Extraction("", error="no answer") if text == self.fails else Extraction(text, (), {"content": text})
            )
            if keep is not None:
                keep(i, found[i])
        return [found[i] for i in range(len(images))]

    def ask(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[Extraction]:
        if len(self.asked) == self.stops_at_question:
            raise KeyboardInterrupt
        self.asked.extend(questions)
        return [Extraction("", error="no answer") if self.unanswered else Extraction("Yes.") for _ in questions]


def score(folder: Path, extractor: Paid) -> TypeScore:
    with open(folder / "wanted.jsonl", "w") as file:
        for i, text in enumerate(TEXTS):
            said = {"id": f"t-{i}", "instruction": f'A sign says "{text}".', "style": {"font": "serif"}}
            file.write(json.dumps(said) + "\n")
            if not (folder / "a" / f"t-{i}.png").exists():
                save(plain(text, size=64, points=8), folder / "a" / f"t-{i}.png")
    made = TypeScore(wanted=str(folder / "wanted.jsonl"), images=str(folder / "a"), resamples=20)
    return dataclasses.replace(made, extractor=extractor)  # type: ignore[arg-type]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "a-typescore" / "records.jsonl").read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for six pictures. Its runs draw no plot and write no page, which take most of a run's time."""
    monkeypatch.setattr(report, "plot", lambda *_: b"")
    monkeypatch.setattr(report, "write", lambda *_: None)
    (tmp_path / "a").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "stop", [{"stops_at_image": n} for n in range(1, 6)] + [{"stops_at_question": n} for n in range(6)]
)
def test_no_picture_is_read_twice_after_a_stop(stop: dict[str, int], folder: Path) -> None:
    """Wherever it is stopped, in reading or in asking, and the result is that of a run that was not stopped."""
    first, second = Paid(**stop), Paid()
    with pytest.raises(KeyboardInterrupt):
        score(folder, first).run()
    found = score(folder, second).run()
    assert sorted(first.read + second.read) == sorted(TEXTS)
    assert len(first.asked + second.asked) == len(TEXTS)
    assert (found["score"], found["read"], found["style"]["score"]) == (100, 6, 100)
    assert [record["read"] for record in records(folder)] == list(TEXTS)
    assert not (folder / "a-typescore" / "readings.jsonl").exists()


def test_failed_readings_and_changed_pictures_are_read_again_after_a_stop(folder: Path) -> None:
    first, second = Paid(stops_at_question=0, fails=TEXTS[2]), Paid()
    with pytest.raises(KeyboardInterrupt):
        score(folder, first).run()
    assert sorted(first.read) == sorted(TEXTS[:4])
    save(plain("Something else", size=64, points=8), folder / "a" / "t-0.png")
    score(folder, second).run()
    assert sorted(second.read) == sorted(["Something else", TEXTS[2], *TEXTS[4:]])
    assert records(folder)[0]["read"] == "Something else"


def test_a_run_that_asks_again_does_not_read_again(folder: Path) -> None:
    first, second, third = Paid(unanswered=True), Paid(), Paid()
    score(folder, first).run()
    found = score(folder, second).run()
    assert (second.read, len(second.asked), found["style"]["score"]) == ([], len(TEXTS), 100)
    score(folder, third).run()
    assert (third.read, third.asked) == ([], [])
    assert not (folder / "a-typescore" / "readings.jsonl").exists()


def test_readings_that_cannot_be_written_are_said(folder: Path) -> None:
    score(folder, Paid()).run()
    save(plain("Something else", size=64, points=8), folder / "a" / "t-0.png")
    (folder / "a-typescore" / "readings.jsonl").mkdir()  # in the way
    with pytest.raises(UserError, match=r"cannot write .*readings\.jsonl"):
        score(folder, Paid()).run()
