"""The hosts that ship: whole, small together, of different shape and basis, and worth more than random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import uhl_cli.builtin
from uhl_cli.builtin.recipes import MAX_LENGTH, RECIPES, VOCAB_SIZE
from uhl_cli.data import load_task
from uhl_cli.errors import HostError, HostNotFoundError
from uhl_cli.host.builtin import builtin_names, builtin_path
from uhl_cli.host.checkpoint import Host, load_host, wrap_host
from uhl_cli.ported.controls import mean_final_states

NAMES = builtin_names()


@pytest.fixture(scope="module")
def hosts() -> dict[str, Host]:
    return {name: load_host(f"builtin:{name}", device="cpu", offline=True) for name in NAMES}


def test_three_encoders_and_a_decoder_ship_in_25_megabytes():
    assert set(NAMES) == set(RECIPES)
    assert sum(RECIPES[name].kind == "encoder" for name in NAMES) >= 3
    assert any(RECIPES[name].kind == "decoder" for name in NAMES)
    folder = Path(uhl_cli.builtin.__file__).parent / "hosts"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 25_000_000


@pytest.mark.parametrize("name", NAMES)
def test_is_what_its_recipe_says(name, hosts):
    host, recipe = hosts[name], RECIPES[name]
    assert (host.num_hidden_layers, host.hidden_size) == (recipe.num_hidden_layers, recipe.hidden_size)
    assert host.decoder == (recipe.kind == "decoder")
    assert host.max_length == MAX_LENGTH
    assert 8000 <= host.map.embeddings.num_embeddings == VOCAB_SIZE == len(host.tokenizer) <= 16000
    record = json.loads((builtin_path(name) / "training.json").read_text())
    assert {key: record[key] for key in recipe.__dict__} == recipe.__dict__
    assert not any(str(value).startswith("/") for value in record.values())


@pytest.mark.parametrize("name", NAMES)
def test_tokenizer_is_of_a_class_that_transformers_4_and_5_know(name):
    settings = json.loads((builtin_path(name) / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_shapes_differ_and_so_do_bases(hosts):
    assert len({(host.num_hidden_layers, host.hidden_size, host.decoder) for host in hosts.values()}) == len(NAMES)
    assert len({host.fingerprint.digest for host in hosts.values()}) == len(NAMES)


@pytest.mark.integration
@pytest.mark.parametrize("name", NAMES)
def test_knows_more_than_the_same_model_with_random_weights(name, hosts):
    """A linear head on mean states, trained on a sixth of the builtin task's training part, scored on half its dev."""
    host = hosts[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        random_model = type(host.model)(host.model.config)
    random = wrap_host(random_model, host.tokenizer)
    data = load_task("reviews")
    some = data.train.select(range(0, len(data.train), 6))
    half = data.evaluation.select(range(0, len(data.evaluation), 2))
    scores = []
    for each in (host, random):
        train, dev = (mean_final_states(each, part)[0].numpy() for part in (some, half))
        centre, spread = train.mean(0), train.std(0) + 1e-6
        head = LogisticRegression(C=0.02, max_iter=2000).fit((train - centre) / spread, some.labels)
        scores.append(float(np.mean(head.predict((dev - centre) / spread) == np.array(half.labels))))
    assert scores[0] > scores[1] + 0.03, scores


def test_another_dtype_and_an_unknown_name():
    host = load_host(f"builtin:{NAMES[0]}", device="cpu", dtype="bfloat16")
    assert host.map.embeddings.weight.dtype == torch.bfloat16
    with pytest.raises(HostNotFoundError, match="no builtin host 'none'") as caught:
        load_host("builtin:none")
    assert all(name in caught.value.hint for name in NAMES)


def test_weights_of_another_shape_are_refused(tmp_path, monkeypatch):
    import shutil

    first, second = NAMES[0], NAMES[1]
    monkeypatch.setattr("uhl_cli.host.builtin._FOLDER", tmp_path)
    shutil.copytree(builtin_path_of(first), tmp_path / first)
    shutil.copy(builtin_path_of(second) / "model.safetensors", tmp_path / first / "model.safetensors")
    with pytest.raises(HostError, match=r"do not fit|not those"):
        load_host(f"builtin:{first}", device="cpu")


def builtin_path_of(name: str) -> Path:
    return Path(uhl_cli.builtin.__file__).parent / "hosts" / name
