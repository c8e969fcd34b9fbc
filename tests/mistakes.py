"""How a mistake of the user is told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from zoo.errors import UserError


@contextlib.contextmanager
def told(*words: str) -> Iterator[None]:
    """The block ends in a sentence of one line, in which all these words are."""
    with pytest.raises(UserError) as error:
        yield
    said = str(error.value)
    assert "\n" not in said, said
    assert [word for word in words if word not in said] == [], said
