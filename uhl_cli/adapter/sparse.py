"""Tables of rows in eight bits: what keeps a ported adapter small beside its host, and its weighted sums fast.

A folded adapter is mostly tables of M rows, of which each token takes a few.  In eight bits they hold a quarter of the
bytes, and fewer bytes pass through the memory for every sum.  The file's own parameters have eight bits or fewer, so
that nothing they say is lost by it (figures: tests/benchmarks/README.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# Behind a row's codes: its step and its smallest value, float32 each.
TAIL_BYTES = 8
_LEVELS = 255
_UNPACK = getattr(torch.ops.quantized, "embedding_bag_byte_unpack", None)


@dataclass(frozen=True)
class CompactRows:
    """Rows [M, columns] as `packed` uint8 [M, columns + 8], the layout of torch's quantised embedding bags.

    Guarantee: every value is within half a step, which is the row's range / 510, of what was packed, and a row of equal
    values is exact.
    """

    packed: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns that the table stands for."""
        return self.packed.shape[0], self.packed.shape[1] - TAIL_BYTES

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[M, columns] in `dtype`, a new tensor."""
        if self.packed.is_meta:  # there is nothing to unpack
            return torch.empty(self.shape, dtype=dtype, device=self.packed.device)
        if _UNPACK is not None and runs_natively(self.packed):
            found: Tensor = _UNPACK(self.packed)
            return found.to(dtype)
        tail = self.packed[:, -TAIL_BYTES:].contiguous().view(torch.float32)
        return (self.packed[:, :-TAIL_BYTES].float() * tail[:, :1] + tail[:, 1:]).to(dtype)


Rows = Tensor | CompactRows
"""A table [M, columns]: plain while it is trained, compact while it is only read."""


def pack_rows(table: Rows) -> CompactRows:
    """The table in eight bits; one that is packed already is given back."""
    if isinstance(table, CompactRows):
        return table
    table = table.detach().float()
    low, high = table.aminmax(dim=1, keepdim=True)
    step = (high - low) / _LEVELS
    codes = torch.where(step > 0, (table - low) / step, torch.zeros_like(table)).round_().clamp_(0, _LEVELS)
    tail = torch.cat([step, low], dim=1).contiguous().view(torch.uint8)
    return CompactRows(torch.cat([codes.to(torch.uint8), tail], dim=1))


def plain(table: Rows, dtype: torch.dtype) -> Tensor:
    """The table for a product with states of `dtype`; a plain one is given back as it is."""
    return table.values(dtype) if isinstance(table, CompactRows) else table


def runs_natively(packed: Tensor) -> bool:
    """Whether torch's own operators on such tables are to be used; elsewhere plain ones do the same."""
    return packed.device.type == "cpu" and not torch.compiler.is_compiling()


_RESPONSES = getattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward", None)
_COMPACT_SUMS = getattr(torch.ops.quantized, "embedding_bag_byte_rowwise_offsets", None)
_SUM = 0  # the operator's number for a bag that is summed


@dataclass(frozen=True)
class Bags:
    """Which of T times k flat entries belong to which token: `starts` int64 [T], and `owner` int64 [T * k]."""

    starts: Tensor
    owner: Tensor

    @classmethod
    def of(cls, tokens: int, entries: int, device: torch.device) -> Bags:
        """Bags of so many entries for every token."""
        starts = torch.arange(0, tokens * entries, entries, device=device)
        owner = torch.arange(tokens, device=device).repeat_interleave(entries)
        return cls(starts, owner)


def chosen(values: Tensor, indices: Tensor) -> Tensor:
    """`values[indices]` [T, k] of values [M], at a third of its cost on a CPU."""
    return values.index_select(0, indices.view(-1)).view(indices.shape)


def row_responses(states: Tensor, table: Tensor, indices: Tensor, bags: Bags) -> Tensor:
    """Scalar products of each state with its chosen rows: [T, k] of states [T, d], table [M, d], indices [T, k]."""
    # The operator has no derivative of its own.
    if _RESPONSES is None or torch.is_grad_enabled() or states.dtype != table.dtype:
        return (table[indices] * states.unsqueeze(1)).sum(-1)
    given = (states, table)
    if states.is_cuda and states.dtype == torch.bfloat16:  # torch has none of it there: pytorch #185808
        given = (states.float(), table.float())
    flat: Tensor = _RESPONSES(*given, indices.view(-1), bags.starts, bags.owner, _SUM)
    return flat.view(indices.shape).to(states.dtype)


def row_sums(table: Rows, indices: Tensor, weights: Tensor, bags: Bags) -> Tensor:
    """Weighted sums of each token's chosen rows: [T, columns] of table [M, columns], indices and weights [T, k].

    In the table's own precision, or in float32 where it is compact.
    """
    if isinstance(table, CompactRows):
        # The operator has no derivative of its own.
        if _COMPACT_SUMS is not None and runs_natively(table.packed) and not torch.is_grad_enabled():
            given = (table.packed, indices.view(-1), bags.starts)
            sums: Tensor = _COMPACT_SUMS(*given, False, _SUM, False, weights.float().view(-1), None, False)
            return sums
        table = table.values()
    weights = weights.to(table.dtype).view(-1)
    return functional.embedding_bag(indices.view(-1), table, bags.starts, mode="sum", per_sample_weights=weights)


def spread(weights: Tensor, indices: Tensor, count: int) -> Tensor:
    """The weights [T, k] at their places in a dense [T, count], for products with a gradient."""
    return torch.zeros(len(weights), count, dtype=weights.dtype, device=weights.device).scatter(1, indices, weights)
