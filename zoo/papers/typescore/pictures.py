"""A folder of pictures with known faults, as a model of that skill would leave it: `zoo eval configs/typescore/render.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from zoo.errors import UserError
from zoo.fields import Count, NotEmpty, Seed, Share, Whole, check_fields
from zoo.files import filled, names
from zoo.papers.typescore import synth
from zoo.papers.typescore.files import writing
from zoo.papers.typescore.render import Corruption, save_all


@dataclass(frozen=True)
class Render:
    """Pictures of a list by zoo's own renderer, to try extractors, metrics and comparisons on."""

    out: NotEmpty = "typescore-pictures"  # a folder for {id}_{k}.png
    wanted: str = synth.SHIPPED  # a file of JSON lines, or typeinst_synth
    limit: Whole = 0  # the first so many instructions of the list; 0 for all
    corruption: Corruption = Corruption()
    style_skill: Share = 1.0  # probability that an attribute of the style is as wanted
    each: Count = 1  # pictures of every instruction
    size: Annotated[int, Meta(ge=64, le=2**14)] = 512  # pixels of a side
    seed: Seed = 0

    standalone: ClassVar[bool] = True  # `zoo eval` runs it without a model

    def __post_init__(self) -> None:
        check_fields(self)

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
