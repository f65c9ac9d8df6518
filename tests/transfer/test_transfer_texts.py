"""Texts of a transfer set: spans follow from a rule, contained texts are left out, the package's own have a version."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from uhl_cli.errors import DataError
from uhl_cli.transfer.general import VERSION, record_of, transfer_texts
from uhl_cli.transfer.texts import (
    MAX_LEVEL,
    TransferSet,
    TransferTexts,
    count_examples,
    drawn_spans,
    quantised_log_odds,
    without_contained,
)

TEXTS = ("a fine film with a long tail", "dull", "not so bad at all")


@pytest.mark.parametrize("words", [2, 3, 7, 40])
def test_spans_lie_within_the_text_are_different_and_never_the_whole(words):
    for index in range(50):
        spans = drawn_spans(words, index, 5)
        assert len(set(spans)) == len(spans) <= 5
        assert all(0 <= start < end <= words and end - start < words for start, end in spans)
    few = drawn_spans(words, 1, 2)
    assert drawn_spans(words, 1, 5)[: len(few)] == few


# Spans are part of the file format: these are those of every version.
GOLDEN_SPANS = {
    (2, 0): [(1, 2), (0, 1)],
    (3, 1): [(2, 3), (1, 3), (0, 2)],
    (9, 0): [(3, 7), (1, 6), (5, 9), (0, 7), (0, 6)],
    (9, 1): [(1, 6), (3, 5), (7, 9), (2, 9), (0, 8)],
    (30, 49999): [(3, 16), (17, 26), (2, 5), (1, 22), (11, 22)],
}
GOLDEN_DIGEST = "5761251c601bd0f5403c8bbc3b80642bf4643d8f4b2228fe6c4927d3f0a36f24"


@pytest.mark.parametrize(("words", "index"), GOLDEN_SPANS)
def test_spans_are_frozen(words, index):
    assert drawn_spans(words, index, 5) == GOLDEN_SPANS[words, index]


def test_all_spans_of_many_texts_are_frozen():
    spans = [drawn_spans(words, index, 16) for words in range(1, 70) for index in range(0, 50_000, 1_237)]
    assert hashlib.sha256(json.dumps(spans).encode()).hexdigest() == GOLDEN_DIGEST


def test_a_single_word_has_no_span_and_texts_differ_in_theirs():
    assert drawn_spans(1, 0, 5) == []
    assert len({tuple(drawn_spans(30, index, 3)) for index in range(20)}) == 20


@pytest.mark.parametrize("words", [False, True])
def test_counts_are_those_of_the_examples(words):
    texts = TransferTexts(TEXTS, None, 3, words, "memory")
    examples = texts.examples()
    counted = sum(len(row) for row in examples.words) if words else len(examples)
    assert count_examples(texts) == (len(examples), counted)
    assert len(texts.owners()) == len(examples)
    for text, owner in zip(examples.texts, texts.owners(), strict=True):
        assert text in TEXTS[owner]


def test_a_span_of_a_pair_stands_beside_the_whole_first_text():
    texts = TransferTexts(("one two", "three"), ("four five six", "seven eight"), 2, False, "memory")
    examples = texts.examples()
    assert examples.pairs is not None
    for first, second, owner in zip(examples.texts, examples.pairs, texts.owners(), strict=True):
        assert first == texts.texts[owner]
        assert second in texts.pairs[owner]


@pytest.mark.parametrize("words", [False, True])
def test_whole_texts_come_with_their_own_outputs(words):
    texts = TransferTexts(TEXTS, None, 3, words, "memory")
    _, predictions = count_examples(texts)
    codes = (np.arange(predictions) % (2 * MAX_LEVEL + 1) - MAX_LEVEL).astype(np.int8)[:, None]
    found = TransferSet(texts, codes, "nobody")
    examples, odds = found.whole(2)
    assert examples.texts == TEXTS[:2]
    everything, all_odds = found.examples(), found.log_odds()
    starts = np.cumsum([0, *(1 if everything.words is None else len(row) for row in _rows(everything))])
    place = everything.texts.index(TEXTS[1])
    assert (odds[-(starts[place + 1] - starts[place]) :] == all_odds[starts[place] : starts[place + 1]]).all()


def _rows(examples):
    return examples.words or [None] * len(examples)


def test_log_odds_are_within_half_a_step_or_at_the_end():
    logits = np.random.default_rng(0).normal(scale=4, size=(500, 3)).astype(np.float32)
    codes = quantised_log_odds(logits)
    odds = logits[:, 1:] - logits[:, :1]
    inside = np.abs(odds) <= MAX_LEVEL
    assert np.abs(codes - odds)[inside].max() <= 0.5
    assert (np.abs(codes[~inside]) == MAX_LEVEL).all()
    assert (np.sign(codes[~inside]) == np.sign(odds[~inside])).all()


def test_a_text_within_a_longer_one_and_a_double_are_left_out():
    texts = ["so bad", "not so bad at all", "bad so", "not so bad at all", ""]
    assert without_contained(texts) == [1, 2]


def test_the_packages_texts_are_each_once_and_written_like_the_sample():
    plain = transfer_texts(record_of(["It's Fine.", "Well."]))
    apart = transfer_texts(record_of(["it 's fine .", "well , no ."] * 20))
    assert len(plain) == len(set(plain)) > 6000
    assert any(text != text.lower() for text in plain)
    assert all(text == text.lower() for text in apart)
    assert any(" n't" in text for text in apart)


def test_texts_of_another_version_are_refused_with_what_to_do():
    record = record_of(["a"]).model_copy(update={"version": VERSION + 1})
    with pytest.raises(DataError, match=f"version {VERSION + 1}.*--task or --data"):
        transfer_texts(record)
