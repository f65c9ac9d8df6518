"""Bytes of a file by part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from uhl_cli.errors import FormatError
from uhl_cli.inspect.content import file_parts
from uhl_cli.schema import Frozen

# Tensors of every part, in the order of reports.
PARTS: dict[str, tuple[str, ...]] = {
    "header": ("header",),
    "atoms": ("atoms_u", "atoms_v"),
    "router": ("router", "task_router", "task_embedding", "threshold"),
    "mixer": ("mixer_in_weight", "mixer_in_bias", "mixer_out_weight", "mixer_out_bias"),
    "delta-theta": ("delta_theta",),
    "hyper-MLP": ("size_in_weight", "size_in_bias", "size_out_weight", "size_out_bias"),
    "readout": ("readout_in_weight", "readout_in_bias", "readout_pool", "readout_out_weight", "readout_out_bias"),
    "head-only control": ("head_weight", "head_bias"),
    "anchor coordinates": ("anchors.codes",),
    "anchor texts": ("anchors.texts", "anchors.words"),
    "feature bank": ("features.codes", "features.mean", "features.shift"),
    "feature texts": ("features.texts", "features.words"),
}
_ANCHORS = tuple(name for part in PARTS for name in PARTS[part] if name.startswith(("anchors.", "features.")))


class PartSize(Frozen):
    """One part of a file."""

    part: str
    bytes: int = Field(description="codes and scales together; of the header, its length field too")
    parameters: int = Field(description="trained values; 0 for the header and for the anchors, which are data")


class FileSizes(Frozen):
    """A file's size, to the byte, and what makes it up: the bytes of `parts` add up to `bytes`."""

    bytes: int
    parameters: int
    parts: tuple[PartSize, ...]


def file_sizes(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> FileSizes:
    """Sizes of a file that a reader of uhl has accepted.

    :param shapes: Shape of every parameter that it holds, see `layout.parameter_shapes`; an adapter file's anchors
        are found by themselves.
    :raises FormatError: When it cannot be read, or its parts do not make up the whole file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}.", "Check its permissions.") from error
    # Anchors and features have no parameters, so that no shape of theirs matters here.
    shapes = dict(shapes) | ({} if _is_task_file(shapes) else dict.fromkeys(_ANCHORS, (0,)))
    sizes = {part.name: part.bytes for part in file_parts(data, shapes)}
    if sum(sizes.values()) != len(data):
        raise FormatError(
            f"the parts of {path} hold {sum(sizes.values()):,} bytes, the file {len(data):,}.",
            "The file is damaged or was not written by uhl; get it again from its source.",
        )
    parts = tuple(
        PartSize(
            part=part,
            bytes=sum(sizes[name] for name in names if name in sizes),
            parameters=sum(math.prod(shapes[name]) for name in names if name in shapes),
        )
        for part, names in PARTS.items()
        if any(name in sizes for name in names)
    )
    return FileSizes(bytes=len(data), parameters=sum(part.parameters for part in parts), parts=parts)


def _is_task_file(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """A task file brings no atoms of its own, and no anchors."""
    return "atoms_u" not in shapes
