"""The feature bank of a trained adapter: texts that fit in the file, and the source readout's features there."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from uhl_cli.align.alignment import Alignment
from uhl_cli.align.features import STEP, FeatureBank, quantise_features
from uhl_cli.align.states import word_batches
from uhl_cli.align.texts import AnchorTexts
from uhl_cli.api import UniversalAdapter
from uhl_cli.codes.packing import pack_levels
from uhl_cli.commands.texts import MIN_WORDS, OVERHEAD_BYTES, text_bytes
from uhl_cli.errors import AlignmentError
from uhl_cli.host.running import evaluating
from uhl_cli.ported.controls import head_logits
from uhl_cli.ported.model import PortedModel
from uhl_cli.ported.shift import update_shift
from uhl_cli.reports import Reporter, phase


def feature_bank(
    adapter: UniversalAdapter,
    ported: PortedModel,
    own: Alignment,
    anchors: AnchorTexts,
    reporter: Reporter,
    *,
    room: int | None = None,
    step: float = STEP,
) -> FeatureBank | None:
    """Features of the readout and of the head-only control on the source; `ported` is on it, `own` its alignment.

    :param room: Bytes that the bank may take; the last texts are left out to stay within it.
    :param step: Step of the features' quantiser, in standard deviations.
    :returns: None if the source itself can read fewer than `MIN_WORDS` of the words.
    """
    columns = adapter.manifest.config.readout_size + adapter.manifest.config.num_labels
    values = torch.zeros(anchors.num_words, columns)
    seen = torch.zeros(anchors.num_words, dtype=torch.bool)
    host = ported.host
    readout = ported.with_adapter(ported.adapter.without_updates())
    with torch.no_grad(), evaluating(host.map.base), readout.attached() as attachment:
        for batch in word_batches(host, anchors, progress=phase(reporter, "features")):
            final = host.map.base(**batch.encoded.model_inputs()).last_hidden_state
            features = attachment.readout_features(final)
            parts = (features.reshape(-1, features.shape[-1]), final.reshape(-1, final.shape[-1]).float())
            seen_by_readout, states = (batch.weights @ part.float() for part in parts)
            head = head_logits(states.cpu(), adapter.stored["head_weight"], adapter.stored["head_bias"], own)
            values[batch.rows] = torch.cat([seen_by_readout.cpu(), head], dim=1)
            seen[batch.rows] = True
    try:
        kept = anchors if bool(seen.all()) else anchors.keep(seen.tolist())
    except AlignmentError:
        return None
    if kept.num_words < MIN_WORDS:
        return None
    values, count = values[seen], len(kept.texts)
    while True:
        first = kept.first(count)
        no_shift = torch.zeros(adapter.manifest.config.readout_size)
        bank = quantise_features(first, values[: first.num_words], no_shift, step=step)
        num_bytes = text_bytes(first) + len(pack_levels(bank.codes.numpy())) + 8 * columns + OVERHEAD_BYTES
        if room is None or num_bytes <= room or count == 1:
            return replace(bank, shift=update_shift(host, ported.adapter, bank))
        count = max(1, min(count - 1, math.floor(count * room / num_bytes)))
