"""`uhl` in a forked copy of this process, which has imported everything already: a call costs no imports.

The parent must not have computed anything with several threads: a fork copies one thread alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def warm() -> None:
    """Import what the commands import when they run."""
    import datasets  # noqa: F401
    import pandas  # noqa: F401
    import transformers  # noqa: F401
    from transformers import AutoModel, AutoTokenizer  # noqa: F401 - imported only when named

    import uhl_cli.commands.export
    import uhl_cli.commands.port
    import uhl_cli.commands.predict
    import uhl_cli.commands.pretrain
    import uhl_cli.commands.tune  # noqa: F401
    from uhl_cli.cli.main import COMMANDS, with_options

    for name in COMMANDS:
        with_options(name)


def start(arguments: Sequence[str], folder: Path, output: int, first: Callable[[], None] = lambda: None) -> int:
    """The process id of `uhl` with these arguments in `folder`.

    :param output: Descriptor of the file for stdout and stderr.
    :param first: Called before the command, in its process.
    """
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.chdir(folder)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", errors="backslashreplace") for number in (1, 2))
        sys.argv = ["uhl", *arguments]
        from uhl_cli.cli.main import main

        try:
            first()
            main()
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001 - a traceback is a finding, and must not go on in pytest
        import traceback

        os.write(2, traceback.format_exc().encode(errors="replace"))
    finally:
        os._exit(code)


def finished(arguments: Sequence[str], folder: Path, first: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """The exit code of `uhl` and what it said, see `start`."""
    read, write = os.pipe()
    child = start(arguments, folder, write, first)
    os.close(write)
    with os.fdopen(read, "rb") as said:
        text = said.read().decode(errors="replace")
    return ended(child), text


def ended(child: int) -> int:
    """Wait for a process; its exit code, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
