"""A file to share: its bytes as they are, what they mean, and which texts become public with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from uhl_cli.errors import UsageError
from uhl_cli.formats.adapter import AdapterFile, parse_adapter
from uhl_cli.formats.container import ADAPTER, TASK, Contents, Problems, parse, read_bytes
from uhl_cli.formats.task import TaskFile, parse_task
from uhl_cli.hub.reference import SUFFIX, is_inside

# Origin of texts that ship with the package.
_OWN = "general"


@dataclass(frozen=True)
class SharedFile:
    """An adapter file or a task file that was read and validated.

    :param name: Its name in the repository.
    :param data: Its bytes, which are uploaded unchanged.
    """

    name: str
    data: bytes
    contents: Contents
    content: AdapterFile | TaskFile

    @classmethod
    def read(cls, path: Path) -> SharedFile:
        """The file at `path`.

        :raises FormatError: When it is missing, damaged, or neither an adapter file nor a task file.
        :raises UsageError: When nobody could fetch a file of that name.
        """
        return cls.of(bytes(read_bytes(path, ADAPTER.max_bytes, ADAPTER.noun)), path.name, Problems(path))

    @classmethod
    def of(cls, data: bytes, name: str, problems: Problems) -> SharedFile:
        """The file with these bytes.

        :raises FormatError: When they are damaged, or neither an adapter file nor a task file.
        :raises UsageError: When nobody could fetch a file of that name.
        """
        contents = parse(bytearray(data), ADAPTER, TASK, problems=problems)
        content = (parse_adapter if contents.kind == ADAPTER else parse_task)(contents, problems)
        assert content is not None  # problems are raised
        if not name.endswith(SUFFIX) or "/" in name or not is_inside(name):
            raise UsageError(f"'{name}' is no name for a file on the hub.", f"Rename it; it must end with {SUFFIX}.")
        return cls(name, data, contents, content)

    @property
    def texts(self) -> dict[str, int]:
        """How many texts the file makes public, by the part that holds them; without sentences of this package."""
        if isinstance(self.content, TaskFile):
            return {}
        manifest, found = self.content.manifest, {}
        features, transfer = manifest.parts.features, manifest.parts.transfer
        if manifest.anchors.origin != _OWN:
            found["anchor texts"] = manifest.anchors.texts
            if features is not None:
                found["feature texts"] = features.texts
        if transfer is not None and transfer.general is None:
            found["transfer texts"] = transfer.texts * (2 if transfer.pairs else 1)
        return found

    @property
    def unknown(self) -> tuple[str, ...]:
        """Names of parts that this uhl does not know, which may hold texts too."""
        return () if isinstance(self.content, TaskFile) else tuple(self.content.manifest.parts.unknown)

    @property
    def warning(self) -> str:
        """What becomes public, in one line; empty if no text does."""
        said = [f"{count:,} {part}" for part, count in self.texts.items()]
        said += [f"the unknown part {name}, which may hold texts" for name in self.unknown]
        return f"{self.name} makes training texts public: {', '.join(said)}" if said else ""
