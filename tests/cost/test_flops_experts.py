"""Experts are counted as they run, by both counters, and a mixture keeps the updates that its FLOPs allow."""

from __future__ import annotations

import pytest
import torch
from tiny_adapters import SMALL, all_depths, host_bank, random_adapter, tiny_folded, unpacked
from tiny_hosts import tiny_host, tiny_tokenizer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

from uhl_cli.adapter.fold import fold
from uhl_cli.align.alignment import align_anchors
from uhl_cli.budget.target import measure_flops
from uhl_cli.cost import flops, flops_fvcore
from uhl_cli.cost.flops import count_map_flops, counted_operators
from uhl_cli.cost.flops_fvcore import count_flops_fvcore
from uhl_cli.cost.passes import PassShape
from uhl_cli.cost.plan import adapter_flops_per_token, full_plan, make_plan
from uhl_cli.host.checkpoint import wrap_host
from uhl_cli.host.hostmap import HostMap
from uhl_cli.host.proof import resolve

moe = pytest.importorskip("transformers.integrations.moe")

WIDTH, FFN, LAYERS, EXPERTS, CHOSEN = 32, 48, 2, 6, 2
SHAPE = PassShape(2, 16)
ROW = SHAPE.batch_size * SHAPE.tokens
MIXTURES = {
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": FFN, "decoder_sparse_step": 1},
    "gpt_oss": {"num_local_experts": EXPERTS, "layer_types": ["full_attention", "sliding_attention"]},
}


def mixture(model_type: str, **settings: object) -> nn.Module:
    """A random decoder with four heads of eight features, two of them for keys and values."""
    sizes = {"vocab_size": 300, "hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": CHOSEN}
    config = AutoConfig.for_model(
        model_type, **{**sizes, "pad_token_id": 0, **MIXTURES.get(model_type, {}), **settings}
    )
    torch.manual_seed(0)
    return AutoModel.from_config(config).eval()


def by_hand(*, computed: int = CHOSEN, beside: int = 0) -> int:
    """Of one pass: attention, the router, and `computed` experts a token, each of three matrices.

    :param beside: Further multiply-adds of a layer's token.
    """
    attention = 2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2 + 2 * SHAPE.tokens * WIDTH
    return 2 * ROW * LAYERS * (attention + WIDTH * EXPERTS + computed * 3 * WIDTH * FFN + beside)


def both_counts(host_map: HostMap) -> list[int]:
    return [count_map_flops(host_map, None, SHAPE), count_flops_fvcore(host_map, None, SHAPE)[0]]


@pytest.mark.parametrize("how", ["grouped_mm", "fallback", "eager", "batched_mm"])
@pytest.mark.parametrize("model_type", MIXTURES)
def test_both_counts_are_the_hand_count_however_the_experts_run(model_type, how, monkeypatch):
    host_map = resolve(mixture(model_type))
    if how == "fallback":  # as on devices that have no kernel for it
        monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_arguments: False)
    host_map.base.config._experts_implementation = "grouped_mm" if how == "fallback" else how
    assert both_counts(host_map) == [by_hand(), by_hand()]
    # One expert more or less would be seen.
    assert by_hand(computed=CHOSEN - 1) < 0.8 * by_hand()


def test_experts_that_all_run_on_every_token_count_as_such():
    model = mixture("llama4_text", intermediate_size_mlp=FFN, num_local_experts=EXPERTS, moe_layers=[0, 1])
    shared = 3 * WIDTH * FFN
    assert both_counts(resolve(model)) == [by_hand(computed=EXPERTS, beside=shared)] * 2


