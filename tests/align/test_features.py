"""Feature bank: a host that holds the source's features in another basis gets them back; one that does not, not."""

from dataclasses import replace

import pytest
import torch
from tiny_adapters import many_texts
from tiny_hosts import SENTENCES, tiny_host

from uhl_cli.align.features import MAX_REGRESSORS, align_features, depths_within, quantise_features
from uhl_cli.align.states import word_batches, word_states
from uhl_cli.align.texts import MAX_FEATURE_TEXT_WORDS, AnchorTexts, choose_feature_texts, word_spans

READOUT, LABELS = 6, 3
NO_SHIFT = torch.zeros(READOUT)


@pytest.fixture(scope="module")
def anchors():
    found = choose_feature_texts(many_texts(), exclude=(), num_words=5000, origin="random")
    assert found is not None
    return found


def features_of(host, anchors, *, seed=0):
    """Features that are linear in the host's own states at depths 0 and 2, and head logits in those at depth 2."""
    states = word_states(host, anchors)
    generator = torch.Generator().manual_seed(seed)
    first, last = (
        torch.randn(host.hidden_size, READOUT, generator=generator) / state.std() for state in states.stream[::2]
    )
    head = torch.randn(host.hidden_size, LABELS, generator=generator)
    readout = states.stream[0] @ first + states.stream[2] @ last + 5
    return torch.cat([readout, states.stream[2] @ head - 1], dim=1), states


def test_codes_keep_mean_and_slope(anchors):
    values = torch.randn(anchors.num_words, 5, generator=torch.Generator().manual_seed(1)) * 7 + 3
    bank = quantise_features(anchors, values, NO_SHIFT)
    torch.testing.assert_close(bank.mean, values.mean(0))
    centred, stored = values - values.mean(0), bank.values - values.mean(0)
    slope = (centred * stored).sum(0) / centred.square().sum(0)
    torch.testing.assert_close(slope, torch.ones(5), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_own_features_come_back_and_another_hosts_do_not(family, anchors):
    host = tiny_host(family)
    values, states = features_of(host, anchors)
    bank = quantise_features(anchors, values, NO_SHIFT)
    maps = align_features(host, bank, knots=(0.0, 1.0), depths=(0, 1, 2), readout_size=READOUT)
    assert maps is not None
    found = sum(states.stream[depth] @ weight.T for depth, weight in maps.depth_weights.items()) + maps.bias
    true = values[:, :READOUT]
    error = (found - true).square().mean(0) / true.var(0)
    assert float(error.mean()) < 0.05  # far less than the codes' own error
    assert 0.5 < maps.quality < 0.9  # held-out codes have that error
    head = states.stream[2] @ maps.head.T + maps.head_bias
    assert float(((head - values[:, READOUT:]).square().mean(0) / values[:, READOUT:].var(0)).mean()) < 0.05
    # The control: the same features given to the wrong words.
    wrong = quantise_features(
        anchors, values[torch.randperm(len(values), generator=torch.Generator().manual_seed(3))], NO_SHIFT
    )
    control = align_features(host, wrong, knots=(0.0, 1.0), depths=(0, 1, 2), readout_size=READOUT)
    assert control is not None
    assert control.quality < 0.1


def test_an_independent_host_gets_only_what_the_words_tell(anchors):
    """Random hosts share nothing but the words: some of the features, and less than the source itself."""
    values, _ = features_of(tiny_host("bert"), anchors)
    bank = quantise_features(anchors, values, NO_SHIFT)
    settings = {"knots": (0.0, 1.0), "depths": (0, 1, 2), "readout_size": READOUT}
    own, other = (align_features(tiny_host(family), bank, **settings) for family in ("bert", "gpt2"))
    assert own is not None
    assert other is not None
    assert other.quality < own.quality


def test_too_few_words_are_no_bank(anchors):
    host = tiny_host("bert")
    few = anchors.first(6)
    bank = quantise_features(few, torch.randn(few.num_words, READOUT + LABELS), NO_SHIFT)
    assert align_features(host, bank, knots=(1.0,), depths=(2,), readout_size=READOUT) is None


def test_batches_give_every_word_once_in_its_place(anchors):
    host, few = tiny_host("gpt2"), anchors.first(21)
    full = word_states(host, few)
    seen = torch.zeros(few.num_words, dtype=torch.int64)
    with torch.inference_mode():
        for batch in word_batches(host, few, batch_size=4):
            final = host.map.base(**batch.encoded.model_inputs()).last_hidden_state
            pooled = batch.weights @ final.reshape(-1, final.shape[-1])
            torch.testing.assert_close(pooled, full.stream[2][batch.rows], atol=1e-4, rtol=1e-3)
            seen[batch.rows] += 1
    assert seen.tolist() == [1] * few.num_words


def test_words_that_a_host_cuts_off_are_left_out():
    host = tiny_host("bert")  # takes 64 tokens
    long = AnchorTexts((" ".join(SENTENCES), SENTENCES[0]), ((0, 1, 200), (0, 1)), "t")
    assert sorted(torch.cat([batch.rows for batch in word_batches(host, long)]).tolist()) == [0, 1, 3, 4]


@pytest.mark.parametrize(
    ("width", "depths", "expected"),
    [
        (64, range(7), [0, 1, 2, 3, 4, 5, 6]),
        (MAX_REGRESSORS // 4, range(13), [0, 3, 6, 12]),
        (2 * MAX_REGRESSORS, range(13), [0, 6, 12]),
        (MAX_REGRESSORS // 2, (4, 12), [4, 12]),
    ],
)
def test_depths_of_wide_hosts(width, depths, expected):
    class Shape:
        hidden_size = width
        num_hidden_layers = 12 if max(depths) == 12 else 6

    assert depths_within(tuple(depths), (0.0, 0.5, 1.0), Shape) == expected


def test_choice_of_texts_is_long_distinct_fresh_and_repeatable():
    texts = [*SENTENCES, *SENTENCES, "  ", "short one", " ".join(["word"] * 500)]
    found = choose_feature_texts(texts, exclude=SENTENCES[:5], num_words=10_000, seed=3, origin="o")
    assert found is not None
    assert len(set(found.texts)) == len(found.texts)
    assert not set(found.texts) & set(SENTENCES[:5])
    assert max(len(word_spans(text)) for text in found.texts) == MAX_FEATURE_TEXT_WORDS
    assert all(len(chosen) == len(word_spans(text)) for text, chosen in zip(found.texts, found.chosen, strict=True))
    assert found == choose_feature_texts(texts, exclude=SENTENCES[:5], num_words=10_000, seed=3, origin="o")
    few = choose_feature_texts(texts, exclude=(), num_words=40, seed=0, origin="o")
    assert few is not None
    assert 40 <= few.num_words < 40 + MAX_FEATURE_TEXT_WORDS
    assert choose_feature_texts(["", "  "], exclude=(), num_words=40, origin="o") is None
    assert choose_feature_texts(SENTENCES, exclude=SENTENCES, num_words=40, origin="o") is None
    assert replace(few, origin="p") != few
