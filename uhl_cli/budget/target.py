"""`budget` on a target: port the adapter as `port` does, then count and measure.

With only a configuration, it runs on the meta device: everything is the same except weights, atoms and time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

from uhl_cli.adapter.module import PortedAdapter
from uhl_cli.align.texts import word_spans
from uhl_cli.api import UniversalAdapter
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
from uhl_cli.cost.flops import count_map_flops
from uhl_cli.cost.flops_fvcore import count_flops_fvcore
from uhl_cli.cost.memory import peak_bytes
from uhl_cli.cost.passes import SEQUENCE_LENGTH, PassShape, forward_pass
from uhl_cli.cost.plan import adapter_flops_per_token, full_plan
from uhl_cli.data import Examples, evaluation_data
from uhl_cli.data.tasks import Task
from uhl_cli.errors import BudgetError, HostError, first_line
from uhl_cli.formats.folder import is_ported, ported_path
from uhl_cli.formats.ported import load_ported
from uhl_cli.host.checkpoint import Host
from uhl_cli.host.config_only import load_config_host
from uhl_cli.host.hostmap import HostMap
from uhl_cli.ported.aligned import AlignedHost
from uhl_cli.ported.model import PortedModel
from uhl_cli.reports import Reporter, phase, silent
from uhl_cli.schema import AdapterConfig

# Texts per batch when active atoms are measured; the result does not depend on it.
_TEXTS_PER_BATCH = 32


def target_budget(
    adapter: UniversalAdapter, options: BudgetOptions, target: HostOptions, reporter: Reporter = silent
) -> TargetBudget:
    """Load the target, or only its configuration if `options.target_config` names it, and measure the adapter.

    :raises HostError: When the target cannot be loaded, or cannot be run without values.
    :raises AlignmentError: When it cannot be aligned.
    :raises DataError: When the data that was asked for cannot be found or read.
    """
    if options.target is not None:
        examples, source = _examples(adapter, options, offline=target.offline)
        return measure(
            adapter, load(target, cache=options.cache), options, examples=examples, source=source, reporter=reporter
        )
    return _without_weights(target, lambda host: measure(adapter, host, options, reporter=reporter))


def folder_budget(task: Task, options: BudgetOptions, target: HostOptions, reporter: Reporter = silent) -> TargetBudget:
    """`target_budget` of the ported adapter's folder that `options.adapter` names; atoms are only measured on data.

    :raises FingerprintError: When the folder was made for another target.
    :raises UhlError: As `target_budget`, and as `load_ported`.
    """
    folder, examples, source = ported_path(options.adapter).parent, None, ""
    if options.data_asked:
        examples, source = _named_data(task, options, offline=target.offline)
    if options.target is not None:
        ported = load_ported(folder, load(target, cache=options.cache))
        return _measured(ported, options, examples=examples, source=source, reporter=reporter)
    return _without_weights(target, lambda host: _measured(load_ported(folder, host), options, reporter=reporter))


def _without_weights(target: HostOptions, measured: Callable[[Host], TargetBudget]) -> TargetBudget:
    """What is measured on a host without weights."""
    host = load_config_host(target.name, revision=target.revision, dtype=target.dtype, offline=target.offline)
    try:
        return measured(host)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise HostError(
            f"'{target.name}' cannot be counted without weights: {first_line(error)}",
            "Load it with --target; DistilBERT and Llama-like configurations need transformers 5.",
        ) from error


def measure(
    adapter: UniversalAdapter,
    host: Host,
    options: BudgetOptions,
    *,
    examples: Examples | None = None,
    source: str = "",
    reporter: Reporter = silent,
) -> TargetBudget:
    """What a loaded adapter costs on a loaded host.

    :param examples: Examples to measure active atoms on; None for a host without weights.
    :param source: Description of the examples, for the report.
    """
    refused = calibration = None
    if options.task_file is not None and is_ported(options.task_file):
        ported, whole = adapter.port(host, task=options.task_file), None
    else:
        aligned, refused = _align(adapter, host, options, reporter)
        ported = adapter.port(aligned)
        whole = whole_percent(
            host.map, adapter.manifest.config, aligned.host_flops / min(SEQUENCE_LENGTH, host.max_length)
        )
        calibration = adapter.calibration(aligned) if adapter is adapter.own else None
    return _measured(
        ported,
        options,
        examples=examples,
        source=source,
        reporter=reporter,
        strength=None if calibration is None else calibration.strength,
        whole=whole,
        refused=refused,
    )


def _measured(
    ported: PortedModel,
    options: BudgetOptions,
    *,
    examples: Examples | None = None,
    source: str = "",
    reporter: Reporter = silent,
    strength: float | None = None,
    whole: float | None = None,
    refused: str | None = None,
) -> TargetBudget:
    """Counts and measurements of one ported model.

    :param whole: FLOPs with nothing left out, in percent; None if nothing can be left out.
    """
    host = ported.host
    shape = PassShape(options.batch_size, min(options.sequence_length, host.max_length))
    flops = measure_flops(host.map, ported.adapter, shape, phase(reporter, "counting"))
    memory = measure_memory(host.map, ported.adapter, shape)
    lora = ported.adapter.lora is not None
    atoms = None if examples is None or lora else _atoms(ported, examples, source, reporter)
    seconds = None
    if options.time:
        progress = phase(reporter, "timing")
        seconds = measure_time(host.map, ported.adapter, shape, repetitions=options.repetitions, progress=progress)
    record = host_record(host)
    left_out = () if ported.plan is None else ported.plan.left_out
    return TargetBudget(
        name=record.name,
        model_type=record.fingerprint.model_type,
        hidden_size=host.hidden_size,
        num_hidden_layers=host.num_hidden_layers,
        degree=host.map.degree,
        parameters=sum(parameter.numel() for parameter in host.map.base.parameters()),
        weights_loaded=not host.map.embeddings.weight.is_meta,
        dtype=str(host.map.embeddings.weight.dtype).removeprefix("torch."),
        device=str(host.device),
        sequence_length=shape.tokens,
        batch_size=shape.batch_size,
        flops=flops,
        memory=memory,
        atoms=atoms,
        time=seconds,
        strength=strength,
        left_out=left_out,
        whole_percent=flops.percent if whole is None else whole,
        refused=refused,
    )


def _align(
    adapter: UniversalAdapter, host: Host, options: BudgetOptions, reporter: Reporter
) -> tuple[AlignedHost, str | None]:
    """The plan that `port` would use; if it would refuse, the plan with all parts, and the reason."""

    def within(limit: float) -> AlignedHost:
        progress = phase(reporter, "aligning")
        return adapter.align(host, strategy=options.strategy, max_flops=limit, progress=progress, cache=options.cache)

    try:
        return within(options.max_flops or MAX_FLOPS), None
    except BudgetError as error:
        return within(math.inf), error.message.rstrip(".")


def _atoms(ported: PortedModel, examples: Examples, source: str, reporter: Reporter) -> AtomsBudget:
    found = ported.classes_of(examples, batch_size=_TEXTS_PER_BATCH, progress=phase(reporter, "active atoms"))
    return AtomsBudget(per_token=found.atoms_per_token, data=source, texts=len(examples))


def _examples(adapter: UniversalAdapter, options: BudgetOptions, *, offline: bool) -> tuple[Examples, str]:
    """The data that was asked for, else the anchor texts; with a description for the report."""
    if not options.data_asked:
        return anchor_examples(adapter), "the adapter's anchor texts"
    return _named_data(adapter.manifest.task, options, offline=offline)


def _named_data(task: Task, options: BudgetOptions, *, offline: bool) -> tuple[Examples, str]:
    data = evaluation_data(task, options.data.model_dump(), offline=offline, seed=options.seed)
    assert data.evaluation is not None  # evaluation_data gives one example or more
    return data.evaluation, data.source


def anchor_examples(adapter: UniversalAdapter) -> Examples:
    """The file's anchor texts as examples of its task; their labels are placeholders that nothing reads."""
    texts = adapter.bank.anchors.texts
    if adapter.manifest.config.kind == "sequence":
        return Examples(texts, labels=(0,) * len(texts))
    spans = tuple(tuple(word_spans(text)) for text in texts)
    return Examples(texts, words=spans, tags=tuple((0,) * len(row) for row in spans))


