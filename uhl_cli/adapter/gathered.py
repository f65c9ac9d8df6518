"""Products with a few chosen rows of a table: what makes sparse updates cheaper than dense ones.

Neither copies the chosen rows out: a weighted sum of rows is an embedding bag, and the responses of rows are what torch
computes for the gradient of such a bag's weights.  On a CPU that takes a tenth of gathering and multiplying, and a sum
of rows in eight bits three quarters of that again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from uhl_cli.adapter.rows import CompactRows, Rows, runs_natively

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
