"""How a mistake of the user is told, and a pickle that nobody should load."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from zoo.errors import UserError


@contextlib.contextmanager
def told(*words: str) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """The block ends in a sentence of one line, of a length that is read, in which all these words are."""
    with pytest.raises(UserError) as error:
        yield error
    said = str(error.value)
    assert "\n" not in said, said
    assert len(said) < 1200, said
    assert [word for word in words if word not in said] == [], said


class Payload:
    """Pickled, this makes a folder when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)
