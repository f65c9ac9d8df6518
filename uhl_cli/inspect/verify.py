"""Every invariant of the two file formats, checked one by one, going on after what is wrong.

What the readers refuse is found here too, but all of it at once; on top come what no reader needs: the size limit,
counts that agree with each other, and that writing the content again gives the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError
from safetensors.numpy import load, save

from uhl_cli.align.texts import AnchorTexts, word_spans
from uhl_cli.codes.layout import bits_of, parameter_shapes
from uhl_cli.codes.packing import decompress_text, pack_nibbles
from uhl_cli.errors import FormatError, UhlError
from uhl_cli.formats.adapter import (
    ANCHOR_PARTS,
    FEATURE_PARTS,
    FORMAT_VERSION,
    MAX_TEXT_BYTES,
    MAX_VALUE,
    read_adapter,
    read_coordinates,
    read_features,
    read_parameter,
    read_tensors,
    to_bytes,
)
from uhl_cli.formats.task import FORMAT_VERSION as TASK_FORMAT_VERSION
from uhl_cli.formats.task import TaskRecord, read_task, task_parameter_shapes, task_to_bytes
from uhl_cli.inspect.report import FileKind
from uhl_cli.metrics import Score
from uhl_cli.schema import AdapterConfig, AnchorRecord, FeatureRecord, Manifest

MAX_BYTES = 1_000_000

Tensors = Mapping[str, np.ndarray]


def find_problems(path: Path, data: bytes) -> tuple[FileKind | None, str | None, tuple[str, ...]]:
    """Kind and format version of a file as far as they can be told, and one line for each broken invariant.

    :param data: The bytes of the file at `path`.
    """
    problems = [f"the file holds {len(data):,} bytes; at most {MAX_BYTES:,} are allowed"] * (len(data) > MAX_BYTES)
    try:
        metadata, tensors = read_tensors(path)
        if "uhl" not in metadata:
            metadata, tensors = read_tensors(path, key="uhl-task")
    except FormatError as error:
        return None, None, (*problems, one_line(error.message))
    if "uhl" in metadata:
        kind: FileKind = "adapter"
        problems += _adapter_problems(path, metadata["uhl"], tensors, data)
    elif "uhl-task" in metadata:
        kind = "task"
        problems += _task_problems(path, metadata["uhl-task"], tensors, data)
    else:
        return None, None, (*problems, "the header holds neither an adapter's manifest nor a task file's record")
    version = fields(metadata["uhl" if kind == "adapter" else "uhl-task"]).get("format_version")
    # The same fault may be met on two ways.
    known = isinstance(version, str) and VERSION.fullmatch(version) is not None
    return kind, version if known else None, tuple(dict.fromkeys(problems))


def _adapter_problems(path: Path, text: str, tensors: Tensors, data: bytes) -> Iterator[str]:
    found = [*header_problems("manifest", text, Manifest, FORMAT_VERSION)]
    manifest = parsed(Manifest, fields(text))
    config = parsed(AdapterConfig, fields(text).get("config")) if manifest is None else manifest.config
    if manifest is not None:
        found += training_problems(manifest)
        if manifest.atoms_per_token is not None and manifest.atoms_per_token > manifest.config.top_k:
            found.append(f"atoms_per_token is {manifest.atoms_per_token:g}, more than top_k, {manifest.config.top_k}")
        found += fingerprint_problems("source", manifest)
    if config is None:
        found.append("the parts cannot be checked without a valid configuration")
    else:
        shapes = parameter_shapes(config)
        record = None if manifest is None else manifest.anchors.features
        # Without a readable manifest, the file itself says whether it means to have features.
        featured = record is not None if manifest is not None else any(name in FEATURE_PARTS for name in tensors)
        names = {*shapes, *(f"{name}.scale" for name in shapes), *ANCHOR_PARTS, *(FEATURE_PARTS if featured else ())}
        found += _name_problems(names, tensors)
        if record is not None:
            found += _feature_problems(config, record, tensors)
        found += _part_problems(shapes, tensors)
    found += _anchor_problems(manifest, config, tensors)
    yield from found
    yield from _rewriting_problems(lambda: to_bytes(read_adapter(path)), data, known=bool(found))


def _task_problems(path: Path, text: str, tensors: Tensors, data: bytes) -> Iterator[str]:
    found = [*header_problems("record", text, TaskRecord, TASK_FORMAT_VERSION)]
    record = parsed(TaskRecord, fields(text))
    if record is None:
        found.append("the parts cannot be checked without a valid record")
    else:
        shapes = task_parameter_shapes(record)
        found += training_problems(record)
        found += score_problems("before", record.before)
        found += fingerprint_problems("target", record)
        found += _name_problems({*shapes, *(f"{name}.scale" for name in shapes)}, tensors)
        found += _part_problems(shapes, tensors)
    yield from found
    yield from _rewriting_problems(lambda: task_to_bytes(read_task(path)), data, known=bool(found))


def _name_problems(wanted: set[str], tensors: Tensors) -> Iterator[str]:
    yield from (f"the part {name} is missing" for name in sorted(wanted - set(tensors)))
    yield from (one_line(f"the part {name} does not belong in the file") for name in sorted(set(tensors) - wanted))


def _part_problems(shapes: Mapping[str, tuple[int, ...]], tensors: Tensors) -> Iterator[str]:
    """What the reader refuses of every parameter: its codes and its scales each checked beside a good other half."""
    for name, shape in shapes.items():
        scale = f"{name}.scale"
        codes = np.zeros(shape, dtype=np.int8)
        good = {
            name: pack_nibbles(codes) if bits_of(name) == 4 else codes,
            scale: np.ones(codes.size // shape[-1] if len(shape) > 1 else 1, dtype=np.float32),
        }
        for half in (name, scale):
            if half in tensors:
                yield from _refusal(partial(read_parameter, name, shape, good | {half: tensors[half]}))


def _anchor_problems(manifest: Manifest | None, config: AdapterConfig | None, tensors: Tensors) -> Iterator[str]:
    anchors, problems = _texts_and_problems("anchor", None if manifest is None else manifest.anchors, tensors)
    yield from problems
    if config is None:
        return
    knots, size = len(config.knots), config.canonical_size
    if "anchors.scale" in tensors:
        yield from _scale_problems("anchors.scale", tensors["anchors.scale"], (knots, size))
    words = manifest.anchors.words if manifest is not None else anchors.num_words if anchors is not None else None
    if "anchors.codes" in tensors and words is not None:
        shape = (knots, words, size)
        yield from _refusal(lambda: read_coordinates(tensors["anchors.codes"], shape))


def _feature_problems(config: AdapterConfig, record: FeatureRecord, tensors: Tensors) -> Iterator[str]:
    """What the reader refuses of the feature bank, its numbers and its texts."""
    if all(name in tensors for name in ("features.codes", "features.mean", "features.scale", "features.shift")):
        yield from _refusal(lambda: read_features(config, record, tensors))
    yield from _texts_and_problems("feature", record, tensors)[1]


def _texts_and_problems(
    part: str, record: AnchorRecord | FeatureRecord | None, tensors: Tensors
) -> tuple[AnchorTexts | None, list[str]]:
    """The texts of a part, anchor or feature, where they can be read, and in what they differ from their record."""
    names = (f"{part}s.texts", f"{part}s.words")
    if not all(name in tensors for name in names):
        return None, []
    texts, problem = _read_texts(*names, tensors)
    problems = [problem] if problem else []
    if texts is not None and record is not None:
        for name, said, counted in (
            ("texts", record.texts, len(texts.texts)),
            ("words", record.words, texts.num_words),
        ):
            if said != counted:
                problems.append(f"the manifest says {said:,} {part} {name}; the file holds {counted:,}")
        if texts.digest != record.digest:
            problems.append(f"the digest of the {part}s is not the one in the manifest")
    return texts, problems


def _read_texts(texts_name: str, words_name: str, tensors: Tensors) -> tuple[AnchorTexts | None, str]:
    """The texts, or None and what is wrong with them."""
    packed, bits = tensors[texts_name], tensors[words_name]
    for name, value in ((texts_name, packed), (words_name, bits)):
        if value.dtype != np.uint8:
            return None, f"{name} is {value.dtype}; it must be uint8"
    try:
        texts = tuple(decompress_text(packed, limit=MAX_TEXT_BYTES, name=texts_name).split("\n"))
    except FormatError as error:
        return None, one_line(error.message).rstrip(".")
    counts = [len(word_spans(text)) for text in texts]
    if bits.ndim != 1 or len(bits) != (sum(counts) + 7) // 8:
        return None, f"{words_name} holds {bits.size:,} bytes; {(sum(counts) + 7) // 8:,} are needed for the texts"
    flags = np.split(np.unpackbits(bits, count=sum(counts)), np.cumsum(counts)[:-1])
    chosen = tuple(tuple(int(ordinal) for ordinal in np.flatnonzero(part)) for part in flags)
    return AnchorTexts(texts, chosen, ""), ""


def _scale_problems(name: str, scales: np.ndarray, shape: tuple[int, ...]) -> Iterator[str]:
    if scales.dtype != np.float32 or scales.shape != shape:
        yield f"{name} is {scales.dtype} {scales.shape}; it must be float32 {shape}"
    elif not bool(((scales >= 0) & (scales <= MAX_VALUE)).all()):  # NaN is neither
        yield f"{name} holds a value that is not finite, negative or absurdly large"


def _refusal(read: Callable[[], object]) -> Iterator[str]:
    try:
        read()
    except FormatError as error:
        yield one_line(error.message).rstrip(".")


def _rewriting_problems(rewrite: Callable[[], bytes], data: bytes, *, known: bool) -> Iterator[str]:
    """Whether reading and writing the content again gives the same bytes.

    :param known: Something is wrong already; then what the reader says of it is no news.
    """
    try:
        again = rewrite()
    except UhlError as error:
        if not known:
            yield one_line(error.message).rstrip(".")
        return
    if _with_compressed_of(again, data) != data:
        same = next((index for index, (a, b) in enumerate(zip(again, data, strict=False)) if a != b), len(again))
        yield f"writing the content again gives other bytes, from byte {min(same, len(data)):,} on"


def _with_compressed_of(again: bytes, data: bytes) -> bytes:
    """`again` with the compressed texts and codes of `data`: builds of zlib differ in how they compress the same."""
    mine, given = load(again), load(data)
    parts = ("anchors.codes", "anchors.texts", "features.codes", "features.texts")
    compressed = [name for name in parts if name in mine]
    if again == data or not compressed:
        return again
    mine |= {name: given[name] for name in compressed}
    header = json.loads(again[8 : 8 + int.from_bytes(again[:8], "little")])
    replaced: bytes = save(mine, metadata=header["__metadata__"])
    return replaced


VERSION = re.compile(r"[0-9]{1,4}\.[0-9]{1,4}")
# Intervals are computed in floating point and may pass their bounds by a rounding.
_ROUNDING = 1e-9
_SHA256 = re.compile(r"[0-9a-f]{64}")

Record = TypeVar("Record", bound=BaseModel)


def fields(text: str) -> dict[str, Any]:
    """The header's JSON as far as it is an object."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def parsed(kind: type[Record], content: object) -> Record | None:
    """A record as the readers take it, or None.  Through JSON: lists stand for tuples there."""
    try:
        return kind.model_validate_json(json.dumps(content))
    except (ValueError, RecursionError):  # a ValidationError is a ValueError
        return None


