"""Folding: canonical adapter + alignment + host weights -> the few matrices that a forward pass needs.

All that does not depend on the token is multiplied out once (DESIGN 2.6): V P_in, R P_in, P_out U^T (and W P_out U^T
where a module is fused), and the readout's first layer with the taps.  The same code serves training (with gradients)
and porting (without).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from uhl_cli.adapter.canonical import mix, size_gains
from uhl_cli.adapter.sparse import CompactRows, Rows, pack_rows
from uhl_cli.align.alignment import Alignment, LayerMaps, single_taps
from uhl_cli.align.features import FeaturePrior
from uhl_cli.host.hostmap import HostMap, Site

READERS = ("q", "k", "v", "up", "gate")
WRITERS = ("o", "down")


@dataclass(frozen=True)
class FoldedLayer:
    """Maps of one layer of a host of width d; M atoms.

    `router` [M, d] and `router_bias` [M] give the logits of a stream state; `read` [M, d] and `read_bias` [M]
    the atoms' responses v_j . z.  A type with `gains[type]` [M], which is g(t, type), is edited: the rows of
    `edits[edit_name(site)]`, weighted by routing weight times response times gain, are added.  To what a reader reads,
    [M, d] (W (x + delta) is dW = W Delta, and needs no weight of the host); to what a writer writes, [M, d], and there
    the response is that of its own output; to the output of a part of a fused module, [M, out_features], because its
    parts have a gain each and one input.  Gains stay apart because they alone differ between the task files of one
    adapter.  The tables are compact once the adapter is only read, see `compact`.
    """

    router: Rows
    router_bias: Tensor
    read: Rows
    read_bias: Tensor
    edits: dict[str, Rows]
    gains: dict[str, Tensor]


@dataclass(frozen=True)
class FoldedReadout:
    """The canonical readout on a host: `taps[depth]` [readout_size, d] and the layers after them.

    `layer` routes the readout's own update from the final state; it is None when the update is left out, and
    its single edit "readout" is [M, readout_size].  `pool` is None for token tasks.  `shift` [readout_size], if any,
    is added to the features while updates are on (see `shift`).  Like a layer's tables, taps are compact once they
    are only read.
    """

    taps: Mapping[int, Rows]
    bias: Tensor
    layer: FoldedLayer | None
    pool: Tensor | None
    out_weight: Tensor
    out_bias: Tensor
    shift: Tensor | None = None


@dataclass(frozen=True)
class MergedWeights:
    """What stands in place of a module's own weight and bias while a static adapter is attached; see `static`."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class FoldedAdapter:
    """An adapter in the shape of one host: what `inject` attaches and what `port --output` keeps.

    `noise_maps` say how an error of z reaches routers, responses and readout; only training uses them.  `merged` is
    that of the static mode, by module name; it stands in place of `layers`.
    """

    threshold: Tensor
    layers: dict[int, FoldedLayer]
    readout: FoldedReadout
    kind: str
    noise_maps: dict[str, Tensor] = field(default_factory=dict)
    merged: dict[str, MergedWeights] = field(default_factory=dict)


def fold(
    stored: dict[str, Tensor],
    alignment: Alignment,
    host_map: HostMap,
    *,
    kind: str,
    layers: Collection[int] | None = None,
    types: Collection[str] | None = None,
    updates: bool = True,
) -> FoldedAdapter:
    """Fold `stored` parameters (see `CanonicalAdapter.stored`) for one host.

    :param layers: Layers that get updates; all by default.  `types`: update types that are kept; all by default.
    :param updates: False folds the readout alone, which is the control 'readout only'.
    """
    read_gain, write_gain = size_gains(stored, alignment.width)
    task_bias = stored["task_router"] @ stored["task_embedding"]
    kept = set(types) if types is not None else {*READERS, *WRITERS, "readout"}
    folded: dict[int, FoldedLayer] = {}
    for layer in host_map.layers if updates else ():
        if layers is not None and layer.index not in layers:
            continue
        maps = alignment.layers[layer.index]
        edits: dict[str, Rows] = {}
        sites = {name: site for name, site in layer.sites.items() if name in kept}
        for site in sites.values():
            if (name := edit_name(site)) not in edits:
                edits[name] = _edit(site, maps, stored["atoms_u"] * write_gain)
        if sites:
            folded[layer.index] = _folded_layer(stored, maps, read_gain, task_bias, edits, sites)
    edited = updates and "readout" in kept
    readout = _fold_readout(stored, alignment, read_gain, task_bias, edited, shifted=edited or bool(folded))
    knots = stored["readout_in_weight"].shape[1] // read_gain.shape[0]
    noise_maps = {
        "router": stored["router"] * read_gain,
        "read": stored["atoms_v"] * read_gain,
        "readout": stored["readout_in_weight"] * read_gain.repeat(knots),
    }
    return FoldedAdapter(stored["threshold"], folded, readout, kind, noise_maps)


