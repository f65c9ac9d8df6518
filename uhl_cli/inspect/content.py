"""What is in an adapter, a task file or a ported folder: parts to the byte, anchors, texts and related files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from uhl_cli.align.texts import AnchorTexts
from uhl_cli.codes.layout import READOUT_PARAMETERS, TAIL_BYTES, UPDATE_PARAMETERS, bits_of, is_table
from uhl_cli.data.tasks import Task
from uhl_cli.errors import DataError, FormatError, UsageError
from uhl_cli.formats.adapter import AdapterFile, Quantised, parse_adapter, parse_manifest, read_adapter, values_of
from uhl_cli.formats.container import ADAPTER, PORTED, TASK, Contents, Problems, read, read_record
from uhl_cli.formats.folder import LORA, PortedFile, PortedRecord, is_ported, parse_ported, ported_path
from uhl_cli.formats.task import TaskFile, TaskRecord, parse_task, read_task
from uhl_cli.inspect.report import (
    AdapterContent,
    AnchorSummary,
    AnchorText,
    AtomStatistics,
    FileKind,
    Group,
    InspectReport,
    LoraSummary,
    MixingWeights,
    Part,
    PortedContent,
    ReadoutSummary,
    RowStatistics,
    Similarity,
    TaskContent,
    TaskFileSummary,
    TransferSummary,
    TransferText,
)
from uhl_cli.schema import UPDATE_TYPES, AdapterConfig, Manifest, TransferRecord

TASK_FILE_ENDING = ".task.safetensors"
# Larger files next to a task file are not read as adapters; folders may hold whole models.
MAX_ADAPTER_BYTES = 1_000_000
_SCALE_OF = {"anchors.codes": "anchors.scale", "features.codes": "features.scale"}
# Entropy-coded parts, with a variable number of bits.
_CODED = ("anchors.codes", "features.codes", "transfer.outputs")
# Bits of other parts that are not parameters; texts have none.
_BITS: dict[str, int | None] = {
    "anchors.texts": None,
    "anchors.words": 1,
    "features.mean": 32,
    "features.shift": 32,
    "features.texts": None,
    "features.words": 1,
    "transfer.texts": None,
}


Content = AdapterFile | TaskFile | PortedFile
KINDS: dict[str, FileKind] = {ADAPTER.key: "adapter", TASK.key: "task", PORTED.key: "ported"}


class Opened(NamedTuple):
    """A file that was read: its bytes by tensor, and what they mean."""

    path: Path
    contents: Contents
    content: Content


def open_file(path: Path) -> Opened:
    """An adapter file, a task file or the file in a ported adapter's folder, whichever `path` is.

    :raises FormatError: When it is none of them, or is damaged.
    """
    problems = Problems(path)
    contents = read_any(path, problems)
    content = parse_any(contents, problems)
    assert content is not None  # problems are raised
    return Opened(path, contents, content)


def read_any(path: Path, problems: Problems) -> Contents:
    """The contents of an adapter file, a task file or a ported adapter's folder.

    :raises FormatError: When it is none of them, or cannot be read at all.
    """
    if is_ported(path):
        return read(ported_path(path), PORTED, problems=problems)
    return read(path, ADAPTER, TASK, problems=problems)


def parse_any(contents: Contents, problems: Problems) -> Content | None:
    """A file's parsed contents, or None if problems are collected and there are any.

    :raises FormatError: When a rule of the format is broken, unless problems are collected.
    """
    if contents.kind == ADAPTER:
        return parse_adapter(contents, problems)
    return parse_task(contents, problems) if contents.kind == TASK else parse_ported(contents, problems)


def parse_record(contents: Contents, problems: Problems) -> Manifest | TaskRecord | PortedRecord | None:
    """The record in a file's contents, or None if problems are collected and it has any.

    :raises FormatError: When it breaks a rule of the format, unless problems are collected.
    """
    if contents.kind == ADAPTER:
        return parse_manifest(contents, problems)
    if contents.kind == TASK:
        return read_record(contents, TaskRecord, problems)
    return read_record(contents, PortedRecord, problems)


def describe(opened: Opened, *, anchors: bool = False, transfer: bool = False) -> InspectReport:
    """Everything about a file.

    :param anchors: Whether to give the anchor texts.
    :param transfer: Whether to give the texts of the transfer set.
    :raises UsageError: When texts are asked for and it is not an adapter.
    :raises DataError: When the transfer set's texts are asked for and it is missing, or this package lacks its texts.
    """
    path, contents, content = opened
    adapter = task = ported = None
    if isinstance(content, AdapterFile):
        adapter = _adapter_content(path, content, contents, anchors=anchors, transfer=transfer)
    elif anchors or transfer:
        option = "--anchors" if anchors else "--transfer"
        raise UsageError(
            f"{path} is no adapter file, so it has no anchors and no transfer set.", f"Leave out {option}."
        )
    elif isinstance(content, TaskFile):
        task = _task_content(path, content, contents)
    else:
        ported = _ported_content(path, content)
    return InspectReport(
        file=str(path),
        kind=KINDS[contents.kind.key],
        format_version=contents.version,
        bytes=contents.file_bytes,
        adapter=adapter,
        task=task,
        ported=ported,
    )


def _adapter_content(
    path: Path, content: AdapterFile, contents: Contents, *, anchors: bool, transfer: bool
) -> AdapterContent:
    shapes = {name: entry.codes.shape for name, entry in content.parameters.items()}
    shapes["anchors.codes"] = content.coordinates.codes.shape
    shapes |= _text_shapes("anchors", content.anchors)
    if content.features is not None:
        shapes["features.codes"] = content.features.codes.codes.shape
        shapes["features.mean"] = content.features.mean.shape
        shapes["features.shift"] = content.features.shift.shape
        shapes |= _text_shapes("features", content.features.anchors)
    if content.transfer is not None:
        shapes |= transfer_shapes(content.transfer.record, content.manifest.config)
    parts = file_parts(contents, shapes)
    atoms = atom_statistics(content.parameters)
    task_files, unreadable = _task_files_beside(path, content.digest)
    return AdapterContent(
        digest=content.digest,
        manifest=content.manifest,
        parts=parts,
        atoms=atoms,
        mixing=mixing_summary(content.parameters, atoms.unused),
        anchors=_anchor_summary(content, texts=anchors),
        transfer=_transfer_summary(path, content, texts=transfer),
        readout=_readout(content.manifest.config, content.manifest.task, content.manifest.label_counts, parts),
        task_files=task_files,
        unreadable=unreadable,
    )


def _task_content(path: Path, content: TaskFile, contents: Contents) -> TaskContent:
    record = content.record
    delta = values_of(content.parameters["delta_theta"])
    parts = file_parts(contents, {name: entry.codes.shape for name, entry in content.parameters.items()})
    readout = None
    if not record.own_task:
        readout = _readout(record.config, record.task, record.label_counts, parts)
    return TaskContent(
        digest=contents.digest,
        record=record,
        parts=parts,
        types=UPDATE_TYPES,
        delta_theta=tuple(tuple(float(value) for value in row) for row in delta),
        root_mean_square=root_mean_square(delta),
        readout=readout,
        adapter=_adapter_beside(path, record.adapter),
    )


def _ported_content(path: Path, content: PortedFile) -> PortedContent:
    parts, tuned, lora = ported_parts(content.contents), content.record.tuned, content.lora
    summary = LoraSummary(
        rank=content.record.structure.lora_rank,
        modules=len(lora) // 2,
        parameters=sum(math.prod(tensor.shape) for tensor in lora.values()),
        bytes=sum(tensor.nbytes for tensor in lora.values()),
    )
    return PortedContent(
        digest=content.contents.digest,
        record=content.record,
        parts=parts,
        lora=summary if lora else None,
        adapter=None if tuned is None else _adapter_beside(ported_path(path).parent.absolute(), tuned.adapter),
    )


def ported_parts(contents: Contents) -> tuple[Part, ...]:
    """The header and every tensor of a ported adapter; their bytes sum to the file's size."""
    parts = [_header(contents)]
    for name, tensor in contents.tensors.items():
        table = is_table(name)
        group: Group = "LoRA" if name.startswith(LORA) else "readout" if name.startswith("readout.") else "updates"
        parts.append(
            Part(
                name=name,
                group=group,
                dtype=tensor.dtype,
                bits=8 * tensor.nbytes / max(math.prod(tensor.shape), 1),
                shape=(tensor.shape[0], tensor.shape[1] - TAIL_BYTES) if table else tensor.shape,
                scales=2 * tensor.shape[0] if table else 0,
                bytes=tensor.nbytes,
                share=tensor.nbytes / contents.file_bytes,
            )
        )
    return tuple(parts)


