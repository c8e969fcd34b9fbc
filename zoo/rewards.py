"""Rewards of texts: frozen dataclasses that give numbers [B] for tokens [B, T].

Data weigh and pair texts by them before a step is taken, and metrics average them over samples; both on the host, so that one
of your own may be any Python.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from zoo.errors import UserError
from zoo.fields import Named, NotEmpty, check_fields

_PART = 4_096  # texts that are given at once
_SYMBOLS = " abcdefghijklmnopqrstuvwxyz"


class Reward(Named):
    """How good texts are. One of your own is a frozen dataclass with `__call__`."""

    name = "of your own"

    def __post_init__(self) -> None:
        check_fields(self, "reward.")

    def check(self, vocabulary: Any, length: int) -> None:
        """UserError where texts of so many of these symbols (None: nobody knows which) mean nothing to it."""

    @abc.abstractmethod
    def __call__(self, tokens: np.ndarray) -> Any:
        """Numbers [B] of texts, tokens int32 [B, T]; that of a text depends on it alone."""


@dataclass(frozen=True)
class LetterShare(Reward):
    """The share of a letter in texts of the 27 symbols of text8."""

    name = "letters"

    letter: NotEmpty = "e"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.letter) != 1 or self.letter not in _SYMBOLS:
            raise UserError(f"reward.letter={self.letter!r} is none of the 27 symbols; choose a to z, or a blank")

    def check(self, vocabulary: Any, length: int) -> None:
        """UserError for other symbols than those of text8."""
        if vocabulary is not None and vocabulary.name != "text8":
            raise UserError(
                f"the reward {self} knows the 27 symbols of text8, and the texts have {vocabulary}; set data.tokenizer=text8, "
                "or give a reward of your own"
            )

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        return (tokens == _SYMBOLS.index(self.letter)).mean(-1)


def rewarded(reward: Reward, texts: Iterable[np.ndarray], vocabulary: Any) -> np.ndarray:
    """Rewards float32 [N] of texts int32 [T].

    Raises:
        UserError: a vocabulary or length that the reward does not know, a result of another shape, or one that is not finite,
            which names the text.
    """
    found = [np.empty(0, np.float32)]
    part: list[np.ndarray] = []

    def given() -> np.ndarray:
        tokens = np.stack(part)
        values = np.asarray(reward(tokens))
        if values.shape != (len(tokens),) or values.dtype.kind not in "fiub":
            raise UserError(
                f"the reward {reward} gives {values.dtype}{list(values.shape)} for tokens {list(tokens.shape)}; it has to give "
                f"one number for each text, [{len(tokens)}]"
            )
        for i in np.flatnonzero(~np.isfinite(values))[:1]:
            text = tokens[i].tolist() if vocabulary is None else vocabulary.decode(tokens[i])
            raise UserError(
                f"the reward {reward} is {values[i]} for the text {text!r}; it has to be a finite number for every text"
            )
        return values.astype(np.float32)

    for text in texts:
        if not part:
            reward.check(vocabulary, len(text))
        part.append(text)
        if len(part) == _PART:
            found.append(given())
            part.clear()
    return np.concatenate([*found, given()] if part else found)
