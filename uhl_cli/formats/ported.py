"""A ported adapter on disk: the folded tensors of one host, so that loading needs no alignment.

A folder holds `ported.safetensors`, one tensor a field of `FoldedAdapter` under dotted names (tables of rows packed,
see `rows`), and in its header a JSON record of the task and of the host it was made for.  It fits that host alone; the
fingerprint is checked.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from uhl_cli.adapter.fold import FoldedAdapter, FoldedLayer, FoldedReadout, compact, edit_columns, move
from uhl_cli.adapter.sparse import TAIL_BYTES, CompactRows, pack_rows
from uhl_cli.data.tasks import Task
from uhl_cli.errors import FingerprintError, FormatError, NewerFormatError, UsageError
from uhl_cli.files import write_bytes
from uhl_cli.host.checkpoint import Host, load_host, wrap_host
from uhl_cli.host.hostmap import HostMap
from uhl_cli.ported.model import PortedModel
from uhl_cli.schema import Frozen, HostRecord

FILE_NAME = "ported.safetensors"
# 1.0 had the gains multiplied into the edits, 2.0 an edit for every type, 3.0 tables and 4.0 taps in the host's
# own precision.
FORMAT_VERSION = "5.0"
_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
_TABLE = re.compile(r"(layers\.\d+|readout_layer)\.(router|read|edits\.\w+)|taps\.\d+")
_HINT = "Make it again with `uhl port ADAPTER --target HOST --output DIR`."


class PortedRecord(Frozen):
    """Header of a ported adapter; `parts` are the names of its tensors, so that a lost one is noticed."""

    format_version: str = Field(FORMAT_VERSION, pattern=r"^\d{1,4}\.\d{1,4}$")
    parts: tuple[str, ...] = Field(max_length=100_000)
    task: Task
    target: HostRecord
    strategy: str


def save_ported(folder: Path, ported: PortedModel, target: HostRecord) -> Path:
    """Write `folder/ported.safetensors`, whole or not at all, and return its path.

    :raises OutputError: When it cannot be written.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in _flatten(compact(ported.folded)).items()}
    strategy = str(ported.report.get("strategy", "anchors"))
    record = PortedRecord(parts=tuple(sorted(tensors)), task=ported.task, target=target, strategy=strategy)
    path = folder / FILE_NAME
    write_bytes(path, save(tensors, metadata={"uhl-ported": record.model_dump_json()}))
    return path


