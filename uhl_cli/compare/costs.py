"""Costs of a run in addition to its bare host: bytes, memory, FLOPs, wall-clock time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch.utils.flop_counter import FlopCounterMode

from uhl_cli.compare.baselines import Retrained
from uhl_cli.compare.results import Costs
from uhl_cli.compare.sections import EvaluationSection
from uhl_cli.cost.flops import counted_operators
from uhl_cli.host.checkpoint import Host
from uhl_cli.host.encode import Encoded, encode
from uhl_cli.ported.model import PortedModel, forward

WARM_UP_PASSES = 2
_MEGABYTE = 1e6
Pass = Callable[[Encoded], object]
# FLOPs of live hosts by number of tokens: counting takes longer than a pass, and a host's shape is fixed.
_HOST_FLOPS: WeakKeyDictionary[Host, dict[int, int]] = WeakKeyDictionary()


def ported_costs(
    ported: PortedModel, bare: Host, evaluation: EvaluationSection, *, file_bytes: int, atoms: float | None
) -> Costs:
    """Costs of a ported model; its host may be `bare` itself, which is only changed while attached."""

    def attached(encoded: Encoded) -> object:
        # One word per token: a readout's averaging over words costs almost nothing.
        words = torch.eye(encoded.content_mask.numel(), device=bare.device) if ported.task.kind == "tokens" else None
        with ported.attached() as attachment:
            return forward(ported.host, attachment, encoded, words)

    flops, clock = _overheads(bare, attached, evaluation)
    memory = ported.adapter.nbytes / _MEGABYTE
    return Costs(
        adapter_bytes=file_bytes, memory_mb=memory, flops_percent=flops, atoms_per_token=atoms, wall_clock_percent=clock
    )


def retrained_costs(model: Retrained, bare: Host, evaluation: EvaluationSection) -> Costs:
    """Costs of a baseline, unmerged; a fully fine-tuned host costs its own size again."""

    def changed(encoded: Encoded) -> object:
        return model(encoded)

    flops, clock = _overheads(bare, changed, evaluation)
    memory = sum(value.nbytes for value in model.trained_parameters()) / _MEGABYTE
    return Costs(adapter_bytes=model.stored_bytes(), memory_mb=memory, flops_percent=flops, wall_clock_percent=clock)


def nothing_costs() -> Costs:
    """Costs of the host alone."""
    return Costs(adapter_bytes=0, memory_mb=0.0, flops_percent=0.0)


@torch.inference_mode()
def _overheads(bare: Host, changed: Pass, evaluation: EvaluationSection) -> tuple[float, float | None]:
    """(FLOPs, wall-clock) of `changed` beyond the bare host's own pass, in percent."""
    single = _batch(bare, 1, evaluation.sequence_length)

    def alone(encoded: Encoded) -> object:
        return bare.map.base(**encoded.model_inputs())

    counted = _HOST_FLOPS.setdefault(bare, {})
    tokens = single.content_mask.numel()
    if tokens not in counted:
        counted[tokens] = _flops(alone, single)
    own = counted[tokens]
    flops = 100 * (_flops(changed, single) - own) / own
    if evaluation.timing_repetitions == 0:
        return flops, None
    batch = _batch(bare, evaluation.timing_batch_size, evaluation.sequence_length)
    ratios = []
    for index in range(WARM_UP_PASSES + evaluation.timing_repetitions):
        first, second = _seconds(alone, batch), _seconds(changed, batch)
        if index >= WARM_UP_PASSES:
            ratios.append(second / first)
    return flops, 100 * (statistics.median(ratios) - 1)


def _batch(host: Host, batch_size: int, length: int) -> Encoded:
    """Texts of one word repeated up to the length."""
    length = min(length, host.max_length)
    return encode(host, ["good " * length] * batch_size, None, max_length=length).to(host.device)


def _flops(run: Pass, encoded: Encoded) -> int:
    with FlopCounterMode(display=False, custom_mapping=counted_operators()) as counter:
        run(encoded)
    return int(counter.get_total_flops())


def _seconds(run: Pass, encoded: Encoded) -> float:
    started = time.perf_counter()
    run(encoded)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
