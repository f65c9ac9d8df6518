"""`uhl list`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from uhl_cli.cli.options import command
from uhl_cli.cli.output import Output, Table

if TYPE_CHECKING:
    from uhl_cli.inspect.listing import ListedFile, ListOptions, ListReport

_MOST_LABELS = 4
_MOST_LETTERS = 20


def _record() -> type[ListOptions]:
    from uhl_cli.inspect.listing import ListOptions

    return ListOptions


@command(_record, example="uhl list adapters --target builtin:small", metavars={"folder": "FOLDER"})
def list(options: ListOptions, output: Output) -> None:
    """List the adapter files and task files in a folder, or those in the hub's cache; needs no host and no torch.

    With --quiet, print one line per file: name, kind (adapter, task or unreadable) and bytes, tab separated.
    """
    from uhl_cli.inspect.listing import run_list

    report = run_list(options)
    quiet = [(file.name, file.kind, file.bytes) for file in report.files]
    output.result(report, quiet=quiet, table=partial(_table, named=options.folder is not None))
    if not report.complete:
        output.note(f"{report.folder} has more files than are looked at; name a folder in it.", "warning: ")


def _table(output: Output, report: ListReport, *, named: bool) -> None:
    """Print what `list` found; `named` says whether the user named the folder."""
    if not report.files:
        elsewhere = "" if named else "; `uhl list .` looks in the folder that you are in"
        output.line(f"no adapter files in {report.folder}{elsewhere}")
    good = [file for file in report.files if file.problem is None]
    if good:
        right = ["score", "bytes", *([] if report.target is None else ["aligned"])]
        note = "" if report.target is None else f"aligned: to {report.target}, by an earlier call on this computer"
        table = Table(left=["file", "task: labels", "host", "licence"], right=right, note=note)
        for file in good:
            table.row(*_cells(file))
        output.table(table)
    for file in report.files:
        if file.problem is not None:
            output.line(f"{file.name} is unreadable: {file.problem}")
    if report.others:
        output.line(
            f"{report.others:,} other .safetensors {'file is' if report.others == 1 else 'files are'} not uhl's"
        )


def _cells(file: ListedFile) -> tuple[str, ...]:
    labels = ", ".join(file.labels[:_MOST_LABELS])
    if len(file.labels) > _MOST_LABELS:
        labels = f"{len(file.labels)} labels"
    score = "-" if file.score is None else f"{file.score.value:.3f} {file.score.metric[:_MOST_LETTERS]}"
    host = "" if file.host is None else f"{'from' if file.kind == 'adapter' else 'on'} {file.host.name}"
    cells = (file.name, f"{file.task}: {labels}", host, file.licence or "-", score, f"{file.bytes:,}")
    return cells if file.aligned is None else (*cells, "yes" if file.aligned else "no")
