"""Alignment: frozen linear maps between a host's stream and canonical space, by one of two strategies.

`anchors` regresses the host's own word states on the bank's coordinates and back (docs/method.md, "Alignment").
`size` is a fixed smooth basis that depends on the width only: a control that knows nothing of the host.

No strategy uses a label or a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from uhl_cli.align.bank import AnchorBank, depth_index
from uhl_cli.align.features import FeatureMaps
from uhl_cli.align.ridge import RidgeMap, fit_ridge, fit_ridges
from uhl_cli.align.states import WordStates
from uhl_cli.host.hostmap import HostMap

# For `new_word_quality`: the first coordinates carry most of the variance.
_LEADING = 16
MIN_DISTINCT = 100


@dataclass(frozen=True)
class LayerMaps:
    """Maps at one depth of a host of width d; canonical width is d0.

    `z = read @ (h - mean)`: `read` [d0, d], `mean` [d].  `write_*` [d, d0] map back: into the stream, and into
    the inputs of the attention and the mlp modules.  In hosts that normalise after the layer, the attention input is
    the stream itself, and `write_attention` is the same tensor as `write_stream`.
    """

    depth: float
    mean: Tensor
    read: Tensor
    write_stream: Tensor
    write_attention: Tensor
    write_mlp: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> LayerMaps:
        """Apply `change` to each map back; maps that share a tensor still share it."""
        stream = change(self.write_stream)
        attention = stream if self.write_attention is self.write_stream else change(self.write_attention)
        return replace(self, write_stream=stream, write_attention=attention, write_mlp=change(self.write_mlp))


@dataclass(frozen=True)
class Alignment:
    """All maps of one host.  `layers` has L + 1 entries; the last is for the host's final state.

    The canonical coordinates of a token at all knots, [knots * d0], are
    `sum over l of depth_weights[l] @ h_l + depth_bias`, with `depth_weights[l]` [knots * d0, d].
    `quality` is the held-out R^2 of each layer's `read`, averaged over coordinates; `knot_quality` is that of
    the coordinates at each knot.  Both are NaN-free, and empty where a strategy has nothing to measure.
    `features` (with a feature bank only) maps states to the features of the adapter's own readout directly, which is
    more accurate than through canonical space.  Readouts of other tasks use `depth_weights`.
    `new_words` is the `new_word_quality` of the states that it was fitted to, if it was measured.
    """

    strategy: str
    width: int
    layers: tuple[LayerMaps, ...]
    depth_weights: dict[int, Tensor]
    depth_bias: Tensor
    quality: tuple[float, ...]
    knot_quality: tuple[float, ...]
    features: FeatureMaps | None = None
    new_words: float | None = None

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers L."""
        return len(self.layers) - 1

    def to(self, device: torch.device) -> Alignment:
        """The same alignment with all maps on a device; training folds them at every step."""
        layers = tuple(
            replace(maps.each(lambda write: write.to(device)), mean=maps.mean.to(device), read=maps.read.to(device))
            for maps in self.layers
        )
        depth_weights = {depth: weight.to(device) for depth, weight in self.depth_weights.items()}
        features = None if self.features is None else self.features.to(device)
        return replace(
            self, layers=layers, depth_weights=depth_weights, depth_bias=self.depth_bias.to(device), features=features
        )