WARM_UP_PASSES = 3
Progress = Callable[[int, int], None]


def measure_flops(
    host_map: HostMap, adapter: PortedAdapter, shape: PassShape, progress: Progress | None = None
) -> FlopBudget:
    """FLOPs of one pass by both counters, host alone and with the adapter attached."""
    counts: list[int] = []
    traced: list[int] = []
    uncounted: set[str] = set()
    for done, attached in enumerate((None, adapter)):
        counts.append(count_map_flops(host_map, attached, shape))
        try:
            count, names = count_flops_fvcore(host_map, attached, shape)
        except RuntimeError:  # what torch's tracer raises; the pass itself ran above
            names = frozenset()
        else:
            traced.append(count)
        uncounted |= names
        if progress:
            progress(done + 1, 2)
    by_torch, fvcore = _count(*counts), _count(*traced) if len(traced) == len(counts) else None
    lora = 0
    if adapter.lora is not None:
        lora = counts[1] - count_map_flops(host_map, adapter.with_lora(None), shape)
    return FlopBudget(
        fvcore=fvcore,
        torch=by_torch,
        host_difference_percent=fvcore and 100 * (fvcore.host - by_torch.host) / by_torch.host,
        adapter_difference_percent=fvcore and 100 * (fvcore.adapter - by_torch.adapter) / by_torch.adapter,
        uncounted=tuple(sorted(uncounted)),
        lora=lora,
    )


