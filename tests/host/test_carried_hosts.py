"""A builtin host's function under another architecture's modules: the same map of states, the same ported answers."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from carried_hosts import ARCHITECTURES, build, largest_difference, write
from tiny_adapters import tiny_anchors, tiny_universal
from tiny_hosts import SENTENCES, tiny_host, tiny_tokenizer
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from uhl_cli.align.states import WordStates, word_states
from uhl_cli.api import UniversalAdapter
from uhl_cli.host.checkpoint import Host, load_host, wrap_host

pytestmark = pytest.mark.integration

TEXTS = list(SENTENCES[:6])
# A query module that runs twice, shifted positions, layers in groups, fused modules, multipliers, experts.
SAMPLE = ("deberta-v2", "mpnet", "albert", "phi3", "granite", "mixtral")


@functools.cache
def builtin(name: str) -> Host:
    return load_host(f"builtin:{name}", device="cpu")


@functools.cache
def states_of(name: str) -> WordStates:
    return word_states(builtin(name), tiny_anchors())


@functools.cache
def adapter() -> UniversalAdapter:
    return tiny_universal(tiny_host("bert"))


@functools.cache
def answers_of(name: str) -> Tensor:
    return answers(builtin(name))


def answers(host: Host) -> Tensor:
    """Log-probabilities with the updates at full strength."""
    ported = adapter().port(host, max_flops=1e9, strength=1.0)
    return ported(TEXTS)


@functools.cache
def carried(name: str) -> Host:
    return wrap_host(*build(ARCHITECTURES[name], builtin(ARCHITECTURES[name].source)))


@pytest.mark.parametrize("name", SAMPLE)
def test_the_same_function_gives_the_same_states(name):
    host, source = carried(name), ARCHITECTURES[name].source
    assert host.map.degree == "all"
    assert largest_difference(builtin(source), host, TEXTS) < 1e-4
    expected, found = states_of(source), word_states(host, tiny_anchors())
    for place in ("stream", "attention", "mlp"):
        pairs = zip(getattr(expected, place), getattr(found, place), strict=True)
        assert all(torch.allclose(one, other, atol=1e-4) for one, other in pairs), place


# A block of experts is edited as a whole, its gates included, so updates act otherwise there.
@pytest.mark.parametrize("name", [name for name in SAMPLE if name != "mixtral"])
def test_the_same_function_gives_the_same_ported_answers(name):
    host, source = carried(name), ARCHITECTURES[name].source
    plain = adapter().port(builtin(source), max_flops=1e9, strength=0.0)(TEXTS)
    moved = (answers_of(source) - plain).abs().max()
    assert moved > 0
    assert (answers(host) - answers_of(source)).abs().max() < 1e-2 * moved
    # DeBERTa hands a parameter to a module, which torch's FLOP counter takes only of a frozen model.
    assert all(parameter.requires_grad for parameter in host.model.parameters())


def test_another_function_is_noticed():
    host = carried("ernie")
    with torch.no_grad():
        host.map.layers[0].target_modules["v"].weight().mul_(1.1)
    assert largest_difference(builtin("small"), host, TEXTS) > 1e-2


def test_a_weight_without_a_place_is_an_error():
    with pytest.raises(ValueError, match="unexpected"):
        build(ARCHITECTURES["phi3"], builtin("small"))


def test_a_checkpoint_of_an_encoder_alone_is_a_host_by_its_encoder(tmp_path):
    config = T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    torch.manual_seed(0)
    model, tokenizer = T5EncoderModel(config).eval(), tiny_tokenizer("bert")
    assert len(tokenizer) <= config.vocab_size
    write(tmp_path, model, tokenizer)
    assert not json.loads((tmp_path / "config.json").read_text())["is_encoder_decoder"]
    host = load_host(str(tmp_path), device="cpu")
    assert (type(host.model).__name__, host.map.degree) == ("T5Stack", "all")
    assert largest_difference(wrap_host(model, tokenizer), host, TEXTS) == 0.0
