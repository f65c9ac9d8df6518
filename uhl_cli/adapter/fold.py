"""Folding: canonical adapter + alignment + host weights -> the few matrices that a forward pass needs.

Products that do not depend on the token are computed once (docs/method.md, "Update"): V P_in, R P_in, P_out U^T (and
W P_out U^T where a module is fused), and the readout's first layer with its weights by depth.  Training (with
gradients), porting (without) and counting FLOPs (on the meta device) use the same code.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from uhl_cli.adapter.canonical import mix, size_gains
from uhl_cli.adapter.module import READERS, WRITERS, PortedAdapter, PortedLayer, PortedReadout, edit_name
from uhl_cli.align.alignment import Alignment, LayerMaps, single_depth_weights
from uhl_cli.align.features import FeaturePrior
from uhl_cli.host.hostmap import HostMap, TargetModule


def fold(
    stored: dict[str, Tensor],
    alignment: Alignment,
    host_map: HostMap,
    *,
    layers: Collection[int] | None = None,
    types: Collection[str] | None = None,
    updates: bool = True,
    shift: Tensor | None = None,
) -> PortedAdapter:
    """Fold `stored` parameters (see `CanonicalAdapter.stored`) for one host.

    :param layers: Layers that get updates; all by default.  `types`: update types that are kept; all by default.
    :param updates: False folds the readout alone: the control `readout_only`.
    :param shift: The readout adds this to its features while updates are on, see `ported.shift`.
    """
    read_gain, write_gain = size_gains(stored, alignment.width)
    task_bias = stored["task_router"] @ stored["task_embedding"]
    kept = set(types) if types is not None else {*READERS, *WRITERS, "readout"}
    folded: dict[int, PortedLayer] = {}
    for layer in host_map.layers if updates else ():
        if layers is not None and layer.index not in layers:
            continue
        maps = alignment.layers[layer.index]
        edits: dict[str, Tensor] = {}
        target_modules = {name: linear for name, linear in layer.target_modules.items() if name in kept}
        for linear in target_modules.values():
            if (name := edit_name(linear)) not in edits:
                edits[name] = _edit(linear, maps, stored["atoms_u"] * write_gain)
        if target_modules:
            folded[layer.index] = _layer(stored, maps, read_gain, task_bias, edits, target_modules)
    edited = updates and "readout" in kept
    shift = shift if edited or folded else None
    readout = _readout(stored, alignment, read_gain, task_bias, edited, shift)
    knots = stored["readout_in_weight"].shape[1] // read_gain.shape[0]
    noise_maps = {
        "router": stored["router"] * read_gain,
        "read": stored["atoms_v"] * read_gain,
        "readout": stored["readout_in_weight"] * read_gain.repeat(knots),
    }
    return PortedAdapter(stored["threshold"], folded, readout, noise_maps)


def refold(
    folded: PortedAdapter,
    stored: dict[str, Tensor],
    alignment: Alignment,
    *,
    new_readout: bool,
) -> PortedAdapter:
    """`folded` for another task of the same adapter: what `fold(stored, ...)` would give, at a fraction of its cost.

    `stored` may differ from the folded parameters in delta-theta, the number of thresholds and, with `new_readout`,
    the readout, which then has no shift.  Everything else is shared with `folded`.  The caller must ensure this.
    """
    layers = {
        index: layer.with_gains(_gains(stored, alignment.layers[index].depth, layer.gains))
        for index, layer in folded.by_layer.items()
    }
    readout = folded.readout
    if new_readout:
        read_gain, _ = size_gains(stored, alignment.width)
        task_bias = stored["task_router"] @ stored["task_embedding"]
        readout = _readout(stored, alignment, read_gain, task_bias, readout.layer is not None, None)
    elif readout.layer is not None:
        layer = readout.layer.with_gains(_gains(stored, 1.0, readout.layer.gains))
        readout = readout.changed(layer=layer, shift=readout.shift)
    return PortedAdapter(stored["threshold"], layers, readout, folded.noise_maps)


def feature_prior(stored: dict[str, Tensor], alignment: Alignment, knots: Sequence[float]) -> FeaturePrior:
    """Maps to the readout's features (for each knot from the nearest depth) and to the head-only control's logits."""
    gain, _ = size_gains(stored, alignment.width)
    depth_weights, offset = single_depth_weights(alignment.layers, knots)
    depth_weights, _ = _canonical_depth_weights(stored, gain, depth_weights, offset)
    return FeaturePrior(depth_weights, stored["head_weight"] @ alignment.layers[-1].read)


def _edit(linear: TargetModule, maps: LayerMaps, atoms: Tensor) -> Tensor:
    """P_out u_j of all atoms as rows, in the stream or in the module's input; W P_out u_j for a part of a module."""
    write = {"stream": maps.write_stream, "mlp": maps.write_mlp, "attention": maps.write_attention}[linear.space]
    rows = atoms @ write.T.to(atoms.device)
    if linear.fused:
        rows = rows @ linear.weight().to(device=atoms.device, dtype=torch.float32).T
    return rows


def _gains(stored: dict[str, Tensor], depth: float, types: Collection[str]) -> dict[str, Tensor]:
    return {name: mix(stored, depth, name) for name in types}


def _layer(
    stored: dict[str, Tensor],
    maps: LayerMaps,
    read_gain: Tensor,
    task_bias: Tensor,
    edits: Mapping[str, Tensor],
    types: Collection[str],
) -> PortedLayer:
    device = read_gain.device
    inward = read_gain[:, None] * maps.read.to(device)
    router, atoms = stored["router"] @ inward, stored["atoms_v"] @ inward
    mean = maps.mean.to(device)
    gains = _gains(stored, maps.depth, types)
    return PortedLayer(router, task_bias - router @ mean, atoms, -(atoms @ mean), edits, gains)


def _readout(
    stored: dict[str, Tensor],
    alignment: Alignment,
    gain: Tensor,
    task_bias: Tensor,
    update: bool,
    shift: Tensor | None,
) -> PortedReadout:
    if alignment.features is not None:
        depth_weights = {depth: weight.to(gain.device) for depth, weight in alignment.features.depth_weights.items()}
        bias = alignment.features.bias.to(gain.device)
    else:
        depth_weights, bias = _canonical_depth_weights(stored, gain, alignment.depth_weights, alignment.depth_bias)
    layer = None
    if update:
        # In canonical space the update edits z itself, so no projector stands between it and the readout.
        final = stored["readout_in_weight"][:, -gain.shape[0] :]
        edits = {"readout": stored["atoms_u"] @ final.T}
        layer = _layer(stored, alignment.layers[-1], gain, task_bias, edits, ("readout",))
    return PortedReadout(
        depth_weights,
        bias,
        layer,
        stored.get("readout_pool"),
        stored["readout_out_weight"],
        stored["readout_out_bias"],
        None if shift is None else shift.to(gain.device),
    )


def _canonical_depth_weights(
    stored: dict[str, Tensor], gain: Tensor, depth_weights: dict[int, Tensor], offset: Tensor
) -> tuple[dict[int, Tensor], Tensor]:
    """Taps and bias of the readout's first layer on canonical coordinates."""
    weight = stored["readout_in_weight"]
    gained = weight * gain.repeat(weight.shape[1] // gain.shape[0])
    folded = {depth: gained @ weight.to(gain.device) for depth, weight in depth_weights.items()}
    return folded, stored["readout_in_bias"] + gained @ offset.to(gain.device)
