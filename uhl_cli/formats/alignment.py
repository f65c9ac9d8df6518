"""Alignments kept between runs: one file for an adapter, a host and their options, in the folder of `uhl_cli.cache`.

The maps are kept, not the word states that they are fitted to.  They are as large as the anchors' states (8 MB for 6
layers of 256), but the states of a feature bank's 20,000 words would be 120 MB more, and the fit is saved too.  The
file's name is a digest of all that decides the maps (`alignment_key`), and the file is in uhl's own container, with a
digest of its content.  A file that is missing, damaged or does not fit is made again; one that cannot be written is no
error.

Importing this module does not import torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationError

from uhl_cli.cache import cache_folder, mark_used, remove_least_used
from uhl_cli.errors import FormatError, OutputError
from uhl_cli.formats.container import ALIGNMENT, Problems, Stored, digest_of, read, read_metadata, read_record, write
from uhl_cli.schema import AdapterConfig, Frozen, HostRecord

if TYPE_CHECKING:
    from torch import Tensor

    from uhl_cli.align.alignment import Alignment
    from uhl_cli.align.bank import AnchorBank
    from uhl_cli.align.features import FeatureBank
    from uhl_cli.host.checkpoint import Host

_ENDING = ".safetensors"
_MOST_FILES, _MOST_BYTES = 64, 2_000_000_000
_MOST_LISTED = 10 * _MOST_FILES
_LAYER = re.compile(r"layers\.(0|[1-9][0-9]{0,4})\.(mean|read|stream|attention|mlp)")
_DEPTH = re.compile(r"(features\.)?depths\.(0|[1-9][0-9]{0,4})")


class AlignmentRecord(Frozen):
    """What a file of an alignment says besides its maps.

    :param key: See `alignment_key`; also the file's name.
    :param adapter: Digest of the adapter file; empty for an adapter in memory.
    :param serves: See `ported.aligned.AlignedHost`.
    :param depths: Depths that the readout reads, in the order in which their products are summed; `feature_depths`: the
        same of the feature bank's maps.
    """

    format_version: str
    key: str = Field(pattern=r"^[0-9a-f]{64}$")
    adapter: str = Field(pattern=r"^([0-9a-f]{64})?$")
    host: HostRecord
    serves: Literal["own", "other", "any"]
    depths: tuple[int, ...] = Field(min_length=1)
    feature_depths: tuple[int, ...]
    quality: tuple[float, ...]
    knot_quality: tuple[float, ...]
    feature_quality: float | None
    new_words: float | None


def alignment_key(
    host: Host,
    bank: AnchorBank,
    *,
    depths: Sequence[int],
    joint: bool,
    features: FeatureBank | None,
    config: AdapterConfig,
    stored: dict[str, Tensor],
) -> str | None:
    """A digest of all that decides an alignment by anchors; None if the host has none, see `host.identity`.

    :param depths: Depths that the readout may read.
    :param joint: See `align.alignment.align_anchors`.
    :param features: The feature bank, if its maps are fitted too; the adapter's parameters then count as well.
    """
    from uhl_cli.host.identity import host_digest  # lazy: it imports torch

    digest = host_digest(host)
    if digest is None:
        return None
    decisions: list[object] = [digest, bank.anchors.digest, bank.knots, list(depths), joint]
    tensors = {"bank.codes": bank.codes, "bank.scales": bank.scales}
    if features is not None:
        decisions += [features.anchors.digest, config.knots, config.readout_size]
        tensors |= {"codes": features.codes, "scales": features.scales, "mean": features.mean}
        tensors |= {f"stored.{name}": value for name, value in stored.items()}
    return digest_of(ALIGNMENT, json.dumps(decisions), tensors)


def load_alignment(key: str, config: AdapterConfig, host: Host) -> Alignment | None:
    """The alignment of a key, as it was when it was kept; None if there is none that fits adapter and host."""
    path = _path(key)
    if path is None:
        return None
    try:
        problems = Problems(path)
        contents = read(path, ALIGNMENT, problems=problems)
        record = read_record(contents, AlignmentRecord, problems)
        assert record is not None  # problems are raised
        if record.key != key:
            raise FormatError("the file is another's")
        found = _alignment(record, contents.tensors, config, host)
    except (FormatError, KeyError):
        return None
    mark_used(path)
    return found


def save_alignment(
    key: str, alignment: Alignment, *, adapter: str, host: Host, serves: Literal["own", "other", "any"]
) -> None:
    """Keep an alignment, if it can be written and read back to the bit."""
    path, tensors = _path(key), _tensors(alignment)
    if path is None or sum(value.nbytes for value in tensors.values()) > ALIGNMENT.max_bytes // 2:
        return
    if not all(value.is_contiguous() and value.device.type == "cpu" for value in tensors.values()):
        return
    features = alignment.features
    with suppress(ValidationError, OutputError, OSError):  # a quality may be no number
        record = AlignmentRecord(
            format_version=ALIGNMENT.version,
            key=key,
            adapter=adapter,
            host=HostRecord(name=full_name(host.name), revision=host.revision, fingerprint=host.fingerprint),
            serves=serves,
            depths=tuple(alignment.depth_weights),
            feature_depths=() if features is None else tuple(features.depth_weights),
            quality=alignment.quality,
            knot_quality=alignment.knot_quality,
            feature_quality=None if features is None else features.quality,
            new_words=alignment.new_words,
        )
        if path.is_symlink():  # a write would follow it
            path.unlink()
        write(path, ALIGNMENT, record, tensors)
        remove_least_used(path.parent, _ENDING, most_files=_MOST_FILES, most_bytes=_MOST_BYTES)


def kept_alignments() -> Iterator[AlignmentRecord]:
    """The records of all alignments that are kept, read from the files' headers alone; files that do not fit are left
    out.  Imports no torch."""
    folder = cache_folder("alignments")
    paths: list[Path] = []
    with suppress(OSError):
        paths = sorted(folder.glob(f"*{_ENDING}"))[:_MOST_LISTED] if folder is not None else []
    for path in paths:
        with suppress(FormatError, ValidationError, KeyError):
            record = AlignmentRecord.model_validate_json(read_metadata(path)[ALIGNMENT.key])
            if path.stem == record.key and record.format_version == ALIGNMENT.version:
                yield record


def full_name(host: str) -> str:
    """A host's name as in the records: of a folder or file its full path."""
    path = Path(host).expanduser()
    return str(path.resolve()) if path.exists() else host


