"""The task file, format 2.1: what `tune` adds to an adapter, read without torch.  See `container` for the layout.

Tensors, coded as in `adapter`:

| name | dtype and shape | meaning |
|---|---|---|
| delta_theta | uint8 [types * atoms / 2] | 4-bit codes, 512 bytes for 8 types and 128 atoms |
| delta_theta.scale | float32 [types] | one scale a module type |
| P, P.scale, each readout parameter of `layout` | int8, float32 | only where the task is not the adapter's own |

The record's `parameters` states what the numbers are: in files of format 2.0 always biases of the atoms' gains.

A file fits one adapter, whose digest (`AdapterFile.digest`) is in the record.  Files of format 1.0 are refused: the
adapter's file no longer has the digest that they refer to.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from uhl_cli.codes.layout import READOUT_PARAMETERS, parameter_shapes
from uhl_cli.data.tasks import Task
from uhl_cli.files import write_bytes
from uhl_cli.formats import container
from uhl_cli.formats.adapter import Quantised, check_names, parameter_tensors, parse_parameters
from uhl_cli.formats.container import TASK, Contents, Problems
from uhl_cli.metrics import Score
from uhl_cli.schema import AdapterConfig, Frozen, HostRecord, TrainingRecord


class TaskRecord(Frozen):
    """Header of a task file.

    :param adapter: Digest of the adapter that it belongs to.
    :param config: Shape of the adapter with this task's readout.
    :param own_task: Whether the adapter's own readout is used, so that the file holds delta-theta alone.
    :param parameters: What delta-theta's numbers are: biases of the atoms' gains, or a low-rank update of the host's
        linear modules (see `adapter.low_rank`), which replaces the adapter's updates.
    :param supervision: What it was tuned on: labels, or the outputs in the adapter's transfer set.
    :param before: Score on the target before tuning; None for another task, whose readout is new.
    """

    format_version: str = Field(TASK.version, pattern=r"^\d{1,4}\.\d{1,4}$")
    adapter: str = Field(pattern=r"^[0-9a-f]{64}$")
    config: AdapterConfig
    task: Task
    label_counts: tuple[Annotated[int, Field(ge=0)], ...]
    own_task: bool
    target: HostRecord
    training: TrainingRecord
    versions: dict[str, str]
    parameters: Literal["gains", "low-rank"] = "gains"
    supervision: Literal["labels", "transfer set"] = "labels"
    before: Score | None = None
    score: Score | None = None

    @model_validator(mode="after")
    def _labels_agree(self) -> TaskRecord:
        if len(self.task.labels) != self.config.num_labels or len(self.label_counts) != self.config.num_labels:
            raise ValueError("number of labels differs between task, label counts and configuration")
        if self.task.kind != self.config.kind:
            raise ValueError("kind of task differs between task and configuration")
        if self.parameters == "low-rank" and not self.own_task:
            raise ValueError("a low-rank update has no readout for a task of its own")
        return self


@dataclass(frozen=True)
class TaskFile:
    """The content of a task file: delta-theta and, for a new task, its readout."""

    record: TaskRecord
    parameters: dict[str, Quantised]


def task_parameter_shapes(record: TaskRecord) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter that a file with this record holds.

    :raises FormatError: When the configuration has too many parameters.
    """
    shapes = parameter_shapes(record.config)
    names = ("delta_theta",) if record.own_task else ("delta_theta", *READOUT_PARAMETERS)
    return {name: shapes[name] for name in names if name in shapes}


def task_to_bytes(content: TaskFile) -> bytes:
    """The file's bytes; the same content gives the same bytes.

    :raises FormatError: When a value passes the bound of the format.
    """
    return container.to_bytes(TASK, content.record, parameter_tensors(content.parameters))


def write_task(path: Path, content: TaskFile) -> int:
    """Write the file atomically and return its size in bytes.

    :raises OutputError: When it cannot be written.
    :raises FormatError: When a value passes the bound of the format.
    """
    data = task_to_bytes(content)
    write_bytes(path, data)
    return len(data)


def read_task(path: Path) -> TaskFile:
    """Read and validate a task file.

    :raises FormatError: When it is missing, damaged, not a task file, or breaks any rule of the format.
    :raises NewerFormatError: When it needs a newer uhl.
    """
    problems = Problems(path, hint=TASK.hint)
    content = parse_task(container.read(path, TASK, problems=problems), problems)
    assert content is not None  # problems are raised
    return content


def parse_task(contents: Contents, problems: Problems) -> TaskFile | None:
    """The task in a file's contents, or None where problems are collected and there are any.

    :raises FormatError: When a rule of the format is broken, unless problems are collected.
    """
    record = container.read_record(contents, TaskRecord, problems)
    shapes = None if record is None else problems.attempt(task_parameter_shapes, record)
    if record is None or shapes is None:
        return None
    check_names(contents.tensors, {*shapes, *(f"{name}.scale" for name in shapes)}, problems)
    parameters = parse_parameters(shapes, contents.tensors, problems)
    return None if problems.found else TaskFile(record, parameters)
