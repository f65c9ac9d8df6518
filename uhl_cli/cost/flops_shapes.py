"""An adapter folded in shape alone, on the meta device: for counting on a host that has no weights."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from uhl_cli.adapter.fold import READERS, WRITERS, FoldedAdapter, FoldedLayer, FoldedReadout, edit_columns
from uhl_cli.adapter.sparse import TAIL_BYTES, CompactRows
from uhl_cli.cost.plan import PortPlan
from uhl_cli.host.hostmap import HostMap
from uhl_cli.schema import AdapterConfig


def shape_only(host_map: HostMap, plan: PortPlan, config: AdapterConfig, *, shifted: bool = False) -> FoldedAdapter:
    """What `fold`, `compact` and `move` would give for this plan: the same shapes, on the meta device, without values.

    The readout listens to every depth of the plan.  An alignment may find that fewer serve better, so that the
    ported adapter costs at most as much.

    :param shifted: Whether the readout is given a shift, as one that a feature bank has fitted is.
    """
    like = host_map.embeddings.weight
    width, atoms, readout = host_map.hidden_size, config.num_atoms, config.readout_size

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=like.dtype, device="meta")

    def rows(*shape: int) -> CompactRows:
        return CompactRows(torch.empty(shape[0], shape[1] + TAIL_BYTES, dtype=torch.uint8, device="meta"))

    def layer(edits: dict[str, int], types: Collection[str]) -> FoldedLayer:
        return FoldedLayer(
            router=rows(atoms, width),
            router_bias=empty(atoms),
            read=rows(atoms, width),
            read_bias=empty(atoms),
            edits={name: rows(atoms, features) for name, features in edits.items()},
            gains={name: empty(atoms) for name in types},
        )

    layers = {}
    for place in host_map.layers:
        kept = {name for name in (*READERS, *WRITERS) if name in plan.types}
        sites = {name: site for name, site in place.sites.items() if name in kept}
        if place.index in plan.layers and sites:
            layers[place.index] = layer(edit_columns(sites.values(), width), sites)
    return FoldedAdapter(
        threshold=empty(config.top_k),
        layers=layers,
        readout=FoldedReadout(
            taps={depth: rows(readout, width) for depth in plan.tap_depths},
            bias=empty(readout),
            layer=layer({"readout": readout}, ("readout",)) if "readout" in plan.types else None,
            pool=empty(readout) if config.kind == "sequence" else None,
            out_weight=empty(config.num_labels, readout),
            out_bias=empty(config.num_labels),
            shift=empty(readout) if shifted else None,
        ),
        kind=config.kind,
    )
