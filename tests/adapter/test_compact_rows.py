"""Tables in eight bits: within half a step of the values, by torch's operators as without, and small."""

from __future__ import annotations

import pytest
import torch
from tiny_adapters import tiny_folded, unpacked
from tiny_hosts import FAMILIES, tiny_host

from uhl_cli.adapter import sparse
from uhl_cli.adapter.attach import attach
from uhl_cli.adapter.sparse import Bags, is_packed, num_columns, pack_rows, row_sums, row_values, spread
from uhl_cli.codes.layout import TAIL_BYTES, is_table
from uhl_cli.host.encode import encode
from uhl_cli.ported.model import forward

CPU = (torch.device("cpu"), torch.float32)


def table_of(count=13, columns=24, *, seed=0):
    """Rows of very different sizes and offsets; the first is zero, the second one value over and over."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(count, columns, generator=generator) * torch.logspace(-6, 4, count)[:, None]
    table += torch.randn(count, 1, generator=generator)
    table[0], table[1] = 0.0, -3.7
    return table


@pytest.fixture(params=["native", "plain"])
def operators(request, monkeypatch):
    """torch's own operators, and what stands in for them elsewhere."""
    if request.param == "plain":
        monkeypatch.setattr(sparse, "_UNPACK", None)
        monkeypatch.setattr(sparse, "_PACKED_SUMS", None)
    else:
        assert sparse._UNPACK is not None
        assert sparse._PACKED_SUMS is not None


def test_values_are_within_half_a_step(operators):
    table = table_of()
    packed = pack_rows(table)
    assert packed.shape == (len(table), table.shape[1] + TAIL_BYTES)
    assert packed.dtype == torch.uint8
    assert num_columns(packed) == num_columns(table) == table.shape[1]
    error = (row_values(packed) - table).abs()
    steps = (table.amax(1) - table.amin(1)) / 255
    # Half a step, and what float32 itself rounds.
    assert bool((error <= 0.5001 * steps[:, None] + 2e-7 * table.abs().amax(1, keepdim=True)).all())
    assert bool((error[2:].amax(1) > 0.1 * steps[2:]).all()), "no row is rounded: the bound shows nothing"
    assert torch.equal(row_values(packed)[:2], table[:2])
    assert row_values(packed, torch.bfloat16).dtype == torch.bfloat16


def test_packing_twice_and_plain_tables():
    table = table_of()
    packed = pack_rows(table)
    assert is_packed(packed)
    assert not is_packed(table)
    assert pack_rows(packed) is packed
    assert torch.equal(row_values(pack_rows(row_values(packed)))[:2], table[:2])
    assert row_values(table, torch.bfloat16) is table


@pytest.mark.parametrize("grad", [False, True])
def test_sums_are_those_of_the_values(operators, grad):
    packed = pack_rows(table_of())
    generator = torch.Generator().manual_seed(1)
    indices = torch.rand(37, 13, generator=generator).topk(2).indices
    weights = torch.rand(37, 2, generator=generator)
    bags = Bags.of(37, 2, torch.device("cpu"))
    with torch.set_grad_enabled(grad):
        found = row_sums(packed, indices, weights, bags)
    expected = spread(weights.double(), indices, 13) @ row_values(packed).double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert found.dtype == torch.float32
    assert not torch.allclose(found.double(), expected.roll(1, 0))


def test_gradients_pass_through_the_weights():
    packed = pack_rows(table_of())
    indices, weights = torch.tensor([[3, 5]]), torch.ones(1, 2, requires_grad=True)
    row_sums(packed, indices, weights, Bags.of(1, 2, torch.device("cpu"))).sum().backward()
    torch.testing.assert_close(weights.grad[0], row_values(packed)[[3, 5]].sum(1))


def logits_of(host, folded):
    encoded = encode(host, ["the film is warm and funny", "two dogs ran"])
    with torch.inference_mode(), attach(host.map, folded) as attachment:
        return forward(host, attachment, encoded, None)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compact_adapter_gives_what_the_plain_one_does(family):
    host = tiny_host(family)
    folded = unpacked(tiny_folded(host)[0])
    # A router that is rounded may choose other atoms where two are as good as each other, so it is looked at apart.
    packed = folded.mapped(
        lambda name, value: pack_rows(value) if is_table(name) and not name.endswith("router") else value
    )
    assert sum(map(is_packed, packed.buffers())) == sum(map(is_table, packed.state_dict())) - len(folded.layers) - 1
    reference, bare = logits_of(host, folded), logits_of(host, unpacked(tiny_folded(host, zero=True)[0]))
    found = logits_of(host, packed)
    assert not torch.equal(found, reference)
    # Fiftieths of what the updates do to the logits.
    assert float((found - reference).abs().max()) < 0.02 * float((reference - bare).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compact_router_chooses_the_same_atoms(family):
    host = tiny_host(family)
    layer = tiny_folded(host)[0].by_layer[0]
    states = host.map.embeddings.weight.detach()[:200].float() @ torch.eye(host.map.embeddings.embedding_dim, 32)
    states = (states - states.mean(1, keepdim=True)) / states.std(1, keepdim=True)
    plain_logits, compact_logits = (states @ row_values(table).T for table in (layer.router, pack_rows(layer.router)))
    same = plain_logits.topk(2).indices == compact_logits.topk(2).indices
    assert float(same.float().mean()) > 0.95
    assert float((plain_logits.topk(2).indices == compact_logits.roll(1, 0).topk(2).indices).float().mean()) < 0.8


@pytest.mark.parametrize("how", ["for_inference", "to"])
def test_moving_keeps_the_bytes(how):
    packed = tiny_folded(tiny_host("bert"))[0].for_inference(*CPU)
    before = {name: value.clone() for name, value in packed.state_dict().items()}
    moved = packed.for_inference(CPU[0], torch.bfloat16) if how == "for_inference" else packed.to(torch.bfloat16)
    after = moved.state_dict()
    assert list(after) == list(before)
    assert {"layers.0.read", "readout.depth_weights.2", "readout.layer.edits.readout"} <= set(filter(is_table, before))
    for name, value in before.items():
        if is_table(name):
            assert value.dtype == torch.uint8
            assert torch.equal(after[name], value)
        else:
            assert (value.dtype, after[name].dtype) == (torch.float32, torch.bfloat16)
