"""Where a run that can be resumed keeps its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from uhl_cli.errors import OutputError


@dataclass(frozen=True)
class RunFiles:
    """Where a run keeps its checkpoint and its JSON-lines log."""

    folder: Path

    @classmethod
    def beside(cls, output: Path) -> RunFiles:
        """The files of a run that writes `output`.

        :raises OutputError: It is `.` or `/`, next to which nothing can be written.
        """
        if not output.name:
            raise OutputError(f"{output} cannot be an output.", "Choose another --output.")
        return cls(output.with_name(output.name + ".uhl-run"))

    @property
    def checkpoint(self) -> Path:
        """The latest checkpoint."""
        return self.folder / "checkpoint.safetensors"

    @property
    def unfinished(self) -> bool:
        """Whether there is something to resume."""
        return self.checkpoint.exists() or self.search.exists()

    @property
    def search(self) -> Path:
        """The finished trials of a search for hyper-parameters."""
        return self.folder / "search.json"

    @property
    def log(self) -> Path:
        """JSON lines, one every `train.loop.LOG_EVERY` steps."""
        return self.folder / "log.jsonl"
