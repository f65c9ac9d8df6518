"""Maps by structure are kept; a file that does not fit its model is ignored."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from test_structure import described, small
from tiny_hosts import tiny_tokenizer
from torch import nn

from uhl_cli.host import proof
from uhl_cli.host.checkpoint import load_host, wrap_host
from uhl_cli.host.map_cache import load_map, save_map
from uhl_cli.host.proof import resolve

TYPES = {
    "albert": {"embedding_size": 16},
    "gpt_neox": {"intermediate_size": 128},
    "gemma2": {"head_dim": 8, "num_key_value_heads": 2},
    "mamba": {"state_size": 8, "expand": 2, "time_step_rank": 4},
}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("UHL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "maps"


@pytest.mark.parametrize("model_type", TYPES)
def test_a_kept_map_is_the_one_that_was_found(cache, model_type):
    model = small(model_type, **TYPES[model_type])
    assert load_map(model) is None
    found = resolve(model)
    save_map(found)
    kept = load_map(model)
    assert kept is not None
    assert described(kept) == described(found)
    assert (kept.degree, kept.embeddings) == (found.degree, found.embeddings)
    assert [[other.name for other in layer.others] for layer in kept.layers] == [
        [other.name for other in layer.others] for layer in found.layers
    ]
    assert len(list(cache.iterdir())) == 1


def test_another_model_has_another_map(cache):
    save_map(resolve(small("gpt_neox", intermediate_size=128)))
    assert load_map(small("gpt_neox", intermediate_size=128)) is not None
    assert load_map(small("gpt_neox", intermediate_size=128, seed=1)) is None  # other weights
    assert load_map(small("gpt_neox", intermediate_size=128, rotary_pct=0.5)) is None
    assert load_map(small("gpt_neox", intermediate_size=128).double()) is None


CHANGES = {
    "no JSON": lambda stored: b"{",
    "not this": lambda stored: b'{"layers": []}',
    "no such module": lambda stored: changed(stored, name="layers.0.nothing"),
    "no such features": lambda stored: changed(stored, columns=[[0, 10**9]]),
    "other features": lambda stored: changed(stored, columns=[[0, 8]]),
    "backwards": lambda stored: changed(stored, columns=[[16, 8], [0, 40]]),
    "a number that is none": lambda stored: changed(stored, scale="NaN"),
    "another width": lambda stored: json.dumps(json.loads(stored) | {"hidden_size": 31}).encode(),
    "an embedding that is none": lambda stored: json.dumps(json.loads(stored) | {"embeddings": "layers.0"}).encode(),
}


def changed(stored: bytes, **fields: object) -> bytes:
    content = json.loads(stored)
    content["layers"][0]["modules"]["q"] |= fields
    return json.dumps(content).encode()


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_does_not_fit_is_ignored(cache, change):
    model = small("gpt_neox", intermediate_size=128)
    save_map(resolve(model))
    (path,) = cache.iterdir()
    path.write_bytes(CHANGES[change](path.read_bytes()))
    assert load_map(model) is None


def saved(folder: Path) -> Path:
    tokenizer = tiny_tokenizer("gpt2")
    model = small("gpt_neox", intermediate_size=128, vocab_size=len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return folder


def counted(monkeypatch) -> list[nn.Module]:
    searched: list[nn.Module] = []
    real = proof.discover
    monkeypatch.setattr(proof, "discover", lambda base: searched.append(base) or real(base))
    return searched


def test_a_checkpoint_is_searched_once(cache, tmp_path, monkeypatch):
    folder, searched = saved(tmp_path / "host"), counted(monkeypatch)
    first, second = (load_host(str(folder), device="cpu") for _ in range(2))
    assert len(searched) == 1
    assert described(first.map) == described(second.map)
    assert first.fingerprint == second.fingerprint
    wrap_host(first.model, first.tokenizer)  # what was done to a model in memory is not seen
    assert len(searched) == 2


def test_a_kept_map_that_the_model_does_not_run_by_is_ignored(cache, tmp_path, monkeypatch):
    folder, searched = saved(tmp_path / "host"), counted(monkeypatch)
    good = load_host(str(folder), device="cpu")
    (path,) = cache.iterdir()
    content = json.loads(path.read_bytes())
    content["layers"] = content["layers"][:1] * 2  # one module, said to be both layers
    path.write_text(json.dumps(content))
    assert described(load_host(str(folder), device="cpu").map) == described(good.map)
    assert len(searched) == 2


@pytest.mark.parametrize("place", ["/dev/null", "\0"])
def test_a_cache_that_cannot_be_written_is_no_error(place, tmp_path, monkeypatch):
    if place == "\0":
        place = str(tmp_path / "file")
        Path(place).touch()
    monkeypatch.setenv("UHL_CACHE", place)
    assert load_host(str(saved(tmp_path / "host")), device="cpu").map.degree == "all"


def test_the_oldest_maps_are_removed(cache, monkeypatch):
    monkeypatch.setattr("uhl_cli.host.map_cache._MOST_FILES", 2)
    models = [small("gpt_neox", intermediate_size=128, seed=seed) for seed in range(3)]
    for age, model in enumerate(models):
        save_map(resolve(model))
        assert load_map(model) is not None
        newest = max(cache.iterdir(), key=lambda path: path.stat().st_mtime)
        os.utime(newest, (age, age))
    assert [load_map(model) is None for model in models] == [True, False, False]
