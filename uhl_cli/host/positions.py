"""How long a text a model has positions for, from what it reads in a pass."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from uhl_cli.host.trace import Tracer, probe_ids
from uhl_cli.host.untrusted import FOREIGN

_TOKENS = 5
# A position table has more rows than this; smaller tables that are read at 0, 1, 2 ... count something else.
_FEWEST_POSITIONS = 16


def positions_of(base: nn.Module) -> int | None:
    """Longest text, in tokens, that a base model in eval mode has positions for; None if nothing limits it.

    Rows of its position table from the one of a text's first token on: RoBERTa starts at its padding's id + 1, OPT at
    2.  Without such a table, or if the model does not run, it is what the configuration says.
    """
    reads = _TableReads()
    parameter = next(base.parameters(), None)
    with suppress(*FOREIGN), torch.no_grad(), reads:
        Tracer(base, probe_ids(base, 1, _TOKENS, None if parameter is None else parameter.device)).final()
    tables = [rows - first for first, rows in reads.found if rows > _FEWEST_POSITIONS]
    if tables:
        return min(tables)
    positions = getattr(getattr(base, "config", None), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


class _TableReads(TorchFunctionMode):
    """Notes (first row, rows) of every table that is read at consecutive rows, one for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, int]] = []

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if func is torch.nn.functional.embedding:
            index = args[0]
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            rows = index.reshape(-1)[:_TOKENS]
            if index.shape[-1:] == (_TOKENS,) and bool((rows[1:] - rows[:-1] == 1).all()):
                self.found.append((int(index.min()), len(weight)))
        return func(*args, **kwargs)
