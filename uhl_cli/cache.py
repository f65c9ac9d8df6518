"""The folder for files that uhl can make again: `$UHL_CACHE`, else `uhl` below the user's cache folder.

Each kind has a folder of its own there.  A reader ignores a file that does not fit, and makes it again.  A folder that
cannot be written is no error.  Who can write there can change results: it must not be shared with people who are not
trusted.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from uhl_cli.files import HIDDEN, remove_leftovers


def cache_folder(kind: str) -> Path | None:
    """The folder of a kind of files, which may not exist yet; None without a home folder."""
    named = os.environ.get("UHL_CACHE")
    try:
        if named:  # a shell leaves a quoted ~ as it is, and so do files that set variables
            return Path(named).expanduser() / kind
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uhl" / kind
    except RuntimeError:
        return None


def mark_used(path: Path) -> None:
    """Remember that a file was used now: the least recently used are removed first."""
    with suppress(OSError):
        os.utime(path)


def remove_least_used(folder: Path, ending: str, *, most_files: int, most_bytes: int) -> None:
    """Keep the most recently used files of a folder within both limits, and no leftovers of killed writes.

    Another process may remove the same files at the same time.
    """
    with suppress(OSError):
        for left in folder.glob(f".*{HIDDEN}"):
            remove_leftovers(folder / Path(left.stem).stem[1:])
    found = []
    with suppress(OSError):
        for path in folder.glob(f"*{ending}"):
            with suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
    total = 0
    for number, (_, size, path) in enumerate(sorted(found, reverse=True)):
        total += size
        if number >= most_files or total > most_bytes:
            with suppress(OSError):
                path.unlink()
