"""Every family as a source and as a target: pretrain, save, load, port, score, restore."""

from __future__ import annotations

import pytest
import torch
from tiny_hosts import FAMILIES, tiny_host
from toy_runs import carry, make_adapter, pair_data, sequence_data, token_data

from uhl_cli.formats.adapter import read_adapter
from uhl_cli.host.checkpoint import Host

# Targets differ from the sources in width and depth, and each in another way.
SHAPES = {
    family: {"hidden_size": 32 + 8 * (i % 3), "num_hidden_layers": 2 + i % 2} for i, family in enumerate(FAMILIES)
}
# Each family once in either role; encoders and decoders go both ways, and to their own kind.
RING = [
    pytest.param(source, FAMILIES[(i + 2) % len(FAMILIES)], marks=pytest.mark.integration if i else ())
    for i, source in enumerate(FAMILIES)
]
ALL_SCORES = {"ported", "readout_only", "majority_class", "random_update", "head_only", "size"}


def output_of(host: Host) -> torch.Tensor:
    with torch.inference_mode():
        return host.map.base(input_ids=torch.arange(6, 18).reshape(2, 6)).last_hidden_state


def test_every_family_has_both_roles():
    assert {pair.values[0] for pair in RING} == {pair.values[1] for pair in RING} == set(FAMILIES)


@pytest.mark.parametrize(("source", "target"), RING)
def test_one_file_goes_into_every_family(source, target, tmp_path):
    path = tmp_path / "adapter.safetensors"
    host = tiny_host(source)
    before = {name: value.clone() for name, value in host.map.base.state_dict().items()}
    report = make_adapter(host, sequence_data(), path)
    assert report.bytes == path.stat().st_size
    assert all(torch.equal(value, before[name]) for name, value in host.map.base.state_dict().items())
    assert not read_adapter(path).parameters["delta_theta"].codes.any()
    other = tiny_host(target, **SHAPES[target], seed=1)
    untouched = output_of(other)
    ported, carried = carry(path, other, sequence_data())
    assert set(carried.scores) == ALL_SCORES
    assert set(carried.gains) == ALL_SCORES - {"ported"}
    for score in carried.scores.values():
        assert 0 <= score.low <= score.value <= score.high <= 1
        assert score.examples == len(sequence_data().evaluation)
    assert len(carried.quality) == other.num_hidden_layers + 1
    assert torch.equal(output_of(other), untouched)
    with ported.attached():
        assert not torch.equal(output_of(other), untouched), "the file's updates do nothing"
    assert torch.equal(output_of(other), untouched)


@pytest.mark.integration
@pytest.mark.parametrize("data", [pair_data, token_data], ids=["pairs", "tokens"])
@pytest.mark.parametrize(("source", "target"), [("bert", "llama"), ("gpt2", "electra")])
def test_pairs_and_tokens_are_carried_too(data, source, target, tmp_path):
    path = tmp_path / "adapter.safetensors"
    make_adapter(tiny_host(source), data(), path)
    ported, report = carry(path, tiny_host(target, hidden_size=40, num_hidden_layers=3), data())
    assert set(report.scores) == ALL_SCORES
    predictions = ported.classes_of(data().evaluation)
    lengths = [1 if row is None else len(row) for row in data().evaluation.tags or [None] * len(data().evaluation)]
    assert [len(row) for row in predictions.classes] == lengths


@pytest.mark.integration
@pytest.mark.parametrize("strategy", ["anchors", "size"])
def test_every_strategy_trains_and_ports(strategy, tmp_path):
    path = tmp_path / "adapter.safetensors"
    make_adapter(tiny_host("bert"), sequence_data(), path, strategy=strategy)
    _, report = carry(path, tiny_host("roberta", hidden_size=40), sequence_data())
    assert report.strategy == strategy
    assert bool(report.quality) == (strategy != "size")
