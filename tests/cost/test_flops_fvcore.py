"""Two independent counters agree with each other and with a hand count, with weights and on the meta device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_adapters import SMALL, all_taps, host_bank, random_adapter, tiny_folded
from tiny_hosts import DECODERS, FAMILIES, HEADS, SWEEP, tiny_host
from transformers import AutoModel

from uhl_cli.adapter.fold import FoldedAdapter, fold, move
from uhl_cli.align.alignment import align_anchors
from uhl_cli.cost import flops_fvcore
from uhl_cli.cost.flops import count_flops, count_map_flops
from uhl_cli.cost.flops_fvcore import count_flops_fvcore
from uhl_cli.cost.flops_shapes import shape_only
from uhl_cli.cost.passes import PassShape
from uhl_cli.cost.plan import full_plan
from uhl_cli.host.hostmap import find_map

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
    taps = 2 * readout * d * (LAYERS + 1)
    pool = 2 * readout
    return batch * (tokens * (LAYERS * layer + own + taps + pool) + 2 * readout * labels)


def folded_with_all_taps(host, config=SMALL) -> FoldedAdapter:
    bank, states = host_bank(host, config)
    alignment = all_taps(align_anchors(bank, states))
    with torch.no_grad():
        folded = fold(random_adapter(config).stored(), alignment, host.map, kind=config.kind)
    return move(folded, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 64), (3, 16)])
@pytest.mark.parametrize("family", SWEEP)
def test_both_counts_are_the_hand_count(family, batch, tokens):
    host = tiny_host(family)
    folded = folded_with_all_taps(host)
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
    folded, _, _ = tiny_folded(host, config)
    folded = move(folded, torch.device("cpu"), torch.float32)
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
    folded = move(tiny_folded(host)[0], torch.device("cpu"), torch.float32)
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
    folded = move(tiny_folded(host)[0], torch.device("cpu"), torch.float32)
    shape = PassShape(1, 8)
    count_flops_fvcore(host.map, folded, shape)
    count_map_flops(host.map, folded, shape)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in host.model.modules())
    with torch.inference_mode():
        assert torch.equal(host.model(input_ids=ids).last_hidden_state, before)


def shapes_of(folded: FoldedAdapter) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a folded adapter, by where it is."""
    readout = folded.readout
    found = {"threshold": folded.threshold, "bias": readout.bias, "weight": readout.out_weight, "out": readout.out_bias}
    found |= {f"tap {depth}": tap for depth, tap in readout.taps.items()}
    if readout.pool is not None:
        found["pool"] = readout.pool
    for index, layer in (*folded.layers.items(), ("readout", readout.layer)):
        if layer is not None:
            for name in ("router", "router_bias", "read", "read_bias"):
                found[f"{index} {name}"] = getattr(layer, name)
            found |= {f"{index} {name}": edit for name, edit in layer.edits.items()}
    return {name: tuple(tensor.shape) for name, tensor in found.items()}


def meta_twin(host):
    """The map of the same model built from its configuration alone."""
    with torch.device("meta"):
        model = AutoModel.from_config(host.model.config).eval()
    model.config.pad_token_id = None
    return find_map(model)


@pytest.mark.parametrize("config", [SMALL, TOKENS_CONFIG], ids=["sequence", "tokens"])
@pytest.mark.parametrize("family", SWEEP)
def test_shapes_and_counts_on_the_meta_device_are_those_of_the_model(family, config):
    host = tiny_host(family)
    folded = folded_with_all_taps(host, config)
    twin = meta_twin(host)
    shaped = shape_only(twin, full_plan(twin), config)
    assert shapes_of(shaped) == shapes_of(folded)
    shape = PassShape(2, 24)
    for real, hollow in ((None, None), (folded, shaped)):
        assert count_flops_fvcore(twin, hollow, shape)[0] == count_flops_fvcore(host.map, real, shape)[0]
        assert count_map_flops(twin, hollow, shape) == count_map_flops(host.map, real, shape)


def test_shapes_follow_the_plan():
    host = tiny_host("llama")
    bank, states = host_bank(host)
    alignment = all_taps(align_anchors(bank, states))
    plan = replace(full_plan(host.map), types=("q", "o", "gate"), layers=(1,), tap_depths=(0, 2))
    alignment = replace(alignment, taps={depth: alignment.taps[depth] for depth in plan.tap_depths})
    with torch.no_grad():
        stored = random_adapter().stored()
        folded = fold(stored, alignment, host.map, kind="sequence", layers=plan.layers, types=plan.types)
    shaped = shapes_of(shape_only(host.map, plan, SMALL))
    assert shaped == shapes_of(folded)
    assert len(shaped) < len(shapes_of(shape_only(host.map, full_plan(host.map), SMALL)))


@pytest.mark.parametrize("family", ["bert", *DECODERS[:1]])
def test_flops_of_a_batch(family):
    host = tiny_host(family)
    one, three = (count_flops(host, None, sequence_length=16, batch_size=size) for size in (1, 3))
    assert three == pytest.approx(3 * one, rel=1e-3)
    assert count_flops(host, None, sequence_length=32) > 2 * one
