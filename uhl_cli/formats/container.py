"""The container of every file that uhl writes: a safetensors file with a record, tensors and a digest.

Layout: the length of the header (8 bytes, little-endian), the header, the tensors without gaps.  The header is the
JSON of safetensors, padded with spaces to a multiple of 8 bytes.  Its metadata has two keys: the kind's own
(`Kind.key`) with the record, which is JSON too, and `sha256`.  Tensors are in the order of safetensors: wide types
first, then by name.

Guarantees:

* Same content, same bytes.  A reader accepts only the header that the writer would make from the same content.
* `sha256` is the SHA-256 of the whole file with 64 zeros in its own place, so any flipped bit is detected.  It protects
  against damage, not against an adversary, who can compute it too; hence every reader bounds sizes before it unpacks.
* A file is opened once; the digest is that of the parsed bytes.

Versions: a reader reads its own major version and those of `Kind.older`.  A newer major version is a
`NewerFormatError`.  A newer minor version is read if the record breaks no rule of this version; otherwise it is a
`NewerFormatError` too.

Importing this module does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from uhl_cli.errors import FormatError, NewerFormatError
from uhl_cli.files import write_bytes
from uhl_cli.schema import RESERVED_KINDS

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER_BYTES = 1_000_000
# A record of that size can break rules a hundred thousand times.
MAX_PROBLEMS = 100
DAMAGED = "The file is damaged or was not written by uhl; get it again from its source."
_PLACES = "a task file or the folder of a LoRA goes to --task-file, a ported adapter to `uhl predict`"
UPGRADE = "Run `pip install --upgrade uhl`."
_VERSION = re.compile(r"[0-9]{1,4}\.[0-9]{1,4}")
_NO_DIGEST = "0" * 64
# Names of numpy and torch for the types of safetensors, in its order; the digits are a value's bits.
_TYPES = {
    "I64": "int64",
    "F64": "float64",
    "F32": "float32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
}
_ORDER = list(_TYPES)
_WIDTHS = {name: int(re.sub(r"\D", "", name)) // 8 for name in _TYPES.values()}  # in bytes
_CODES = {name: code for code, name in _TYPES.items()}

Result = TypeVar("Result")
Record = TypeVar("Record", bound=BaseModel)
Arguments = ParamSpec("Arguments")


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    :param key: Key of the record in the header's metadata.
    :param version: Format version that this uhl writes.
    :param older: Older versions that it reads as well; those of major version 1 have no digest.
    :param hint: What to do about a damaged file.
    """

    key: str
    noun: str
    version: str
    max_bytes: int
    hint: str = DAMAGED
    older: tuple[str, ...] = ()


ADAPTER = Kind("uhl", "adapter", "2.0", 20_000_000, older=("1.1",))
TASK = Kind(
    "uhl-task", "task file", "2.1", 20_000_000, "Make it again with `uhl tune ADAPTER --target HOST --task TASK`."
)
PORTED = Kind(
    "uhl-ported",
    "ported adapter",
    "7.0",
    4_000_000_000,
    "Make it again with `uhl port ADAPTER --target HOST --output DIR`.",
)
CHECKPOINT = Kind(
    "uhl-checkpoint",
    "checkpoint",
    "1.0",
    1_000_000_000,
    "It is damaged or was written by an older uhl; start over without --resume.",
)
ALIGNMENT = Kind(
    "uhl-alignment", "kept alignment", "1.0", 1_000_000_000, "Remove it: it is made again when it is needed."
)
# The file in a ported adapter's folder.
PORTED_FILE = "ported.safetensors"
_KINDS = (ADAPTER, TASK, PORTED, CHECKPOINT, ALIGNMENT)


@dataclass(frozen=True)
class Stored:
    """A tensor's bytes as stored in a file; `dtype` is the name of its type in numpy and torch."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.data.nbytes

    def numpy(self) -> np.ndarray:
        """The tensor; it shares the file's memory.

        :raises FormatError: When numpy has no such type.
        """
        if self.dtype == "bfloat16":
            raise FormatError("a tensor is bfloat16, which numpy does not know", DAMAGED)
        return np.frombuffer(self.data, dtype=self.dtype).reshape(self.shape)

    def torch(self) -> Tensor:
        """The tensor; it shares the file's memory."""
        import torch  # lazy: adapters and task files are read without it

        dtype: torch.dtype = getattr(torch, self.dtype)
        if not self.nbytes:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(self.data, dtype=dtype).reshape(self.shape)


