"""Progress on stderr: a bar a phase on a terminal, a line now and then in a log file."""

from __future__ import annotations

import os
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 15.0


def stderr() -> Console:
    """Console for everything that is not a result."""
    return Console(stderr=True, soft_wrap=True)


class ProgressBar:
    """A `reports.Reporter` that draws one bar a phase on a terminal, and sparse lines elsewhere."""

    def __init__(self, console: Console, enabled: bool) -> None:
        self._enabled = enabled
        self._console = console
        self._live = console.is_terminal
        self._tasks: dict[str, TaskID] = {}
        self._last_line = 0.0
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )

    def __enter__(self) -> ProgressBar:
        if self._enabled and self._live:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled and self._live:
            self._progress.stop()

    def __call__(self, label: str, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` parts of the phase are finished."""
        if not self._enabled:
            return
        if not self._live:
            self._line(label, done, total, note)
            return
        if label not in self._tasks:
            self._tasks[label] = self._progress.add_task(label, total=total, note=note)
        self._progress.update(self._tasks[label], completed=done, total=total, note=note)

    def _line(self, label: str, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        if label not in self._tasks or done >= total or now - self._last_line > SECONDS_BETWEEN_LINES:
            self._tasks.setdefault(label, TaskID(0))
            self._last_line = now
            self._console.print(f"{label}: {done}/{total} {note}".rstrip(), markup=False, highlight=False)


def progress_bar(*, quiet: bool) -> ProgressBar:
    """A progress bar on stderr, or none when quiet or when this is not the first of several processes."""
    return ProgressBar(stderr(), enabled=not quiet and os.environ.get("LOCAL_RANK", "0") == "0")