def align_anchors(
    bank: AnchorBank, states: WordStates, *, readout_depths: Sequence[int] | None = None, joint: bool = True
) -> Alignment:
    """Align by the anchors' states at every depth.

    :param readout_depths: Depths, 0 to L, that the readout's inputs are regressed on; all of them by default.
    :param joint: False skips the regression of the readout's inputs on many depths at once, the most expensive
        step; each knot then uses the map of the nearest depth.  This is enough when a feature bank gives the readout
        its maps.
    :raises AlignmentError: When too few anchors remain or the states are degenerate.
    """
    depth = states.num_hidden_layers
    present = states.present
    groups = torch.from_numpy(bank.anchors.groups())[present]
    depths = (list(range(depth + 1)) if readout_depths is None else list(readout_depths)) if joint else []
    nearest = [_nearest(depths, depth_index(knot, depth)) for knot in bank.knots] if joint else []
    layers, quality = [], []
    single: dict[int, RidgeMap] = {}
    for index in range(depth + 1):
        z = bank.at_depth(index / depth)[present]
        stream = states.stream[index][present]
        # A depth's states are decomposed once, for its own map and for those of the knots that it is nearest to.
        knots = [place for place, at in enumerate(nearest) if at == index]
        inward, *maps_of_knots = fit_ridges(stream, [z, *(bank.coordinates[knot, present] for knot in knots)], groups)
        single |= zip(knots, maps_of_knots, strict=True)
        places = {"stream": stream}
        if index < depth:
            if states.mlp[index] is not states.stream[index]:
                places["mlp"] = states.mlp[index][present]
            if states.attention[index] is not states.stream[index]:
                places["attention"] = states.attention[index][present]
        outward = fit_ridge(z, torch.cat(list(places.values()), dim=1), groups).weight.T.contiguous()
        writes = dict(zip(places, torch.split(outward, stream.shape[1]), strict=True))
        write = writes["stream"]
        maps = (inward.input_mean, inward.weight.T.contiguous(), write)
        layers.append(LayerMaps(index / depth, *maps, writes.get("attention", write), writes.get("mlp", write)))
        quality.append(_mean_r2(inward, z))
    if not joint:
        return _with_single_taps("anchors", bank, tuple(layers), tuple(quality))
    near = [(at, single[place]) for place, at in enumerate(nearest)]
    depth_weights, offset, knot_quality = _fit_depth_weights(bank, states, groups, depths, near)
    width = states.stream[0].shape[1]
    return Alignment("anchors", width, tuple(layers), depth_weights, offset, tuple(quality), knot_quality)


def _nearest(depths: Sequence[int], wanted: int) -> int:
    """Of these depths the one nearest to the wanted one, the first of two as near."""
    return min(depths, key=lambda depth: abs(depth - wanted))


def new_word_quality(bank: AnchorBank, states: WordStates) -> float | None:
    """How well the final states of some words predict the leading coordinates of others: R^2, 1 at best.

    Words of one spelling stay on one side of a split, so nothing is won by learning words by heart.  A host with the
    token ids of another tokenizer knows each word by an arbitrary vector and reaches zero.
    None for fewer than `MIN_DISTINCT` words, since the value is then uncertain.
    """
    present = states.present
    words = torch.from_numpy(bank.anchors.distinct())[present]
    if len(set(words.tolist())) < MIN_DISTINCT:
        return None
    coordinates = bank.at_depth(1.0)[present][:, :_LEADING]
    varying = coordinates[:, coordinates.std(0) > 0]
    return float(fit_ridge(states.stream[-1][present], varying, words).r2.mean())


def _fit_depth_weights(
    bank: AnchorBank,
    states: WordStates,
    groups: Tensor,
    depths: Sequence[int],
    near: Sequence[tuple[int, RidgeMap]],
) -> tuple[dict[int, Tensor], Tensor, tuple[float, ...]]:
    """Maps from the given depths to the canonical coordinates at each knot, their offset [knots * d0] and held-out R^2.

    Each knot is regressed on all depths at once or on the nearest one alone, whichever predicts held-out texts
    better: many depths help on a target host but only add noise on the source itself.

    :param near: The nearest depth of each knot, and the knot's map from it.
    """
    present = states.present
    stream = [states.stream[index][present] for index in depths]
    width, canonical = stream[0].shape[1], bank.scales.shape[1]
    coordinates = bank.coordinates[:, present]
    joint = None
    if len(depths) > 1:
        everything = coordinates.permute(1, 0, 2).reshape(int(present.sum()), -1)
        joint = fit_ridge(torch.cat(stream, dim=1), everything, groups)
    depth_weights: dict[int, Tensor] = {}
    offset = torch.zeros(len(bank.knots) * canonical)
    quality = []
    for place, (nearest, single) in enumerate(near):
        rows = slice(place * canonical, (place + 1) * canonical)
        used = bank.scales[place] > 0
        single_r2 = float(single.r2[used].mean())
        joint_r2 = float(joint.r2[rows][used].mean()) if joint is not None else -torch.inf
        if joint is not None and joint_r2 > single_r2:
            weight, mean, shift = joint.weight[:, rows], joint.input_mean, joint.output_mean[rows]
            parts = {depths[index]: weight[index * width : (index + 1) * width] for index in range(len(depths))}
        else:
            weight, mean, shift = single.weight, single.input_mean, single.output_mean
            parts = {nearest: weight}
        for index, part in parts.items():
            depth_weights.setdefault(index, torch.zeros(len(bank.knots) * canonical, width))[rows] = part.T
        offset[rows] = shift - mean @ weight
        quality.append(max(joint_r2, single_r2))
    return depth_weights, offset, tuple(quality)


