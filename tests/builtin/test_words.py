"""Words are the same for every tokenizer; batches hold every text once and no more tokens than they may."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_hosts import SENTENCES, tiny_tokenizer

from uhl_cli.align.texts import word_spans
from uhl_cli.builtin.words import batches, tokenise

TEXTS = [*SENTENCES, "Don't stop: it's a well-made, 3-part film!"]


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_a_token_belongs_to_the_word_that_it_spells(family):
    tokenizer = tiny_tokenizer(family)
    found = tokenise(tokenizer, TEXTS, max_length=1000)
    for row, text in enumerate(TEXTS):
        spans = word_spans(text)
        words = [text[start:end].lower() for start, end in spans]
        assert found.word_starts[row + 1] - found.word_starts[row] == len(spans)
        spelled = [""] * len(spans)
        span = slice(found.starts[row], found.starts[row + 1])
        encoding = tokenizer(text).encodings[0]
        for word, (start, end) in zip(found.words[span], encoding.offsets, strict=True):
            if word >= 0:
                spelled[word - found.word_starts[row]] += text[start:end].strip().lower()
        # A token may reach into the next word, but none is lost and each begins in its own.
        assert "".join(spelled) == "".join(words)
        assert all(piece == "" or piece[0] == word[0] for piece, word in zip(spelled, words, strict=True))


def test_pooling_is_the_mean_over_a_words_tokens():
    texts = tokenise(tiny_tokenizer("bert"), TEXTS[:3], max_length=64)
    batch = texts.batch([2, 0], padding=0)
    assert batch.input_ids.shape == batch.attention_mask.shape
    states = torch.randn(2, batch.input_ids.shape[1], 5)
    pooled, present = batch.pool(states)
    assert len(pooled) == len(batch.words)
    assert present.all()
    flat, places = states.reshape(-1, 5), batch.places
    for word in range(len(pooled)):
        torch.testing.assert_close(pooled[word], flat[places == word].mean(0))
    assert batch.words[0] == texts.word_starts[2]
    assert set(batch.words) == {
        *range(texts.word_starts[2], texts.word_starts[3]),
        *range(texts.word_starts[0], texts.word_starts[1]),
    }


def test_a_text_that_is_cut_leaves_words_without_a_token():
    texts = tokenise(tiny_tokenizer("bert"), [" ".join(["film"] * 40)], max_length=16)
    batch = texts.batch([0], padding=0)
    _, present = batch.pool(torch.ones(1, batch.input_ids.shape[1], 2))
    assert len(present) == 40
    assert 0 < int(present.sum()) < 40
    assert not present[-1]


def test_every_row_once_within_the_token_limit_and_by_the_seed():
    lengths = np.random.default_rng(0).integers(3, 60, size=500)
    rows = np.arange(20, 500)
    found = batches(lengths, rows, tokens=240, seed=1, epoch=0)
    assert sorted(row for batch in found for row in batch) == rows.tolist()
    assert all(max(lengths[batch]) * len(batch) <= 240 for batch in found)
    assert found == batches(lengths, rows, tokens=240, seed=1, epoch=0)
    assert found != batches(lengths, rows, tokens=240, seed=1, epoch=1)
    assert found != batches(lengths, rows, tokens=240, seed=2, epoch=0)
