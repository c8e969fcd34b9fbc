"""What samples are conditioned on: captions as tokens, and the shape of an aspect ratio."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from zoo import models
from zoo.data.captions import as_tokens, bucket, framed
from zoo.errors import UserError
from zoo.files import reading, sha256
from zoo.models import Model
from zoo.task import is_text
from zoo.train.report import class_name

_log = logging.getLogger("zoo")
_WAY = (
    "give it a text encoder: `zoo export MODEL FILE --format official`, then `zoo import CONFIG FILE OUT weights.text=ENCODER` "
    "with a config whose task has text and captions='tokens'"
)


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
            f"{field}: this model was trained on stored features of captions and holds no text encoder; {_WAY}"
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
        lines = data.decode("utf-8-sig").removesuffix("\n").split("\n")
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UserError(f"{field} holds no {what} in {_count(lines)}; give a text file, one {what} per line")
    if len(found) < len(lines):
        _log.info("%s: %d %ss in %s, blank ones are passed over", field, len(found), what, _count(lines))
    return found, {"prompts": f"{Path(prompts).name} (sha256 {sha256(data)})"}


def _count(lines: Sequence[str]) -> str:
    return "1 line" if len(lines) == 1 else f"{len(lines)} lines"


def shaped(task: Any, aspect: str | None, options: Any) -> tuple[Any, dict[str, Any]]:
    """Options of the sampler for an aspect ratio such as "16:9", and what to remember of it.

    The area is that of the latents the task was trained on, as in the buckets of `zoo prepare --aspects`.
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


def given(
    model: Model,
    labels: np.ndarray | None,
    texts: Sequence[str] | None,
    n: int,
    options: Any,
    aspect: str | None,
    tokenizer: str | None,
) -> tuple[dict[str, np.ndarray] | None, list[str] | None, dict[str, str]]:
    """Arrays that lead with n for the task's sampler, n words for people, and what to remember of the tokeniser.

    Sample i has caption i modulo their number.

    Args:
        labels: class numbers [n] of a task with classes.
        texts: captions; None: drawn without any.
        options: of the sampler, whose `grid` tells the aspect ratio where `aspect` does not.
        tokenizer: file of the tokeniser; None: the one that belongs to the model.
    """
    task = model.task
    if labels is not None:
        return {"label": labels}, [class_name(model.labels, i) for i in labels], {}
    wanted = task.about.conditions
    if "text" in wanted:
        raise UserError(
            "this model was trained on stored features of captions (task.captions='features'), and what stands for no "
            f"caption is not stored with it; {_WAY}"
        )
    if "tokens" not in wanted:
        return None, None, {}
    around = framed(task, None if task.about.grid is None else options.grid, aspect)
    if texts is None:
        _log.info("no prompt=: samples are drawn without a caption")
        if around is None:
            return None, None, {}
    encode, digest = models.open_tokenizer(task, model.homes, tokenizer)
    words = None if texts is None else [texts[i % len(texts)] for i in range(n)]
    return as_tokens(task, encode, texts, n, around), words, {"tokenizer": digest}
