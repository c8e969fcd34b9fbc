"""Coarser metrics of the same pictures, for comparison: a surrogate that needs nothing, and CLIPScore with weights of one's own."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL import Image

from zoo.errors import UserError
from zoo.papers.typescore.extractors.base import flat
from zoo.papers.typescore.instructions import Instruction
from zoo.papers.typescore.render import render
from zoo.papers.typescore.results import (
    Result,
)

_SEED = 1_000_003  # of the right pictures: none of a model's own seeds
_CHUNK = 16  # pictures that another metric is given at a time


class ImageTextScorer(Protocol):
    """How well pictures fit their instructions, by one number a picture: what a fine metric is compared with."""

    name: ClassVar[str]

    def check(self) -> None:
        """UserError where something that it needs is missing."""
        ...

    def score(self, pictures: Sequence[Image.Image], instructions: Sequence[Instruction]) -> list[float]:
        """A number for each picture, more being better; called with some pictures at a time, and many times."""
        ...


@dataclass(frozen=True)
class Coarse:
    """The cosine of a picture and of the right one, each shrunk to 16x16: a stand-in for a coarse metric, and not CLIPScore."""

    right: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)  # drawn once for all models

    name: ClassVar[str] = "coarse surrogate"

    def check(self) -> None:
        """Needs nothing."""

    def score(self, pictures: Sequence[Image.Image], instructions: Sequence[Instruction]) -> list[float]:
        found = []
        for picture, one in zip(pictures, instructions, strict=True):
            key = repr(one)  # not its id: lists may differ
            if key not in self.right:
                self.right[key] = _shrunk(render(one, seed=_SEED))
            found.append(float(_shrunk(picture) @ self.right[key]))
        return found


def _shrunk(picture: Image.Image) -> np.ndarray:
    small = np.asarray(flat(picture).resize((16, 16), Image.Resampling.BOX), np.float64).ravel()
    return small / max(float(np.linalg.norm(small)), 1e-9)


@dataclass(frozen=True)
class Clip:
    """max(0, 2.5 cos) of CLIP's embeddings, by transformers (the extra `vlm`), with weights of your own in a folder.

    CLIP reads 77 tokens at most, so the end of long instructions is not seen.
    """

    model: str = ""  # a folder of a CLIP model, or its name on a hub that can be reached

    name: ClassVar[str] = "CLIPScore"

    def check(self) -> None:
        """Opens the model. UserError where a package is not installed, or it cannot be opened."""
        for package in ("transformers", "torch"):
            try:
                __import__(package)
            except ImportError:
                raise UserError(
                    f"clip={self.model} needs the package {package}, which is not installed; install the extra `vlm`, or leave "
                    "clip out"
                ) from None
        _ = self._opened

    @functools.cached_property
    def _opened(self) -> tuple[Any, Any]:
        """The model and what prepares its input: opened once, since that takes seconds."""
        import transformers

        try:
            model = transformers.CLIPModel.from_pretrained(self.model).eval()
            return model, transformers.CLIPProcessor.from_pretrained(self.model)
        except (OSError, ValueError) as error:
            raise UserError(
                f"clip={self.model} could not be opened as a CLIP model ({str(error).strip().partition(chr(10))[0]}); name a "
                "folder with the model and its processor, or leave clip out"
            ) from None

    def score(self, pictures: Sequence[Image.Image], instructions: Sequence[Instruction]) -> list[float]:
        self.check()
        import torch

        if len(pictures) != len(instructions):
            raise ValueError(f"{len(pictures)} pictures of {len(instructions)} instructions")
        model, processor = self._opened
        with torch.no_grad():
            inputs = processor(
                text=[one.instruction or one.text for one in instructions],
                images=[flat(picture) for picture in pictures],
                return_tensors="pt",
                truncation=True,
                padding=True,  # changes no embedding: that of a text is of its last token, which sees none behind it
            )
            out = model(**inputs)
            cosines = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
        return [max(0.0, 2.5 * float(cosine)) for cosine in cosines]


def scored(result: Result, scorer: ImageTextScorer, instructions: Mapping[str, Instruction]) -> dict[str, float]:
    """Another metric's mean by instruction, on the pictures of a result that were read.

    UserError where an instruction is unknown or wants another text than the result's, before a picture is opened; and where a
    picture cannot be opened.
    """
    read = result.read
    for record in read:
        one = instructions.get(record["id"])
        if one is None:
            raise UserError(
                f"wanted has no instruction {record['id']!r}, which {result.label} has; name the list it was evaluated with"
            )
        if one.text != record["wanted"]:
            raise UserError(
                f"wanted says {one.text!r:.120} of instruction {record['id']!r}, and {result.label} was evaluated for "
                f"{record['wanted']!r:.120}; name the list it was evaluated with"
            )
    values: dict[str, list[float]] = {}
    for start in range(0, len(read), _CHUNK):
        some = read[start : start + _CHUNK]
        pictures = [_picture(result.images() / record["image"], scorer.name) for record in some]
        found = scorer.score(pictures, [instructions[record["id"]] for record in some])
        for record, value in zip(some, found, strict=True):
            values.setdefault(record["id"], []).append(value)
    return {name: float(np.mean(some)) for name, some in values.items()}


def _picture(path: Path, needed_by: str) -> Image.Image:
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except OSError as error:
        why = "is no longer there" if isinstance(error, FileNotFoundError) else f"cannot be opened ({error})"
        raise UserError(
            f"results: {path} {why}, and {needed_by} needs the pictures; bring it back, or set surrogate=false and leave "
            "clip out"
        ) from None