PRODUCTS = {
    "mm": (lambda a, b: a @ b, (3, 4), (4, 5), 3 * 4 * 5),
    "addmm": (lambda a, b: torch.addmm(torch.zeros(5), a, b), (3, 4), (4, 5), 3 * 4 * 5),
    "bmm": (torch.bmm, (2, 3, 4), (2, 4, 5), 2 * 3 * 4 * 5),
    "baddbmm": (lambda a, b: torch.baddbmm(torch.zeros(2, 3, 5), a, b), (2, 3, 4), (2, 4, 5), 2 * 3 * 4 * 5),
    "einsum": (lambda a, b: torch.einsum("td,edf->tef", a, b), (3, 4), (2, 4, 5), 2 * 3 * 4 * 5),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_experts_are_counted(name):
    product, left, right, wanted = PRODUCTS[name]
    with FlopCounterMode(display=False, custom_mapping=counted_operators()) as counter:
        product(torch.ones(left), torch.ones(right))
    assert counter.get_total_flops() == 2 * wanted


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="this torch has no grouped product")
@pytest.mark.parametrize(
    ("left", "right", "ends", "wanted"),
    [
        ((7, 8), (3, 8, 16), [2, 2, 7], 7 * 8 * 16),  # rows by group, and one group without a row
        ((4, 8), (8, 16), [4, 8], 4 * 8 * 16),  # terms of the sum by group
        ((2, 4, 8), (8, 16), [8, 16], 4 * 8 * 16),  # columns by group
        ((3, 4, 8), (3, 8, 16), None, 3 * 4 * 8 * 16),  # all groups of one size
    ],
)
def test_a_grouped_product_counts_each_row_once(left, right, ends, wanted):
    offs = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    with FlopCounterMode(display=False, custom_mapping=counted_operators()) as counter:
        torch.nn.functional.grouped_mm(torch.ones(left), torch.ones(right), offs=offs)
    assert counter.get_total_flops() == 2 * wanted


def test_without_its_handler_a_mixture_loses_its_updates(monkeypatch):
    """Wide experts pay for the updates at the default limit; with the experts unseen, the limit takes updates away."""
    wide = 64 * WIDTH
    host_map = resolve(mixture("mixtral", intermediate_size=wide))
    tokens, limit = SHAPE.batch_size * SHAPE.tokens, 10.0
    host = by_hand() + 2 * ROW * LAYERS * CHOSEN * 3 * WIDTH * (wide - FFN)
    added = adapter_flops_per_token(full_plan(host_map), host_map, SMALL)
    assert added < 0.1 * host / tokens

    def left_out() -> tuple[str, ...]:
        counted = count_map_flops(host_map, None, SHAPE)
        return make_plan(host_map, SMALL, host_flops_per_token=counted / tokens, max_flops_percent=limit).left_out

    assert left_out() == ()
    kept = {name: count for name, count in flops._COUNTED.items() if "grouped_mm" not in name}
    monkeypatch.setattr(flops, "_COUNTED", kept)
    assert left_out() != ()


def test_the_formula_of_a_plan_is_the_count_where_experts_are_edited():
    host = wrap_host(mixture("mixtral", vocab_size=500), tiny_tokenizer("bert"))
    bank, states = host_bank(host)
    with torch.no_grad():
        folded = unpacked(fold(random_adapter().stored(), all_depths(align_anchors(bank, states)), host.map))
    tokens = 64
    added = count_map_flops(host.map, folded, PassShape(1, tokens)) - count_map_flops(
        host.map, None, PassShape(1, tokens)
    )
    assert {"up", "down"} <= host.map.layers[0].target_modules.keys()
    formula = tokens * adapter_flops_per_token(full_plan(host.map), host.map, SMALL)
    assert formula == pytest.approx(added, rel=0.01)
    fewer = tokens * adapter_flops_per_token(full_plan(host.map).without_updates(), host.map, SMALL)
    assert fewer < 0.5 * added


def test_parameters_that_a_model_hands_to_its_modules_are_no_obstacle():
    """Torch's counter looks for the graph of every argument that requires gradients."""

    class Scaled(nn.Module):
        def forward(self, states: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return states * scale

    model = mixture("llama")
    norm, scaled, scale = model.norm, Scaled(), nn.Parameter(torch.ones(WIDTH))
    model.scaled = scaled
    host_map = resolve(model)
    before = count_map_flops(host_map, None, SHAPE)
    norm.register_forward_hook(lambda _module, _args, output: scaled(output, scale))
    model.extra = scale
    assert count_map_flops(host_map, None, SHAPE) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_host_that_fvcore_cannot_trace_is_measured_by_torchs_counter(monkeypatch):
    host = tiny_host("bert")
    folded = unpacked(tiny_folded(host)[0])
    both = measure_flops(host.map, folded, SHAPE)

    def untraceable(*_arguments: object) -> None:
        raise RuntimeError("0 INTERNAL ASSERT FAILED")

    monkeypatch.setattr(flops_fvcore.FlopCountAnalysis, "total", untraceable)
    alone = measure_flops(host.map, folded, SHAPE)
    assert both.fvcore is not None
    assert alone.torch == both.torch
    assert (alone.fvcore, alone.host_difference_percent, alone.adapter_difference_percent) == (None, None, None)
    assert alone.percent == alone.torch.percent
