"""`uhl demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from uhl_cli.cli import options as shared
from uhl_cli.cli.edge import error_edge, print_result
from uhl_cli.progress import progress_bar


def demo(
    source: Annotated[
        str, typer.Option(help="Model to train the adapter on.", rich_help_panel=shared.HOST_PANEL)
    ] = "builtin:base",
    target: Annotated[
        str, typer.Option(help="Model of another shape to carry it to.", rich_help_panel=shared.HOST_PANEL)
    ] = "builtin:small",
    task: Annotated[str, typer.Option(help="Task to train on.", rich_help_panel=shared.DATA_PANEL)] = "reviews",
    epochs: Annotated[
        float, typer.Option(help="Passes over the training data.", rich_help_panel=shared.TRAINING_PANEL)
    ] = 6.0,
    tune_steps: Annotated[
        int, typer.Option(min=1, help="Steps of tuning on the target.", rich_help_panel=shared.TRAINING_PANEL)
    ] = 500,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of everything random.", rich_help_panel=shared.TRAINING_PANEL)
    ] = 0,
    device: shared.Device = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder to keep the adapter and its task file in; without it they are thrown away.",
            rich_help_panel=shared.OUTPUT_PANEL,
        ),
    ] = None,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    debug: shared.Debug = False,
) -> None:
    """See the whole way in about two minutes, with nothing to download: train, port, tune, compare."""
    with error_edge(debug=debug, interrupted_hint="Run it again; nothing was kept."):
        from uhl_cli.commands.options import DemoOptions

        options = DemoOptions(
            source=source,
            target=target,
            task=task,
            epochs=epochs,
            tune_steps=tune_steps,
            device=device,
            seed=seed,
            output=output,
        )
        from uhl_cli.cli.render_demo import render_demo
        from uhl_cli.commands.demo import run_demo

        with progress_bar(quiet=quiet) as reporter:
            report = run_demo(options, reporter)
        if json:
            print_result(report.model_dump_json(indent=2))
        elif quiet:
            print_result(f"{report.port.scores['ported'].value:.6f}")
        else:
            render_demo(report)
