"""A short list of instructions and pictures of it, for the tests of TypeScore."""

from pathlib import Path
from typing import Any

from zoo.papers.typescore import instructions as lists
from zoo.papers.typescore.evaluate import TypeScore
from zoo.papers.typescore.extractors import Oracle
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
