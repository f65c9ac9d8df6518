"""The adapter file, format 2.0: read without torch, and validated.  See `container` for layout, digest, versions.

The record is the manifest (`schema.Manifest`).  Tensors:

| name | dtype and shape | meaning |
|---|---|---|
| P, each 8-bit parameter of `layout.parameter_shapes` | int8, its shape | codes -127..127 |
| P, each 4-bit parameter (mixer, delta_theta) | uint8 [ceil(n / 2)] | codes -7..7 plus 8, two a byte, low first |
| P.scale | float32 [rows] (a vector is one row) | value = code * scale |
| anchors.codes | uint8 | canonical coordinates [knots, N, d0], entropy-coded codes, see `packing.pack_levels` |
| anchors.scale | float32 [knots, d0] | one scale per coordinate and knot |
| anchors.texts | uint8 | zlib of the anchor texts, UTF-8, joined by newlines |
| anchors.words | uint8 [ceil(words / 8)] | bit i (most significant first): is word i of all texts an anchor word? |

Optional parts are listed in the manifest under `parts`, by name; all tensors of part `x` are named `x.` and words of
letters, digits and underscores, joined by dots.
The part `features`, a feature bank (W words, F = readout_size + num_labels):

| name | dtype and shape | meaning |
|---|---|---|
| features.codes | uint8 | readout features and head logits [W, F], entropy-coded codes |
| features.scale | float32 [F] | value = code * scale + mean |
| features.mean | float32 [F] | |
| features.shift | float32 [readout_size] | mean change of the readout's features by the updates on the source |
| features.texts, features.words | uint8 | as for the anchors: more texts, and their words with features |

The part `transfer`, a transfer set, is described in `transfer`.

A reader ignores a part that it does not know (and keeps it, when the file is written again), unless the manifest marks
the part as `required`; then the file is refused as newer.  The file may contain nothing else.

Bounds: values are limited to what training can produce, see `MAX_VALUE`, `MAX_FEATURE` and `MAX_GAIN`; sizes by their
products, `MAX_CODES` and `layout.MAX_PARAMETERS`, before anything is unpacked.  Loading an accepted file takes less
than 200 MB.

Format 1.1 had no digest and kept the record of the features in that of the anchors.  It can be read, and gets the
digest of the same content in format 2.0, so that task files fit both.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from uhl_cli.align.texts import AnchorTexts, count_words
from uhl_cli.codes.layout import bits_of, parameter_shapes
from uhl_cli.codes.packing import (
    MAX_LEVEL,
    compress_text,
    decompress_text,
    pack_levels,
    pack_nibbles,
    unpack_levels,
    unpack_nibbles,
)
from uhl_cli.errors import FormatError, NewerFormatError
from uhl_cli.files import write_bytes
from uhl_cli.formats import container
from uhl_cli.formats.container import ADAPTER, Contents, Problems, Stored
from uhl_cli.formats.transfer import StoredTransfer, names_of, parse_transfer, transfer_tensors
from uhl_cli.schema import AdapterConfig, AnchorRecord, FeatureRecord, Manifest

FORMAT_VERSION = ADAPTER.version
ANCHOR_PARTS = ("anchors.codes", "anchors.scale", "anchors.texts", "anchors.words")
FEATURE_PARTS = tuple(f"features.{name}" for name in ("codes", "mean", "scale", "shift", "texts", "words"))
MAX_TEXT_BYTES = 2_000_000
# Maximum number of codes of the coordinates, and of the features: ten times that of an adapter of 1 MB.
MAX_CODES = 16_000_000
# Largest value of a parameter or a coordinate.  A step of AdamW moves a parameter by about the learning rate at most:
# at 0.002, this is 50,000 steps in one direction.  In the shipped adapters all values are below 4.
MAX_VALUE = 100.0
# Largest value of a feature, a sum of such products; finite in float16.  In the shipped adapters all are below 40.
MAX_FEATURE = 10_000.0
# Gains of the size MLP, which are exponentials, must be within 1 / MAX_GAIN and MAX_GAIN for all host widths.
MAX_GAIN = 1_000.0
_WIDTHS = (16, 128, 1024, 16_384)
_PART_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_PART_TENSOR = re.compile(rf"({_PART_NAME.pattern})(\.\w{{1,64}}){{1,4}}", re.ASCII)

Codes = npt.NDArray[np.int8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Quantised:
    """Integer codes and one scale per row (of anchors: per coordinate and knot)."""

    codes: Codes
    scales: Floats


@dataclass(frozen=True)
class Features:
    """The source readout's features at the words of more texts: `codes` [W, F], one scale and one mean per column.

    `shift` [readout_size] is the mean change of these features by the updates.
    """

    anchors: AnchorTexts
    codes: Quantised
    mean: Floats
    shift: Floats


@dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter file.

    :param others: Tensors of optional parts that this uhl does not know.
    :param digest: The file's SHA-256, which task files refer to; empty if the content was not read from a file.
    """

    manifest: Manifest
    parameters: dict[str, Quantised]
    anchors: AnchorTexts
    coordinates: Quantised
    features: Features | None = None
    transfer: StoredTransfer | None = None
    others: Mapping[str, Stored] = field(default_factory=dict)
    digest: str = ""


