"""From the name of a file on the hub to a local copy.

As for hosts, HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE apply, and the cached copy is used where
the hub is out of reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

from uhl_cli.errors import HubError
from uhl_cli.hub.failures import FAILURES, Request, hub_errors, quiet_hub
from uhl_cli.hub.reference import SUFFIX, USUAL, Reference, is_inside

ANSWER_SECONDS = 10.0
_SHOWN = 10


def fetch(reference: Reference, *, max_bytes: int, offline: bool = False, cache_dir: str | Path | None = None) -> Path:
    """The path of the file in the cache, after a download if the cache lacks it.

    Guarantee: a file is not downloaded unless its name ends with .safetensors and the hub says that it has at most
    `max_bytes`.  What was found online is found offline too.

    :param offline: Use the cache alone.
    :raises HubError: No such repository, revision or file, no access to it, or the file is too large.
    :raises OutputError: When the cache cannot be written.
    """
    request = Request(reference.repo, reference.revision)
    with quiet_hub(), hub_errors(request, cache_dir):
        if offline:
            return _cached(reference, cache_dir)
        try:
            info = HfApi().model_info(
                reference.repo, revision=reference.revision, files_metadata=True, timeout=ANSWER_SECONDS
            )
        except RevisionNotFoundError:
            raise
        except FAILURES as error:
            if isinstance(error, OSError) and error.errno is not None:  # of this machine, such as an unreadable token
                raise
            return _cached(reference, cache_dir)  # whose errors have this one as their context
        sizes = {each.rfilename: each.size for each in info.siblings or ()}
        file = chosen(reference, sizes)
        size = sizes[file]
        if size is None or size > max_bytes:
            said = "of unknown size" if size is None else f"of {size:,} bytes"
            problem = f"'{file}' in {request.where} is {said}; no adapter file is larger than {max_bytes:,}."
            raise HubError(problem, "Name another file after a colon.")
        return Path(hf_hub_download(reference.repo, file, revision=reference.revision, cache_dir=cache_dir))


def chosen(reference: Reference, files: Iterable[str]) -> str:
    """The file that a reference means, among those of the repository.

    :raises HubError: When it is not there, or a reference without a file has no or several candidates.
    """
    named = sorted(file for file in files if file.endswith(SUFFIX) and is_inside(file))
    where = Request(reference.repo, reference.revision).where
    listed = ", ".join(named[:_SHOWN]) + (f" and {len(named) - _SHOWN:,} more" if len(named) > _SHOWN else "")
    if not named:
        raise HubError(f"{where} has no {SUFFIX} file.", "Check the id; an adapter file is made by `uhl pretrain`.")
    if reference.file is not None:
        if reference.file not in named:
            raise HubError(f"{where} has no file '{reference.file}'; it has {listed}.", "Name one of these.")
        return reference.file
    if len(named) == 1:
        return named[0]
    if USUAL in named:
        return USUAL
    raise HubError(f"{where} has {len(named):,} {SUFFIX} files: {listed}.", f"Name one, as {reference}:FILE.")


def snapshot_folder(download: Callable[[], str]) -> Path:
    """The folder that a call of `snapshot_download` gives, also where the cache has only a part of the snapshot."""
    try:
        return Path(download())
    except LocalEntryNotFoundError as error:
        partial = getattr(error, "snapshot_path", None)
        if partial is None:
            raise
        return Path(partial)


def _cached(reference: Reference, cache_dir: str | Path | None) -> Path:
    """The file in the cache.  Without a name: as `chosen` says, among the files of the revision that are cached."""
    repo, revision = reference.repo, reference.revision
    if reference.file is not None:
        found = hf_hub_download(repo, reference.file, revision=revision, cache_dir=cache_dir, local_files_only=True)
        return Path(found)
    folder = snapshot_folder(
        lambda: snapshot_download(
            repo, revision=revision, allow_patterns=f"*{SUFFIX}", cache_dir=cache_dir, local_files_only=True
        )
    )
    files = [path.relative_to(folder).as_posix() for path in folder.rglob(f"*{SUFFIX}") if path.is_file()]
    if not files:
        raise LocalEntryNotFoundError(f"{folder} has no {SUFFIX} file")
    return folder / chosen(reference, files)
