"""The feature bank of a trained adapter: texts that have room in the file, and what the source's readout sees there."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from uhl_cli.align.alignment import Alignment
from uhl_cli.align.features import STEP, FeatureBank, quantise_features
from uhl_cli.align.states import word_batches
from uhl_cli.align.texts import AnchorTexts, word_spans
from uhl_cli.api import UniversalAdapter
from uhl_cli.codes.packing import compress_text, pack_levels
from uhl_cli.errors import AlignmentError, BudgetError, DataError
from uhl_cli.host.running import evaluating
from uhl_cli.ported.controls import head_logits
from uhl_cli.ported.model import PortedModel
from uhl_cli.ported.shift import update_shift
from uhl_cli.reports import Reporter, phase
from uhl_cli.schema import AdapterConfig

# With as few as this, a map to the features is no better than the one through the canonical bank's 2,048 words.
MIN_WORDS = 2048
# Names, scales and means of the parts, the manifest's record of them, and the score that is written last.
_OVERHEAD_BYTES = 3000
# What a code takes, as found after training, before which it has to be guessed: at least, and with room to spare.
_FEWEST_BITS, _MANY_BITS = 1.2, 2.0


def texts_that_fit(texts: AnchorTexts | None, config: AdapterConfig, *, room: int) -> AnchorTexts:
    """As many of the texts as may have room in the file, beside their features; `feature_bank` keeps those that do.

    :param room: Bytes that the file's other parts leave of its limit.
    :raises DataError: When the texts hold fewer than `MIN_WORDS` words.
    :raises BudgetError: When there is no room for so many.
    """
    if texts is None or texts.num_words < MIN_WORDS:
        raise DataError(
            f"beside the anchors there are only {0 if texts is None else texts.num_words} words of text for a feature "
            f"bank; at least {MIN_WORDS} are needed.",
            "Leave out --feature-words, or give more text with --anchors.",
        )
    columns, room = config.readout_size + config.num_labels, room - _OVERHEAD_BYTES
    surely = _fitting(texts, columns * _MANY_BITS, room)
    if surely is None or surely.num_words < MIN_WORDS:
        raise BudgetError(
            f"the anchors leave {max(room, 0):,} bytes of the limit, too few for a feature bank.",
            "Raise --max-bytes, use fewer --num-anchors, or leave out --feature-words.",
        )
    return _fitting(texts, columns * _FEWEST_BITS, room) or surely


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
    """What the readout and the head-only control see on the untouched source, `ported` and `own` its alignment.

    :param room: Bytes that the bank may take; texts from the last on are left out to hold it.
    :param step: Step of the features' quantiser, in standard deviations.
    :returns: None where the source itself takes in fewer than `MIN_WORDS` of the words.
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
        size = _text_bytes(first) + len(pack_levels(bank.codes.numpy())) + 8 * columns + _OVERHEAD_BYTES
        if room is None or size <= room or count == 1:
            return replace(bank, shift=update_shift(host, ported.adapter, bank))
        count = max(1, min(count - 1, math.floor(count * room / size)))


def _fitting(texts: AnchorTexts, bits_per_word: float, room: int) -> AnchorTexts | None:
    """As many of the texts, from the first on, as take at most `room` bytes in a file."""
    low, high = 0, len(texts.texts)
    while low < high:  # the size grows with every text
        middle = (low + high + 1) // 2
        some = texts.first(middle)
        if some.num_words * bits_per_word / 8 + _text_bytes(some) <= room:
            low = middle
        else:
            high = middle - 1
    return texts.first(low) if low else None


def _text_bytes(texts: AnchorTexts) -> int:
    words = sum(len(word_spans(text)) for text in texts.texts)
    return words // 8 + 1 + len(compress_text("\n".join(texts.texts)))