def header_problems(name: str, text: str, kind: type[BaseModel], newest: str) -> Iterator[str]:
    """Every field that breaks the schema, and a format that is newer than this reader's."""
    version = str(fields(text).get("format_version", ""))
    if VERSION.fullmatch(version) and int(version.split(".")[0]) > int(newest.split(".")[0]):
        yield f"the format version is {version}; this uhl knows up to {newest}"
    try:
        kind.model_validate_json(text)
    except ValidationError as error:
        for entry in error.errors():
            where = ".".join(str(part) for part in entry["loc"])
            yield one_line(f"the {name} breaks the format at {where or 'its top'}: {entry['msg']}")


def training_problems(record: Manifest | TaskRecord) -> Iterator[str]:
    """Counts, digests and scores that have to agree with each other."""
    total, examples = sum(record.label_counts), record.training.train_examples
    if record.config.kind == "sequence" and total != examples:
        yield f"the label counts sum to {total:,}; the training had {examples:,} examples"
    if record.config.kind == "tokens" and total < examples:
        yield f"the label counts sum to {total:,} words; the training had {examples:,} sentences"
    if not _SHA256.fullmatch(record.training.train_digest):
        yield "training.train_digest is not a SHA-256 digest"
    yield from score_problems("score", record.score)


def score_problems(name: str, score: Score | None) -> Iterator[str]:
    """A score or an interval outside 0 to 1, or an interval upside down.

    The value may lie outside its interval: that of a bootstrap's percentiles does not promise to hold it.
    """
    if score is None:
        return
    interval = f"{name}: {score.value:g} with the interval [{score.low:g}, {score.high:g}]"
    if not all(-_ROUNDING <= value <= 1 + _ROUNDING for value in (score.value, score.low, score.high)):
        yield f"{interval} is not within 0 and 1"
    if score.low > score.high + _ROUNDING:
        yield f"{interval} is upside down"


def fingerprint_problems(name: str, record: Manifest | TaskRecord) -> Iterator[str]:
    """A host's fingerprint that no host can have; `name` is the field that holds the host."""
    fingerprint = record.source.fingerprint if isinstance(record, Manifest) else record.target.fingerprint
    if not _SHA256.fullmatch(fingerprint.digest):
        yield f"{name}.fingerprint.digest is not a SHA-256 digest"
    for field in ("architecture", "model_type"):
        if not getattr(fingerprint, field).strip():
            yield f"{name}.fingerprint.{field} is empty"


def one_line(text: str) -> str:
    """One line that no terminal takes for a command: a stranger's file may name its parts as it likes."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))
