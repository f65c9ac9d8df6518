"""`uhl compare`: do a set of configured runs, one folder each, and compare them."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable

from pydantic import Field

from uhl_cli.commands.outputs import refuse_unwritable
from uhl_cli.compare.aggregate import Aggregated, Comparison, GroupSummary, Pairing, Verdict, aggregate
from uhl_cli.compare.config import COMPARISON, SEARCHES, RunConfig, trial
from uhl_cli.compare.distilled import FROM_SOURCE
from uhl_cli.compare.figures import draw_comparison, draw_confusion, draw_learning_curve
from uhl_cli.compare.load import load_configs, refuse_unknown_places
from uhl_cli.compare.options import CompareOptions, Mode
from uhl_cli.compare.resources import Resources
from uhl_cli.compare.results import RunFolder, RunMetrics, Search
from uhl_cli.compare.runs import has_clock, make_run, time_again
from uhl_cli.compare.search import KeptSearches
from uhl_cli.compare.sections import TrackingSection
from uhl_cli.compare.tables import as_csv, as_latex, as_markdown, paired_markdown, short_markdown
from uhl_cli.compare.tracking import refuse_missing, report_run
from uhl_cli.errors import ClaimedError, OutputError, UhlError, UsageError
from uhl_cli.files import claimed, remove_folder, write_text
from uhl_cli.formats.adapter import read_adapter
from uhl_cli.reports import Reporter, silent
from uhl_cli.schema import Frozen


class FailedRun(Frozen):
    """A run without metrics, and the reason."""

    run_id: str
    error: str


class CompareReport(Frozen):
    """What `compare` did."""

    results_dir: str
    mode: Mode
    made: tuple[str, ...]
    skipped: tuple[str, ...] = Field(description="runs that were finished before (--resume)")
    missing: tuple[str, ...] = Field(description="unfinished runs that were not done (--compare-only)")
    timed: tuple[str, ...] = Field((), description="runs whose wall-clock was measured again (--time-only)")
    failed: tuple[FailedRun, ...]
    aggregated: Aggregated
    groups: tuple[GroupSummary, ...]
    pairings: tuple[Pairing, ...]
    verdicts: tuple[Verdict, ...]


def chosen_runs(options: CompareOptions) -> list[RunConfig]:
    """The runs that the options name; in trial mode in their smallest form, with the first seed only.

    :raises UsageError: When no run is left, a filter matches nothing, or runs that would be seeds of one method differ
        in more than the seed.
    """
    runs = load_configs(list(options.configs))
    refuse_unknown_places(runs, options.places, _sources_of_files(runs))
    filters: list[tuple[str, tuple[object, ...], Callable[[RunConfig], object]]] = [
        ("method", options.methods, lambda run: run.method),
        ("host", options.hosts, lambda run: run.host.name),
        ("task", options.tasks, lambda run: run.dataset.task),
        ("seed", options.seeds, lambda run: run.seed),
    ]
    for name, wanted, value in filters:
        known = {value(run) for run in runs}
        odd = [each for each in wanted if each not in known]
        if odd:
            listed = ", ".join(sorted(str(each) for each in known))
            raise UsageError(f"no run has the {name} {odd[0]!r}.", f"There are {listed}.")
        if wanted:
            runs = [run for run in runs if value(run) in wanted]
    _refuse_different_seeds(runs)
    if options.mode == "trial":
        first = {(run.method, run.group): run for run in reversed(runs)}
        return [trial(run) for run in runs if first[run.method, run.group] is run]
    return runs


def _sources_of_files(runs: list[RunConfig]) -> set[str]:
    """Names of the sources of adapter files, of the runs that load them."""
    files = {run.adapter.file for run in runs if run.method == FROM_SOURCE and run.adapter is not None}
    return {read_adapter(path).manifest.source.name for path in files if path is not None and path.exists()}


def _refuse_different_seeds(runs: list[RunConfig]) -> None:
    """Refuse two configurations of one method on one host and data set, whose mean would mean nothing."""
    found: dict[tuple[str, tuple[str, str]], RunConfig] = {}
    for run in runs:
        first = found.setdefault((run.method, run.group), run)
        same_seed = run.model_copy(update={"training": run.training.model_copy(update={"seed": first.seed})})
        if same_seed.digest != first.digest:
            raise UsageError(
                f"runs {first.run_id} and {run.run_id} are both {run.method} on {run.dataset.task} and "
                f"{run.host.name}, with different settings.",
                "Compare them in two calls, or choose by --method, --host and --task.",
            )


def run_compare(options: CompareOptions, reporter: Reporter = silent) -> CompareReport:
    """Do every run, then compare all finished ones.

    A failed run is reported and does not stop the others; Ctrl-C only loses the current run.  Several processes may do
    different runs in one folder, each with `resume`; a last call with `compare_only` compares them all.

    :raises UhlError: Before any run: wrong configurations, results that already exist, nothing to compare.
    """
    if options.compare_only and options.time_only:
        raise UsageError(
            "--compare-only measures nothing, and --time-only measures again.",
            "Leave out one of the two; --time-only compares as well.",
        )
    if options.resume and options.overwrite:
        raise UsageError("--resume keeps finished runs, and --overwrite replaces them.", "Leave out one of the two.")
    makes_none = options.compare_only or options.time_only
    if makes_none and options.overwrite:
        flag = "--time-only" if options.time_only else "--compare-only"
        raise UsageError(f"{flag} makes no run that could overwrite another.", "Leave out one of the two.")
    runs = chosen_runs(options)
    for run in runs:
        refuse_missing(tracking_of(run, options).report_to)
    refuse_unwritable(options.results_dir / COMPARISON / "aggregated_metrics.json", "--results-dir")
    finished = _finished(runs, options)
    unfinished = [run for run in runs if run.run_id not in finished]
    if makes_none and not finished:
        raise UsageError(f"none of these runs is finished in {options.results_dir}.", "Make some with --resume.")
    if options.time_only:
        wanted = [run for run in runs if run.run_id in finished and has_clock(run, options.results_dir)]
    else:
        wanted = [] if options.compare_only else unfinished
    resources = Resources(
        options.results_dir, options.places, device=options.device, offline=options.offline, reporter=reporter
    )
    searching = not makes_none and any(run.asks_for_search for run in wanted)
    # The file is not read where nothing is searched: if it is damaged, that is no matter there.
    searches: dict[str, Search] = KeptSearches(options.results_dir / SEARCHES) if searching else {}

    def make(run: RunConfig) -> None:
        folder = RunFolder(options.results_dir, run.run_id).path
        with claimed(folder, "--results-dir"):
            if options.overwrite:
                remove_folder(folder)
            metrics = make_run(run, resources, options.mode, searches)
            _draw_run(metrics, options)
        report_run(tracking_of(run, options), metrics, options.results_dir)

    def time(run: RunConfig) -> None:
        time_again(run, resources)

    done, failed = _attempted(wanted, time if options.time_only else make, options, reporter)
    comparison = aggregate(options.results_dir, [run.run_id for run in runs])
    _write(comparison, options)
    return CompareReport(
        results_dir=str(options.results_dir),
        mode=options.mode,
        made=() if makes_none else tuple(done),
        skipped=tuple(run.run_id for run in runs if run.run_id in finished),
        missing=tuple(run.run_id for run in unfinished) if makes_none else (),
        timed=tuple(done) if options.time_only else (),
        failed=tuple(failed),
        aggregated=comparison.aggregated,
        groups=tuple(comparison.groups),
        pairings=comparison.tests.pairings,
        verdicts=comparison.tests.verdicts,
    )


def tracking_of(run: RunConfig, options: CompareOptions) -> TrackingSection:
    """Where a run is reported: as the call says, else as its configuration says, and nowhere in trial mode."""
    if options.mode == "trial":
        return TrackingSection()
    said = run.tracking or TrackingSection()
    return said if options.report_to is None else said.model_copy(update={"report_to": options.report_to})


def _attempted(
    runs: list[RunConfig], attempt: Callable[[RunConfig], None], options: CompareOptions, reporter: Reporter
) -> tuple[list[str], list[FailedRun]]:
    """Names of the runs for which `attempt` succeeded, and the failed runs, each with a traceback in its folder.

    A run that another process is doing fails without one.
    """
    done: list[str] = []
    failed: list[FailedRun] = []
    for index, run in enumerate(runs):
        reporter("runs", index, len(runs), run.run_id)
        try:
            attempt(run)
            done.append(run.run_id)
        except ClaimedError as error:  # the folder is that of the other process, which may write its own error there
            # It may also be pretraining this run's adapter; --output, which the error then names, is not compare's.
            busy = ClaimedError(error.message, "Wait for its end, or choose another --results-dir.")
            failed.append(FailedRun(run_id=run.run_id, error=str(busy)))
        except Exception as error:  # noqa: BLE001 - one failed run must not lose the others, whatever it failed of
            failed.append(FailedRun(run_id=run.run_id, error=_said(error)))
            details = "".join(traceback.format_exception(error))
            write_text(RunFolder(options.results_dir, run.run_id).error, details)
    if runs:
        reporter("runs", len(runs), len(runs), "")
    return done, failed


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, UhlError) else f"{type(error).__name__}: {error}"


def _finished(runs: list[RunConfig], options: CompareOptions) -> set[str]:
    """Runs whose metrics are there, with --resume.

    :raises OutputError: When metrics are there and neither --resume nor --overwrite was given, or when they were
        made by another configuration.
    """
    found = set()
    for run in runs:
        folder = RunFolder(options.results_dir, run.run_id)
        if not folder.metrics.exists() or options.overwrite:
            continue
        if not (options.resume or options.compare_only or options.time_only):
            hint = "Continue with --resume, add --overwrite, or choose another --results-dir."
            raise OutputError(f"{folder.metrics} already exists.", hint)
        # A comparison does no run, so it accepts older ones that only differ by settings that no longer exist.
        made = folder.read_config().digest if options.compare_only else folder.read().config_digest
        if made != run.digest:
            hint = "Choose another --results-dir, or add --overwrite."
            raise OutputError(f"{folder.metrics} was made with another configuration of {run.run_id}.", hint)
        found.add(run.run_id)
    return found


def _draw_run(metrics: RunMetrics, options: CompareOptions) -> None:
    if not options.figures:
        return
    folder = RunFolder(options.results_dir, metrics.run_id)
    if metrics.curve:
        draw_learning_curve(metrics, folder.path / f"{metrics.run_id}_learning_curve.pdf")
    draw_confusion(metrics, folder.read_predictions(), folder.path / f"{metrics.run_id}_confusion_matrix.pdf")


def _write(comparison: Comparison, options: CompareOptions) -> None:
    """`comparison/`: the aggregated metrics, tables, paired tests and figures."""
    folder = options.results_dir / COMPARISON
    if not comparison.runs:
        return
    write_text(folder / "aggregated_metrics.json", comparison.aggregated.model_dump_json(indent=2) + "\n")
    write_text(folder / "comparison.csv", as_csv(comparison.groups))
    parts = (
        short_markdown(comparison.groups),
        paired_markdown(comparison.tests.verdicts),
        as_markdown(comparison.groups),
    )
    write_text(folder / "comparison.md", "\n".join(parts))
    write_text(folder / "comparison.tex", as_latex(comparison.groups))
    groups = {"groups": [group.model_dump(mode="json") for group in comparison.groups]}
    content = groups | comparison.tests.model_dump(mode="json")
    write_text(folder / "groups.json", json.dumps(content, indent=1) + "\n")
    if options.figures:
        draw_comparison(comparison, folder)
