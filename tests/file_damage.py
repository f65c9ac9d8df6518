"""Damage to the files that uhl writes: flipped bits, and sound containers around content that breaks a rule."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from uhl_cli.errors import FormatError, UhlError
from uhl_cli.formats.adapter import read_adapter
from uhl_cli.formats.container import Kind, to_bytes
from uhl_cli.inspect.report import InspectOptions
from uhl_cli.inspect.run import run_inspect


def problems_of(path: Path) -> tuple[str, ...]:
    """What `--verify` finds in a file or a folder."""
    report = run_inspect(InspectOptions(file=path, verify=True))
    assert report.verification is not None
    return report.verification.problems


def assert_refused(path: Path, data: bytes, words: str, error: type[FormatError] = FormatError) -> tuple[str, ...]:
    """An adapter refused by the reader for what `--verify` names first; returns all that `--verify` names."""
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        read_adapter(path)
    assert type(caught.value) is error
    assert caught.value.hint
    found = problems_of(path)
    assert caught.value.message == f"{path}: {found[0]}."
    assert any(words in line for line in found), (words, found)
    assert all(line.isprintable() for line in found)
    return found


def header_of(data: bytes) -> dict[str, Any]:
    """The header's JSON."""
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def record_of(data: bytes) -> dict[str, Any]:
    """The record in a file that uhl wrote."""
    metadata = header_of(data)["__metadata__"]
    return json.loads(next(text for key, text in metadata.items() if key != "sha256"))


def flips(data: bytes, count: int, *, seed: int = 0) -> Iterator[bytes]:
    """The data with one random bit flipped, `count` times; half of the flips go into the header."""
    draw, end = random.Random(seed), 8 + struct.unpack("<Q", data[:8])[0]
    for index in range(count):
        damaged = bytearray(data)
        damaged[draw.randrange(end if index % 2 else len(data))] ^= 1 << draw.randrange(8)
        yield bytes(damaged)


def assert_flips_are_found(
    path: Path, read: Callable[[], object], *, error: type[UhlError], count: int = 1000, seed: int = 0
) -> None:
    """Every one of `count` files with one flipped bit is refused, in one line with a hint; the whole one is read.

    :param path: A whole file; it is put back.
    :param read: Reads the file at `path`.
    """
    data = path.read_bytes()
    read()
    for damaged in flips(data, count, seed=seed):
        path.write_bytes(damaged)
        with pytest.raises(error) as caught:
            read()
        assert caught.value.hint
        assert str(caught.value).isprintable()
    path.write_bytes(data)


def rebuilt(
    kind: Kind, data: bytes, record: Callable[[dict[str, Any]], object] | None = None, **tensors: object
) -> bytes:
    """The file with another record or other tensors in a sound container: layout and digest are right.

    :param record: Changes the record; it may return another, or its text.
    :param tensors: Arrays, functions of the array, or None to leave one out; two underscores stand for a dot.
    """
    fields = record_of(data)
    changed = fields if record is None else record(fields)
    if not isinstance(changed, str):
        changed = json.dumps(fields if changed is None else changed, sort_keys=True, ensure_ascii=False)
    found: dict[str, np.ndarray] = load(data)
    for name, value in tensors.items():
        key = name.replace("__", ".")
        if value is None:
            del found[key]
        else:
            found[key] = value(found[key].copy()) if callable(value) else np.asarray(value)
    return to_bytes(kind, changed, found)


def as_1_1(data: bytes) -> bytes:
    """The file as format 1.1 had it: no digest, the record of the features in that of the anchors."""
    record = record_of(data) | {"format_version": "1.1"}
    features = record.pop("parts").get("features")
    if features is not None:
        record["anchors"]["features"] = features
    tensors = load(data)
    text = json.dumps(record, sort_keys=True, ensure_ascii=False)
    return save({name: tensors[name] for name in sorted(tensors)}, metadata={"uhl": text})


def setting(way: str, value: object) -> Callable[[dict[str, Any]], None]:
    """A change of a record: the field at the dotted way gets a value; `...` deletes it."""

    def change(record: dict[str, Any]) -> None:
        *outer, last = way.split(".")
        for step in outer:
            record = record[step]
        if value is ...:
            del record[last]
        else:
            record[last] = value

    return change
