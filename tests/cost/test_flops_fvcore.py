"""Two independent counters agree with each other and with a hand count, with weights and on the meta device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_adapters import SMALL, all_depths, host_bank, meta_twin, random_adapter, tiny_folded, tiny_universal, unpacked
from tiny_hosts import DECODERS, FAMILIES, HEADS, SWEEP, tiny_host

from uhl_cli.adapter.fold import fold
from uhl_cli.adapter.module import PortedAdapter
from uhl_cli.align.alignment import align_anchors, align_shapes
from uhl_cli.cost import flops_fvcore
from uhl_cli.cost.flops import count_flops, count_map_flops
from uhl_cli.cost.flops_fvcore import count_flops_fvcore
from uhl_cli.cost.passes import PassShape
from uhl_cli.cost.plan import full_plan
from uhl_cli.ported.aligned import AlignedHost

WIDTH, FFN, LAYERS, EMBEDDING = 32, 96, 2, 16
TOKENS_CONFIG = SMALL.model_copy(update={"kind": "tokens"})
PRODUCTS = {
    "aten::addmm",
    "aten::addmv",
    "aten::baddbmm",
    "aten::bmm",
    "aten::mm",
    "aten::mv",
    "aten::dot",
    "aten::matmul",
    "aten::linear",
    "aten::einsum",
    "aten::_convolution",
    "aten::scaled_dot_product_attention",
    "aten::embedding_bag",
    "aten::_embedding_bag_per_sample_weights_backward",
}


def host_flops_by_hand(family: str, batch: int, tokens: int) -> int:
    """Two FLOPs a multiply-add: the linear layers per token, attention per pair of tokens, and what stands beside."""
    d, f = WIDTH, FFN
    if family in ("llama", "mistral", "qwen2"):  # two of four heads for keys and values, and a gate
        linear = 2 * (2 * d * d + 2 * d * (d // HEADS) * (HEADS // 2) + 3 * d * f)
    else:
        linear = 8 * d * d + 4 * d * f
    attention = 4 * tokens * d  # queries times keys, then weights times values, of one token
    total = batch * tokens * LAYERS * (linear + attention)
    if family in ("bert", "roberta", "xlm-roberta"):
        total += batch * 2 * d * d  # the pooler reads one token
    if family == "electra":
        total += batch * tokens * 2 * EMBEDDING * d
    return total


def adapter_flops_by_hand(family: str, batch: int, tokens: int) -> int:
    """Of `SMALL` on a tiny host, nothing left out and the readout listening to every depth."""
    d, k, atoms, readout, labels = WIDTH, 2, 7, 5, 3
    route = 2 * atoms * d + 2 * k * d
    edited = 4 * d + (d if family in ("llama", "mistral", "qwen2") else 0)  # what q, k, v, up and gate read
    written = d + d
    layer = route + 2 * k * edited + 2 * k * written + 2 * k * written  # o and down respond by their own output
    own = route + 2 * k * readout
    depth_weights = 2 * readout * d * (LAYERS + 1)
    pool = 2 * readout
    return batch * (tokens * (LAYERS * layer + own + depth_weights + pool) + 2 * readout * labels)


def folded_with_all_depths(host, config=SMALL) -> PortedAdapter:
    bank, states = host_bank(host, config)
    alignment = all_depths(align_anchors(bank, states))
    with torch.no_grad():
        return unpacked(fold(random_adapter(config).stored(), alignment, host.map))


@pytest.mark.parametrize(("batch", "tokens"), [(1, 64), (3, 16)])
@pytest.mark.parametrize("family", SWEEP)
def test_both_counts_are_the_hand_count(family, batch, tokens):
    host = tiny_host(family)
    folded = folded_with_all_depths(host)
    shape = PassShape(batch, tokens)
    by_hand = host_flops_by_hand(family, batch, tokens)
    added_by_hand = adapter_flops_by_hand(family, batch, tokens)
    fvcore = [count_flops_fvcore(host.map, attached, shape)[0] for attached in (None, folded)]
    by_torch = [count_map_flops(host.map, attached, shape) for attached in (None, folded)]
    for bare, attached in (fvcore, by_torch):
        assert bare == pytest.approx(by_hand, rel=0.01)
        assert attached - bare == pytest.approx(added_by_hand, rel=0.01)
    # The hand count can tell the difference of one linear layer, so it is no accident.
    assert by_hand - 2 * batch * tokens * WIDTH * WIDTH != pytest.approx(by_hand, rel=0.01)


@pytest.mark.parametrize("config", [SMALL, TOKENS_CONFIG], ids=["sequence", "tokens"])
@pytest.mark.parametrize("family", SWEEP)
def test_counters_agree(family, config):
    host = tiny_host(family)
    folded = unpacked(tiny_folded(host, config)[0])
    shape = PassShape(2, 24)
    uncounted = set()
    for attached in (None, folded):
        count, names = count_flops_fvcore(host.map, attached, shape)
        assert count == pytest.approx(count_map_flops(host.map, attached, shape), rel=1e-3)
        uncounted |= names
    assert uncounted
    assert uncounted.isdisjoint(PRODUCTS)


@pytest.mark.parametrize(
    "operator",
    [
        "aten::scaled_dot_product_attention",
        "aten::embedding_bag",
        "aten::_embedding_bag_per_sample_weights_backward",
        "aten::layer_norm",
        "aten::matmul",
    ],
)
def test_without_a_handler_the_counters_part(operator, monkeypatch):
    """Each handler matters: fvcore alone leaves an operator out, counts element-wise work, or refuses a vector."""
    host = tiny_host("bert")
    folded = unpacked(tiny_folded(host)[0])
    shape = PassShape(1, 64)
    whole = count_flops_fvcore(host.map, folded, shape)[0]
    fewer = {name: count for name, count in flops_fvcore.HANDLERS.items() if name != operator}
    monkeypatch.setattr(flops_fvcore, "HANDLERS", fewer)
    if operator == "aten::matmul":
        with pytest.raises(IndexError):
            count_flops_fvcore(host.map, folded, shape)
        return
    count, uncounted = count_flops_fvcore(host.map, folded, shape)
    assert count != pytest.approx(whole, rel=1e-3)
    assert (operator in uncounted) == (operator in PRODUCTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_counting_leaves_the_host_as_it_was(family):
    host = tiny_host(family)
    ids = torch.arange(6).unsqueeze(0)
    with torch.inference_mode():
        before = host.model(input_ids=ids).last_hidden_state
    folded = unpacked(tiny_folded(host)[0])
    shape = PassShape(1, 8)
    count_flops_fvcore(host.map, folded, shape)
    count_map_flops(host.map, folded, shape)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in host.model.modules())
    with torch.inference_mode():
        assert torch.equal(host.model(input_ids=ids).last_hidden_state, before)


def shapes_of(adapter: PortedAdapter) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of an adapter, by name."""
    return {name: (tuple(value.shape), value.dtype) for name, value in adapter.state_dict().items()}


