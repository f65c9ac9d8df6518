"""Write files and folders atomically, and allow one run at a time for each output.

A write happens in a hidden folder next to its target, which the writer locks.  A lock ends with its process, so the
next write or run of the same target can tell what a killed one has left, and removes it.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from uhl_cli.errors import ClaimedError, OutputError

# Ending of the temporary folders of writes.
HIDDEN = ".uhl-tmp"
# What `flock` raises on file systems without locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path`, synced to disk, when the block ends without an error.

    For a link, its target is replaced.

    :raises OutputError: When it cannot be written, or is no regular file; nothing is left then, and an old file stays.
    """
    path = _target(path)
    refuse_special(path)
    with _folder_above(path), _reported(path), _hidden_folder(path) as hidden:
        temporary = hidden / "new"
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `path`, synced to disk, when the block ends without an error.

    The folder that was at `path` is then removed; for a link, its target is replaced.  Its files get the permissions of
    any new file.

    :raises OutputError: When it cannot be written, or is no folder; nothing is left then, and an old folder stays.
    """
    path = _target(path)
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is not a folder.", "Name a folder with --output.")
    with _folder_above(path), _reported(path), _hidden_folder(path) as hidden:
        temporary, old = hidden / "new", hidden / "old"
        temporary.mkdir()
        yield temporary
        mode = stat.S_IMODE((hidden / "lock").stat().st_mode)
        for file in (each for each in temporary.rglob("*") if each.is_file()):
            if stat.S_IMODE(file.stat().st_mode) != mode:  # safetensors lets nobody but the owner read its files
                file.chmod(mode)
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        if path.exists():
            path.rename(old)
        try:
            temporary.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise


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


def refuse_special(path: Path) -> None:
    """:raises OutputError: When `path` is a folder, a device, a pipe or a socket, which no file may replace."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder.", "Name a file with --output.")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} is not a regular file.", "Name a file with --output.")


def refuse_unwritable_cache(folder: str | Path, error: BaseException) -> None:
    """Return if `error`, of a library that caches in `folder`, has another reason than that folder.

    :raises OutputError: When nothing can be written there.
    """
    links: BaseException | None = error
    while links is not None and not isinstance(links, OSError):
        links = links.__cause__ or links.__context__
    if links is None:
        return
    try:
        if links.errno in (errno.ENOSPC, errno.EDQUOT):
            raise links
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as reason:
        problem = f"cannot write to the cache {folder}: {reason.strerror or reason}."
        raise OutputError(problem, "Set HF_HOME to a folder with space that you may write to.") from error


def remove_folder(path: Path) -> None:
    """Remove a folder, if there is one.  A process that is killed meanwhile leaves the whole folder, or none.

    :raises OutputError: When it cannot be removed.
    """
    if path.is_dir():
        with _reported(path, "remove"), _hidden_folder(path) as hidden:
            path.rename(hidden / "new")


def remove_leftovers(path: Path) -> None:
    """Remove what killed writes of `path`, or of a name that continues it, have left.

    A folder that such a write had moved aside is put back.  What cannot be removed stays for the next write.
    """
    with suppress(OSError):
        for left in [each for each in path.parent.iterdir() if each.name.startswith(f".{path.name}.")]:
            if left.suffix != HIDDEN or left.is_symlink():
                continue
            handle = _locked(left / "lock", certainly=True)
            if handle is None:
                continue
            try:
                written = left.with_name(Path(left.stem).stem[1:])
                if (left / "old").exists() and not written.exists():
                    (left / "old").rename(written)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(handle)


@contextmanager
def claimed(path: Path, option: str = "--output") -> Iterator[None]:
    """Let no other process claim `path` inside the block, and remove what killed writes of it have left.

    The claim is a lock on a hidden file beside `path`, and ends with the process, however that ends.  A file system
    without locks gives no protection.

    :param option: The command's option for where it writes, which the errors name.
    :raises ClaimedError: When another process has claimed it.
    :raises OutputError: When nothing can be written beside it.
    """
    path = _target(path)
    claim = path.with_name(f".{path.name}.uhl-lock")
    with _folder_above(path, option):
        try:
            handle = _locked(claim)
        except OSError as error:
            raise _cannot_write_to(path.parent, error, option) from error
        if handle is None:
            raise ClaimedError(f"another run is writing {path}.", f"Wait for its end, or choose another {option}.")
        try:
            remove_leftovers(path)
            yield
        finally:
            with suppress(OSError):  # without its lock, the file hinders nobody
                claim.unlink()
            os.close(handle)


def _target(path: Path) -> Path:
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _cannot_write_to(folder: Path, error: OSError, option: str) -> OutputError:
    return OutputError(f"cannot write to {folder}: {error.strerror or error}.", f"Choose another {option}.")


@contextmanager
def _reported(path: Path, verb: str = "write") -> Iterator[None]:
    """:raises OutputError: In place of an `OSError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"cannot {verb} {path}: {reason}.", "Free some space or choose another --output.") from error


@contextmanager
def _folder_above(path: Path, option: str = "--output") -> Iterator[None]:
    """Make the folders above `path`; if the block fails, those that are new and empty are removed again.

    :raises OutputError: When one cannot be made.
    """
    new = [folder for folder in path.parents if not folder.exists()]
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write_to(path.parent, error, option) from error
        yield
    except BaseException:
        for folder in new:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def _hidden_folder(path: Path) -> Iterator[Path]:
    """A locked temporary folder beside `path`, with room for `new` and `old`."""
    remove_leftovers(path)
    hidden, handle = path, None
    try:
        while handle is None:  # another process may take it for a leftover before it is locked
            hidden = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=HIDDEN))
            with suppress(FileNotFoundError):
                handle = _locked(hidden / "lock")
        yield hidden
    finally:
        if hidden != path:
            shutil.rmtree(hidden, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _locked(path: Path, *, certainly: bool = False) -> int | None:
    """A handle on the file, which is made if it is missing and locked; None if another process has locked it.

    :param certainly: None also where there are no locks.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            free = _lock(handle)
            if free is None:
                free = not certainly
            # Its last owner may have removed it before it was locked here; then it is made again.
            there = free and path.exists() and os.path.samestat(os.fstat(handle), path.stat())
        except BaseException:
            os.close(handle)
            raise
        if there:
            return handle
        os.close(handle)
        if not free:
            return None


def _lock(handle: int) -> bool | None:
    """Whether the file is now locked, or was by another process; None where there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True
