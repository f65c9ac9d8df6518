"""FLOPs of a forward pass, counted on the real model as it runs.

Convention, for host and adapter alike: a multiply-add is two FLOPs; matrix products, attention products and gathered
weighted sums count; element-wise work does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from uhl_cli.adapter.module import PortedAdapter
from uhl_cli.codes.layout import TAIL_BYTES
from uhl_cli.cost.passes import SEQUENCE_LENGTH, PassShape, forward_pass
from uhl_cli.host.checkpoint import Host
from uhl_cli.host.hostmap import HostMap
from uhl_cli.host.running import frozen

Shape = tuple[int, ...]


def _attention(query: Shape, key: Shape, value: Shape, *_rest: object, **_options: object) -> int:
    batch, heads, queries, size = query
    return 2 * batch * heads * queries * key[-2] * (size + value[-1])


def _embedding_bag(weight: Shape, indices: Shape, *_rest: object, **_options: object) -> int:
    return 2 * math.prod(indices) * weight[1]


def _row_responses(_states: Shape, table: Shape, indices: Shape, *_rest: object, **_options: object) -> int:
    return 2 * math.prod(indices) * table[1]


def _compact_sums(packed: Shape, indices: Shape, *_rest: object, **_options: object) -> int:
    return 2 * math.prod(indices) * (packed[1] - TAIL_BYTES)


def _matrix_vector(matrix: Shape, *_rest: object, **_options: object) -> int:
    return 2 * math.prod(matrix)


def grouped_product(left: Shape, right: Shape, *_rest: object, **_options: object) -> int:
    """Of a product by groups: every row, column or term of a dimension that is split meets one group alone."""
    split_columns = len(left) > len(right)
    return 2 * math.prod(left[1:] if split_columns else left) * right[-1]


# Operators that torch's counter does not count.  The last is transformers' own, where torch has no grouped product.
_COUNTED: dict[str, Callable[..., int]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_embedding_bag": _embedding_bag,
    "aten::_embedding_bag_forward_only": _embedding_bag,
    "aten::_embedding_bag_per_sample_weights_backward": _row_responses,
    "aten::mv": _matrix_vector,
    "aten::_grouped_mm": grouped_product,
    "quantized::embedding_bag_byte_rowwise_offsets": _compact_sums,
    "transformers::grouped_mm_fallback": grouped_product,
}


def counted_operators() -> dict[Any, Any]:
    """Extra handlers for torch's counter, by operator; operators that are not registered here are skipped."""
    found = {}
    for full_name, count in _COUNTED.items():
        library, name = full_name.split("::")
        operator = getattr(getattr(torch.ops, library), name, None)
        if operator is not None:
            found[operator] = count
    return found


def count_flops(
    host: Host, adapter: PortedAdapter | None, *, sequence_length: int = SEQUENCE_LENGTH, batch_size: int = 1
) -> int:
    """FLOPs of one forward pass: of the host alone, or with the adapter attached.

    :param sequence_length: Tokens of each sequence; capped at the host's maximum length.
    """
    return count_map_flops(host.map, adapter, PassShape(batch_size, min(sequence_length, host.max_length)))


def count_map_flops(host_map: HostMap, adapter: PortedAdapter | None, shape: PassShape) -> int:
    """The same for a bare host map, such as that of a model on the meta device."""
    # Gradient checkpointing makes the embeddings' output require gradients, by a hook.  Torch's counter then looks for
    # the graph of that output, which there is with gradients alone.  Some models pass a parameter to a module; it must
    # not require gradients either.
    hooked = bool(host_map.embeddings._forward_hooks)
    with (
        torch.enable_grad() if hooked else torch.inference_mode(),
        forward_pass(host_map, adapter, shape) as (module, ids),
        frozen(host_map.base),  # a parameter that a model hands to its modules would be looked up in a graph too
        FlopCounterMode(display=False, custom_mapping=counted_operators()) as counter,
    ):
        module(ids)
    return int(counter.get_total_flops())
