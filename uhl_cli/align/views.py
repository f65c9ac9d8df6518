"""Width views: the source host as hosts of other widths would show it (DESIGN 2.2).

A narrower host is imitated by a random subspace of the stream, aligned like any target and written back in the
source's own coordinates.  A wider host holds what the source holds, so its maps are the source's; only the
width that the hyper-MLP is told differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from uhl_cli.align.alignment import Alignment, align_anchors
from uhl_cli.align.bank import AnchorBank
from uhl_cli.align.states import WordStates

# Widths relative to the source's own, narrow and wide in turn, so that a few views already span both sides.
RELATIVE_WIDTHS = (0.5, 2.0, 0.75, 3.0, 0.33, 1.5, 0.66, 4.0)


def width_views(
    bank: AnchorBank, states: WordStates, own: Alignment, tap_depths: Sequence[int], *, count: int, seed: int
) -> list[Alignment]:
    """`count` alignments of imitated widths, with maps in the source host's own coordinates."""
    width = own.width
    generator = torch.Generator().manual_seed(seed)
    views = []
    for index in range(count):
        relative = RELATIVE_WIDTHS[index % len(RELATIVE_WIDTHS)]
        imitated = max(8, round(width * relative))
        if imitated >= width:
            views.append(replace(own, width=imitated))
            continue
        gaussian = torch.randn(width, imitated, generator=generator, dtype=torch.float64)
        subspace = torch.linalg.qr(gaussian).Q.float()
        projected = states.each(partial(torch.matmul, other=subspace))
        views.append(_in_host_coordinates(align_anchors(bank, projected, tap_depths=tap_depths), subspace))
    return views


def _in_host_coordinates(alignment: Alignment, subspace: Tensor) -> Alignment:
    """Maps of the projected stream as maps of the stream itself; `subspace` [d, imitated width]."""
    layers = tuple(
        replace(maps.each(partial(torch.matmul, subspace)), mean=subspace @ maps.mean, read=maps.read @ subspace.T)
        for maps in alignment.layers
    )
    taps = {depth: tap @ subspace.T for depth, tap in alignment.taps.items()}
    return replace(alignment, layers=layers, taps=taps)
