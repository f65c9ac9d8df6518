"""The adapter file, format 1.1: one safetensors file, read without torch and without trust.

Header metadata: one key, `uhl`, holding the manifest (`schema.Manifest`) as JSON.  Tensors:

| name | dtype and shape | meaning |
|---|---|---|
| P, each 8-bit parameter of `layout.parameter_shapes` | int8, its shape | codes -127..127 |
| P, each 4-bit parameter (mixer, delta_theta) | uint8 [ceil(n / 2)] | codes -7..7 plus 8, two a byte, low first |
| P.scale | float32 [rows] (a vector is one row) | value = code * scale |
| anchors.codes | uint8 | canonical coordinates [knots, N, d0], entropy-coded codes, see `packing.pack_levels` |
| anchors.scale | float32 [knots, d0] | one scale per coordinate and knot |
| anchors.texts | uint8 | zlib of the anchor texts, UTF-8, joined by newlines |
| anchors.words | uint8 [ceil(words / 8)] | bit i (most significant first): is word i of all texts an anchor word? |

Where the manifest has a record of a feature bank (W words, F = readout_size + num_labels), also:

| name | dtype and shape | meaning |
|---|---|---|
| features.codes | uint8 | readout features and head logits [W, F], entropy-coded codes |
| features.scale | float32 [F] | value = code * scale + mean |
| features.mean | float32 [F] | |
| features.shift | float32 [readout_size] | what the updates add to the readout's features on the source, on average |
| features.texts, features.words | uint8 | as those of the anchors: more texts, and their words with features |

Nothing else may stand in the file.  Minor versions may add keys that older readers refuse; a newer major
version is refused as such.  Same content gives the same bytes: no time stamps, sorted keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from uhl_cli.align.texts import AnchorTexts, word_spans
from uhl_cli.codes.layout import bits_of, parameter_shapes
from uhl_cli.codes.packing import (
    compress_text,
    decompress_text,
    pack_levels,
    pack_nibbles,
    unpack_levels,
    unpack_nibbles,
)
from uhl_cli.errors import FormatError, NewerFormatError
from uhl_cli.files import write_bytes
from uhl_cli.schema import AdapterConfig, AnchorRecord, FeatureRecord, Manifest

FORMAT_VERSION = "1.1"
MAX_FILE_BYTES = 64_000_000
ANCHOR_PARTS = ("anchors.codes", "anchors.scale", "anchors.texts", "anchors.words")
FEATURE_PARTS = tuple(f"features.{name}" for name in ("codes", "mean", "scale", "shift", "texts", "words"))
_HINT = "The file is damaged or was not written by uhl; get it again from its source."

Codes = npt.NDArray[np.int8]


@dataclass(frozen=True)
class Quantised:
    """Integer codes and one scale per row (of anchors: per coordinate and knot)."""

    codes: Codes
    scales: Floats


@dataclass(frozen=True)
class Features:
    """What the source's readout sees at the words of more texts: `codes` [W, F], one scale and one mean a column.

    `shift` [readout_size] is what the updates add to its features there, on average.
    """

    anchors: AnchorTexts
    codes: Quantised
    mean: Floats
    shift: Floats


@dataclass(frozen=True)
class AdapterFile:
    """All that an adapter file holds."""

    manifest: Manifest
    parameters: dict[str, Quantised]
    anchors: AnchorTexts
    coordinates: Quantised
    features: Features | None = None


def to_bytes(content: AdapterFile) -> bytes:
    """The file's bytes; the same content gives the same bytes."""
    tensors: dict[str, np.ndarray] = {}
    for name, parameter in content.parameters.items():
        packed = bits_of(name) == 4
        tensors[name] = pack_nibbles(parameter.codes) if packed else parameter.codes
        tensors[f"{name}.scale"] = parameter.scales
    tensors["anchors.codes"] = pack_levels(content.coordinates.codes)
    tensors["anchors.scale"] = content.coordinates.scales
    tensors |= text_tensors("anchors", content.anchors)
    if content.features is not None:
        tensors["features.codes"] = pack_levels(content.features.codes.codes)
        tensors["features.scale"] = content.features.codes.scales
        tensors["features.mean"] = content.features.mean
        tensors["features.shift"] = content.features.shift
        tensors |= text_tensors("features", content.features.anchors)
    ordered = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    manifest = json.dumps(content.manifest.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
    content_bytes: bytes = save(ordered, metadata={"uhl": manifest})
    return content_bytes


def write_adapter(path: Path, content: AdapterFile) -> int:
    """Write the file whole or not at all and return its size in bytes.

    :raises OutputError: When it cannot be written.
    """
    data = to_bytes(content)
    write_bytes(path, data)
    return len(data)


def read_adapter(path: Path) -> AdapterFile:
    """Read and validate an adapter file.

    :raises FormatError: When it is missing, damaged, not ours, or breaks any rule of the format.
    :raises NewerFormatError: When its major version is newer than this reader's.
    """
    metadata, tensors = read_tensors(path)
    if "uhl" not in metadata:
        raise FormatError(f"{path} is a safetensors file but not a uhl adapter.", "Make one with `uhl pretrain`.")
    manifest = _read_manifest(metadata["uhl"], path)
    config = manifest.config
    shapes = parameter_shapes(config)
    _check_names(path, set(tensors), part_names(manifest))
    parameters = {name: read_parameter(name, shape, tensors) for name, shape in shapes.items()}
    anchors = read_texts("anchors", manifest.anchors, manifest.anchors.origin, tensors)
    scales = finite_scales("anchors.scale", tensors["anchors.scale"], (len(config.knots), config.canonical_size))
    shape = (len(config.knots), manifest.anchors.words, config.canonical_size)
    codes = read_coordinates(tensors["anchors.codes"], shape)
    coordinates = Quantised(codes, scales)
    return AdapterFile(manifest, parameters, anchors, coordinates, _read_features(manifest, tensors))


def read_coordinates(packed: np.ndarray, shape: tuple[int, int, int]) -> Codes:
    """The anchors' codes [knots, words, d0].

    :raises FormatError: When their type or number breaks the format.
    """
    return unpack_levels(of_type("anchors.codes", packed, np.uint8), shape, name="anchors.codes")


def part_names(manifest: Manifest) -> set[str]:
    """Names of all tensors that a file with this manifest has."""
    shapes = parameter_shapes(manifest.config)
    names = {*shapes, *(f"{name}.scale" for name in shapes), *ANCHOR_PARTS}
    return names | set(FEATURE_PARTS) if manifest.anchors.features is not None else names


def read_tensors(path: Path, *, key: str = "uhl") -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Header metadata and tensors of a safetensors file; no tensors where the metadata lacks `key`.

    :raises FormatError: When it is missing, too large, or not a whole safetensors file.
    """
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise FormatError(f"{path} is a folder, not an adapter file.", "Give the .safetensors file in it.")
        if not path.is_file():  # opening a pipe would wait for ever
            raise FormatError(f"{path} is not a regular file.", "Write the adapter to a file first.")
        if size > MAX_FILE_BYTES:
            raise FormatError(f"{path} holds {size:,} bytes; no adapter is larger than {MAX_FILE_BYTES:,}.", _HINT)
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            if key not in metadata:
                return metadata, {}
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError as error:
        raise FormatError(f"there is no file {path}.", "Check the path, or make one with `uhl pretrain`.") from error
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}.", "Check its permissions.") from error
    except (SafetensorError, TypeError, ValueError, AttributeError, KeyError) as error:
        # Besides its own error, the library lets unknown dtypes and odd headers through as these.
        raise FormatError(f"{path} is not a whole safetensors file ({error}).", _HINT) from error


def _read_manifest(text: str, path: Path) -> Manifest:
    try:
        content = json.loads(text)
        version = str(content["format_version"])
        major = int(version.split(".")[0])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError(f"the manifest of {path} is not readable.", _HINT) from error
    if major > int(FORMAT_VERSION.split(".")[0]):
        raise NewerFormatError(
            f"{path} has format {version}; this uhl reads up to {FORMAT_VERSION}.",
            "Run `pip install --upgrade uhl`.",
        )
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FormatError(
            f"the manifest of {path} breaks the format at {where or 'its top'}: {first['msg']}.", _HINT
        ) from error


def _check_names(path: Path, found: set[str], wanted: set[str]) -> None:
    if found != wanted:
        odd = sorted(found ^ wanted)
        raise FormatError(f"{path} lacks or adds the parts {', '.join(odd[:5])[:200]}.", _HINT)


def read_parameter(name: str, shape: tuple[int, ...], tensors: dict[str, np.ndarray]) -> Quantised:
    """The codes and scales of one parameter among the tensors of a file.

    :raises FormatError: When their types, shapes or values break the format.
    """
    rows = int(np.prod(shape[:-1], dtype=np.int64)) if len(shape) > 1 else 1
    scales = finite_scales(f"{name}.scale", tensors[f"{name}.scale"], (rows,))
    if bits_of(name) == 4:
        return Quantised(unpack_nibbles(of_type(name, tensors[name], np.uint8), shape, name=name), scales)
    codes: Codes = of_type(name, tensors[name], np.int8)
    if codes.shape != shape:
        raise FormatError(f"{name} has shape {codes.shape}; it must be {shape}.", _HINT)
    if codes.size and int(codes.min()) < -127:
        raise FormatError(f"{name} has a code outside -127..127.", _HINT)
    return Quantised(codes, scales)


def read_features(config: AdapterConfig, record: FeatureRecord, tensors: Mapping[str, np.ndarray]) -> Quantised:
    """The codes and scales of the feature bank among the tensors of a file.

    :raises FormatError: When their types, shapes or values, or those of means and shift, break the format.
    """
    columns = config.readout_size + config.num_labels
    scales = finite_scales("features.scale", tensors["features.scale"], (columns,))
    for name, size in (("features.mean", columns), ("features.shift", config.readout_size)):
        values = of_type(name, tensors[name], np.float32)
        if values.shape != (size,) or not bool((np.abs(values) <= MAX_VALUE).all()):  # NaN is not
            raise FormatError(f"{name} has another shape, or a value that is not finite or absurdly large.", _HINT)
    packed = of_type("features.codes", tensors["features.codes"], np.uint8)
    return Quantised(unpack_levels(packed, (record.words, columns), name="features.codes"), scales)


def _read_features(manifest: Manifest, tensors: dict[str, np.ndarray]) -> Features | None:
    record = manifest.anchors.features
    if record is None:
        return None
    codes = read_features(manifest.config, record, tensors)
    anchors = read_texts("features", record, manifest.anchors.origin, tensors)
    return Features(anchors, codes, tensors["features.mean"], tensors["features.shift"])


MAX_TEXT_BYTES = 4_000_000
MAX_VALUE = 1e6
_HINT = "The file is damaged or was not written by uhl; get it again from its source."

Floats = npt.NDArray[np.float32]


def of_type(name: str, value: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
    """The tensor itself.

    :raises FormatError: When it has another type.
    """
    if value.dtype != dtype:
        raise FormatError(f"{name} is {value.dtype}; it must be {np.dtype(dtype)}.", _HINT)
    return value


def finite_scales(name: str, value: np.ndarray, shape: tuple[int, ...]) -> Floats:
    """The scales themselves.

    :raises FormatError: When their shape or a value breaks the format.
    """
    scales: Floats = of_type(name, value, np.float32)
    if scales.shape != shape:
        raise FormatError(f"{name} has shape {scales.shape}; it must be {shape}.", _HINT)
    if not np.isfinite(scales).all() or float(scales.min(initial=0)) < 0 or float(scales.max(initial=0)) > MAX_VALUE:
        raise FormatError(f"{name} holds a value that is not finite, negative or absurdly large.", _HINT)
    return scales


def text_tensors(part: str, anchors: AnchorTexts) -> dict[str, np.ndarray]:
    """The tensors `part.texts` and `part.words`."""
    texts = compress_text("\n".join(anchors.texts))
    return {f"{part}.texts": texts, f"{part}.words": np.packbits(_word_mask(anchors))}


def read_texts(
    part: str, record: AnchorRecord | FeatureRecord, origin: str, tensors: Mapping[str, np.ndarray]
) -> AnchorTexts:
    """The texts of a part and the words chosen in them.

    :raises FormatError: When they cannot be read or differ from their record.
    """
    packed = of_type(f"{part}.texts", tensors[f"{part}.texts"], np.uint8)
    texts = tuple(decompress_text(packed, limit=MAX_TEXT_BYTES, name=f"{part}.texts").split("\n"))
    counts = [len(word_spans(text)) for text in texts]
    bits = of_type(f"{part}.words", tensors[f"{part}.words"], np.uint8)
    if bits.ndim != 1 or len(bits) != (sum(counts) + 7) // 8:
        raise FormatError(f"{part}.words does not fit the {part}' texts.", _HINT)
    mask = np.unpackbits(bits, count=sum(counts)).astype(np.bool_)
    chosen, start = [], 0
    for count in counts:
        chosen.append(tuple(int(ordinal) for ordinal in np.flatnonzero(mask[start : start + count])))
        start += count
    anchors = AnchorTexts(texts, tuple(chosen), origin)
    if len(texts) != record.texts or anchors.num_words != record.words or anchors.digest != record.digest:
        raise FormatError(f"the {part}' texts differ from what the manifest says of them.", _HINT)
    return anchors


def _word_mask(anchors: AnchorTexts) -> npt.NDArray[np.bool_]:
    """bool [words of all texts]: True at anchor words."""
    parts = []
    for text, ordinals in zip(anchors.texts, anchors.chosen, strict=True):
        mask = np.zeros(len(word_spans(text)), dtype=np.bool_)
        mask[list(ordinals)] = True
        parts.append(mask)
    return np.concatenate(parts)
