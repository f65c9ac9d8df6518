"""The file operations of a forked process: counted, and at one of them something happens."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path

# Python's audit events, with the places of their paths.  Raising an error in a hook makes the operation fail with it.
_EVENTS = {"open": (0,), "os.mkdir": (0,), "os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,)}
_KINDS = {"os.remove": "unlink"}
_LONGEST = 1 << 20


class Operations:
    """Counts what a child does with the files below a folder: open, mkdir, rename, unlink, rmdir, fsync.

    Made before the fork, which shares the count.  What compiled code opens by itself is not seen.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._shared = mmap.mmap(-1, _LONGEST)
        self._found: list[str] = []

    @property
    def kinds(self) -> list[str]:
        """The kinds of the operations so far, in order; for the parent."""
        return self._shared[: self._shared.find(b"\0")].decode().split()

    def watch(self, act: Callable[[int, str], None] = lambda number, kind: None) -> None:
        """Call `act(number, kind)` before every further operation; for the child."""

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            places = _EVENTS.get(event)
            if places is None:
                return
            # shutil.rmtree removes by names that are relative to an open folder; no library does that elsewhere.
            within = event in ("os.remove", "os.rmdir") and isinstance(arguments[-1], int) and arguments[-1] >= 0
            if within or any(self._covers(arguments[place]) for place in places):
                # Only shutil.rmtree calls os.open, whose event has no mode, to read: a folder.
                opendir = event == "open" and arguments[1] is None and not int(str(arguments[2])) & os.O_CREAT
                self._add("opendir" if opendir else _KINDS.get(event, event.removeprefix("os.")), act)

        fsync = os.fsync

        def synced(handle: int) -> None:
            self._add("fsync", act)
            fsync(handle)

        os.fsync = synced
        sys.addaudithook(hook)

    def _covers(self, path: object) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        return str(Path(os.fsdecode(path)).absolute()).startswith(self._folder)

    def _add(self, kind: str, act: Callable[[int, str], None]) -> None:
        self._found.append(kind)
        text = " ".join(self._found).encode()
        self._shared[: len(text)] = text
        act(len(self._found) - 1, kind)
