"""`uhl push`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from uhl_cli.cli.options import command
from uhl_cli.cli.output import Output, Table

if TYPE_CHECKING:
    from uhl_cli.commands.options import PushOptions
    from uhl_cli.reports import PushReport


def _record() -> type[PushOptions]:
    from uhl_cli.commands.options import PushOptions

    return PushOptions


@command(
    _record,
    example="uhl push adapter.safetensors user/my-adapter --license mit --language en --dry-run",
    panels={
        "Card": ("license", "language", "card", "overwrite"),
        "Hub": ("private", "revision", "message", "yes", "dry-run"),
    },
    metavars={"file": "FILE", "repo": "REPO"},
    interrupted="Run it again; a file is in the repository whole or not at all.",
)
def push(options: PushOptions, output: Output) -> None:
    """Upload an adapter file or a task file to the hub, with a model card of its scores, bytes and texts.

    The token is read from HF_TOKEN or what `hf auth login` keeps. With --quiet, print the page of the repository.
    """
    from uhl_cli.commands.push import run_push

    report = run_push(options, partial(_consent, options, output))
    output.result(
        report, quiet=[(report.url or name,) for name in report.files][: 1 if report.url else None], table=_table
    )


def _consent(options: PushOptions, output: Output, warning: str) -> bool:
    """Say what becomes public, and ask where somebody can answer."""
    asked = not (options.yes or options.dry_run)
    if asked and not output.asks():
        return False  # the error says it
    output.note(f"{warning}.", "warning: ")
    return asked and output.confirm(f"Upload to {options.repo}?")


def _table(output: Output, report: PushReport) -> None:
    """Print what `push` did."""
    if report.url is None:
        for line in (report.card or "").splitlines():
            output.line(line)
    table = Table(
        f"to {report.repo}{f' at {report.revision}' if report.revision else ''}", left=["file"], right=["bytes"]
    )
    for name, size in report.files.items():
        table.row(name, f"{size:,}")
    output.table(table)
    if report.url is None:
        output.line("nothing was uploaded: --dry-run")
    elif report.changed:
        output.line(f"uploaded to {report.url}, commit {report.commit}")
    else:
        output.line(f"nothing to upload: {report.url} already has this content, at commit {report.commit}")
