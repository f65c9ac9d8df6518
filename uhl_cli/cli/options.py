"""Commands of the command line, built from the records of their options.

`command` declares a command: its function gets the record and the output, and its options, with defaults, bounds and
help, come from the record's fields (`uhl_cli.commands.flags`).  The record is imported when the command is called or
its help is shown, so that `uhl --help` stays fast.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar, get_args, get_origin

import typer
from rich.markup import escape

from uhl_cli.cli.output import Output
from uhl_cli.errors import UsageError

if TYPE_CHECKING:
    from uhl_cli.commands.flags import Flag, Options

Record = TypeVar("Record", bound="Options")

_NONE = type(None)
# Options of every command that control how it prints.
_PRINTING = {
    "json": ("--json", "Print the report as JSON."),
    "quiet": ("--quiet", "-q", "Show no progress and print only what a script needs."),
    "debug": ("--debug", "Show the traceback of an error."),
}
# Options of these names or nested records are listed under their own heading in every command.
_PANELS = {"host": "Host", "target": "Host", "target_config": "Host", "data": "Data", "training": "Training"}
_PANELS |= {"device": "Host", "offline": "Host", "output": "Output", "overwrite": "Output", "cache": "Host"}


@dataclass(frozen=True)
class Command(Generic[Record]):
    """A command.

    :param function: Runs it; the docstring is its help.
    :param record: Imports the class of the record that the function takes.
    :param example: A call that works, for the help.
    :param panels: Names of options, by the heading that lists them.
    :param metavars: Placeholders for the values of options in the help.
    :param interrupted: What to do after Ctrl-C.
    :param hint: What to do without the default file of the argument, by the values given, where that is something else
        than to make one.
    """

    function: Callable[[Record, Output], None]
    record: Callable[[], type[Record]]
    example: str
    panels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    metavars: Mapping[str, str] = field(default_factory=dict)
    interrupted: str = ""
    hint: Callable[[Mapping[str, Any]], str | None] = lambda _: None

    @property
    def name(self) -> str:
        """As on the command line."""
        return self.function.__name__

    def add_to(self, app: typer.Typer, *, options: bool) -> None:
        """Add this command to an application, with its options or with its help alone."""

        def call(context: typer.Context, **values: Any) -> None:  # noqa: ANN401 - typer has checked them
            self._call(context, values)

        parameters = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
        if options:
            parameters += [self._parameter(flag) for flag in self.record().flags()]
            parameters += [_printing(name, *words) for name, words in _PRINTING.items()]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {}
        # Lines wrap at the width of the terminal, not as in the source.
        call.__doc__ = "\n\n".join(" ".join(each.split()) for each in (self.function.__doc__ or "").split("\n\n"))
        app.command(self.name, epilog=f"Example: {self.example}")(call)

    def _call(self, context: typer.Context, values: dict[str, Any]) -> None:
        output = Output(**{name: values.pop(name) for name in _PRINTING})
        with output.errors(interrupted_hint=self.interrupted):
            kind = self.record()
            given = {}
            for flag in kind.flags():
                value = values[_identifier(flag)]
                source = context.get_parameter_source(_identifier(flag))
                default = source is not None and source.name == "DEFAULT"
                if flag.name == kind.argument and default and value is not None:
                    self._refuse_missing(Path(value), values)
                given[flag.name] = value.value if isinstance(value, Enum) else value
            self.function(kind.from_flags(given).fetched(given), output)

    def _refuse_missing(self, path: Path, values: Mapping[str, Any]) -> None:
        """Explain how to make the default file that a command reads.

        :raises UsageError: When it does not exist.
        """
        if not path.exists():
            hint = f"Make one with `uhl pretrain`, or name an adapter: `uhl {self.name} FILE`."
            raise UsageError(f"there is no {path} in this folder.", self.hint(values) or hint)

    def _parameter(self, flag: Flag) -> inspect.Parameter:
        """The flag as a typer parameter, without bounds: the record checks them with a one-line error."""
        annotation, default = _typed(flag)
        if flag.paths[0][0] in self.record().files:  # a hub id too, and a path forgets its `./`
            annotation = str | None if default is None else str
        shown: dict[str, Any] = {"help": escape(flag.help), "metavar": self.metavars.get(flag.name)}
        if flag.name == self.record().argument:
            info = typer.Argument(**shown | {"metavar": self.metavars.get(flag.name, "ADAPTER")})
        elif flag.name == self.record().rest:
            info = typer.Argument(**shown)
        else:
            declared = f"--{flag.name}"
            if annotation is bool:
                declared += f"/--no-{flag.name}" if default is True else ""
            head, last = flag.paths[0][0], flag.paths[0][-1]
            listed = (panel for panel, names in self.panels.items() if flag.name in names)
            info = typer.Option(declared, rich_help_panel=next(listed, _PANELS.get(head, _PANELS.get(last))), **shown)
        if flag.required:
            default = inspect.Parameter.empty
        return inspect.Parameter(
            _identifier(flag), inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, info]
        )


def command(
    record: Callable[[], type[Record]],
    **how: Any,  # noqa: ANN401 - see Command
) -> Callable[[Callable[[Record, Output], None]], Command[Record]]:
    """Make a command of a function; see `Command`."""
    return lambda function: Command(function, record, **how)


def _identifier(flag: Flag) -> str:
    return flag.name.replace("-", "_")


def _typed(flag: Flag) -> tuple[Any, Any]:
    """Type and default as typer takes them: choices as an enumeration, several values as a list."""
    members = get_args(flag.field.annotation)
    optional = _NONE in members or (flag.default is None and not flag.required)
    inner: Any = next(each for each in members if each is not _NONE) if _NONE in members else flag.field.annotation
    default: Any = flag.default
    if get_origin(inner) is Literal:
        choices: Any = Enum(flag.name, {choice: choice for choice in get_args(inner)}, type=str)  # type: ignore[misc]
        inner, default = choices, default if default is None or flag.required else choices(default)
    elif get_origin(inner) in (tuple, dict):
        inner, default = list[get_args(inner)[0]], None  # type: ignore[misc]
        optional = not flag.required
    return (inner | None if optional else inner), default


def _printing(name: str, *words: str) -> inspect.Parameter:
    info = typer.Option(*words[:-1], help=words[-1], rich_help_panel="Output")
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=False, annotation=Annotated[bool, info])