@dataclass(frozen=True)
class Contents:
    """Contents of a file, before its record and tensors are interpreted.

    :param record: The record's JSON.
    :param digest: The file's `sha256`; empty in formats that have none.
    :param file_bytes: Bytes of the file, `header_bytes` of them before the first tensor.
    """

    kind: Kind
    version: str
    record: str
    tensors: Mapping[str, Stored]
    digest: str
    file_bytes: int
    header_bytes: int


class Problems:
    """Problems of a file: raised at once, or the first `MAX_PROBLEMS` collected in `found` while the reader continues.

    A rule is a function that raises `FormatError`; `attempt` runs it.  So each rule is written once, for reading and
    for `inspect --verify`.
    """

    def __init__(self, path: Path, *, collect: bool = False, hint: str = DAMAGED) -> None:
        self._path, self._collect, self._hint = path, collect, hint
        self.found: list[str] = []

    def add(self, error: FormatError) -> None:
        """Raise the error, with the file's name, or collect its message.

        :raises FormatError: Unless problems are collected.
        """
        line = one_line(error.message).rstrip(".")
        if not self._collect:
            raise type(error)(f"{self._path}: {line}.", error.hint or self._hint) from error
        if len(self.found) < MAX_PROBLEMS and line not in self.found:
            self.found.append(line)

    def attempt(
        self, rule: Callable[Arguments, Result], *arguments: Arguments.args, **named: Arguments.kwargs
    ) -> Result | None:
        """The rule's result, or None if it raised and problems are collected.

        :raises FormatError: The rule's error, unless problems are collected.
        """
        try:
            return rule(*arguments, **named)
        except FormatError as error:
            self.add(error)
            return None


def one_line(text: str) -> str:
    """One line without control characters: an untrusted file may give its parts any name."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def to_bytes(kind: Kind, record: BaseModel | str, tensors: Mapping[str, np.ndarray | Tensor | Stored]) -> bytes:
    """The file's bytes.

    :param record: A model with the field `format_version`, or its JSON.
    """
    text = record if isinstance(record, str) else record_text(record)
    stored = _in_order({name: _stored(value) for name, value in tensors.items()})
    header = _header(kind, text, stored, _digest(kind, text, stored))
    return b"".join([header, *(tensor.data for tensor in stored.values())])


def write(path: Path, kind: Kind, record: BaseModel | str, tensors: Mapping[str, np.ndarray | Tensor | Stored]) -> int:
    """Write a file atomically and return its size in bytes.

    :raises OutputError: When it cannot be written.
    """
    data = to_bytes(kind, record, tensors)
    write_bytes(path, data)
    return len(data)


def digest_of(kind: Kind, record: BaseModel | str, tensors: Mapping[str, np.ndarray | Tensor | Stored]) -> str:
    """The `sha256` of the file from `to_bytes`."""
    text = record if isinstance(record, str) else record_text(record)
    return _digest(kind, text, _in_order({name: _stored(value) for name, value in tensors.items()}))


def record_text(record: BaseModel) -> str:
    """The record's JSON as stored in a file: with sorted keys."""
    return _canonical(record.model_dump(mode="json"))


