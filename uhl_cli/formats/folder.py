"""The file in a ported adapter's folder, format 7.0: its record and the rules for its tensors, read without torch.

The tensors are the `state_dict` of an `adapter.module.PortedAdapter`: float16, bfloat16 or float32, or packed tables
(see `adapter.sparse`).  A LoRA has for each linear module X of the host, its dots written as slashes:

| name | shape | meaning |
|---|---|---|
| lora.down.X | [rank, inputs] | A |
| lora.up.X | [outputs, rank] | B, times alpha / rank |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from uhl_cli.codes.layout import TAIL_BYTES, is_table
from uhl_cli.data.tasks import Task
from uhl_cli.errors import FormatError
from uhl_cli.formats.container import PORTED, PORTED_FILE, Contents, Problems, Stored, read, read_record
from uhl_cli.metrics import Score
from uhl_cli.schema import Frozen, HostRecord, Strategy, Structure, TokenizerSource, TrainingRecord

FILE_NAME = PORTED_FILE
LORA = "lora."
_DTYPES = frozenset({"float16", "bfloat16", "float32"})
_MADE_BY_TUNE = "Make it again with `uhl tune ADAPTER --target HOST --parameters lora`."


class TunedRecord(Frozen):
    """How `tune` made a ported adapter.

    :param adapter: Digest of the adapter that it started from.
    :param supervision: What it was tuned on: labels, or the outputs in the adapter's transfer set.
    """

    adapter: str = Field(pattern=r"^[0-9a-f]{64}$")
    training: TrainingRecord
    supervision: Literal["labels", "transfer set"]
    label_counts: tuple[Annotated[int, Field(ge=0)], ...]
    versions: dict[str, str]
    before: Score | None = None
    score: Score | None = None


class PortedRecord(Frozen):
    """Header of a ported adapter.

    :param max_length: Longest input in tokens that the adapter was trained with.
    :param tokenizer: Source of the host's tokenizer, where its file and its class give other ids.
    :param tuned: Set where `uhl tune --parameters lora` made it.
    """

    format_version: str = Field(PORTED.version, pattern=r"^\d{1,4}\.\d{1,4}$")
    task: Task
    target: HostRecord
    strategy: Strategy
    structure: Structure
    max_length: int | None = Field(None, ge=4, le=100_000)
    tokenizer: TokenizerSource | None = None
    tuned: TunedRecord | None = None

    @model_validator(mode="after")
    def _tuning_fits(self) -> PortedRecord:
        if self.tuned is not None and not self.structure.lora_rank:
            raise ValueError("it was tuned and has no LoRA")
        if self.tuned is not None and len(self.tuned.label_counts) != len(self.task.labels):
            raise ValueError("number of labels differs between task and label counts")
        return self


@dataclass(frozen=True)
class PortedFile:
    """The content of a ported adapter's file."""

    record: PortedRecord
    contents: Contents

    @property
    def hint(self) -> str:
        """How to make it again."""
        return PORTED.hint if self.record.tuned is None else _MADE_BY_TUNE

    @property
    def lora(self) -> dict[str, Stored]:
        """The tensors of the LoRA, if it has one."""
        return {name: value for name, value in self.contents.tensors.items() if name.startswith(LORA)}


def is_ported(path: Path) -> bool:
    """Whether `path` is a ported adapter (folder or file), and not an adapter or a task file."""
    return path.name == FILE_NAME or (path / FILE_NAME).is_file()


def ported_path(path: Path) -> Path:
    """The file of a ported adapter, given its folder or the file."""
    return path if path.name == FILE_NAME and not path.is_dir() else path / FILE_NAME


def read_ported(path: Path) -> PortedFile:
    """Read and validate the file of a ported adapter.

    :raises FormatError: When it is missing, damaged, or breaks a rule of the format.
    :raises NewerFormatError: When it needs a newer uhl.
    """
    problems = Problems(path, hint=PORTED.hint)
    content = parse_ported(read(path, PORTED, problems=problems), problems)
    assert content is not None  # problems are raised
    return content


def read_tuned(path: Path, adapter: str) -> tuple[PortedFile, TunedRecord]:
    """`read_ported` for a result of `uhl tune --parameters lora` on the adapter with this digest.

    :raises FormatError: When it cannot be read, was not tuned, or was tuned from another adapter.
    """
    content = read_ported(path)
    tuned = content.record.tuned
    if tuned is None:
        raise FormatError(
            f"{path} was ported and not tuned, so it is no task file.", f"Label texts with `uhl predict {path.parent}`."
        )
    if tuned.adapter != adapter:
        raise FormatError(f"{path} was tuned on another adapter file.", "Give the adapter that it was made from.")
    return content, tuned


def parse_ported(contents: Contents, problems: Problems) -> PortedFile | None:
    """The ported adapter in a file's contents, or None where problems are collected and there are any.

    Whether the tensors fit the host is checked later, with the host.

    :raises FormatError: When a rule of the format is broken, unless problems are collected.
    """
    record = read_record(contents, PortedRecord, problems)
    for name, stored in contents.tensors.items():
        if not _is_valid(name, stored):
            problems.add(FormatError(f"{name[:200]} holds values that are not finite floating-point numbers"))
    if record is not None:
        problems.attempt(_check_lora, contents.tensors, record.structure.lora_rank)
    return None if record is None or problems.found else PortedFile(record, contents)


def stored_values(name: str, stored: Stored) -> npt.NDArray[np.float32]:
    """The values of a tensor in float32; a packed table is unpacked."""
    if is_table(name):
        rows = stored.numpy()
        step, low = np.ascontiguousarray(rows[:, -TAIL_BYTES:]).view(np.float32).T
        with np.errstate(all="ignore"):
            unpacked: npt.NDArray[np.float32] = rows[:, :-TAIL_BYTES] * step[:, None] + low[:, None]
        return unpacked
    if stored.dtype == "bfloat16":  # the upper half of a float32
        halves = np.frombuffer(stored.data, np.uint16).astype(np.uint32)
        widened: npt.NDArray[np.float32] = (halves << np.uint32(16)).view(np.float32).reshape(stored.shape)
        return widened
    values: npt.NDArray[np.float32] = stored.numpy().astype(np.float32)
    return values


def _is_valid(name: str, stored: Stored) -> bool:
    """Whether a tensor has finite floating-point numbers, packed if and only if it is a table."""
    if not is_table(name):
        known = stored.dtype in _DTYPES
    else:
        known = stored.dtype == "uint8" and len(stored.shape) == 2 and stored.shape[1] > TAIL_BYTES
    return known and bool(np.isfinite(stored_values(name, stored)).all())


def _check_lora(tensors: Mapping[str, Stored], rank: int) -> None:
    """Check that every A of a LoRA has its B, and that both have the rank.

    :raises FormatError: When one does not.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items() if name.startswith(LORA)}
    if bool(shapes) != bool(rank):
        raise FormatError(
            f"the record states a LoRA of rank {rank}; the file contains {len(shapes)} of its parts", _MADE_BY_TUNE
        )
    for name, shape in shapes.items():
        side, _, module = name.removeprefix(LORA).partition(".")
        other = {"down": "up", "up": "down"}.get(side)
        if other is None or f"{LORA}{other}.{module}" not in shapes:
            raise FormatError(f"{name[:200]} is not a part of a LoRA, or its other half is missing", _MADE_BY_TUNE)
        if len(shape) != 2 or shape[0 if side == "down" else 1] != rank:
            raise FormatError(f"{name[:200]} has shape {shape}; the rank is {rank}", _MADE_BY_TUNE)
