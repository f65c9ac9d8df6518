"""Hosts that ship inside the package, by name."""

from __future__ import annotations

from pathlib import Path

from uhl_cli.errors import HostNotFoundError

PREFIX = "builtin:"
# Smallest first; `builtin.recipes` describes how each was made.
NAMES = ("tiny", "small", "base", "decoder")
_FOLDER = Path(__file__).parents[1] / "builtin" / "hosts"


def builtin_names() -> tuple[str, ...]:
    """The names that `builtin_path` knows."""
    return tuple(name for name in NAMES if (_FOLDER / name).is_dir())


def builtin_path(name: str) -> Path:
    """The folder of the builtin host `name` (without the prefix `builtin:`).

    Its weights are packed; `uhl_cli.host.packed.unpack` reads them.

    :raises HostNotFoundError: No builtin host has this name.
    """
    if name in builtin_names():
        return _FOLDER / name
    raise HostNotFoundError(f"There is no builtin host '{name}'.", f"Pass one of: {', '.join(builtin_names())}.")
