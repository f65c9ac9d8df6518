"""The feature bank of a trained adapter: texts that have room in the file, and what the source's readout sees there."""

from __future__ import annotations

from dataclasses import replace

import torch

from uhl_cli.adapter.packing import compress_text
from uhl_cli.adapter.ported import PortedModel
from uhl_cli.adapter.shift import update_shift
from uhl_cli.align.alignment import Alignment
from uhl_cli.align.features import BITS, FeatureBank, quantise_features, word_batches
from uhl_cli.align.texts import AnchorTexts, word_spans
from uhl_cli.api import UniversalAdapter
from uhl_cli.controls import head_logits, without_updates
from uhl_cli.errors import AlignmentError, BudgetError, DataError
from uhl_cli.reports import Reporter, phase
from uhl_cli.schema import AdapterConfig

# With as few as this, a map to the features is no better than the one through the canonical bank's 2,048 words.
MIN_WORDS = 2048
# Names, scales and means of the parts, the manifest's record of them, and the score that is written last.
_OVERHEAD_BYTES = 3000


def texts_that_fit(texts: AnchorTexts | None, config: AdapterConfig, *, room: int) -> AnchorTexts:
    """As many of the texts as have room in the file, beside their features.

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
    found = _fitting(texts, config.readout_size + config.num_labels, room - _OVERHEAD_BYTES)
    if found is None or found.num_words < MIN_WORDS:
        raise BudgetError(
            f"the anchors leave {max(room, 0):,} bytes of the limit, too few for a feature bank.",
            "Add --anchor-bits 2, raise --max-bytes, or leave out --feature-words.",
        )
    return found


def feature_bank(
    adapter: UniversalAdapter, ported: PortedModel, own: Alignment, anchors: AnchorTexts, reporter: Reporter
) -> FeatureBank | None:
    """What the readout and the head-only control see on the untouched source, `ported` and `own` its alignment.

    :returns: None where the source itself takes in fewer than `MIN_WORDS` of the words.
    """
    columns = adapter.manifest.config.readout_size + adapter.manifest.config.num_labels
    bare = PortedModel(ported.host, without_updates(ported.folded), ported.task)
    values = torch.zeros(anchors.num_words, columns)
    seen = torch.zeros(anchors.num_words, dtype=torch.bool)
    host = ported.host
    with torch.no_grad(), bare.attached() as injection:
        for batch in word_batches(host, anchors, progress=phase(reporter, "features")):
            final = host.map.base(**batch.encoded.model_inputs()).last_hidden_state
            features = injection.readout_features(final)
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
    bank = quantise_features(kept, values[seen], torch.zeros(adapter.manifest.config.readout_size))
    return replace(bank, shift=update_shift(ported, bank))


def _fitting(texts: AnchorTexts, columns: int, room: int) -> AnchorTexts | None:
    """As many of the texts, from the first on, as take at most `room` bytes in a file."""
    low, high = 0, len(texts.texts)
    while low < high:  # the size grows with every text
        middle = (low + high + 1) // 2
        if _stored_bytes(texts.first(middle), columns) <= room:
            low = middle
        else:
            high = middle - 1
    return texts.first(low) if low else None


def _stored_bytes(texts: AnchorTexts, columns: int) -> int:
    words = sum(len(word_spans(text)) for text in texts.texts)
    codes = texts.num_words * columns * BITS // 8
    return codes + words // 8 + len(compress_text("\n".join(texts.texts))) + 8 * columns
