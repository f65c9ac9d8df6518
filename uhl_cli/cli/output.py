"""Output of the commands: results to stdout as a table, JSON or a quiet line, everything else to stderr.

Guarantee: no text from a file, a host or data is interpreted as markup or as a terminal command.  Every string of a
line or a cell passes `uhl_cli.text.one_line`; only commands set styles.  Commands print through this module alone.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOBase, TextIOWrapper
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, cast

import typer
from pydantic import BaseModel, ValidationError
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from uhl_cli.errors import OutputError, UhlError, UhlWarning
from uhl_cli.progress import ProgressBar, Stderr, abandon, progress_bar
from uhl_cli.text import one_line

if TYPE_CHECKING:  # both bring numpy, which `--help` does without
    from uhl_cli.metrics import Difference, Score
    from uhl_cli.reports import ExportReport, TuneReport
    from uhl_cli.schema import Degree

INTERRUPTED = 130
# The exit code of a process that ends by SIGPIPE.
NOBODY_READS = 141
# Rows are never wrapped for a file or a pipe.
_NO_TERMINAL = 100_000

Report = TypeVar("Report", bound=BaseModel)


class Span(NamedTuple):
    """Words in a style, as rich names styles."""

    text: str
    style: str = ""


Words = str | Span | Sequence[Span]


class Table:
    """A table that is filled row by row; its title above and its note below are never wrapped.

    :param left: Names of the first columns, whose text wraps on a narrow terminal.
    :param right: Names of the columns after them, which never wrap.
    :param form: `grid`; `list`, a grid without names; `compact`, without frame; `blocks`, cells side by side.
    """

    def __init__(
        self,
        title: str = "",
        *,
        left: Sequence[str] = (),
        right: Sequence[str] = (),
        note: str = "",
        form: Literal["grid", "list", "compact", "blocks"] = "grid",
    ) -> None:
        self.title = title
        self.note = note
        dense = form == "blocks"
        self._rich = RichTable(
            show_header=form != "list",
            box=box.SIMPLE_HEAD if form == "compact" else box.HEAVY_HEAD,
            show_edge=form != "compact",
            pad_edge=form != "compact",
            padding=(0, 1, 0, 0) if form == "compact" else (0, 0 if dense else 1),
            collapse_padding=dense,
        )
        for name in left:
            self._rich.add_column(Text(one_line(name)), overflow="fold")
        for name in right:
            self._rich.add_column(
                Text(one_line(name)),
                justify="center" if dense else "right",
                no_wrap=True,
                min_width=7 if dense else None,
            )

    def row(self, *cells: Words, style: str = "") -> None:
        """Add a row; missing cells at its end are empty."""
        self._rich.add_row(*(_text(cell) for cell in cells), style=style)

    def section(self) -> None:
        """Draw a line before the next row."""
        self._rich.add_section()


class Output:
    """Where one call of a command prints.

    :param json: Print results as JSON.
    :param quiet: Print results as lines for scripts, without progress.
    :param debug: Print errors with their traceback.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False, debug: bool = False) -> None:
        self._json = json
        self._quiet = quiet
        self._debug = debug
        self._stderr = Stderr()
        self._sink = _Stdout()
        self._stdout = Console(file=cast(IO[str], self._sink), highlight=False)
        if not self._stdout.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
            self._stdout.width = _NO_TERMINAL

    def result(
        self,
        report: Report,
        *,
        quiet: Sequence[Sequence[object]],
        table: Callable[[Output, Report], None],
    ) -> None:
        """Print a result.

        :param quiet: Lines for scripts, as fields that tabs separate.
        :param table: Prints the report for people, by `line` and `table`.
        """
        if self._json:
            self._sink.write(_harmless(report.model_dump_json(indent=2)) + "\n")
        elif self._quiet:
            self.lines(quiet)
        else:
            table(self, report)

    def part(
        self, records: Sequence[str], *, quiet: Callable[[], Sequence[Sequence[object]]], table: Callable[[], Table]
    ) -> bool:
        """Print a part of a result that comes in parts: a table for people, else JSON lines.

        :param records: JSON, one line each.
        :param quiet: Lines for scripts, as in `result`.
        :returns: False once stdout's reader has closed it.
        """
        if self._json or not (self._quiet or self._sink.isatty()):
            self._sink.write("".join(_harmless(record) + "\n" for record in records))
        elif self._quiet:
            self.lines(quiet())
        else:
            self.table(table())
        return not self._sink.left

    def lines(self, rows: Sequence[Sequence[object]]) -> None:
        """Print lines of tab-separated fields, whatever the output format."""
        self._sink.write("".join("\t".join(one_line(field) for field in row) + "\n" for row in rows))

    def line(self, words: Words) -> None:
        """Print one line for people, never wrapped."""
        self._stdout.print(_text(words), soft_wrap=True)

    def table(self, table: Table) -> None:
        """Print a table for people."""
        if table.title:
            self.line(Span(table.title, "italic"))
        self._stdout.print(table._rich)
        if table.note:
            self.line(Span(table.note, "dim italic"))

    def note(self, text: str, label: str = "") -> None:
        """Print one line on stderr."""
        self._stderr.say(text, label=label)

    def asks(self) -> bool:
        """Whether somebody can answer `confirm`: both stdin and stderr are a terminal."""
        return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))

    def confirm(self, question: str) -> bool:
        """Ask for yes or no on stderr; no by default."""
        return typer.confirm(one_line(question), err=True)

    def warn_truncated(self, truncated: int) -> None:
        """Warn on stderr if evaluation texts were cut."""
        if truncated:
            self.note(
                f"evaluation texts cut at the longest input: {truncated}; "
                "pretrain with a larger --max-length, or choose a host that takes longer texts.",
                "warning: ",
            )

    def warn_worse(self, report: TuneReport | ExportReport, *, made: str, before: str) -> None:
        """Warn on stderr if training made a model worse than `before`, by more than chance.

        The agreements are not paired: chance is the interval of a difference of two shares (Newcombe, 1998, method 10).
        """
        found = []
        start, end = report.agreement.get(before), report.agreement.get(made)
        if start is not None and end is not None:
            chance = math.hypot(start.value - start.low, end.high - end.value)
            if start.value - end.value > chance:
                found.append(f"agreement with the teacher {start.value:.3f} before and {end.value:.3f} now")
        gain = report.gains.get(before)
        if gain is not None and gain.high < 0:
            start, end = report.scores[before], report.scores[made]
            found.append(f"{end.metric} {start.value:.3f} before and {end.value:.3f} now")
        if found:
            what = "the port that it started from" if before == "zero_shot" else "what was tuned before"
            said = f"{report.output} is worse than {what}: {', '.join(found)}; try more --steps."
            self.note(said, "warning: ")

    def degree(self, degree: Degree, name: str) -> None:
        """One line if not all layers of a target can be edited; `name` is the one that the user gave."""
        if degree != "all":
            said = "updates on a part of the layers" if degree == "some" else "no updates, the readout alone"
            self.line(f"{said}: see `uhl hosts {shlex.quote(name)}`")

    def progress(self) -> ProgressBar:
        """The progress reporter for commands, as a context manager."""
        return progress_bar(quiet=self._quiet)

    def progress_beside_parts(self) -> ProgressBar:
        """The same for a command that prints with `part` while it runs; silent if its tables show the progress.

        :raises OutputError: Stdout was closed before the start.
        """
        if sys.stdout is None:
            raise OutputError("stdout is closed, so the result cannot be printed.", "Name a file with --output.")
        return progress_bar(quiet=self._quiet or (self._sink.isatty() and not self._json), printing=True)

    @contextmanager
    def errors(self, *, interrupted_hint: str = "") -> Iterator[None]:
        """Turn errors into one line on stderr and an exit code, and each `UhlWarning` into one line, once.

        Exit codes: 1 an error, 2 wrong usage, 3 beyond a budget, 130 interrupted, 141 the reader of stdout has left.
        """
        try:
            with self._warnings():
                yield
        except UhlError as error:
            self._error(str(error))
            raise typer.Exit(error.exit_code) from error
        except ValidationError as error:
            first = error.errors()[0]
            field = str(first["loc"][-1] if first["loc"] else "")
            self._error(f"--{field.replace('_', '-')}: {first['msg']}. See --help.")
            raise typer.Exit(2) from error
        except OSError as error:
            name = f" ({error.filename})" if error.filename else ""
            self._error(f"{error.strerror or error}{name}. Check the path, its permissions and the space left.")
            raise typer.Exit(1) from error
        except MemoryError as error:
            self._error("out of memory. Use a smaller --batch-size or host.")
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            self._error(f"interrupted. {str(error) or interrupted_hint}".rstrip())
            raise typer.Exit(INTERRUPTED) from error
        if self._sink.left:
            raise typer.Exit(NOBODY_READS)

    @contextmanager
    def _warnings(self) -> Iterator[None]:
        said = set[str]()
        with warnings.catch_warnings():
            warnings.simplefilter("always", UhlWarning)
            others = warnings.showwarning

            def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:  # noqa: ANN401
                if not issubclass(category, UhlWarning):
                    others(message, category, *where, **more)
                elif str(message) not in said and is_main_process():
                    said.add(str(message))
                    self.note(str(message), "warning: ")

            warnings.showwarning = show
            yield

    def _error(self, text: str) -> None:
        if self._debug:
            for line in traceback.format_exc().splitlines():
                self._stderr.say(line)
        self._stderr.say(text, label="error: ", style="bold red")