def file_parts(contents: Contents, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Part, ...]:
    """The header and every part with its scales; their bytes sum to the file's size.

    :param shapes: Shape of the values of every part, by its name; any other tensor is a part by itself.
    """
    total = contents.file_bytes
    parts = [_header(contents)]
    left = dict(contents.tensors)
    for name, shape in shapes.items():
        if name not in left:  # not every file has features
            continue
        codes, scales = left.pop(name), left.pop(_SCALE_OF.get(name, f"{name}.scale"), None)
        bits: float | None = round(8 * codes.nbytes / max(math.prod(shape), 1), 2) if name in _CODED else bits_of(name)
        num_bytes = codes.nbytes + (0 if scales is None else scales.nbytes)
        parts.append(
            Part(
                name=name,
                group=_group(name),
                dtype=codes.dtype,
                bits=_BITS.get(name, bits),
                shape=shape,
                scales=0 if scales is None else math.prod(scales.shape),
                bytes=num_bytes,
                share=num_bytes / total,
            )
        )
    for name, tensor in left.items():
        parts.append(
            Part(
                name=name,
                group="other",
                dtype=tensor.dtype,
                bits=None,
                shape=tensor.shape,
                scales=0,
                bytes=tensor.nbytes,
                share=tensor.nbytes / total,
            )
        )
    return tuple(parts)


