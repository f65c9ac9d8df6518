"""Output to stderr: lines, and progress as one bar per phase on a terminal or occasional lines in a log file."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from typing import TextIO

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
from rich.text import Text

from uhl_cli.text import one_line

SECONDS_BETWEEN_LINES = 15.0


def abandon(stream: TextIO | None) -> None:
    """Redirect a stream that nobody reads any more to /dev/null, so that later writes and the exit do not fail."""
    with suppress(OSError, ValueError, AttributeError):  # a stream of a test or of an embedding has no descriptor
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())  # type: ignore[union-attr]
        os.close(nothing)


class Stderr(Console):
    """The console of everything that is not a result.  It becomes silent when nobody reads it any more."""

    def __init__(self) -> None:
        super().__init__(stderr=True)

    def say(self, text: str, *, label: str = "", style: str = "") -> None:
        """Print one line, never wrapped and without markup, after `label` in `style`."""
        try:
            self.print(Text(label, style).append(one_line(text), ""), soft_wrap=True, highlight=False)
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Continue silently: the result matters more than its progress."""
        self.quiet = True
        abandon(sys.stderr)


class ProgressBar:
    """A `reports.Reporter` that draws one bar per phase on a terminal, and sparse lines elsewhere."""

    def __init__(self, console: Stderr, enabled: bool, redirect: bool = True) -> None:
        self._enabled = enabled
        self._console = console
        self._live = console.is_terminal
        self._tasks: dict[str, TaskID] = {}
        self._last_line = 0.0
        self._progress = Progress(
            SpinnerColumn("dots" if console.encoding.startswith("utf") else "line"),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            transient=True,
            redirect_stdout=redirect,
        )

    def __enter__(self) -> ProgressBar:
        if self._enabled and self._live:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled and self._live:
            self._progress.stop()

    def __call__(self, label: str, done: int, total: int | None, note: str = "") -> None:
        """Show that `done` of `total` parts (None: not known) of the phase are finished."""
        if not self._enabled:
            return
        if not self._live:
            self._line(label, done, total, note)
            return
        label, note = one_line(label), one_line(note)
        if label not in self._tasks:
            self._tasks[label] = self._progress.add_task(label, total=total, note=note)
        self._progress.update(self._tasks[label], completed=done, total=total, note=note)

    def _line(self, label: str, done: int, total: int | None, note: str) -> None:
        now = time.monotonic()
        ended = total is not None and done >= total
        if label not in self._tasks or ended or now - self._last_line > SECONDS_BETWEEN_LINES:
            self._tasks.setdefault(label, TaskID(0))
            self._last_line = now
            parts = f"{done}" if total is None else f"{done}/{total}"
            self._console.say(f"{label}: {parts} {note}".rstrip())


def progress_bar(*, quiet: bool, printing: bool = False) -> ProgressBar:
    """A progress bar on stderr, or none when quiet or when this is not the first of several processes.

    :param printing: Results go to stdout meanwhile.  Otherwise what a library prints there is shown above the bar.
    """
    enabled = not quiet and os.environ.get("LOCAL_RANK", "0") == "0"
    return ProgressBar(Stderr(), enabled=enabled, redirect=not printing)