def _count(host: int, attached: int) -> FlopCount:
    return FlopCount(host=host, adapter=attached - host, percent=100 * (attached - host) / host)


def whole_percent(host_map: HostMap, config: AdapterConfig, host_flops_per_token: float) -> float:
    """FLOPs of the whole adapter, nothing left out, in percent of the host's, by the port plan's own formula."""
    whole = adapter_flops_per_token(full_plan(host_map), host_map, config)
    return 100 * whole / host_flops_per_token


def measure_memory(host_map: HostMap, adapter: PortedAdapter, shape: PassShape) -> MemoryBudget:
    """Bytes of the weights, and of the peak without them, measured on one pass each."""
    host_peak = peak_bytes(host_map, None, shape)
    return MemoryBudget(
        host_weights=sum(parameter.nbytes for parameter in host_map.base.parameters()),
        adapter_weights=adapter.nbytes,
        host_peak=host_peak,
        adapter_peak=peak_bytes(host_map, adapter, shape) - host_peak,
    )


@torch.inference_mode()
def measure_time(
    host_map: HostMap,
    adapter: PortedAdapter,
    shape: PassShape,
    *,
    repetitions: int,
    progress: Progress | None = None,
) -> TimeBudget:
    """Wall-clock seconds of one pass, by turns of the host alone and with the adapter, so that drift affects both.

    Warm-up passes are not counted.  The time includes the readout, but not attaching.
    """
    alone: list[float] = []
    attached: list[float] = []
    for index in range(WARM_UP_PASSES + repetitions):
        pair = _seconds(host_map, None, shape), _seconds(host_map, adapter, shape)
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


def _seconds(host_map: HostMap, adapter: PortedAdapter | None, shape: PassShape) -> float:
    with forward_pass(host_map, adapter, shape) as (module, ids):
        _wait_for(ids.device)
        started = time.perf_counter()
        module(ids)
        _wait_for(ids.device)
        return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    """Wait for the accelerator, which computes asynchronously."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
