"""The FLOP formula is the count, and a plan leaves parts out in the documented order until it fits."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_adapters import all_depths, host_bank, random_adapter
from tiny_hosts import FAMILIES, tiny_host

from uhl_cli.adapter.fold import fold
from uhl_cli.align.alignment import align_anchors
from uhl_cli.cost.flops import count_flops
from uhl_cli.cost.plan import adapter_flops_per_token, full_plan, make_plan
from uhl_cli.errors import BudgetError
from uhl_cli.schema import AdapterConfig

CONFIG = AdapterConfig(num_atoms=64, canonical_size=16, readout_size=16, num_labels=3)
LENGTH = 64


def folded_for(host, plan, config):
    bank, states = host_bank(host, config)
    alignment = all_depths(align_anchors(bank, states))
    alignment = replace(
        alignment, depth_weights={depth: alignment.depth_weights[depth] for depth in plan.readout_depths}
    )
    with torch.no_grad():
        stored = random_adapter(config).stored()
        return fold(stored, alignment, host.map, layers=plan.layers, types=plan.types)


@pytest.mark.parametrize("kind", ["sequence", "tokens"])
@pytest.mark.parametrize("family", FAMILIES)
def test_formula_equals_the_count(family, kind):
    host = tiny_host(family)
    config = CONFIG.model_copy(update={"kind": kind})
    plan = full_plan(host.map)
    some = replace(plan, types=("q", "v", "o"), layers=(1,), readout_depths=(0, 2))
    counts = {}
    bare = count_flops(host, None, sequence_length=LENGTH)
    for name, chosen in (("full", plan), ("some", some)):
        counted = count_flops(host, folded_for(host, chosen, config), sequence_length=LENGTH) - bare
        counts[name] = counted
        formula = LENGTH * adapter_flops_per_token(chosen, host.map, config, sequence_length=LENGTH)
        assert formula == pytest.approx(counted, rel=0.01)
    assert counts["some"] < 0.7 * counts["full"]


def test_host_count_is_the_sum_of_its_products():
    host = tiny_host("bert")
    width, ffn, layers = 32, 96, 2
    for length in (16, 64):
        linear = 2 * length * (4 * width**2 + 2 * width * ffn)
        attention = 2 * 2 * length**2 * width
        expected = layers * (linear + attention) + 2 * width**2  # the pooler, of one token
        assert count_flops(host, None, sequence_length=length) == pytest.approx(expected, rel=0.01)


def test_sequence_is_no_longer_than_the_host_takes():
    host = tiny_host("bert")
    assert count_flops(host, None, sequence_length=500) == count_flops(host, None, sequence_length=64)


def plans_by_limit(host, config, steps=400):
    """Distinct plans under ever smaller limits, and the first limit that is refused."""
    full = adapter_flops_per_token(full_plan(host.map), host.map, config)
    found = []
    for step in range(steps, 0, -1):
        try:
            limit = 100.2 * step / steps
            plan = make_plan(host.map, config, host_flops_per_token=float(full), max_flops_percent=limit)
        except BudgetError:
            return found, step
        assert plan.max_flops == limit
        plan = replace(plan, max_flops=math.inf)
        if not found or plan != found[-1]:
            found.append(plan)
    return found, 0


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_parts_are_left_out_in_the_documented_order(family):
    host = tiny_host(family, num_hidden_layers=6)
    plans, refused = plans_by_limit(host, CONFIG)
    assert refused > 0
    assert plans[0] == full_plan(host.map)
    assert len(plans) > 10
    droppable = [name for name in ("gate", "up", "down", "k") if name in plans[0].types]
    order = [
        *(f"module {name}" for name in droppable),
        *(f"layer {index}" for index in range(6)),
        "readout update",
        *(f"depth {index}" for index in (1, 2, 4, 5)),  # knots stand at 0, 3 and 6
    ]
    assert list(plans[-1].left_out) == order
    for plan in plans:
        assert list(plan.left_out) == order[: len(plan.left_out)]
        left = set(plan.left_out)
        assert {f"module {name}" for name in plans[0].types if name not in plan.types} - {"module readout"} <= left
        assert plan.layers == tuple(index for index in range(6) if f"layer {index}" not in left)
        assert plan.readout_depths == tuple(index for index in range(7) if f"depth {index}" not in left)
    assert plans[-1].readout_depths == (0, 3, 6)
    assert "readout" not in plans[-1].types


def test_plan_holds_the_limit_and_wastes_nothing():
    host = tiny_host("llama", num_hidden_layers=4)
    full = adapter_flops_per_token(full_plan(host.map), host.map, CONFIG)
    plans, _ = plans_by_limit(host, CONFIG)
    for percent in (90.0, 60.0, 35.0):
        plan = make_plan(host.map, CONFIG, host_flops_per_token=full, max_flops_percent=percent)
        assert adapter_flops_per_token(plan, host.map, CONFIG) <= full * percent / 100
        larger = [other for other in plans if len(other.left_out) < len(plan.left_out)]
        assert larger
        assert all(adapter_flops_per_token(other, host.map, CONFIG) > 0.998 * full * percent / 100 for other in larger)


def test_limit_that_nothing_holds_is_an_error():
    host = tiny_host("bert")
    with pytest.raises(BudgetError, match=r"the limit is 0\.1 %") as caught:
        make_plan(host.map, CONFIG, host_flops_per_token=10_000.0, max_flops_percent=0.1)
    assert "--max-flops" in caught.value.hint
    assert caught.value.exit_code == 3


def test_without_updates_the_depths_of_the_readout_alone_are_missing():
    host = tiny_host("llama", num_hidden_layers=4)
    per_token = count_flops(host, None) / min(128, host.max_length)
    plans = [
        make_plan(host.map, CONFIG, host_flops_per_token=per_token, max_flops_percent=percent)
        for percent in (6.0, 1000.0, 3.0)
    ]
    assert any(any("layer" in part for part in plan.left_out) for plan in plans)
    for plan in plans:
        bare = plan.without_updates()
        assert (bare.types, bare.layers, bare.readout_depths) == ((), (), plan.readout_depths)
        assert len(bare.left_out) == 5 - len(plan.readout_depths)
        assert set(bare.left_out) <= set(plan.left_out)
