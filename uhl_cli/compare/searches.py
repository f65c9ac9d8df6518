"""Searches of learning rates, kept in a file that several processes may share."""

from __future__ import annotations

import json
from pathlib import Path

from filelock import FileLock

from uhl_cli.compare.fit import Search
from uhl_cli.files import write_text


class KeptSearches(dict[str, Search]):
    """Searches by key, kept in a file so that a resumed experiment has them.

    What another process has written there since is kept, even where both write at once.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(_read_searches(path))
        self._path = path

    def __setitem__(self, key: str, value: Search) -> None:
        super().__setitem__(key, value)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._path.with_name(f".{self._path.name}.lock")):
            rows = {name: vars(search) for name, search in (_read_searches(self._path) | self).items()}
            write_text(self._path, json.dumps(rows, indent=1) + "\n")


def _read_searches(path: Path) -> dict[str, Search]:
    if not path.exists():
        return {}
    found = {}
    for key, row in json.loads(path.read_text(encoding="utf-8")).items():
        scores = {float(rate): value for rate, value in row["scores"].items()}
        found[key] = Search(row["rate"], scores, row["held_out"], row["steps"])
    return found
