"""A tokenizer that is saved reads texts as uhl does, called plainly by those who have no uhl."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_hosts import FAMILIES, save_tiny_host, tiny_host, tiny_model, tiny_tokenizer
from tokenizers import pre_tokenizers, processors
from transformers import AutoTokenizer

from uhl_cli.errors import OutputError, TokenizerError
from uhl_cli.host.checkpoint import Host, load_host, wrap_host
from uhl_cli.host.encode import encode, first_token
from uhl_cli.host.standalone import refuse_other_ids, save_standalone, standalone_tokenizer

TEXTS = [
    "The film is warm.",
    "",
    "Anna didn't cross the Zürich–Genève bridge, naïve 😀!",
    "  leading and  double spaces ",
    "日本語 and \t tabs",
    "a word or two " * 30,
]
PAIRS = ["", "Two dogs ran.", "The soup was cold " * 30, "x", "  y", "I loved every minute " * 20]
LENGTH = 48
# The tiny tokenizers of these put no token first by themselves.
WITHOUT_FIRST = ("mistral", "qwen2", "gpt2")


def saved(host: Host, folder) -> None:
    """Tokenizer and configuration, which transformers looks at when it loads a tokenizer."""
    host.model.config.save_pretrained(folder)
    save_standalone(standalone_tokenizer(host, LENGTH), folder)


def rows(host: Host, pairs: list[str] | None) -> dict[str, list[list[int]]]:
    """What uhl reads, without padding."""
    found: dict[str, list[list[int]]] = {}
    encoded = encode(host, TEXTS, pairs, max_length=LENGTH)
    for name, values in encoded.model_inputs().items():
        kept = zip(values.tolist(), encoded.attention_mask.sum(1).tolist(), strict=True)
        found[name] = [row[:length] for row, length in kept]
    return found


@pytest.mark.parametrize("pairs", [None, PAIRS], ids=["texts", "pairs"])
@pytest.mark.parametrize("family", FAMILIES)
def test_called_plainly_it_gives_what_uhl_reads(family, pairs, tmp_path):
    host = tiny_host(family)
    before = host.tokenizer.backend_tokenizer.to_str(), dict(host.tokenizer.init_kwargs)
    saved(host, tmp_path)
    assert (host.tokenizer.backend_tokenizer.to_str(), dict(host.tokenizer.init_kwargs)) == before, "the host's changed"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert dict(tokenizer(TEXTS, pairs, truncation=True)) == rows(host, pairs)
    refuse_other_ids(standalone_tokenizer(host, LENGTH), host, TEXTS, pairs, max_length=LENGTH)
    assert (tokenizer.model_max_length, tokenizer.padding_side) == (LENGTH, "right")
    assert tokenizer.pad_token_id == host.tokenizer.pad_token_id


@pytest.mark.parametrize("family", WITHOUT_FIRST)
def test_a_decoders_own_tokenizer_as_it_is_is_refused(family):
    host = tiny_host(family)
    assert first_token(host.tokenizer) is not None
    with pytest.raises(TokenizerError, match="is not the same when it is saved"):
        refuse_other_ids(host.tokenizer, host, TEXTS, max_length=LENGTH)


def test_a_class_that_builds_another_tokenizer_is_refused(tmp_path):
    host = tiny_host("qwen2")
    other = load_host(str(save_tiny_host(tmp_path / "host", "qwen2")), device="cpu", tokenizer="class").tokenizer
    tokenizer = standalone_tokenizer(host, LENGTH)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Punctuation("isolated")
    host.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Punctuation("isolated")
    if type(other).__name__ != "Qwen2Tokenizer":
        pytest.skip("this release of transformers runs tokenizer.json")
    with pytest.raises(TokenizerError, match="--tokenizer class"):
        refuse_other_ids(tokenizer, replace(host, tokenizer_source="file"), TEXTS, max_length=LENGTH)


def test_another_longest_input_is_refused():
    host = tiny_host("bert")
    with pytest.raises(TokenizerError):
        refuse_other_ids(standalone_tokenizer(host, LENGTH), host, TEXTS, max_length=LENGTH - 1)


def test_a_full_disk_is_an_error_of_ours(monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    host = tiny_host("bert")
    with monkeypatch.context() as patch:
        patch.setattr("uhl_cli.host.standalone.save_standalone", full)
        with pytest.raises(OutputError, match="No space left"):
            refuse_other_ids(standalone_tokenizer(host, LENGTH), host, TEXTS, max_length=LENGTH)


@pytest.mark.parametrize("pairs", [None, PAIRS], ids=["texts", "pairs"])
@pytest.mark.parametrize("nested", [False, True])
def test_what_a_post_processor_adds_at_the_end_stays(nested, pairs, tmp_path):
    tokenizer = tiny_tokenizer("mistral")
    end = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B:1 </s>:1", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    both = processors.Sequence([processors.ByteLevel(trim_offsets=False), end])
    tokenizer.backend_tokenizer.post_processor = both if nested else end
    host = wrap_host(tiny_model("mistral", tokenizer=tokenizer), tokenizer)
    saved(host, tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path)(TEXTS, pairs, truncation=True)["input_ids"]
    assert found == rows(host, pairs)["input_ids"]
    assert {row[0] for row in found} == {tokenizer.bos_token_id}
    assert {row[-1] for row in found} == {tokenizer.eos_token_id}


@pytest.mark.parametrize("pairs", [None, PAIRS], ids=["texts", "pairs"])
@pytest.mark.parametrize("name", ["builtin:tiny", "builtin:decoder"])
def test_builtin_hosts(name, pairs, tmp_path):
    host = load_host(name, device="cpu")
    saved(host, tmp_path)
    refuse_other_ids(standalone_tokenizer(host, LENGTH), host, TEXTS, pairs, max_length=LENGTH)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id == host.model.config.pad_token_id


def test_the_files_say_a_class_that_older_releases_know(tmp_path):
    saved(tiny_host("gpt2"), tmp_path)
    assert '"PreTrainedTokenizerFast"' in (tmp_path / "tokenizer_config.json").read_text()
