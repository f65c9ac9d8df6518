"""Feature bank: the source readout's features at the words of many texts, and a target's maps to these features.

Canonical coordinates are expensive to store (three knots of 256 a word), so a file holds them for some two thousand
words.  The readout needs far less per word: its few features, and the head-only control's logits.  At 1.7 bits
each, tens of thousands of words fit.  Ridge regression on them fits a target's map from its own states at all depths
to those features (figures: tests/benchmarks/README.md).  The regression averages over words, so the coarse codes cost
little accuracy.

No label and no gradient is used.  Only moments of the states are kept in memory, never all states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from uhl_cli.align.bank import depth_index
from uhl_cli.align.moments import Moments, fit_moments
from uhl_cli.align.states import Progress, WordBatch, record_states, word_batches
from uhl_cli.align.texts import AnchorTexts
from uhl_cli.codes.quantise import quantise_columns
from uhl_cli.host.checkpoint import Host
from uhl_cli.host.hostmap import HostMap

# Step of a feature's code, in standard deviations.
STEP = 1.4
# Maximum number of regressors, unless one state at every knot already has more: the cost grows with their square.
# With 4,096 (all depths of minilm-l6) a port to it took up to 1.7 times as long and scored no better
# (tests/benchmarks/README.md).
MAX_REGRESSORS = 1536
# One block of texts in this many is held out to choose the ridge strength.
HELD_OUT, HELD_OUT_TEXTS = 4, 32
_BATCH_SIZE = 16  # 32 texts take a tenth less time, but more memory than a port should use


@dataclass(frozen=True)
class FeatureBank:
    """Texts with quantised features of all their chosen words.  W words, F = readout_size + num_labels.

    `codes` int8 [W, F], within -7..7; `scales`, `mean` float32 [F].  The first readout_size columns are the
    input of the readout's activation, the others the logits of the head-only control.  `shift` [readout_size] is the
    mean change of the readout's features by the updates on the source, see `ported.shift`.
    """

    anchors: AnchorTexts
    codes: Tensor
    scales: Tensor
    mean: Tensor
    shift: Tensor

    @property
    def values(self) -> Tensor:
        """float32 [W, F]: the dequantised features."""
        return self.codes.float() * self.scales + self.mean


@dataclass(frozen=True)
class FeatureMaps:
    """Maps from a host's states straight to the readout's features.

    `depth_weights[depth]` [readout_size, d] and `bias` [readout_size] are summed over depths; `head` [labels, d] and
    `head_bias` [labels] give the head-only control's logits from the final state.  `quality` is the held-out R^2 of
    the features, averaged.  Even a perfect map reaches only about 0.85 on held-out words, because the codes are coarse.
    """

    depth_weights: dict[int, Tensor]
    bias: Tensor
    head: Tensor
    head_bias: Tensor
    quality: float

    def to(self, device: torch.device) -> FeatureMaps:
        """The same maps on a device."""
        depth_weights = {depth: weight.to(device) for depth, weight in self.depth_weights.items()}
        head, head_bias = self.head.to(device), self.head_bias.to(device)
        return replace(self, depth_weights=depth_weights, bias=self.bias.to(device), head=head, head_bias=head_bias)


@dataclass(frozen=True)
class FeaturePrior:
    """The same maps through canonical space: `depth_weights[depth]` [readout_size, d] and `head` [labels, d]."""

    depth_weights: dict[int, Tensor]
    head: Tensor


def quantise_features(anchors: AnchorTexts, features: Tensor, shift: Tensor, *, step: float = STEP) -> FeatureBank:
    """The bank of the source's features [W, F] at the anchors' words; `shift` as in `FeatureBank`.

    :param step: Step of the quantiser, in standard deviations of a feature.
    """
    mean = features.float().mean(0)
    codes, scales = quantise_columns(features.float() - mean, step)
    return FeatureBank(anchors, codes, scales, mean, shift)


@torch.no_grad()  # not inference_mode: tuning backpropagates through these maps
def align_features(
    host: Host,
    bank: FeatureBank,
    *,
    knots: Sequence[float],
    depths: Sequence[int],
    readout_size: int,
    prior: FeaturePrior | None = None,
    progress: Progress | None = None,
) -> FeatureMaps | None:
    """Fit a host's maps to the bank's features; None when too few words fit into the host's input.

    :param depths: Depths, 0 to L, that may be used; wide and deep hosts use a part of them.
    :param prior: Maps through canonical space.  The ridge shrinks towards them where all their depths are used: they
        are better than zero for a feature that the bank hardly determines, and on the source they are already right.
    """
    used = depths_within(depths, knots, host.map)
    width, final = host.hidden_size, host.num_hidden_layers
    values = bank.values.to(host.device)
    fitted, held = Moments(), Moments()
    batches = word_batches(host, bank.anchors, batch_size=_BATCH_SIZE, progress=progress)
    for index, batch in enumerate(batches):
        states = _pooled_states(host, batch, sorted({*used, final}))
        inputs = torch.cat([states[depth] for depth in used], dim=1)
        target = values[batch.rows]
        # Texts are sorted by length, so held-out blocks are spread over the order.
        judges = index * _BATCH_SIZE // HELD_OUT_TEXTS % HELD_OUT == HELD_OUT - 1
        (held if judges else fitted).add(inputs, target)
    if fitted.rows < 2 * width or held.rows < 32:
        return None
    start = None
    if prior is not None and set(prior.depth_weights) <= set(used):
        start = torch.zeros(len(used) * width, values.shape[1])
        for depth, weight in prior.depth_weights.items():
            start[used.index(depth) * width : (used.index(depth) + 1) * width, :readout_size] = weight.T
    weight, offset, r2 = fit_moments(fitted, held, prior=start)
    head, head_bias = torch.zeros(0, width), torch.zeros(0)
    if final in used:
        span = slice(used.index(final) * width, (used.index(final) + 1) * width)
        head_start = None if prior is None else torch.cat([torch.zeros(readout_size, width), prior.head]).T
        head_weight, head_bias, _ = fit_moments(fitted.part(span), held.part(span), prior=head_start)
        head, head_bias = head_weight[:, readout_size:].T.contiguous(), head_bias[readout_size:]
    columns = weight[:, :readout_size]
    depth_weights = {
        depth: columns[index * width : (index + 1) * width].T.contiguous() for index, depth in enumerate(used)
    }
    quality = float(r2[:readout_size].mean())
    return FeatureMaps(depth_weights, offset[:readout_size], head, head_bias, quality)


def _pooled_states(host: Host, batch: WordBatch, depths: Sequence[int]) -> dict[int, Tensor]:
    """Mean state of every word at some depths, float32 [words, d]."""
    found: dict[int, Tensor] = {}

    def record(place: str, index: int, state: Tensor) -> None:
        if place == "stream" and index in depths:
            found[index] = batch.weights @ state.reshape(-1, state.shape[-1]).float()

    with record_states(host.map, record):
        output = host.map.base(**batch.encoded.model_inputs())
    record("stream", host.num_hidden_layers, output.last_hidden_state)
    return found


def depths_within(depths: Sequence[int], knots: Sequence[float], host_map: HostMap) -> list[int]:
    """As many depths as `MAX_REGRESSORS` allows: the knots' first, then those farthest from the ones chosen so far."""
    needed = [depth for depth in depths if depth in {depth_index(knot, host_map.num_hidden_layers) for knot in knots}]
    chosen = needed or list(depths[-1:])
    spare = [depth for depth in depths if depth not in chosen]
    while spare and (len(chosen) + 1) * host_map.hidden_size <= MAX_REGRESSORS:
        farthest = max(spare, key=lambda depth: (min(abs(depth - other) for other in chosen), -depth))
        chosen.append(farthest)
        spare.remove(farthest)
    return sorted(chosen)
