"""The task file, format 1.0: what `tune` adds to an adapter, one small safetensors file read without torch.

Header metadata: one key, `uhl-task`, holding the record (`TaskRecord`) as JSON.  Tensors, coded as in `store`:

| name | dtype and shape | meaning |
|---|---|---|
| delta_theta | uint8 [types * atoms / 2] | 4-bit codes, 512 bytes for 8 types and 128 atoms |
| delta_theta.scale | float32 [types] | one scale a module type |
| P, P.scale, each readout parameter of `layout` | int8, float32 | only where the task is not the adapter's own |

It fits the adapter file alone whose SHA-256 digest the record names.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, ValidationError, model_validator
from safetensors.numpy import save

from uhl_cli.codes.layout import READOUT_PARAMETERS, bits_of, parameter_shapes
from uhl_cli.codes.packing import pack_nibbles
from uhl_cli.data.tasks import Task
from uhl_cli.errors import FormatError, NewerFormatError
from uhl_cli.files import write_bytes
from uhl_cli.formats.adapter import Quantised, read_parameter, read_tensors
from uhl_cli.metrics import Score
from uhl_cli.schema import AdapterConfig, Frozen, HostRecord, TrainingRecord

FORMAT_VERSION = "1.0"
_KEY = "uhl-task"
_HINT = "Make it again with `uhl tune ADAPTER --target HOST --task TASK`."


class TaskRecord(Frozen):
    """Header of a task file.

    :param adapter: SHA-256 digest of the adapter file that it belongs to.
    :param config: Shape of the adapter with this task's readout.
    :param own_task: Whether the adapter's own readout is used, so that the file holds delta-theta alone.
    :param before: Score on the target before tuning; None for another task, whose readout is new.
    """

    format_version: str = Field(FORMAT_VERSION, pattern=r"^\d{1,4}\.\d{1,4}$")
    adapter: str = Field(pattern=r"^[0-9a-f]{64}$")
    config: AdapterConfig
    task: Task
    label_counts: tuple[Annotated[int, Field(ge=0)], ...]
    own_task: bool
    target: HostRecord
    training: TrainingRecord
    versions: dict[str, str]
    before: Score | None = None
    score: Score | None = None

    @model_validator(mode="after")
    def _labels_agree(self) -> TaskRecord:
        if len(self.task.labels) != self.config.num_labels or len(self.label_counts) != self.config.num_labels:
            raise ValueError("number of labels differs between task, label counts and configuration")
        if self.task.kind != self.config.kind:
            raise ValueError("kind of task differs between task and configuration")
        return self


@dataclass(frozen=True)
class TaskFile:
    """All that a task file holds: delta-theta and, for a new task, its readout."""

    record: TaskRecord
    parameters: dict[str, Quantised]


def adapter_digest(path: Path) -> str:
    """SHA-256 of an adapter file.

    :raises FormatError: When it cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}.", "Check the path.") from error


def task_parameter_shapes(record: TaskRecord) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter that a file with this record holds."""
    shapes = parameter_shapes(record.config)
    names = ("delta_theta",) if record.own_task else ("delta_theta", *READOUT_PARAMETERS)
    return {name: shapes[name] for name in names if name in shapes}


def task_to_bytes(content: TaskFile) -> bytes:
    """The file's bytes; the same content gives the same bytes."""
    tensors: dict[str, np.ndarray] = {}
    for name, parameter in content.parameters.items():
        tensors[name] = pack_nibbles(parameter.codes) if bits_of(name) == 4 else parameter.codes
        tensors[f"{name}.scale"] = parameter.scales
    ordered = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    record = json.dumps(content.record.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
    packed: bytes = save(ordered, metadata={_KEY: record})
    return packed


def write_task(path: Path, content: TaskFile) -> int:
    """Write the file whole or not at all and return its size in bytes.

    :raises OutputError: When it cannot be written.
    """
    data = task_to_bytes(content)
    write_bytes(path, data)
    return len(data)


def read_task(path: Path) -> TaskFile:
    """Read and validate a task file.

    :raises FormatError: When it is missing, damaged, not a task file, or breaks any rule of the format.
    :raises NewerFormatError: When its major version is newer than this reader's.
    """
    metadata, tensors = read_tensors(path, key=_KEY)
    if _KEY not in metadata:
        raise FormatError(f"{path} is a safetensors file but not a uhl task file.", _HINT)
    record = _read_record(metadata[_KEY], path)
    shapes = task_parameter_shapes(record)
    wanted = set(shapes) | {f"{name}.scale" for name in shapes}
    if set(tensors) != wanted:
        odd = sorted(set(tensors) ^ wanted)
        raise FormatError(f"{path} lacks or adds the parts {', '.join(odd[:5])[:200]}.", _HINT)
    return TaskFile(record, {name: read_parameter(name, shape, tensors) for name, shape in shapes.items()})


def _read_record(text: str, path: Path) -> TaskRecord:
    try:
        version = str(json.loads(text)["format_version"])
        major = int(version.split(".")[0])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError(f"the record of {path} is not readable.", _HINT) from error
    if major > int(FORMAT_VERSION.split(".")[0]):
        raise NewerFormatError(
            f"{path} has format {version}; this uhl reads up to {FORMAT_VERSION}.", "Run `pip install --upgrade uhl`."
        )
    try:
        return TaskRecord.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FormatError(
            f"the record of {path} breaks the format at {where or 'its top'}: {first['msg']}.", _HINT
        ) from error