def read_bytes(path: Path, limit: int, noun: str) -> bytearray:
    """All bytes of a regular file of at most `limit` bytes.

    :raises FormatError: When there is no such file, or it cannot be read or is larger.
    """
    try:
        if (path / PORTED_FILE).is_file():
            tuned = f"with --task-file {path} for what was tuned"
            hint = f"Give the adapter file, {tuned}; `uhl predict {path}` labels texts."
            raise FormatError(f"{path} is the folder of a ported adapter, not a file.", hint)
        if path.is_dir():
            model = any((path / name).is_file() for name in ("config.json", "adapter_config.json"))
            hint = "It holds a model, which `uhl predict` takes." if model else "Give the .safetensors file in it."
            raise FormatError(f"{path} is a folder, not a file.", hint)
        num_bytes = path.stat().st_size
        if not path.is_file():  # opening a pipe would block
            raise FormatError(f"{path} is not a regular file.", "Write it to a file first.")
        if num_bytes > limit:
            raise FormatError(f"{path} holds {num_bytes:,} bytes; no {noun} is larger than {limit:,}.", DAMAGED)
        data = bytearray(num_bytes)
        with path.open("rb") as file:
            if file.readinto(data) != num_bytes or file.read(1):
                raise FormatError(f"{path} changed while it was read.", "Try again.")
    except FileNotFoundError as error:
        raise FormatError(f"there is no file {path}.", "Check the path.") from error
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}.", "Check its permissions.") from error
    return data


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in a safetensors file's header, which alone is read; nothing is checked but its size and form.

    Empty for a file with a header larger than any of uhl's.

    :raises FormatError: When it is no regular file, cannot be read, or is no safetensors file.
    """
    try:
        num_bytes = path.stat().st_size
        if not path.is_file():  # opening a pipe would block
            raise FormatError(f"{path} is not a regular file.", "Write it to a file first.")
        with path.open("rb") as file:
            length = int.from_bytes(start := file.read(8), "little")
            if len(start) < 8 or not 2 <= length <= num_bytes - 8:
                raise FormatError(f"{path}: not a whole safetensors file (its header does not fit).", DAMAGED)
            if length > MAX_HEADER_BYTES:
                return {}
            metadata = json.loads(file.read(length).decode()).get("__metadata__", {})
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}.", "Check its permissions.") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: not a whole safetensors file (its header is damaged).", DAMAGED) from error
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path}: not a whole safetensors file (its metadata are damaged).", DAMAGED)
    return metadata


def read(path: Path, *kinds: Kind, problems: Problems | None = None) -> Contents:
    """Read a file of one of the kinds and check layout, version and digest.

    :param problems: Collects a digest that differs; by default it is raised.
    :raises FormatError: When the file is missing, of another kind, or damaged.
    :raises NewerFormatError: When its major version is newer than this uhl's.
    """
    data = read_bytes(path, max(kind.max_bytes for kind in kinds), kinds[0].noun)
    return parse(data, *kinds, problems=problems or Problems(path, hint=kinds[0].hint))


def parse(data: bytearray, *kinds: Kind, problems: Problems) -> Contents:
    """`read` of the file's bytes.

    :raises FormatError: When nothing of the file can be read; lesser damage is added to `problems`.
    """
    contents = problems.attempt(_layout, data, kinds)
    if contents is None:
        raise FormatError(problems.found[-1], DAMAGED)
    if contents.digest:
        problems.attempt(_check_digest, contents)
    return contents


def read_record(
    contents: Contents, model: type[Record], problems: Problems, *, text: str | None = None
) -> Record | None:
    """The record as a model, or None if it breaks rules and problems are collected.

    :param text: JSON to parse instead of the file's own, such as the converted record of an older version.
    :raises FormatError: When it breaks a rule, unless problems are collected.
    """
    fields: dict[str, Any] = json.loads(contents.record)
    if text is None and contents.digest and _canonical(fields) != contents.record:
        problems.add(FormatError("the record is not written as uhl writes it"))
    for part in ("config", "task"):
        inner = fields.get(part)
        kind = inner.get("kind") if isinstance(inner, dict) else None
        if kind in RESERVED_KINDS:
            problems.add(NewerFormatError(f"the task's kind is {kind}, which is reserved for later versions", UPGRADE))
            return None
    try:
        return model.model_validate_json(contents.record if text is None else text)
    except ValidationError as error:
        newer = _numbers(contents.version) > _numbers(contents.kind.version)
        for entry in error.errors(include_url=False, include_context=False, include_input=False)[:MAX_PROBLEMS]:
            where = ".".join(str(part) for part in entry["loc"]) or "its top"
            line = f"the record breaks the format at {where[:200]}: {entry['msg']}"
            if newer:
                known = f"format {contents.version} goes beyond {contents.kind.version}, which this uhl knows"
                problems.add(NewerFormatError(f"{known}: {line}", UPGRADE))
            else:
                problems.add(FormatError(line))
        return None


def _layout(data: bytearray, kinds: tuple[Kind, ...]) -> Contents:
    """Header and tensors; does not check the digest."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(len(data) - 8, MAX_HEADER_BYTES):
        raise FormatError("not a whole safetensors file (its header does not fit)")
    start = 8 + length
    try:
        header = json.loads(data[8:start].decode())
        metadata = header.pop("__metadata__", {})
        tensors = _tensors(header, memoryview(data)[start:])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FormatError("not a whole safetensors file (its header is damaged)") from error
    kind = _kind(metadata, kinds)
    version = _checked_version(metadata[kind.key], kind)
    digest = "" if version.startswith("1.") and version in kind.older else metadata.get("sha256")
    if not isinstance(digest, str) or set(metadata) != {kind.key, *(["sha256"] if digest else [])}:
        raise FormatError("the header's metadata are not a record and its digest")
    try:
        expected = _header(kind, metadata[kind.key], _in_order(tensors), digest)
    except ValueError as error:  # a lone surrogate
        raise FormatError("the header is not valid text") from error
    if expected != data[:start]:
        raise FormatError("the header does not have uhl's layout")
    if sum(tensor.nbytes for tensor in tensors.values()) != len(data) - start:
        raise FormatError("not a whole safetensors file (its tensors do not fill it)")
    return Contents(kind, version, metadata[kind.key], tensors, digest, len(data), start)