def edit_name(site: Site) -> str:
    """Which of a layer's edits a site takes: that of its space, or its own if it is a part of a fused module."""
    return site.type if site.fused else site.space


def edit_columns(sites: Iterable[Site], width: int) -> dict[str, int]:
    """Columns of the edits that these sites of one layer take, on a host of this width."""
    return {edit_name(site): site.out_features if site.fused else width for site in sites}


def _edit(site: Site, maps: LayerMaps, atoms: Tensor) -> Tensor:
    """P_out u_j of all atoms as rows, in the stream or in what the site reads; W P_out u_j for a part of a module."""
    write = {"stream": maps.write_stream, "mlp": maps.write_mlp, "attention": maps.write_attention}[site.space]
    rows = atoms @ write.T.to(atoms.device)
    if site.fused:
        rows = rows @ site.weight().to(device=atoms.device, dtype=torch.float32).T
    return rows


def refold(
    folded: FoldedAdapter,
    stored: dict[str, Tensor],
    alignment: Alignment,
    *,
    new_readout: bool,
) -> FoldedAdapter:
    """`folded` for another task of the same adapter: what `fold(stored, ...)` would give, at a fraction of its cost.

    `stored` may differ from what was folded in delta-theta, the number of thresholds and, if `new_readout` says so,
    the readout; all else is shared with `folded`.  The caller answers for that.
    """
    layers = {
        index: replace(layer, gains=_gains(stored, alignment.layers[index].depth, layer.gains))
        for index, layer in folded.layers.items()
    }
    readout = folded.readout
    if new_readout:
        read_gain, _ = size_gains(stored, alignment.width)
        task_bias = stored["task_router"] @ stored["task_embedding"]
        edited = readout.layer is not None
        shifted = edited or bool(folded.layers)
        readout = _fold_readout(stored, alignment, read_gain, task_bias, edited, shifted=shifted)
    elif readout.layer is not None:
        readout = replace(readout, layer=replace(readout.layer, gains=_gains(stored, 1.0, readout.layer.gains)))
    kind = "tokens" if readout.pool is None else "sequence"
    return replace(folded, threshold=stored["threshold"], layers=layers, readout=readout, kind=kind)


def _gains(stored: dict[str, Tensor], depth: float, types: Collection[str]) -> dict[str, Tensor]:
    return {name: mix(stored, depth, name) for name in types}


def _folded_layer(
    stored: dict[str, Tensor],
    maps: LayerMaps,
    read_gain: Tensor,
    task_bias: Tensor,
    edits: dict[str, Rows],
    types: Collection[str],
) -> FoldedLayer:
    device = read_gain.device
    inward = read_gain[:, None] * maps.read.to(device)
    router, atoms = stored["router"] @ inward, stored["atoms_v"] @ inward
    mean = maps.mean.to(device)
    gains = _gains(stored, maps.depth, types)
    return FoldedLayer(router, task_bias - router @ mean, atoms, -(atoms @ mean), edits, gains)


