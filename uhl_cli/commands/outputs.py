"""A command's output: whether it may be written, who writes it, and what an unfinished run keeps next to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from uhl_cli.errors import OutputError
from uhl_cli.files import claimed, refuse_special, remove_folder, remove_leftovers
from uhl_cli.train.run_files import RunFiles


@contextmanager
def claimed_output(path: Path, *, overwrite: bool) -> Iterator[None]:
    """Claim a file that the block may write.

    :raises OutputError: Before the block, when it may not or cannot be written, or another run is writing it.
    """
    refuse_unwritable(path)
    with claimed(path):
        if path.exists() and not overwrite:
            raise OutputError(f"{path} already exists.", "Choose another --output, or add --overwrite.")
        yield


@contextmanager
def claimed_run(
    output: Path, *, shown_by: Path | None = None, within: bool = False, resume: bool, overwrite: bool
) -> Iterator[RunFiles]:
    """Claim the output of a run that can be resumed, and give the run's files.

    They are removed when the run starts over, and after success, when nothing is left to resume.  Of several processes
    of one run, the first does all that.

    :param shown_by: The file of an output folder that shows that the output exists.
    :param within: The run writes this file alone, so that only it is claimed; other files of the folder stay.
    :raises OutputError: Before the block, when it may not or cannot be written, or another run is writing it.
    :raises KeyboardInterrupt: With advice, when there is something to resume.
    """
    files, written = RunFiles.beside(output), shown_by or output
    refuse_unwritable(written)
    first = os.environ.get("RANK", "0") == "0"
    with claimed(written if within else output) if first else nullcontext():
        if first:
            remove_leftovers(files.folder)
        refuse_overwriting(written, files, resume=resume, overwrite=overwrite)
        if first and not resume:
            remove_folder(files.folder)
        try:
            yield files
        except KeyboardInterrupt as error:
            if files.unfinished:
                error.args = ("Continue from the last checkpoint with --resume.",)
            raise
        if first:
            remove_folder(files.folder)


def refuse_unwritable(path: Path, option: str = "--output") -> None:
    """Refuse an output that cannot be written, before any work is done; writes nothing itself.

    :param option: The command's option for where it writes, which the errors name.
    :raises OutputError: When it is no regular file, its folder is not writable, or its name is not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:  # neither JSON nor the tokenizers take it
        raise OutputError(f"the name {path} is not UTF-8.", f"Choose another {option}.") from error
    refuse_special(path)
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise OutputError(f"cannot write to {path.parent}.", f"Choose another {option}.")


def refuse_overwriting(output: Path, files: RunFiles, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output that already exists, or that an unfinished run is making; writes nothing itself.

    :raises OutputError: When it may not be written.
    """
    if overwrite or (resume and files.unfinished):
        return
    if output.exists():
        raise OutputError(f"{output} already exists.", "Choose another --output, or add --overwrite.")
    if files.unfinished:
        raise OutputError(
            f"there is an unfinished run in {files.folder}.",
            "Continue with --resume, or start over with --overwrite.",
        )
