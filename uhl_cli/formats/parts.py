"""The parts of an adapter file or a task file as reports name them, and their bytes."""

from __future__ import annotations

from uhl_cli.formats.container import Contents

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
    "transfer texts": ("transfer.texts",),
    "transfer outputs": ("transfer.outputs",),
}
# Optional parts of newer versions, which this uhl does not know.
OTHER = "other parts"
_PART_OF = {name: part for part, names in PARTS.items() for name in names}
# Scales that belong to the codes of a part of that name.
_PART_OF |= {f"{name}.scale": _PART_OF[f"{name}.codes"] for name in ("anchors", "features")}


def bytes_by_part(contents: Contents) -> dict[str, int]:
    """Bytes of every part of a file, codes and scales together, in the order of `PARTS`; they add up to the file's."""
    found = dict.fromkeys((*PARTS, OTHER), 0) | {"header": contents.header_bytes}
    for name, tensor in contents.tensors.items():
        found[_PART_OF.get(name) or _PART_OF.get(name.removesuffix(".scale"), OTHER)] += tensor.nbytes
    return {part: size for part, size in found.items() if size}