def _fold_readout(
    stored: dict[str, Tensor], alignment: Alignment, gain: Tensor, task_bias: Tensor, update: bool, *, shifted: bool
) -> FoldedReadout:
    shift = None
    if alignment.features is not None:
        shift = alignment.features.shift if shifted else None
        taps = {depth: tap.to(gain.device) for depth, tap in alignment.features.taps.items()}
        bias = alignment.features.bias.to(gain.device)
    else:
        taps, bias = _canonical_taps(stored, gain, alignment.taps, alignment.tap_offset)
    layer = None
    if update:
        # In canonical space the update edits z itself, so no projector stands between it and the readout.
        final = stored["readout_in_weight"][:, -gain.shape[0] :]
        layer = _folded_layer(
            stored, alignment.layers[-1], gain, task_bias, {"readout": stored["atoms_u"] @ final.T}, ("readout",)
        )
    return FoldedReadout(
        taps,
        bias,
        layer,
        stored.get("readout_pool"),
        stored["readout_out_weight"],
        stored["readout_out_bias"],
        None if shift is None else shift.to(gain.device),
    )


def feature_prior(stored: dict[str, Tensor], alignment: Alignment, knots: Sequence[float]) -> FeaturePrior:
    """The maps to the readout's features, each knot's from the nearest depth, and to the head-only control's logits."""
    gain, _ = size_gains(stored, alignment.width)
    taps, offset = single_taps(alignment.layers, knots)
    taps, _ = _canonical_taps(stored, gain, taps, offset)
    return FeaturePrior(taps, stored["head_weight"] @ alignment.layers[-1].read)


def _canonical_taps(
    stored: dict[str, Tensor], gain: Tensor, taps: dict[int, Tensor], offset: Tensor
) -> tuple[dict[int, Tensor], Tensor]:
    """Taps and bias of the readout's first layer on canonical coordinates."""
    weight = stored["readout_in_weight"]
    gained = weight * gain.repeat(weight.shape[1] // gain.shape[0])
    folded = {depth: gained @ tap.to(gain.device) for depth, tap in taps.items()}
    return folded, stored["readout_in_bias"] + gained @ offset.to(gain.device)


def compact(folded: FoldedAdapter) -> FoldedAdapter:
    """The same adapter for inference alone: its layers' tables and the readout's taps in eight bits."""

    def layer(value: FoldedLayer) -> FoldedLayer:
        edits: dict[str, Rows] = {name: pack_rows(edit) for name, edit in value.edits.items()}
        return replace(value, router=pack_rows(value.router), read=pack_rows(value.read), edits=edits)

    taps = {depth: pack_rows(tap) for depth, tap in folded.readout.taps.items()}
    readout = replace(folded.readout, taps=taps)
    if readout.layer is not None:
        readout = replace(readout, layer=layer(readout.layer))
    layers = {index: layer(value) for index, value in folded.layers.items()}
    return replace(folded, layers=layers, readout=readout)


def move(folded: FoldedAdapter, device: torch.device, dtype: torch.dtype) -> FoldedAdapter:
    """The same adapter for inference: detached, every tensor on `device`, in `dtype` if not compact, no noise maps."""

    def one(value: Tensor) -> Tensor:
        return value.detach().to(device=device, dtype=dtype).contiguous()

    def table(value: Rows) -> Rows:
        return CompactRows(value.packed.to(device)) if isinstance(value, CompactRows) else one(value)

    def layer(value: FoldedLayer) -> FoldedLayer:
        edits = {name: table(edit) for name, edit in value.edits.items()}
        gains = {name: one(gain) for name, gain in value.gains.items()}
        return FoldedLayer(
            table(value.router), one(value.router_bias), table(value.read), one(value.read_bias), edits, gains
        )

    readout = FoldedReadout(
        taps={depth: table(tap) for depth, tap in folded.readout.taps.items()},
        bias=one(folded.readout.bias),
        layer=None if folded.readout.layer is None else layer(folded.readout.layer),
        pool=None if folded.readout.pool is None else one(folded.readout.pool),
        out_weight=one(folded.readout.out_weight),
        out_bias=one(folded.readout.out_bias),
        shift=None if folded.readout.shift is None else one(folded.readout.shift),
    )
    layers = {index: layer(value) for index, value in folded.layers.items()}
    return FoldedAdapter(one(folded.threshold), layers, readout, folded.kind)
