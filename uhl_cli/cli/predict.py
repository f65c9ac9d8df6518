"""`uhl predict`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uhl_cli.cli.options import command
from uhl_cli.cli.output import Output, Table

if TYPE_CHECKING:
    from uhl_cli.commands.labelled import Labelled
    from uhl_cli.commands.options import PredictOptions
    from uhl_cli.reports import PredictReport

# Maximum characters of a text in the table for people.
_LONGEST = 200


def _record() -> type[PredictOptions]:
    from uhl_cli.commands.options import PredictOptions

    return PredictOptions


def _names_an_export(values: Mapping[str, Any]) -> str | None:
    """What to do where the target is a folder of `uhl export`, which needs no adapter."""
    from uhl_cli.formats.export import is_export

    target = values["target"]
    if target is None or not is_export(Path(target)):
        return None
    return f"An exported folder is a whole model: `uhl predict {target}`."


@command(
    _record,
    example="uhl predict adapter.safetensors --target distilbert-base-uncased 'a fine film' 'a waste of time'",
    panels={
        "Data": ("input", "format", "encoding", "text-column", "pair-column", "tokens-column", "max-length"),
        "Output": ("top-k", "threshold", "prefix"),
    },
    metavars={"texts": "TEXT", "input": "FILE"},
    interrupted="Nothing was written to --output.",
    hint=_names_an_export,
)
def predict(options: PredictOptions, output: Output) -> None:
    """Label texts with an adapter on a target, with a ported folder, or with an exported one.

    Give texts after ADAPTER, or a file with --input, which is read and labelled in chunks, so it may be of any length.
    The input's columns are kept. Added are the label and the probability of every class or, for a token classifier,
    tags and entities with their character positions. A terminal shows a table, otherwise JSON lines are written (with
    --json always); --quiet prints only the labels, one line per text. With --output the result goes to that file, and
    --json prints a report. If the reader closes the pipe early (| head -1), the exit code is 141.
    """
    bar = output.progress() if options.output is not None else output.progress_beside_parts()
    from uhl_cli.commands.predict import run_predict

    if options.output is not None:
        with bar as reporter:
            report = run_predict(options, reporter)
        _warn(output, report)
        output.result(report, quiet=[(report.output,)], table=_table)
        return

    def show(labelled: Labelled) -> bool:
        return output.part(labelled.json(), quiet=lambda: _quiet(labelled), table=lambda: _rows(labelled))

    with bar as reporter:
        report = run_predict(options, reporter, show)
    _warn(output, report)


def _warn(output: Output, report: PredictReport) -> None:
    if report.truncated:
        said = f"texts cut at the longest input: {report.truncated:,}; use a larger --max-length if the model takes it."
        output.note(said, "warning: ")


def _quiet(labelled: Labelled) -> list[tuple[str]]:
    """The label of each text, or the tags of its words separated by spaces; a dash for an empty one."""
    labels = (labelled.added.labels(row) for row in labelled.rows)
    return [(" ".join("-" if label is None else label for label in row),) for row in labels]


def _rows(labelled: Labelled) -> Table:
    table = Table(left=["text", *labelled.added.heading])
    for text, row in zip(labelled.texts, labelled.rows, strict=True):
        shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
        table.row(shown, *labelled.added.cells(row))
    return table


def _table(output: Output, report: PredictReport) -> None:
    """Print a summary of what was written to a file."""
    output.line(f"{report.texts:,} texts labelled by {report.model} in {report.seconds:.1f} seconds")
    table = Table(left=["label"], right=["number"])
    for label, number in report.labels.items():
        table.row(label, f"{number:,}")
    if report.unsure:
        table.row("empty: below the threshold, or cut off", f"{report.unsure:,}")
    output.table(table)
    output.line(f"kept in {report.output}")
