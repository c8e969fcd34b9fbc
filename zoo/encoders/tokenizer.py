"""Captions to token ids by a published sentencepiece model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.errors import UserError

NAME = "spiece.model"
PAD, END = 0, 1  # ids, the same in every published T5

_log = logging.getLogger("zoo")


class Tokenizer:
    """T5's tokeniser, from the file `spiece.model` or the folder that holds it.

    Raises:
        UserError: the package `sentencepiece` or the file is missing, or the file is no such model.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise UserError(
                "captions need the package sentencepiece, which is not installed; install the extra `text` "
                '(pip install -e ".[text]")'
            ) from None
        file = Path(path) / NAME if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise UserError(
                f"{file} is missing: it comes with the published text encoder, beside its weights; put {NAME} there, or "
                "give the path of the file or of the folder that holds it"
            )
        try:
            self._model: Any = SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{file} is no sentencepiece model ({str(error).strip()}); fetch it anew with the published text encoder"
            ) from None
        pad, end = self._model.pad_id(), self._model.eos_id()
        if (pad, end) != (PAD, END):
            raise UserError(
                f"{file} is no model of T5: padding is {pad} and the end of a caption {end}, not {PAD} and {END}; give the "
                f"{NAME} that comes with the text encoder"
            )

    def __len__(self) -> int:
        """The number of pieces; a text encoder's vocabulary may have a few ids more."""
        return int(self._model.get_piece_size())

    def check(self, vocab: int) -> None:
        """UserError when there are more pieces than a text encoder of `vocab` ids knows."""
        if len(self) > vocab:
            raise UserError(
                f"the tokeniser has {len(self)} pieces, and the text encoder knows {vocab} (task.text.vocab); give the {NAME} "
                "that comes with this text encoder"
            )

    def __call__(
        self, captions: Sequence[str], length: int, names: Sequence[str] | None = None
    ) -> tuple[np.ndarray, list[int]]:
        """Token ids of N captions, and how much of each did not fit.

        A caption that is too long loses its last tokens, not the end token; a warning says which caption and from where on.

        Args:
            captions: N texts.
            length: tokens of a row, the end token among them.
            names: what the warning calls each caption, say the files of their images; None: by place, from 0 on.

        Returns:
            [N, length] int32, each row the ids of a caption, then 1, then zeros; and N numbers of tokens left out.
        """
        if isinstance(captions, str):
            raise TypeError("captions must be a sequence of texts, not one text")
        if names is not None and len(names) != len(captions):
            raise ValueError(f"{len(names)} names for {len(captions)} captions; give each its own")
        if length < 1:
            raise UserError(f"length={length} leaves no room for the token that ends a caption; give at least 1")
        ids = np.full((len(captions), length), PAD, np.int32)
        lost = []
        for n, caption in enumerate(captions):
            pieces = self._model.encode(caption)
            kept, rest = pieces[: length - 1], pieces[length - 1 :]
            ids[n, : len(kept) + 1] = [*kept, END]
            lost.append(len(rest))
            if rest:
                _log.warning(
                    "caption %s has %d tokens and %d fit: lost from %r on (caption: %r)",
                    n if names is None else f"of {names[n]}",
                    len(pieces) + 1,
                    length,
                    _short(self._model.decode(rest)),
                    _short(caption),
                )
        return ids, lost


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