def to_bytes(content: AdapterFile) -> bytes:
    """The file's bytes; the same content gives the same bytes.

    :raises FormatError: When the content exceeds a bound, so that no reader would accept it.
    """
    check_sizes(content.manifest)
    tensors = parameter_tensors(content.parameters)
    tensors |= {"anchors.codes": pack_levels(content.coordinates.codes), "anchors.scale": content.coordinates.scales}
    tensors |= text_tensors("anchors", content.anchors)
    features = content.features
    if features is not None:
        tensors |= {"features.codes": pack_levels(features.codes.codes), "features.scale": features.codes.scales}
        tensors |= {"features.mean": features.mean, "features.shift": features.shift}
        tensors |= text_tensors("features", features.anchors)
    if content.transfer is not None:
        tensors |= transfer_tensors(content.transfer)
    for name, value in tensors.items():
        if value.dtype == np.float32:
            check_values(name, value, value.shape)
    check_gains(content.parameters)
    return container.to_bytes(ADAPTER, content.manifest, tensors | dict(content.others))


def write_adapter(path: Path, content: AdapterFile) -> int:
    """Write the file atomically and return its size in bytes.

    :raises OutputError: When it cannot be written.
    :raises FormatError: When the content exceeds a bound.
    """
    data = to_bytes(content)
    write_bytes(path, data)
    return len(data)


def read_adapter(path: Path) -> AdapterFile:
    """Read and validate an adapter file.

    :raises FormatError: When it is missing, damaged, not an adapter file, or breaks any rule of the format.
    :raises NewerFormatError: When it needs a newer uhl.
    """
    problems = Problems(path)
    content = parse_adapter(container.read(path, ADAPTER, problems=problems), problems)
    assert content is not None  # problems are raised
    return content


def parse_adapter(contents: Contents, problems: Problems) -> AdapterFile | None:
    """The adapter in a file's contents, or None where problems are collected and there are any.

    :raises FormatError: When a rule of the format is broken, unless problems are collected.
    """
    manifest = parse_manifest(contents, problems)
    config = _config_alone(contents) if manifest is None else manifest.config
    if config is None:
        return None
    shapes = problems.attempt(parameter_shapes, config)
    if shapes is None:
        return None
    tensors = dict(contents.tensors)
    parameters = parse_parameters(shapes, tensors, problems)
    problems.attempt(check_gains, parameters)
    if manifest is None:
        return None
    found = {name: _PART_TENSOR.fullmatch(name) for name in tensors}
    others = {name: tensors[name] for name, match in found.items() if match and match[1] in manifest.parts.unknown}
    for name, part in manifest.parts.unknown.items():
        problems.attempt(_check_unknown, name, required=part.required, shapes=shapes)
    features, transfer = manifest.parts.features, manifest.parts.transfer
    wanted = {*shapes, *(f"{name}.scale" for name in shapes), *ANCHOR_PARTS, *others}
    wanted |= set(FEATURE_PARTS if features is not None else ())
    wanted |= set(names_of(transfer) if transfer is not None else ())
    check_names(tensors, wanted, problems)
    if problems.attempt(check_sizes, manifest) is None:
        return None
    size, knots = config.canonical_size, len(config.knots)
    anchors = parse_texts("anchors", manifest.anchors, manifest.anchors.origin, tensors, problems)
    coordinates = _parse_levels("anchors", (knots, manifest.anchors.words, size), (knots, size), tensors, problems)
    bank = None if features is None else _parse_features(manifest, features, tensors, problems)
    behaviour = None if transfer is None else parse_transfer(transfer, config, tensors, problems)
    if problems.found or anchors is None or coordinates is None:
        return None
    digest = contents.digest or container.digest_of(ADAPTER, manifest, contents.tensors)
    return AdapterFile(manifest, parameters, anchors, coordinates, bank, behaviour, others, digest)


