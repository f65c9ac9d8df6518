"""The static mode: the updates' mean effect merged into the weights, so that they cost nothing at run time.

A routed update depends on the token: W (x + delta(x)).  The static one is the affine map delta(x) = A x + c that is
nearest to it in least squares over a set of texts, and merges: W (I + A), b + W c.  What an update adds to a module's
output merges as (I + A) W; that of a part of a fused module, which depends on the module's input, as W + A.  What the
routing does beyond the mean is lost, and how much that is must be measured.  The readout stays as it is, its own update
merged into its last tap.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from uhl_cli.adapter.folding import READERS, FoldedReadout, MergedWeights
from uhl_cli.adapter.inject import Injection
from uhl_cli.adapter.ported import PortedModel
from uhl_cli.adapter.rows import plain
from uhl_cli.align.moments import Moments, fit_moments
from uhl_cli.align.states import word_batches
from uhl_cli.align.texts import AnchorTexts
from uhl_cli.host.hostmap import Site, dense

# One token in this many judges the strength of the ridge.
_HELD = 4
Progress = Callable[[int, int], None]


@torch.no_grad()
def static(ported: PortedModel, texts: AnchorTexts, *, progress: Progress | None = None) -> PortedModel:
    """The same host and readout with all updates merged; `ported` stays as it is, and both share the host.

    Texts go through the host once, with the updates routed, and every module's moments take a d x d matrix.  The
    result holds a second copy of every edited weight; a pass costs the host's own FLOPs and the readout's.
    """
    fitted: dict[tuple[str, str], Moments] = defaultdict(Moments)
    held: dict[tuple[str, str], Moments] = defaultdict(Moments)
    mask = torch.empty(0, dtype=torch.bool)

    def observe(name: str, type_: str, source: Tensor, update: Tensor) -> None:
        inputs, outputs = source[mask].float(), update[mask].float()
        judges = torch.arange(len(inputs), device=inputs.device) % _HELD == 0
        fitted[name, type_].add(inputs[~judges], outputs[~judges])
        held[name, type_].add(inputs[judges], outputs[judges])

    host_map = ported.host.map
    with Injection(host_map, ported.folded, observer=observe) as injection:
        for batch in word_batches(ported.host, texts, progress=progress):
            mask = batch.encoded.content_mask.reshape(-1)
            injection.readout_features(host_map.base(**batch.encoded.model_inputs()).last_hidden_state)
    merged: dict[str, MergedWeights] = {}
    for layer in host_map.layers:
        for site in layer.sites.values():
            key = (site.name, site.type)
            if key in fitted:
                weight, offset, _ = fit_moments(fitted[key], held[key])
                merged[site.name] = _merged(site, merged.get(site.name), weight, offset)
    readout = ported.folded.readout
    if readout.layer is not None:
        readout = _merged_readout(readout, fitted["readout", "readout"], held["readout", "readout"], max(readout.taps))
    folded = replace(ported.folded, layers={}, readout=replace(readout, layer=None), merged=merged)
    return replace(ported, folded=folded, retask=None)


def _merged(site: Site, before: MergedWeights | None, weight: Tensor, offset: Tensor) -> MergedWeights:
    """The module's weight and bias with a site's map x @ `weight` + `offset` merged.

    :param before: What other parts of a fused module have made of it already.
    """
    module = site.module
    own = dense(module.get_parameter("weight"))
    bias = module._parameters["bias"]
    if before is None:
        rows = own.T if site.transposed else own
        zero = torch.zeros(rows.shape[0], dtype=own.dtype, device=own.device)
        before = MergedWeights(own.clone(), zero if bias is None else bias.detach().clone())
    full = (before.weight.T if site.transposed else before.weight).float().cpu()
    shift = before.bias.float().cpu()
    if site.type in READERS and not site.fused:
        full, shift = full + full @ weight.T, shift + full @ offset
    elif site.type in READERS:
        full[site.columns], shift[site.columns] = full[site.columns] + weight.T, shift[site.columns] + offset
    else:
        full, shift = full + weight.T @ full, shift + weight.T @ shift + offset
    stored = (full.T if site.transposed else full).contiguous()
    return MergedWeights(stored.to(own), shift.to(own))


def _merged_readout(readout: FoldedReadout, fitted: Moments, held: Moments, last: int) -> FoldedReadout:
    """The readout with its own update merged into the tap on the final state."""
    weight, offset, _ = fit_moments(fitted, held)
    tap = plain(readout.taps[last], readout.bias.dtype)
    taps = {**readout.taps, last: tap + weight.T.to(tap)}
    return replace(readout, taps=taps, bias=readout.bias + offset.to(readout.bias))
