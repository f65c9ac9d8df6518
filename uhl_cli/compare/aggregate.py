"""The comparison, from the per-run files alone: best runs, the gap, summaries over seeds, and paired tests.

The paired tests compare proposed methods with the others, per seed and in the mean of all seeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.stats import binomtest

from uhl_cli.compare.methods import METHODS, Role
from uhl_cli.compare.results import BothScores, Predicted, RunFolder, RunMetrics, both_scores, published
from uhl_cli.metrics import Counted, Difference, MeanDifference, correct, count, mean_difference
from uhl_cli.schema import Frozen

PRIMARY = "Target-model dev score under 1 MB / 10 %-FLOP budget (report zero-shot and post-tune)."
LEVEL = 0.05
Outcome = Literal["better", "worse", "open"]
Group = tuple[str, str]
RunsOfGroup = Mapping[tuple[str, int], RunMetrics]


class BestRun(Frozen):
    """A run and its value of the primary metric."""

    run_id: str
    value: float


class Aggregated(Frozen):
    """`aggregated_metrics.json`; `gap` is in percent of the best baseline, positive if the proposed is better."""

    primary_metric: str = PRIMARY
    metrics: dict[str, dict[str, float]]
    best_proposed: BestRun | None
    best_baseline: BestRun | None
    gap: float | None


class GroupSummary(Frozen):
    """One method on one data set and host: mean over seeds, and its spread."""

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
    training_seconds: float | None = Field(description="None if the seeds were run on different devices")
    f1: float = Field(description="mean over seeds, as the accuracy")
    accuracy: float
    within_budget: bool
    devices: tuple[str, ...] = Field(description="what the runs were made on")


class Pairing(Frozen):
    """One proposed run compared with one other of the same data set, host and seed."""

    proposed: str
    other: str
    difference: Difference
    mcnemar_p: float | None = Field(description="raw p value, exact, two-sided; None where accuracy is not the metric")
    mcnemar_holm: float | None = Field(description="the same, corrected over all pairs of this comparison")


class Verdict(Frozen):
    """One proposed method compared with one other on a data set and host, in the mean of their common seeds."""

    task: str
    host: str
    proposed: str = Field(description="a method's name")
    other: str = Field(description="a method's name")
    seeds: tuple[int, ...]
    difference: MeanDifference
    holm_p: float = Field(description="the difference's p value, corrected over all verdicts of this comparison")
    outcome: Outcome = Field(description="of the proposed method; open if the corrected p value is above 0.05")


class PairedTests(Frozen):
    """All of a comparison."""

    pairings: tuple[Pairing, ...]
    verdicts: tuple[Verdict, ...]


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
    kept = {run.run_id: _Kept.of(RunFolder(results, run.run_id).read_predictions()) for run in runs}
    metrics = _by_metric(runs, kept)
    aggregated = Aggregated(metrics=metrics, best_proposed=proposed, best_baseline=baseline, gap=gap)
    return Comparison(runs, aggregated, _summaries(runs, kept), _paired_tests(runs, kept))


def best(runs: list[RunMetrics], role: Role) -> BestRun | None:
    """The best run of that role within its budget; of equal ones the first."""
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


def _by_metric(runs: list[RunMetrics], kept: Mapping[str, _Kept]) -> dict[str, dict[str, float]]:
    """{metric: {run: value}}; a run without a value is not listed under it.

    Under the published names are values of runs of earlier versions as well, from their predictions.
    """
    found: dict[str, dict[str, float]] = {}
    for run in runs:
        values: dict[str, float | None] = {
            "score": run.score.value,
            "zero_shot": run.score.value if run.method == "uhl-zero-shot" else None,
            "training_seconds": run.training_seconds,
            **run.costs.model_dump(),
            **published(run.costs, kept[run.run_id].both),
        }
        if run.zero_shot is not None:
            values["zero_shot"] = run.zero_shot.value
            values["after_tuning"] = run.score.value
        for name, value in values.items():
            if value is not None:
                found.setdefault(name, {})[run.run_id] = value
    return found


def _summaries(runs: list[RunMetrics], kept: Mapping[str, _Kept]) -> list[GroupSummary]:
    """One row per method, data set and host, in the order of the runs."""
    keys = list(dict.fromkeys((run.task, run.host, run.method) for run in runs))
    return [_summary([run for run in runs if (run.task, run.host, run.method) == key], kept) for key in keys]


def _summary(runs: list[RunMetrics], kept: Mapping[str, _Kept]) -> GroupSummary:
    runs = sorted(runs, key=lambda run: run.seed)
    first, values = runs[0], np.array([run.score.value for run in runs])
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    devices = tuple(dict.fromkeys(run.device for run in runs if run.device is not None))
    before = [run.zero_shot.value for run in runs if run.zero_shot is not None]
    both = [kept[run.run_id].both for run in runs]
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
        f1=float(np.mean([each.f1 for each in both])),
        accuracy=float(np.mean([each.accuracy for each in both])),
        within_budget=all(run.within_budget for run in runs),
        devices=devices,
    )


@dataclass(frozen=True)
class _Kept:
    """A run's predictions, counted once for all its pairs."""

    predicted: Predicted
    counted: Counted
    right: NDArray[np.bool_]
    both: BothScores

    @classmethod
    def of(cls, predicted: Predicted) -> _Kept:
        rows, references = predicted.predictions, predicted.references
        counted = count(predicted.metric, rows, references, predicted.labels)
        return cls(predicted, counted, correct(rows, references), both_scores(rows, references, predicted.labels))


