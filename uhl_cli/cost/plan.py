"""Port plan: which parts of an adapter a host carries within the FLOP limit (docs/method.md, "FLOP limit").

Parts are left out in this order until the estimate is within the limit: module types (gate, up, down, k), then
layers from the first upwards with all their modules, then the readout's own update, then depths that the readout
reads, those farthest from a knot first.  One depth per knot is always kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from uhl_cli.adapter.module import READERS
from uhl_cli.align.bank import depth_index
from uhl_cli.cost.passes import SEQUENCE_LENGTH
from uhl_cli.errors import BudgetError
from uhl_cli.host.checkpoint import Host
from uhl_cli.host.hostmap import HostMap
from uhl_cli.schema import AdapterConfig

DROPPABLE_TYPES = ("gate", "up", "down", "k")
_DEPTH = "depth "


@dataclass(frozen=True)
class PortPlan:
    """Module types and layers that get updates, and depths (0 to L) that the readout is regressed on.

    `left_out` names the parts left out, in the order in which they were dropped; `max_flops` is the limit of the plan,
    in percent of the host's own FLOPs.
    """

    types: tuple[str, ...]
    layers: tuple[int, ...]
    readout_depths: tuple[int, ...]
    left_out: tuple[str, ...] = ()
    max_flops: float = math.inf

    def without_updates(self) -> PortPlan:
        """The plan with the readout alone, or with a low-rank update: `left_out` then lists no updates."""
        depths = tuple(part for part in self.left_out if part.startswith(_DEPTH))
        return replace(self, types=(), layers=(), left_out=depths)


def full_plan(host_map: HostMap) -> PortPlan:
    """The plan with all module types, layers and depths of the host."""
    present = {name for layer in host_map.layers for name in layer.target_modules}
    types = tuple(name for name in (*READERS, "o", "down") if name in present)
    depth = host_map.num_hidden_layers
    return PortPlan((*types, "readout"), tuple(range(depth)), tuple(range(depth + 1)))


def adapter_flops_per_token(
    plan: PortPlan, host_map: HostMap, config: AdapterConfig, *, sequence_length: int = SEQUENCE_LENGTH
) -> int:
    """FLOPs that the adapter adds for one token, two for a multiply-add, as `flops.count_flops` counts them.

    :param sequence_length: Used for token tasks only: their words are averaged by a product over all tokens.
    """
    width, atoms, chosen, readout = host_map.hidden_size, config.num_atoms, config.top_k, config.readout_size
    routing = 2 * atoms * width + 2 * chosen * width  # logits, and the chosen atoms' responses
    total = 0
    for layer in host_map.layers:
        target_modules = [linear for name, linear in layer.target_modules.items() if name in plan.types]
        if layer.index not in plan.layers or not target_modules:
            continue
        total += routing
        for linear in target_modules:
            if linear.type not in READERS:
                total += 2 * chosen * width  # a writer's own responses
            total += 2 * chosen * (linear.out_features if linear.fused else width)
    if "readout" in plan.types:
        total += routing + 2 * chosen * readout
    total += 2 * readout * width * len(plan.readout_depths)
    return total + (4 * readout if config.kind == "sequence" else 2 * config.num_labels * (readout + sequence_length))


def make_plan(
    host_map: HostMap, config: AdapterConfig, *, host_flops_per_token: float, max_flops_percent: float
) -> PortPlan:
    """The largest plan in the documented order whose estimate is within the limit.

    :raises BudgetError: When even the smallest readout exceeds the limit.
    """
    plan = replace(full_plan(host_map), max_flops=max_flops_percent)
    # The estimate leaves out small terms such as softmax pooling; a thousandth of the limit is reserved for them.
    limit = host_flops_per_token * max_flops_percent / 100 * 0.999
    for smaller in _reductions(plan, host_map.num_hidden_layers, config):
        if adapter_flops_per_token(plan, host_map, config) <= limit:
            return plan
        plan = smaller
    needed = adapter_flops_per_token(plan, host_map, config)
    if needed <= limit:
        return plan
    raise BudgetError(
        f"even the readout alone costs {100 * needed / host_flops_per_token:.1f} % of this host's FLOPs; "
        f"the limit is {max_flops_percent:g} %.",
        "Raise --max-flops, or choose a larger target.",
    )


def plan_for(host: Host, config: AdapterConfig, host_flops: int, max_flops: float) -> PortPlan:
    """The largest plan within `max_flops` percent of the host's own FLOPs, which are `host_flops` at 128 tokens.

    :raises BudgetError: When even the smallest readout exceeds the limit.
    """
    tokens = min(SEQUENCE_LENGTH, host.max_length)
    return make_plan(host.map, config, host_flops_per_token=host_flops / tokens, max_flops_percent=max_flops)


def _reductions(plan: PortPlan, depth: int, config: AdapterConfig) -> list[PortPlan]:
    """Plans from the largest to the smallest, in the order in which parts are left out."""
    plans = []
    for name in DROPPABLE_TYPES:
        if name in plan.types:
            kept = tuple(item for item in plan.types if item != name)
            plan = replace(plan, types=kept, left_out=(*plan.left_out, f"module {name}"))
            plans.append(plan)
    for index in range(depth):
        plan = replace(plan, layers=plan.layers[1:], left_out=(*plan.left_out, f"layer {index}"))
        plans.append(plan)
    kept = tuple(item for item in plan.types if item != "readout")
    plan = replace(plan, types=kept, left_out=(*plan.left_out, "readout update"))
    plans.append(plan)
    needed = {depth_index(knot, depth) for knot in config.knots}
    spare = sorted(
        (index for index in plan.readout_depths if index not in needed),
        key=lambda index: (-min(abs(index - place) for place in needed), index),
    )
    for index in spare:
        kept_depths = tuple(place for place in plan.readout_depths if place != index)
        plan = replace(plan, readout_depths=kept_depths, left_out=(*plan.left_out, f"{_DEPTH}{index}"))
        plans.append(plan)
    return plans
