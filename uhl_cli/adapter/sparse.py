"""Tables from which each token uses a few rows: eight-bit storage, weighted sums and scalar products.

A ported adapter consists mostly of such tables.  In eight bits they need a quarter of the bytes and of the memory
traffic.  The file's own parameters have eight bits or fewer, so packing loses no accuracy
(figures: tests/benchmarks/README.md).

Neither operator copies the chosen rows: a weighted sum of rows is an embedding bag, and scalar products with rows are
what torch computes for the gradient of such a bag's weights.  On a CPU that takes a tenth of the time of gathering and
multiplying, and a sum of packed rows takes three quarters of that.

While it is trained, a table is a floating-point tensor [M, columns].  For inference it is packed: uint8
[M, columns + 8], the layout of torch's quantised embedding bags.  The dtype distinguishes the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from uhl_cli.codes.layout import TAIL_BYTES

_LEVELS = 255
_UNPACK = getattr(torch.ops.quantized, "embedding_bag_byte_unpack", None)
_RESPONSES = getattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward", None)
_PACKED_SUMS = getattr(torch.ops.quantized, "embedding_bag_byte_rowwise_offsets", None)
_SUM = 0  # the operator's number for a bag that is summed


def is_packed(table: Tensor) -> bool:
    """Whether a table is stored in eight bits."""
    return table.dtype == torch.uint8


def num_columns(table: Tensor) -> int:
    """Number of columns of a table, without the tail of a packed one."""
    return table.shape[1] - TAIL_BYTES if is_packed(table) else table.shape[1]


def pack_rows(table: Tensor) -> Tensor:
    """The table in eight bits, uint8 [M, columns + 8]; a packed one is returned unchanged.

    Guarantee: every unpacked value is within half a step (the row's range / 510) of the original, and a row of equal
    values is exact.
    """
    if is_packed(table):
        return table
    table = table.detach().float()
    low, high = table.aminmax(dim=1, keepdim=True)
    step = (high - low) / _LEVELS
    codes = torch.where(step > 0, (table - low) / step, torch.zeros_like(table)).round_().clamp_(0, _LEVELS)
    tail = torch.cat([step, low], dim=1).contiguous().view(torch.uint8)
    return torch.cat([codes.to(torch.uint8), tail], dim=1)


def row_values(table: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[M, columns] for a product with states of `dtype`: packed tables are unpacked, others returned unchanged."""
    if not is_packed(table):
        return table
    if table.is_meta:  # there is nothing to unpack
        return torch.empty(len(table), num_columns(table), dtype=dtype, device=table.device)
    if _UNPACK is not None and runs_natively(table):
        found: Tensor = _UNPACK(table)
        return found.to(dtype)
    tail = table[:, -TAIL_BYTES:].contiguous().view(torch.float32)
    return (table[:, :-TAIL_BYTES].float() * tail[:, :1] + tail[:, 1:]).to(dtype)


def runs_natively(packed: Tensor) -> bool:
    """Whether torch's own operators on packed tables are used; if not, plain operators compute the same."""
    return packed.device.type == "cpu" and not torch.compiler.is_compiling()


@dataclass(frozen=True)
class Bags:
    """Assignment of T * k flat entries to tokens: `starts` int64 [T], and `owner` int64 [T * k]."""

    starts: Tensor
    owner: Tensor

    @classmethod
    def of(cls, tokens: int, entries: int, device: torch.device) -> Bags:
        """Bags of `entries` entries for each of `tokens` tokens."""
        starts = torch.arange(0, tokens * entries, entries, device=device)
        owner = torch.arange(tokens, device=device).repeat_interleave(entries)
        return cls(starts, owner)


def chosen(values: Tensor, indices: Tensor) -> Tensor:
    """`values[indices]` [T, k] of values [M], at a third of its cost on a CPU."""
    return values.index_select(0, indices.view(-1)).view(indices.shape)


def row_responses(states: Tensor, table: Tensor, indices: Tensor, bags: Bags) -> Tensor:
    """Scalar products of states [T, d] with chosen rows: [T, k] of a plain table [M, d] and indices [T, k]."""
    # The operator has no derivative of its own.
    if _RESPONSES is None or torch.is_grad_enabled() or states.dtype != table.dtype:
        return (table[indices] * states.unsqueeze(1)).sum(-1)
    given = (states, table)
    if states.is_cuda and states.dtype == torch.bfloat16:  # torch has no such kernel: pytorch #185808
        given = (states.float(), table.float())
    flat: Tensor = _RESPONSES(*given, indices.view(-1), bags.starts, bags.owner, _SUM)
    return flat.view(indices.shape).to(states.dtype)


def row_sums(table: Tensor, indices: Tensor, weights: Tensor, bags: Bags) -> Tensor:
    """Weighted sums of each token's chosen rows: [T, columns] of table [M, columns], indices and weights [T, k].

    In the table's own precision, or in float32 where it is packed.
    """
    if is_packed(table):
        # The operator has no derivative of its own.
        if _PACKED_SUMS is not None and runs_natively(table) and not torch.is_grad_enabled():
            given = (table, indices.view(-1), bags.starts)
            sums: Tensor = _PACKED_SUMS(*given, False, _SUM, False, weights.float().view(-1), None, False)
            return sums
        table = row_values(table)
    weights = weights.to(table.dtype).view(-1)
    return functional.embedding_bag(indices.view(-1), table, bags.starts, mode="sum", per_sample_weights=weights)


def spread(weights: Tensor, indices: Tensor, count: int) -> Tensor:
    """The weights [T, k] at their places in a dense [T, count], for products with a gradient."""
    return torch.zeros(len(weights), count, dtype=weights.dtype, device=weights.device).scatter(1, indices, weights)
