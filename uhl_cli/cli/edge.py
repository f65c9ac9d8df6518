"""The edge between the command line and the rest: errors to one line and an exit code, progress to stderr."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from pydantic import ValidationError

from uhl_cli.errors import UhlError
from uhl_cli.progress import stderr

INTERRUPTED = 130
# Options whose name is not that of the field that they fill.
OPTION_OF_FIELD = {"width_views": "views"}


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