def load_ported(
    folder: str | Path, model: nn.Module | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> PortedModel:
    """The ported model in a folder; the host is loaded by its recorded name unless a model is given.

    :raises FormatError: When the folder holds no whole ported adapter.
    :raises FingerprintError: When the host is not the one that it was made for.
    """
    path = Path(folder) / FILE_NAME
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
    if set(record.parts) != set(tensors):
        raise FormatError(f"{path} lacks or adds parts that its record names.", _HINT)
    if not all(_is_valid(name, value) for name, value in tensors.items()):
        raise FormatError(f"{path} holds values that are not finite floating-point numbers.", _HINT)
    host = _host_for(record, model, tokenizer)
    if host.fingerprint != record.target.fingerprint:
        raise FingerprintError(f"{path} was made for {record.target.name}, not for {host.name}.", _HINT)
    folded = _unflatten(tensors, record.task.kind, path)
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    wanted = _shapes(folded, host.map, len(record.task.labels))
    if found != wanted:
        odd = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise FormatError(f"{path} has parts that do not fit its host and task: {', '.join(odd[:5])[:200]}.", _HINT)
    moved = move(folded, host.device, host.map.embeddings.weight.dtype)
    return PortedModel(host, moved, record.task, {"strategy": record.strategy})


def _is_valid(name: str, value: Tensor) -> bool:
    """Finite floating-point numbers, packed in the tables and plain elsewhere."""
    if not _TABLE.fullmatch(name):
        return value.dtype in _DTYPES and bool(torch.isfinite(value).all())
    packed = value.dtype == torch.uint8 and value.dim() == 2 and value.shape[1] > TAIL_BYTES
    return packed and bool(torch.isfinite(CompactRows(value).values()).all())


def _host_for(record: PortedRecord, model: nn.Module | None, tokenizer: PreTrainedTokenizerBase | None) -> Host:
    if model is None:
        return load_host(record.target.name, revision=record.target.revision)
    if tokenizer is None:
        raise UsageError("a model needs its tokenizer.", "Call load_ported(folder, model, tokenizer).")
    return wrap_host(model, tokenizer)


def _flatten_layer(prefix: str, layer: FoldedLayer) -> dict[str, Tensor]:
    tables = {"router": layer.router, "read": layer.read} | {
        f"edits.{name}": edit for name, edit in layer.edits.items()
    }
    flat = {f"{prefix}.{name}": pack_rows(table).packed for name, table in tables.items()}
    flat |= {f"{prefix}.router_bias": layer.router_bias, f"{prefix}.read_bias": layer.read_bias}
    return flat | {f"{prefix}.gains.{name}": gain for name, gain in layer.gains.items()}


def _flatten(folded: FoldedAdapter) -> dict[str, Tensor]:
    readout = folded.readout
    flat = {"threshold": folded.threshold}
    for index, layer in folded.layers.items():
        flat |= _flatten_layer(f"layers.{index}", layer)
    flat |= {f"taps.{depth}": pack_rows(tap).packed for depth, tap in readout.taps.items()}
    flat |= {f"readout.{name}": getattr(readout, name) for name in ("bias", "out_weight", "out_bias")}
    if readout.pool is not None:
        flat["readout.pool"] = readout.pool
    if readout.shift is not None:
        flat["readout.shift"] = readout.shift
    if readout.layer is not None:
        flat |= _flatten_layer("readout_layer", readout.layer)
    return flat


def _shapes(folded: FoldedAdapter, host_map: HostMap, labels: int) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that a ported adapter with these parts has on this host; parts out of place are absent."""
    width, readout = host_map.hidden_size, folded.readout
    size = readout.bias.numel()

    def layer(prefix: str, part: FoldedLayer, outputs: dict[str, tuple[str, int]]) -> dict[str, tuple[int, ...]]:
        atoms = part.read_bias.numel()
        tables = {"router": width, "read": width}
        known = [name for name in part.gains if name in outputs]
        tables |= {f"edits.{edit}": columns for edit, columns in (outputs[name] for name in known)}
        vectors = ("router_bias", "read_bias", *(f"gains.{name}" for name in known))
        shapes: dict[str, tuple[int, ...]] = {f"{prefix}.{name}": (atoms,) for name in vectors}
        return shapes | {f"{prefix}.{name}": (atoms, columns + TAIL_BYTES) for name, columns in tables.items()}

    # No layer can choose more atoms than it has.
    parts = [*folded.layers.values(), *([readout.layer] if readout.layer is not None else [])]
    fewest = min((part.read_bias.numel() for part in parts), default=2)
    chosen = folded.threshold.numel()
    shapes: dict[str, tuple[int, ...]] = {"threshold": (chosen,)} if 1 <= chosen <= min(2, fewest) else {}
    for index, part in folded.layers.items():
        if index in range(host_map.num_hidden_layers):
            sites = host_map.layers[index].sites
            outputs = {name: next(iter(edit_columns([site], width).items())) for name, site in sites.items()}
            shapes |= layer(f"layers.{index}", part, outputs)
    for depth in readout.taps:
        if depth in range(host_map.num_hidden_layers + 1):
            shapes[f"taps.{depth}"] = (size, width + TAIL_BYTES)
    shapes |= {"readout.bias": (size,), "readout.out_weight": (labels, size), "readout.out_bias": (labels,)}
    if folded.kind == "sequence":
        shapes["readout.pool"] = (size,)
    if readout.shift is not None:
        shapes["readout.shift"] = (size,)
    if readout.layer is not None:
        shapes |= layer("readout_layer", readout.layer, {"readout": ("readout", size)})
        shapes.setdefault("readout_layer.edits.readout", (readout.layer.read_bias.numel(), size + TAIL_BYTES))
    if not readout.taps:
        shapes[f"taps.{host_map.num_hidden_layers}"] = (size, width + TAIL_BYTES)
    return shapes


def _unflatten_layer(prefix: str, tensors: dict[str, Tensor]) -> FoldedLayer:
    def by_type(part: str) -> dict[str, Tensor]:
        start = f"{prefix}.{part}."
        return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}

    return FoldedLayer(
        router=CompactRows(tensors[f"{prefix}.router"]),
        router_bias=tensors[f"{prefix}.router_bias"],
        read=CompactRows(tensors[f"{prefix}.read"]),
        read_bias=tensors[f"{prefix}.read_bias"],
        edits={name: CompactRows(table) for name, table in by_type("edits").items()},
        gains=by_type("gains"),
    )


def _unflatten(tensors: dict[str, Tensor], kind: str, path: Path) -> FoldedAdapter:
    try:
        indices = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("layers.")})
        layers = {index: _unflatten_layer(f"layers.{index}", tensors) for index in indices}
        readout = FoldedReadout(
            taps={
                int(name.split(".")[1]): CompactRows(tap) for name, tap in tensors.items() if name.startswith("taps.")
            },
            bias=tensors["readout.bias"],
            layer=_unflatten_layer("readout_layer", tensors) if "readout_layer.read" in tensors else None,
            pool=tensors.get("readout.pool"),
            out_weight=tensors["readout.out_weight"],
            out_bias=tensors["readout.out_bias"],
            shift=tensors.get("readout.shift"),
        )
        return FoldedAdapter(tensors["threshold"], layers, readout, kind)
    except (KeyError, ValueError, IndexError) as error:
        raise FormatError(f"{path} lacks the part {error}.", _HINT) from error
