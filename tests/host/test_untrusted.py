"""Configurations and tokenizers of strangers: one typed error before anything large is built, whatever they state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_hosts import save_tiny_host
from torch import nn

from uhl_cli.errors import HostError, TokenizerError, UhlError
from uhl_cli.host.checkpoint import Host, load_host
from uhl_cli.host.config_only import load_config_host
from uhl_cli.host.untrusted import MAX_CONFIG_BYTES, refuse_extremes, refuse_large_file, refuse_more_than_stored


def load(folder: Path) -> Host:
    return load_host(str(folder), device="cpu", offline=True)


def load_config(folder: Path) -> Host:
    return load_config_host(str(folder), offline=True)


LOADERS = {"load_host": load, "load_config_host": load_config}


@pytest.fixture(params=["bert", "llama"])
def folder(tmp_path, request) -> Path:
    return save_tiny_host(tmp_path, request.param, hidden_size=8, num_hidden_layers=1)


def change(path: Path, **fields: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | fields))


CONFIGS = [
    {"num_hidden_layers": "2"},
    {"num_hidden_layers": 1.0},
    {"num_hidden_layers": 0},
    {"num_hidden_layers": -1},
    {"num_hidden_layers": 600},
    {"num_hidden_layers": 50_000_000},
    {"pad_token_id": 10**9},
    {"num_labels": 10**12},
    {"num_labels": 10**6},
    {"hidden_size": 0},
    {"hidden_size": []},
    {"vocab_size": 0},
    {"vocab_size": 10**30},
    {"max_position_embeddings": "x"},
    {"_num_labels": 10**12},
    {"num_attention_heads": 0},
    {"hidden_act": "x"},
    {"hidden_act": True},
    {"tie_word_embeddings": 3},
    {"hidden_act": 5},
    {"initializer_range": "x"},
    {"text_config": {"num_labels": 10**12}},
]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("fields", CONFIGS, ids=lambda fields: json.dumps(fields)[:40])
def test_a_configuration_out_of_bounds_is_one_line(folder, fields, loader):
    change(folder / "config.json", **fields)
    with pytest.raises(UhlError) as caught:
        LOADERS[loader](folder)
    assert caught.value.hint
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    "text", ["[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000, "3", "[]", "{"]
)
def test_a_configuration_that_is_no_object_is_one_line(folder, text, loader):
    (folder / "config.json").write_text(text)
    with pytest.raises(UhlError) as caught:
        LOADERS[loader](folder)
    assert caught.value.hint


@pytest.mark.parametrize("loader", LOADERS)
def test_fields_that_no_one_reads_change_nothing(folder, loader):
    plain = LOADERS[loader](folder)
    change(folder / "config.json", x=[[1]], num_labels=5, rope_theta=10**10, label2id={"a": 0, "b": 1})
    assert LOADERS[loader](folder).fingerprint == plain.fingerprint


@pytest.mark.parametrize("fields", [{"vocab_size": 10**7}, {"vocab_size": 10**12}, {"intermediate_size": 10**7}])
def test_what_the_weights_lack_is_never_allocated(folder, fields):
    """The folder has a few kilobytes of weights."""
    change(folder / "config.json", **fields)
    with pytest.raises(HostError, match=r"describes [0-9,]+ parameters; its weights have [0-9,]+ bytes"):
        load(folder)


def test_large_models_of_packed_weights_pass(tmp_path):
    with torch.device("meta"):
        described = nn.Linear(10_000, 10_000, bias=False)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(22_600_000))  # two bits a parameter, but for ten million
    refuse_more_than_stored("x", described, [weights])
    weights.write_bytes(bytes(22_400_000))
    with pytest.raises(HostError, match="100,000,000 parameters"):
        refuse_more_than_stored("x", described, [weights])


def test_a_large_file_is_not_parsed(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b" " * MAX_CONFIG_BYTES)
    refuse_large_file("x", path)
    path.write_bytes(b" " * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(HostError, match="20,000,001 bytes"):
        refuse_large_file("x", path)


def test_the_field_is_named():
    with pytest.raises(HostError, match="the num_labels 1000000000000, which is no whole number within 0 and"):
        refuse_extremes("x", {"a": [{"num_labels": 10**12}]})
    refuse_extremes(
        "x", {"a": [{"num_labels": 20_000, "num_hidden_layers": 130, "max_length": 10**30, "n_layer": None}]}
    )


def without_special_token(state: dict) -> None:
    """The template names tokens that the post-processor does not know: Rust panics when it is used."""
    state["post_processor"]["special_tokens"] = {}


def without_unknown(state: dict) -> None:
    """The token for unknown words is not in the vocabulary: an error when there is such a word."""
    del state["model"]["vocab"]["[UNK]"]
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != "[UNK]"]


def with_another_segment(state: dict) -> None:
    """A segment id beyond the model's table of two."""
    state["post_processor"]["single"][0]["SpecialToken"]["type_id"] = 23


def with_another_id(state: dict) -> None:
    """An id that is not in the vocabulary."""
    state["post_processor"]["special_tokens"]["[CLS]"]["ids"] = [5000]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_special_token, "cannot be loaded"),
        (without_unknown, "cannot be loaded"),
        (with_another_segment, "gives token_type_ids of 23; the model knows 2"),
        (with_another_id, "gives input_ids of 5000; the model knows"),
    ],
)
def test_a_tokenizer_that_fails_in_use_is_refused_when_it_is_loaded(tmp_path, damage, words):
    folder = save_tiny_host(tmp_path, "bert", hidden_size=8, num_hidden_layers=1)
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    damage(state)
    path.write_text(json.dumps(state))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("unk_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(TokenizerError, match=words):
        load(folder)


@pytest.mark.parametrize("length", ["x", [], None])
def test_a_longest_input_that_is_no_number_is_refused(folder, length):
    change(folder / "tokenizer_config.json", model_max_length=length)
    if length is None:  # as if it were not there
        assert load(folder).max_length == 64
        return
    with pytest.raises(TokenizerError):
        load(folder)
