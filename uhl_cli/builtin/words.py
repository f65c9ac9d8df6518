"""Texts as flat arrays of tokens, each with the word that it belongs to, and the teacher's state of every word.

The words are the same for every tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from uhl_cli.align.texts import word_spans
from uhl_cli.host.checkpoint import Host
from uhl_cli.reports import Reporter

Integers = NDArray[np.int64]
# The teacher's batches, and how many of them its states are standardised by.
BATCH_TOKENS = 8192
# The rule of words (see `align.texts`) by which the builtin hosts were trained.
WORD_RULE = 1
SAMPLE_BATCHES = 40


@dataclass(frozen=True)
class TokenisedTexts:
    """The tokens of all texts, concatenated.

    `tokens` and `words` are as long as all texts together: a token's id, and the number of its word among the
    words of all texts, or -1.  `starts` and `word_starts` [texts + 1] say where each text's tokens and words begin.
    """

    tokens: Integers
    words: Integers
    starts: Integers
    word_starts: Integers

    def lengths(self) -> Integers:
        """Tokens of each text."""
        lengths: Integers = np.diff(self.starts)
        return lengths

    def batch(self, rows: Sequence[int], padding: int) -> Batch:
        """The texts `rows`, padded on the right."""
        width = int(max(self.starts[row + 1] - self.starts[row] for row in rows))
        ids = np.full((len(rows), width), padding, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        places = np.full((len(rows), width), -1, dtype=np.int64)
        kept, offset = [], 0
        for index, row in enumerate(rows):
            span = slice(self.starts[row], self.starts[row + 1])
            size = span.stop - span.start
            ids[index, :size], mask[index, :size] = self.tokens[span], 1
            words = self.words[span]
            first, last = self.word_starts[row], self.word_starts[row + 1]
            places[index, :size] = np.where(words < 0, -1, words - first + offset)
            kept.append(np.arange(first, last))
            offset += last - first
        return Batch(
            torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(places).reshape(-1), np.concatenate(kept)
        )


@dataclass(frozen=True)
class Batch:
    """`places` [batch * tokens] is each token's word within the batch, or -1; `words` the words' own numbers."""

    input_ids: Tensor
    attention_mask: Tensor
    places: Tensor
    words: Integers

    def pool(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Mean state float32 [words, d] of the batch's words, and which of them have any token."""
        flat = states.reshape(-1, states.shape[-1])
        inside = torch.nonzero(self.places >= 0).squeeze(1)
        total = flat.new_zeros(len(self.words), flat.shape[1], dtype=torch.float32)
        total = total.index_add(0, self.places[inside], flat[inside].float())
        counts = torch.bincount(self.places[inside], minlength=len(self.words))
        return total / counts.clamp_min(1).unsqueeze(1), counts > 0


def tokenise(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, max_length: int) -> TokenisedTexts:
    """Encode texts, cut at `max_length`, and find each token's word by its first character."""
    tokens, words, starts, word_starts = [], [], [0], [0]
    for first in range(0, len(texts), 1000):
        part = list(texts[first : first + 1000])
        batch = tokenizer(part, truncation=True, max_length=max_length, padding=False)
        for text, encoding in zip(part, batch.encodings, strict=True):
            spans = np.array(word_spans(text, WORD_RULE), dtype=np.int64).reshape(-1, 2)
            offsets = np.array(encoding.offsets, dtype=np.int64)
            word = np.searchsorted(spans[:, 1], offsets[:, 0], side="right")
            special = np.array(encoding.special_tokens_mask, dtype=bool) | (word >= len(spans))
            words.append(np.where(special, -1, word + word_starts[-1]))
            tokens.append(np.array(encoding.ids, dtype=np.int64))
            starts.append(starts[-1] + len(encoding.ids))
            word_starts.append(word_starts[-1] + len(spans))
    return TokenisedTexts(np.concatenate(tokens), np.concatenate(words), np.array(starts), np.array(word_starts))


def batches(lengths: Integers, rows: Integers, *, tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of rows of similar length, each of at most `tokens` tokens with padding, in a seeded order."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(rows)
    found: list[list[int]] = []
    for start in range(0, len(order), 4096):
        pool = order[start : start + 4096]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        current: list[int] = []
        for row in pool:
            if current and (len(current) + 1) * int(lengths[row]) > tokens:
                found.append(current)
                current = []
            current.append(int(row))
        found.append(current)
    return [found[index] for index in rng.permutation(len(found))]


@dataclass(frozen=True)
class WordTargets:
    """The teacher's states of every word, memory-mapped float16 [words, 2 d]: at half depth, then at full depth.

    Each coordinate is standardised.
    """

    values: NDArray[np.float16]

    @property
    def size(self) -> int:
        """Coordinates of one depth."""
        return int(self.values.shape[1] // 2)

    def of(self, words: Integers) -> Tensor:
        """float32 [words, 2 d]."""
        return torch.from_numpy(self.values[words].astype(np.float32))


@torch.inference_mode()
def word_targets(teacher: Host, texts: list[str], path: Path, reporter: Reporter) -> WordTargets:
    """Run the teacher over all texts once, in bfloat16, and save its word states in `path`."""
    texts_tokens = tokenise(teacher.tokenizer, texts, max_length=teacher.max_length)
    rows = np.arange(len(texts))
    order = batches(texts_tokens.lengths(), rows, tokens=BATCH_TOKENS, seed=0, epoch=0)
    depth, width = teacher.num_hidden_layers, teacher.hidden_size
    assert teacher.tokenizer is not None  # it was loaded with its weights
    padding = int(teacher.tokenizer.pad_token_id or 0)

    def states(chosen: list[int]) -> tuple[Integers, Tensor]:
        batch = texts_tokens.batch(chosen, padding)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = teacher.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
            ).hidden_states
        return batch.words, torch.cat([batch.pool(hidden[place])[0] for place in (depth // 2, depth)], dim=1)

    sample = torch.cat([states(chosen)[1] for chosen in order[:SAMPLE_BATCHES]])
    mean, deviation = sample.mean(0), sample.std(0).clamp_min(1e-6)
    values = np.lib.format.open_memmap(
        path, mode="w+", dtype=np.float16, shape=(int(texts_tokens.word_starts[-1]), 2 * width)
    )
    for done, chosen in enumerate(order, 1):
        words, found = states(chosen)
        values[words] = ((found - mean) / deviation).clamp(-30, 30).numpy().astype(np.float16)
        reporter("teacher", done, len(order))
    values.flush()
    return WordTargets(values)
