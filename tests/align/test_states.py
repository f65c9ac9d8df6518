"""Word states: the mean over a word's sub-tokens, for any tokenizer."""

from dataclasses import replace

import pytest
import torch
from tiny_adapters import tiny_anchors
from tiny_hosts import SENTENCES, tiny_host

from uhl_cli.align.states import word_states
from uhl_cli.align.texts import AnchorTexts, word_spans
from uhl_cli.errors import AlignmentError


def anchor_all(texts):
    return AnchorTexts(tuple(texts), tuple(tuple(range(len(word_spans(text)))) for text in texts), "t")


def tokens_of_words(host, text):
    """Ids as the host reads them, and for each word the positions of its tokens; written apart from `encode`."""
    found = host.tokenizer(text, return_offsets_mapping=True)
    ids, offsets = found["input_ids"], found["offset_mapping"]
    if host.model.config.model_type == "gpt2":  # a decoder without a begin token gets one
        ids, offsets = [host.tokenizer.bos_token_id, *ids], [(0, 0), *offsets]
    spans = []
    for start, end in offsets:
        while start < end and text[start] == " ":
            start += 1
        spans.append((start, end))
    words = [
        [index for index, (start, end) in enumerate(spans) if start < last and first < end and start < end]
        for first, last in word_spans(text)
    ]
    return ids, words


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "roberta"])
def test_word_state_is_the_mean_over_its_tokens(family):
    host = tiny_host(family)
    # Unseen words fall into several tokens.
    texts = ("Zebras misunderstand photography, sadly.", *SENTENCES[:6])
    states = word_states(host, anchor_all(texts), batch_size=4)
    ids, words = tokens_of_words(host, texts[0])
    assert max(map(len, words)) > 1
    output = host.model(torch.tensor([ids]), output_hidden_states=True)
    assert states.num_hidden_layers == 2
    for depth, hidden in enumerate([*output.hidden_states[:2], output.last_hidden_state]):
        expected = torch.stack([hidden[0, tokens].mean(0) for tokens in words])
        torch.testing.assert_close(states.stream[depth][: len(words)], expected, atol=1e-5, rtol=1e-4)
    first_only = torch.stack([output.last_hidden_state[0, tokens[0]] for tokens in words])
    assert not torch.allclose(states.stream[2][: len(words)], first_only, atol=1e-2)  # the control
    assert bool(states.present.all())


@pytest.mark.parametrize(("family", "same"), [("bert", True), ("llama", False)])
def test_attention_input_is_the_stream_where_the_norm_comes_after(family, same):
    states = word_states(tiny_host(family), tiny_anchors())
    assert torch.allclose(states.attention[0], states.stream[0], atol=1e-6) == same
    # Then they are one tensor, and stay one: neither is held, fitted or projected twice.
    doubled = states.each(lambda state: 2 * state)
    for found in (states, states.present_only(), doubled):
        assert all((found.attention[index] is found.stream[index]) == same for index in range(2))
    torch.testing.assert_close(doubled.attention[1], 2 * states.attention[1])
    torch.testing.assert_close(doubled.mlp[1], 2 * states.mlp[1])
    assert not torch.allclose(states.mlp[0], states.stream[0], atol=1e-2)


def test_batch_size_changes_nothing_and_hooks_are_gone():
    host = tiny_host("llama")
    one, many = (word_states(host, tiny_anchors(), batch_size=size) for size in (1, 32))
    for left, right in zip(one.stream, many.stream, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in host.model.modules())


def test_words_that_are_cut_off_are_not_present():
    host = tiny_host("bert")
    long = " ".join(SENTENCES[:12])
    anchors = anchor_all([*SENTENCES[12:20], long])
    states = word_states(host, anchors)
    before = sum(len(word_spans(text)) for text in SENTENCES[12:20])
    assert bool(states.present[:before].all())
    tail = states.present[before:]
    assert tail[0]
    assert not tail[-1]
    assert not states.stream[1][before:][~tail].any()
    kept = states.present_only()
    assert bool(kept.present.all())
    assert len(kept.stream[0]) == len(kept.mlp[1]) == int(states.present.sum()) < len(states.present)


def test_host_that_sees_too_little_is_refused():
    host = replace(tiny_host("bert"), max_length=8)
    with pytest.raises(AlignmentError, match="only") as caught:
        word_states(host, anchor_all([" ".join(SENTENCES[:8])]))
    assert caught.value.hint


def test_states_that_are_no_numbers_are_refused():
    host = tiny_host("bert")
    with torch.no_grad():
        host.map.layers[1].target_modules["down"].module.weight[0, 0] = torch.nan
    with pytest.raises(AlignmentError, match="not finite") as caught:
        word_states(host, tiny_anchors())
    assert caught.value.hint