def _path(key: str) -> Path | None:
    folder = cache_folder("alignments")
    return None if folder is None else folder / f"{key}{_ENDING}"


def _tensors(alignment: Alignment) -> dict[str, Tensor]:
    """The maps by name; a map that is the stream's own is left out."""
    tensors: dict[str, Tensor] = {}
    for index, maps in enumerate(alignment.layers):
        named = {"mean": maps.mean, "read": maps.read, "stream": maps.write_stream}
        for name, write_map in (("attention", maps.write_attention), ("mlp", maps.write_mlp)):
            if write_map is not maps.write_stream:
                named[name] = write_map
        tensors |= {f"layers.{index}.{name}": value for name, value in named.items()}
    tensors |= {f"depths.{depth}": weight for depth, weight in alignment.depth_weights.items()}
    tensors["depth_bias"] = alignment.depth_bias
    features = alignment.features
    if features is not None:
        tensors |= {f"features.depths.{depth}": weight for depth, weight in features.depth_weights.items()}
        tensors |= {"features.bias": features.bias, "features.head": features.head}
        tensors["features.head_bias"] = features.head_bias
    return tensors


def _alignment(record: AlignmentRecord, stored: Mapping[str, Stored], config: AdapterConfig, host: Host) -> Alignment:
    """:raises FormatError: The maps do not fit; KeyError: one is missing."""
    import torch  # lazy, as the modules that need it

    from uhl_cli.align.alignment import Alignment, LayerMaps
    from uhl_cli.align.features import FeatureMaps

    depth = host.num_hidden_layers
    tensors: dict[str, Tensor] = {}
    for name, entry in stored.items():
        if entry.dtype != "float32" or entry.shape not in _shapes(name, config, host):
            raise FormatError(f"{name} has another type or shape")
        tensors[name] = entry.torch().clone()  # in memory aligned as torch's own is, for the same rounding
        if not bool(torch.isfinite(tensors[name]).all()):
            raise FormatError(f"{name} has values that are no numbers")
    _refuse_other_depths(record, tensors)
    if len(record.quality) != depth + 1 or len(record.knot_quality) not in (0, len(config.knots)):
        raise FormatError("the qualities are those of another host")
    layers = []
    for index in range(depth + 1):
        mean, read_map, write_map = (tensors[f"layers.{index}.{name}"] for name in ("mean", "read", "stream"))
        others = (tensors.get(f"layers.{index}.{name}", write_map) for name in ("attention", "mlp"))
        layers.append(LayerMaps(index / depth, mean, read_map, write_map, *others))
    features = None
    if record.feature_quality is not None:
        bias, head, head_bias = (tensors[f"features.{name}"] for name in ("bias", "head", "head_bias"))
        if len(head) != len(head_bias):
            raise FormatError("the head's shapes differ")
        weights = {place: tensors[f"features.depths.{place}"] for place in record.feature_depths}
        features = FeatureMaps(weights, bias, head, head_bias, record.feature_quality)
    return Alignment(
        "anchors",
        host.hidden_size,
        tuple(layers),
        {place: tensors[f"depths.{place}"] for place in record.depths},
        tensors["depth_bias"],
        record.quality,
        record.knot_quality,
        features,
        record.new_words,
    )


def _refuse_other_depths(record: AlignmentRecord, tensors: Mapping[str, Tensor]) -> None:
    """:raises FormatError: The record names other maps than there are."""
    named = [f"depths.{depth}" for depth in record.depths]
    named += [f"features.depths.{depth}" for depth in record.feature_depths]
    found = [name for name in tensors if _DEPTH.fullmatch(name)]
    featured = record.feature_quality is not None
    has = any(name.startswith("features.") for name in tensors)
    if sorted(named) != sorted(found) or not featured == has == bool(record.feature_depths):
        raise FormatError("the record names other maps")


def _shapes(name: str, config: AdapterConfig, host: Host) -> tuple[tuple[int, ...], ...]:
    """Shapes that a tensor of this name may have; none for an unknown name."""
    width, depth, canonical = host.hidden_size, host.num_hidden_layers, config.canonical_size
    rows = len(config.knots) * canonical
    if layer := _LAYER.fullmatch(name):
        shape = {"mean": (width,), "read": (canonical, width)}.get(layer[2], (width, canonical))
        return (shape,) if int(layer[1]) <= depth else ()
    if place := _DEPTH.fullmatch(name):
        shape = (config.readout_size if place[1] else rows, width)
        return (shape,) if int(place[2]) <= depth else ()
    return {
        "depth_bias": ((rows,),),
        "features.bias": ((config.readout_size,),),
        "features.head": ((config.num_labels, width), (0, width)),
        "features.head_bias": ((config.num_labels,), (0,)),
    }.get(name, ())