def parse_manifest(contents: Contents, problems: Problems) -> Manifest | None:
    """The manifest in a file's contents, or None where problems are collected and it has any.

    :raises FormatError: When it breaks a rule of the format, unless problems are collected.
    """
    return container.read_record(contents, Manifest, problems, text=_as_current(contents))


def _as_current(contents: Contents) -> str | None:
    """A manifest of format 1.1 converted to this format; None if it already has this format."""
    if contents.version != "1.1":
        return None
    fields = json.loads(contents.record) | {"format_version": FORMAT_VERSION}
    anchors = fields.get("anchors")
    if isinstance(anchors, dict) and "features" in anchors:
        fields["parts"] = {"features": anchors.pop("features")}
    return json.dumps(fields)


def _config_alone(contents: Contents) -> AdapterConfig | None:
    """The configuration in a manifest that breaks the format elsewhere, so that the parts can still be checked."""
    try:
        return AdapterConfig.model_validate_json(json.dumps(json.loads(contents.record).get("config")))
    except ValueError:  # a ValidationError is one
        return None


def check_sizes(manifest: Manifest) -> bool:
    """Check the sizes after unpacking; always returns True.

    :raises FormatError: When the file would unpack to more than the format allows.
    """
    config, features = manifest.config, manifest.parts.features
    parameter_shapes(config)
    codes = {"anchors": len(config.knots) * manifest.anchors.words * config.canonical_size}
    if features is not None:
        codes["features"] = features.words * (config.readout_size + config.num_labels)
    if manifest.parts.transfer is not None:
        codes["transfer set"] = manifest.parts.transfer.predictions * (config.num_labels - 1)
    for name, count in codes.items():
        if count > MAX_CODES:
            raise FormatError(
                f"the {name} have {count:,} codes; at most {MAX_CODES:,} are allowed.",
                "Use fewer --num-anchors, --feature-words or texts of --transfer-set.",
            )
    return True


def _check_unknown(name: str, *, required: bool, shapes: Mapping[str, object]) -> None:
    if not _PART_NAME.fullmatch(name) or name in shapes or name == "anchors":
        raise FormatError(f"{name[:100]} is not a name of an optional part")
    if required:
        raise NewerFormatError(f"it needs the part {name}, which this uhl does not know", container.UPGRADE)


def check_names(tensors: Mapping[str, object], wanted: set[str], problems: Problems) -> None:
    """Report every part that is missing, or that does not belong in the file.

    :raises FormatError: When there is one, unless problems are collected.
    """
    for name in sorted(wanted - set(tensors)):
        problems.add(FormatError(f"the part {name} is missing"))
    for name in sorted(set(tensors) - wanted):
        problems.add(FormatError(f"the part {name[:100]} does not belong in the file"))


