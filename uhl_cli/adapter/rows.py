"""Tables of rows in eight bits: what keeps a ported adapter small beside its host, and its weighted sums fast.

A folded adapter is mostly tables of M rows, of which each token takes a few.  In eight bits they hold a quarter of the
bytes, and fewer bytes pass through the memory for every sum.  The file's own parameters have eight bits or fewer, so
that nothing they say is lost by it (figures: tests/benchmarks/README.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
