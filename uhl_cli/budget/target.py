"""`budget` on a loaded host: the adapter is ported as `port` does it, then counted and measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from uhl_cli.adapter.fold import FoldedAdapter
from uhl_cli.align.alignment import Alignment
from uhl_cli.align.bank import depth_index
from uhl_cli.align.features import depths_within
from uhl_cli.align.texts import word_spans
from uhl_cli.api import UniversalAdapter, align
from uhl_cli.budget.report import (
    MAX_FLOPS,
    AtomsBudget,
    BudgetOptions,
    FlopBudget,
    FlopCount,
    MemoryBudget,
    TargetBudget,
    TimeBudget,
)
from uhl_cli.commands.options import HostOptions
from uhl_cli.commands.scoring import host_record, load
from uhl_cli.cost.flops import SEQUENCE_LENGTH, count_flops, count_map_flops
from uhl_cli.cost.flops_fvcore import count_flops_fvcore
from uhl_cli.cost.flops_shapes import shape_only
from uhl_cli.cost.memory import adapter_bytes, peak_bytes
from uhl_cli.cost.passes import PassShape, forward_pass
from uhl_cli.cost.plan import PortPlan, adapter_flops_per_token, full_plan, make_plan
from uhl_cli.data import TASKS, Examples, load_task
from uhl_cli.errors import BudgetError, DataError, HostError, first_line
from uhl_cli.host.checkpoint import Host
from uhl_cli.host.config_only import ConfigHost, load_config_host
from uhl_cli.host.hostmap import HostMap
from uhl_cli.ported.model import PortedModel
from uhl_cli.reports import Reporter, phase, silent
from uhl_cli.schema import AdapterConfig

# Texts a batch when active atoms are measured; the figure does not depend on it.
_TEXTS_PER_BATCH = 32


def host_budget(options: BudgetOptions, target: HostOptions, reporter: Reporter = silent) -> TargetBudget:
    """Load file and host, port, and measure what the options ask for.

    :raises HostError: When the host cannot be loaded.
    :raises AlignmentError: When it cannot be aligned.
    :raises DataError: When the data that was asked for cannot be had.
    """
    adapter = UniversalAdapter.load(options.adapter)
    if options.task_file is not None:
        adapter = adapter.with_task(options.task_file)
    examples, source = _examples(adapter, options, offline=target.offline)
    host = load(target)
    return measure_host(adapter, host, options, examples=examples, source=source, reporter=reporter)


def measure_host(
    adapter: UniversalAdapter,
    host: Host,
    options: BudgetOptions,
    *,
    examples: Examples,
    source: str,
    reporter: Reporter = silent,
) -> TargetBudget:
    """The same for a loaded adapter, a loaded host and the examples that active atoms are measured on.

    :param source: What the examples are, for the report.
    """
    alignment, plan, host_flops, refused = _align(adapter, host, options, reporter)
    ported = adapter.inject(host, alignment, plan, host_flops)
    shape = PassShape(options.batch_size, min(options.sequence_length, host.max_length))
    flops = measure_flops(host.map, ported.folded, shape, phase(reporter, "counting"))
    memory = measure_memory(host.map, ported.folded, shape)
    atoms = _atoms(adapter, ported, examples, source, reporter)
    seconds = None
    if options.time:
        seconds = measure_time(
            host.map,
            ported.folded,
            shape,
            repetitions=options.repetitions,
            progress=phase(reporter, "timing"),
        )
    record = host_record(host)
    tokens = plan_tokens(host.max_length)
    return TargetBudget(
        name=record.name,
        model_type=record.fingerprint.model_type,
        hidden_size=host.hidden_size,
        num_hidden_layers=host.num_hidden_layers,
        parameters=sum(parameter.numel() for parameter in host.model.parameters()),
        weights_loaded=True,
        dtype=str(host.map.embeddings.weight.dtype).removeprefix("torch."),
        device=str(host.device),
        sequence_length=shape.tokens,
        batch_size=shape.batch_size,
        flops=flops,
        memory=memory,
        atoms=atoms,
        time=seconds,
        left_out=plan.left_out,
        whole_percent=whole_percent(host.map, adapter.manifest.config, host_flops / tokens),
        refused=refused,
    )


def _align(
    adapter: UniversalAdapter, host: Host, options: BudgetOptions, reporter: Reporter
) -> tuple[Alignment, PortPlan, int, str | None]:
    """What `port` would align by; where it would refuse, everything, and why it would."""
    progress = phase(reporter, "aligning")
    try:
        alignment, plan, host_flops = adapter.align(
            host, strategy=options.strategy, max_flops=options.max_flops or MAX_FLOPS, progress=progress
        )
    except BudgetError as error:
        plan = full_plan(host.map)
        strategy = options.strategy or adapter.manifest.config.strategy
        alignment = align(host, adapter.bank, strategy, plan=plan, progress=progress)
        return alignment, plan, count_flops(host, None), error.message.rstrip(".")
    return alignment, plan, host_flops, None


def _atoms(
    adapter: UniversalAdapter, ported: PortedModel, examples: Examples, source: str, reporter: Reporter
) -> AtomsBudget:
    predictions = ported.predict(
        examples,
        batch_size=_TEXTS_PER_BATCH,
        max_length=min(adapter.manifest.training.config.max_length, ported.host.max_length),
        progress=phase(reporter, "active atoms"),
    )
    return AtomsBudget(per_token=predictions.atoms_per_token, data=source, texts=len(examples))


def _examples(adapter: UniversalAdapter, options: BudgetOptions, *, offline: bool) -> tuple[Examples, str]:
    """The data that was asked for, else the anchor texts; with what they are, for the report."""
    task = adapter.manifest.task
    if not options.data_asked:
        return anchor_examples(adapter), "the adapter's anchor texts"
    flags = options.data.model_dump(exclude={"task"})
    name = options.data.task or task.name
    if name == task.name and name not in TASKS:
        # The columns that the adapter was trained on are the best guess for more data of a user's own task.
        for column in ("text_column", "pair_column", "label_column", "tokens_column"):
            flags[column] = flags[column] or getattr(task, column)
    data = load_task(name, labels=task.labels, offline=offline, seed=options.seed, need_train=False, **flags)
    hint = "Give data of the adapter's own task with --data, or leave it out."
    if data.task.kind != task.kind:
        raise DataError(f"the data is of a {data.task.kind} task, the adapter of a {task.kind} task.", hint)
    if data.evaluation is None or len(data.evaluation) == 0:
        raise DataError("the data has no evaluation example.", hint)
    return data.evaluation, data.source


def anchor_examples(adapter: UniversalAdapter) -> Examples:
    """The file's anchor texts as examples of its task; their labels are made up and looked at by nothing."""
    texts = adapter.bank.anchors.texts
    if adapter.manifest.config.kind == "sequence":
        return Examples(texts, labels=(0,) * len(texts))
    spans = tuple(tuple(word_spans(text)) for text in texts)
    return Examples(texts, words=spans, tags=tuple((0,) * len(row) for row in spans))


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


