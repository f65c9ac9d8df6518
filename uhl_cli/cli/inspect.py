"""`uhl inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from uhl_cli.cli import options as shared
from uhl_cli.cli.edge import error_edge, print_result


def inspect(
    adapter: Annotated[Path, typer.Argument(help="Adapter file of `uhl pretrain`, or task file of `uhl tune`.")],
    anchors: Annotated[
        bool, typer.Option("--anchors", help="Print all texts that the file holds, its words marked.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every invariant of the format; exit 1 with what is wrong.")
    ] = False,
    diff: Annotated[Path | None, typer.Option(help="Compare with another file of the same kind.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw the same as figures: a .png, .svg or .pdf file (needs the extra `figures`).",
            rich_help_panel=shared.OUTPUT_PANEL,
        ),
    ] = None,
    overwrite: shared.Overwrite = False,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    debug: shared.Debug = False,
) -> None:
    """Say what is in a file, check it, or compare it with another; needs no host, no data and no torch.

    With --quiet one line: bytes and format version, tab separated; with --diff, whether the bytes are identical or
    different.
    """
    with error_edge(debug=debug):
        from uhl_cli.errors import FormatError
        from uhl_cli.inspect.report import InspectOptions
        from uhl_cli.inspect.run import run_inspect

        options = InspectOptions(
            file=adapter, anchors=anchors, plot=plot, overwrite=overwrite, verify=verify, diff=diff
        )
        report = run_inspect(options)
        problems = report.verification.problems if report.verification is not None else ()
        if json:
            print_result(report.model_dump_json(indent=2))
        elif problems:
            print_result("\n".join(problems))
        elif quiet and report.comparison is not None:
            print_result("identical" if report.comparison.identical else "different")
        elif quiet:
            print_result(f"{report.bytes}\t{report.format_version}")
        else:
            from uhl_cli.cli.render_inspect import render_inspect

            render_inspect(report)
        if problems:
            count = f"{len(problems)} {'way' if len(problems) == 1 else 'ways'}"
            raise FormatError(f"{adapter} breaks the format in {count}.", "Get the file again from its source.")
