"""`list`: the adapter files and task files in a folder or in the hub's cache, without torch and without a host."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import Field

from uhl_cli.commands.flags import Options
from uhl_cli.errors import FormatError, UsageError
from uhl_cli.formats.adapter import read_adapter
from uhl_cli.formats.alignment import AlignmentRecord, full_name, kept_alignments
from uhl_cli.formats.container import ADAPTER, TASK, read_metadata
from uhl_cli.formats.task import read_task
from uhl_cli.metrics import Score
from uhl_cli.schema import Frozen, HostRecord
from uhl_cli.text import one_line

CARD = "README.md"
_ENDING = ".safetensors"
# A folder may be anything, such as a home folder.
MOST_DEPTH, MOST_ENTRIES, MOST_FILES = 8, 100_000, 1_000
_CARD_BYTES = 65_536
_LICENCE = re.compile(r"^licen[cs]e:[ \t]*(.*)$", re.MULTILINE)
_REPOSITORY = "models--"


class ListOptions(Options):
    """All of `uhl list`."""

    argument = "folder"

    folder: Path | None = Field(
        None, description="folder to look in, with the folders in it; by default the hub's cache (HF_HUB_CACHE)"
    )
    target: str | None = Field(
        None,
        max_length=4000,
        description="hub id, local folder or builtin:NAME of a model: say of each file whether it has been aligned to "
        "a model of this name; porting it again starts at once if nothing has changed since",
    )


class ListedFile(Frozen):
    """A file of uhl.  All but `name`, `path`, `kind`, `bytes` and `problem` is None or empty for an unreadable one."""

    name: str = Field(description="path as found; in the hub's cache user/repo@revision:file")
    path: str
    revision: str | None = Field(None, description="commit on the hub, for a file in its cache")
    kind: Literal["adapter", "task", "unreadable"]
    bytes: int
    task: str | None = None
    labels: tuple[str, ...] = ()
    host: HostRecord | None = Field(None, description="an adapter's source, a task file's target")
    score: Score | None = Field(None, description="on that host")
    licence: str | None = Field(None, description=f"of the {CARD} beside it, else of the file")
    aligned: tuple[HostRecord, ...] | None = Field(
        None, description="models of the name that --target gives that it has been aligned to; None without --target"
    )
    problem: str | None = Field(None, description="why it is unreadable")


class ListReport(Frozen):
    """What `list` found."""

    folder: str
    target: str | None
    files: tuple[ListedFile, ...]
    others: int = Field(description=f"files that end in {_ENDING} and are neither adapter nor task file")
    complete: bool = Field(description="False if the folder has more files, or deeper ones, than are looked at")


def run_list(options: ListOptions) -> ListReport:
    """List the adapter files and task files in a folder, or in the hub's cache.

    Guarantee: imports neither torch nor transformers, opens no connection and writes nothing.

    :raises UsageError: When there is no such folder.
    """
    folder = _hub_cache() if options.folder is None else options.folder.expanduser()
    if options.folder is not None and not folder.is_dir():
        if folder.is_file():
            raise UsageError(f"{folder} is a file, not a folder.", f"Run `uhl inspect {folder}`.")
        raise UsageError(f"there is no folder {folder}.", "Check the path, or leave it out for the hub's cache.")
    walk = _Walk()
    places = _in_hub(folder, walk) if options.folder is None else ((path, None) for path in walk.files(folder, 0))
    aligned = None if options.target is None else _aligned(options.target)
    files: list[ListedFile] = []
    others = 0
    for path, place in places:
        if len(files) == MOST_FILES:
            walk.complete = False
            break
        found = _listed(path, str(path) if place is None else place[0], aligned)
        if found is None:
            others += 1
        else:
            files.append(found if place is None else found.model_copy(update={"revision": place[1]}))
    return ListReport(
        folder=str(folder), target=options.target, files=tuple(files), others=others, complete=walk.complete
    )


class _Walk:
    """Walks folders in the order of their names, up to `MOST_DEPTH` and over at most `MOST_ENTRIES` entries in all."""

    def __init__(self) -> None:
        self.complete = True
        self._left = MOST_ENTRIES

    def entries(self, folder: Path) -> list[Path]:
        """The entries of a folder that are not hidden; none if it cannot be read."""
        found: list[Path] = []
        with suppress(OSError), os.scandir(folder) as scanned:
            for entry in scanned:
                if self._left <= 0:
                    self.complete = False
                    break
                self._left -= 1
                if not entry.name.startswith("."):
                    found.append(folder / entry.name)
        return sorted(found)

    def files(self, folder: Path, depth: int) -> Iterator[Path]:
        """The safetensors files of a folder and of those in it; links to folders are not followed."""
        for path in self.entries(folder):
            if path.is_dir():
                if depth == MOST_DEPTH:
                    self.complete = False
                elif not path.is_symlink():
                    yield from self.files(path, depth + 1)
            elif path.suffix == _ENDING:
                yield path


def _hub_cache() -> Path:
    from huggingface_hub import constants  # lazy: only this form of the command needs it

    return Path(constants.HF_HUB_CACHE)


def _in_hub(cache: Path, walk: _Walk) -> Iterator[tuple[Path, tuple[str, str]]]:
    """Files in the hub's cache, each with its name and its commit."""
    for repository in walk.entries(cache):
        if not repository.name.startswith(_REPOSITORY):
            continue
        name = repository.name.removeprefix(_REPOSITORY).replace("--", "/")
        branches = _branches(repository / "refs", walk)
        for snapshot in walk.entries(repository / "snapshots"):
            commit = snapshot.name
            for path in walk.files(snapshot, 0):
                file = path.relative_to(snapshot).as_posix()
                yield path, (f"{name}@{branches.get(commit, commit)}:{file}", commit)


