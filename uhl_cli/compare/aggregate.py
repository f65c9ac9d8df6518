"""The comparison: best runs, the gap, and summaries over seeds, from the per-run files alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field

from uhl_cli.compare.methods import METHODS, Role
from uhl_cli.compare.pairs import PairedTests, paired_tests
from uhl_cli.compare.results import RunFolder, RunMetrics
from uhl_cli.schema import Frozen

PRIMARY = "Target-model dev score under 1 MB / 10 %-FLOP budget (report zero-shot and post-tune)."


class BestRun(Frozen):
    """A run and its value of the primary metric."""

    run_id: str
    value: float


class Aggregated(Frozen):
    """`aggregated_metrics.json`; `gap` is in percent of the best baseline, positive where the proposed is better."""

    primary_metric: str = PRIMARY
    metrics: dict[str, dict[str, float]]
    best_proposed: BestRun | None
    best_baseline: BestRun | None
    gap: float | None


class GroupSummary(Frozen):
    """One method on one data set and host: mean over seeds, and what of it is spread."""

    task: str
    host: str
    method: str
    metric: str
    seeds: tuple[int, ...]
    mean: float
    standard_error: float | None = Field(description="over seeds; None for one seed")
    low: float = Field(description="95 % over examples, first seed")
    high: float
    zero_shot: float | None
    adapter_bytes: int
    flops_percent: float
    memory_mb: float
    wall_clock_percent: float | None
    atoms_per_token: float | None
    training_seconds: float | None = Field(description="None where the seeds were made on different devices")
    within_budget: bool
    devices: tuple[str, ...] = Field(description="what the runs were made on")


@dataclass(frozen=True)
class Comparison:
    """Everything that tables and figures need."""

    runs: list[RunMetrics]
    aggregated: Aggregated
    groups: list[GroupSummary]
    tests: PairedTests


def aggregate(results: Path, run_ids: Iterable[str]) -> Comparison:
    """Compare the finished runs of these names.

    :raises FormatError: When a run's file is damaged.
    """
    folders = [RunFolder(results, run_id) for run_id in run_ids]
    runs = [folder.read() for folder in folders if folder.metrics.exists()]
    proposed, baseline = best(runs, "proposed"), best(runs, "baseline")
    gap = None
    if proposed is not None and baseline is not None:
        gap = percent_better(proposed.value, baseline.value, smaller=False)
    aggregated = Aggregated(metrics=_by_metric(runs), best_proposed=proposed, best_baseline=baseline, gap=gap)
    return Comparison(runs, aggregated, summaries(runs), paired_tests(results, runs))


def best(runs: list[RunMetrics], role: Role) -> BestRun | None:
    """The best run of that role among those within their budget; the first of equals."""
    inside = [run for run in runs if METHODS[run.method].role == role and run.within_budget]
    if not inside:
        return None
    top = max(inside, key=lambda run: run.score.value)
    return BestRun(run_id=top.run_id, value=top.score.value)


def percent_better(proposed: float, baseline: float, *, smaller: bool) -> float | None:
    """Percent of the baseline by which the proposed value is better; None for a baseline of zero."""
    if baseline == 0:
        return None
    gap = 100 * (proposed - baseline) / abs(baseline)
    return -gap if smaller else gap


def _by_metric(runs: list[RunMetrics]) -> dict[str, dict[str, float]]:
    """{metric: {run: value}}; a run without a value is not listed under it."""
    found: dict[str, dict[str, float]] = {}
    for run in runs:
        values: dict[str, float | None] = {
            "score": run.score.value,
            "zero_shot": run.score.value if run.method == "uhl-zero-shot" else None,
            "training_seconds": run.training_seconds,
            **run.costs.model_dump(),
        }
        if run.zero_shot is not None:
            values["zero_shot"] = run.zero_shot.value
            values["after_tuning"] = run.score.value
        for name, value in values.items():
            if value is not None:
                found.setdefault(name, {})[run.run_id] = value
    return found


def summaries(runs: list[RunMetrics]) -> list[GroupSummary]:
    """A row a method of each data set and host, in the order of the runs."""
    keys = list(dict.fromkeys((run.task, run.host, run.method) for run in runs))
    return [_summary([run for run in runs if (run.task, run.host, run.method) == key]) for key in keys]


def _summary(runs: list[RunMetrics]) -> GroupSummary:
    runs = sorted(runs, key=lambda run: run.seed)
    first, values = runs[0], np.array([run.score.value for run in runs])
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    devices = tuple(dict.fromkeys(run.device for run in runs if run.device is not None))
    before = [run.zero_shot.value for run in runs if run.zero_shot is not None]
    return GroupSummary(
        task=first.task,
        host=first.host,
        method=first.method,
        metric=first.score.metric,
        seeds=tuple(run.seed for run in runs),
        mean=float(values.mean()),
        standard_error=error,
        low=first.score.low,
        high=first.score.high,
        zero_shot=float(np.mean(before)) if before else None,
        adapter_bytes=first.costs.adapter_bytes,
        flops_percent=first.costs.flops_percent,
        memory_mb=first.costs.memory_mb,
        wall_clock_percent=first.costs.wall_clock_percent,
        atoms_per_token=first.costs.atoms_per_token,
        training_seconds=float(np.mean([run.training_seconds for run in runs])) if len(devices) < 2 else None,
        within_budget=all(run.within_budget for run in runs),
        devices=devices,
    )
