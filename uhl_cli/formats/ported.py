"""A ported adapter on disk: the tensors of one host, so that loading needs no alignment.

A folder holds `ported.safetensors`: the `state_dict` of a `PortedAdapter`, tables packed (see `adapter.sparse`), and in
its header a JSON record of the task, of the host it was made for and of what it carries (see `container`).  It fits
that host alone; the fingerprint is checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from uhl_cli.adapter.module import PortedAdapter, Structure, is_table
from uhl_cli.adapter.sparse import TAIL_BYTES, row_values
from uhl_cli.data.tasks import Task
from uhl_cli.errors import FingerprintError, FormatError, HostNotFoundError, UsageError
from uhl_cli.formats.container import PORTED, Problems, read, read_record, write
from uhl_cli.host.checkpoint import Host, load_host, wrap_host
from uhl_cli.metrics import Score
from uhl_cli.ported.model import PortedModel
from uhl_cli.schema import Frozen, HostRecord, Strategy, TrainingRecord

FILE_NAME = "ported.safetensors"
_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})


class TunedRecord(Frozen):
    """What `tune` did to a ported adapter.

    :param adapter: Digest of the adapter that it started from.
    :param supervision: What it was tuned by: labels, or the outputs in the adapter's transfer set.
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
    :param tuned: Set where `uhl tune --parameters lora` made it.
    """

    format_version: str = Field(PORTED.version, pattern=r"^\d{1,4}\.\d{1,4}$")
    task: Task
    target: HostRecord
    strategy: Strategy
    structure: Structure
    max_length: int | None = Field(None, ge=4, le=100_000)
    tuned: TunedRecord | None = None


def save_ported(folder: Path, ported: PortedModel, target: HostRecord, tuned: TunedRecord | None = None) -> Path:
    """Write `folder/ported.safetensors`, whole or not at all, and return its path.

    LoRA factors are stored in float16.

    :raises OutputError: When it cannot be written.
    """
    kept = ported.adapter.for_inference(torch.device("cpu"), ported.adapter.threshold.dtype)
    record = PortedRecord(
        task=ported.task,
        target=target,
        strategy=ported.strategy,
        structure=kept.structure,
        max_length=ported.max_length,
        tuned=tuned,
    )
    path = folder / FILE_NAME
    tensors = {name: value.half() if name.startswith("lora.") else value for name, value in kept.state_dict().items()}
    write(path, PORTED, record, tensors)
    return path


def load_ported(
    folder: str | Path,
    model: nn.Module | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    offline: bool = True,
) -> PortedModel:
    """The ported model in a folder.

    :param model: The host, with its tokenizer.  Without it the host is looked up by the name in the folder's record,
        among local folders, builtin hosts and the hub's cache.
    :param offline: False lets that name be fetched from the hub, too.
    :raises FormatError: When the folder holds no whole ported adapter.
    :raises FingerprintError: When the host is not the one that it was made for.
    :raises HostNotFoundError: When no model is given and the recorded one is not here.
    """
    if Path(folder).is_file():
        raise FormatError(f"{folder} is a file.", "Give the folder that `uhl port --output DIR` made.")
    path = Path(folder) / FILE_NAME
    record, tensors = _read(path)
    host = _host_for(record, model, tokenizer, offline=offline)
    if host.fingerprint != record.target.fingerprint:
        raise FingerprintError(f"{path} was made for {record.target.name}, not for {host.name}.", PORTED.hint)
    task = record.task
    try:
        adapter = PortedAdapter.empty(record.structure, host.map, kind=task.kind, num_labels=len(task.labels))
    except KeyError as error:
        raise FormatError(f"{path} has parts that do not fit its host: {error}.", PORTED.hint) from error
    wanted = {name: tuple(value.shape) for name, value in adapter.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if found != wanted:
        odd = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise FormatError(
            f"{path} has parts that do not fit its host and task: {', '.join(odd[:5])[:200]}.", PORTED.hint
        )
    adapter = adapter.mapped(lambda name, _: tensors[name])
    adapter = adapter.for_inference(host.device, host.map.embeddings.weight.dtype)
    return PortedModel(host, adapter, task, strategy=record.strategy, max_length=record.max_length)


def _read(path: Path) -> tuple[PortedRecord, dict[str, Tensor]]:
    problems = Problems(path, hint=PORTED.hint)
    contents = read(path, PORTED, problems=problems)
    record = read_record(contents, PortedRecord, problems)
    assert record is not None  # a broken one is raised
    tensors = {name: stored.torch() for name, stored in contents.tensors.items()}
    odd = [name for name, value in tensors.items() if not _is_valid(name, value)]
    if odd:
        raise FormatError(
            f"{path}: {odd[0][:200]} holds values that are not finite floating-point numbers.", PORTED.hint
        )
    return record, tensors


def _is_valid(name: str, value: Tensor) -> bool:
    """Finite floating-point numbers, packed in the tables and plain elsewhere."""
    if not is_table(name):
        return value.dtype in _DTYPES and bool(torch.isfinite(value).all())
    packed = value.dtype == torch.uint8 and value.dim() == 2 and value.shape[1] > TAIL_BYTES
    return packed and bool(torch.isfinite(row_values(value)).all())


def _host_for(
    record: PortedRecord, model: nn.Module | None, tokenizer: PreTrainedTokenizerBase | None, *, offline: bool
) -> Host:
    if model is None:
        name = record.target.name
        try:
            return load_host(name, revision=record.target.revision, offline=offline)
        except HostNotFoundError as error:
            hint = "Pass the model and its tokenizer, or load_ported(folder, offline=False) to fetch it from the hub."
            raise HostNotFoundError(f"the host '{name}' of this ported adapter is not here.", hint) from error
    if tokenizer is None:
        raise UsageError("a model needs its tokenizer.", "Call load_ported(folder, model, tokenizer).")
    return wrap_host(model, tokenizer)
