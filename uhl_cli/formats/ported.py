"""A ported adapter on disk: the tensors of one host, so that loading needs no alignment.

A folder holds `ported.safetensors`: the `state_dict` of a `PortedAdapter`, tables packed (see `adapter.sparse`), and in
its header a JSON record of the task, of the host it was made for and of what it carries.  It fits that host alone; the
fingerprint is checked.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from uhl_cli.adapter.module import PortedAdapter, Structure, is_table
from uhl_cli.adapter.sparse import TAIL_BYTES, row_values
from uhl_cli.data.tasks import Task
from uhl_cli.errors import FingerprintError, FormatError, HostNotFoundError, NewerFormatError, UsageError
from uhl_cli.files import write_bytes
from uhl_cli.host.checkpoint import Host, load_host, wrap_host
from uhl_cli.ported.model import PortedModel
from uhl_cli.schema import Frozen, HostRecord, Strategy

FILE_NAME = "ported.safetensors"
FORMAT_VERSION = "6.0"
_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
_HINT = "Make it again with `uhl port ADAPTER --target HOST --output DIR`."


class PortedRecord(Frozen):
    """Header of a ported adapter.

    :param max_length: Longest input in tokens that the adapter was trained with.
    """

    format_version: str = Field(FORMAT_VERSION, pattern=r"^\d{1,4}\.\d{1,4}$")
    task: Task
    target: HostRecord
    strategy: Strategy
    structure: Structure
    max_length: int | None = Field(None, ge=4, le=100_000)


def save_ported(folder: Path, ported: PortedModel, target: HostRecord) -> Path:
    """Write `folder/ported.safetensors`, whole or not at all, and return its path.

    :raises OutputError: When it cannot be written.
    """
    kept = ported.adapter.for_inference(torch.device("cpu"), ported.adapter.threshold.dtype)
    record = PortedRecord(
        task=ported.task,
        target=target,
        strategy=ported.strategy,
        structure=kept.structure,
        max_length=ported.max_length,
    )
    path = folder / FILE_NAME
    write_bytes(path, save(kept.state_dict(), metadata={"uhl-ported": record.model_dump_json()}))
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
    path = Path(folder) / FILE_NAME
    record, tensors = _read(path)
    host = _host_for(record, model, tokenizer, offline=offline)
    if host.fingerprint != record.target.fingerprint:
        raise FingerprintError(f"{path} was made for {record.target.name}, not for {host.name}.", _HINT)
    task = record.task
    try:
        adapter = PortedAdapter.empty(record.structure, host.map, kind=task.kind, num_labels=len(task.labels))
    except KeyError as error:
        raise FormatError(f"{path} has parts that do not fit its host: {error}.", _HINT) from error
    wanted = {name: tuple(value.shape) for name, value in adapter.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if found != wanted:
        odd = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise FormatError(f"{path} has parts that do not fit its host and task: {', '.join(odd[:5])[:200]}.", _HINT)
    adapter = adapter.mapped(lambda name, _: tensors[name])
    adapter = adapter.for_inference(host.device, host.map.embeddings.weight.dtype)
    return PortedModel(host, adapter, task, strategy=record.strategy, max_length=record.max_length)


def _read(path: Path) -> tuple[PortedRecord, dict[str, Tensor]]:
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise FormatError(f"{path} is not a regular file.", _HINT)
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("uhl-ported")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError, KeyError) as error:
        # Besides its own error, the library lets unknown dtypes and odd headers through as these.
        raise FormatError(f"{path} is not a ported adapter ({error}).", _HINT) from error
    try:
        record = PortedRecord.model_validate_json(header or "")
    except ValidationError as error:
        raise FormatError(f"{path} has no readable record of its task and host.", _HINT) from error
    major, newest = (int(version.split(".")[0]) for version in (record.format_version, FORMAT_VERSION))
    if major < newest:
        raise FormatError(f"{path} has the old format {record.format_version}, which fits no model any more.", _HINT)
    if major > newest:
        raise NewerFormatError(
            f"{path} has format {record.format_version}; this uhl reads up to {FORMAT_VERSION}.",
            "Run `pip install --upgrade uhl`.",
        )
    if not all(_is_valid(name, value) for name, value in tensors.items()):
        raise FormatError(f"{path} holds values that are not finite floating-point numbers.", _HINT)
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
