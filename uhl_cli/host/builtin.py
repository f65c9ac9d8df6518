"""Hosts that ship inside the package, by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from uhl_cli.errors import HostNotFoundError

PREFIX = "builtin:"

_HOSTS: Mapping[str, Path] = MappingProxyType({})


def builtin_names() -> tuple[str, ...]:
    """The names that `builtin_path` knows, sorted; empty where the version ships none."""
    return tuple(sorted(_HOSTS))


def builtin_path(name: str) -> Path:
    """The folder of the builtin host `name` (without the prefix `builtin:`).

    :raises HostNotFoundError: No builtin host has this name.
    """
    if name in _HOSTS:
        return _HOSTS[name]
    if not _HOSTS:
        raise HostNotFoundError(
            f"There is no builtin host '{name}': no builtin hosts ship with this version.",
            "Pass a hub id such as org/name, or a local folder.",
        )
    raise HostNotFoundError(f"There is no builtin host '{name}'.", f"Pass one of: {', '.join(builtin_names())}.")
