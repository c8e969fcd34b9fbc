"""What samples are conditioned on: captions as tokens, and the shape of an aspect ratio."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from zoo.captions import ENCODER
from zoo.data.images.captions import bucket
from zoo.errors import UserError
from zoo.files import reading, sha256, text_of
from zoo.task import is_text

_log = logging.getLogger("zoo")


def read(task: Any, prompt: str | None, prompts: str | None) -> tuple[list[str] | None, dict[str, Any]]:
    """The captions that `prompt=` or the lines of the file `prompts=` give, and what to remember of them.

    For a model of texts they are texts to rewrite.

    Raises:
        UserError: both are given, the task takes no captions, or the file is missing or holds none.
    """
    if prompt is None and prompts is None:
        return None, {"prompt": None}
    if prompt is not None and prompts is not None:
        raise UserError("prompt= and prompts= are both given; keep one: prompts=FILE holds one of them per line")
    field = f"prompt={prompt}" if prompt is not None else f"prompts={prompts}"
    given = task.about.conditions
    if "text" in given:
        raise UserError(
            f"{field}: this model was trained on stored features of captions and holds no text encoder; {ENCODER}"
        )
    what = "caption"
    if "tokens" not in given:
        if not is_text(task):
            other = "label=" if task.about.classes else "no condition"
            raise UserError(f"{field}: this model is not conditioned on captions; leave it out (it takes {other})")
        if "tokens" not in task.about.completes:
            raise UserError(f"{field}: {type(task).__name__} draws texts and rewrites none; leave it out")
        what = "text"
    if prompt is not None:
        return [prompt], {"prompt": prompt}
    assert prompts is not None
    with reading(field, f"give a text file, one {what} per line"):
        data = Path(prompts).read_bytes()
        # not splitlines(): a caption may hold what Unicode calls the end of a line
        lines = text_of(data).removesuffix("\n").split("\n")
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UserError(f"{field} holds no {what} in {_count(lines)}; give a text file, one {what} per line")
    if len(found) < len(lines):
        _log.info("%s: %d %ss in %s, blank ones are passed over", field, len(found), what, _count(lines))
    return found, {"prompts": f"{Path(prompts).name} (sha256 {sha256(data)})"}


def check_form(task: Any, form: str | None, split: str | None, texts: Sequence[str] | None) -> bool:
    """Whether captions are written, of the images of `split`. UserError where `form=` and `from=` ask for what the task has not."""
    if form not in (None, "image", "text"):
        raise UserError(f"form={form} is no form of samples; write form=text from=test, or form=image")
    if form != "text" and split is None:
        return False
    can = task.about.completes and not is_text(task)
    if not can or form != "text" or split not in ("train", "test") or texts is not None:
        way = (
            "write form=text from=test, without prompt="
            if can
            else f"{type(task).__name__} writes none: leave them out"
        )
        raise UserError(f"form=text from=SPLIT asks for captions of the images of train or test; {way}")
    return True


def pictures(model: Any, split: str, n: int) -> dict[str, np.ndarray]:
    """What captions of n images are written from: the first of a split, again from the beginning where these are fewer."""
    source = model.data.source(split, model.task.spec(1))
    if not len(source):
        raise UserError(f"from={split}: the {split} split of the model's data is empty; take the other one, from=")
    rows = [source[i % len(source)] for i in range(n)]
    return {key: np.stack([row[key] for row in rows]) for key in model.task.about.completes}


def _count(lines: Sequence[str]) -> str:
    return "1 line" if len(lines) == 1 else f"{len(lines)} lines"


def shaped(task: Any, aspect: str | None, options: Any) -> tuple[Any, dict[str, Any]]:
    """Options of the sampler for an aspect ratio such as "16:9", and what to remember of it.

    The area is that of the latents the task was trained on, as in the buckets of `zoo prepare latents aspects=true`.
    """
    if aspect is None:
        return options, {}
    grid = task.about.grid
    if grid is None:
        raise UserError(f"aspect={aspect}: all {task.about.unit} of {type(task).__name__} have one shape; leave it out")
    if options.grid is not None:
        raise UserError(f"aspect={aspect} and grid= both say the shape; keep one")
    side = round(math.sqrt(math.prod(grid.trained)) * grid.pixels)
    height, width = bucket(side, aspect, grid.multiple)
    return replace(options, grid=(height // grid.pixels, width // grid.pixels)), {"aspect": aspect}
