"""The record in an exported folder: its format, and what it was made from.  Read without torch.

A folder contains the model, the tokenizer, a model card, and the record.  A `merged` export is an ordinary checkpoint.
A `peft` export has `adapter_config.json` and `adapter_model.safetensors` and, where others cannot load its base by
name, the base itself as a checkpoint in `base/`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from uhl_cli.data.tasks import Task
from uhl_cli.errors import FormatError, NewerFormatError
from uhl_cli.formats.container import UPGRADE
from uhl_cli.metrics import Score
from uhl_cli.schema import Frozen, HostRecord, TrainingRecord

RECORD_FILE = "uhl_export.json"
CARD_FILE = "README.md"
BASE_FOLDER = "base"
VERSION = "1.0"
_MOST_BYTES = 4_000_000
_HINT = "Make it again with `uhl export`."


class ExportRecord(Frozen):
    """What a folder was exported from.

    :param adapter: Digest of the adapter file.
    :param max_length: Longest input in tokens that it was trained with; its tokenizer truncates there.
    :param base: Name of a peft export's base (the last part of a path); None if the base is in the folder.
    :param revision: The base's revision on the hub, if it is from there.
    :param teachers: Descriptions of its teachers.
    """

    format_version: str = Field(VERSION, pattern=r"^\d{1,4}\.\d{1,4}$")
    format: Literal["merged", "peft"]
    adapter: str = Field(pattern=r"^[0-9a-f]{64}$")
    task: Task
    target: HostRecord
    dtype: str = Field(max_length=20)
    rank: int = Field(ge=1)
    max_length: int = Field(ge=1)
    base: str | None = Field(None, max_length=4000)
    revision: str | None = Field(None, max_length=200)
    teachers: tuple[str, ...]
    training: TrainingRecord
    versions: dict[str, str]
    agreement: dict[str, Score]
    scores: dict[str, Score]


def is_export(path: Path) -> bool:
    """Whether `path` is a folder that `uhl export` made."""
    return (path / RECORD_FILE).is_file()


def read_export(folder: Path) -> ExportRecord:
    """The record in a folder.

    :raises FormatError: When there is none, or it is damaged.
    :raises NewerFormatError: When it needs a newer uhl.
    """
    path = folder / RECORD_FILE
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise FormatError(f"{path} has {path.stat().st_size:,} bytes, too many for a record.", _HINT)
        content = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}.", "Name a folder of `uhl export`.") from error
    try:
        return ExportRecord.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])[:200]
        said = f"{where} {first['msg']}".strip()
        problem = f"{path} is not a record of an export: {said}."
        if _version_of(content) > _numbers(VERSION):
            raise NewerFormatError(problem, UPGRADE) from error
        raise FormatError(problem, _HINT) from error


def _version_of(content: bytes) -> tuple[int, ...]:
    """The format version of a record, or (0,) if it has none."""
    try:
        return _numbers(json.loads(content)["format_version"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return (0,)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
