"""The report of `compare` as tables for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from uhl_cli.compare.aggregate import GroupSummary, counted
from uhl_cli.compare.experiment import CompareReport
from uhl_cli.compare.methods import METHODS
from uhl_cli.progress import stderr


def render_compare(report: CompareReport) -> None:
    """Print a table a data set and host, then the best runs and the gap."""
    console = Console()
    for task, host in dict.fromkeys((group.task, group.host) for group in report.groups):
        groups = [group for group in report.groups if (group.task, group.host) == (task, host)]
        console.print(_table(f"{task} on {host}: {groups[0].metric}", groups))
    best = report.aggregated
    for name, run in (("best proposed", best.best_proposed), ("best baseline", best.best_baseline)):
        if run is not None:
            line = f"{name} within the budget: {run.value:.3f} by {run.run_id}"
            console.print(line, highlight=False, soft_wrap=True, markup=False)
    if best.gap is not None:
        console.print(f"gap: {best.gap:+.1f} %", highlight=False)
    for name, method in METHODS.items():
        found = counted(report.verdicts, name, "baseline")
        if found.total():
            line = f"{method.label} beside the baselines: better {found['better']}, worse {found['worse']}"
            console.print(f"{line}, open {found['open']} times (paired, Holm's 5 %)", highlight=False, soft_wrap=True)
    made, skipped = len(report.made), len(report.skipped)
    left = f"{len(report.missing)} missing, " if report.missing else ""
    timed = f"{len(report.timed)} timed again, " if report.timed else ""
    counts = f"{made} runs made, {skipped} kept, {timed}{left}{len(report.failed)} failed"
    line = f"{counts}; see {report.results_dir}/comparison"
    console.print(line, highlight=False, soft_wrap=True, markup=False)
    for failed in report.failed:
        stderr().print(f"failed: {failed.run_id}: {failed.error}", markup=False, highlight=False)


def _table(title: str, groups: list[GroupSummary]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for name in ("score", "95 %", "bytes", "FLOPs", "time", "budget"):
        table.add_column(name, justify="right", no_wrap=True)
    for group in groups:
        spread = "" if group.standard_error is None else f" ± {group.standard_error:.3f}"
        table.add_row(
            METHODS[group.method].label,
            f"{group.mean:.3f}{spread}",
            f"{group.low:.3f}–{group.high:.3f}",
            f"{group.adapter_bytes:,}",
            f"{group.flops_percent:+.1f} %",
            "-" if group.wall_clock_percent is None else f"{group.wall_clock_percent:+.0f} %",
            "holds" if group.within_budget else "beyond",
            style="bold" if METHODS[group.method].role == "proposed" else None,
        )
    return table
