"""Bytes of a file by part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from uhl_cli.formats.container import ADAPTER, TASK, Contents, read
from uhl_cli.formats.parts import OTHER, PARTS
from uhl_cli.inspect.content import file_parts, ported_parts
from uhl_cli.inspect.report import Part
from uhl_cli.schema import Frozen

_DATA = tuple(name for part in PARTS for name in PARTS[part] if name.startswith(("anchors.", "features.", "transfer.")))


class PartSize(Frozen):
    """One part of a file."""

    part: str
    bytes: int = Field(description="codes and scales together; of the header, its length field too")
    parameters: int = Field(description="trained values; 0 for the header, and for anchors and texts, which are data")


class FileSizes(Frozen):
    """A file's size, to the byte, and what makes it up: the bytes of `parts` add up to `bytes`."""

    bytes: int
    parameters: int
    parts: tuple[PartSize, ...]


def file_sizes(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> FileSizes:
    """Sizes of an adapter file or a task file.

    :param shapes: Shape of every parameter that it holds, see `layout.parameter_shapes`; an adapter file's anchors
        need none.
    :raises FormatError: When it cannot be read.
    """
    contents = read(path, ADAPTER, TASK)
    # Anchors, features and the transfer set have no parameters, so their shapes do not matter here.
    found = file_parts(contents, dict(shapes) | dict.fromkeys(_DATA, (0,)))
    named = {name: part for part, names in PARTS.items() for name in names}
    rows: dict[str, list[Part]] = {}
    for part in found:
        rows.setdefault(named.get(part.name, OTHER), []).append(part)
    parts = tuple(
        PartSize(
            part=name,
            bytes=sum(part.bytes for part in rows[name]),
            parameters=sum(math.prod(shapes[part.name]) for part in rows[name] if part.name in shapes),
        )
        for name in (*PARTS, OTHER)
        if name in rows
    )
    return FileSizes(bytes=contents.file_bytes, parameters=sum(part.parameters for part in parts), parts=parts)


def ported_sizes(contents: Contents) -> FileSizes:
    """Sizes of the file in a ported adapter's folder: LoRA, readout and, if it carries any, updates."""
    rows: dict[str, list[Part]] = {}
    for part in ported_parts(contents):
        rows.setdefault(part.group, []).append(part)
    parts = tuple(
        PartSize(
            part=name,
            bytes=sum(part.bytes for part in some),
            parameters=0 if name == "header" else sum(math.prod(part.shape) for part in some),
        )
        for name, some in rows.items()
    )
    return FileSizes(bytes=contents.file_bytes, parameters=sum(part.parameters for part in parts), parts=parts)
