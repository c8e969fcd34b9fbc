"""A short list of instructions, pictures of it and extractors that read them, for the tests of TypeScore."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from zoo.papers.typescore import instructions as lists
from zoo.papers.typescore import render as drawing
from zoo.papers.typescore.evaluate import TypeScore
from zoo.papers.typescore.extractors import Extraction, Line, Oracle
from zoo.papers.typescore.instructions import Instruction
from zoo.papers.typescore.render import plain, save

TEXTS = (
    "Open daily",
    "Jazz night at nine",
    "Mind the step",
    "Fresh bread & butter",
    "No entry after 8 pm",
    "Lost? Ask us",
)
LIST = [
    Instruction(
        f"t-{i}",
        f'A sign says "{text}".',
        text,
        (text,),
        {"colour": "red", "font": "serif"},
        lists.length_bin(text),
        "shop",
    )
    for i, text in enumerate(TEXTS)
]


def drawn(folder: Path) -> Path:
    """In the folder a list `wanted.jsonl`, and `a`: two pictures of each instruction, of which some have faults."""
    lists.write(folder / "wanted.jsonl", LIST)
    (folder / "a").mkdir()
    for one in LIST:
        for k, text in enumerate((one.text, one.text.replace("e", "a"))):
            save(plain(text, size=64, points=8), folder / "a" / f"{one.id}_{k}.png")
    return folder


def score(folder: Path, images: str = "a", **fields: Any) -> TypeScore:
    fields = {"extractor": Oracle(), "resamples": 50, **fields}
    return TypeScore(wanted=str(folder / "wanted.jsonl"), images=str(folder / images), **fields)


def line(text: str, box: Sequence[float]) -> Line:
    left, top, right, bottom = map(float, box)
    return Line(text, ((left, top), (right, top), (right, bottom), (left, bottom)), 1.0)


@dataclasses.dataclass(frozen=True)
class Fake:
    """Reads what the renderer drew, with every "e" as `e_as` and a box around the ink; notes its calls."""

    e_as: str = "e"
    fails: tuple[str, ...] = ()
    stops_after: int = 0
    calls: list[Any] = dataclasses.field(default_factory=list, compare=False)

    name: ClassVar[str] = "fake"
    batch: ClassVar[int] = 2

    def __deepcopy__(self, memo: Any) -> "Fake":
        return self

    def version(self) -> str:
        return "1"

    def check(self) -> None: ...

    @property
    def described(self) -> dict[str, Any]:
        return {"name": "fake", "version": "1", "config": {"e_as": self.e_as}}

    def extract(self, images: Sequence[Image.Image]) -> list[Extraction]:
        if self.stops_after and len(self.calls) >= self.stops_after:
            raise KeyboardInterrupt
        self.calls.append(len(images))
        found = []
        for image in images:
            text = image.info[drawing.TEXT]
            pixels = np.asarray(image.convert("RGB"), float)
            far = np.linalg.norm(pixels - np.median(pixels, (0, 1)), axis=-1)
            y, x = np.nonzero(far > 0.5 * far.max())
            box = (x.min() - 3, y.min() - 3, x.max() + 4, y.max() + 4)
            failed = any(word in text for word in self.fails)
            found.append(
                Extraction("", error="no answer")
                if failed
                else Extraction(text.replace("e", self.e_as), (line(text, box),))
            )
        return found


@dataclasses.dataclass(frozen=True)
class Asked(Fake):
    """One that answers questions as well, all alike."""

    answer: str = "Yes."

    def ask(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[Extraction]:
        self.calls.append(list(questions))
        return [Extraction(self.answer) for _ in questions]
