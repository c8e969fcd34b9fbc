"""The one kind of error that is the user's to mend: it is printed as a sentence, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What was wrong with its value, what was expected, what to do. `zoo` prints it in one line and exits with code 2."""


class Retryable(UserError):
    """No mistake of the user's: the same command may well succeed later. `zoo` exits with code 3: start it again."""


_LISTED = 40  # names that a sentence lists at most


def suggest(word: str, known: Iterable[str]) -> str:
    """A did-you-mean for a misspelt `word`, or the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    return "known: " + ", ".join(known[:_LISTED]) + more if known else "there is nothing to choose from"


def check_divisor(name: str, value: int, whole: str, size: int) -> None:
    """UserError where task.NAME=value does not divide task.WHOLE=size, with the nearest number that does."""
    if size % value:
        nearest = min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: abs(d - value))
        raise UserError(
            f"task.{name}={value} does not divide task.{whole}={size}; choose a divisor, e.g. task.{name}={nearest}"
        )
