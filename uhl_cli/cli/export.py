"""`uhl export`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uhl_cli.cli.options import command
from uhl_cli.cli.output import Output, Table, interval, is_main_process

if TYPE_CHECKING:
    from uhl_cli.commands.options import ExportOptions
    from uhl_cli.reports import ExportReport

_ROWS = {"zero_shot": "ported, zero-shot", "tuned": "tuned", "export": "the export"}


def _record() -> type[ExportOptions]:
    from uhl_cli.commands.options import ExportOptions

    return ExportOptions


@command(
    _record,
    example="uhl export adapter.safetensors --target distilbert-base-uncased --output sst2-distilbert",
    panels={
        "Training": ("texts", "task-file", "rank", "max-length", "resume", "save-every"),
        "Data": ("score-data",),
        "Output": ("format", "base", "dtype"),
    },
    interrupted="There is no checkpoint yet; run it again.",
)
def export(options: ExportOptions, output: Output) -> None:
    """Make a standard checkpoint, or a peft LoRA, from an adapter file and a target; the result needs no uhl.

    It learns without labels from the texts in the adapter file, as `uhl tune --parameters lora`, but with its
    family's own head in place of uhl's readout. The result loads with transformers and runs at the target's speed.
    """
    from uhl_cli.commands.export import run_export

    with output.progress() as reporter:
        report = run_export(options, reporter)
    if is_main_process():
        if report.unread:
            output.note(
                f"texts and spans of the transfer set left out, because the target's tokenizer knows no token of "
                f"them: {report.unread:,}.",
                "warning: ",
            )
        if report.arguments:
            output.note(
                f"the base has other labels or no padding: README.md in {report.output} says how to load the export."
            )
        output.warn_truncated(report.truncated)
        before = "tuned" if "tuned" in {**report.agreement, **report.scores} else "zero_shot"
        output.warn_worse(report, made="export", before=before)
        output.result(report, quiet=[(report.output,)], table=_table)


def _table(output: Output, report: ExportReport) -> None:
    """Print what `export` did."""
    host = report.target.fingerprint
    shape = f"{host.model_type}, {host.num_hidden_layers} x {host.hidden_size}"
    what = "checkpoint" if report.format == "merged" else "peft LoRA"
    title = f"{report.output}: {report.task} on {report.target.name} ({shape}), a {what} learnt from"
    table = Table(f"{title} {'; '.join(report.teachers)}", left=["what"], right=["value", "export minus this"])
    for name, label in _ROWS.items():
        if name in report.agreement:
            score = report.agreement[name]
            table.row(
                f"agreement with the teacher, {label}: {score.metric}, {score.examples} held-out", interval(score)
            )
    for name, label in _ROWS.items():
        if name in report.scores:
            score = report.scores[name]
            said = f"{label}: {score.metric}, {score.examples} examples"
            table.row(said, interval(score), interval(report.gains.get(name)) if name != "export" else "")
    for name, size in report.files.items():
        table.row(f"bytes of {name}", f"{size:,}")
    table.row("bytes of all files", f"{report.bytes:,}")
    if report.rounding is not None:
        found = report.rounding
        table.row(f"largest difference of a logit in {found.dtype}", f"{found.largest:.4f}")
        table.row(f"predictions that move in {found.dtype}", f"{found.moved:,} of {found.predictions:,}")
    table.row("training examples, steps", f"{report.train_examples:,}, {report.steps:,}")
    table.row("seconds", f"{report.seconds:.0f}")
    output.table(table)
    if report.base is not None:
        output.line(f"base: {report.base}")
