"""Replacing functions of the package in a test, so that no replacement outlives it."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType
from typing import Any

import pytest

import uhl_cli


@functools.cache
def import_all(package: ModuleType) -> None:
    """Import every module of a package but its entry points."""
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


class PatchOfImported(pytest.MonkeyPatch):
    """Imports the package before it replaces anything.

    A module that is first imported while a test has replaced some function would keep the replacement for good.
    """

    package = uhl_cli

    def setattr(self, *arguments: Any, **options: Any) -> None:
        import_all(self.package)
        super().setattr(*arguments, **options)
