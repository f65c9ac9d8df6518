"""The wall-clock of finished runs, measured again one after the other; that nothing else runs is up to the caller.

Runs that several processes make side by side slow each other, and their wall-clock with it; scores stay what they are.
Nothing is trained: how long a pass takes depends on a model's shape and not on its values.
"""

from __future__ import annotations

from pathlib import Path

from uhl_cli.compare.baselines import Retrained
from uhl_cli.compare.config import RunConfig
from uhl_cli.compare.costs import ported_costs, retrained_costs
from uhl_cli.compare.methods import METHODS
from uhl_cli.compare.results import RunFolder, RunMetrics
from uhl_cli.compare.runs import carried
from uhl_cli.compare.workshop import Workshop
from uhl_cli.errors import UsageError


def has_clock(run: RunConfig, results: Path) -> bool:
    """Whether a finished run has a wall-clock at all; the untouched host has none."""
    return RunFolder(results, run.run_id).read().costs.wall_clock_percent is not None


def time_again(run: RunConfig, workshop: Workshop) -> RunMetrics:
    """The metrics of a finished run with a new wall-clock in percent of the bare host's, written to its folder.

    :raises FormatError: When its metrics are damaged.
    :raises UsageError: When the run's adapter is not there.
    """
    folder = RunFolder(workshop.results, run.run_id)
    metrics = folder.read()
    percent = _wall_clock(run, workshop)
    costs = metrics.costs.model_copy(update={"wall_clock_percent": percent})
    metrics = metrics.model_copy(update={"costs": costs, "timed_on": workshop.device_name})
    folder.write_metrics(metrics)
    return metrics


def _wall_clock(run: RunConfig, workshop: Workshop) -> float | None:
    if METHODS[run.method].kind == "retrained":
        labels = len(workshop.data(run.dataset).task.labels)
        model = Retrained(run.method, workshop.fresh_host(run.host), labels, run.training).as_stored()
        return retrained_costs(model, workshop.bare_host(run.host), run.evaluation).wall_clock_percent
    path = workshop.adapter_path(run)
    if not path.exists():
        raise UsageError(f"{path} is not there any more.", "Make the run again with --overwrite.")
    # A tuned adapter has the gains of another task file, and of another task another readout of the same shape.
    ported = carried(run, workshop.carrying(run))
    return ported_costs(ported, ported.host, run.evaluation, file_bytes=0, atoms=None).wall_clock_percent
