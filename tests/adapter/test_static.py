"""The static mode: exact where the update is one affine map, at no cost, and gone without a trace."""

from __future__ import annotations

import pytest
import torch
from tiny_adapters import SMALL, all_taps, host_bank, many_texts, random_adapter, tiny_task, tiny_universal
from tiny_hosts import FAMILIES, SENTENCES, tiny_host

from uhl_cli.adapter.flops import count_flops
from uhl_cli.adapter.folding import fold, move
from uhl_cli.adapter.ported import PortedModel
from uhl_cli.adapter.static import static
from uhl_cli.align.alignment import align_anchors
from uhl_cli.align.texts import choose_anchors
from uhl_cli.controls import without_updates
from uhl_cli.host.encode import encode

TEXTS = choose_anchors([*SENTENCES, *many_texts()], num_words=900, seed=0, origin="sentences")


def ported_on(host, *, types=None, constant=False, zero=False):
    """A random adapter on a host; `constant`: every token gets the same two atoms with the same weights."""
    bank, states = host_bank(host)
    alignment = all_taps(align_anchors(bank, states))
    with torch.no_grad():
        stored = random_adapter().stored()
        if constant:
            stored["router"] = torch.zeros_like(stored["router"])
            stored["threshold"] = torch.full_like(stored["threshold"], -1.0)
        if zero:
            stored["atoms_u"] = torch.zeros_like(stored["atoms_u"])
        folded = fold(stored, alignment, host.map, kind=SMALL.kind, types=types)
    return PortedModel(host, move(folded, host.device, torch.float32), tiny_task())


def states_of(ported):
    with torch.inference_mode(), ported.attached():
        return ported.host.map.base(**encode(ported.host, SENTENCES[:6]).model_inputs()).last_hidden_state


def bare(host):
    with torch.inference_mode():
        return host.map.base(**encode(host, SENTENCES[:6]).model_inputs()).last_hidden_state


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra"])
@pytest.mark.parametrize("types", [("q", "k", "v"), ("o", "down"), ("readout",)])
def test_is_exact_where_every_token_gets_the_same_atoms(family, types):
    host = tiny_host(family)
    routed = ported_on(host, types=types, constant=True)
    merged = static(routed, TEXTS)
    left, moved = merged(SENTENCES[:6]) - routed(SENTENCES[:6]), without_updates(routed.folded)
    effect = routed(SENTENCES[:6]) - PortedModel(host, moved, tiny_task())(SENTENCES[:6])
    assert left.norm() < 0.03 * effect.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_is_nearer_to_the_routed_updates_than_none_are(family):
    host = tiny_host(family)
    routed = ported_on(host)
    merged = static(routed, TEXTS)
    assert merged.folded.merged
    assert not merged.folded.layers
    wanted, without = states_of(routed), bare(host)
    assert (states_of(merged) - wanted).norm() < 0.9 * (without - wanted).norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_leaves_no_trace(family):
    host = tiny_host(family)
    before, objects = bare(host), dict(host.model.named_parameters())
    values = {name: value.clone() for name, value in host.model.state_dict().items()}
    merged = static(ported_on(host), TEXTS)
    assert torch.equal(bare(host), before)
    with merged.attached():
        assert not torch.equal(bare(host), before)

    def fail():
        with merged.attached():
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert torch.equal(bare(host), before)
    after = dict(host.model.named_parameters())
    assert after.keys() == objects.keys()
    assert all(after[name] is value for name, value in objects.items())
    assert all(torch.equal(value, values[name]) for name, value in host.model.state_dict().items())


def test_updates_of_zero_merge_to_the_weights_as_they_are():
    host = tiny_host("bert")
    merged = static(ported_on(host, zero=True), TEXTS)
    assert torch.equal(states_of(merged), bare(host))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_costs_the_readout_alone(family):
    host = tiny_host(family)
    routed = ported_on(host)
    own = count_flops(host, None)
    readout = count_flops(host, without_updates(routed.folded)) - own
    assert count_flops(host, static(routed, TEXTS).folded) - own == readout > 0
    assert count_flops(host, routed.folded) - own > 1.2 * readout


def test_by_the_adapter_itself():
    host = tiny_host("bert")
    adapter = tiny_universal(host)
    ported = adapter.port(host, max_flops=1000)
    merged = adapter.static(ported)
    assert merged(SENTENCES[:3]).shape == ported(SENTENCES[:3]).shape
    assert ported.folded.layers
