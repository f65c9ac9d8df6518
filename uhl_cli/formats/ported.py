"""A ported adapter on disk: the tensors of one host, so that loading needs no alignment.

A folder contains `ported.safetensors`: the `state_dict` of a `PortedAdapter` with packed tables (see `adapter.sparse`),
and in its header a JSON record of the task, the host and the adapter's structure (see `container`).  It fits that host
alone; the fingerprint is checked.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from uhl_cli.adapter.module import PortedAdapter
from uhl_cli.errors import FingerprintError, FormatError, HostNotFoundError, UsageError
from uhl_cli.formats.container import PORTED, write
from uhl_cli.formats.folder import FILE_NAME, LORA, PortedFile, PortedRecord, TunedRecord, read_ported, read_tuned
from uhl_cli.host.checkpoint import Host, load_host, wrap_host
from uhl_cli.ported.model import PortedModel
from uhl_cli.schema import HostRecord


def save_ported(folder: Path, ported: PortedModel, target: HostRecord, tuned: TunedRecord | None = None) -> Path:
    """Write `folder/ported.safetensors` atomically and return its path.

    LoRA factors are stored in float16 if that is lossless.

    :raises OutputError: When it cannot be written.
    """
    kept = ported.adapter.for_inference(torch.device("cpu"), ported.adapter.threshold.dtype)
    record = PortedRecord(
        task=ported.task,
        target=target,
        strategy=ported.strategy,
        structure=kept.structure,
        max_length=ported.max_length,
        tokenizer=ported.host.tokenizer_source,
        tuned=tuned,
    )
    path = folder / FILE_NAME
    tensors = {name: _halved(value) if name.startswith(LORA) else value for name, value in kept.state_dict().items()}
    write(path, PORTED, record, tensors)
    return path


def load_ported(
    folder: str | Path,
    model: nn.Module | Host | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    offline: bool = True,
) -> PortedModel:
    """The ported model in a folder.

    :param model: The host, with its tokenizer unless it is a `Host`.  Without it, the host's name in the record is
        looked up among local folders, builtin hosts and the hub's cache.
    :param offline: False also allows a download from the hub.
    :raises FormatError: When the folder has no complete ported adapter.
    :raises FingerprintError: When the host is not the one that it was made for.
    :raises HostNotFoundError: When no model is given and the recorded one is not found.
    """
    if Path(folder).is_file():
        raise FormatError(f"{folder} is a file.", "Give the folder that `uhl port --output DIR` made.")
    path = Path(folder) / FILE_NAME
    content = read_ported(path)
    return _on_host(path, content, _host_for(content.record, model, tokenizer, offline=offline))


def tuned_on(path: Path, host: Host, adapter: str) -> PortedModel:
    """The result of `uhl tune --parameters lora` on the adapter with this digest, for this host.

    For a host without weights only shapes are compared and returned.

    :param path: The folder's file.
    :raises FormatError: When it is not complete, was not tuned, or was tuned from another adapter.
    :raises FingerprintError: When the host is not the one that it was made for.
    """
    content, _ = read_tuned(path, adapter)
    return _on_host(path, content, host)


def _on_host(path: Path, content: PortedFile, host: Host) -> PortedModel:
    record, task, whole = content.record, content.record.task, not host.map.embeddings.weight.is_meta
    made_for = record.target.fingerprint
    # A host without weights has no digest: only shapes are compared.
    known = host.fingerprint if whole else host.fingerprint.model_copy(update={"digest": made_for.digest})
    if known != made_for:
        raise FingerprintError(f"{path} was made for {record.target.name}, not for {host.name}.", content.hint)
    if None not in (record.tokenizer, host.tokenizer_source) and record.tokenizer != host.tokenizer_source:
        problem = f"{path} was made with the tokenizer of the {record.tokenizer}, not of the {host.tokenizer_source}."
        raise FingerprintError(problem, f"Add --tokenizer {record.tokenizer}.")
    try:
        adapter = PortedAdapter.empty(record.structure, host.map, kind=task.kind, num_labels=len(task.labels))
    except KeyError as error:
        raise FormatError(f"{path} has parts that do not fit its host: {error}.", content.hint) from error
    wanted = {name: tuple(value.shape) for name, value in adapter.state_dict().items()}
    found = {name: tensor.shape for name, tensor in content.contents.tensors.items()}
    if found != wanted:
        odd = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise FormatError(
            f"{path} has parts that do not fit its host and task: {', '.join(odd[:5])[:200]}.", content.hint
        )
    if whole:
        tensors = {name: tensor.torch() for name, tensor in content.contents.tensors.items()}
        adapter = adapter.mapped(lambda name, _: tensors[name])
        adapter = adapter.for_inference(host.device, host.map.embeddings.weight.dtype)
    return PortedModel(host, adapter, task, strategy=record.strategy, max_length=record.max_length)


def _halved(value: Tensor) -> Tensor:
    half = value.half()
    return half if torch.equal(half.to(value.dtype), value) else value


def _host_for(
    record: PortedRecord, model: nn.Module | Host | None, tokenizer: PreTrainedTokenizerBase | None, *, offline: bool
) -> Host:
    if isinstance(model, Host):
        return model
    if model is None:
        name = record.target.name
        try:
            return load_host(name, revision=record.target.revision, offline=offline, tokenizer=record.tokenizer)
        except HostNotFoundError as error:
            hint = "Pass the model and its tokenizer, or load_ported(folder, offline=False) to fetch it from the hub."
            raise HostNotFoundError(f"the host '{name}' of this ported adapter is not here.", hint) from error
    if tokenizer is None:
        raise UsageError("a model needs its tokenizer.", "Call load_ported(folder, model, tokenizer).")
    return wrap_host(model, tokenizer)
