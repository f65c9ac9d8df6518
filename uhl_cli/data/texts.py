"""Texts in the forms that users pass: one string, a list or tuple, a NumPy array, a column of pandas or `datasets`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from uhl_cli.errors import DataError


class _Array(Protocol):
    """The common interface of NumPy arrays and pandas columns, so that neither library needs to be imported."""

    def tolist(self) -> object: ...


Texts = str | Sequence[str] | _Array
_HINT = "Give one string, or a list of strings."


def as_texts(value: Texts) -> list[str]:
    """The texts in order, at least one; a single string is one text.

    :raises DataError: If there is no text, an entry is not a string, or `value` is not a sequence of texts.
    """
    held = value if isinstance(value, str) or not hasattr(value, "tolist") else value.tolist()
    if isinstance(held, str):  # also from a zero-dimensional array
        return [str(held)]
    if isinstance(held, (bytes, bytearray)) or not isinstance(held, Sequence):
        raise DataError(f"an object of type {type(held).__name__} is not a text or a list of texts.", _HINT)
    if len(held) == 0:
        raise DataError("the list of texts is empty.", _HINT)
    for position, entry in enumerate(held):
        if not isinstance(entry, str):
            raise DataError(f"texts[{position}] is of type {type(entry).__name__}, not a string.", _HINT)
    return [str(entry) for entry in held]  # NumPy's own strings as Python's
