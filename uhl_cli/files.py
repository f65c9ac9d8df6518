"""Writing files and folders whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from uhl_cli.errors import OutputError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, synced to disk, when the block ends without an error.

    :raises OutputError: When it cannot be written; nothing is left behind then, and an old file stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
    except OSError as error:
        raise OutputError(f"cannot write to {path.parent}: {error.strerror}.", "Choose another --output.") from error
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private; results get the permissions that any new file would.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"cannot write {path}: {reason}.", "Free some space or choose another --output.") from error
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place, synced to disk, when the block ends without an error.

    Anything that was at `path` is then removed; for a link, its target is replaced.

    :raises OutputError: When it cannot be written; nothing is left behind then, and an old folder stays.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    except OSError as error:
        raise OutputError(f"cannot write to {path.parent}: {error.strerror}.", "Choose another --output.") from error
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)  # mkdtemp makes folders private
        for file in (each for each in temporary.rglob("*") if each.is_file()):
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        old = temporary.with_suffix(".old")
        if path.exists():
            path.rename(old)
        try:
            temporary.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"cannot write {path}: {reason}.", "Free some space or choose another --output.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all.

    :raises OutputError: When the file cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text to `path`, whole or not at all.

    :raises OutputError: When the file cannot be written.
    """
    write_bytes(path, content.encode())