WARM_UP_PASSES = 3
Progress = Callable[[int, int], None]


def measure_flops(
    host_map: HostMap, folded: FoldedAdapter, shape: PassShape, progress: Progress | None = None
) -> FlopBudget:
    """FLOPs of one pass by both counters, host alone and with the adapter attached."""
    counts: list[int] = []
    uncounted: set[str] = set()
    for done, attached in enumerate((None, folded)):
        count, names = count_flops_fvcore(host_map, attached, shape)
        uncounted |= names
        counts += [count, count_map_flops(host_map, attached, shape)]
        if progress:
            progress(done + 1, 2)
    fvcore, by_torch = _count(counts[0], counts[2]), _count(counts[1], counts[3])
    return FlopBudget(
        fvcore=fvcore,
        torch=by_torch,
        host_difference_percent=100 * (fvcore.host - by_torch.host) / by_torch.host,
        adapter_difference_percent=100 * (fvcore.adapter - by_torch.adapter) / by_torch.adapter,
        uncounted=tuple(sorted(uncounted)),
    )


def _count(host: int, attached: int) -> FlopCount:
    return FlopCount(host=host, adapter=attached - host, percent=100 * (attached - host) / host)


def whole_percent(host_map: HostMap, config: AdapterConfig, host_flops_per_token: float) -> float:
    """FLOPs of the whole adapter, nothing left out, in percent of the host's, by the port plan's own formula."""
    whole = adapter_flops_per_token(full_plan(host_map), host_map, config)
    return 100 * whole / host_flops_per_token


def plan_tokens(max_length: int) -> int:
    """Tokens at which `port` makes its plan."""
    return min(SEQUENCE_LENGTH, max_length)


def measure_memory(host_map: HostMap, folded: FoldedAdapter, shape: PassShape) -> MemoryBudget:
    """Bytes of the weights and, measured on one pass each, of the peak beside them."""
    host_peak = peak_bytes(host_map, None, shape)
    return MemoryBudget(
        host_weights=sum(parameter.nbytes for parameter in host_map.base.parameters()),
        adapter_weights=adapter_bytes(folded),
        host_peak=host_peak,
        adapter_peak=peak_bytes(host_map, folded, shape) - host_peak,
    )


@torch.inference_mode()
def measure_time(
    host_map: HostMap,
    folded: FoldedAdapter,
    shape: PassShape,
    *,
    repetitions: int,
    progress: Progress | None = None,
) -> TimeBudget:
    """Wall-clock seconds of one pass, host alone and with the adapter attached by turns, so that drift hits both.

    Some passes before are not counted.  Attaching itself is outside the clock, the readout inside.
    """
    alone: list[float] = []
    attached: list[float] = []
    for index in range(WARM_UP_PASSES + repetitions):
        pair = _seconds(host_map, None, shape), _seconds(host_map, folded, shape)
        if index >= WARM_UP_PASSES:
            alone.append(pair[0])
            attached.append(pair[1])
        if progress:
            progress(index + 1, WARM_UP_PASSES + repetitions)
    ratios = [with_adapter / bare for bare, with_adapter in zip(alone, attached, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return TimeBudget(
        repetitions=repetitions,
        host_seconds=statistics.median(alone),
        attached_seconds=statistics.median(attached),
        ratio=middle,
        ratio_low=low,
        ratio_high=high,
    )


def _seconds(host_map: HostMap, folded: FoldedAdapter | None, shape: PassShape) -> float:
    with forward_pass(host_map, folded, shape) as (module, ids):
        _wait_for(ids.device)
        started = time.perf_counter()
        module(ids)
        _wait_for(ids.device)
        return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    """Accelerators compute behind the caller's back; the clock waits for them."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
