"""What samples are conditioned on, as numbers: classes, and captions by the vocabulary or the tokeniser that lies with a model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from zoo import paths
from zoo.data.images.captions import as_tokens, framed, lettered
from zoo.data.text.vocabulary import Vocabulary, open_vocabulary
from zoo.encoders import tokenizer
from zoo.errors import UserError
from zoo.paths import Folder
from zoo.train.pictures import class_name

_log = logging.getLogger("zoo")
ENCODER = (
    "give it a text encoder: `zoo export MODEL FILE --format official`, then `zoo import CONFIG FILE OUT weights.text=ENCODER` "
    "with a config whose task has text and captions='tokens'"
)


def vocabulary(places: Sequence[Folder], data: Any) -> tuple[Vocabulary | None, str]:
    """The vocabulary in the first of these folders that has one, else that of the data; and why these give none."""
    for folder in places:
        with paths.sentence(folder):
            if (found := open_vocabulary(folder)) is not None:
                return found, ""
    try:
        return None if data is None else data.vocabulary(), ""
    except UserError as error:  # an export is used where its data are not
        return None, f", and its data give none ({error})"


def encoder(
    task: Any, places: Sequence[Folder], data: Any, file: str | None, way: str = "with --tokenizer FILE"
) -> tuple[Any, dict[str, str]]:
    """What makes numbers of captions, (texts, S) -> ids [N, S] and what did not fit, and what to remember of it.

    Letters by a vocabulary, tokens by a tokeniser; arguments as of `tokenizer.find`.
    """
    if not task.about.vocabulary:
        encode, digest = tokenizer.find(task, places, file, way)
        return encode, {"tokenizer": digest}
    if file is not None:
        raise UserError(f"a tokeniser given {way}: captions of letters need none; leave it out")
    known, why = vocabulary(places, data)
    if known is None:
        where = " or ".join(map(str, places)) or "its data"
        raise UserError(
            f"captions of letters need the vocabulary.json of the run, and {where} has none{why}; copy it there"
        )
    return partial(lettered, known), {}


def conditions(
    model: Any,
    labels: np.ndarray | None,
    texts: Sequence[str] | None,
    n: int,
    options: Any,
    aspect: str | None = None,
    file: str | None = None,
) -> tuple[dict[str, np.ndarray] | None, list[str] | None, dict[str, str]]:
    """Arrays that lead with n for the sampler of a model's task, n words for people, and what to remember of the tokeniser.

    Sample i has caption i modulo their number.

    Args:
        model: a `zoo.models.Model`.
        labels: class numbers [n] of a task with classes.
        texts: captions; None: drawn without any.
        options: of the sampler, whose `grid` tells the aspect ratio where `aspect` does not.
        file: of the tokeniser; None: the one that belongs to the model.
    """
    task = model.task
    if labels is not None:
        # where none has a class, the sampler must know: guidance would compare a pass with itself
        given = {"label": labels} if (labels >= 0).any() else None
        return given, [class_name(model.labels, i) for i in labels], {}
    if "text" in task.about.conditions:
        raise UserError(
            "this model was trained on stored features of captions (task.captions='features'), and what stands for no "
            f"caption is not stored with it; {ENCODER}"
        )
    if "tokens" not in task.about.conditions:
        return None, None, {}
    around = framed(task, None if task.about.grid is None else options.grid, aspect)
    if texts is None:
        _log.info("no prompt=: samples are drawn without a caption")
        if around is None:
            return None, None, {}
    words = None if texts is None else [texts[i % len(texts)] for i in range(n)]
    encode, about = encoder(task, model.homes, model.data, file)
    return as_tokens(task, encode, texts, n, around), words, about
