"""A text that spells a special token is text: for every kind of tokenizer, in a host and in what is saved of it."""

from __future__ import annotations

import pytest
import torch
from tiny_hosts import FAMILIES, SENTENCES, tiny_host, tiny_model, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from uhl_cli.errors import TokenizerError
from uhl_cli.host.checkpoint import Host, load_host, wrap_host
from uhl_cli.host.encode import encode
from uhl_cli.host.plain_text import takes_apart
from uhl_cli.host.standalone import refuse_other_ids, save_standalone, standalone_tokenizer

ROLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
LENGTH = 64


def unigram() -> PreTrainedTokenizerFast:
    """Special tokens are the likeliest pieces, as in the files of XLM-RoBERTa, ALBERT and T5."""
    pieces = [(token, 0.0) for token in ROLES.values()]
    pieces += [(letter, -5.0) for letter in sorted({*"".join(SENTENCES), *"<>/▁[]SEP"})]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LENGTH, **ROLES)


def words() -> PreTrainedTokenizerFast:
    """A word-level vocabulary without a pre-tokenizer's step for punctuation, and a role that is not marked special."""
    entries = [*ROLES.values(), "it", "was", "great", "and", "awful"]
    tokenizer = Tokenizer(models.WordLevel({entry: place for place, entry in enumerate(entries)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens([AddedToken("</s>", special=False)])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LENGTH, **ROLES)


MADE = {"unigram": unigram, "words": words}


def host_of(kind: str) -> Host:
    if kind in FAMILIES:
        return tiny_host(kind)
    return wrap_host(tiny_model("xlm-roberta", tokenizer=MADE[kind]()), MADE[kind]())


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return tiny_tokenizer(kind) if kind in FAMILIES else MADE[kind]()


def texts_of(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Each special token alone, between spaces and inside a word."""
    tokens = tokenizer.all_special_tokens
    return [form.format(token) for token in tokens for form in ("{}", "it was great {} and awful", "it was great{}and")]


def special(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Ids of the special tokens, without one that only stands for unknown text."""
    roles = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    return {number for number in tokenizer.all_special_ids if number != tokenizer.unk_token_id or number in roles}


@pytest.mark.parametrize("kind", [*FAMILIES, *MADE])
def test_no_text_gives_a_special_token(kind):
    plain = tokenizer_of(kind)
    texts = texts_of(plain)
    as_it_comes = plain(texts, add_special_tokens=False)["input_ids"]
    assert special(plain) <= {number for row in as_it_comes for number in row}, "the control"
    host = host_of(kind)
    encoded = encode(host, texts)
    text_tokens = encoded.sequence == 0
    assert special(plain).isdisjoint(encoded.input_ids[text_tokens].tolist())
    assert torch.equal(encoded.content_mask, text_tokens)
    for row, text in enumerate(texts):
        spans = encoded.offsets[row][text_tokens[row]].tolist()
        covered = {place for start, end in spans for place in range(start, end)}
        assert covered == {place for place, letter in enumerate(text) if letter != " "}, "no character is lost"
    assert special(plain) & set(encode(host, ["it was great"]).input_ids[0].tolist()), "those around a text stay"


@pytest.mark.parametrize("kind", [*FAMILIES, *MADE])
def test_other_texts_are_read_as_before(kind):
    host, plain = host_of(kind), tokenizer_of(kind)
    texts = [*SENTENCES[:8], "[ SEP ] < s> SEP] s>", "it was great and awful"]
    ids = host.tokenizer(texts)["input_ids"]
    assert ids == plain(texts)["input_ids"]
    assert plain.init_kwargs.get("split_special_tokens") is None, "the caller's tokenizer is as it was"


def test_a_review_with_a_separator_keeps_both_halves():
    text, without = "it was great [SEP] and then awful", "it was great and then awful"
    host, plain = tiny_host("bert"), tiny_tokenizer("bert")
    encoded = encode(host, [text, without])
    separator = host.tokenizer.sep_token_id
    assert [(row == separator).sum().item() for row in encoded.input_ids] == [1, 1]
    assert plain(text)["input_ids"].count(separator) == 2, "the control"
    assert int(encoded.content_mask[0].sum()) - int(encoded.content_mask[1].sum()) == len(["[", "s", "##e", "##p", "]"])


@pytest.mark.parametrize("kind", ["bert", "gpt2", "unigram", "words"])
def test_added_words_are_still_found(kind):
    tokenizer = tokenizer_of(kind)
    tokenizer.add_tokens(["covfefe"])
    host = wrap_host(tiny_model("bert", tokenizer=tokenizer), tokenizer)
    number = tokenizer.convert_tokens_to_ids("covfefe")
    assert encode(host, ["it was covfefe and"]).input_ids[0].tolist().count(number) == 1


def test_a_mark_that_serves_as_padding_is_still_a_mark():
    tokenizer = tiny_tokenizer("gpt2")
    tokenizer.pad_token = "!"  # as in some CLIP checkpoints
    host = wrap_host(tiny_model("gpt2", tokenizer=tokenizer), tokenizer)
    assert encode(host, ["it was great!"]).input_ids[0].tolist()[-1] == tokenizer.pad_token_id


@pytest.mark.parametrize("kind", [*FAMILIES, *MADE])
def test_saved_and_called_plainly_it_reads_the_same(kind, tmp_path):
    host = host_of(kind)
    texts = texts_of(host.tokenizer)
    refuse_other_ids(standalone_tokenizer(host, LENGTH), host, texts, max_length=host.max_length)
    save_standalone(standalone_tokenizer(host, host.max_length), tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert special(loaded).isdisjoint(loaded("".join(texts), add_special_tokens=False)["input_ids"])


def test_a_tokenizer_that_reads_special_tokens_is_refused():
    host = tiny_host("bert")
    tokenizer = standalone_tokenizer(host, LENGTH)
    refuse_other_ids(tokenizer, host, SENTENCES[:2], max_length=LENGTH)  # the control
    del tokenizer.init_kwargs["split_special_tokens"]
    with pytest.raises(TokenizerError, match="not the same when it is saved"):
        refuse_other_ids(tokenizer, host, SENTENCES[:2], max_length=LENGTH)


def test_a_class_that_builds_its_own_pre_tokenizer(tmp_path):
    host = host_of("unigram")
    assert takes_apart(host.tokenizer)
    assert not takes_apart(tiny_host("bert").tokenizer)
    host.model.save_pretrained(tmp_path)
    unigram().save_pretrained(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("TokenizersBackend", "XLMRobertaTokenizer"))
    loaded = load_host(str(tmp_path), device="cpu")
    assert type(loaded.tokenizer).__name__ == "XLMRobertaTokenizer"
    texts = texts_of(loaded.tokenizer)
    refuse_other_ids(standalone_tokenizer(loaded, LENGTH), loaded, texts, max_length=loaded.max_length)
