"""`budget` on a host of which the configuration alone is there: shapes are counted on the meta device."""

from __future__ import annotations

from dataclasses import replace

from uhl_cli.adapter.flops import count_map_flops
from uhl_cli.adapter.flops_pass import PassShape
from uhl_cli.adapter.flops_shapes import shape_only
from uhl_cli.adapter.plan import PortPlan, full_plan, make_plan
from uhl_cli.align.bank import depth_index
from uhl_cli.align.features import depths_within
from uhl_cli.errors import BudgetError, HostError
from uhl_cli.host.config_only import ConfigHost, load_config_host
from uhl_cli.host.messages import first_line
from uhl_cli.pipeline.budget_measure import measure_flops, measure_memory, plan_tokens, whole_percent
from uhl_cli.pipeline.budget_report import MAX_FLOPS, BudgetOptions, TargetBudget
from uhl_cli.pipeline.options import HostOptions
from uhl_cli.reports import Reporter, phase, silent
from uhl_cli.schema import AdapterConfig


def config_budget(
    options: BudgetOptions,
    target: HostOptions,
    config: AdapterConfig,
    reporter: Reporter = silent,
    *,
    featured: bool = False,
) -> TargetBudget:
    """Count what an adapter of this shape costs on the host that a configuration describes; no weight is read.

    Without weights nothing is aligned, so that no active atoms are measured, and the readout is counted at every
    depth that the plan lets it listen to (see `shape_only`).

    :param featured: Whether a feature bank fits the readout, which listens to fewer depths of a wide host then.
    :raises HostError: When the configuration cannot be had, or the model cannot be run without values.
    """
    host = load_config_host(target.name, revision=target.revision, dtype=target.dtype, offline=target.offline)
    try:
        return _measured(options, host, config, reporter, featured)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise HostError(
            f"'{target.name}' cannot be counted without weights: {first_line(error)}",
            "Load it with --target; DistilBERT and Llama-like configurations need transformers 5.",
        ) from error


def _measured(
    options: BudgetOptions, host: ConfigHost, config: AdapterConfig, reporter: Reporter, featured: bool
) -> TargetBudget:
    tokens = plan_tokens(host.max_length)
    per_token = count_map_flops(host.map, None, PassShape(1, tokens)) / tokens
    refused = None
    try:
        plan = make_plan(
            host.map, config, host_flops_per_token=per_token, max_flops_percent=options.max_flops or MAX_FLOPS
        )
    except BudgetError as error:
        plan, refused = full_plan(host.map), error.message.rstrip(".")
    by_anchors = (options.strategy or config.strategy) == "anchors"
    if not by_anchors:
        plan = _at_knots(plan, host.map.num_hidden_layers, config)
    elif featured:
        plan = replace(plan, tap_depths=tuple(depths_within(plan.tap_depths, config.knots, host.map)))
    folded = shape_only(host.map, plan, config, shifted=by_anchors and featured)
    shape = PassShape(options.batch_size, min(options.sequence_length, host.max_length))
    return TargetBudget(
        name=host.name,
        model_type=host.model_type,
        hidden_size=host.map.hidden_size,
        num_hidden_layers=host.map.num_hidden_layers,
        parameters=sum(parameter.numel() for parameter in host.map.base.parameters()),
        weights_loaded=False,
        dtype=str(host.map.embeddings.weight.dtype).removeprefix("torch."),
        device="meta",
        sequence_length=shape.tokens,
        batch_size=shape.batch_size,
        flops=measure_flops(host.map, folded, shape, phase(reporter, "counting")),
        memory=measure_memory(host.map, folded, shape),
        atoms=None,
        time=None,
        left_out=plan.left_out,
        whole_percent=whole_percent(host.map, config, per_token),
        refused=refused,
    )


def _at_knots(plan: PortPlan, depth: int, config: AdapterConfig) -> PortPlan:
    """The plan of a strategy that gives the readout one depth a knot."""
    return replace(plan, tap_depths=tuple(sorted({depth_index(knot, depth) for knot in config.knots})))
