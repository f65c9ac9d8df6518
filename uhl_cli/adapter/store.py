"""The adapter file, format 1.0: one safetensors file, read without torch and without trust.

Header metadata: one key, `uhl`, holding the manifest (`schema.Manifest`) as JSON.  Tensors:

| name | dtype and shape | meaning |
|---|---|---|
| P, each 8-bit parameter of `layout.parameter_shapes` | int8, its shape | codes -127..127 |
| P, each 4-bit parameter (mixer, delta_theta) | uint8 [ceil(n / 2)] | codes -7..7 plus 8, two a byte, low first |
| P.scale | float32 [rows] (a vector is one row) | value = code * scale |
| anchors.codes | uint8 [ceil(knots N d0 / 2)] | canonical coordinates [knots, N, d0], 4-bit as above |
| anchors.scale | float32 [knots, d0] | one scale per coordinate and knot |
| anchors.texts | uint8 | zlib of the anchor texts, UTF-8, joined by newlines |
| anchors.words | uint8 [ceil(words / 8)] | bit i (most significant first): is word i of all texts an anchor word? |

Nothing else may stand in the file.  Minor versions may add keys that older readers refuse; a newer major
version is refused as such.  Same content gives the same bytes: no time stamps, sorted keys.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from uhl_cli.adapter.layout import bits_of, parameter_shapes
from uhl_cli.adapter.packing import compress_text, decompress_text, pack_nibbles, unpack_nibbles
from uhl_cli.align.texts import AnchorTexts, word_spans
from uhl_cli.errors import FormatError, NewerFormatError
from uhl_cli.files import write_bytes
from uhl_cli.schema import Manifest

FORMAT_VERSION = "1.0"
MAX_FILE_BYTES = 64_000_000
MAX_TEXT_BYTES = 4_000_000
_HINT = "The file is damaged or was not written by uhl; get it again from its source."

Codes = npt.NDArray[np.int8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Quantised:
    """Integer codes and one scale per row (of anchors: per coordinate and knot)."""

    codes: Codes
    scales: Floats


@dataclass(frozen=True)
class AdapterFile:
    """All that an adapter file holds."""

    manifest: Manifest
    parameters: dict[str, Quantised]
    anchors: AnchorTexts
    coordinates: Quantised


def to_bytes(content: AdapterFile) -> bytes:
    """The file's bytes; the same content gives the same bytes."""
    tensors: dict[str, np.ndarray] = {}
    for name, parameter in content.parameters.items():
        packed = bits_of(name) == 4
        tensors[name] = pack_nibbles(parameter.codes) if packed else parameter.codes
        tensors[f"{name}.scale"] = parameter.scales
    tensors["anchors.codes"] = pack_nibbles(content.coordinates.codes)
    tensors["anchors.scale"] = content.coordinates.scales
    tensors["anchors.texts"] = compress_text("\n".join(content.anchors.texts))
    tensors["anchors.words"] = np.packbits(_word_mask(content.anchors))
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
    _check_names(path, set(tensors), shapes)
    parameters = {name: read_parameter(name, shape, tensors) for name, shape in shapes.items()}
    anchors = _read_anchors(manifest, tensors)
    knots = len(config.knots)
    scales = _finite_scales("anchors.scale", tensors["anchors.scale"], (knots, config.canonical_size))
    codes = unpack_nibbles(
        _of_type("anchors.codes", tensors["anchors.codes"], np.uint8),
        (knots, manifest.anchors.words, config.canonical_size),
        name="anchors.codes",
    )
    return AdapterFile(manifest, parameters, anchors, Quantised(codes, scales))


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


def _check_names(path: Path, found: set[str], shapes: dict[str, tuple[int, ...]]) -> None:
    wanted = {"anchors.codes", "anchors.scale", "anchors.texts", "anchors.words"}
    wanted |= set(shapes) | {f"{name}.scale" for name in shapes}
    if found != wanted:
        odd = sorted(found ^ wanted)
        raise FormatError(f"{path} lacks or adds the parts {', '.join(odd[:5])[:200]}.", _HINT)


def _of_type(name: str, value: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
    if value.dtype != dtype:
        raise FormatError(f"{name} is {value.dtype}; it must be {np.dtype(dtype)}.", _HINT)
    return value


def _finite_scales(name: str, value: np.ndarray, shape: tuple[int, ...]) -> Floats:
    scales: Floats = _of_type(name, value, np.float32)
    if scales.shape != shape:
        raise FormatError(f"{name} has shape {scales.shape}; it must be {shape}.", _HINT)
    if not np.isfinite(scales).all() or (scales.size and float(scales.min()) < 0) or float(scales.max(initial=0)) > 1e6:
        raise FormatError(f"{name} holds a value that is not finite, negative or absurdly large.", _HINT)
    return scales


def read_parameter(name: str, shape: tuple[int, ...], tensors: dict[str, np.ndarray]) -> Quantised:
    """The codes and scales of one parameter among the tensors of a file.

    :raises FormatError: When their types, shapes or values break the format.
    """
    rows = int(np.prod(shape[:-1], dtype=np.int64)) if len(shape) > 1 else 1
    scales = _finite_scales(f"{name}.scale", tensors[f"{name}.scale"], (rows,))
    if bits_of(name) == 4:
        return Quantised(unpack_nibbles(_of_type(name, tensors[name], np.uint8), shape, name=name), scales)
    codes: Codes = _of_type(name, tensors[name], np.int8)
    if codes.shape != shape:
        raise FormatError(f"{name} has shape {codes.shape}; it must be {shape}.", _HINT)
    if codes.size and int(codes.min()) < -127:
        raise FormatError(f"{name} has a code outside -127..127.", _HINT)
    return Quantised(codes, scales)


def _word_mask(anchors: AnchorTexts) -> npt.NDArray[np.bool_]:
    """bool [words of all texts]: True at anchor words."""
    parts = []
    for text, ordinals in zip(anchors.texts, anchors.chosen, strict=True):
        mask = np.zeros(len(word_spans(text)), dtype=np.bool_)
        mask[list(ordinals)] = True
        parts.append(mask)
    return np.concatenate(parts)


def _read_anchors(manifest: Manifest, tensors: dict[str, np.ndarray]) -> AnchorTexts:
    record = manifest.anchors
    packed = _of_type("anchors.texts", tensors["anchors.texts"], np.uint8)
    texts = tuple(decompress_text(packed, limit=MAX_TEXT_BYTES, name="anchors.texts").split("\n"))
    counts = [len(word_spans(text)) for text in texts]
    bits = _of_type("anchors.words", tensors["anchors.words"], np.uint8)
    if bits.ndim != 1 or len(bits) != (sum(counts) + 7) // 8:
        raise FormatError("anchors.words does not fit the anchor texts.", _HINT)
    mask = np.unpackbits(bits, count=sum(counts)).astype(np.bool_)
    chosen, start = [], 0
    for count in counts:
        chosen.append(tuple(int(ordinal) for ordinal in np.flatnonzero(mask[start : start + count])))
        start += count
    anchors = AnchorTexts(texts, tuple(chosen), record.origin)
    if len(texts) != record.texts or anchors.num_words != record.words or anchors.digest != record.digest:
        raise FormatError("the anchor texts differ from what the manifest says of them.", _HINT)
    return anchors
