"""The edge between the command line and the rest: errors to one line and an exit code, progress to stderr."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from pydantic import ValidationError
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

from uhl_cli.errors import UhlError

INTERRUPTED = 130
# Options whose name is not that of the field that they fill.
OPTION_OF_FIELD = {"width_views": "views"}
# A log file gets a line now and then in place of a bar.
SECONDS_BETWEEN_LINES = 15.0


def stderr() -> Console:
    """Console for everything that is not a result."""
    return Console(stderr=True, soft_wrap=True)


@contextmanager
def error_edge(*, debug: bool, interrupted_hint: str = "") -> Iterator[None]:
    """Turn errors into one line on stderr and an exit code; `debug` adds the traceback.

    Exit codes: 1 an error, 2 wrong usage, 3 beyond a budget, 130 interrupted.
    """
    try:
        yield
    except UhlError as error:
        _show(error.message, error.hint, debug)
        raise typer.Exit(error.exit_code) from error
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][-1] if first["loc"] else "")
        option = "--" + OPTION_OF_FIELD.get(field, field).replace("_", "-")
        _show(f"{option}: {first['msg']}.", "See --help.", debug)
        raise typer.Exit(2) from error
    except OSError as error:
        name = f" ({error.filename})" if error.filename else ""
        _show(f"{error.strerror or error}{name}.", "Check the path, its permissions and the space left.", debug)
        raise typer.Exit(1) from error
    except MemoryError as error:
        _show("out of memory.", "Use a smaller --batch-size or host.", debug)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        _show("interrupted.", interrupted_hint, debug)
        raise typer.Exit(INTERRUPTED) from error


def _show(message: str, hint: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    console = stderr()
    console.print("[bold red]error:[/] ", end="")
    console.print(f"{' '.join(message.split())} {hint}".strip(), markup=False, highlight=False)


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


def is_main_process() -> bool:
    """False in the other processes of `accelerate launch`, which print nothing."""
    return os.environ.get("RANK", "0") == "0"


def warn_truncated(truncated: int) -> None:
    """One line on stderr when evaluation texts were cut."""
    if truncated:
        stderr().print(
            f"warning: evaluation texts cut at the longest input: {truncated}; "
            "pretrain with a larger --max-length, or choose a host that takes longer texts.",
            markup=False,
            highlight=False,
        )


def print_result(text: str) -> None:
    """Write a result to stdout as it is."""
    sys.stdout.write(text + "\n")
