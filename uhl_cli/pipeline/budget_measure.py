"""Measurements of `budget` that need a model's map alone, with weights or on the meta device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from uhl_cli.adapter.flops import SEQUENCE_LENGTH, count_map_flops
from uhl_cli.adapter.flops_fvcore import count_flops_fvcore
from uhl_cli.adapter.flops_pass import PassShape, forward_pass
from uhl_cli.adapter.folding import FoldedAdapter
from uhl_cli.adapter.memory import adapter_bytes, peak_bytes
from uhl_cli.adapter.plan import adapter_flops_per_token, full_plan
from uhl_cli.host.hostmap import HostMap
from uhl_cli.pipeline.budget_report import FlopBudget, FlopCount, MemoryBudget, TimeBudget
from uhl_cli.schema import AdapterConfig

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