@contextmanager
def finished() -> Iterator[None]:
    """Context of the whole process: no traceback on a closed pipe, a full disk or in any encoding, even of `--help`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        abandon(sys.stdout)
        if error.errno == errno.EPIPE:
            raise SystemExit(NOBODY_READS) from None
        Stderr().say(f"cannot write to stdout: {error.strerror or error}.", label="error: ", style="bold red")
        raise SystemExit(1) from None
    except SystemExit as left:
        # click ends the process with 1 when the reader of `--help` leaves.
        if isinstance(left.__context__, OSError) and left.__context__.errno == errno.EPIPE:
            abandon(sys.stdout)
            raise SystemExit(NOBODY_READS) from None
        raise


def is_main_process() -> bool:
    """False in the other processes of `accelerate launch`, which print nothing."""
    return os.environ.get("RANK", "0") == "0"


def interval(score: Score | Difference | None) -> str:
    """A value with its 95 % interval."""
    return "-" if score is None else f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"


def _text(words: Words) -> Text:
    spans = [words] if isinstance(words, Span) else [Span(words)] if isinstance(words, str) else words
    return Text.assemble(*((one_line(span.text), span.style) for span in spans))


def _harmless(text: str) -> str:
    """The same JSON, with escapes for what is not printable or not in the encoding of stdout."""
    try:
        text.encode(_Stdout().encoding)
        known = True
    except UnicodeEncodeError:
        known = False
    if known and text.isprintable():
        return text
    return "".join(
        letter if letter == "\n" or (letter.isprintable() and (known or letter.isascii())) else json.dumps(letter)[1:-1]
        for letter in text
    )


class _Stdout(TextIOBase):
    """The current standard output, closed or not; `left` is True once its reader has closed it."""

    left = False

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding of the written text."""
        return getattr(sys.stdout, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return sys.stdout is not None and sys.stdout.isatty()

    def write(self, text: str) -> int:
        """Write.  A closed pipe (`| head -1`) is no error: the command continues to its own exit code.

        :raises OutputError: When it cannot be written for another reason, such as a full disk.
        """
        if sys.stdout is None or not text:  # closed before the start
            return len(text)
        try:
            sys.stdout.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
            sys.stdout.flush()
        except OSError as error:
            abandon(sys.stdout)
            self.left = True
            if error.errno != errno.EPIPE:
                hint = "Free some space, or send the result elsewhere."
                raise OutputError(f"cannot write to stdout: {error.strerror or error}.", hint) from error
        return len(text)