def _tensors(header: Any, body: memoryview) -> dict[str, Stored]:  # noqa: ANN401 - untrusted JSON
    """The tensors, in the order of the file; the rest of the header is checked afterwards."""
    entries = []
    for name, entry in header.items():
        dtype, shape = _TYPES[entry["dtype"]], entry["shape"]
        if len(shape) > 8 or not all(type(size) is int and 0 <= size <= len(body) for size in shape):
            raise ValueError(name)
        entries.append((name, dtype, tuple(shape)))
    tensors, start = {}, 0
    for name, dtype, shape in sorted(entries, key=lambda entry: _place(entry[0], entry[1])):
        end = start + math.prod(shape) * _WIDTHS[dtype]
        if end > len(body):
            raise ValueError(name)
        tensors[name], start = Stored(dtype, shape, body[start:end]), end
    return tensors


def _kind(metadata: object, kinds: tuple[Kind, ...]) -> Kind:
    wanted = kinds[0].noun
    if not isinstance(metadata, dict):
        raise FormatError("not a whole safetensors file (its metadata are damaged)")
    for kind in (*kinds, *_KINDS):
        if isinstance(metadata.get(kind.key), str):
            if kind not in kinds:
                article = "an" if wanted[0] in "aeiou" else "a"
                hint = f"Give {article} {wanted} here; {_PLACES}."
                raise FormatError(f"this is not a uhl {wanted} but a uhl {kind.noun}", hint)
            return kind
    raise FormatError(f"this is a safetensors file but not a uhl {wanted}", kinds[0].hint)


def _checked_version(text: str, kind: Kind) -> str:
    """The record's format version, if this uhl reads it."""
    try:
        record = json.loads(text)
        version = record["format_version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError("the record is not readable") from error
    if not isinstance(record, dict) or not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise FormatError("the record's format version is not readable")
    major, newest = _numbers(version)[0], _numbers(kind.version)[0]
    if major > newest:
        raise NewerFormatError(f"the format version is {version}; this uhl reads up to {kind.version}", UPGRADE)
    if major < newest and version not in kind.older:
        raise FormatError(f"the format version is {version}, which this uhl no longer reads", kind.hint)
    return version


def _check_digest(contents: Contents) -> None:
    if contents.digest != _digest(contents.kind, contents.record, contents.tensors):
        raise FormatError("the digest of the content is not the one in the header", contents.kind.hint)


def _digest(kind: Kind, record: str, tensors: Mapping[str, Stored]) -> str:
    """SHA-256 of the file with zeros in place of the digest; `tensors` in the file's order."""
    digest = hashlib.sha256(_header(kind, record, tensors, _NO_DIGEST))
    for tensor in tensors.values():
        digest.update(tensor.data)
    return digest.hexdigest()


def _header(kind: Kind, record: str, tensors: Mapping[str, Stored], digest: str) -> bytes:
    """The header with its length; `tensors` in the file's order."""
    metadata = {kind.key: record} | ({"sha256": digest} if digest else {})
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    start = 0
    for name, tensor in tensors.items():
        end = start + math.prod(tensor.shape) * _WIDTHS[tensor.dtype]
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _stored(value: np.ndarray | Tensor | Stored) -> Stored:
    if isinstance(value, Stored):
        return value
    if isinstance(value, np.ndarray):
        flat = np.ascontiguousarray(value).reshape(-1)
        return Stored(value.dtype.name, tuple(value.shape), flat.view(np.uint8).data)
    import torch  # lazy: adapters and task files are written without it

    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return Stored(str(value.dtype).removeprefix("torch."), tuple(value.shape), raw.numpy().data)


def _in_order(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    return dict(sorted(tensors.items(), key=lambda item: _place(item[0], item[1].dtype)))


def _place(name: str, dtype: str) -> tuple[int, str]:
    return _ORDER.index(_CODES[dtype]), name


def _canonical(content: object) -> str:
    return json.dumps(content, sort_keys=True, ensure_ascii=False)


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")
    return int(major), int(minor)
