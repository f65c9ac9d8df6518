"""The mean change of the readout's features by a host's updates, over the words of the feature bank.

On the source the updates move the features as trained.  On another host they transfer only in part: their differences
between tokens still help, but their mean is an error that pushes every text towards one class.  So a target's readout
subtracts the mean, and the updates act by their differences alone (measured: tests/benchmarks/README.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from uhl_cli.adapter.attach import attach
from uhl_cli.adapter.module import PortedAdapter
from uhl_cli.align.features import FeatureBank
from uhl_cli.align.states import word_batches
from uhl_cli.host.checkpoint import Host
from uhl_cli.host.running import evaluating

# One batch of texts in this many is enough for a mean.
_EVERY = 4
# A host whose shift differs from the source's by at most this share counts as the source: its shift is kept.
SAME = 0.25


@torch.no_grad()
def update_shift(host: Host, adapter: PortedAdapter, bank: FeatureBank) -> Tensor:
    """Mean change of the readout's features [readout_size] by an adapter's updates, float32 on the CPU.

    The features without updates are the bank's, which the readout's maps were fitted to.  A shift that the adapter
    already has is ignored.
    """
    readout_size = adapter.readout.bias.shape[0]
    values = bank.values[:, :readout_size]
    total, words = torch.zeros(readout_size), 0
    with evaluating(host.map.base), attach(host.map, adapter.with_shift(None)) as attachment:
        for batch in word_batches(host, bank.anchors, every=_EVERY):
            final = host.map.base(**batch.encoded.model_inputs()).last_hidden_state
            features = attachment.readout_features(final).reshape(-1, readout_size).float()
            total += (batch.weights @ features).sum(0).cpu() - values[batch.rows].sum(0)
            words += len(batch.rows)
    return total / max(words, 1)


def correction(shift: Tensor, source: Tensor) -> Tensor | None:
    """What a readout adds to its features while updates are on: minus its shift; None if the shift is the source's."""
    same = float((shift - source).norm()) <= SAME * float(source.norm())
    return None if same else -shift
