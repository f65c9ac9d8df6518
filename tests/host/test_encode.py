"""Encoding marks the text's own tokens and finds words again, whatever the tokenizer."""

from dataclasses import replace

import pytest
import torch
from tiny_hosts import DECODERS, FAMILIES, SENTENCES, tiny_host

from uhl_cli.errors import DataError, TokenizerError, UsageError
from uhl_cli.host.encode import encode, tokens_of_spans

TEXTS = [
    "The film is warm.",
    "Anna didn't cross the Zürich–Genève bridge, naïve 😀!",
    "  leading and  double  spaces ",
    "日本語 and \t tabs",
]


@pytest.fixture(params=FAMILIES, scope="module")
def host(request):
    return tiny_host(request.param)


def word_spans(text):
    spans, start = [], None
    for index, sign in enumerate(text + " "):
        if sign.isspace():
            if start is not None:
                spans.append((start, index))
            start = None
        elif start is None:
            start = index
    return spans


def test_shapes_types_and_forward(host):
    encoded = encode(host, TEXTS, list(reversed(TEXTS)))
    shape = encoded.input_ids.shape
    assert encoded.input_ids.dtype == encoded.attention_mask.dtype == encoded.offsets.dtype == torch.int64
    assert encoded.content_mask.dtype == torch.bool
    assert encoded.attention_mask.shape == encoded.content_mask.shape == encoded.sequence.shape == shape
    assert encoded.offsets.shape == (*shape, 2)
    state = host.model(**encoded.model_inputs())[0]
    assert state.shape == (*shape, 32)
    assert (encoded.token_type_ids is not None) == (host.name in ("tiny-bert", "tiny-electra"))
    moved = encoded.to("meta")
    assert moved.input_ids.is_meta
    assert moved.content_mask.is_meta


def test_content_is_exactly_the_text(host):
    encoded = encode(host, TEXTS)
    for row, text in enumerate(TEXTS):
        content = encoded.content_mask[row]
        ids = encoded.input_ids[row][content].tolist()
        assert ids == host.tokenizer(text, add_special_tokens=False).input_ids
        assert bool((encoded.sequence[row][content] == 0).all())
        assert bool((encoded.sequence[row][~content] == -1).all())
        assert not bool((content & (encoded.attention_mask[row] == 0)).any())
        assert not bool(content[0])  # [CLS], <s>, or the sink of a decoder
        assert bool(encoded.attention_mask[row][0])


def test_unknown_tokens_are_content():
    host = tiny_host("bert")
    encoded = encode(host, ["The 日本語 film"])
    ids = encoded.input_ids[0]
    assert host.tokenizer.unk_token_id in ids.tolist()
    assert bool(encoded.content_mask[0][ids == host.tokenizer.unk_token_id].all())


def test_padding_changes_nothing(host):
    short = encode(host, ["The film is warm."])
    padded = encode(host, ["The film is warm.", SENTENCES[1]])
    width = short.input_ids.shape[1]
    assert torch.equal(padded.input_ids[:1, :width], short.input_ids)
    assert not bool(padded.attention_mask[0, width:].any())
    alone = host.model(**short.model_inputs())[0]
    together = host.model(**padded.model_inputs())[0][:1, :width]
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=1e-4)


def test_empty_text_can_be_pooled(host):
    for texts in ([""], ["", "The film."], ["   "]):
        encoded = encode(host, texts)
        assert bool(encoded.attention_mask.any(dim=1).all())
        assert bool(encoded.content_mask.any(dim=1).all())
        assert torch.isfinite(host.model(**encoded.model_inputs())[0]).all()


@pytest.mark.parametrize("family", DECODERS)
def test_decoder_starts_with_one_special_token(family):
    host = tiny_host(family)
    tokenizer = host.tokenizer
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = encode(host, ["The film"]).input_ids[0].tolist()
    assert ids[0] == first
    assert ids[1] != first


def groups_of(encoded, row, spans, **options):
    """For each span, the indices of its tokens."""
    overlap = tokens_of_spans(encoded, row, spans, **options)
    assert overlap.shape == (len(spans), encoded.input_ids.shape[1])
    return [tokens.nonzero().flatten().tolist() for tokens in overlap]


def test_pairs(host):
    encoded = encode(host, ["The film"], ["a warm comedy"])
    assert set(encoded.sequence[0].tolist()) == {-1, 0, 1}
    for which, text in enumerate(("The film", "a warm comedy")):
        chosen = encoded.content_mask[0] & (encoded.sequence[0] == which)
        ids = host.tokenizer(text, add_special_tokens=False).input_ids
        assert encoded.input_ids[0][chosen].tolist() == ids
    tokens = groups_of(encoded, 0, [(2, 6)], sequence=1)[0]
    assert tokens
    assert all(encoded.sequence[0, token] == 1 for token in tokens)


def test_truncation_is_counted_and_cuts_the_longer_text(host):
    long = " ".join(SENTENCES)
    encoded = encode(host, [long, "The film"])
    assert encoded.truncated == 1
    assert encoded.input_ids.shape[1] == host.max_length
    host.model(**encoded.model_inputs())
    encoded = encode(host, ["The film", "Two dogs"], [long, "ran"], max_length=20)
    assert encoded.truncated == 1
    assert encoded.input_ids.shape[1] == 20
    kept = host.tokenizer("The film", add_special_tokens=False).input_ids
    assert encoded.input_ids[0][encoded.sequence[0] == 0].tolist() == kept
    assert encode(host, [long], max_length=10_000).input_ids.shape[1] == host.max_length
    assert groups_of(encode(host, [long]), 0, [(len(long) - 5, len(long))]) == [[]]


def test_words_are_found_again(host):
    encoded = encode(host, TEXTS)
    for row, text in enumerate(TEXTS):
        spans = word_spans(text)
        groups = groups_of(encoded, row, spans)
        used = [token for group in groups for token in group]
        assert used == sorted(set(used))  # in order, and no token in two words
        assert all(groups)
        for (start, end), group in zip(spans, groups, strict=True):
            inside = [encoded.offsets[row, token].tolist() for token in group]
            assert inside[0][0] == start
            assert inside[-1][1] == end
        others = encoded.content_mask[row].nonzero().flatten().tolist()
        widths = encoded.offsets[row, :, 1] - encoded.offsets[row, :, 0]
        assert all(widths[token] == 0 for token in set(others) - set(used))


def test_spans_with_white_space_and_parts_of_words(host):
    encoded = encode(host, ["film is warm."])
    film, is_, warm, stop = groups_of(encoded, 0, [(0, 4), (5, 7), (8, 12), (12, 13)])
    assert groups_of(encoded, 0, [(0, 5), (4, 8), (0, 13), (3, 3), (4, 5)]) == [
        film,
        is_,
        film + is_ + warm + stop,
        [],
        [],
    ]
    assert not set(warm) & set(stop)


def test_bad_input():
    host = tiny_host("bert")
    with pytest.raises(DataError):
        encode(host, [])
    with pytest.raises(DataError, match="2 texts and 1 pairs"):
        encode(host, ["a", "b"], ["c"])
    with pytest.raises(UsageError, match="no room"):
        encode(host, ["a"], max_length=2)
    with pytest.raises(TokenizerError, match="without weights"):
        encode(replace(host, tokenizer=None), ["a"])
