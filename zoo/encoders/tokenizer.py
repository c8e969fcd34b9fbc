"""Captions to token ids by a published sentencepiece model, and where its file is looked for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo import paths
from zoo.errors import UserError
from zoo.files import sha256
from zoo.paths import Folder

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


# Files


def held(folder: Folder) -> bool:
    """Whether a folder holds the file of a tokeniser."""
    with paths.sentence(folder):
        return (folder / NAME).is_file()


def digest(file: Folder) -> str:
    """What tells one tokeniser from another: 16 digits of the digest of its file, or of the one in this folder."""
    with paths.sentence(file):
        file = file / NAME if file.is_dir() else file
        return sha256(file.read_bytes())[:16]


def find(
    task: Any, places: Sequence[Folder], file: str | None = None, way: str = "with --tokenizer FILE"
) -> tuple[Tokenizer, str]:
    """The tokeniser of a task's captions, and the digest of its file.

    Args:
        places: folders in which it may lie.
        file: where it lies; None: in the first of `places` that has one.
        way: how the user says where it lies.

    Raises:
        UserError: there is none, or it has more pieces than the task's text encoder knows.
    """
    if file is not None:
        found, which = Tokenizer(file), digest(Path(file))
    else:
        folder = next((place for place in places if held(place)), None)
        if folder is None:
            where = f"there is none in {' or '.join(map(str, places))}" if places else "none is known"
            raise UserError(
                f"captions need the tokeniser {NAME}, and {where}; copy it there from where the text encoder is published, or "
                f"give it {way}"
            )
        with paths.local_copy(folder, (NAME,)) as near:
            found, which = Tokenizer(near), digest(near)
    captions = task.about.captions
    if captions is not None and captions.vocabulary is not None:
        found.check(captions.vocabulary)
    return found, which
