"""FLOPs by fvcore: a trace of the real ported model, independent of torch's own counter (`flops`).

fvcore counts a multiply-add as one FLOP.  Results are doubled, so that it is two as everywhere in uhl.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis

from uhl_cli.adapter.module import PortedAdapter
from uhl_cli.codes.layout import TAIL_BYTES
from uhl_cli.cost.flops import grouped_product
from uhl_cli.cost.passes import PassShape, forward_pass
from uhl_cli.host.hostmap import HostMap

FLOPS_PER_MULTIPLY_ADD = 2
Values = Sequence[Any]


def _shape(value: Any) -> list[int]:  # noqa: ANN401 - a value of torch's traced graph
    sizes: list[int] = value.type().sizes()
    return sizes


def _attention(inputs: Values, _outputs: Values) -> int:
    """Multiply-adds of queries times keys and of weights times values, over the full (unmasked) square."""
    query, key, value = (_shape(entry) for entry in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _embedding_bag(inputs: Values, _outputs: Values) -> int:
    """Multiply-adds of the weighted sum of the rows that `indices` gather."""
    weight, indices = (_shape(entry) for entry in inputs[:2])
    return math.prod(indices) * weight[1]


def _row_responses(inputs: Values, _outputs: Values) -> int:
    """Multiply-adds of the products of states with the rows that `indices` gather, see `adapter.sparse`."""
    table, indices = (_shape(entry) for entry in inputs[1:3])
    return math.prod(indices) * table[1]


def _compact_sums(inputs: Values, _outputs: Values) -> int:
    """The same for rows in eight bits, whose table has a scale and an offset at the end of every row."""
    packed, indices = (_shape(entry) for entry in inputs[:2])
    return math.prod(indices) * (packed[1] - TAIL_BYTES)


def _matmul(inputs: Values, outputs: Values) -> int:
    """Multiply-adds of a product of any dimensions; fvcore's own handler refuses a vector."""
    return math.prod(_shape(outputs[0])) * _shape(inputs[0])[-1]


def _baddbmm(inputs: Values, outputs: Values) -> int:
    return math.prod(_shape(outputs[0])) * _shape(inputs[1])[-1]


def _grouped_product(inputs: Values, _outputs: Values) -> int:
    """Multiply-adds of a product by groups, whose operands need not have as many dimensions as each other."""
    return grouped_product(tuple(_shape(inputs[0])), tuple(_shape(inputs[1]))) // FLOPS_PER_MULTIPLY_ADD


def _nothing(_inputs: Values, _outputs: Values) -> int:
    return 0


# Operators that fvcore cannot count, or counts although they are element-wise.
HANDLERS: dict[str, Callable[[Values, Values], int]] = {
    "aten::scaled_dot_product_attention": _attention,
    "aten::embedding_bag": _embedding_bag,
    "aten::_embedding_bag_per_sample_weights_backward": _row_responses,
    "quantized::embedding_bag_byte_rowwise_offsets": _compact_sums,
    "aten::matmul": _matmul,
    "aten::mv": _matmul,
    "aten::bmm": _matmul,
    "aten::baddbmm": _baddbmm,
    "aten::_grouped_mm": _grouped_product,
    "transformers::grouped_mm_fallback": _grouped_product,
    "aten::layer_norm": _nothing,
}


def count_flops_fvcore(
    host_map: HostMap, adapter: PortedAdapter | None, shape: PassShape
) -> tuple[int, frozenset[str]]:
    """FLOPs of one pass, two for a multiply-add, and the names of the operators that ran and were not counted.

    These are element-wise work and look-ups (`aten::gelu`, `aten::embedding`, ...), as in `flops`.
    """
    with torch.no_grad(), forward_pass(host_map, adapter, shape) as (module, ids):
        analysis = FlopCountAnalysis(module, (ids,)).set_op_handle(**HANDLERS)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        total = FLOPS_PER_MULTIPLY_ADD * int(analysis.total())
        return total, frozenset(analysis.unsupported_ops())
