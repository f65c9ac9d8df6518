"""The tokenizer that runs is the one in tokenizer.json, or a warning says which tokens differ."""

import json
import warnings

import pytest
from tiny_hosts import save_rebuilt_host, save_tiny_host, tiny_host, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from uhl_cli.errors import TokenizerError, UhlWarning
from uhl_cli.host.checkpoint import load_host, wrap_host
from uhl_cli.host.tokenizer import PROBES

FAMILIES = ("qwen2", "roberta", "gpt2")


def by_class(path):
    return AutoTokenizer.from_pretrained(path)


def ids(tokenizer):
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]


def ids_of_file(path):
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in PROBES]


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    path = save_rebuilt_host(tmp_path / "host", request.param)
    if ids(by_class(path)) == ids_of_file(path):
        pytest.skip("this release of transformers runs tokenizer.json")
    return path


def test_the_file_runs_and_a_warning_names_the_tokens(folder):
    with pytest.warns(UhlWarning, match="differently from its tokenizer.json") as caught:
        host = load_host(str(folder), device="cpu")
    said = str(caught[0].message)
    assert len(caught) == 1
    assert "\n" not in said
    assert "--tokenizer file or class" in said
    assert "in place of" in said
    assert ids(host.tokenizer) == ids_of_file(folder)
    assert host.tokenizer_source == "file"
    assert host.tokenizer.eos_token == by_class(folder).eos_token
    assert host.tokenizer.model_max_length == by_class(folder).model_max_length


@pytest.mark.parametrize("source", ["file", "class"])
def test_a_choice_is_obeyed_without_a_word(folder, source):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UhlWarning)
        host = load_host(str(folder), device="cpu", tokenizer=source)
    assert host.tokenizer_source == source
    assert (ids(host.tokenizer) == ids_of_file(folder)) == (source == "file")


def test_a_tokenizer_in_memory_is_compared_with_its_file(folder):
    family = json.loads((folder / "config.json").read_text())["model_type"]
    with pytest.warns(UhlWarning, match="differently from its tokenizer.json"):
        host = wrap_host(tiny_model(family), by_class(folder))
    assert ids(host.tokenizer) == ids(by_class(folder))  # the caller's, which the caller's own calls use too


@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "qwen2", "gpt2"])
def test_no_difference_no_word(tmp_path, family):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UhlWarning)
        for name in (str(save_tiny_host(tmp_path / "host", family)), "builtin:tiny", "builtin:decoder"):
            assert load_host(name, device="cpu").tokenizer_source is None
        tiny_host(family)


@pytest.mark.parametrize("lower", [True, False])
def test_settings_beside_the_file_apply_to_it(tmp_path, lower):
    path = save_tiny_host(tmp_path / "host", "bert")
    content = json.loads((path / "tokenizer.json").read_text())
    content["normalizer"]["lowercase"] = not lower
    (path / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "BertTokenizer", "do_lower_case": lower}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UhlWarning)
        host = load_host(str(path), device="cpu")
    assert (host.tokenizer("THE FILM")["input_ids"] == host.tokenizer("the film")["input_ids"]) == lower


def test_no_file_to_choose(tmp_path):
    path = save_tiny_host(tmp_path / "host", "bert")
    vocabulary = tiny_tokenizer("bert").get_vocab()
    (path / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)))
    (path / "tokenizer.json").unlink()
    settings = json.loads((path / "tokenizer_config.json").read_text()) | {"tokenizer_class": "BertTokenizer"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_host(str(path), device="cpu").tokenizer_source is None
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        load_host(str(path), device="cpu", tokenizer="file")


def test_an_unknown_token_that_the_vocabulary_lacks(tmp_path):
    folder = save_tiny_host(tmp_path / "host", "bert")
    wanted = ids(load_host(str(folder), device="cpu").tokenizer)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unk_token": ""}))
    with pytest.raises(RecursionError):  # what transformers does with it
        _ = by_class(folder).unk_token_id
    host = load_host(str(folder), device="cpu")
    assert host.tokenizer.unk_token is None
    assert ids(host.tokenizer) == wanted


def test_settings_that_break_a_comparison_are_one_line(tmp_path):
    folder = save_rebuilt_host(tmp_path / "host", "qwen2")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "many"}))
    with pytest.raises(TokenizerError, match="okenizer of"):
        load_host(str(folder), device="cpu")
