"""Texts to token ids, with a mask of the text's own tokens and their character spans."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from uhl_cli.errors import DataError, TokenizerError, UsageError
from uhl_cli.host.checkpoint import Host


@dataclass(frozen=True, eq=False)
class Encoded:
    """A batch of tokenised texts, padded on the right; all tensors on one device.

    :param input_ids: int64 [batch, tokens].
    :param attention_mask: int64 [batch, tokens], 0 at padding.
    :param token_type_ids: int64 [batch, tokens], or None where the model does not use them.
    :param content_mask: bool [batch, tokens], True at the text's own tokens (unknown ones included);
        in a row without any, True at all attended tokens, so that no mean divides by zero.
    :param offsets: int64 [batch, tokens, 2], characters (start, end) in the token's own text, without
        white space at either end; (0, 0) at special tokens and padding.
    :param sequence: int64 [batch, tokens]: 0 first text, 1 pair, -1 special or padding.
    :param truncated: How many rows were cut.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor | None
    content_mask: Tensor
    offsets: Tensor
    sequence: Tensor
    truncated: int

    def model_inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the base model's forward."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.token_type_ids is not None:
            inputs["token_type_ids"] = self.token_type_ids
        return inputs

    def to(self, device: torch.device | str) -> Encoded:
        """The same batch on a device."""
        types = self.token_type_ids
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            token_type_ids=None if types is None else types.to(device),
            content_mask=self.content_mask.to(device),
            offsets=self.offsets.to(device),
            sequence=self.sequence.to(device),
        )


def encode(
    host: Host,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    max_length: int | None = None,
) -> Encoded:
    """Encode texts to a batch on the CPU; every text, even an empty one, has at least one attended token.

    If the tokenizer of a decoder adds no special token at the beginning, its begin (or end) token is added: a decoder's
    first position has massive activations, so no token of the text should be there.  A pair that is too long is
    truncated from its longer text first.  A text that spells a special token is text, see `host.plain_text`.

    :param max_length: Longest row in tokens, special ones included; at most the host's own.
    :raises DataError: No texts, or not as many pairs as texts.
    :raises UsageError: `max_length` leaves no room for the text.
    :raises TokenizerError: The host has no tokenizer, because it has no weights.
    """
    tokenizer: Any = host.tokenizer
    if not texts or (pairs is not None and len(pairs) != len(texts)):
        raise DataError(
            f"{len(texts)} texts and {'no' if pairs is None else len(pairs)} pairs cannot be encoded.",
            "Pass at least one text, and as many pairs as texts.",
        )
    if tokenizer is None:
        raise TokenizerError("A host without weights has no tokenizer.", "Load the host's weights first.")
    sink = first_token(tokenizer) if host.decoder else None
    longest = host.max_length if max_length is None else min(max_length, host.max_length)
    room = longest - (sink is not None)
    if room <= tokenizer.num_special_tokens_to_add(pairs is not None):
        raise UsageError(f"max_length {max_length} leaves no room for text.", "Pass a larger maximum length.")
    batch = tokenizer(
        list(texts),
        None if pairs is None else list(pairs),
        truncation="longest_first",
        max_length=room,
        padding=False,
        return_token_type_ids=True,
    )
    sources = (texts, texts if pairs is None else pairs)
    specials = _special_ids(tokenizer)
    rows = [
        _row(encoding, (sources[0][row], sources[1][row]), specials, sink)
        for row, encoding in enumerate(batch.encodings)
    ]
    # A row without any token (an empty text, no special tokens) gets one padding token.
    padding = int(tokenizer.pad_token_id or 0)
    rows = [row if row.ids else _Row([padding], [0], [False], [(0, 0)], [-1]) for row in rows]
    width = max(len(row.ids) for row in rows)
    attended = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows])
    content = _padded([row.content for row in rows], width, False)
    empty = ~content.any(dim=1, keepdim=True)
    return Encoded(
        input_ids=_padded([row.ids for row in rows], width, padding),
        attention_mask=attended,
        token_type_ids=_padded([row.types for row in rows], width, 0) if takes_types(host) else None,
        content_mask=content | (empty & attended.bool()),
        offsets=_padded([row.offsets for row in rows], width, (0, 0)),
        sequence=_padded([row.sequence for row in rows], width, -1),
        truncated=sum(bool(encoding.overflowing) for encoding in batch.encodings),
    )


