"""Datasets of the hub: every split of one configuration, from the network or from a cache.

Without the network, two caches are searched: what `datasets` prepared on an earlier run, and snapshots in the hub's own
cache, such as from `hf download --repo-type dataset`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from uhl_cli.data.table import cause, data_error, load_failures, offline_datasets
from uhl_cli.data.tasks import TASKS
from uhl_cli.errors import DataError
from uhl_cli.files import refuse_unwritable_cache

if TYPE_CHECKING:
    from datasets import Dataset

# Timeout for the hub's first answer.
ANSWER_SECONDS = 10.0


def read_hub(hub: str, config: str | None, revision: str | None, offline: bool) -> Mapping[str, Dataset]:
    """All splits of a dataset of the hub, by name.

    :param config: The configuration, needed where the dataset has several.
    :param revision: A branch, tag or commit; None is the main branch.
    :param offline: Do not open any connection.
    :raises DataError: If there is no such dataset or configuration, the hub cannot be reached and nothing is cached, or
        the data are damaged.
    :raises OutputError: If the cache of `datasets` cannot be written.
    """
    import datasets.config

    offline = offline or datasets.config.HF_HUB_OFFLINE
    with offline_datasets() if offline or not _answers(hub, revision) else nullcontext():
        try:
            return _splits(datasets.load_dataset(hub, name=config, revision=revision))
        except load_failures() as error:
            snapshot = _snapshot(hub, config, revision) if offline or _unreachable(error) else None
            if snapshot is None:
                refuse_unwritable_cache(datasets.config.HF_DATASETS_CACHE, error)
                raise _explain(hub, config, offline, error) from error
            return snapshot


def _snapshot(hub: str, config: str | None, revision: str | None) -> Mapping[str, Dataset] | None:
    import datasets
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(hub, repo_type="dataset", revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    # A snapshot may lack splits that were not requested, so its declared sizes are not checked.
    try:
        return _splits(datasets.load_dataset(folder, name=config, verification_mode="no_checks"))
    except load_failures() as error:
        # datasets needs the first configuration's files too; by convention each has a folder with its name.
        own = Path(folder) / (config or "")
        if config is None or not own.is_dir():
            raise _explain_snapshot(hub, Path(folder), error) from error
    try:
        return _splits(datasets.load_dataset(str(own), verification_mode="no_checks"))
    except load_failures() as error:
        raise _explain_snapshot(hub, own, error) from error


def _explain_snapshot(hub: str, folder: Path, error: Exception) -> DataError:
    from datasets.config import HF_DATASETS_CACHE

    refuse_unwritable_cache(HF_DATASETS_CACHE, error)
    if isinstance(error, FileNotFoundError) or "Config name is missing" in str(error):
        parts = ", ".join(sorted(each.name for each in folder.iterdir() if not each.name.startswith(".")))
        return DataError(
            f"The cache holds only parts of {hub}: {parts}.",
            "Name a whole one with --config, run once while online, or give local data with --data.",
        )
    return data_error(f"Cannot load the cached files of {hub}", error, "Fetch them again, or give --data.")


def _splits(loaded: Mapping[str, Dataset]) -> Mapping[str, Dataset]:
    return {str(name): split for name, split in loaded.items()}


def _answers(hub: str, revision: str | None) -> bool:
    """Whether the hub answers, tried once: `datasets` would try six times, with pauses."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(hub, revision=revision, timeout=ANSWER_SECONDS)
    except load_failures() as error:
        return not _unreachable(error)
    return True


def _unreachable(error: BaseException) -> bool:
    """Whether an error or one of its causes is a network error of Python, requests or httpx."""
    network = {"ConnectionError", "TimeoutError", "Timeout", "TransportError"}
    links: BaseException | None = error
    while links is not None:
        if network & {each.__name__ for each in type(links).__mro__}:
            return True
        status = getattr(getattr(links, "response", None), "status_code", 0)
        if isinstance(status, int) and status >= 500:
            return True
        links = links.__cause__ or links.__context__
    return False


def _explain(hub: str, config: str | None, offline: bool, error: Exception) -> DataError:
    text = str(error)
    choices = f"Give {', '.join(TASKS)}, a hub id as owner/name, or the path of a file or folder."
    if "Config name is missing" in text or "BuilderConfig" in text:
        what = f"has no configuration {config!r}" if config else "has several configurations"
        configurations = " ".join(text.replace("\n", " ").split())[:300]
        return DataError(f"{hub} {what}: {configurations}", "Name one with --config.")
    if "scripts are no longer supported" in text or "trust_remote_code" in text:
        return DataError(
            f"{hub} is loaded by a script, which uhl does not run.",
            "Try --revision refs/convert/parquet, or download the data and give its folder as --data.",
        )
    if offline or _unreachable(error):
        state = "is not cached, and uhl is offline" if offline else "is not cached, and the hub cannot be reached"
        if "/" not in hub:  # hardly a hub id; rather a task's name that is wrong
            return DataError(f"{hub!r} is no task of this package; as a hub data set it {state}.", choices)
        return DataError(f"{hub} {state}.", "Run once while online, or give a local file or folder with --data.")
    if isinstance(error, FileNotFoundError):
        return DataError(
            f"There is no data set {hub!r} on the hub, and no such local path ({cause(error)}).",
            choices,
        )
    if "/" not in hub:
        return data_error(f"{hub!r} is no task of this package, and cannot be loaded as a hub data set", error, choices)
    return data_error(f"Cannot load {hub}", error, "Download the data and give the folder with --data.")
