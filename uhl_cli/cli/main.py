"""The `uhl` application.  Importing it imports neither torch nor transformers."""

from __future__ import annotations

from typing import Annotated

import typer

from uhl_cli import __version__
from uhl_cli.cli.budget import budget
from uhl_cli.cli.compare import compare
from uhl_cli.cli.demo import demo
from uhl_cli.cli.inspect import inspect
from uhl_cli.cli.port import port
from uhl_cli.cli.pretrain import pretrain
from uhl_cli.cli.tune import tune

app = typer.Typer(
    name="uhl",
    help="Train one adapter under 1 MB on one transformer, then carry the same file into any other checkpoint.",
    epilog="Example: uhl port adapter.safetensors --target prajjwal1/bert-tiny",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"uhl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Hold the options that stand before a command."""


app.command(epilog="Example: uhl demo --output demo")(demo)
app.command(epilog="Example: uhl pretrain --host bert-base-uncased --task sst2 --output adapter.safetensors")(pretrain)
app.command(epilog="Example: uhl port adapter.safetensors --target prajjwal1/bert-tiny --json")(port)
app.command(epilog="Example: uhl tune adapter.safetensors --target prajjwal1/bert-tiny --task sst2")(tune)
app.command(epilog="Example: uhl inspect adapter.safetensors --verify")(inspect)
app.command(epilog="Example: uhl budget adapter.safetensors --target bert-large-uncased --json")(budget)
app.command(epilog="Example: uhl compare --config published --mode trial --results-dir results")(compare)


def main() -> None:
    """Entry point of the console script."""
    app()
