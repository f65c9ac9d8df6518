"""Layout of a stored adapter: the shape and the bits of every parameter.  Does not import torch."""

from __future__ import annotations

import math
import re

from uhl_cli.errors import FormatError
from uhl_cli.schema import UPDATE_TYPES, AdapterConfig

# A configuration bounds each size; this bounds their products, and so the memory that an untrusted file can request.
MAX_PARAMETERS = 8_000_000

# Bits of every stored parameter; parameters that are not listed are stored in 8 bits.
BITS: dict[str, int] = {
    "mixer_in_weight": 4,
    "mixer_in_bias": 4,
    "mixer_out_weight": 4,
    "mixer_out_bias": 4,
    "delta_theta": 4,
}
# Parameters of the updates; the rest belong to the readout.
UPDATE_PARAMETERS = ("atoms_u", "atoms_v", "router", "task_router", "task_embedding", "threshold", *BITS)
# The canonical readout: what a new task needs besides delta-theta.
READOUT_PARAMETERS = (
    "readout_in_weight",
    "readout_in_bias",
    "readout_pool",
    "readout_out_weight",
    "readout_out_bias",
)

# In a ported adapter, each row of a table ends with its step and its smallest value, float32 each.
TAIL_BYTES = 8
_TABLE = re.compile(r"(.*\.)?(router|read|(edits|depth_weights)\.\w+)")


def is_table(name: str) -> bool:
    """Whether the tensor with this name in a ported adapter is a table of rows, see `adapter.sparse`."""
    return _TABLE.fullmatch(name) is not None


def bits_of(name: str) -> int:
    """Stored bits of the parameter `name`."""
    return BITS.get(name, 8)


def parameter_shapes(config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every stored parameter; the reader checks a file against it.

    :raises FormatError: When they have more than `MAX_PARAMETERS` values in total.
    """
    atoms, canonical, readout = config.num_atoms, config.canonical_size, config.readout_size
    shapes: dict[str, tuple[int, ...]] = {
        "atoms_u": (atoms, canonical),
        "atoms_v": (atoms, canonical),
        "router": (atoms, canonical),
        "task_router": (atoms, config.task_embedding_size),
        "task_embedding": (config.task_embedding_size,),
        "threshold": (config.top_k,),
        "mixer_in_weight": (config.mixer_hidden_size, 1 + len(UPDATE_TYPES)),
        "mixer_in_bias": (config.mixer_hidden_size,),
        "mixer_out_weight": (atoms, config.mixer_hidden_size),
        "mixer_out_bias": (atoms,),
        "delta_theta": (len(UPDATE_TYPES), atoms),
        "size_in_weight": (config.size_hidden_size, 1),
        "size_in_bias": (config.size_hidden_size,),
        "size_out_weight": (2 * canonical, config.size_hidden_size),
        "size_out_bias": (2 * canonical,),
        "readout_in_weight": (readout, len(config.knots) * canonical),
        "readout_in_bias": (readout,),
        "readout_out_weight": (config.num_labels, readout),
        "readout_out_bias": (config.num_labels,),
        "head_weight": (config.num_labels, canonical),
        "head_bias": (config.num_labels,),
    }
    if config.kind == "sequence":
        shapes["readout_pool"] = (readout,)
    total = sum(math.prod(shape) for shape in shapes.values())
    if total > MAX_PARAMETERS:
        raise FormatError(
            f"an adapter of this configuration has {total:,} parameters; at most {MAX_PARAMETERS:,} are allowed.",
            "Use fewer atoms, coordinates, knots or labels.",
        )
    return shapes