def _branches(refs: Path, walk: _Walk) -> dict[str, str]:
    """Names of branches and tags by their commit."""
    found = {}
    for path in walk.entries(refs):
        with suppress(OSError, ValueError):
            if path.is_file() and path.stat().st_size <= 200:
                found[path.read_text().strip()] = path.name
    return found


def _aligned(target: str) -> dict[str, list[AlignmentRecord]]:
    """What is kept of alignments to a host of this name, by the adapter's digest."""
    found = defaultdict(list)
    for record in kept_alignments():
        if record.adapter and record.host.name in (target, full_name(target)):
            found[record.adapter].append(record)
    return found


def _listed(path: Path, name: str, aligned: Mapping[str, Sequence[AlignmentRecord]] | None) -> ListedFile | None:
    """What a file is; None if it is none of uhl's."""
    num_bytes = 0
    try:
        with suppress(OSError):
            num_bytes = path.stat().st_size
        kinds = read_metadata(path)
        if ADAPTER.key in kinds:
            content = read_adapter(path)
            manifest, digest, own = content.manifest, content.digest, True
            task, host, score, licence = manifest.task, manifest.source, manifest.score, manifest.licence
        elif TASK.key in kinds:
            record = read_task(path).record
            digest, own = record.adapter, record.own_task
            task, host, score, licence = record.task, record.target, record.score, "unspecified"
        else:
            return None
    except FormatError as error:
        problem = str(error).removeprefix(f"{one_line(path)}: ")
        return ListedFile(name=name, path=str(path), kind="unreadable", bytes=num_bytes, problem=problem)
    hosts = None
    if aligned is not None:
        served = ("own", "any") if own else ("other", "any")
        hosts = tuple(each.host for each in aligned.get(digest, ()) if each.serves in served)
    return ListedFile(
        name=name,
        path=str(path),
        kind="adapter" if ADAPTER.key in kinds else "task",
        bytes=num_bytes,
        task=task.name,
        labels=task.labels,
        host=host,
        score=score,
        licence=_card_licence(path.parent / CARD) or (None if licence == "unspecified" else licence),
        aligned=hosts,
    )


def _card_licence(card: Path) -> str | None:
    """The licence in the header of a model card; None without one."""
    try:
        if not card.is_file():  # opening a pipe would block
            return None
        with card.open("rb") as file:
            text = file.read(_CARD_BYTES).decode(errors="replace").replace("\r\n", "\n")
    except OSError:
        return None
    start, header, _ = (*text.split("---\n", 2), "", "")[:3]
    found = None if start.strip() else _LICENCE.search(header)
    return (found[1].strip().strip("'\"")[:100] or None) if found else None
