"""Files to a repository on the hub, in one commit.  The token comes from the environment or `hf auth login` alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.hf_api import RepoSibling

from uhl_cli.errors import HubError
from uhl_cli.hub.failures import Request, hub_errors, quiet_hub


@dataclass(frozen=True)
class Uploaded:
    """A repository after an upload.

    :param commit: The new commit, or the one that already had the same files.
    :param changed: Whether there is a new commit.
    """

    url: str
    commit: str
    changed: bool
    private: bool


def upload(
    repo: str,
    files: Mapping[str, bytes],
    *,
    keep: str | None = None,
    message: str,
    revision: str | None = None,
    private: bool = False,
) -> Uploaded:
    """Make the repository if there is none, and write the files in one commit.

    Guarantee: nothing is written if an error is raised; at most an empty repository or branch is left.

    :param keep: Name of a file that is not replaced if another with other content is there.
    :param revision: A branch, which is made if there is none; by default the main one.
    :param private: Make the repository private, and refuse one that is public.
    :raises HubError: When the hub cannot be reached or refuses, or `keep` or `private` does.
    """
    api, request = HfApi(), Request(repo, revision, upload=True)
    with quiet_hub(), hub_errors(request):
        # None leaves it to the settings of an organisation.
        url = str(api.create_repo(repo, private=private or None, exist_ok=True))
        is_private = bool(api.model_info(repo).private)
        if private and not is_private:
            raise HubError(f"'{repo}' exists and is public.", "Leave out --private, or make it private on its page.")
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        info = api.model_info(repo, revision=revision, files_metadata=True)
        there = {each.rfilename: each for each in info.siblings or ()}
        new = {name: data for name, data in files.items() if name not in there or not _same(there[name], data)}
        if keep in new and keep in there:
            raise HubError(
                f"'{repo}' has another {keep}.", "Add --overwrite to replace it, or --no-card to leave it as it is."
            )
        if not new:
            return Uploaded(url, str(info.sha), False, is_private)
        made = api.create_commit(
            repo,
            [CommitOperationAdd(name, data) for name, data in new.items()],
            commit_message=message,
            revision=revision,
            parent_commit=info.sha,
        )
        return Uploaded(url, str(made.oid), True, is_private)


def _same(there: RepoSibling, data: bytes) -> bool:
    """Whether a file of the repository has this content, by the hub's digests."""
    if there.lfs is not None:
        return bool(there.lfs["sha256"] == hashlib.sha256(data).hexdigest())
    # As git computes the name of a blob.
    return bool(there.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())