def packed(adapter: PortedAdapter) -> PortedAdapter:
    return adapter.for_inference(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("config", [SMALL, TOKENS_CONFIG], ids=["sequence", "tokens"])
@pytest.mark.parametrize("family", SWEEP)
def test_shapes_and_counts_on_the_meta_device_are_those_of_the_model(family, config):
    host = tiny_host(family)
    real = packed(folded_with_all_depths(host, config))
    twin = meta_twin(host)
    hollow = tiny_universal(host, config).port(twin, max_flops=1e9).adapter
    empty = PortedAdapter.empty(real.structure, twin.map, kind=config.kind, num_labels=config.num_labels)
    assert shapes_of(hollow) == shapes_of(empty) == shapes_of(real)
    assert hollow.structure == real.structure
    shape = PassShape(2, 24)
    for attached in ((None, None), (real, hollow)):
        counts = [count_flops_fvcore(*pair, shape)[0] for pair in zip((host.map, twin.map), attached, strict=True)]
        counts += [count_map_flops(*pair, shape) for pair in zip((host.map, twin.map), attached, strict=True)]
        assert counts[0] == counts[1]
        assert counts[2] == counts[3]


def test_shapes_follow_the_plan():
    host = tiny_host("llama")
    bank, states = host_bank(host)
    alignment = all_depths(align_anchors(bank, states))
    plan = replace(full_plan(host.map), types=("q", "o", "gate"), layers=(1,), readout_depths=(0, 2))
    alignment = replace(
        alignment, depth_weights={depth: alignment.depth_weights[depth] for depth in plan.readout_depths}
    )
    with torch.no_grad():
        stored = random_adapter().stored()
        folded = packed(fold(stored, alignment, host.map, layers=plan.layers, types=plan.types))
    twin, adapter = meta_twin(host), tiny_universal(host)
    shapes = align_shapes(
        bank, twin.map, readout_depths=plan.readout_depths, feature_depths=None, readout_size=SMALL.readout_size
    )
    shaped = adapter.port(AlignedHost(twin, adapter.bank.digest, shapes, plan, host_flops=1)).adapter
    assert shapes_of(shaped) == shapes_of(folded)
    assert shaped.structure.layers == {1: ("q", "o", "gate")}
    empty = PortedAdapter.empty(folded.structure, host.map, kind="sequence", num_labels=SMALL.num_labels)
    assert shapes_of(empty) == shapes_of(folded)
    assert len(shapes_of(shaped)) < len(shapes_of(adapter.port(twin, max_flops=1e9).adapter))


@pytest.mark.parametrize("family", ["bert", *DECODERS[:1]])
def test_flops_of_a_batch(family):
    host = tiny_host(family)
    one, three = (count_flops(host, None, sequence_length=16, batch_size=size) for size in (1, 3))
    assert three == pytest.approx(3 * one, rel=1e-3)
    assert count_flops(host, None, sequence_length=32) > 2 * one
