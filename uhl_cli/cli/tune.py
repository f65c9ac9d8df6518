"""`uhl tune`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uhl_cli.cli.options import command
from uhl_cli.cli.output import Output, Table, interval, is_main_process

if TYPE_CHECKING:
    from uhl_cli.commands.options import TuneOptions
    from uhl_cli.reports import SearchReport, TuneReport


def _record() -> type[TuneOptions]:
    from uhl_cli.commands.options import TuneOptions

    return TuneOptions


@command(
    _record,
    example="uhl tune adapter.safetensors --target prajjwal1/bert-tiny --task sst2",
    panels={"Training": ("top-k", "max-length", "optimise", "resume", "save-every")},
    metavars={"optimise": "N"},
    interrupted="Go on from the last checkpoint with --resume.",
)
def tune(options: TuneOptions, output: Output) -> None:
    """Tune 512 bytes of an adapter on a target with labels, everything else frozen, and write a small task file."""
    from uhl_cli.commands.tune import run_tune

    with output.progress() as reporter:
        report = run_tune(options, reporter)
    if is_main_process():
        output.warn_truncated(report.truncated)
        output.result(report, quiet=[(report.output,)], table=_table)


def _table(output: Output, report: TuneReport) -> None:
    """Print what `tune` did."""
    target = report.target.fingerprint
    shape = f"{target.model_type}, {target.num_hidden_layers} x {target.hidden_size}"
    table = Table(
        f"{report.output}: {report.task} on {report.target.name} ({shape})",
        left=["what"],
        right=["value", "tuned minus this"],
    )
    rows = {"zero_shot": "before, zero-shot", "untouched": "untouched target (majority class)", "tuned": "tuned"}
    for name, label in rows.items():
        if name in report.scores:
            score = report.scores[name]
            what = f"{label}: {score.metric}, {score.examples} examples"
            table.row(what, interval(score), interval(report.gains.get(name)) if name != "tuned" else "")
    table.row("bytes of delta-theta", f"{report.delta_bytes:,}")
    if not report.own_task:
        table.row("bytes of the new readout", f"{report.readout_bytes:,}")
    table.row("bytes of the task file", f"{report.bytes:,}")
    table.row("active atoms per token", "-" if report.atoms_per_token is None else f"{report.atoms_per_token:.2f}")
    table.row(f"FLOP overhead at {report.flops.sequence_length} tokens", f"{report.flops.percent:.2f} %")
    table.row("training examples, steps", f"{report.train_examples:,}, {report.steps:,}")
    table.row("seconds", f"{report.seconds:.0f}")
    output.table(table)
    if report.left_out:
        output.line(f"left out to hold the FLOP limit: {', '.join(report.left_out)}")
    if report.search is not None:
        output.table(_trials(report.search))


def _trials(search: SearchReport) -> Table:
    """All trials of the search, the chosen one marked."""
    names = ["learning_rate", "readout_learning_rate", "active_weight", "delta_weight", "top_k", "score"]
    names = [name for name in names if getattr(search.trials[0], name) is not None]
    title = f"search: scores on {search.held_out:,} held-out training examples"
    table = Table(title, right=[name.replace("_", " ") for name in ["trial", *names]])
    for trial in search.trials:
        values = [f"{getattr(trial, name):.3g}" for name in names[:-1]]
        mark = "* " if trial.number == search.best else ""
        table.row(f"{mark}{trial.number + 1}", *values, f"{trial.score:.3f}")
    return table