def takes_in(host: Host, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[bool]:
    """For each text, whether the host's tokenizer knows any token of it or of its pair."""
    tokenizer: Any = host.tokenizer
    batch = tokenizer(
        list(texts), None if pairs is None else list(pairs), add_special_tokens=False, truncation=False, verbose=False
    )
    return [any(token != tokenizer.unk_token_id for token in row) for row in batch["input_ids"]]


def tokens_of_spans(encoded: Encoded, row: int, spans: Sequence[tuple[int, int]], sequence: int = 0) -> Tensor:
    """Which tokens overlap each character span (start, end) of a text: bool [spans, tokens].

    Offsets exclude white space, so a byte-level token's leading space never overlaps the previous word.  Tokens and
    spans of width zero and truncated spans overlap nothing.

    :param sequence: 0 for spans of the first text, 1 for the pair's.
    """
    first, last = torch.tensor(spans, dtype=torch.long).reshape(-1, 2).T.unsqueeze(-1)
    start, end = encoded.offsets[row].T
    own = (encoded.sequence[row] == sequence) & (start < end)
    overlap: Tensor = (torch.maximum(start, first) < torch.minimum(end, last)) & own
    return overlap


@dataclass(frozen=True)
class _Row:
    ids: list[int]
    types: list[int]
    content: list[bool]
    offsets: list[tuple[int, int]]
    sequence: list[int]


def _row(encoding: Any, sources: tuple[str, str], specials: frozenset[int], sink: int | None) -> _Row:  # noqa: ANN401
    sequence = [-1 if which is None else which for which in encoding.sequence_ids]
    content = [which >= 0 and token not in specials for which, token in zip(sequence, encoding.ids, strict=True)]
    offsets = [
        (0, 0) if which < 0 else _strip(sources[which], *span)
        for which, span in zip(sequence, encoding.offsets, strict=True)
    ]
    head = [] if sink is None else [sink]
    return _Row(
        ids=head + list(encoding.ids),
        types=[0] * len(head) + list(encoding.type_ids),
        content=[False] * len(head) + content,
        offsets=[(0, 0)] * len(head) + offsets,
        sequence=[-1] * len(head) + sequence,
    )


def _strip(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without white space at its ends; a span of white space alone gets width zero."""
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end


def _padded(rows: list[Any], width: int, value: Any) -> Tensor:  # noqa: ANN401 - ids, flags or spans
    return torch.tensor([list(row) + [value] * (width - len(row)) for row in rows])


def _special_ids(tokenizer: Any) -> frozenset[int]:  # noqa: ANN401
    """Ids of special tokens around a text; the unknown token counts as text even where it has another role."""
    names = ("bos", "eos", "cls", "sep", "pad")
    ids = {getattr(tokenizer, f"{name}_token_id", None) for name in names}
    return frozenset(token for token in ids if token is not None and token != tokenizer.unk_token_id)


def first_token(tokenizer: Any) -> int | None:  # noqa: ANN401
    """The token to add at the beginning, or None where the tokenizer adds a special one itself."""
    probe = tokenizer("a").encodings[0].sequence_ids
    if probe and probe[0] is None:
        return None
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return None if token is None else int(token)


def without_cache(host: Host) -> dict[str, bool]:
    """Keyword arguments with which the base model keeps no keys and values for later tokens, which no pass here uses.

    Some models change such a cache in place, so that gradients cannot pass.
    """
    return {"use_cache": False} if "use_cache" in inspect.signature(host.map.base.forward).parameters else {}


def takes_types(host: Host) -> bool:
    """Whether the model uses segment ids.

    The tokenizer alone does not tell: GPT-2 would add a word's embedding for them, RoBERTa has a table of one row.
    """
    kinds = getattr(host.model.config, "type_vocab_size", 0) or 0
    taken = "token_type_ids" in inspect.signature(host.model.forward).parameters
    return taken and kinds > 1 and not host.decoder
