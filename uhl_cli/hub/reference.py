"""Names of files on the hub, `user/repo[@revision][:file]`, and paths that are read from the cache under such a name.

Importing this module does not import `huggingface_hub`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from uhl_cli.errors import UsageError

SUFFIX = ".safetensors"
# The file that a name without a file means where the repository has several.
USUAL = "adapter.safetensors"
_FORM = re.compile(r"([^/@:\\]+/[^/@:\\]+)(?:@([^:]+))?(?::(.+))?")
_MAX_NAME = 500


@dataclass(frozen=True)
class Reference:
    """A file of a repository on the hub; without `file`, the repository's only one (see `fetch.chosen`)."""

    repo: str
    revision: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference | None:
        """What `text` refers to on the hub; None if it can only be a path on this machine.

        :raises UsageError: When it names a revision or a file that no repository can have, or no safetensors file.
        """
        found = _FORM.fullmatch(text)
        if found is None or text.startswith((".", "/", "~")) or (found[1] == text and text.endswith(SUFFIX)):
            return None
        repo, revision, file = found.groups()
        if not is_repo(repo):
            return None
        if revision is not None and not is_revision(revision):
            raise UsageError(f"'{revision}' is no name of a revision.", "Pass a branch, tag or commit after the @.")
        if file is not None and not is_inside(file):
            raise UsageError(f"'{file}' is no name of a file in a repository.", "Pass a relative path after the colon.")
        if file is not None and not file.endswith(SUFFIX):
            raise UsageError(f"'{file}' is no {SUFFIX} file, and no other is fetched.", "Name the adapter file.")
        return cls(repo, revision, file)

    def narrowed(self, revision: str | None, file: str | None) -> Reference:
        """The same with a revision and a file that were named apart.

        :raises UsageError: When one is named twice, or malformed.
        """
        if (revision and self.revision) or (file and self.file):
            raise UsageError(f"'{self}' names a revision or a file, and another was given.", "Name it once.")
        revision, file = revision or self.revision, file or self.file
        found = Reference.parse(str(Reference(self.repo, revision, file)))
        if found != Reference(self.repo, revision, file):
            raise UsageError(f"'{revision}' is no name of a revision.", "Pass a branch, tag or commit.")
        return found

    @property
    def stem(self) -> str:
        """A short name for what is derived from the file."""
        return self.repo.split("/")[1] if self.file is None else PurePosixPath(self.file).stem

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{self.repo}{revision}" + ("" if self.file is None else f":{self.file}")


class FetchedPath(type(Path())):  # type: ignore[misc]
    """The path of a file from the hub: shown as the user named it, read from where it lies in the cache.

    Guarantee: `str` and messages never contain the cache's path; `open`, `stat` and every function that takes a path
    use it.
    """

    _words: str | None = None
    _local: str | None = None

    @classmethod
    def of(cls, reference: Reference, local: Path) -> FetchedPath:
        """The path of the fetched file `local`."""
        return cls._made(str(reference), str(local))

    @classmethod
    def _made(cls, words: str, local: str) -> FetchedPath:
        path = cls(words)
        path._words, path._local = words, local
        return path

    @property
    def reference(self) -> Reference | None:
        """What the user named; None for a path that was derived from one."""
        return None if self._words is None else Reference.parse(self._words)

    @property
    def parent(self) -> Path:
        """The folder in the cache, which holds other files of the repository."""
        return super().parent if self._local is None else Path(self._local).parent

    def __str__(self) -> str:
        return super().__str__() if self._words is None else self._words  # with slashes on Windows too

    def __fspath__(self) -> str:
        return super().__str__() if self._local is None else self._local

    def __reduce__(self) -> tuple[Any, ...]:
        if self._local is None:
            return tuple(super().__reduce__())
        return type(self)._made, (self._words, self._local)


def is_repo(text: str) -> bool:
    """Whether `text` is a valid id of a repository, as `user/repo`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined, unused-ignore]

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return text.count("/") == 1


def is_revision(text: str) -> bool:
    """Whether `text` can be the name of a branch, a tag or a commit."""
    return is_inside(text) and not re.search(r"\s", text)


def is_inside(name: str) -> bool:
    """Whether a name of a file or a branch, which may be a stranger's, is printable and stays inside its folder."""
    parts = name.split("/")
    return len(name) <= _MAX_NAME and name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(parts)


def local_name(path: os.PathLike[str]) -> str:
    """The name that a record may keep: that on the hub, or else the last part of the path."""
    return str(path) if isinstance(path, FetchedPath) else Path(path).name