def parameter_tensors(parameters: Mapping[str, Quantised]) -> dict[str, np.ndarray]:
    """The tensors of parameters: codes (packed if they have 4 bits) and scales.

    :raises FormatError: When a value exceeds the bound.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, parameter in parameters.items():
        check_values(f"{name}.scale", parameter.scales, parameter.scales.shape)
        tensors[name] = pack_nibbles(parameter.codes) if bits_of(name) == 4 else parameter.codes
        tensors[f"{name}.scale"] = parameter.scales
    return tensors


def check_gains(parameters: Mapping[str, Quantised]) -> None:
    """Check the size MLP; computes `canonical.size_gains` in numpy.

    :raises FormatError: When its gains exceed the bound at the width of some host.
    """
    names = ("size_in_weight", "size_in_bias", "size_out_weight", "size_out_bias")
    if not all(name in parameters for name in names):
        return
    weight, bias, out_weight, out_bias = (values_of(parameters[name]).astype(np.float64) for name in names)
    steps = np.log10(_WIDTHS)[:, None] - 2.5
    inner = weight[:, 0] * steps + bias
    hidden = inner / (1 + np.exp(-inner.clip(-700)))
    if float(np.abs(hidden @ out_weight.T + out_bias).max()) > math.log(MAX_GAIN):
        raise FormatError(f"the size MLP gives gains beyond {MAX_GAIN:,.0f} or below a {MAX_GAIN:,.0f}th")


def values_of(entry: Quantised) -> Floats:
    """float32 values of integer codes [..., columns] with one scale per row; a vector is one row.

    Guarantee: equal to `convert.dequantised` bit for bit.
    """
    codes = entry.codes
    rows = codes.reshape(-1, codes.shape[-1]).astype(np.float32) * entry.scales[:, None]
    values: Floats = rows.reshape(codes.shape)
    return values


def parse_parameters(
    shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Stored], problems: Problems
) -> dict[str, Quantised]:
    """The parameters of the given shapes; those that are missing or break a rule are reported and left out.

    :raises FormatError: When a rule of the format is broken, unless problems are collected.
    """
    parameters = {}
    for name, shape in shapes.items():
        codes = scales = None
        if name in tensors:
            codes = problems.attempt(_parse_codes, name, shape, tensors[name])
        if f"{name}.scale" in tensors:
            rows = math.prod(shape[:-1])
            scales = problems.attempt(_parse_values, f"{name}.scale", tensors, (rows,))
        if codes is not None and scales is not None:
            parameters[name] = Quantised(codes, scales)
    return parameters


def _parse_codes(name: str, shape: tuple[int, ...], tensor: Stored) -> Codes:
    if bits_of(name) == 4:
        return unpack_nibbles(_array(name, tensor, "uint8"), shape, name=name)
    codes: Codes = _array(name, tensor, "int8")
    if codes.shape != shape:
        raise FormatError(f"{name} has shape {codes.shape}; it must be {shape}")
    if codes.size and int(codes.min()) < -127:
        raise FormatError(f"{name} has a code outside -127..127")
    return codes


def _parse_levels(
    part: str,
    shape: tuple[int, ...],
    scale_shape: tuple[int, ...],
    tensors: Mapping[str, Stored],
    problems: Problems,
) -> Quantised | None:
    """The entropy-coded codes `part.codes` and `part.scale`."""
    codes = scales = None
    name = f"{part}.codes"
    if name in tensors:
        codes = problems.attempt(lambda: unpack_levels(_array(name, tensors[name], "uint8"), shape, name=name))
    if f"{part}.scale" in tensors:
        scales = problems.attempt(_parse_values, f"{part}.scale", tensors, scale_shape)
    return None if codes is None or scales is None else Quantised(codes, scales)


def _parse_features(
    manifest: Manifest, record: FeatureRecord, tensors: Mapping[str, Stored], problems: Problems
) -> Features | None:
    config = manifest.config
    columns = config.readout_size + config.num_labels
    codes = _parse_levels("features", (record.words, columns), (columns,), tensors, problems)
    anchors = parse_texts("features", record, manifest.anchors.origin, tensors, problems)
    mean, shift = (
        problems.attempt(_parse_values, name, tensors, (size,)) if name in tensors else None
        for name, size in (("features.mean", columns), ("features.shift", config.readout_size))
    )
    if codes is None or anchors is None or mean is None or shift is None:
        return None
    return Features(anchors, codes, mean, shift)


def _array(name: str, tensor: Stored, dtype: str) -> np.ndarray:
    if tensor.dtype != dtype:
        raise FormatError(f"{name} is {tensor.dtype}; it must be {dtype}")
    return tensor.numpy()


def _parse_values(name: str, tensors: Mapping[str, Stored], shape: tuple[int, ...]) -> Floats:
    values: Floats = _array(name, tensors[name], "float32")
    check_values(name, values, shape)
    return values


def check_values(name: str, values: np.ndarray, shape: tuple[int, ...]) -> None:
    """Check scales, means or a shift.

    :raises FormatError: When their shape differs, or one is not finite, negative (a scale) or too large.
    """
    if values.shape != shape:
        raise FormatError(f"{name} has shape {values.shape}; it must be {shape}")
    part, _, last = name.rpartition(".")
    limit = MAX_FEATURE if part == "features" else MAX_VALUE
    lowest = -limit
    if last == "scale":  # times the largest code
        lowest, limit = 0.0, limit / (MAX_LEVEL if bits_of(part) == 4 or part in ("anchors", "features") else 127)
    if not bool(((values >= lowest) & (values <= limit)).all()):  # NaN is neither
        raise FormatError(f"{name} holds a value that is not finite or not within {lowest:g} and {limit:.4g}")


def text_tensors(part: str, anchors: AnchorTexts) -> dict[str, np.ndarray]:
    """The tensors `part.texts` and `part.words`."""
    texts = compress_text("\n".join(anchors.texts))
    return {f"{part}.texts": texts, f"{part}.words": np.packbits(_word_mask(anchors))}


def parse_texts(
    part: str,
    record: AnchorRecord | FeatureRecord,
    origin: str,
    tensors: Mapping[str, Stored],
    problems: Problems,
) -> AnchorTexts | None:
    """The texts of a part and the words chosen in them, or None where they cannot be read.

    :raises FormatError: When they break a rule or differ from their record, unless problems are collected.
    """
    if f"{part}.texts" not in tensors or f"{part}.words" not in tensors:
        return None
    anchors = problems.attempt(partial(_texts, part, record, origin, tensors))
    if anchors is None:
        return None
    if anchors.digest != record.digest:
        problems.add(FormatError(f"the digest of the {part} is not the one in the manifest"))
    return anchors


def _texts(part: str, record: AnchorRecord | FeatureRecord, origin: str, tensors: Mapping[str, Stored]) -> AnchorTexts:
    packed = _array(f"{part}.texts", tensors[f"{part}.texts"], "uint8")
    content = decompress_text(packed, limit=MAX_TEXT_BYTES, name=f"{part}.texts")
    number = content.count("\n") + 1
    if number != record.texts:
        raise FormatError(f"the manifest states {record.texts:,} texts of {part}; the file contains {number:,}")
    texts = tuple(content.split("\n"))
    counts = [count_words(text, record.word_rule) for text in texts]
    total = sum(counts)
    bits = _array(f"{part}.words", tensors[f"{part}.words"], "uint8")
    if bits.ndim != 1 or len(bits) != (total + 7) // 8:
        raise FormatError(f"{part}.words holds {bits.size:,} bytes; {(total + 7) // 8:,} are needed for the texts")
    mask = np.unpackbits(bits)
    if mask[total:].any():
        raise FormatError(f"{part}.words has bits after its end")
    words = int(np.count_nonzero(mask))
    if words != record.words:
        raise FormatError(f"the manifest states {record.words:,} words of {part}; the file contains {words:,}")
    chosen, start = [], 0
    for count in counts:
        chosen.append(tuple(np.flatnonzero(mask[start : start + count]).tolist()))
        start += count
    return AnchorTexts(texts, tuple(chosen), origin, record.word_rule)


def _word_mask(anchors: AnchorTexts) -> npt.NDArray[np.bool_]:
    """bool [words of all texts]: True at anchor words."""
    parts = []
    for count, ordinals in zip(anchors.counts(), anchors.chosen, strict=True):
        mask = np.zeros(count, dtype=np.bool_)
        mask[list(ordinals)] = True
        parts.append(mask)
    return np.concatenate(parts)