def align_size(bank: AnchorBank, *, hidden_size: int, num_hidden_layers: int) -> Alignment:
    """The fixed smooth basis: discrete cosines over the host's coordinates, by width alone (a control)."""
    canonical = bank.scales.shape[1]
    basis = cosine_basis(canonical, hidden_size)
    layers = tuple(
        LayerMaps(index / num_hidden_layers, torch.zeros(hidden_size), basis, basis.T, basis.T, basis.T)
        for index in range(num_hidden_layers + 1)
    )
    return _with_single_taps("size", bank, layers, ())


def cosine_basis(rows: int, columns: int) -> Tensor:
    """float32 [rows, columns]: orthonormal discrete cosines, rows beyond `columns` zero."""
    position = (torch.arange(columns, dtype=torch.float64) + 0.5) / columns
    frequency = torch.arange(rows, dtype=torch.float64)[:, None]
    basis = torch.cos(math.pi * frequency * position) * math.sqrt(2.0 / columns)
    basis[0] /= math.sqrt(2.0)
    basis[columns:] = 0.0
    return basis.float()


def _with_single_taps(
    strategy: str, bank: AnchorBank, layers: tuple[LayerMaps, ...], quality: tuple[float, ...]
) -> Alignment:
    depth_weights, offset = single_depth_weights(layers, bank.knots)
    return Alignment(strategy, layers[0].mean.shape[0], layers, depth_weights, offset, quality, ())


def single_depth_weights(layers: Sequence[LayerMaps], knots: Sequence[float]) -> tuple[dict[int, Tensor], Tensor]:
    """Depth weights and offset where each knot uses the read map of the nearest depth alone."""
    canonical, width = layers[0].read.shape
    depth = len(layers) - 1
    depth_weights: dict[int, Tensor] = {}
    offset = torch.zeros(len(knots) * canonical)
    for place, knot in enumerate(knots):
        index = depth_index(knot, depth)
        rows = slice(place * canonical, (place + 1) * canonical)
        weight = depth_weights.setdefault(index, torch.zeros(len(knots) * canonical, width))
        weight[rows] = layers[index].read
        offset[rows] = -layers[index].read @ layers[index].mean
    return depth_weights, offset


def _mean_r2(fit: RidgeMap, targets: Tensor) -> float:
    """Mean held-out R^2 over the coordinates that vary at all."""
    varies = targets.std(0) > 0
    return float(fit.r2[varies].mean())


def align_shapes(
    bank: AnchorBank,
    host_map: HostMap,
    *,
    readout_depths: Sequence[int],
    feature_depths: Sequence[int] | None,
    readout_size: int,
) -> Alignment:
    """The alignment of a host without weights: shapes as from `align_anchors`, on the meta device, without values.

    The readout reads all depths that it may.  A real fit may use fewer, so a ported adapter costs at most as much.

    :param feature_depths: Depths that a feature bank's maps read; None without a bank.
    """
    canonical, width, depth = bank.scales.shape[1], host_map.hidden_size, host_map.num_hidden_layers

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    layers = tuple(
        LayerMaps(index / depth, empty(width), empty(canonical, width), *(empty(width, canonical) for _ in range(3)))
        for index in range(depth + 1)
    )
    rows = len(bank.knots) * canonical
    features = None
    if feature_depths is not None:
        depth_weights = {index: empty(readout_size, width) for index in feature_depths}
        features = FeatureMaps(depth_weights, empty(readout_size), empty(0, width), empty(0), 0.0)
    depth_weights = {index: empty(rows, width) for index in readout_depths}
    return Alignment("anchors", width, layers, depth_weights, empty(rows), (), (), features)
