"""The `uhl` application.  Importing it imports neither torch nor transformers, nor the records of the commands."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from uhl_cli import __version__
from uhl_cli.cli.budget import budget
from uhl_cli.cli.compare import compare
from uhl_cli.cli.demo import demo
from uhl_cli.cli.export import export
from uhl_cli.cli.hosts import hosts
from uhl_cli.cli.inspect import inspect
from uhl_cli.cli.list import list as list_files
from uhl_cli.cli.options import Command
from uhl_cli.cli.output import finished
from uhl_cli.cli.port import port
from uhl_cli.cli.predict import predict
from uhl_cli.cli.pretrain import pretrain
from uhl_cli.cli.push import push
from uhl_cli.cli.tune import tune

_ALL: tuple[Command[Any], ...] = (
    demo,
    pretrain,
    port,
    tune,
    predict,
    export,
    push,
    inspect,
    list_files,
    budget,
    hosts,
    compare,
)
COMMANDS: dict[str, Command[Any]] = {each.name: each for each in _ALL}
_SETTINGS = {"help_option_names": ["-h", "--help"]}


class _Commands(TyperGroup):
    """Adds a command's options only when it is called or its help is shown."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:  # noqa: ANN401 - typer's
        name, found, rest = super().resolve_command(ctx, args)
        return name, with_options(name) if name in COMMANDS else found, rest


def with_options(name: str) -> Any:  # noqa: ANN401 - click's command, whose package depends on typer's release
    """The command of that name with all its options."""
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=_SETTINGS)
    COMMANDS[name].add_to(alone, options=True)
    return typer.main.get_command(alone)


app = typer.Typer(
    name="uhl",
    cls=_Commands,
    help="Train one adapter under 1 MB on one transformer, then port the same file to any other checkpoint.",
    epilog="Example: uhl port adapter.safetensors --target distilbert-base-uncased",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings=_SETTINGS,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"uhl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Holds the options before a command."""


for _each in COMMANDS.values():
    _each.add_to(app, options=False)


def main() -> None:
    """Entry point of the console script."""
    with finished():
        app()