def _paired_tests(runs: list[RunMetrics], kept: Mapping[str, _Kept]) -> PairedTests:
    """Every proposed run and method compared with every other of its data set and host."""
    groups: dict[Group, dict[tuple[str, int], RunMetrics]] = {}
    for run in runs:
        groups.setdefault((run.task, run.host), {})[run.method, run.seed] = run
    return PairedTests(pairings=_pairings(groups, kept), verdicts=_verdicts(groups, kept))


def counted(verdicts: tuple[Verdict, ...], proposed: str, role: Role) -> Counter[Outcome]:
    """How often a proposed method is better, worse or neither, compared with methods of that role."""
    mine = [each for each in verdicts if each.proposed == proposed and METHODS[each.other].role == role]
    return Counter(each.outcome for each in mine)


def _beside(methods: list[str]) -> list[tuple[str, str]]:
    """(proposed, other) of the methods; of two proposed ones, what is trained is compared with what is only ported."""
    return [
        (proposed, other)
        for proposed in methods
        for other in methods
        if METHODS[proposed].role == "proposed"
        and other != proposed
        and (METHODS[other].role != "proposed" or (METHODS[proposed].trained and not METHODS[other].trained))
    ]


def _methods(group: RunsOfGroup) -> list[str]:
    return list(dict.fromkeys(method for method, _ in group))


def _pairings(groups: Mapping[Group, RunsOfGroup], kept: Mapping[str, _Kept]) -> tuple[Pairing, ...]:
    pairs = [
        (group[proposed, seed].run_id, group[other, seed].run_id)
        for group in groups.values()
        for seed in dict.fromkeys(seed for _, seed in group)
        for proposed, other in _beside(_methods(group))
        if (proposed, seed) in group and (other, seed) in group
    ]
    differences, p_values = [], []
    for proposed, other in pairs:
        mine, theirs = kept[proposed], kept[other]
        found = mean_difference([(mine.counted, theirs.counted)])
        differences.append(Difference(**found.model_dump(include=set(Difference.model_fields))))
        accuracy = mine.predicted.metric == "accuracy"
        p_values.append(mcnemar(mine.right, theirs.right) if accuracy else None)
    adjusted = iter(holm([value for value in p_values if value is not None]))
    return tuple(
        Pairing(
            proposed=proposed,
            other=other,
            difference=difference,
            mcnemar_p=raw,
            mcnemar_holm=None if raw is None else next(adjusted),
        )
        for (proposed, other), difference, raw in zip(pairs, differences, p_values, strict=True)
    )


def _verdicts(groups: Mapping[Group, RunsOfGroup], kept: Mapping[str, _Kept]) -> tuple[Verdict, ...]:
    found: list[tuple[Group, str, str, tuple[int, ...], MeanDifference]] = []
    for place, group in groups.items():
        for proposed, other in _beside(_methods(group)):
            seeds = tuple(sorted(seed for method, seed in group if method == proposed and (other, seed) in group))
            if not seeds:
                continue
            pairs = [(kept[group[proposed, seed].run_id], kept[group[other, seed].run_id]) for seed in seeds]
            difference = mean_difference([(mine.counted, theirs.counted) for mine, theirs in pairs])
            found.append((place, proposed, other, seeds, difference))
    adjusted = holm([difference.p_value for *_, difference in found])
    return tuple(
        Verdict(
            task=task,
            host=host,
            proposed=proposed,
            other=other,
            seeds=seeds,
            difference=difference,
            holm_p=corrected,
            outcome="open" if corrected > LEVEL else "better" if difference.value > 0 else "worse",
        )
        for ((task, host), proposed, other, seeds, difference), corrected in zip(found, adjusted, strict=True)
    )


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Exact two-sided p value of McNemar's test: do two runs err on equally many examples of their own?

    :param first: Whether the first run is right, per example, as from `metrics.correct`.
    """
    only_first = int(np.sum(first & ~second))
    only_second = int(np.sum(~first & second))
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second, 0.5).pvalue)


def holm(p_values: list[float]) -> list[float]:
    """Adjusted p values by Holm's step-down method (1979), in the order given; never smaller than the raw ones."""
    count = len(p_values)
    adjusted = [0.0] * count
    largest = 0.0
    for rank, index in enumerate(sorted(range(count), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
