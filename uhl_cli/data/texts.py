"""Texts as users hold them."""

from __future__ import annotations

from collections.abc import Iterable

Texts = str | Iterable[str]


def as_texts(value: Texts) -> list[str]:
    """A list of texts."""
    return [value] if isinstance(value, str) else list(value)