def _header(contents: Contents) -> Part:
    num_bytes = contents.header_bytes
    return Part(
        name="header",
        group="header",
        dtype="json",
        bits=None,
        shape=(),
        scales=0,
        bytes=num_bytes,
        share=num_bytes / contents.file_bytes,
    )


def transfer_shapes(record: TransferRecord, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the transfer set's parts: lines of text, and codes by label and prediction."""
    lines = record.texts * (2 if record.pairs else 1)
    return {"transfer.texts": (lines,), "transfer.outputs": (config.num_labels - 1, record.predictions)}


def _text_shapes(part: str, anchors: AnchorTexts) -> dict[str, tuple[int, ...]]:
    return {f"{part}.texts": (len(anchors.texts),), f"{part}.words": (sum(anchors.counts()),)}


def _group(name: str) -> Group:
    if name.startswith("anchors."):
        return "anchors"
    if name.startswith("features."):
        return "features"
    if name.startswith("transfer."):
        return "transfer"
    if name in UPDATE_PARAMETERS:
        return "updates"
    if name in READOUT_PARAMETERS:
        return "readout"
    return "size" if name.startswith("size_") else "head-only control"


def _anchor_summary(content: AdapterFile, *, texts: bool) -> AnchorSummary:
    anchors = content.anchors
    features = None if content.features is None else content.features.anchors
    entries = None
    if texts:
        entries = tuple(
            AnchorText(text=text, spans=tuple(part.spans(index)))
            for part in (anchors, features)
            if part is not None
            for index, text in enumerate(part.texts)
        )
    return AnchorSummary(
        origin=anchors.origin,
        texts=len(anchors.texts),
        words=anchors.num_words,
        words_per_text=anchors.num_words / len(anchors.texts),
        texts_by_words=dict(sorted(Counter(len(ordinals) for ordinals in anchors.chosen).items())),
        knots=content.manifest.config.knots,
        digest=anchors.digest,
        feature_texts=0 if features is None else len(features.texts),
        feature_words=0 if features is None else features.num_words,
        entries=entries,
    )


def _transfer_summary(path: Path, content: AdapterFile, *, texts: bool) -> TransferSummary | None:
    stored, labels = content.transfer, content.manifest.task.labels
    if stored is None:
        if texts:
            raise DataError(f"{path} has no transfer set.", "Leave out --transfer.")
        return None
    classes = np.pad(stored.codes, ((0, 0), (1, 0))).argmax(1)
    counts = tuple(np.bincount(classes, minlength=len(labels)).tolist())
    entries = None
    if texts:
        examples, odds = stored.whole().whole(stored.record.texts)
        best = iter(odds.argmax(1).tolist())
        entries = tuple(
            TransferText(
                text=text,
                pair=None if examples.pairs is None else examples.pairs[row],
                labels=tuple(
                    labels[next(best)] for _ in range(1 if examples.words is None else len(examples.words[row]))
                ),
            )
            for row, text in enumerate(examples.texts)
        )
    return TransferSummary(record=stored.record, label_counts=counts, entries=entries)


def _readout(config: AdapterConfig, task: Task, label_counts: tuple[int, ...], parts: Iterable[Part]) -> ReadoutSummary:
    own = [part for part in parts if part.name in READOUT_PARAMETERS]
    return ReadoutSummary(
        kind=config.kind,
        inputs=len(config.knots) * config.canonical_size,
        hidden=config.readout_size,
        labels=task.labels,
        label_counts=label_counts,
        parameters=sum(math.prod(part.shape) for part in own),
        bytes=sum(part.bytes for part in own),
    )


def _task_files_beside(path: Path, digest: str) -> tuple[tuple[TaskFileSummary, ...], tuple[str, ...]]:
    """Task files in the adapter's folder that name its digest, and files that only end like task files."""
    found: list[TaskFileSummary] = []
    unreadable: list[str] = []
    for beside in _files_beside(path):
        if not beside.name.endswith(TASK_FILE_ENDING):
            continue
        try:
            record = read_task(beside).record
            num_bytes = beside.stat().st_size
        except (FormatError, OSError):
            unreadable.append(beside.name)
            continue
        if record.adapter == digest:
            found.append(
                TaskFileSummary(
                    file=beside.name,
                    task=record.task.name,
                    target=record.target,
                    own_task=record.own_task,
                    before=record.before,
                    score=record.score,
                    bytes=num_bytes,
                )
            )
    return tuple(found), tuple(unreadable)


def _adapter_beside(path: Path, digest: str) -> str | None:
    """Name of the adapter in the task file's folder that it belongs to."""
    for beside in _files_beside(path):
        if beside.name.endswith(TASK_FILE_ENDING) or beside.suffix != ".safetensors":
            continue
        try:
            if beside.stat().st_size <= MAX_ADAPTER_BYTES and read_adapter(beside).digest == digest:
                return beside.name
        except (FormatError, OSError):  # an unreadable file cannot be identified as the adapter
            continue
    return None


def _files_beside(path: Path) -> Iterable[Path]:
    """Regular files in the folder of `path`, itself left out, in the order of their names."""
    try:
        return sorted(entry for entry in path.parent.iterdir() if entry.is_file() and entry.name != path.name)
    except OSError:  # without listing the folder, no related file is found
        return ()


Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

# Normalised depths of the heat map; the file does not depend on a host, so not on a number of layers.
DEPTHS = tuple(step / 10 for step in range(11))


def mixing_weights(parameters: Mapping[str, Quantised], depths: Sequence[float] = DEPTHS) -> Floats:
    """Mixing weights g(t, type), float32 [depths, types, atoms]; `canonical.mix` in numpy.

    :param depths: Normalised depths t in [0, 1].
    """
    names = ("mixer_in_weight", "mixer_in_bias", "mixer_out_weight", "mixer_out_bias", "delta_theta")
    weight, bias, out_weight, out_bias, delta = (values_of(parameters[name]) for name in names)
    steps = np.asarray(depths, dtype=np.float32)[:, None, None]
    # Column 0 takes the depth, the others are one for each type: [depths, types, hidden].
    hidden = np.sin(weight[:, 0] * steps + weight[:, 1:].T + bias)
    mixed: Floats = np.float32(1) + hidden @ out_weight.T + out_bias + delta
    return mixed


def mixing_summary(parameters: Mapping[str, Quantised], unused: Sequence[int]) -> MixingWeights:
    """Mean and standard deviation of the mixing weights over the used atoms, or over all where none is used."""
    weights = mixing_weights(parameters).astype(np.float64)
    used = np.setdiff1d(np.arange(weights.shape[2]), unused)
    if len(used):
        weights = weights[:, :, used]
    return MixingWeights(
        depths=DEPTHS, types=UPDATE_TYPES, mean=_rows(weights.mean(2)), deviation=_rows(weights.std(2))
    )


def atom_statistics(parameters: Mapping[str, Quantised]) -> AtomStatistics:
    """Norms, closest pairs and unused atoms of the dictionary."""
    u, v = (values_of(parameters[name]).astype(np.float64) for name in ("atoms_u", "atoms_v"))
    used = np.flatnonzero(u.any(1))
    cosines_u, cosines_v = _cosines(u[used]), _cosines(v[used])
    return AtomStatistics(
        count=len(u),
        unused=tuple(int(index) for index in np.flatnonzero(~u.any(1))),
        u=_row_statistics(u, used, cosines_u),
        v=_row_statistics(v, used, cosines_v),
        update=_closest(cosines_u * cosines_v, used),
    )


def root_mean_square(values: Floats) -> tuple[float, ...]:
    """Root mean square of every row of `values` [rows, columns]."""
    return tuple(float(value) for value in np.sqrt(np.square(values, dtype=np.float64).mean(1)))


def _row_statistics(rows: Doubles, used: npt.NDArray[np.int64], cosines: Doubles) -> RowStatistics:
    norms = np.linalg.norm(rows, axis=1)
    kept = norms[used] if len(used) else norms
    return RowStatistics(
        norms=tuple(float(norm) for norm in norms),
        minimum=float(kept.min()),
        median=float(np.median(kept)),
        maximum=float(kept.max()),
        closest=_closest(cosines, used),
    )


def _cosines(rows: Doubles) -> Doubles:
    """Cosines between all rows [rows, rows]; NaN where a row is zero, which has no direction."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, norms, out=np.full_like(rows, np.nan), where=norms > 0)
    cosines: Doubles = unit @ unit.T
    return cosines


def _closest(cosines: Doubles, used: npt.NDArray[np.int64]) -> Similarity | None:
    """The pair whose cosine is largest in magnitude: a mirrored atom is as redundant as a copy."""
    first, second = np.triu_indices(len(cosines), 1)
    pairs = cosines[first, second]
    if not np.isfinite(pairs).any():
        return None
    best = int(np.nanargmax(np.abs(pairs)))
    return Similarity(
        cosine=float(np.clip(pairs[best], -1.0, 1.0)), first=int(used[first[best]]), second=int(used[second[best]])
    )


def _rows(values: Doubles) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in values)
