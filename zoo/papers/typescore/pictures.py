"""A folder of pictures with known faults, as a model of that skill would leave it: `zoo eval configs/typescore/render.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from zoo.errors import UserError
from zoo.files import filled, names
from zoo.papers.typescore import synth
from zoo.papers.typescore.files import writing
from zoo.papers.typescore.render import Corruption, save_all


@dataclass(frozen=True)
class Render:
    """Pictures of a list by zoo's own renderer, to try extractors, metrics and comparisons on."""

    out: str = "typescore-pictures"  # a folder for {id}_{k}.png
    wanted: str = synth.SHIPPED  # a file of JSON lines, or typeinst_synth
    limit: int = 0  # the first so many instructions of the list; 0 for all
    corruption: Corruption = Corruption()
    style_skill: float = 1.0  # probability that an attribute of the style is as wanted
    each: int = 1  # pictures of every instruction
    size: int = 512  # pixels of a side
    seed: int = 0

    standalone: ClassVar[bool] = True  # `zoo eval` runs it without a model

    def __post_init__(self) -> None:
        if not self.out:
            raise UserError("out is empty; name a new folder for the pictures, out=FOLDER")
        if not 0 <= self.style_skill <= 1:
            raise UserError(f"style_skill={self.style_skill} must be a probability from 0 to 1")
        for name, least in (("each", 1), ("size", 64), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}")

    def run(self) -> dict[str, Any]:
        """Draws them, all or none. UserError for a list with mistakes, a folder that holds anything already, a text that
        cannot be drawn.
        """
        instructions = synth.listed(self.wanted, self.limit)
        out = Path(self.out)
        with writing(out):
            if out.exists() and (not out.is_dir() or names(out)):
                raise UserError(f"out={out} is there and not empty; name a new folder, and nothing is overwritten")
            with filled(out) as part:
                paths = save_all(
                    instructions, part, self.corruption, self.style_skill, self.seed, each=self.each, size=self.size
                )
        return {"pictures": len(paths), "instructions": len(instructions), "out": str(out)}
