"""The controls (docs/method.md, "Controls") to compare a ported score with.

| control | what it is |
|---|---|
| majority_class | the most frequent class of the training labels, for every example; no host runs |
| random_update | the readout as ported, and updates in random directions, per token as large as at full strength |
| head_only | a linear head on the mean final state, trained on the frozen source, through a map of the last depth |
| size | the same adapter aligned by `size`, which knows nothing of the target's basis |
| full_updates | the updates at full strength, where calibration on the transfer set has left them out |
| readout_only | the canonical readout as ported, updates off (it splits the gain in two) |
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from uhl_cli.adapter.module import PortedAdapter, PortedLayer
from uhl_cli.adapter.sparse import row_values
from uhl_cli.align.alignment import Alignment
from uhl_cli.align.bank import AnchorBank
from uhl_cli.data.examples import Examples
from uhl_cli.host.checkpoint import Host
from uhl_cli.host.running import bare
from uhl_cli.ported.aligned import AlignedHost, align_host
from uhl_cli.ported.model import encode_examples, refuse_not_finite

CONTROLS = ("majority_class", "random_update", "head_only", "size")
Progress = Callable[[int, int], None]


def randomised(adapter: PortedAdapter, *, seed: int) -> PortedAdapter:
    """The same adapter with every edit's direction drawn at random and its norm kept; it has no shift.

    Routers and responses are kept, so each token gets an update of exactly the same size as before.
    """
    generator = torch.Generator().manual_seed(seed)

    def redirect(layer: PortedLayer) -> PortedLayer:
        edits = {name: _random_rows(edit, generator) for name, edit in layer.edits.items()}
        gains = dict(layer.gains.items())
        return PortedLayer(layer.router, layer.router_bias, layer.read, layer.read_bias, edits, gains)

    own = adapter.readout.layer
    readout = adapter.readout.changed(layer=None if own is None else redirect(own), shift=None)
    layers = {index: redirect(layer) for index, layer in adapter.by_layer.items()}
    return PortedAdapter(adapter.threshold, layers, readout, lora=adapter.lora)


def by_size(aligned: AlignedHost, bank: AnchorBank) -> AlignedHost:
    """The same host and plan, aligned by the host's width alone."""
    alignment = align_host(aligned.host, bank, "size")
    return AlignedHost(aligned.host, aligned.space, alignment, aligned.plan, aligned.host_flops)


def _random_rows(table: Tensor, generator: torch.Generator) -> Tensor:
    rows = row_values(table)  # the result stays unpacked, so that norms are exact
    drawn = torch.randn(rows.shape, generator=generator).to(device=rows.device, dtype=torch.float32)
    norms = rows.float().norm(dim=1, keepdim=True)
    scaled: Tensor = drawn / drawn.norm(dim=1, keepdim=True) * norms
    return scaled.to(rows.dtype)


@torch.inference_mode()
def mean_final_states(
    host: Host,
    examples: Examples,
    *,
    batch_size: int = 64,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, list[int]]:
    """Mean final states of the host alone, float32 [predictions, d], in the examples' order.

    One row per example (mean over its content tokens), or one per word for token tasks.
    :returns: The states and the number of rows of each example.
    """
    order = sorted(range(len(examples)), key=lambda row: -len(examples.texts[row]))
    parts: dict[int, Tensor] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        encoded, words, counts = encode_examples(host, examples, rows, max_length=max_length)
        encoded = encoded.to(host.device)
        with bare(host.map.base):
            final = host.map.base(**encoded.model_inputs()).last_hidden_state.float()
        if words is None:
            mask = encoded.content_mask.unsqueeze(-1).float()
            pooled = (final * mask).sum(1) / mask.sum(1)
        else:
            pooled = words @ final.reshape(-1, final.shape[-1])
        refuse_not_finite(host, pooled, counts, [examples.texts[row] for row in rows], encoded)
        for row, part in zip(rows, torch.split(pooled.cpu(), counts), strict=True):
            parts[row] = part
        if progress:
            progress(min(start + batch_size, len(order)), len(order))
    ordered = [parts[row] for row in range(len(examples))]
    return torch.cat(ordered), [len(part) for part in ordered]


def head_logits(states: Tensor, weight: Tensor, bias: Tensor, alignment: Alignment) -> Tensor:
    """Logits [rows, labels] of the linear head, `weight` [labels, d0] on z of the final depth, for states [rows, d].

    A feature bank's map to the logits is used, if there is one: the control is then aligned as well as the readout.
    """
    features = alignment.features
    if features is not None and len(features.head):
        return states @ features.head.T + features.head_bias
    maps = alignment.layers[-1]
    return (states - maps.mean) @ maps.read.T @ weight.T + bias
