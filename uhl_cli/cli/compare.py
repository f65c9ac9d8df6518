"""`uhl compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from uhl_cli.cli.options import command
from uhl_cli.cli.output import Output, Table
from uhl_cli.errors import RunError

if TYPE_CHECKING:
    from uhl_cli.compare.aggregate import GroupSummary
    from uhl_cli.compare.experiment import CompareReport
    from uhl_cli.compare.options import CompareOptions


def _record() -> type[CompareOptions]:
    from uhl_cli.compare.options import CompareOptions

    return CompareOptions


@command(
    _record,
    example="uhl compare --config published --mode trial --results-dir results",
    panels={
        "Which runs": ("method", "host", "task", "seed", "list"),
        "Output": ("results-dir", "figures", "report-to"),
    },
    metavars={"at": "NAME=PATH"},
    interrupted="Continue after the last finished run with --resume.",
)
def compare(options: CompareOptions, output: Output) -> None:
    """Run every method and baseline on the same hosts, data and budget, and compare them.

    Exit code 1 if a run failed; the others are still compared.
    """
    from uhl_cli.compare.experiment import chosen_runs, run_compare

    if options.list_runs:
        output.lines([(run.run_id,) for run in chosen_runs(options)])
        return
    with output.progress() as reporter:
        report = run_compare(options, reporter)
    best = report.aggregated.best_proposed
    output.result(report, quiet=[(best.run_id,)] if best else [], table=_table)
    if report.failed:
        first = report.failed[0]
        # A run that another process is doing has none of its own.
        traced = (Path(report.results_dir) / first.run_id / "error.txt").exists()
        see = "See error.txt in its folder, then continue" if traced else "Continue"
        tried = len(report.failed) + len(report.made) + len(report.timed)
        raise RunError(
            f"{len(report.failed)} of {tried} runs failed, first {first.run_id}: {first.error}",
            f"{see} with {'--time-only' if options.time_only else '--resume'}; "
            "--at NAME=PATH gives the location of a host or data set.",
        )


def _table(output: Output, report: CompareReport) -> None:
    """Print one table per data set and host, then the best runs and the gap."""
    from uhl_cli.compare.aggregate import counted
    from uhl_cli.compare.config import COMPARISON
    from uhl_cli.compare.methods import METHODS

    for task, host in dict.fromkeys((group.task, group.host) for group in report.groups):
        groups = [group for group in report.groups if (group.task, group.host) == (task, host)]
        output.table(_groups(f"{task} on {host}: {groups[0].metric}", groups))
    best = report.aggregated
    for name, run in (("best proposed", best.best_proposed), ("best baseline", best.best_baseline)):
        if run is not None:
            output.line(f"{name} within the budget: {run.value:.3f} by {run.run_id}")
    if best.gap is not None:
        output.line(f"gap: {best.gap:+.1f} %")
    for name, method in METHODS.items():
        found = counted(report.verdicts, name, "baseline")
        if found.total():
            beside = f"{method.label} compared with the baselines: better {found['better']}, worse {found['worse']}"
            output.line(f"{beside}, open {found['open']} times (paired, Holm's 5 %)")
    left = f"{len(report.missing)} missing, " if report.missing else ""
    timed = f"{len(report.timed)} timed again, " if report.timed else ""
    counts = f"{len(report.made)} runs made, {len(report.skipped)} kept, {timed}{left}{len(report.failed)} failed"
    # Without a finished run nothing is compared, and there is no such folder.
    output.line(f"{counts}; see {report.results_dir}/{COMPARISON}" if report.groups else counts)
    for failed in report.failed:
        output.note(f"{failed.run_id}: {failed.error}", "failed: ")


def _groups(title: str, groups: list[GroupSummary]) -> Table:
    from uhl_cli.compare.methods import METHODS

    table = Table(title, left=["method"], right=["score", "95 %", "bytes", "FLOPs", "time", "budget"])
    for group in groups:
        spread = "" if group.standard_error is None else f" ± {group.standard_error:.3f}"
        table.row(
            METHODS[group.method].label,
            f"{group.mean:.3f}{spread}",
            f"{group.low:.3f}–{group.high:.3f}",
            f"{group.adapter_bytes:,}",
            f"{group.flops_percent:+.1f} %",
            "-" if group.wall_clock_percent is None else f"{group.wall_clock_percent:+.0f} %",
            "holds" if group.within_budget else "beyond",
            style="bold" if METHODS[group.method].role == "proposed" else "",
        )
    return table
