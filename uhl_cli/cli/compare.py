"""`uhl compare`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from uhl_cli.cli import options as shared
from uhl_cli.cli.edge import error_edge, print_result
from uhl_cli.progress import progress_bar

RUNS_PANEL = "Which runs"


class Mode(str, Enum):
    """How much of every run is made."""

    trial = "trial"
    full = "full"


class Tracker(str, Enum):
    """Where runs are reported besides the local files."""

    none = "none"
    tensorboard = "tensorboard"
    wandb = "wandb"


def compare(
    config: Annotated[
        list[str],
        typer.Option(
            help="YAML file of one run or of a grid, or a set that ships: builtin, local, published. May be repeated."
        ),
    ],
    results_dir: Annotated[
        Path, typer.Option(help="Folder of all results.", rich_help_panel=shared.OUTPUT_PANEL)
    ] = Path("results"),
    mode: Annotated[Mode, typer.Option(help="trial: two steps of every run, to see that it works.")] = Mode.full,
    at: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="Where the host or data set of that name lies. May be repeated."),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Only this method. May be repeated.", rich_help_panel=RUNS_PANEL)
    ] = None,
    host: Annotated[
        list[str] | None, typer.Option(help="Only this host. May be repeated.", rich_help_panel=RUNS_PANEL)
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Only this data set. May be repeated.", rich_help_panel=RUNS_PANEL)
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Only this seed. May be repeated.", rich_help_panel=RUNS_PANEL)
    ] = None,
    list_runs: Annotated[
        bool, typer.Option("--list", help="Print the runs' names and make none.", rich_help_panel=RUNS_PANEL)
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep finished runs and make the others.")] = False,
    compare_only: Annotated[
        bool, typer.Option("--compare-only", help="Make no run: compare those that are finished.")
    ] = False,
    time_only: Annotated[
        bool,
        typer.Option("--time-only", help="Make no run: measure the wall-clock of those that are finished again."),
    ] = False,
    figures: Annotated[
        bool, typer.Option(help="Draw figures (needs matplotlib).", rich_help_panel=shared.OUTPUT_PANEL)
    ] = True,
    report_to: Annotated[
        Tracker, typer.Option(help="Report runs to a tracker as well.", rich_help_panel=shared.OUTPUT_PANEL)
    ] = Tracker.none,
    device: shared.Device = "auto",
    offline: shared.Offline = False,
    overwrite: shared.Overwrite = False,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    debug: shared.Debug = False,
) -> None:
    """Run every method and baseline on the same hosts, data and budget, and compare them.

    Exit code 1 when a run failed; the others are compared all the same.
    """
    with error_edge(debug=debug, interrupted_hint="Go on after the last finished run with --resume."):
        from uhl_cli.errors import RunError, UsageError

        places = {}
        for entry in at or []:
            name, separator, path = entry.partition("=")
            if not (name and separator and path):
                raise UsageError(f"--at {entry}: not of the form NAME=PATH.", "Say --at minilm-l3=hosts/minilm-l3.")
            places[name] = path
        from uhl_cli.compare.experiment import CompareOptions, chosen_runs, run_compare

        options = CompareOptions(
            configs=tuple(config),
            results_dir=results_dir,
            mode=mode.value,
            places=places,
            methods=tuple(method or ()),
            hosts=tuple(host or ()),
            tasks=tuple(task or ()),
            seeds=tuple(seed or ()),
            device=device,
            offline=offline,
            resume=resume,
            compare_only=compare_only,
            time_only=time_only,
            overwrite=overwrite,
            figures=figures,
            report_to=report_to.value,
        )
        if list_runs:
            print_result("\n".join(run.run_id for run in chosen_runs(options)))
            return
        from uhl_cli.cli.render_compare import render_compare

        with progress_bar(quiet=quiet) as reporter:
            report = run_compare(options, reporter)
        if json:
            print_result(report.model_dump_json(indent=2))
        elif quiet:
            best = report.aggregated.best_proposed
            print_result(best.run_id if best else "")
        else:
            render_compare(report)
        if report.failed:
            first = report.failed[0]
            tried = len(report.failed) + len(report.made) + len(report.timed)
            problem = f"{len(report.failed)} of {tried} runs failed, first {first.run_id}: {first.error}"
            again = "--time-only" if time_only else "--resume"
            where = "--at NAME=PATH says where a host or data set lies"
            raise RunError(problem, f"See error.txt in its folder, then go on with {again}; {where}.")
